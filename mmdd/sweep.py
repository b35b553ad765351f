"""Points of a grid, each one papermill execution in a process of its own, here or on a cluster."""

import ast
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from mmdd.board import Board
from mmdd.config import RunConfig, is_stale
from mmdd.disk import require_writable
from mmdd.errors import ConfigError
from mmdd.grid import Place, expand, nested, read_sweep, values_of
from mmdd.store import ResultsStore

_LINES = 15  # of an error that are shown; all of it is kept in a file


@dataclass(frozen=True)
class Job:
    """One papermill execution.

    name: of its files; label: for people; sweep: the folder that they go to. point: the run that it
    carries out, or None for a chapter, which is done when its executed notebook is there.
    """

    name: str
    label: str
    sweep: str
    parameters: dict[str, Any]
    threads: int = 1
    point: RunConfig | None = None


@dataclass(frozen=True)
class Queue:
    """Jobs of one notebook, which takes their parameters. done: points that need no job."""

    notebook: str | Path
    jobs: list[Job]
    done: int


def run_sweep(
    points: list[RunConfig],
    results_dir: str | Path = "results",
    *,
    notebook: str | Path = "notebooks/run.ipynb",
    limit: int | None = None,
    **how: Any,
) -> dict[str, str]:
    """Run every point that the store lacks, each in a process of its own.

    points, notebook, limit: see `queue_of_runs`. how: see `run_jobs`. Returns run id → last lines
    of what it printed, for the points that failed; the others are in the store.
    Book: notebooks/run.
    """
    store = ResultsStore(results_dir)
    return run_jobs(queue_of_runs(points, store, notebook, limit), store, **how)


def queue_of_runs(
    points: list[RunConfig],
    store: ResultsStore,
    notebook: str | Path = "notebooks/run.ipynb",
    limit: int | None = None,
) -> Queue:
    """A job for every point that the store lacks.

    points: of one sweep or of several, which then share one queue; a run that two of them ask for
    is filed under the first. limit: run no more than so many of a sweep, one of each method and
    protocol before a second of any. Points with `runtime.redo_stale` whose record is stale count as
    lacking. Raises `ConfigError` for a notebook that cannot carry out runs, if there is one to do.
    Book: notebooks/run.
    """
    asked: dict[str, RunConfig] = {}
    for point in points:
        asked.setdefault(point.run_id, point)
    latest = {record["run_id"]: record for record in store.records(set(asked))}
    missing: dict[str, list[RunConfig]] = {}
    for run_id, point in asked.items():
        if not _counts(latest.get(run_id), point):
            missing.setdefault(point.sweep, []).append(point)
    jobs = [
        Job(
            point.run_id,
            f"{point.method} {point.protocol} N={point.pairs} seed {point.seed}",
            point.sweep,
            {"config": point.model_dump(mode="json"), "results_dir": str(store.folder.resolve())},
            point.runtime.threads or 1,
            point,
        )
        for lacking in missing.values()
        for point in _one_of_each_first(lacking)[:limit]
    ]
    if jobs:
        check_notebook(notebook, jobs[0].parameters)
    return Queue(notebook, jobs, len(asked) - sum(map(len, missing.values())))


def run_chapters(
    path: str | Path, results_dir: str | Path = "results", limit: int | None = None, **how: Any
) -> dict[str, str]:
    """Execute a chapter once for every point of a sweep file that names one.

    The executed notebooks stand in `<results_dir>/<sweep>/notebooks`; those that are there are not
    executed again. limit: see `queue_of_chapters`. how: see `run_jobs`. Returns name → error of
    those that failed. Book: notebooks/run.
    """
    store = ResultsStore(results_dir)
    return run_jobs(queue_of_chapters(path, store, limit), store, **how)


def queue_of_chapters(path: str | Path, store: ResultsStore, limit: int | None = None) -> Queue:
    """A job for every point of a sweep file that names a chapter, unless it was executed.

    limit: execute no more than so many. Raises `ConfigError` as `load_sweep`, and for a chapter
    without a parameters cell or a parameter that it does not declare. Book: notebooks/run.
    """
    sweep, lines = read_sweep(Path(path))
    if sweep.notebook is None:
        raise ConfigError(f"{path} names no notebook: its points are runs.")
    points = [point for _, point in expand(sweep, lines)]
    places: dict[str, Place] = {}
    for key, value, place in itertools.chain(*points):
        places.setdefault(key.split(".")[0], place)
        try:
            json.dumps(value, sort_keys=True)
        except TypeError as error:
            raise lines.wrong(f"{key!r} is no plain value: {error}", *place) from error
    checks: list[tuple[list[str], Place]] = [([], ("notebook",))]
    checks += [([name], place) for name, place in places.items()]
    for wanted, place in checks:
        try:
            check_notebook(sweep.notebook, wanted)
        except ConfigError as error:
            raise lines.wrong(error, *place) from error
    content = Path(sweep.notebook).read_bytes()
    jobs: dict[str, Job] = {}
    for point in points:
        values = nested(point, lines)
        # The chapter as it is now, and its parameters.
        told = json.dumps(values, sort_keys=True)
        name = hashlib.sha256(told.encode() + content).hexdigest()[:16]
        label = " ".join(f"{k}={v}" for k, v in values_of(point, base=False).items())
        jobs[name] = Job(name, label, sweep.sweep, values)
    missing = [job for job in jobs.values() if not _is_done(job, store)]
    return Queue(sweep.notebook, missing[:limit], len(jobs) - len(missing))


def run_jobs(
    queue: Queue,
    store: ResultsStore,
    *,
    processes: int = 1,
    scheduler: str | None = None,
    resources: dict[str, float] | None = None,
    retries: int = 1,
    progress: bool = True,
) -> dict[str, str]:
    """Carry out the jobs of a queue; returns name → last lines of the error of those that failed.

    processes: at a time, on this machine. scheduler: address of a Dask scheduler instead, whose
    workers see the same folders; resources: what each job takes of a worker there, such as
    {"GPU": 1}. retries: of a job that failed; a run goes on from its checkpoint.

    A failing job stops no other; all of its output is kept in `<sweep>/errors/<name>.txt`. A job
    of the same sweep that another process is at is waited for. An interrupt stops what runs on this
    machine, withdraws what no worker of a cluster has begun, and keeps records and checkpoints.
    Raises `DiskError` for a folder of results that may not be written. Book: notebooks/run.
    """
    jobs = queue.jobs
    if not jobs:
        return {}
    for sweep in dict.fromkeys(job.sweep for job in jobs):
        require_writable(store.working_folder(sweep))  # one error, not one of each job
    order = (str(store.folder.resolve()), str(Path(queue.notebook).resolve()), retries)
    failed: dict[str, str] = {}
    begun: dict[str, float] = {}
    labels = {job.name: job.label for job in jobs}
    with (
        Board(queue.done + len(jobs), queue.done, begun, labels, progress) as board,
        _executor(processes, scheduler) as executor,
    ):
        waiting: dict[Future[str], Job] = {}
        try:
            for job in jobs:
                if scheduler is None:
                    future = executor.submit(_begin, job, order, begun)
                else:
                    future = executor.submit(execute, job, *order, **_on_a_cluster(resources))
                waiting[future] = job
            for future in _finished(waiting, board.refresh):
                job = waiting[future]
                error = _outcome(future)
                if error:
                    failed[job.name] = error
                board.finished(job.name, job.label, error, _score(job, store))
        except BaseException:  # an interrupt, or a fault of our own: nothing goes on unseen
            for future in waiting:
                future.cancel()  # or the pool would finish the grid; a busy Dask worker goes on
            _stop_all()
            raise
    return failed


def check_notebook(notebook: str | Path, wanted: Iterable[str]) -> None:
    """Raise `ConfigError` unless a notebook declares parameters of the wanted names."""
    try:
        with open(notebook, encoding="utf-8") as file:
            cells = json.load(file)["cells"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{notebook} is not a notebook that can be executed: {error}") from error
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    if not tagged:
        raise ConfigError(
            f"{notebook} has no cell with the tag 'parameters': values would change nothing."
        )
    try:
        declared = ast.walk(ast.parse("".join(tagged[0]["source"])))
    except SyntaxError as error:
        raise ConfigError(f"{notebook}: its parameters are no plain Python: {error}") from error
    known = [n.id for n in declared if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise ConfigError(
            f"{notebook} has no parameter {unknown[0]!r}; it declares: {', '.join(known)}."
        )


# -- one job ---------------------------------------------------------------------------------------


class Turns:
    """Spreads what would happen at the same moment: turns come at least so many seconds apart."""

    def __init__(self, apart: float) -> None:
        self._apart, self._next, self._lock = apart, 0.0, threading.Lock()

    def delay(self, now: float) -> float:
        """Seconds from now until the caller's turn, which nobody else is given."""
        with self._lock:
            turn = max(now, self._next)
            self._next = turn + self._apart
        return turn - now


_running: set["subprocess.Popen[str]"] = set()
_stopping = threading.Event()
# Kernels that start at the same moment race for ports, and all read the same packages and caches.
_starts = Turns(1.0)


def execute(job: Job, results_dir: str, notebook: str, retries: int) -> str:
    """Carry out a job unless it is done; returns the last lines of its error, or nothing."""
    store = ResultsStore(results_dir)
    folder = store.working_folder(job.sweep)
    for name in ("notebooks", "locks", "errors"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    report = folder / "errors" / f"{job.name}.txt"
    error = "interrupted"
    # Another sweep may be at the same job: the later one waits, and finds it done.
    lock = FileLock(folder / "locks" / f"{job.name}.lock")
    while not _stopping.is_set():
        try:
            lock.acquire(timeout=1)
            break
        except Timeout:
            continue
    try:
        for _ in range(retries + 1):
            if _is_done(job, store):
                return ""
            _stopping.wait(_starts.delay(time.monotonic()))
            if _stopping.is_set():
                return error
            error = _papermill(job, store, notebook)
            if not error:
                report.unlink(missing_ok=True)
                return ""
            report.write_text(error + "\n", encoding="utf-8")
    finally:
        lock.release()
    return "\n".join(error.splitlines()[-_LINES:])


def _papermill(job: Job, store: ResultsStore, notebook: str) -> str:
    target = _executed(store, job)
    part = target.with_suffix(".part.ipynb")
    before = _finished_at(job, store)
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--log-level", "ERROR"]
    command += [notebook, str(part), "--parameters_yaml", yaml.safe_dump(job.parameters)]
    environment = os.environ | {"OMP_NUM_THREADS": str(job.threads)}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    _running.add(process)
    if _stopping.is_set():  # set since it was last looked at: nobody else would stop this one
        process.send_signal(signal.SIGTERM)
    try:
        out, err = process.communicate()
    finally:
        _running.discard(process)
    if part.exists():
        part.replace(target if process.returncode == 0 else target.with_suffix(".failed.ipynb"))
    # A new record is a success even where the code was edited meanwhile and calls it stale.
    missing = job.point is not None and _finished_at(job, store) in (None, before)
    if process.returncode == 0 and not missing:
        target.with_suffix(".failed.ipynb").unlink(missing_ok=True)
        return ""
    ending = f"exit code {process.returncode}" + (", no record written" if missing else "")
    return "\n".join(filter(None, [out.strip(), err.strip(), ending]))


def _begin(job: Job, order: tuple[str, str, int], begun: dict[str, float]) -> str:
    begun[job.name] = time.monotonic()
    try:
        return execute(job, *order)
    finally:
        begun.pop(job.name, None)


def _finished_at(job: Job, store: ResultsStore) -> str | None:
    found = None if job.point is None else store.find(job.point.run_id)
    return None if found is None else str(found.get("finished", ""))


def _executed(store: ResultsStore, job: Job) -> Path:
    return store.working_folder(job.sweep) / "notebooks" / f"{job.name}.ipynb"


def _is_done(job: Job, store: ResultsStore) -> bool:
    if job.point is None:
        return _executed(store, job).exists()
    return _counts(store.find(job.point.run_id), job.point)


def _counts(record: dict[str, Any] | None, point: RunConfig) -> bool:
    """True where there is a record that the point need not make again."""
    return record is not None and not (point.runtime.redo_stale and is_stale(record))


def _score(job: Job, store: ResultsStore) -> float | None:
    """The mean recall of a job's students, in percent, if it made a record."""
    found = None if job.point is None else store.find(job.point.run_id)
    if found is None:
        return None
    means = [student["test"]["mean"] for student in found["students"]]
    return float(sum(means) / len(means))


# -- many jobs -------------------------------------------------------------------------------------


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


def _on_a_cluster(resources: dict[str, float] | None) -> dict[str, Any]:
    # pure=False: the same job again, after a failure, is not answered from the scheduler's memory.
    return {"resources": resources or {}, "pure": False}


@contextmanager
def _executor(processes: int, scheduler: str | None) -> Iterator[Executor | Any]:
    _stopping.clear()
    if scheduler is None:
        with ThreadPoolExecutor(max_workers=processes) as pool:  # a thread waits for each process
            yield pool
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise ConfigError("a cluster needs Dask: pip install 'mmdd[dask]'.") from error
    with Client(scheduler) as client:
        yield client


def _finished(
    futures: dict[Any, Job], refresh: Callable[[], None], every: float = 0.5
) -> Iterator[Any]:
    """Futures as they finish; `refresh` is called meanwhile."""
    left = set(futures)
    local = all(isinstance(future, Future) for future in left)
    while left:
        if local:
            ready, _ = wait(left, timeout=every, return_when=FIRST_COMPLETED)
        else:
            time.sleep(every)
            ready = {future for future in left if future.done()}
        refresh()
        yield from ready
        left -= ready


def _outcome(future: Any) -> str:
    """A job's error, that of its worker included; nothing for a job that went well."""
    try:
        return str(future.result())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _stop_all() -> None:
    """Stop the processes that run, which go on from their checkpoints another time."""
    _stopping.set()
    for process in list(_running):
        process.send_signal(signal.SIGTERM)
