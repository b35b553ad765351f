"""DC and DM: match gradients or mean features of real and synthetic batches, one step at a time."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmdd import losses
from mmdd.batches import on_device
from mmdd.distill.base import PairDistiller, PairsConfig
from mmdd.distill.loop import Context, Terms
from mmdd.errors import ConfigError
from mmdd.protocols import component_rates, parameter_groups, trained_parameters

_REAL, _SYNTHETIC, _MODEL = 1, 2, 3  # streams of random numbers
# DC's addend to the product of two norms: rows of no gradient, such as those of dead units, count
# 1, and rows of rounding errors, such as the biases of attention keys, about as much.
_GUARD = 1e-6


# -- settings --------------------------------------------------------------------------------------


class MatchingConfig(PairsConfig):
    """What the settings of DC and DM share, beside those of `PairsConfig`.

    real_batch, synthetic_batch: pairs per iteration, all of them where there are no more.
    Book: notebooks/05_trajectory_matching.
    """

    real_batch: int = Field(default=256, ge=2)
    synthetic_batch: int = Field(default=256, ge=2)


class GradientMatchingConfig(MatchingConfig):
    """Settings of DC, beside those of `MatchingConfig`.

    The published settings are for labelled images: lr_image, momentum, model_momentum and no weight
    decay are those of the released code for any number of images, reset_every and model_steps those
    for 50 images per class (its outer and inner loop; its inner loop counts epochs).

    vectors: match biases, norm scales and gains too, which the released code leaves out. update:
    what the model is trained on after each iteration, in model_steps SGD steps. reset_every:
    iterations after which it goes back to pretrained encoders and fresh projections.
    model_lr_*, model_momentum, model_weight_decay: of those steps. temperature: of InfoNCE, in the
    matched gradients and in the steps.
    Source: DC (ICLR 2021), Algorithm 1; LoRS (ICML 2024), Table 1.
    Book: notebooks/05_trajectory_matching.
    """

    lr_image: float = Field(default=0.1, ge=0)
    lr_text: float = Field(default=0.1, ge=0)
    vectors: bool = False
    update: Literal["synthetic", "real", "none"] = "synthetic"
    model_steps: int = Field(default=10, ge=1)
    reset_every: int = Field(default=50, ge=1)
    model_lr_image: float = Field(default=0.01, ge=0)
    model_lr_text: float = Field(default=0.01, ge=0)
    model_lr_heads: float = Field(default=0.1, ge=0)
    model_momentum: float = Field(default=0.5, ge=0, lt=1)
    model_weight_decay: float = Field(default=0.0, ge=0)
    temperature: float = Field(default=0.07, gt=0)


class DistributionMatchingConfig(MatchingConfig):
    """Settings of DM, beside those of `MatchingConfig`; lr_image and momentum are the paper's.

    DM's augmentation of the images is not part of it.

    normalize: match the means of L2-normalised projected features instead of raw ones (not the
    paper's). reset_every: iterations after which new projections are drawn.
    Source: DM (WACV 2023), Algorithm 1; LoRS (ICML 2024), Table 1.
    Book: notebooks/05_trajectory_matching.
    """

    normalize: bool = False
    reset_every: int = Field(default=1, ge=1)


# -- what is matched -------------------------------------------------------------------------------


def gradient_distance(
    real: Sequence[Tensor], synthetic: Sequence[Tensor], vectors: bool = False
) -> Tensor:
    """DC's distance of two gradients, tensor by tensor: the sum over rows of 1 - cosine.

    real, synthetic: gradients of the same parameters, in the same order and shapes. A tensor
    (out, …) has `out` rows: the weights of one output each. A tensor with one entry per output
    (bias, norm scale, a convolution's gain) is a single row if `vectors`, else left out; scalars
    are always left out, as their cosine is a sign. Returns a scalar. Raises `ConfigError` where
    nothing is left to compare.

    Source: DC (ICLR 2021), layer-wise d(A, B); guard and left-out vectors as in the released code.
    Book: notebooks/05_trajectory_matching.
    """
    terms = []
    for r, s in zip(real, synthetic, strict=True):
        single = r.ndim < 2 or r.numel() == len(r)
        if r.numel() == 1 or (single and not vectors):
            continue
        rows = 1 if single else len(r)
        r, s = r.reshape(rows, -1), s.reshape(rows, -1)
        cosines = (r * s).sum(dim=1) / (r.norm(dim=1) * s.norm(dim=1) + _GUARD)
        terms.append((1 - cosines).sum())
    if not terms:
        raise ConfigError("the gradients hold no weight matrix: there is nothing to compare.")
    return torch.stack(terms).sum()


def mean_distance(real: Tensor, synthetic: Tensor) -> Tensor:
    """DM's distance of two sets of features, (m, d) and (n, d): ‖mean - mean‖², a scalar.

    Source: DM (WACV 2023), Algorithm 1, for one class.
    Book: notebooks/05_trajectory_matching.
    """
    return (real.mean(dim=0) - synthetic.mean(dim=0)).square().sum()


# -- the model -------------------------------------------------------------------------------------


class OnlineModel:
    """A model that starts again every period: pretrained encoders, projections of that period.

    trained: the parameters to ask gradients of, by name; the others keep still. optimizer: makes
    the optimiser of `step` anew for every period, from the trained parameters by name; None for a
    model without steps. Dropout is off throughout. Book: notebooks/05_trajectory_matching.
    """

    def __init__(
        self,
        context: Context,
        trained: dict[str, nn.Parameter],
        optimizer: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer] | None = None,
    ) -> None:
        self.context, self.model, self.trained = context, context.model, trained
        self.model.eval()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)
        self._pretrained = {name: p.detach().clone() for name, p in trained.items()}
        self._make_optimizer = optimizer
        self._optimizer: torch.optim.Optimizer | None = None
        self.period = -1
        self.go_to(0)

    def go_to(self, period: int) -> None:
        """Start again if this is another period than the current one."""
        if period == self.period:
            return
        self.period = period
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(self._pretrained[name])
        self.model.reset_heads(seed=(self.context.seed + 1) * 1_000_003 + period)
        if self._make_optimizer is not None:
            self._optimizer = self._make_optimizer(self.trained)

    def project(
        self, images: Tensor, texts: Tensor, mask: Tensor | None, twice: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Projected features (m, d) each, not normalised; `twice`: to be differentiated twice."""
        # The fused attention kernels have no second derivative.
        kernel = sdpa_kernel(SDPBackend.MATH) if twice else nullcontext()
        with kernel, self.context.autocast(self.context.real.device):
            p_image, p_text = self.model(images, texts, mask, normalize=False)
        return self.context.widened(p_image, p_text)

    def info_nce(
        self,
        images: Tensor,
        texts: Tensor,
        mask: Tensor | None,
        temperature: float,
        twice: bool = False,
    ) -> Tensor:
        """The contrastive loss of a batch, a scalar."""
        p_image, p_text = self.project(images, texts, mask, twice)
        return losses.info_nce(
            F.normalize(p_image, dim=-1), F.normalize(p_text, dim=-1), temperature
        )

    def gradient(self, loss: Tensor, twice: bool = False) -> list[Tensor | None]:
        """Of the trained parameters, in their order; None for those that the loss has not met."""
        parameters = list(self.trained.values())
        return list(torch.autograd.grad(loss, parameters, create_graph=twice, allow_unused=True))

    def step(self, loss: Tensor) -> None:
        """One optimiser step on the trained parameters."""
        assert self._optimizer is not None
        for parameter, gradient in zip(self.trained.values(), self.gradient(loss), strict=True):
            parameter.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"period": self.period, "trained": dict(self.trained)}
        if self._optimizer is not None:
            state["optimizer"] = self._optimizer.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.go_to(state["period"])
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["trained"][name])
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state["optimizer"])


# -- the methods -----------------------------------------------------------------------------------


class _Matching(PairDistiller):
    """What DC and DM share: batches, and a model that starts again."""

    config: MatchingConfig
    online: OnlineModel

    def __init__(self, config: MatchingConfig, context: Context) -> None:
        super().__init__(config, context)
        self.optimizer = self.make_optimizer()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"model": self.online.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.online.load_state_dict(state["model"])

    def _real_pairs(self, iteration: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the set is matched with in an iteration."""
        batch = self.real_batch(self.config.real_batch, _REAL, iteration)
        return batch.images, batch.texts, batch.mask

    def _synthetic_batch(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        index = None  # the whole set, in its order
        if self.config.synthetic_batch < len(self.set):
            order = rng.permutation(len(self.set))[: self.config.synthetic_batch]
            index = on_device(order, self.device)
        return (self.set.pixels(index), *self.set.text(index))


class GradientMatching(_Matching):
    """DC for pairs: one batch in place of one for each class, InfoNCE in place of cross-entropy.

    The gradient of the parameters that the protocol trains, on a real batch, is what that on the
    synthetic batch should point to. Then the model takes its steps, on the set as it now is.
    Dropout is off throughout. Raises `ConfigError` for fewer than two pairs, whose InfoNCE is
    constant, or with nothing to learn.

    Source: DC (ICLR 2021), Algorithm 1; LoRS (ICML 2024), Table 1.
    Book: notebooks/05_trajectory_matching.
    """

    name = "dc"
    uncompiled = "it differentiates a gradient, and compiled code has no second derivative"

    config: GradientMatchingConfig

    def __init__(self, config: GradientMatchingConfig, context: Context) -> None:
        super().__init__(config, context)
        if len(context.start) < 2 or len(context.real) < 2:
            raise ConfigError(
                f"dc needs at least two synthetic and two real pairs for a contrast, "
                f"not {len(context.start)} and {len(context.real)}."
            )
        trained = trained_parameters(context.model, context.protocol)
        self.online = OnlineModel(context, trained, self._model_optimizer)

    def _model_optimizer(self, trained: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        config = self.config
        rates = component_rates(config.model_lr_image, config.model_lr_text, config.model_lr_heads)
        return torch.optim.SGD(
            parameter_groups(trained, rates),
            momentum=config.model_momentum,
            weight_decay=config.model_weight_decay,
        )

    def backward(self, iteration: int) -> Terms:
        """One matching loss: Σ over weight tensors and their rows of 1 - cos(∇ℓ^T, ∇ℓ^S).

        The terms beside it are InfoNCE on the two batches.
        """
        config, online = self.config, self.online
        online.go_to(iteration // config.reset_every)
        batch = self._real_pairs(iteration)
        real_loss = online.info_nce(*batch, config.temperature)
        real = online.gradient(real_loss)
        batch = self._synthetic_batch(self.rng(_SYNTHETIC, iteration))
        synthetic_loss = online.info_nce(*batch, config.temperature, twice=True)
        synthetic = online.gradient(synthetic_loss, twice=True)
        met = [
            (r, s) for r, s in zip(real, synthetic, strict=True) if r is not None and s is not None
        ]
        loss = gradient_distance([r for r, _ in met], [s for _, s in met], config.vectors)
        self.differentiate(loss)
        return {
            "loss": loss,
            "info_nce_real": real_loss,
            "info_nce_synthetic": synthetic_loss,
        }

    def after_step(self, iteration: int) -> Terms:
        """The model's InfoNCE steps, each on a batch of its own; the loss shown is the last's."""
        config = self.config
        if config.update == "none":
            return {}
        rng = self.rng(_MODEL, iteration)
        value = torch.zeros(())
        for _ in range(config.model_steps):
            if config.update == "real":
                batch = self.context.real.draw(config.real_batch, rng)
                images, texts, mask = batch.images, batch.texts, batch.mask
            else:
                with torch.no_grad():
                    images, texts, mask = self._synthetic_batch(rng)
            value = self.online.info_nce(images, texts.detach(), mask, config.temperature)
            self.online.step(value)
        return {"model_loss": value}

    def hint(self) -> str:
        config = self.config
        return (
            f"{super().hint()}, or those of the model: model_lr_image ({config.model_lr_image}), "
            f"model_lr_text ({config.model_lr_text}), model_lr_heads ({config.model_lr_heads})"
        )


class DistributionMatching(_Matching):
    """DM for pairs: mean projected features, image and text added, under ever new projections.

    The encoders stay pretrained; the protocol decides on the form of the text alone. The sum of the
    two sides says nothing of which image belongs to which text. Dropout is off throughout. Raises
    `ConfigError` with nothing to learn.

    Source: DM (WACV 2023), Algorithm 1; LoRS (ICML 2024), Table 1.
    Book: notebooks/05_trajectory_matching.
    """

    name = "dm"
    uncompiled = ""

    config: DistributionMatchingConfig

    def __init__(self, config: DistributionMatchingConfig, context: Context) -> None:
        super().__init__(config, context)
        # Without parameters to train, a checkpoint need not hold the encoders.
        self.online = OnlineModel(context, trained={})

    def backward(self, iteration: int) -> Terms:
        """One matching loss: ‖μ_v^T − μ_v^S‖² + ‖μ_l^T − μ_l^S‖², its terms by side."""
        self.online.go_to(iteration // self.config.reset_every)
        with torch.no_grad():
            real = self.online.project(*self._real_pairs(iteration))
        synthetic = self.online.project(*self._synthetic_batch(self.rng(_SYNTHETIC, iteration)))
        image, text = (
            mean_distance(self._to_match(r), self._to_match(s))
            for r, s in zip(real, synthetic, strict=True)
        )
        loss = image + text
        self.differentiate(loss)
        return {"loss": loss, "image": image, "text": text}

    def _to_match(self, projected: Tensor) -> Tensor:
        return F.normalize(projected, dim=-1) if self.config.normalize else projected
