"""A YAML grid of runs, one papermill execution of the workhorse notebook per point."""

import itertools
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tqdm.auto import tqdm

from mmdd.config import RunConfig, is_stale
from mmdd.errors import ConfigError
from mmdd.presets import merge, preset
from mmdd.store import ResultsStore

_STAGGER_SECONDS = 1.0  # kernels that start at the same moment race for ports


class SweepConfig(BaseModel):
    """A sweep file: a name, a preset, what all points share, and blocks of grids.

    Each block is a product: a key (dots go into nested settings, such as `settings.rho`) with a
    list of values, or one value. Book: notebooks/run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sweep: str
    preset: str = "small"
    base: dict[str, Any] = {}
    grid: list[dict[str, Any]] = Field(min_length=1)


def load_sweep(path: str | Path, runtime: dict[str, Any] | None = None) -> list[RunConfig]:
    """Every point of a sweep file as a validated run, each once.

    runtime: entries of `RuntimeConfig`, which a sweep file has no business to set. Raises
    `ConfigError` naming the file and the block for an unknown key, a wrong value, an empty list or
    a file that is no sweep; nothing runs before all points are valid.
    """
    path = Path(path)
    try:
        sweep = SweepConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise ConfigError(f"{path} is not a sweep file: {explain(error)}.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not a sweep file: {error}") from error
    points: dict[str, RunConfig] = {}
    for number, block in enumerate(sweep.grid, 1):
        axes = {key: value if isinstance(value, list) else [value] for key, value in block.items()}
        empty = [key for key, values in axes.items() if not values]
        if empty:
            raise ConfigError(f"{path}, block {number}: {empty[0]!r} has no value, nothing to run.")
        taken = [k for k in (*sweep.base, *block) if k.split(".")[0] in ("sweep", "runtime")]
        if taken:
            raise ConfigError(
                f"{path}, block {number}: {taken[0]!r} is no matter of base or grid: `sweep` "
                "stands at the top of the file, the runtime on the command line."
            )
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            try:
                wishes = nest(sweep.base)
                for key, value in chosen.items():
                    _put(wishes, key, value)
                wishes |= {"sweep": sweep.sweep, "runtime": runtime or {}}
                point = preset(sweep.preset, **wishes)
            except (ValidationError, ConfigError) as error:
                described = ", ".join(f"{k}={v}" for k, v in chosen.items())
                why = explain(error) if isinstance(error, ValidationError) else error
                raise ConfigError(f"{path}, block {number} ({described}): {why}") from error
            points.setdefault(point.run_id, point)
    return list(points.values())


def explain(error: ValidationError) -> str:
    """What pydantic complains of, on one line."""
    found = []
    for fault in error.errors():
        inner = fault.get("ctx", {}).get("error")  # of a validator, such as that of the settings
        why = (
            explain(inner)
            if isinstance(inner, ValidationError)
            else fault["msg"].removeprefix("Value error, ")
        )
        found.append(": ".join(filter(None, [".".join(map(str, fault["loc"])), why])))
    return "; ".join(found)


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys put into nested dicts, without touching the values given.

    Raises `ConfigError` for a key below something that is no dict.
    """
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        _put(nested, key, value)
    return nested


def _put(target: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        below = target.setdefault(parent, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{dotted!r} cannot be set: {parent!r} is {below!r}, not a mapping.")
        target = below
    old = target.get(last)
    if isinstance(old, dict) and isinstance(value, dict):
        value = merge(old, value)
    target[last] = deepcopy(value)


def run_sweep(
    points: list[RunConfig],
    results_dir: str | Path = "results",
    *,
    notebook: str | Path = "notebooks/run.ipynb",
    jobs: int = 1,
    limit: int | None = None,
    progress: bool = True,
) -> dict[str, str]:
    """Run every point that the store lacks, each in a process of its own.

    limit: run no more than so many, one of each method and protocol before a second of any. Points
    with `runtime.redo_stale` whose record is stale count as lacking.

    Returns run id → last lines of what it printed, for the points that failed; the others are in
    the store. A failing point stops no other. Interrupting keeps finished records and checkpoints.
    Book: notebooks/run.
    """
    store = ResultsStore(results_dir)
    missing = [point for point in points if not _is_done(point, store)]
    done = len(points) - len(missing)
    missing = _one_of_each_first(missing)[:limit]
    failed: dict[str, str] = {}
    bar = tqdm(total=done + len(missing), initial=done, desc="sweep", disable=not progress)
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        futures = {}
        for number, point in enumerate(missing):
            delay = _STAGGER_SECONDS * number if number < jobs else 0.0
            futures[pool.submit(_execute, point, store, Path(notebook), delay)] = point
        try:
            for future in as_completed(futures):
                error = future.result()
                if error:
                    failed[futures[future].run_id] = error
                bar.update()
                bar.set_postfix(failed=len(failed))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # or the pool would finish the grid
            raise
    bar.close()
    return failed


def _is_done(point: RunConfig, store: ResultsStore) -> bool:
    found = store.find(point.run_id)
    return found is not None and not (point.runtime.redo_stale and is_stale(found))


def _one_of_each_first(points: list[RunConfig]) -> list[RunConfig]:
    """Points ordered so that every method and protocol comes before any comes again."""
    counts: dict[tuple[str, str], int] = {}
    turn = []
    for point in points:
        kind = (point.method, point.protocol)
        counts[kind] = turn_of_this = counts.get(kind, 0) + 1
        turn.append(turn_of_this)
    order = sorted(range(len(points)), key=lambda i: turn[i])
    return [points[i] for i in order]


def _execute(point: RunConfig, store: ResultsStore, notebook: Path, delay: float) -> str:
    time.sleep(delay)
    folder = store.working_folder(point.sweep) / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    config = point.model_dump(mode="json")
    parameters = yaml.safe_dump({"config": config, "results_dir": str(store.folder.resolve())})
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--log-level", "ERROR"]
    command += [
        str(notebook),
        str(folder / f"{point.run_id}.ipynb"),
        "--parameters_yaml",
        parameters,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(point.runtime.threads or 1)}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL
    )
    if done.returncode == 0 and _is_done(point, store):
        return ""
    output = (done.stderr or done.stdout).strip()
    return "\n".join(
        [*output.splitlines()[-15:], f"exit code {done.returncode}, no record written"]
    )
