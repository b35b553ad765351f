"""CovMatch with pairs that are not one to one: a learned similarity, or blended features."""

from abc import abstractmethod
from copy import deepcopy

import torch
from pydantic import Field
from torch import Tensor, nn

from mmdd import losses
from mmdd.distill.covmatch import CovMatch, CovMatchConfig
from mmdd.distill.loop import Context, Terms
from mmdd.errors import ConfigError
from mmdd.similarity import LowRankSimilarity
from mmdd.synthetic import SyntheticPairs

_REAL, _SYNTHETIC, _BLEND = 1, 2, 3  # streams of random numbers; CovMatch has the first two too


def soft_covariance(image: Tensor, text: Tensor, similarity: Tensor) -> Tensor:
    """What eNCE has in the place of the cross-covariance: (n, p), (n, q), (n, n) → (p, q).

    Vᵀ (Y - (r 1ᵀ + 1 cᵀ) / 2n) L / (n - 1) with the similarity Y, its row sums r and column sums c.
    For logits V W Lᵀ it is -n / (n - 1) times the gradient of `losses.extended_info_nce` by W at
    W = 0, as the cross-covariance is for InfoNCE: the two are equal where Y is the identity. Raises
    `ConfigError` for fewer than two rows or a similarity of another size.

    Book: notebooks/16_beyond.
    """
    n = len(image)
    if n < 2 or len(text) != n or similarity.shape != (n, n):
        raise ConfigError(
            "soft_covariance needs the same number of rows, at least two, in both sets, and a "
            f"similarity of that size; got {n}, {len(text)} and {tuple(similarity.shape)}."
        )
    rows, columns = similarity.sum(dim=1, keepdim=True), similarity.sum(dim=0, keepdim=True)
    return image.T @ (similarity - (rows + columns) / (2 * n)) @ text / (n - 1)


class SoftCovMatch(CovMatch):
    """CovMatch in which every synthetic image belongs to every text by some weight.

    Book: notebooks/16_beyond.
    """

    @abstractmethod
    def weights(self, index: Tensor | None, iteration: int) -> Tensor:
        """The similarity Y of an iteration's synthetic pairs, (n, n); index: their rows, or all."""

    def backward(self, iteration: int) -> Terms:
        """CovMatch's loss with `soft_covariance` as the set's; the means are those of the set."""
        config = self.config
        if iteration > 0 and iteration % config.reset_every == 0:
            self._reset_model(iteration // config.reset_every)
        batch = self.real_batch(config.real_batch, _REAL, iteration)
        with torch.set_grad_enabled(config.update == "real"):
            self._real_features = self._project(batch.images, batch.texts, batch.mask)
        index = self.some_pairs(config.synthetic_batch, _SYNTHETIC, iteration)
        of_set = self._project(self.set.pixels(index), *self.set.text(index))
        real_image, real_text = (self._to_match(p.detach()) for p in self._real_features)
        syn_image, syn_text = (self._to_match(p) for p in of_set)
        wanted = config.rho * losses.cross_covariance(real_image, real_text)
        weights = self.weights(index, iteration)
        covariance = (wanted - soft_covariance(syn_image, syn_text, weights)).square().sum()
        means = sum(
            (real.mean(dim=0) - syn.mean(dim=0)).square().sum()
            for real, syn in ((real_image, syn_image), (real_text, syn_text))
        )
        loss = covariance + config.lambda_ * means
        self.differentiate(loss)
        return {"loss": loss, "covariance": covariance, "means": means}


class CovSimilarityConfig(CovMatchConfig):
    """Settings of CovMatch with a learned similarity, beside those of CovMatch.

    rank, alpha, lr_similarity: of the similarity, as LoRS has them. loss: of the students, which
    has to be one that takes a similarity.

    Book: notebooks/16_beyond.
    """

    loss: losses.LossName = "ence"
    rank: int = Field(default=10, ge=1)
    alpha: float = Field(default=3.0, ge=0)
    lr_similarity: float = Field(default=0.003, ge=0)


class CovSimilarity(SoftCovMatch):
    """CovMatch that learns a low-rank similarity of its images and texts with them.

    The similarity starts from the identity, so the first loss is CovMatch's.

    Source: CovMatch (NeurIPS 2025); the similarity is that of LoRS (ICML 2024) §3.4; joining them
    is this project's. Book: notebooks/16_beyond.
    """

    name = "cov-similarity"

    config: CovSimilarityConfig

    def __init__(self, config: CovSimilarityConfig, context: Context) -> None:
        with torch.random.fork_rng(devices=[]):  # the similarity's noise is the run's seed's
            torch.manual_seed(context.seed)
            similarity = LowRankSimilarity(len(context.start), config.rank, config.alpha)
        self.similarity = similarity.to(context.real.device)
        super().__init__(config, context)

    def weights(self, index: Tensor | None, iteration: int) -> Tensor:
        return self.similarity.matrix(index)

    def learned(self) -> list[tuple[str, nn.Parameter, float]]:
        of_similarity = [
            (f"similarity.{name}", p, self.config.lr_similarity)
            for name, p in self.similarity.named_parameters()
        ]
        return [*super().learned(), *of_similarity]

    def hint(self) -> str:
        return f"{super().hint()}, or lower lr_similarity ({self.config.lr_similarity})"

    def export(self) -> SyntheticPairs:
        found = super().export()
        found.similarity = deepcopy(self.similarity).cpu()
        return found


class CovBlendConfig(CovMatchConfig):
    """Settings of CovMatch with blended features, beside those of CovMatch.

    blend_beta: the weight of the other pair is drawn for every iteration from
    Beta(blend_beta, blend_beta), as RepBlend does for every student step.

    Book: notebooks/16_beyond.
    """

    blend_beta: float = Field(default=1.0, gt=0)


class CovBlend(SoftCovMatch):
    """CovMatch on features that are blended across the set, in the same way for image and text.

    With partners π and weight ω, both drawn for every iteration, a pair's features are
    (1 - ω) p_m + ω p_π(m), or P' = B P with B = (1 - ω) I + ω Π. Rows and columns of B sum to one,
    so the means stay, and the cross-covariance of P' is `soft_covariance` with the similarity BᵀB:
    a blended set is one with a similarity that is drawn and not learned.

    Source: CovMatch (NeurIPS 2025); blending is that of RepBlend (NeurIPS 2025), here of the
    features that are matched; joining them is this project's. Book: notebooks/16_beyond.
    """

    name = "cov-blend"

    config: CovBlendConfig

    def weights(self, index: Tensor | None, iteration: int) -> Tensor:
        n = len(self.set) if index is None else len(index)
        rng = self.rng(_BLEND, iteration)
        identity = torch.eye(n, device=self.device, dtype=self.set.images.dtype)
        partner = torch.from_numpy(rng.permutation(n)).to(self.device)
        weight = float(rng.beta(self.config.blend_beta, self.config.blend_beta))
        blend = (1 - weight) * identity + weight * identity[partner]
        return blend.T @ blend
