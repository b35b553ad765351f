"""From a configuration to a record: select, distil, train students, score, remember."""

import logging
import os
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmdd.batches import RealBatches, real_pairs
from mmdd.config import RunConfig, is_stale, method_entry
from mmdd.data.open import open_dataset
from mmdd.data.pairs import PairDataset
from mmdd.devices import place
from mmdd.disk import locked
from mmdd.distill import METHODS
from mmdd.distill.loop import Context, Progress, distill
from mmdd.encoders import DualEncoder, build_model
from mmdd.errors import ArtefactError, StoreError
from mmdd.evaluation import evaluate
from mmdd.files import remove_checkpoint
from mmdd.paths import cache_dir
from mmdd.provenance import environment, resolve_device
from mmdd.retrieval import chance_recall
from mmdd.selection import Candidates, select
from mmdd.selection.noise import noise_like
from mmdd.store import SCHEMA, ResultsStore
from mmdd.synthetic import SyntheticPairs

if TYPE_CHECKING:
    from mmdd.results import METRICS, load_results, summarise

__all__ = [
    "METRICS",
    "distill_run",
    "evaluate_file",
    "evaluate_pairs",
    "experts_folder",
    "initial_pairs",
    "load_results",
    "make_context",
    "run",
    "set_path",
    "student_factory",
    "summarise",
]

log = logging.getLogger(__name__)

if not TYPE_CHECKING:  # or the checker would take any name for one of this module

    def __getattr__(name: str) -> Any:
        """What reads records stands in a module that no run loads: it decides no result."""
        if name in ("METRICS", "load_results", "summarise"):
            from mmdd import results

            return getattr(results, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def run(config: RunConfig, results_dir: str | Path = "results") -> dict[str, Any]:
    """Carry out one run and return its record; a finished run comes from the store instead.

    A distillation writes checkpoints under `results_dir/<sweep>/checkpoints` and goes on from them
    after a kill. The distilled (or selected) set is kept in `results_dir/<sweep>/sets`, where runs
    that differ only in the evaluation find it again. Raises what its parts raise, and `StoreError`
    when the stored record was made with other data than the data at hand.

    Book: notebooks/run.
    """
    code = config.source_hash  # before anything runs: the files may change while it does
    store = ResultsStore(results_dir)
    runtime = config.runtime
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    found = store.find(config.run_id)
    replaced = None
    if found is not None and runtime.redo_stale and is_stale(found):
        replaced, found = found, None
    if found is not None and config.dataset.reader == "scenes":
        return found
    if found is not None and runtime.data is None:
        return found
    begin = _cpu_seconds()
    dataset = open_dataset(config.dataset, runtime)
    if found is not None:
        if found["dataset"]["fingerprint"] != dataset.fingerprint:
            raise StoreError(
                f"run {config.run_id} is in the store, but was made with other data (fingerprint "
                f"{found['dataset']['fingerprint'][:12]}, here {dataset.fingerprint[:12]}). Give "
                "the dataset another name, or use another results folder."
            )
        return found
    for split in ("train", "val", "test"):
        dataset.indices(split)  # a missing one is an error now, not after the distillation

    device = resolve_device(runtime.device)
    template = place(build_model(config.model), device)
    students_of = template
    if config.student is not None:
        students_of = place(build_model(config.student), device)
        if config.method not in METHODS:
            template = students_of

    folder = store.working_folder(config.sweep)
    train_on: SyntheticPairs | PairDataset
    if config.method == "full":
        train_on, cost = dataset, _no_cost()
    else:
        train_on, cost = _make_set(config, dataset, template, device, folder)
    students = evaluate(
        train_on,
        dataset,
        student_factory(students_of, config.seed),
        config.protocol,
        config.evaluation,
        device=device,
        progress=runtime.progress,
    )
    record = {
        "schema": SCHEMA,
        "run_id": config.run_id,
        "sweep": config.sweep,
        "config": config.identity(),
        "dataset": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "splits": {split: len(members) for split, members in dataset.splits.items()},
        },
        "protocol": config.protocol,
        "students": students,
        "chance": _rounded(chance_recall(dataset.caption_table("test")[1])),
        "cost": cost,
        "model": {
            "parameters": sum(p.numel() for p in template.parameters()),
            "tokenizer": getattr(template.text_encoder, "tokenizer_kind", "scenes"),
        },
        "environment": environment(device, code),
        # Of what was left to do: experts, checkpoints and sets that were there cost nothing here.
        "cpu_seconds": round(_cpu_seconds() - begin, 2),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    for student in students:
        for scores in ("test", "validation", "best_on_test"):
            student[scores] = _rounded(student[scores])
    if replaced is not None:
        record["replaced"] = _compared(replaced, record)
    store.write(record)
    return record


def _cpu_seconds() -> float:
    """Processor time of this process and of those it waited for, all threads."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def student_factory(template: DualEncoder, seed: int) -> Callable[[int], DualEncoder]:
    """make_model(student seed) → a copy of the template with projections of its own.

    seed: of the run; students of different runs share no projections.
    """

    def make_model(student: int) -> DualEncoder:
        model = deepcopy(template)
        model.reset_heads(seed=1_000 * seed + student)
        return model

    return make_model


def _compared(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What a record says of the stale one that it replaces: its code, and how far it was off."""
    ours, theirs = (
        {s["student_seed"]: s["test"]["mean"] for s in record["students"]} for record in (new, old)
    )
    off = [abs(ours[seed] - theirs[seed]) for seed in ours if seed in theirs]
    return {
        "source_hash": old["environment"]["source_hash"],
        "finished": old["finished"],
        "largest_difference": round(max(off), 4) if off else None,
    }


def _checkpoint_path(folder: Path, config: RunConfig) -> Path:
    # What other code began, this code does not finish.
    return folder / "checkpoints" / f"{config.set_id}-{config.set_source_hash}.safetensors"


def initial_pairs(config: RunConfig, dataset: PairDataset, model: DualEncoder) -> SyntheticPairs:
    """The real pairs that a run selects, or that its distillation starts from.

    Book: notebooks/run.
    """
    return _initial_pairs(config, dataset, model)[0]


def _initial_pairs(
    config: RunConfig, dataset: PairDataset, model: DualEncoder
) -> tuple[SyntheticPairs, float]:
    """`initial_pairs`, and the seconds that it took, those included that the cache saved."""
    begin = time.perf_counter()
    noise = config.selector == "noise"
    candidates = Candidates(
        dataset,
        config.seed,
        model,
        # A selection is evaluated with the students' encoders, and goes by them.
        _model_identity(config),
        config.selection,
        config.runtime.progress,
    )
    name = "random" if noise else config.selector
    images, choice = select(name, dataset, config.pairs, config.seed, candidates)
    found = real_pairs(dataset, images, choice, model, config.protocol)
    if noise:
        found = noise_like(found, model, config.seed)
    return found, candidates.saved_seconds + time.perf_counter() - begin


def _model_identity(config: RunConfig) -> dict[str, Any]:
    identity = config.identity()
    if config.method not in METHODS:
        return dict(identity.get("student", identity["model"]))
    return dict(identity["model"])


def _make_set(
    config: RunConfig,
    dataset: PairDataset,
    template: DualEncoder,
    device: torch.device,
    folder: Path,
) -> tuple[SyntheticPairs, dict[str, Any]]:
    path = set_path(folder, config)
    # Points of a sweep that differ in the evaluation share a set: the first one makes it.
    with locked(path.with_suffix(".lock")):
        return _make_set_alone(config, dataset, template, device, folder, path)


def _make_set_alone(
    config: RunConfig,
    dataset: PairDataset,
    template: DualEncoder,
    device: torch.device,
    folder: Path,
    path: Path,
) -> tuple[SyntheticPairs, dict[str, Any]]:
    kept = _kept_set(path)
    if kept is not None:
        # A set made by other code, or of other data, is not this run's: make it again.
        current = (config.set_source_hash, dataset.fingerprint)
        made_by = (kept.metadata.get("source_hash"), kept.metadata.get("dataset_fingerprint"))
        if made_by == current:
            # A kill after the set was kept, and before its checkpoint was removed, has left that.
            remove_checkpoint(_checkpoint_path(folder, config))
            return kept, kept.metadata["cost"]
    result, seconds = _initial_pairs(config, dataset, template)
    cost = _no_cost() | {"init_seconds": round(seconds, 3)}
    if config.method in METHODS:
        result, progress = distill_run(config, dataset, template, device, result, folder)
        cost |= progress.prepared | {
            "iterations": progress.iterations,
            "seconds_per_iteration": round(progress.seconds / max(1, progress.iterations), 5),
            "peak_memory_bytes": progress.peak_memory_bytes,
            "history": progress.thinned(),
        }
    cost["num_bytes"] = result.num_bytes()
    result.metadata |= {
        "method": config.method,
        "set_id": config.set_id,
        "source_hash": config.set_source_hash,
        "cost": cost,
    }
    result.save(path)
    remove_checkpoint(_checkpoint_path(folder, config))
    return result, cost


def _kept_set(path: Path) -> SyntheticPairs | None:
    """The set of an earlier run, if it is there and whole."""
    if not path.exists():
        return None
    try:
        return SyntheticPairs.load(path)
    except ArtefactError as error:
        log.warning("%s It is made again.", error)
        return None


def set_path(folder: Path, config: RunConfig) -> Path:
    """Where a run keeps its distilled (or selected) set."""
    return folder / "sets" / f"{config.set_id}.safetensors"


def distill_run(
    config: RunConfig,
    dataset: PairDataset,
    template: DualEncoder,
    device: torch.device,
    start: SyntheticPairs,
    folder: Path | None = None,
    callback: Callable[[int, SyntheticPairs], None] | None = None,
    callback_every: int = 50,
) -> tuple[SyntheticPairs, Progress]:
    """Only the distillation of a run: returns (set, progress). Book: notebooks/07_covmatch."""
    entry = method_entry(config)
    settings: Any = config.settings
    context = make_context(config, dataset, deepcopy(template), device, start)
    prepared, cost = entry.distiller.prepare(
        settings, context, experts_folder(config), config.runtime.progress
    )
    method = entry.distiller(settings, replace(context, prepared=prepared))
    if config.runtime.compile:
        method.compile_encoders()
    result, progress = distill(
        method,
        settings.iterations,
        checkpoint=None if folder is None else _checkpoint_path(folder, config),
        checkpoint_every=config.runtime.checkpoint_every,
        clip=settings.clip,
        progress=config.runtime.progress,
        callback=callback,
        callback_every=callback_every,
    )
    progress.prepared = cost | ({"compiled": True} if config.runtime.compile else {})
    return result, progress


def make_context(
    config: RunConfig,
    dataset: PairDataset,
    model: DualEncoder,
    device: torch.device,
    start: SyntheticPairs,
) -> Context:
    """What a run's method works with. model: becomes the method's own. Book: notebooks/run."""
    return Context(
        start=start,
        real=RealBatches(dataset, "train", model, config.protocol, device),
        model=model,
        protocol=config.protocol,
        seed=config.seed,
        precision=config.precision,
        model_config=config.identity()["model"],
    )


def experts_folder(config: RunConfig) -> Path:
    """The folder of all expert buffers."""
    experts = config.runtime.experts
    return Path(experts) if experts else cache_dir() / "experts"


def _no_cost() -> dict[str, Any]:
    return {
        "expert_seconds": 0.0,
        "expert_bytes": 0,
        "init_seconds": 0.0,
        "seconds_per_iteration": 0.0,
        "iterations": 0,
        "peak_memory_bytes": 0,
        "num_bytes": 0,
    }


def _rounded(scores: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in scores.items()}


def evaluate_file(path: str | Path, config: RunConfig) -> list[dict[str, Any]]:
    """Score a saved set with a configuration's data, encoders, protocol and students.

    Returns what `mmdd.evaluation.evaluate` returns. Raises `ArtefactError` for an unusable file.
    Book: notebooks/02_encoders_and_evaluation.
    """
    pairs = SyntheticPairs.load(path)
    return evaluate_pairs(pairs, open_dataset(config.dataset, config.runtime), config)


def evaluate_pairs(
    pairs: SyntheticPairs, dataset: PairDataset, config: RunConfig
) -> list[dict[str, Any]]:
    """`evaluate_file` of a set and a dataset that are open already. Book: book/format."""
    device = resolve_device(config.runtime.device)
    template = place(build_model(config.student or config.model), device)
    return evaluate(
        pairs,
        dataset,
        student_factory(template, config.seed),
        config.protocol,
        config.evaluation,
        device=device,
        progress=config.runtime.progress,
    )
