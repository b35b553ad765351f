"""CovMatch: match the cross-covariance of real and synthetic features while the model moves on."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mmdd import losses
from mmdd.distill.base import PairDistiller, PairsConfig
from mmdd.distill.loop import Context, Terms
from mmdd.errors import ConfigError
from mmdd.protocols import component_rates, freeze_all_but, parameter_groups

_REAL, _SYNTHETIC = 1, 2  # streams of random numbers


class CovMatchConfig(PairsConfig):
    """Settings of CovMatch beside those of `PairsConfig`; the defaults are the paper's at N = 100.

    rho, lambda_: scale of the real covariance, weight of the mean matching. normalize: match
    L2-normalised projected features instead of raw ones (not the paper's). real_batch,
    synthetic_batch: pairs per iteration. update: what the model is trained on after each iteration.
    reset_every: iterations after which it goes back to pretrained encoders and fresh projections.
    model_lr_*: its learning rates. freeze: an encoder that the model update leaves alone.
    Source: CovMatch (NeurIPS 2025), Algorithm 1 and appendix. Book: notebooks/07_covmatch.
    """

    iterations: int = Field(default=10_000, ge=1)
    rho: float = Field(default=2.0, ge=0)
    lambda_: float = Field(default=0.1, ge=0)
    normalize: bool = False
    real_batch: int = Field(default=256, ge=2)
    synthetic_batch: int = Field(default=256, ge=2)
    update: Literal["real", "synthetic", "none"] = "real"
    freeze: Literal["none", "image", "text"] = "none"
    reset_every: int = Field(default=50, ge=1)
    model_lr_image: float = Field(default=0.01, ge=0)
    model_lr_text: float = Field(default=0.01, ge=0)
    model_lr_heads: float = Field(default=0.1, ge=0)
    model_momentum: float = Field(default=0.9, ge=0, lt=1)
    model_weight_decay: float = Field(default=5e-4, ge=0)
    temperature: float = Field(default=0.07, gt=0)


class CovMatch(PairDistiller):
    """CovMatch on any encoder pair, with text as token embeddings or as vectors.

    One forward pass over the real batch serves the matching loss and the model update: its
    projected features are used detached for the first and with their graph for the second.
    Dropout is off throughout. Raises `ConfigError` for a start or batch of fewer than two pairs.

    Source: CovMatch (NeurIPS 2025), Algorithm 1. Book: notebooks/07_covmatch.
    """

    name = "covmatch"
    uncompiled = ""

    config: CovMatchConfig

    def __init__(self, config: CovMatchConfig, context: Context) -> None:
        super().__init__(config, context)
        if len(context.start) < 2 or len(context.real) < 2:
            raise ConfigError(
                f"covmatch needs at least two synthetic and two real pairs for a covariance, "
                f"not {len(context.start)} and {len(context.real)}."
            )
        self.optimizer = self.make_optimizer()
        self.model.eval()
        self.trained = freeze_all_but(self.model, context.protocol)
        if config.freeze != "none":
            self.trained = {
                name: parameter
                for name, parameter in self.trained.items()
                if not name.startswith(f"{config.freeze}_encoder.")
            }
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in self.trained)
        self._pretrained = {name: p.detach().clone() for name, p in self.trained.items()}
        self._reset_model(0)
        self._real_features: tuple[Tensor, Tensor] | None = None

    def backward(self, iteration: int) -> Terms:
        """One matching loss: ‖ρC^T − C^S‖² + λ(‖μ_v^T − μ_v^S‖² + ‖μ_l^T − μ_l^S‖²)."""
        config = self.config
        if iteration > 0 and iteration % config.reset_every == 0:
            self._reset_model(iteration // config.reset_every)
        batch = self.real_batch(config.real_batch, _REAL, iteration)
        needs_graph = config.update == "real"
        with torch.set_grad_enabled(needs_graph):
            self._real_features = self._project(batch.images, batch.texts, batch.mask)
        index = self.some_pairs(config.synthetic_batch, _SYNTHETIC, iteration)
        texts, mask = self.set.text(index)
        synthetic = self._project(self.set.pixels(index), texts, mask)
        real_image, real_text = (self._to_match(p.detach()) for p in self._real_features)
        syn_image, syn_text = (self._to_match(p) for p in synthetic)
        covariance, means = losses.covmatch_terms(
            real_image, real_text, syn_image, syn_text, config.rho
        )
        loss = covariance + config.lambda_ * means
        self.differentiate(loss)
        return {"loss": loss, "covariance": covariance, "means": means}

    def after_step(self, iteration: int) -> Terms:
        """The online model update: one InfoNCE step on the real batch (or on the set)."""
        if self.config.update == "none":
            return {}
        if self.config.update == "real":
            assert self._real_features is not None
            p_image, p_text = self._real_features
        else:
            index = self.some_pairs(self.config.synthetic_batch, _SYNTHETIC, iteration)
            with torch.no_grad():
                images = self.set.pixels(index)
            texts, mask = self.set.text(index)
            p_image, p_text = self._project(images, texts.detach(), mask)
        loss = losses.info_nce(
            F.normalize(p_image, dim=-1), F.normalize(p_text, dim=-1), self.config.temperature
        )
        parameters = list(self.trained.values())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.model_optimizer.step()
        self._real_features = None  # frees the graph
        return {"model_loss": loss}

    def hint(self) -> str:
        config = self.config
        return f"{super().hint()}, or match normalised features (normalize is {config.normalize})"

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "model": dict(self.trained),
            "model_optimizer": self.model_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["model"][name])
        self.model_optimizer.load_state_dict(state["model_optimizer"])

    def _project(self, images: Tensor, texts: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        with self.context.autocast(self.device):
            projected = self.model(images, texts, mask, normalize=False)
        return self.context.widened(*projected)

    def _to_match(self, projected: Tensor) -> Tensor:
        return F.normalize(projected, dim=-1) if self.config.normalize else projected

    def _reset_model(self, period: int) -> None:
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(self._pretrained[name])
        self.model.reset_heads(seed=(self.seed + 1) * 1_000_003 + period)
        self.model_optimizer = torch.optim.SGD(
            parameter_groups(
                self.trained,
                component_rates(
                    self.config.model_lr_image,
                    self.config.model_lr_text,
                    self.config.model_lr_heads,
                ),
            ),
            momentum=self.config.model_momentum,
            weight_decay=self.config.model_weight_decay,
        )
