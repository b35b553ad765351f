"""The one distillation loop: progress, checkpoints, resume, and a guard against non-finite numbers.

A method says how to get gradients (`backward`) and what follows a step (`after_step`); everything
else is here, reading from the device included: losses, and whether anything went wrong, are read
in one transfer at the end of an iteration. All randomness of an iteration is drawn from (seed,
iteration), so that a run that was killed goes on from its checkpoint to the same bits as one that
was not.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import psutil
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmdd.batches import Batch, RealBatches
from mmdd.devices import arithmetic
from mmdd.encoders.dual import DualEncoder
from mmdd.errors import ArtefactError, ConfigError, NonFiniteError
from mmdd.files import load_checkpoint, save_checkpoint
from mmdd.protocols import Protocol
from mmdd.synthetic import SyntheticPairs

HISTORY_POINTS = 100  # what a record keeps of the losses
Precision = Literal["float32", "tf32", "bfloat16"]
Terms = Mapping[str, Tensor | float]  # losses and other scalars of an iteration, on the device


@dataclass(frozen=True)
class Context:
    """What a method works with: where it starts, real batches, the model, the protocol, a seed.

    The model is the method's own copy to change. precision: "float32"; "bfloat16", of forward
    passes; "tf32", of products of float32 numbers on a GPU. model_config: what the model was built
    from, as JSON values. prepared: what the method's `prepare` returned.
    """

    start: SyntheticPairs
    real: RealBatches
    model: DualEncoder
    protocol: Protocol
    seed: int
    precision: Precision = "float32"
    model_config: dict[str, Any] = field(default_factory=dict)
    prepared: Any = None

    def autocast(self, device: torch.device) -> torch.autocast:
        """A context in which forward passes have the precision asked for."""
        enabled = self.precision == "bfloat16"
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)

    def widened(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Features of a forward pass as losses want them: float32 after bfloat16, else as is."""
        if self.precision != "bfloat16":
            return image, text
        return image.float(), text.float()


class Distiller(ABC):
    """What the loop needs of a method. One file per family in `mmdd/distill/` implements it.

    A constructor takes the method's validated configuration and the context, sets `optimizer`, and
    must not draw from global generators. Book: notebooks/07_covmatch.
    """

    name: str
    optimizer: torch.optim.Optimizer
    # Why `compile_encoders` refuses; "" where it does not.
    uncompiled: ClassVar[str] = "it calls its model with parameters that change in every iteration"

    def __init__(self, config: Any, context: Context) -> None:
        self.config, self.context, self.seed = config, context, context.seed

    @classmethod
    def prepare(
        cls, config: Any, context: Context, folder: Path, progress: bool = True
    ) -> tuple[Any, dict[str, Any]]:
        """What must exist before the first iteration, such as trained experts, and what it cost.

        folder: where it is kept for later runs. The costs are entries of a record's cost ledger
        (`expert_seconds`, `expert_bytes`). What it returns reaches the method in its context.
        """
        return None, {}

    @abstractmethod
    def learnables(self) -> dict[str, Tensor]:
        """The tensors being learned, by name; `backward` fills their .grad."""

    @abstractmethod
    def backward(self, iteration: int) -> Terms:
        """Put gradients on the learnables; return the loss ("loss") and its named terms.

        Scalar tensors, on the device: reading one here would make the host wait for a GPU.
        """

    def after_step(self, iteration: int) -> Terms:
        """What follows the step on the set, such as a model update; terms to show, if any."""
        return {}

    @abstractmethod
    def export(self) -> SyntheticPairs:
        """The set as it is now."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that the next iteration depends on (tensors and JSON values)."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""

    def hint(self) -> str:
        """What to change when the loss diverges."""
        return "lower its learning rates"

    def rng(self, stream: int, iteration: int) -> np.random.Generator:
        """The generator of one purpose (stream) in one iteration."""
        return np.random.default_rng([self.seed, stream, iteration])

    def real_batch(self, size: int, stream: int, iteration: int) -> Batch:
        """Random real pairs of an iteration; those of the next one are fetched meanwhile."""
        return self.context.real.draw(
            size, self.rng(stream, iteration), ahead=self.rng(stream, iteration + 1)
        )

    def compile_encoders(self, backend: str = "inductor") -> None:
        """Compile the encoders' passes, see `DualEncoder.compile_encoders`.

        Raises `ConfigError` for a method that cannot be compiled. Book: book/sweeps.
        """
        if self.uncompiled:
            raise ConfigError(
                f"{self.name} cannot be compiled: {self.uncompiled}. Leave runtime.compile off."
            )
        self.context.model.compile_encoders(backend)


@dataclass
class Progress:
    """What a finished (or stopped) loop knows: losses over iterations, time, memory.

    prepared: what the method's `prepare` cost, as entries of the cost ledger.
    """

    iterations: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    history: dict[str, list[float]] = field(default_factory=dict)
    prepared: dict[str, Any] = field(default_factory=dict)

    def thinned(self, points: int = HISTORY_POINTS) -> dict[str, list[float]]:
        """The losses at no more than `points` evenly spaced iterations, with those iterations."""
        length = max((len(values) for values in self.history.values()), default=0)
        keep = np.unique(np.linspace(0, length - 1, min(points, length)).astype(int)).tolist()
        thin = {name: [round(v[i], 6) for i in keep] for name, v in self.history.items()}
        return {"iteration": [float(i) for i in keep], **thin}


def distill(
    method: Distiller,
    iterations: int,
    *,
    checkpoint: Path | None = None,
    checkpoint_every: int = 50,
    clip: float | None = None,
    progress: bool = True,
    callback: Callable[[int, SyntheticPairs], None] | None = None,
    callback_every: int = 50,
) -> tuple[SyntheticPairs, Progress]:
    """Run a method for a number of iterations; returns the set and what the run cost.

    checkpoint: a file to go on from if it exists, and to write every `checkpoint_every`
    iterations, atomically; where it is damaged, the one before it counts, or a new start. clip:
    largest norm of each learnable's gradient. callback: called with (finished iterations, a copy of
    the set) every `callback_every` iterations and at the end.

    Raises `NonFiniteError` at the first loss, gradient or set that is not finite, with the method,
    the iteration and the setting to change; the last finite set is kept beside the checkpoint as
    `<checkpoint>.last_good.safetensors`. Raises `ArtefactError` for a checkpoint of another method,
    seed, protocol or dataset, or of other settings (but for the number of iterations).
    Book: notebooks/07_covmatch.
    """
    with arithmetic(method.context.precision, method.context.real.device):
        done = _resume(method, checkpoint)
        _require_finite(method, done.iterations)
        process = psutil.Process()
        bar = tqdm(
            range(done.iterations, iterations),
            initial=done.iterations,
            total=iterations,
            desc=method.name,
            unit="it",
            disable=not progress,
        )
        for iteration in bar:
            begin = time.perf_counter()
            terms = iterate(method, iteration, clip=clip, checkpoint=checkpoint)
            done.seconds += time.perf_counter() - begin
            done.iterations = iteration + 1
            for name, value in terms.items():
                done.history.setdefault(name, []).append(value)
            if iteration % 10 == 0 or done.iterations == iterations:
                done.peak_memory_bytes = max(done.peak_memory_bytes, _memory(process))
                bar.set_postfix(
                    loss=f"{terms['loss']:.4g}", GB=f"{done.peak_memory_bytes / 1e9:.2f}"
                )
            last = done.iterations == iterations
            if checkpoint is not None and (last or done.iterations % checkpoint_every == 0):
                state = {"method": method.state_dict(), "progress": vars(done)}
                save_checkpoint(checkpoint, state | {"owner": _owner(method)})
            if callback is not None and (last or done.iterations % callback_every == 0):
                callback(done.iterations, method.export())
        bar.close()
        return method.export(), done


def _require_finite(method: Distiller, iteration: int) -> None:
    """Raise where the learnables are not finite before a step: no good set to go back to."""
    broken = [name for name, t in method.learnables().items() if not torch.isfinite(t).all()]
    if broken:
        raise NonFiniteError(
            f"{method.name}, before iteration {iteration}: not finite: {', '.join(broken)}. "
            "The pairs it starts from, or the weights that made their texts, are damaged."
        )


def _resume(method: Distiller, checkpoint: Path | None) -> Progress:
    state = None if checkpoint is None else load_checkpoint(checkpoint)
    if state is None:
        return Progress()
    try:
        # Shapes alone do not tell: other settings would silently go on from this one's.
        other = [key for key, value in _owner(method).items() if state["owner"][key] != value]
        if other:
            raise ValueError(f"made with another {' and '.join(other)}")
        method.load_state_dict(state["method"])
        return Progress(**state["progress"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtefactError(
            f"{checkpoint} does not fit this run of {method.name} ({error}): it belongs to other "
            "settings. Remove it to start again."
        ) from error


def _owner(method: Distiller) -> dict[str, Any]:
    """What a checkpoint must agree with to be gone on from. More iterations are no other run."""
    context = method.context
    return {
        "method": method.name,
        "settings": method.config.model_dump(mode="json", exclude={"iterations"}),
        "seed": method.seed,
        "protocol": context.protocol,
        "precision": context.precision,
        "dataset": context.real.dataset.fingerprint,
    }


def iterate(
    method: Distiller,
    iteration: int,
    *,
    clip: float | None = None,
    checkpoint: Path | None = None,
) -> dict[str, float]:
    """One iteration of a method: gradients, clipping, the step, what follows it, and the guard.

    The host reads from the device once, at the end. Returns the terms; arguments and errors are
    those of `distill`. Book: notebooks/14_efficiency.
    """
    method.optimizer.zero_grad(set_to_none=True)
    learnables = method.learnables()
    before = {name: t.detach().clone() for name, t in learnables.items()}
    terms = method.backward(iteration)
    gradients = {name: t.grad for name, t in learnables.items() if t.grad is not None}
    sums: Terms = {f"gradient of {name}": gradient.sum() for name, gradient in gradients.items()}
    if clip is not None:
        for name in gradients:
            torch.nn.utils.clip_grad_norm_([learnables[name]], clip)
    method.optimizer.step()
    later = method.after_step(iteration)
    # Again, as the step itself can overflow: nothing that is not finite is saved or exported.
    ends: Terms = {f"{name} after the step": t.detach().sum() for name, t in learnables.items()}
    first, second, first_sums, second_sums = _read(terms, later, sums, ends)
    # A sum that is finite has finite entries; one that is not may have overflowed alone.
    bad = _not_finite(first)
    bad += [
        f"gradient of {name}"
        for name, gradient in gradients.items()
        if not np.isfinite(first_sums[f"gradient of {name}"]) and not torch.isfinite(gradient).all()
    ]
    back = bool(bad)
    if not bad:
        bad = _not_finite(second)
        broken = [
            name
            for name, tensor in learnables.items()
            if not np.isfinite(second_sums[f"{name} after the step"])
            and not torch.isfinite(tensor).all()
        ]
        bad += [f"{name} after the step" for name in broken]
        back = bool(broken)
    if bad:
        _stop(
            method, iteration, bad, before if back else {}, checkpoint, _cure(method, bad, before)
        )
    return first | second


def _read(*groups: Terms) -> list[dict[str, float]]:
    """Groups of scalars as numbers, in one transfer from the device."""
    tensors = [v.detach() for group in groups for v in group.values() if isinstance(v, Tensor)]
    # Doubles hold every precision exactly.
    numbers = iter(torch.stack([t.double() for t in tensors]).tolist() if tensors else [])
    return [
        {name: next(numbers) if isinstance(v, Tensor) else v for name, v in group.items()}
        for group in groups
    ]


def _not_finite(terms: dict[str, float]) -> list[str]:
    return [name for name, value in terms.items() if not np.isfinite(value)]


def _stop(
    method: Distiller,
    iteration: int,
    bad: list[str],
    before: dict[str, Tensor],
    checkpoint: Path | None,
    cure: str,
) -> None:
    """Raise for what is not finite; `before` is what the learnables go back to, where they must."""
    kept = "nothing was kept, as no checkpoint was asked for"
    if checkpoint is not None:
        with torch.no_grad():
            for name, tensor in method.learnables().items() if before else ():
                tensor.copy_(before[name])
        path = checkpoint.with_suffix(".last_good.safetensors")
        method.export().save(path)
        kept = f"the last good set is in {path}"
    raise NonFiniteError(
        f"{method.name}, iteration {iteration}: not finite: {', '.join(bad)}. "
        f"Likely cure: {cure}; {kept}."
    )


def _cure(method: Distiller, bad: list[str], before: dict[str, Tensor]) -> str:
    """What to do about terms that are not finite, from the learnables before the step."""
    texts = before.get("texts")
    if texts is None or texts.ndim != 2 or "gradient of texts" not in bad:
        return method.hint()
    zero = (texts == 0).all(dim=1).nonzero().flatten().tolist()
    if not zero:
        return method.hint()
    return (
        f"another text for pair {', '.join(map(str, zero))} (counted from 0), which is a vector of "
        f"zeros and has no direction that {method.name} could differentiate twice: start from "
        "other pairs (another seed or init), leave that caption out of the data, or keep the texts "
        "as they are (learn_texts: false)"
    )


def _memory(process: psutil.Process) -> int:
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return int(torch.cuda.max_memory_allocated())
    return int(process.memory_info().rss)
