"""MDM: match the distributions of joint features under models between the pretrained and experts.

The text encoder is frozen where the protocol freezes it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.func import functional_call

from mmdd import losses
from mmdd.distill.base import PairDistiller, PairsConfig
from mmdd.distill.loop import Context, Terms
from mmdd.encoders.dual import DualEncoder
from mmdd.errors import ConfigError
from mmdd.experts import ExpertBuffer, ExpertConfig, Layout, prepare_experts
from mmdd.interpolation import interpolate
from mmdd.snapshots import SnapshotCache

_REAL, _SYNTHETIC, _MODEL = 1, 2, 3  # streams of random numbers
_COMMON_HEADS = 77_000_000  # the seed of the projections that experts with a common start share
_EXPERTS_NEEDED = {"pretrained": 0, "fine-tuned": 1, "weighted-sum": 2, "interpolation": 2}


class MdmConfig(PairsConfig):
    """Settings of MDM beside those of `PairsConfig`; the defaults are the paper's at N = 100.

    Loss: lambda_contrastive · InfoNCE of the synthetic pairs + lambda_agreement · energy(u) +
    lambda_discrepancy · energy(g); a weight of 0 leaves a term out. features: what the energies
    compare: "agreement-discrepancy" is u and g, "singles" the image features (with
    lambda_agreement) and the text features (with lambda_discrepancy), "concatenation" both as one
    unit vector (with the sum of the two weights). kernel, sigma: of the energies.

    model: under which model an iteration compares. "interpolation" of two checkpoints with the
    start (α = alpha), the paper's; "weighted-sum", a random convex combination of two checkpoints;
    "fine-tuned", one random checkpoint; "pretrained", no expert at all: pretrained encoders and
    fresh projections in every iteration. A checkpoint is any snapshot after the start of any
    expert; two checkpoints are of two experts.

    common_start: all experts start from the same projections, as the displacements of different
    experts can be compared and added only in the same coordinates. False takes the buffer of the
    trajectory methods, whose experts have projections of their own: every displacement is then
    measured from its own start and put on the first expert's.

    real_batch, synthetic_batch: pairs per iteration.
    Source: MDM (CVPR 2026) and its supplement. Book: notebooks/08_mdm.
    """

    iterations: int = Field(default=3_000, ge=1)
    lambda_contrastive: float = Field(default=1.0, ge=0)
    lambda_agreement: float = Field(default=0.8, ge=0)
    lambda_discrepancy: float = Field(default=0.8, ge=0)
    features: Literal["agreement-discrepancy", "singles", "concatenation"] = "agreement-discrepancy"
    kernel: losses.KernelName = "geodesic"
    sigma: float = Field(default=0.5, gt=0)
    temperature: float = Field(default=0.07, gt=0)
    model: Literal["pretrained", "fine-tuned", "weighted-sum", "interpolation"] = "interpolation"
    alpha: float = Field(default=0.5, ge=0)
    common_start: bool = True
    real_batch: int = Field(default=64, ge=2)
    synthetic_batch: int = Field(default=64, ge=2)
    lr_image: float = Field(default=100.0, ge=0)
    lr_text: float = Field(default=100.0, ge=0)
    clip: float | None = Field(default=1.0, gt=0)
    experts: ExpertConfig = ExpertConfig()


class CommonStart(DualEncoder):
    """A model whose projections are always drawn from the same seed, whatever is asked for.

    Shares its parts with the model it is made of. Book: notebooks/08_mdm.
    """

    @classmethod
    def of(cls, model: DualEncoder) -> "CommonStart":
        return cls(model.image_encoder, model.text_encoder, model.image_head, model.text_head)

    def reset_heads(self, seed: int) -> None:
        super().reset_heads(_COMMON_HEADS)


class Mdm(PairDistiller):
    """MDM on any encoder pair, with text as vectors or as token embeddings.

    An iteration makes a model of two expert checkpoints, embeds a real and a synthetic batch with
    it, and takes the gradient of the loss to the set alone: the model is not trained, and dropout
    is off. Under the protocol `both`, which the paper has not, the text encoder is interpolated
    too. Raises `ConfigError` for a set, data or experts of fewer than two, and where no term of
    the loss or nothing to learn is left.

    Source: MDM (CVPR 2026). Book: notebooks/08_mdm.
    """

    name = "mdm"

    config: MdmConfig

    @classmethod
    def prepare(
        cls, config: MdmConfig, context: Context, folder: Path, progress: bool = True
    ) -> tuple[ExpertBuffer | None, dict[str, Any]]:
        _check(config, context)
        if config.model == "pretrained":
            return None, {}
        return prepare_experts(
            config.experts, cls.expert_context(config, context), folder, progress
        )

    @staticmethod
    def expert_context(config: MdmConfig, context: Context) -> Context:
        """What the experts are trained in: with a common start they have a buffer of their own."""
        if not config.common_start:
            return context
        return replace(
            context,
            model=CommonStart.of(context.model),
            model_config=context.model_config | {"heads_seed": _COMMON_HEADS},
        )

    def __init__(self, config: MdmConfig, context: Context) -> None:
        super().__init__(config, context)
        _check(config, context)
        self.layout = Layout.of(self.model, context.protocol)
        self.sizes = [shape.numel() for shape in self.layout.shapes]
        self.snapshots: SnapshotCache | None = None
        self._flat: Tensor | None = None  # of the last model, written over by the next
        if config.model != "pretrained":
            self.snapshots = SnapshotCache(context.prepared, self.device)
        self.model.eval()
        self.model.requires_grad_(False)
        self.optimizer = self.make_optimizer()

    def backward(self, iteration: int) -> Terms:
        """InfoNCE of the synthetic pairs, plus the energies between real and synthetic features."""
        parameters, ratio = self.draw_model(iteration)
        batch = self.real_batch(self.config.real_batch, _REAL, iteration)
        with torch.no_grad():
            real = self._embed(parameters, batch.images, batch.texts, batch.mask)
        index = self.some_pairs(self.config.synthetic_batch, _SYNTHETIC, iteration)
        synthetic = self._embed(parameters, self.set.pixels(index), *self.set.text(index))
        weights, terms = self.terms(real, synthetic)
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        self.differentiate(loss)
        found: Terms = {"loss": loss, **terms}
        return found if ratio is None else {**found, "ratio": ratio.mean()}

    def terms(
        self, real: tuple[Tensor, Tensor], synthetic: tuple[Tensor, Tensor]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Weights and values of the terms whose weight is not 0.

        real, synthetic: features of images and texts, (m, d) and (n, d) each, L2-normalised.
        """
        config = self.config
        first, second = config.lambda_agreement, config.lambda_discrepancy
        wanted: dict[str, tuple[float, Any]]
        if config.features == "agreement-discrepancy":
            wanted = {
                "agreement": (first, losses.agreement),
                "discrepancy": (second, losses.discrepancy),
            }
        elif config.features == "singles":
            wanted = {"image": (first, lambda z, _: z), "text": (second, lambda _, z: z)}
        else:
            wanted = {"joint": (first + second, lambda *z: F.normalize(torch.cat(z, dim=1)))}
        terms, weights = {}, {}
        if config.lambda_contrastive > 0:
            weights["contrastive"] = config.lambda_contrastive
            terms["contrastive"] = losses.info_nce(*synthetic, config.temperature)
        for name, (weight, feature) in wanted.items():
            if weight > 0:
                weights[name] = weight
                terms[name] = losses.kernel_energy(
                    feature(*real), feature(*synthetic), config.sigma, config.kernel
                )
        return weights, terms

    def draw_model(self, iteration: int) -> tuple[dict[str, Tensor], Tensor | None]:
        """The model of an iteration: its parameters by name, and the interpolation's t per layer.

        Parameters that are not named are the pretrained ones. Those of an interpolation are views
        of memory that the next call writes to.
        """
        rng = self.rng(_MODEL, iteration)
        if self.snapshots is None:
            self.model.reset_heads(seed=(self.seed + 1) * 1_000_003 + iteration)
            return {}, None
        buffer = self.snapshots.buffer
        needed = _EXPERTS_NEEDED[self.config.model]
        experts = rng.choice(len(buffer), size=needed, replace=False).tolist()
        ends = [
            self.snapshots.read(expert, int(rng.integers(1, buffer.snapshots + 1)))
            for expert in experts
        ]
        ratios = None
        if self.config.model == "fine-tuned":
            flat = ends[0]
        elif self.config.model == "weighted-sum":
            flat = torch.lerp(ends[0], ends[1], float(rng.random()))
        else:
            # With a common start snapshot 0 is the same for all; it is read once.
            own = [0 if self.config.common_start else expert for expert in experts]
            starts = [self.snapshots.read(expert, 0) for expert in own]
            flat, ratios = interpolate(starts, ends, self.sizes, self.config.alpha, out=self._flat)
            self._flat = flat
        return self.layout.named(self.layout.parts(flat)), ratios

    def _embed(
        self, parameters: dict[str, Tensor], images: Tensor, texts: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with self.context.autocast(self.device):
            p_image, p_text = functional_call(
                self.model, parameters, (images, texts, mask), {"normalize": False}
            )
        p_image, p_text = self.context.widened(p_image, p_text)
        return F.normalize(p_image, dim=-1), F.normalize(p_text, dim=-1)


def _check(config: MdmConfig, context: Context) -> None:
    if len(context.start) < 2 or len(context.real) < 2:
        raise ConfigError(
            "mdm needs at least two synthetic and two real pairs for its contrastive loss, "
            f"not {len(context.start)} and {len(context.real)}."
        )
    if config.experts.count < _EXPERTS_NEEDED[config.model]:
        raise ConfigError(
            f"mdm with model {config.model!r} draws {_EXPERTS_NEEDED[config.model]} experts, but "
            f"experts.count is {config.experts.count}: ask for more, or choose another model."
        )
    if not config.lambda_contrastive + config.lambda_agreement + config.lambda_discrepancy > 0:
        raise ConfigError(
            "mdm has no loss: one of lambda_contrastive, lambda_agreement and lambda_discrepancy "
            "must be above 0."
        )
    if not (config.learn_images or config.learn_texts):
        raise ConfigError("mdm has nothing to learn: learn_images or learn_texts.")
