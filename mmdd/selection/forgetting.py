"""Forgetting: keep the pairs that a model, once it has them right, does not get wrong again."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mmdd.batches import Batch, RealBatches
from mmdd.selection.base import Candidates, Selection
from mmdd.selection.features import PROTOCOL, kept, pairs_of, warm_up


def both_rank_one(z_image: Tensor, z_text: Tensor) -> Tensor:
    """(m,) bool: the pairs that find each other, image → text and text → image, in their batch.

    z_image, z_text: (m, d), L2-normalised. A wrong candidate that ties with the right one counts
    as ranked before it. Book: notebooks/03_coresets.
    """
    scores = z_image @ z_text.T  # (m, m)
    rivals = scores.masked_fill(torch.eye(len(scores), dtype=torch.bool, device=scores.device), -2)
    own = scores.diagonal()
    return (own > rivals.amax(dim=1)) & (own > rivals.amax(dim=0))


class ForgettingCounts:
    """Counts, for n pairs, how often one goes from correct to incorrect.

    Source: Toneva et al. (ICLR 2019); for pairs: MDM (CVPR 2026), supplement.
    Book: notebooks/03_coresets.
    """

    def __init__(self, pairs: int) -> None:
        self.events = np.zeros(pairs, dtype=np.int64)
        self.seen = 0  # epochs at the pair that was seen most often
        self._visits = np.zeros(pairs, dtype=np.int64)
        self._correct = np.zeros(pairs, dtype=bool)
        self._ever = np.zeros(pairs, dtype=bool)

    def update(self, rows: np.ndarray, correct: np.ndarray) -> None:
        """Take in how the model did on a batch: rows (m,) int64, none twice; correct (m,) bool."""
        self.events[rows] += self._correct[rows] & ~correct
        self._correct[rows] = correct
        self._ever[rows] |= correct
        self._visits[rows] += 1
        self.seen = int(self._visits.max())

    def scores(self) -> np.ndarray:
        """(n,) int64, low is good: the events, or for a pair that was never correct the number of
        epochs, which is more than any count of events can be."""
        return np.where(self._ever, self.events, self.seen)


class _Watched(RealBatches):
    """Epochs of the candidates with the one caption of each, and which of them came last."""

    def __init__(self, candidates: Candidates) -> None:
        own, device = candidates.trainable()
        super().__init__(candidates.dataset, "train", own, PROTOCOL, device)
        images, choice = candidates.pairs
        self._row = np.full(len(candidates.dataset), -1, dtype=np.int64)
        self._row[images] = np.arange(len(images))
        self._choice = choice
        self.rows = images[:0]

    def epoch(self, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
        for images, _ in self.dataset.batches(self.split, batch_size, seed, epoch):
            self.rows = self._row[images]
            yield self.take(images, self._choice[self.rows])


def forgetting_scores(candidates: Candidates) -> np.ndarray:
    """(n,) int64 of `ForgettingCounts` over a training of `forgetting_epochs`; low is good.

    A pair is judged in each epoch by the forward pass it is trained with, always with the same
    caption. From the disk if it is there. Raises what `mmdd.selection.features.features` raises.
    Source: MDM (CVPR 2026), supplement. Book: notebooks/03_coresets.
    """
    return kept(candidates, __name__, lambda: _count(candidates))["scores"].numpy()


def _count(candidates: Candidates) -> dict[str, Tensor]:
    real = _Watched(candidates)
    counts = ForgettingCounts(len(real))

    def judge(module: torch.nn.Module, given: object, found: tuple[Tensor, Tensor]) -> None:
        counts.update(real.rows, both_rank_one(*(z.detach() for z in found)).cpu().numpy())

    warm_up(candidates, candidates.config.forgetting_epochs, real, judge)
    return {"scores": torch.from_numpy(counts.scores())}


def least_forgotten(scores: np.ndarray, pairs: int, rng: np.random.Generator) -> np.ndarray:
    """The `pairs` rows of (n,) scores with the lowest ones; equal ones in random order.

    Many pairs are never forgotten, and the order of the data set must not choose among them.
    Returns (pairs,) int64. Book: notebooks/03_coresets.
    """
    order = rng.permutation(len(scores))
    return order[np.argsort(scores[order], kind="stable")][:pairs]


def select_forgetting(candidates: Candidates, pairs: int, rng: np.random.Generator) -> Selection:
    """The pairs that are forgotten least often. Book: notebooks/03_coresets."""
    return pairs_of(candidates, least_forgotten(forgetting_scores(candidates), pairs, rng))
