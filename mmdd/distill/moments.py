"""Matching the mean and the covariance that real pairs have in the pretrained features."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mmdd import losses
from mmdd.distill.base import PairDistiller, PairsConfig
from mmdd.distill.loop import Context, Terms
from mmdd.errors import ConfigError
from mmdd.statistics import streamed_statistics

_REAL_BLOCK = 500  # pairs that go through the encoders at a time


class MomentsConfig(PairsConfig):
    """Settings of moment matching beside those of `PairsConfig`.

    mean_weight: of the means. cross_weight: of the covariance of images with texts, which CovMatch
    matches. within_weight: of the covariances of images with images and of texts with texts.

    Book: notebooks/16_beyond.
    """

    iterations: int = Field(default=150, ge=1)
    mean_weight: float = Field(default=1.0, ge=0)
    cross_weight: float = Field(default=1.0, ge=0)
    within_weight: float = Field(default=1.0, ge=0)


class JointMoments:
    """Mean and covariance of real pairs in joint features, and a set's distance from them.

    A pair's joint features are those of its image and of its text before any projection, each of
    length one, side by side: (d_v + d_l,). All pairs of the split are looked at once (each image
    with a caption drawn from the seed), in float64 and O((d_v + d_l)²) memory. The context's model
    must be frozen and in the mode that its features are wanted in.

    Book: notebooks/16_beyond.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        with torch.no_grad():
            found = streamed_statistics(self._real())
        dtype = next(context.model.parameters()).dtype
        self.mean = found.mean_image.to(dtype)
        self.covariance = found.cross_covariance().to(dtype)

    def terms(
        self, images: Tensor, texts: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(means, cross, within) of a set: what is left to match, scalars ≥ 0, differentiable.

        images: (n, 3, H, W) in [0, 1]; texts, mask: as the protocol has them. With joint mean μ
        and covariance Σ (n - 1 in the denominator): ‖μ_S - μ_T‖², and the squared entries of
        Σ_S - Σ_T over ‖Σ_T‖², those of images with texts and the others. A mean needs no scale, as
        joint features have length √2; ‖μ_T‖² is no scale for it, being close to zero where the
        encoders' features are centred.
        """
        sides = self._features(images, texts, mask)
        d = sides[0].shape[1]
        z = torch.cat(sides, dim=1)
        means = (z.mean(dim=0) - self.mean).square().sum()
        apart = (
            losses.cross_covariance(z, z) - self.covariance
        ).square() / self.covariance.square().sum()
        cross = 2 * apart[:d, d:].sum()
        within = apart[:d, :d].sum() + apart[d:, d:].sum()
        return means, cross, within

    def _real(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Joint features with themselves: their cross-covariance is the covariance."""
        for batch in self.context.real.epoch(_REAL_BLOCK, self.context.seed, 0):
            z = torch.cat(self._features(batch.images, batch.texts, batch.mask), dim=1)
            yield z, z

    def _features(self, images: Tensor, texts: Tensor, mask: Tensor | None) -> list[Tensor]:
        model = self.context.model
        with self.context.autocast(images.device):
            sides = model.image_features(images), model.text_features(texts, mask)
        return [F.normalize(side, dim=1) for side in self.context.widened(*sides)]


class Moments(PairDistiller):
    """Pairs with the mean and the covariance of the real ones in the pretrained encoders' features.

    The encoders never change, so the real side is one pass over the data before the first
    iteration, and an iteration costs a pass over the set: no real batch, no model trained on the
    way, no experts, no projection. Raises `ConfigError` for fewer than two synthetic or real pairs,
    and with nothing to learn or no loss.

    Source: this project's; DM (WACV 2023) has the means, CovMatch (NeurIPS 2025) one block of the
    covariance, of projected features of a model on its way. Book: notebooks/16_beyond.
    """

    name = "moments"
    uncompiled = ""

    config: MomentsConfig

    def __init__(self, config: MomentsConfig, context: Context) -> None:
        super().__init__(config, context)
        if len(context.start) < 2 or len(context.real) < 2:
            raise ConfigError(
                "moments needs at least two synthetic and two real pairs for a covariance, not "
                f"{len(context.start)} and {len(context.real)}."
            )
        if not config.mean_weight + config.cross_weight + config.within_weight > 0:
            raise ConfigError(
                "moments has no loss: one of mean_weight, cross_weight and within_weight must be "
                "above 0."
            )
        self.optimizer = self.make_optimizer()
        self.model.eval().requires_grad_(False)
        self.real = JointMoments(context)

    def backward(self, iteration: int) -> Terms:
        means, cross, within = self.real.terms(self.set.pixels(), *self.set.text())
        config = self.config
        loss = config.mean_weight * means + config.cross_weight * cross
        loss = loss + config.within_weight * within
        self.differentiate(loss)
        return {"loss": loss, "means": means, "cross": cross, "within": within}
