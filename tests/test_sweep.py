"""Points of a sweep run in processes of their own, here or on a cluster, and lose nothing."""

import contextlib
import datetime
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
import yaml
from typer.testing import CliRunner

import mmdd.sweep
from mmdd.__main__ import app
from mmdd.config import RunConfig
from mmdd.errors import ConfigError
from mmdd.grid import load_sweep
from mmdd.store import ResultsStore
from mmdd.sweep import Job, Turns, _one_of_each_first, check_notebook, run_chapters, run_sweep

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {
    "pairs": 6,
    "dataset": {"train": 40, "val": 20, "test": 20},
    "model.dim": 12,
    "evaluation": {"students": 1, "epochs": 2, "scores": 1},
}


def write(path: Path, **values: Any) -> Path:
    path.write_text(
        yaml.safe_dump({"sweep": "mine", "preset": "tiny"} | values, sort_keys=False),
        encoding="utf-8",
    )
    return path


# -- running ---------------------------------------------------------------------------------------


@pytest.mark.notebook
@pytest.mark.slow
def test_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # a kernel shows its figures inline
    path = write(
        tmp_path / "s.yaml",
        base=SMALL,
        grid=[
            {"method": "random"},
            {
                "method": "covmatch",
                "pairs": [1, 6],  # one has no covariance
                "settings.iterations": 2,
                "settings.real_batch": 8,
            },
        ],
    )
    points = load_sweep(path, {"threads": 1, "device": "cpu"})
    results = tmp_path / "results"
    failed = run_sweep(points, results, processes=2, progress=False)
    assert list(failed) == [points[1].run_id]
    assert "covmatch needs at least two synthetic" in failed[points[1].run_id]
    store = ResultsStore(results)
    for point in (points[0], points[2]):
        record = store.find(point.run_id)
        assert record is not None
        assert record["config"] == point.identity()
        assert record["environment"]["threads"] == 1
        executed = nbformat.read(
            results / "mine" / "notebooks" / f"{point.run_id}.ipynb", as_version=4
        )
        outputs = [o for c in executed.cells if c.cell_type == "code" for o in c.outputs]
        text = json.dumps(outputs)
        assert point.run_id in text
        pictures = sum("image/png" in o.get("data", {}) for o in outputs)
        assert pictures == (2 if point.method == "covmatch" else 1)
        assert str(tmp_path) not in json.dumps(record)
    assert store.find(points[1].run_id) is None
    # Done is done: a notebook that does not exist is never opened.
    good = [points[0], points[2]]
    assert run_sweep(good, results, notebook=tmp_path / "none.ipynb", progress=False) == {}
    store.pack("mine")
    assert run_sweep(good, results, notebook=tmp_path / "none.ipynb", progress=False) == {}
    # On request a record of other code is not done, and a limit says how many points to run.
    old = store.find(good[0].run_id)
    assert old is not None
    store.write(old | {"environment": old["environment"] | {"source_hash": "0" * 12}})
    again = load_sweep(path, {"threads": 1, "device": "cpu", "redo_stale": True})
    assert run_sweep([again[0], again[2]], results, limit=1, progress=False) == {}
    new = store.find(good[0].run_id)
    assert new is not None
    assert new["replaced"]["source_hash"] == "0" * 12
    assert new["replaced"]["largest_difference"] == 0


def test_one_of_each_kind_comes_first(tmp_path: Path) -> None:
    path = write(
        tmp_path / "s.yaml", base=SMALL, grid=[{"method": ["random", "full", "dm"], "seed": [0, 1]}]
    )
    points = load_sweep(path)
    ordered = _one_of_each_first(points)
    assert [p.method for p in ordered] == ["random", "full", "dm"] * 2
    assert [p.seed for p in ordered] == [0, 0, 0, 1, 1, 1]


# What stands in for a run: it needs no encoder, and its record says how often it was carried out.
RECORDER = """
import json, os, time
from pathlib import Path
from mmdd.config import RunConfig
from mmdd.store import ResultsStore
run_config = RunConfig.model_validate(config)
folder = Path(results_dir)
with open(folder / "attempts.txt", "a") as file:
    file.write(f"{run_config.run_id} {os.getpid()}\\n")
time.sleep(seconds)
if run_config.seed == 13:
    raise ValueError("an unlucky seed")
ResultsStore(folder).write({
    "schema": 1, "run_id": run_config.run_id, "sweep": run_config.sweep,
    "config": run_config.identity(), "environment": {"source_hash": run_config.source_hash},
    "students": [{"test": {"mean": 12.5}}, {"test": {"mean": 13.5}}], "seed": run_config.seed,
})
"""


def make_notebook(path: Path, code: str, parameters: str = "") -> Path:
    cells = [nbformat.v4.new_code_cell(code)]
    if parameters:
        tagged = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
        cells.insert(0, tagged)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    return path


def recorder(tmp_path: Path, seconds: float = 0.0) -> Path:
    parameters = f"config, results_dir, seconds = {{}}, None, {seconds}"
    return make_notebook(tmp_path / "recorder.ipynb", RECORDER, parameters)


def seeds(tmp_path: Path, *numbers: int) -> list[RunConfig]:
    (tmp_path / "results").mkdir(exist_ok=True)
    path = write(tmp_path / "s.yaml", base={"method": "random"}, grid=[{"seed": list(numbers)}])
    return load_sweep(path)


def attempts(tmp_path: Path) -> list[tuple[str, int]]:
    path = tmp_path / "results" / "attempts.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(line.split()[0], int(line.split()[1])) for line in lines]


@pytest.mark.notebook
def test_a_failing_point_is_tried_again_and_told_of(tmp_path: Path) -> None:
    points = seeds(tmp_path, 1, 13)
    failed = run_sweep(
        points, tmp_path / "results", notebook=recorder(tmp_path), retries=2, progress=False
    )
    unlucky = points[1].run_id
    assert list(failed) == [unlucky]
    assert "an unlucky seed" in failed[unlucky]
    assert [name for name, _ in attempts(tmp_path)].count(unlucky) == 3
    folder = tmp_path / "results" / "mine"
    assert "an unlucky seed" in (folder / "errors" / f"{unlucky}.txt").read_text()
    assert (folder / "notebooks" / f"{unlucky}.failed.ipynb").exists()
    assert (folder / "notebooks" / f"{points[0].run_id}.ipynb").exists()
    assert not list((folder / "errors").glob(f"{points[0].run_id}*"))


@pytest.mark.notebook
@pytest.mark.slow
def test_killed_workers_lose_nothing(tmp_path: Path) -> None:
    """Kernels are shot while they work; every point has its record in the end."""
    points = seeds(tmp_path, *range(4))
    shot: list[int] = []

    def shoot() -> None:
        while len(shot) < 3 and not stop.is_set():
            path = tmp_path / "results" / "attempts.txt"
            alive = (
                [pid for _, pid in attempts(tmp_path) if pid not in shot] if path.exists() else []
            )
            if alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(alive[-1], signal.SIGKILL)
                    shot.append(alive[-1])
            time.sleep(0.2)

    stop = threading.Event()
    killer = threading.Thread(target=shoot, daemon=True)
    killer.start()
    try:
        failed = run_sweep(
            points,
            tmp_path / "results",
            notebook=recorder(tmp_path, 1.0),
            processes=2,
            retries=4,
            progress=False,
        )
    finally:
        stop.set()
        killer.join()
    assert len(shot) == 3
    assert failed == {}
    store = ResultsStore(tmp_path / "results")
    assert {r["run_id"] for r in store.records()} == {p.run_id for p in points}


# Goes on when three are at work, and fails where that does not happen.
TOGETHER = """
until = time.time() + 120
while len((folder / "attempts.txt").read_text().splitlines()) < 3:
    assert time.time() < until, "alone"
    time.sleep(0.05)
"""


@pytest.mark.notebook
def test_several_grids_share_one_queue(tmp_path: Path) -> None:
    points = []
    for name, numbers in (("one", [1, 2]), ("two", [2, 3])):
        grid = [{"seed": numbers}]
        path = write(tmp_path / f"{name}.yaml", sweep=name, base={"method": "random"}, grid=grid)
        points += load_sweep(path)
    assert points[1].run_id == points[2].run_id  # asked for by both, run once
    results = tmp_path / "results"
    results.mkdir()
    notebook = make_notebook(
        tmp_path / "together.ipynb",
        RECORDER.replace("time.sleep(seconds)", TOGETHER),
        "config, results_dir = {}, None",
    )
    failed = run_sweep(points, results, notebook=notebook, processes=3, retries=0, progress=False)
    assert failed == {}
    found = {record["run_id"]: record["sweep"] for record in ResultsStore(results).records()}
    assert found == {points[0].run_id: "one", points[1].run_id: "one", points[3].run_id: "two"}
    assert len(attempts(tmp_path)) == 3
    for name, runs in (("one", 2), ("two", 1)):
        assert len(list((results / name / "notebooks").glob("*.ipynb"))) == runs


@pytest.mark.notebook
@pytest.mark.slow
def test_two_sweeps_on_one_store(tmp_path: Path) -> None:
    """Each point is carried out once, and packing at the same time loses no record."""
    points = seeds(tmp_path, 0, 1, 2)
    notebook = recorder(tmp_path, 0.5)
    outcomes: list[dict[str, str]] = []

    def sweep(order: list[RunConfig]) -> None:
        outcomes.append(run_sweep(order, tmp_path / "results", notebook=notebook, progress=False))
        ResultsStore(tmp_path / "results").pack("mine")

    threads = [threading.Thread(target=sweep, args=(o,)) for o in (points, points[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [{}, {}]
    assert sorted(name for name, _ in attempts(tmp_path)) == sorted(p.run_id for p in points)
    _, *lines = (tmp_path / "results" / "mine.jsonl").read_text().splitlines()
    assert [json.loads(line)["run_id"] for line in lines] == sorted(p.run_id for p in points)


@pytest.mark.notebook
@pytest.mark.slow
def test_a_cluster(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    points = seeds(tmp_path, 0, 1, 13)
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        dashboard_address=None,
        resources={"GPU": 1},
    ) as cluster:
        failed = run_sweep(
            points,
            tmp_path / "results",
            notebook=recorder(tmp_path),
            scheduler=cluster.scheduler_address,
            resources={"GPU": 1},
            retries=0,
            progress=False,
        )
    assert list(failed) == [points[2].run_id]
    assert "an unlucky seed" in failed[points[2].run_id]
    assert {r["seed"] for r in ResultsStore(tmp_path / "results").records()} == {0, 1}


@pytest.mark.notebook
def test_a_chapter_for_every_point(tmp_path: Path) -> None:
    chapter = make_notebook(
        tmp_path / "chapter.ipynb", "assert b != 2\nprint('sum', a + b)", "a = 0\nb = 0"
    )
    path = write(tmp_path / "s.yaml", notebook=str(chapter), base={"a": 1}, grid=[{"b": [1, 2]}])
    failed = run_chapters(path, tmp_path / "results", retries=0, progress=False)
    assert len(failed) == 1
    assert "assert b != 2" in next(iter(failed.values()))
    [executed] = [
        p
        for p in (tmp_path / "results" / "mine" / "notebooks").glob("*.ipynb")
        if "failed" not in p.name
    ]
    assert "sum 2" in executed.read_text()
    before = executed.stat().st_mtime_ns
    assert len(run_chapters(path, tmp_path / "results", retries=0, progress=False)) == 1
    assert executed.stat().st_mtime_ns == before
    # An edited chapter is another one.
    make_notebook(chapter, "print('product', a * b)", "a = 0\nb = 0")
    assert run_chapters(path, tmp_path / "results", retries=0, progress=False) == {}
    assert len(list(executed.parent.glob("*.ipynb"))) == 4  # and the failed one of before
    wrong = write(tmp_path / "w.yaml", notebook=str(chapter), grid=[{"c": 1}])
    with pytest.raises(ConfigError, match="has no parameter 'c'; it declares: a, b"):
        run_chapters(wrong, tmp_path / "results", progress=False)


def test_notebooks_that_cannot_be_swept(tmp_path: Path) -> None:
    plain = make_notebook(tmp_path / "plain.ipynb", "x = 1")
    with pytest.raises(ConfigError, match=r"plain\.ipynb has no cell with the tag 'parameters'"):
        check_notebook(plain, [])
    other = make_notebook(tmp_path / "other.ipynb", "x = 1", "config = {}")
    check_notebook(other, ["config"])
    with pytest.raises(ConfigError, match="has no parameter 'results_dir'; it declares: config"):
        check_notebook(other, ["config", "results_dir"])
    magic = make_notebook(tmp_path / "magic.ipynb", "x = 1", "%matplotlib inline\nconfig = {}")
    with pytest.raises(ConfigError, match="its parameters are no plain Python"):
        check_notebook(magic, ["config"])
    (tmp_path / "text.ipynb").write_text("no notebook")
    for name in ("text.ipynb", "none.ipynb"):
        with pytest.raises(ConfigError, match=f"{name} is not a notebook"):
            check_notebook(tmp_path / name, [])
    with pytest.raises(ConfigError, match=r"none\.ipynb is not a notebook"):
        run_sweep(seeds(tmp_path, 1), tmp_path / "results", notebook=tmp_path / "none.ipynb")
    with pytest.raises(ConfigError, match="names no notebook"):
        run_chapters(tmp_path / "s.yaml", tmp_path / "results")


CHAPTERS = {
    "no parameters": ("x = 1", "", {}, "line 3: plain.ipynb has no cell with the tag"),
    "another parameter": ("x = 1", "a = 0", {}, "line 6: plain.ipynb has no parameter 'b'"),
    "none in an override": (
        "x = 1",
        "a = b = 0",
        {"override": [{"when": {"a": 1}, "set": {"c.d": 1}}]},
        "line 11: plain.ipynb has no parameter 'c'",
    ),
    "a date": (
        "x = 1",
        "a = b = 0",
        {"base": {"a": datetime.date(2000, 1, 1)}},
        "line 8: 'a' is no plain value",
    ),
}


@pytest.mark.parametrize(
    ("code", "parameters", "more", "named"), CHAPTERS.values(), ids=CHAPTERS.keys()
)
def test_all_files_are_checked_before_anything_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    parameters: str,
    more: dict[str, Any],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notebooks").mkdir()
    run = make_notebook(Path("notebooks/run.ipynb"), "x = 1", "config, results_dir = {}, None")
    started: list[str] = []

    def papermill(job: Job, *_: Any) -> str:
        started.append(job.name)
        return ""

    def sweep(*files: Path) -> BaseException | None:
        return CliRunner().invoke(app, ["sweep", *map(str, files)]).exception

    monkeypatch.setattr(mmdd.sweep, "_papermill", papermill)
    good = write(Path("good.yaml"), grid=[{"method": "random"}])
    make_notebook(Path("plain.ipynb"), code, parameters)
    grid = [{"a": 1, "b": 2}]
    chapter = write(Path("chapter.yaml"), notebook="plain.ipynb", grid=grid, **more)
    refused = sweep(good, chapter)
    assert isinstance(refused, ConfigError)
    assert str(refused).startswith(f"chapter.yaml, {named}")
    # The other way round it is the notebook of the runs that is looked at first.
    make_notebook(Path("plain.ipynb"), "x = 1", "a = b = c = 0")
    fine = write(Path("fine.yaml"), notebook="plain.ipynb", grid=grid)
    make_notebook(run, "x = 1")
    refused = sweep(fine, good)
    assert isinstance(refused, ConfigError)
    assert "run.ipynb has no cell with the tag" in str(refused)
    assert started == []
    make_notebook(run, "x = 1", "config, results_dir = {}, None")
    assert not sweep(fine, good)
    assert len(started) == 2


# -- starts ----------------------------------------------------------------------------------------


def test_turns() -> None:
    turns = Turns(1.0)
    assert [turns.delay(now) for now in (10.0, 10.0, 10.5, 20.0, 20.25)] == [0, 1, 1.5, 0, 0.75]


def test_every_start_takes_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only the first ones: also those that follow them, and what is tried again."""
    asked: list[float] = []

    class Standing(Turns):  # on a clock that stands still
        def delay(self, now: float) -> float:
            asked.append(super().delay(0.0))
            return 0.0

    points = seeds(tmp_path, 0, 1, 2, 13)
    monkeypatch.setattr(mmdd.sweep, "_starts", Standing(1.0))
    monkeypatch.setattr(
        mmdd.sweep, "_papermill", lambda job, *_: "unlucky" if job.point.seed == 13 else ""
    )
    results, notebook = tmp_path / "results", recorder(tmp_path)
    failed = run_sweep(points, results, notebook=notebook, processes=2, progress=False)
    assert failed == {points[3].run_id: "unlucky"}
    assert sorted(asked) == [0, 1, 2, 3, 4]


@pytest.fixture
def waiting_notebook(tmp_path: Path) -> Path:
    """A workhorse that tells that it began and waits for leave to end; it keeps no record."""
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(
                "config, results_dir = {}, None", metadata={"tags": ["parameters"]}
            ),
            nbformat.v4.new_code_cell(
                "import time, uuid\nfrom pathlib import Path\n"
                "folder = Path(results_dir)\n"
                "(folder / f'began-{uuid.uuid4()}').touch()\n"
                "until = time.time() + 60\n"
                "while not (folder / 'leave').exists() and time.time() < until: time.sleep(0.05)"
            ),
        ],
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python"},
        },
    )
    path = tmp_path / "waiting.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.mark.notebook
def test_an_interrupt_stops_what_runs_and_begins_nothing(tmp_path: Path) -> None:
    """The kernel of the running point would go on for a minute."""
    points = seeds(tmp_path, 1, 2, 3)
    notebook = recorder(tmp_path, 60.0)

    def interrupt() -> None:
        while not attempts(tmp_path) and not stop.is_set():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    stop = threading.Event()
    watcher = threading.Thread(target=interrupt, daemon=True)
    # A shell starts background jobs with this signal ignored.
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        watcher.start()
        with pytest.raises(KeyboardInterrupt):
            run_sweep(points, tmp_path / "results", notebook=notebook, progress=False)
    finally:
        stop.set()
        watcher.join()
        signal.signal(signal.SIGINT, usual)
    [(_, kernel)] = attempts(tmp_path)
    until = time.monotonic() + 30  # the kernel looks for its parent every now and then
    while psutil.pid_exists(kernel) and time.monotonic() < until:
        time.sleep(0.2)
    assert not psutil.pid_exists(kernel)
    assert not list(ResultsStore(tmp_path / "results").records())


@pytest.mark.notebook
def test_a_point_without_a_record_has_failed(tmp_path: Path, waiting_notebook: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / "leave").touch()
    points = load_sweep(write(tmp_path / "s.yaml", base=SMALL, grid=[{"method": "random"}]))
    failed = run_sweep(points, results, notebook=waiting_notebook, progress=False)
    assert "exit code 0, no record written" in failed[points[0].run_id]
