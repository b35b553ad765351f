"""Mechanisms that no record of a run can hold, measured on Scenes: one number per seed.

`python -m mmdd.claims FILE` writes them to the file that the page reads. Book: book/claims.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch

from mmdd.batches import Batch, inference
from mmdd.config import RunConfig
from mmdd.data.open import open_dataset
from mmdd.data.pairs import PairDataset
from mmdd.distill import CovMatch
from mmdd.distill.loop import Context
from mmdd.encoders import DualEncoder, build_model
from mmdd.errors import StoreError
from mmdd.presets import preset
from mmdd.runs import initial_pairs, make_context
from mmdd.statistics import streamed_statistics

SEEDS = (0, 1, 2)
_IMAGES = 200  # real images whose features are followed
_BATCH = 256  # pairs held at a time where all of them are gone over


def covariance_rank(share: float = 0.99, seeds: tuple[int, ...] = SEEDS) -> list[float]:
    """Directions that hold `share` of the squared norm of the real cross-covariance, in percent.

    C is the cross-covariance of h_v and h_l, the pretrained features of all training pairs (one
    caption an image, drawn by the seed), (d_v, d_l); the answer is 100 · k / min(d_v, d_l) for the
    smallest k with Σ_{i≤k} σ_i² ≥ share · Σ σ_i². A matrix of equal singular values would give
    100 · share. Source: CovMatch (NeurIPS 2025), on why means have to be matched too.
    """
    config, dataset, model = _scenes("heads")
    found = []
    for seed in seeds:
        context = _context(config, dataset, model, seed)
        images, choice = context.real.dataset.draw(
            context.real.split, len(context.real), np.random.default_rng(seed)
        )
        batches = (
            _features(model, context.real.take(images[i : i + _BATCH], choice[i : i + _BATCH]))
            for i in range(0, len(images), _BATCH)
        )
        covariance = streamed_statistics(batches).cross_covariance()
        found.append(100 * directions(covariance, share) / min(covariance.shape))
    return found


def directions(matrix: torch.Tensor, share: float) -> int:
    """How many singular directions of a matrix (p, q) hold `share` of its squared norm."""
    squares = torch.linalg.svdvals(matrix) ** 2
    return int((squares.cumsum(0) < share * squares.sum()).sum()) + 1


def feature_stability(encoder: str, seeds: tuple[int, ...] = SEEDS) -> list[float]:
    """Cosine of an encoder's features of real pairs before and after the online update, mean.

    encoder: "image" or "text". CovMatch, protocol `both`, with its tuned settings: the model is
    updated on real batches from one reset to the next; h of the same 200 pairs is compared at both
    ends, centred at the mean of the start. 1 is what an argument with fixed features assumes.
    Source: CovMatch (NeurIPS 2025), linearised objective and Algorithm 1.
    """
    side = ("image", "text").index(encoder)
    return [_both_stabilities(seed)[side] for seed in seeds]


@cache
def _both_stabilities(seed: int) -> tuple[float, float]:
    config, dataset, model = _scenes("both")
    context = _context(config, dataset, model, seed)
    method = CovMatch(config.settings, context)  # type: ignore[arg-type]
    watched = context.real.draw(_IMAGES, np.random.default_rng(seed))
    before = _features(method.model, watched)
    # Up to, and without, the iteration that puts the pretrained model back.
    for iteration in range(method.config.reset_every):
        method.backward(iteration)
        method.after_step(iteration)
    after = _features(method.model, watched)
    image, text = (
        torch.cosine_similarity(a - a.mean(0), b - a.mean(0), dim=1).mean().item()
        for a, b in zip(before, after, strict=True)
    )
    return image, text


@cache
def _scenes(protocol: str) -> tuple[RunConfig, PairDataset, DualEncoder]:
    config = preset("small", method="covmatch", pairs=20, protocol=protocol)
    return config, open_dataset(config.dataset, config.runtime), build_model(config.model)


def _context(config: RunConfig, dataset: PairDataset, model: DualEncoder, seed: int) -> Context:
    config = config.model_copy(update={"seed": seed})
    start = initial_pairs(config, dataset, model)
    own = build_model(config.model)
    return make_context(config, dataset, own, torch.device("cpu"), start)


def _features(model: DualEncoder, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and text features of a batch, (m, d_v) and (m, d_l), before the projections."""
    with inference(model):
        texts = batch.texts if batch.mask is None else model.text_features(batch.texts, batch.mask)
        return model.image_features(batch.images), texts


MEASURES: dict[str, Callable[[], list[float]]] = {
    "covariance rank (% of the dimension)": covariance_rank,
    "cosine of image features": lambda: feature_stability("image"),
    "cosine of text features": lambda: feature_stability("text"),
}


def load_measurements(path: str | Path) -> dict[str, list[float]]:
    """What `python -m mmdd.claims` wrote, by name; nothing where there is no such file.

    Raises `StoreError` for another file. Book: book/claims.
    """
    try:
        read = json.loads(Path(path).read_text(encoding="utf-8"))
        return {str(name): [float(v) for v in values] for name, values in read["values"].items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is not a file of measured mechanisms: {error!r}.") from error
