"""RepBlend: trajectories of the projections alone, from features blended across a batch."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmdd import losses
from mmdd.batches import on_device
from mmdd.distill.loop import Context
from mmdd.distill.trajectory import LorsConfig, TrajectoryMatching
from mmdd.errors import ConfigError
from mmdd.experts import ExpertBuffer, prepare_experts, seeded_dropout

_BLEND = 3  # stream of random numbers


class RepBlendConfig(LorsConfig):
    """Settings of RepBlend, beside those of LoRS, whose losses and similarity it keeps.

    blend_beta: ρ, the weight of the other pair of the batch, is drawn for every student step from
    Beta(blend_beta, blend_beta), as mixup does and the released code with 1. None takes `blend`
    for every step instead; 0 blends nothing.

    Source: RepBlend (NeurIPS 2025). Book: notebooks/17_repblend_amd.
    """

    blend_beta: float | None = Field(default=1.0, gt=0)
    blend: float = Field(default=0.2, ge=0, le=1)


class RepBlend(TrajectoryMatching):
    """LoRS on the two projections alone, with blended features.

    Encoders stay frozen and give h; a student step projects and normalises
    (1 - ρ) h_m + ρ h_i, where i is another pair of the mini-batch, the same for image and text. The
    experts are those of the protocol "heads", also where the students train the image encoder too
    ("image+text_head"). Raises `ConfigError` under "both", whose texts are no vectors.

    Source: RepBlend (NeurIPS 2025). Book: notebooks/17_repblend_amd.
    """

    name = "repblend"

    config: RepBlendConfig

    @classmethod
    def prepare(
        cls, config: Any, context: Context, folder: Path, progress: bool = True
    ) -> tuple[ExpertBuffer, dict[str, Any]]:
        return prepare_experts(
            config.experts, cls.expert_context(config, context), folder, progress
        )

    @staticmethod
    def expert_context(config: Any, context: Context) -> Context:
        """What the experts are trained in: projections alone, whatever the students train."""
        return _of_heads(context)

    def __init__(self, config: RepBlendConfig, context: Context) -> None:
        super().__init__(config, _of_heads(context))

    def step_loss(
        self, theta: Sequence[Tensor], inputs: Sequence[Tensor], mask: Tensor | None, key: list[int]
    ) -> Tensor:
        images, texts, similarity = inputs
        named = self.layout.named(list(theta))
        partner, rho = self._partners(len(images), key)
        with (
            seeded_dropout(key, self.device),
            sdpa_kernel(SDPBackend.MATH),
            self.context.autocast(self.device),
        ):
            h_image = blended(self.model.image_features(images), partner, rho)
            h_text = blended(self.model.text_features(texts, mask), partner, rho)
            p_image = _project(self.model.image_head, "image_head.", named, h_image)
            p_text = _project(self.model.text_head, "text_head.", named, h_text)
        p_image, p_text = self.context.widened(p_image, p_text)
        return losses.contrastive_loss(
            self.config.loss,
            F.normalize(p_image, dim=-1),
            F.normalize(p_text, dim=-1),
            self.config.temperature,
            similarity,
        )

    def _partners(self, size: int, key: list[int]) -> tuple[Tensor, float]:
        """Who is blended with whom in a student step, and ρ; the same in every pass over it."""
        rng = np.random.default_rng([*key, _BLEND])
        partner = on_device(rng.permutation(size), self.device)
        beta = self.config.blend_beta
        return partner, self.config.blend if beta is None else float(rng.beta(beta, beta))


def blended(features: Tensor, partner: Tensor, rho: float) -> Tensor:
    """(1 - ρ) h_m + ρ h_i for every row m of (m, d) features; partner: (m,) int64, the row i.

    Source: RepBlend (NeurIPS 2025). Book: notebooks/17_repblend_amd.
    """
    return (1 - rho) * features + rho * features[partner]


def _project(head: nn.Module, prefix: str, named: dict[str, Tensor], features: Tensor) -> Tensor:
    own = {n.removeprefix(prefix): p for n, p in named.items() if n.startswith(prefix)}
    projected: Tensor = functional_call(head, own, (features,))
    return projected


def _of_heads(context: Context) -> Context:
    if context.protocol == "both":
        raise ConfigError(
            "repblend follows projections of vectors; under the protocol 'both' the texts are "
            "token embeddings: choose 'heads' or 'image+text_head'."
        )
    return replace(context, protocol="heads")
