"""Expert trajectories: training runs on real data whose parameters are kept after every epoch.

A buffer is a folder: `buffer.json`, and one folder per expert with a safetensors file per snapshot
(one flat vector of the trained parameters, memory-mapped on reading) and a manifest. Experts are
independent of each other: several processes may fill one buffer, each takes what no other has.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from filelock import Timeout
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from tqdm.auto import tqdm

from mmdd import losses
from mmdd.batches import Batch, RealBatches, steps_per_epoch
from mmdd.disk import locked
from mmdd.encoders.dual import DualEncoder, ModelConfig, code_behind
from mmdd.encoders.pairs import PAIRS
from mmdd.errors import ArtefactError, NonFiniteError
from mmdd.evaluation import SplitScorer
from mmdd.files import (
    atomic_write_text,
    load_checked,
    load_checkpoint,
    load_tensors,
    remove_checkpoint,
    save_checked,
    save_checkpoint,
)
from mmdd.protocols import (
    Component,
    Protocol,
    by_component,
    component_rates,
    freeze_all_but,
    parameter_groups,
    trained_parameters,
)
from mmdd.provenance import source_hash
from mmdd.seal import sealed, unsealed

if TYPE_CHECKING:
    from mmdd.distill.loop import Context

log = logging.getLogger(__name__)

_SEEDS = 100_000  # experts draw their batches and projections from seeds that no student has


class ExpertConfig(BaseModel):
    """How experts are trained and what is kept of them; the defaults are LoRS' and MTT-VL's.

    count: experts. epochs: of training on the train split. snapshot_every: steps between snapshots;
    None keeps one per epoch. lr_image and lr_text are of the encoders, lr_heads of the projections.
    dtype: of the kept parameters; training is always in float32.
    Source: LoRS (ICML 2024), App. D. Book: notebooks/05_trajectory_matching.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: int = Field(default=20, ge=1)
    epochs: int = Field(default=10, ge=1)
    snapshot_every: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=128, ge=2)
    lr_image: float = Field(default=0.1, ge=0)
    lr_text: float = Field(default=0.1, ge=0)
    lr_heads: float = Field(default=0.1, ge=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    loss: losses.LossName = "info_nce"
    temperature: float = Field(default=0.07, gt=0)
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True)
class Layout:
    """Which parameters a flat vector holds, in which order: part by part of the model.

    names and shapes: of all of them. sizes: entries of each part.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    sizes: dict[Component, int]

    @classmethod
    def of(cls, model: DualEncoder, protocol: Protocol) -> "Layout":
        """The layout of what a protocol trains in a model."""
        parts = by_component(trained_parameters(model, protocol))
        members = [item for part in parts.values() for item in part.items()]
        return cls(
            tuple(name for name, _ in members),
            tuple(parameter.shape for _, parameter in members),
            {part: sum(p.numel() for p in held.values()) for part, held in parts.items()},
        )

    def flatten(self, parameters: dict[str, Tensor] | dict[str, nn.Parameter]) -> Tensor:
        """A new vector (p,) of the named parameters."""
        return torch.cat([parameters[name].detach().reshape(-1) for name in self.names])

    def parts(self, flat: Tensor) -> list[Tensor]:
        """(p,) → one vector per part of the model, as views."""
        return list(flat.split(list(self.sizes.values())))

    def named(self, parts: list[Tensor]) -> dict[str, Tensor]:
        """Vectors per part → parameters by name, as views, differentiable."""
        shapes = dict(zip(self.names, self.shapes, strict=True))
        found: dict[str, Tensor] = {}
        for part, flat in zip(self.sizes, parts, strict=True):
            names = [name for name in self.names if name.startswith(f"{part}.")]
            pieces = flat.split([shapes[name].numel() for name in names])
            found |= {n: p.view(shapes[n]) for n, p in zip(names, pieces, strict=True)}
        return found

    def load(self, model: DualEncoder, flat: Tensor) -> None:
        """Put a vector (p,) into a model's own parameters."""
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in self.named(self.parts(flat)).items():
                own[name].copy_(value)

    def to_json(self) -> list[list[Any]]:
        """Names and shapes, for a manifest."""
        return [[n, list(s)] for n, s in zip(self.names, self.shapes, strict=True)]


class ExpertBuffer:
    """The first `count` finished experts of a folder.

    Raises `ArtefactError` when fewer are finished, or a manifest is unreadable.
    Book: notebooks/05_trajectory_matching.
    """

    def __init__(self, folder: Path, layout: Layout, count: int) -> None:
        self.folder, self.layout = folder, layout
        self.manifests = []
        for number in range(count):
            try:
                self.manifests.append(_manifest(folder, number))
            except (OSError, ValueError) as error:
                raise ArtefactError(
                    f"expert {number} of {folder} is not finished or its manifest is damaged "
                    f"({error}): train it again (`mmdd experts`), or ask for fewer."
                ) from error
        self._checked: set[Path] = set()
        self.snapshots = min(manifest["snapshots"] for manifest in self.manifests)

    def __len__(self) -> int:
        return len(self.manifests)

    def read(self, expert: int, snapshot: int) -> Tensor:
        """An expert's trained parameters after `snapshot` periods, (p,) float32 on the CPU.

        Snapshot 0 is the start: pretrained encoders, fresh projections. Only this snapshot is read
        from the disk, and checked when this process reads it for the first time. Raises
        `ArtefactError` naming a damaged or missing file.
        """
        path = _snapshot(self.folder, expert, snapshot)
        try:
            # A checksum at every reading would take longer than the reading.
            load = load_tensors if path in self._checked else load_checked
            flat = load(path)[0].get("parameters")
        except ArtefactError as error:
            raise ArtefactError(
                f"{error} Remove {path.parent}: the next run trains this expert again."
            ) from error
        self._checked.add(path)
        if flat is None or flat.numel() != sum(self.layout.sizes.values()):
            raise ArtefactError(f"{path} holds no parameters of this model: remove the buffer.")
        return flat.float()

    @property
    def seconds(self) -> float:
        """What training the experts took, in total."""
        return float(sum(manifest["seconds"] for manifest in self.manifests))

    @property
    def num_bytes(self) -> int:
        """What the experts take on the disk."""
        return int(sum(manifest["bytes"] for manifest in self.manifests))


def prepare_experts(
    config: ExpertConfig, context: "Context", folder: Path, progress: bool = True
) -> tuple[ExpertBuffer, dict[str, Any]]:
    """The experts a distillation asks for, trained now if need be, and their cost entries.

    folder: holds all buffers. Returns (buffer, {"expert_seconds", "expert_bytes"}).
    Book: notebooks/05_trajectory_matching.
    """
    where = buffer_folder(config, context, folder)
    train_experts(config, context, where, progress=progress)
    buffer = ExpertBuffer(where, Layout.of(context.model, context.protocol), config.count)
    return buffer, {
        "expert_seconds": round(buffer.seconds, 3),
        "expert_bytes": buffer.num_bytes,
    }


def buffer_folder(config: ExpertConfig, context: "Context", folder: Path) -> Path:
    """Where the experts of a configuration, model, dataset and protocol live.

    Named by a hash of all that decides their parameters; how many there are is not part of it.
    """
    identity = _identity(config, context)
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return folder / name


def _identity(config: ExpertConfig, context: "Context") -> dict[str, Any]:
    # A distiller may add how its models start; that names the buffer, and no model's code. A model
    # of the reader's own has no entry, and is known by its name alone.
    model = {k: v for k, v in context.model_config.items() if k in ModelConfig.model_fields}
    modules, entry = code_behind(model) if model.get("pair") in PAIRS else ([], "")
    return {
        "experts": config.model_dump(mode="json", exclude={"count"}),
        "model": context.model_config,
        "dataset": context.real.dataset.fingerprint,
        "protocol": context.protocol,
        "source_hash": source_hash(__name__, *modules, entries=(entry,)),
    }


def train_experts(
    config: ExpertConfig,
    context: "Context",
    folder: Path,
    numbers: list[int] | None = None,
    progress: bool = True,
) -> None:
    """Train the experts that a buffer lacks; those that another process is at are waited for.

    numbers: which ones, by default the first `config.count`. An expert that was interrupted goes
    on from its last snapshot, to the same bits as one that was not. Raises `NonFiniteError` when a
    loss stops being finite.
    """
    numbers = list(range(config.count)) if numbers is None else numbers
    finished = [number for number in numbers if _is_finished(folder, number)]
    for number in finished:
        # A kill after the manifest, and before its state was removed, has left that.
        remove_checkpoint(_state_file(folder, number))
    if len(finished) == len(numbers):
        return
    layout = Layout.of(context.model, context.protocol)
    about = {"identity": _identity(config, context), "parameters": layout.to_json()}
    atomic_write_text(folder / "buffer.json", json.dumps(about, indent=1, sort_keys=True) + "\n")
    scorer = SplitScorer(
        context.real.dataset, "val", context.model, context.protocol, context.real.device
    )
    bar = tqdm(
        total=len(numbers) * config.epochs, desc="experts", unit="epoch", disable=not progress
    )
    waiting = list(numbers)
    patience = 0.0  # first those that are free, then wait for the others
    while waiting:
        left = []
        for number in waiting:
            try:
                with locked(folder / f"expert-{number:03d}.lock", patience):
                    _train(number, config, context, layout, folder, scorer, bar)
            except Timeout:
                left.append(number)
        waiting, patience = left, 5.0
    bar.close()


def _train(
    number: int,
    config: ExpertConfig,
    context: "Context",
    layout: Layout,
    folder: Path,
    scorer: SplitScorer,
    bar: Any,
) -> None:
    here = _expert_folder(folder, number)
    if _is_finished(folder, number):
        bar.update(config.epochs)
        return
    real, device = context.real, context.real.device
    seed = _SEEDS * (config.seed + 1) + number
    model = deepcopy(context.model)
    model.reset_heads(seed=seed)
    trained = freeze_all_but(model, context.protocol)
    rates = component_rates(config.lr_image, config.lr_text, config.lr_heads)
    optimizer = torch.optim.SGD(
        parameter_groups(trained, rates),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    done: dict[str, Any] = {
        "step": 0,
        "snapshots": 0,
        "seconds": 0.0,
        "losses": [],  # mean of each epoch
        "validation": [],
        "sum": 0.0,
    }
    state_file = _state_file(folder, number)
    state = load_checkpoint(state_file)
    if state is not None:
        layout.load(model, state["parameters"].to(device))
        optimizer.load_state_dict(state["optimizer"])
        done = state["done"]
    else:
        _keep(folder, number, 0, layout.flatten(trained), config)
    per_epoch = steps_per_epoch(len(real), config.batch_size)
    every = config.snapshot_every or per_epoch
    begin = time.perf_counter()
    first_epoch = done["step"] // per_epoch
    bar.update(first_epoch)
    for epoch in range(first_epoch, config.epochs):
        model.train()
        batches = _batches(real, config.batch_size, seed, epoch)
        for batch in islice(batches, done["step"] % per_epoch, None):
            loss = _step(model, batch, optimizer, config, seed, done["step"])
            done["sum"] += loss
            done["step"] += 1
            last_of_epoch = done["step"] % per_epoch == 0
            if last_of_epoch or done["step"] % every == 0:
                _require_finite(trained, config, seed, done["step"])  # before any of it is kept
            if last_of_epoch:
                done["losses"].append(round(done["sum"] / per_epoch, 6))
                done["sum"] = 0.0
                done["validation"].append(round(scorer.score(model)["mean"], 4))
            if done["step"] % every == 0 or (last_of_epoch and epoch == config.epochs - 1):
                done["snapshots"] += 1
                flat = layout.flatten(trained)
                _keep(folder, number, done["snapshots"], flat, config)
                done["seconds"] += time.perf_counter() - begin
                begin = time.perf_counter()
                state = {"parameters": flat, "optimizer": optimizer.state_dict(), "done": done}
                save_checkpoint(state_file, state)
        bar.update()
        bar.set_postfix(expert=number, loss=f"{done['losses'][-1]:.3f}")
    try:
        size = _bytes(folder, number, done["snapshots"])
    except OSError as error:
        raise ArtefactError(
            f"{here} has lost a file while its expert was trained ({error}): run again."
        ) from error
    manifest = {
        "expert": number,
        "seed": seed,
        "config": config.model_dump(mode="json"),
        "losses": done["losses"],
        "validation": done["validation"],
        "snapshots": done["snapshots"],
        "seconds": round(done["seconds"], 3),
        "bytes": size,
    }
    text = json.dumps(sealed(manifest), indent=1, sort_keys=True)
    atomic_write_text(here / "manifest.json", text + "\n")
    remove_checkpoint(state_file)


def _manifest(folder: Path, number: int) -> dict[str, Any]:
    """What a finished expert says of itself. Raises `OSError` or `ValueError`."""
    path = _expert_folder(folder, number) / "manifest.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}")
    return unsealed(found)


def _bytes(folder: Path, number: int, snapshots: int) -> int:
    """What the start and the snapshots of an expert take. Raises `OSError` for a missing one."""
    kept = (_snapshot(folder, number, s) for s in range(snapshots + 1))
    return sum(path.stat().st_size for path in kept)


def _is_finished(folder: Path, number: int) -> bool:
    """True for an expert with a manifest and all of the bytes that it tells of."""
    try:
        manifest = _manifest(folder, number)
        size = _bytes(folder, number, manifest["snapshots"])
    except FileNotFoundError as error:
        if "snapshot" in str(error.filename):
            log.warning("%s is missing: its expert is trained again.", error.filename)
        return False
    except (OSError, ValueError) as error:
        log.warning("expert %d of %s is damaged (%s): it is trained again.", number, folder, error)
        return False
    if size != manifest["bytes"]:
        log.warning("expert %d of %s has lost bytes: it is trained again.", number, folder)
    return bool(size == manifest["bytes"])


def _batches(real: RealBatches, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
    """An epoch without a last batch of one pair, which has nothing to be told from."""
    return (b for b in real.epoch(batch_size, seed, epoch) if len(b.images) >= 2)


def _step(
    model: DualEncoder,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    config: ExpertConfig,
    seed: int,
    step: int,
) -> float:
    with seeded_dropout([seed, step], batch.images.device):
        z_image, z_text = model(batch.images, batch.texts, batch.mask)
    loss = losses.contrastive_loss(config.loss, z_image, z_text, config.temperature, None)
    value = loss.item()  # the one number that the host waits for
    if not math.isfinite(value):
        raise NonFiniteError(
            f"expert with seed {seed}: the loss is {value} at step {step + 1}: lower its "
            f"learning rates (image {config.lr_image}, heads {config.lr_heads})."
        )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return value


def _require_finite(
    trained: dict[str, nn.Parameter], config: ExpertConfig, seed: int, step: int
) -> None:
    """A gradient that is not finite shows in the parameters, maybe only after the last loss."""
    broken = [name for name, value in trained.items() if not torch.isfinite(value).all()]
    if broken:
        raise NonFiniteError(
            f"expert with seed {seed}: {broken[0]} is not finite after step {step}: lower its "
            f"learning rates (image {config.lr_image}, text {config.lr_text}, heads "
            f"{config.lr_heads})."
        )


@contextmanager
def seeded_dropout(key: list[int], device: torch.device) -> Iterator[None]:
    """Dropout masks that depend on `key` alone; the global generator is left as it was."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _expert_folder(folder: Path, number: int) -> Path:
    return folder / f"expert-{number:03d}"


def _state_file(folder: Path, number: int) -> Path:
    return _expert_folder(folder, number) / "state.safetensors"


def _snapshot(folder: Path, expert: int, snapshot: int) -> Path:
    return _expert_folder(folder, expert) / f"snapshot-{snapshot:04d}.safetensors"


def _keep(folder: Path, number: int, snapshot: int, flat: Tensor, config: ExpertConfig) -> None:
    dtype = getattr(torch, config.dtype)
    header = {"expert": number, "snapshot": snapshot}
    save_checked(_snapshot(folder, number, snapshot), {"parameters": flat.to(dtype)}, header)
