"""Trajectory matching: MTT-VL, TESLA and LoRS are one distiller with different settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmdd import losses
from mmdd.batches import on_device
from mmdd.distill.base import PairDistiller, PairsConfig
from mmdd.distill.loop import Context, Terms
from mmdd.distill.mixed import DifferentiableSiLU, Engine, mixed_derivative
from mmdd.errors import ConfigError
from mmdd.experts import ExpertBuffer, ExpertConfig, Layout, prepare_experts, seeded_dropout
from mmdd.protocols import component_rates, freeze_all_but
from mmdd.similarity import (
    FullSimilarity,
    IdentitySimilarity,
    LowRankSimilarity,
    Similarity,
)
from mmdd.snapshots import SnapshotCache
from mmdd.synthetic import SyntheticPairs

_DRAW, _BATCHES = 1, 2  # streams of random numbers


class TrajectoryConfig(PairsConfig):
    """Settings of MTT-VL beside those of `PairsConfig`; TESLA's and LoRS' have other defaults.

    Matching: expert_epochs snapshots of an expert, from a start of at most max_start_epoch, are
    matched by syn_steps student steps on synthetic_batch pairs each (snapshots are epochs unless
    `experts.snapshot_every` says otherwise). loss, temperature: the students'. distance: relative
    squared distance for each "branch" (image, text) or for each "part" of the model, added.

    Gradient: "full" is that of the unrolled student; "detached" drops the path through the
    student's own parameters, as TESLA does. engine: "unroll" keeps one graph over all steps (full
    only); the others go step by step (see `mmdd.distill.mixed`); "finite-difference" is inexact.
    error_every: iterations between measurements of its error.

    Learning: lr_similarity and lr_rates are step sizes on S̃ and on the students' learning rates.
    student_lr_*: where those start; log_rates learns their logarithm. similarity: the form of S̃;
    "copied" takes, and keeps, the cosines that the first expert gives the initial pairs. rank,
    alpha: of the low-rank one. learn_*: false keeps that as it started.

    Source: MTT-VL (TMLR 2024); TESLA (ICML 2023); LoRS (ICML 2024) §3.4 and Table 11.
    Book: notebooks/05_trajectory_matching.
    """

    iterations: int = Field(default=3_000, ge=1)
    expert_epochs: int = Field(default=1, ge=1)
    max_start_epoch: int = Field(default=2, ge=0)
    syn_steps: int = Field(default=8, ge=1)
    synthetic_batch: int = Field(default=20, ge=2)
    loss: losses.LossName = "info_nce"
    temperature: float = Field(default=0.07, gt=0)
    distance: Literal["branch", "part"] = "branch"
    gradient: Literal["full", "detached"] = "full"
    engine: Engine | Literal["unroll"] = "unroll"
    error_every: int = Field(default=50, ge=1)
    lr_image: float = Field(default=100.0, ge=0)
    lr_text: float = Field(default=100.0, ge=0)
    lr_similarity: float = Field(default=10.0, ge=0)
    lr_rates: float = Field(default=0.01, ge=0)
    student_lr_image: float = Field(default=0.1, gt=0)
    student_lr_text: float = Field(default=0.1, gt=0)
    student_lr_heads: float = Field(default=0.1, gt=0)
    log_rates: bool = False
    similarity: Literal["identity", "full", "low_rank", "copied"] = "identity"
    rank: int = Field(default=10, ge=1)
    alpha: float = Field(default=3.0, ge=0)
    learn_omega: bool = True
    learn_residual: bool = True
    learn_rates: bool = True
    experts: ExpertConfig = ExpertConfig()


class TeslaConfig(TrajectoryConfig):
    """Settings of TESLA: MTT-VL with the gradient of detached steps, in constant memory."""

    gradient: Literal["full", "detached"] = "detached"
    engine: Engine | Literal["unroll"] = "double-backward"


class TeslaWbceConfig(TeslaConfig):
    """Settings of TESLA with the wBCE loss, the baseline of the LoRS paper."""

    loss: losses.LossName = "wbce"


class LorsConfig(TeslaWbceConfig):
    """Settings of LoRS: TESLA with wBCE (or eNCE) and a learned similarity of low rank."""

    similarity: Literal["identity", "full", "low_rank", "copied"] = "low_rank"


class TrajectoryMatching(PairDistiller):
    """Move the set so that a student trained on it goes where the experts went.

    An iteration draws an expert and a start, puts the student there, takes `syn_steps` SGD steps on
    mini-batches of the set, and measures how far from the expert's later snapshot it ended,
    relative to how far the expert went. Raises `ConfigError` for settings that contradict each
    other or experts that are too short.

    Source: MTT-VL; TESLA; LoRS Alg. 1 and 2. Book: notebooks/05_trajectory_matching.
    """

    name = "mtt"
    uncompiled = "it differentiates a gradient, and compiled code has no second derivative"

    config: TrajectoryConfig

    @classmethod
    def prepare(
        cls, config: TrajectoryConfig, context: Context, folder: Path, progress: bool = True
    ) -> tuple[ExpertBuffer, dict[str, Any]]:
        return prepare_experts(config.experts, context, folder, progress)

    def __init__(self, config: TrajectoryConfig, context: Context) -> None:
        super().__init__(config, context)
        self.experts: ExpertBuffer = context.prepared
        _check(config, self.experts, len(context.start))
        # A GPU keeps the snapshots that fit. A CPU reads them again, from the kernel's page cache:
        # iterations would gain little, and hold all of them in memory.
        on_gpu = self.device.type == "cuda"
        self.snapshots = SnapshotCache(self.experts, self.device) if on_gpu else None
        self.layout = Layout.of(self.model, context.protocol)
        freeze_all_but(self.model, context.protocol)
        self.model.train()
        self.similarity = self._similarity().to(self.device)
        start = component_rates(
            config.student_lr_image, config.student_lr_text, config.student_lr_heads
        )
        rates = torch.tensor([start[part] for part in self.layout.sizes], device=self.device)
        self.raw_rates = nn.Parameter(rates.log() if config.log_rates else rates)
        self.raw_rates.requires_grad_(config.learn_rates)
        self.optimizer = self.make_optimizer()
        self._error: Tensor | float = 0.0
        self._iteration = 0  # the last one, for `hint`

    def _similarity(self) -> Similarity:
        """S̃ as it starts, its noise drawn from the run's seed."""
        config, n = self.config, len(self.set)
        if config.similarity == "identity":
            return IdentitySimilarity(n)
        module: FullSimilarity | LowRankSimilarity
        if config.similarity == "low_rank":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                module = LowRankSimilarity(n, config.rank, config.alpha)
            module.omega.requires_grad_(config.learn_omega)
            module.left.requires_grad_(config.learn_residual)
            module.right.requires_grad_(config.learn_residual)
            return module
        module = FullSimilarity(n)
        if config.similarity == "copied":
            last = self._snapshot(0, self.experts.manifests[0]["snapshots"])
            parameters = self.layout.named(last)
            with torch.no_grad():
                z_image, z_text = self._embed(parameters, self.set.pixels(), *self.set.text())
                module.values.copy_((z_image @ z_text.T).cpu())
            module.values.requires_grad_(False)
        return module

    def learned(self) -> list[tuple[str, nn.Parameter, float]]:
        config = self.config
        return [
            *super().learned(),
            *(
                (f"similarity.{name}", p, config.lr_similarity)
                for name, p in self.similarity.named_parameters()
            ),
            ("rates", self.raw_rates, config.lr_rates),
        ]

    def rates(self) -> Tensor:
        """The student's learning rate for each part of the model, differentiable."""
        return self.raw_rates.exp() if self.config.log_rates else self.raw_rates

    def backward(self, iteration: int) -> Terms:
        config = self.config
        self._iteration = iteration
        start, target = self._draw(iteration)
        for _, parameter, _ in self.learned():
            parameter.grad = None
        if config.engine == "unroll":
            loss = self._unrolled(start, target, iteration)
        else:
            loss = self._step_by_step(start, target, iteration)
        terms: dict[str, Tensor | float] = {"loss": loss}
        for part, rate in zip(self.layout.sizes, self.rates().detach().clone(), strict=True):
            terms[f"lr_{part}"] = rate
        if config.engine == "finite-difference":
            terms["relative_error"] = self._error
        return terms

    def _draw(self, iteration: int) -> tuple[list[Tensor], list[Tensor]]:
        """Where the student starts and should arrive, one vector per part of the model."""
        rng = self.rng(_DRAW, iteration)
        expert = int(rng.integers(len(self.experts)))
        begin = int(rng.integers(self.config.max_start_epoch + 1))
        end = begin + self.config.expert_epochs
        return self._snapshot(expert, begin), self._snapshot(expert, end)

    def _snapshot(self, expert: int, number: int) -> list[Tensor]:
        source = self.experts if self.snapshots is None else self.snapshots
        return self.layout.parts(source.read(expert, number).to(self.device))

    def after_step(self, iteration: int) -> Terms:
        if not self.config.log_rates:
            with torch.no_grad():
                self.raw_rates.clamp_(min=1e-3)  # as LoRS' code does: a negative rate is no student
        return {}

    # -- the student -------------------------------------------------------------------------------

    def _embed(
        self, parameters: dict[str, Tensor], images: Tensor, texts: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # The fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH), self.context.autocast(self.device):
            z_image, z_text = functional_call(self.model, parameters, (images, texts, mask))
        return self.context.widened(z_image, z_text)

    def step_loss(
        self, theta: Sequence[Tensor], inputs: Sequence[Tensor], mask: Tensor | None, key: list[int]
    ) -> Tensor:
        """The student's loss at θ (flat, per part) on images, texts and S̃ of one mini-batch.

        inputs: images in pixel units (k, 3, H, W), texts, and S̃ (k, k). key: of the dropout masks,
        so that every evaluation of one step sees the same.
        """
        images, texts, similarity = inputs
        with seeded_dropout(key, self.device):
            z_image, z_text = self._embed(self.layout.named(list(theta)), images, texts, mask)
        return losses.contrastive_loss(
            self.config.loss, z_image, z_text, self.config.temperature, similarity
        )

    def batches(self, iteration: int) -> list[Tensor]:
        """The rows of the set that each student step sees: passes over it in random order."""
        size, n = self.config.synthetic_batch, len(self.set)
        rng = self.rng(_BATCHES, iteration)
        found: list[Tensor] = []
        while len(found) < self.config.syn_steps:
            order = on_device(rng.permutation(n), self.device)
            found += [rows for rows in order.split(size) if len(rows) >= 2]
        return found[: self.config.syn_steps]

    def _inputs(self, rows: Tensor) -> tuple[list[Tensor], Tensor | None]:
        texts, mask = self.set.text(rows)
        # Also on a CPU, whose second derivatives of convolutions it makes faster.
        images = self.set.pixels(rows).contiguous(memory_format=torch.channels_last)
        return [images, texts, self.similarity.matrix(rows)], mask

    def _groups(self) -> list[list[int]]:
        """The places of the parts that a distance is taken over together."""
        groups: dict[str, list[int]] = {}
        for i, part in enumerate(self.layout.sizes):
            key = part if self.config.distance == "part" else part.split("_")[0]
            groups.setdefault(key, []).append(i)
        return list(groups.values())

    def _distance(
        self, student: Sequence[Tensor], target: Sequence[Tensor], start: Sequence[Tensor]
    ) -> Tensor:
        """Relative squared distance to the target, added over branches or parts."""
        terms = []
        for members in self._groups():
            end, goal, origin = (
                torch.cat([v[i] for i in members]) for v in (student, target, start)
            )
            # Unchecked: an expert that stood still ends in a loss that is not finite.
            terms.append(losses.relative_distance(end, goal, origin))
        return torch.stack(terms).sum()

    # -- gradients ---------------------------------------------------------------------------------

    def _unrolled(self, start: list[Tensor], target: list[Tensor], iteration: int) -> Tensor:
        """The full gradient from one graph over all steps."""
        rates = self.rates()
        theta = [t.detach().requires_grad_() for t in start]
        for i, rows in enumerate(self.batches(iteration)):
            inputs, mask = self._inputs(rows)
            with DifferentiableSiLU():
                loss = self.step_loss(theta, inputs, mask, [self.seed, iteration, i])
            gradient = torch.autograd.grad(loss, theta, create_graph=True)
            theta = [t - r * g for t, r, g in zip(theta, rates, gradient, strict=True)]
        outer = self._distance(theta, target, start)
        outer.backward(inputs=list(self.learnables().values()))
        return outer

    def _step_by_step(self, start: list[Tensor], target: list[Tensor], iteration: int) -> Tensor:
        """Either gradient without a graph over all steps: first the path, then back along it.

        Double backward of the detached gradient takes the same memory for any number of steps; the
        others keep the path, one copy of the parameters per step.
        """
        config = self.config
        rates = self.rates()
        eta = rates.detach()
        batches = self.batches(iteration)
        full = config.gradient == "full"
        # Double backward meets every step's gradient again, and can walk the path a second time.
        keep = full or config.engine != "double-backward"
        path = [start]
        theta, total = start, [torch.zeros_like(t) for t in start]
        for i, rows in enumerate(batches):
            gradient = self._gradient(theta, rows, [self.seed, iteration, i])
            for t, g in zip(total, gradient, strict=True):
                t += g
            theta = [t - r * g for t, r, g in zip(theta, eta, gradient, strict=True)]
            del gradient
            if full or (keep and i + 1 < len(batches)):
                path.append(theta)
        distance, adjoint = self._adjoint(theta, target, start)
        # θ moves by -η g: how the outcome changes with g is -η times the adjoint.
        direction = [-r * a for r, a in zip(eta, adjoint, strict=True)]
        rate_gradient = torch.zeros_like(eta)
        if not full:
            rate_gradient = -torch.stack(
                [(a * t).sum() for a, t in zip(adjoint, total, strict=True)]
            )
            del adjoint  # of the size of all parameters, as is the sum
        del total
        theta = start
        order = range(len(batches) - 1, -1, -1) if full else range(len(batches))
        for i in order:
            here = path[i] if keep else theta
            rows, key = batches[i], [self.seed, iteration, i]
            found = self._mixed(here, rows, key, direction, curvature=full, step=i)
            if full:
                moved = [a - b for a, b in zip(path[i], path[i + 1], strict=True)]  # η g
                rate_gradient -= torch.stack(
                    [(a * m).sum() / r for a, m, r in zip(adjoint, moved, eta, strict=True)]
                )
                adjoint = [a + h for a, h in zip(adjoint, found, strict=True)]
                direction = [-r * a for r, a in zip(eta, adjoint, strict=True)]
            elif not keep:
                theta = [t - r * g for t, r, g in zip(theta, eta, found, strict=True)]
        if rates.requires_grad:
            rates.backward(rate_gradient)
        return distance

    def _adjoint(
        self, end: list[Tensor], target: list[Tensor], start: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The distance, and its gradient with respect to where the student ended."""
        end = [t.detach().requires_grad_() for t in end]
        outer = self._distance(end, target, start)
        return outer.detach(), list(torch.autograd.grad(outer, end))

    def _gradient(self, theta: list[Tensor], rows: Tensor, key: list[int]) -> list[Tensor]:
        theta = [t.detach().requires_grad_() for t in theta]
        with torch.no_grad():
            inputs, mask = self._inputs(rows)
        return list(torch.autograd.grad(self.step_loss(theta, inputs, mask, key), theta))

    def _mixed(
        self,
        theta: list[Tensor],
        rows: Tensor,
        key: list[int],
        direction: list[Tensor],
        curvature: bool,
        step: int,
    ) -> list[Tensor]:
        """Put one step's share on the learnables; returns H v, or ∇ℓ, where the engine has it."""
        config = self.config
        assert config.engine != "unroll"
        inputs, mask = self._inputs(rows)

        def loss(theta: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
            return self.step_loss(theta, inputs, mask, key)

        found = mixed_derivative(loss, theta, inputs, direction, config.engine, curvature=curvature)
        iteration = key[1]
        if (
            config.engine == "finite-difference"
            and step == 0
            and not iteration % config.error_every
        ):
            exact = mixed_derivative(loss, theta, inputs, direction, "forward-over-reverse")
            self._error = _relative_error(found.inputs, exact.inputs)
        wanted = [(u, g) for u, g in zip(inputs, found.inputs, strict=True) if u.requires_grad]
        if wanted:
            torch.autograd.backward([u for u, _ in wanted], [g for _, g in wanted])
        return (found.curvature if curvature else found.gradient) or []

    # -- what comes out ----------------------------------------------------------------------------

    def export(self) -> SyntheticPairs:
        found = super().export()
        found.learning_rates = dict(zip(self.layout.sizes, self.rates().tolist(), strict=True))
        if not isinstance(self.similarity, IdentitySimilarity):
            found.similarity = _copy(self.similarity)
        return found

    def hint(self) -> str:
        config = self.config
        if self._stood_still():
            return "choose snapshots further apart: an expert did not move between two of them"
        return (
            f"lower lr_image ({config.lr_image}), lr_text ({config.lr_text}) and lr_rates "
            f"({config.lr_rates}), or start from smaller student_lr_*"
        )

    def _stood_still(self) -> bool:
        """Whether the expert of the last iteration stood still, in a branch or part."""
        start, target = self._draw(self._iteration)
        return any(
            bool(torch.equal(*(torch.cat([v[i] for i in members]) for v in (start, target))))
            for members in self._groups()
        )

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"error": float(self._error)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._error = state["error"]


class Tesla(TrajectoryMatching):
    """TESLA. Book: notebooks/05_trajectory_matching."""

    name = "tesla"


class TeslaWbce(TrajectoryMatching):
    """TESLA with wBCE. Book: notebooks/05_trajectory_matching."""

    name = "tesla-wbce"


class Lors(TrajectoryMatching):
    """LoRS. Book: notebooks/06_lors."""

    name = "lors"


def _copy(module: FullSimilarity | LowRankSimilarity) -> Similarity:
    """The same similarity on the CPU, with tensors of its own."""
    fresh: FullSimilarity | LowRankSimilarity
    if isinstance(module, LowRankSimilarity):
        fresh = LowRankSimilarity(module.n, module.rank, module.alpha)
    else:
        fresh = FullSimilarity(module.n)
    fresh.load_state_dict({name: t.detach().cpu() for name, t in module.state_dict().items()})
    return fresh


def _relative_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> Tensor:
    """‖found - exact‖ / ‖exact‖ over all tensors, a scalar; with nothing exact, 1 for anything."""
    wrong = torch.stack(
        [(a - b).double().square().sum() for a, b in zip(found, exact, strict=True)]
    )
    size = torch.stack([b.double().square().sum() for b in exact]).sum()
    return torch.where(size > 0, (wrong.sum() / size).sqrt(), (wrong.sum() > 0).double())


def _check(config: TrajectoryConfig, experts: ExpertBuffer, pairs: int) -> None:
    needed = config.max_start_epoch + config.expert_epochs
    if needed > experts.snapshots:
        raise ConfigError(
            f"max_start_epoch ({config.max_start_epoch}) + expert_epochs ({config.expert_epochs}) "
            f"is {needed}, but the experts have {experts.snapshots} snapshots after their start."
        )
    if config.engine == "unroll" and config.gradient == "detached":
        raise ConfigError(
            "engine 'unroll' has the full gradient: for 'detached' choose 'double-backward', "
            "'forward-over-reverse' or 'finite-difference'."
        )
    if pairs < 2:
        raise ConfigError(f"trajectory matching needs at least two synthetic pairs, not {pairs}.")
