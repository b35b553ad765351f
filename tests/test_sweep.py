"""Sweeps: grids become points before anything runs, and points run in processes of their own."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml

from mmdd.distill import METHODS, CovMatchConfig
from mmdd.errors import ConfigError
from mmdd.presets import preset
from mmdd.selection import SELECTORS
from mmdd.store import ResultsStore
from mmdd.sweep import _one_of_each_first, load_sweep, nest, run_sweep

ROOT = Path(__file__).parents[1]
KNOWN = ", ".join([*METHODS, *SELECTORS, "full"])
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


# -- grids -----------------------------------------------------------------------------------------


def test_a_grid_is_a_product(tmp_path: Path) -> None:
    path = write(
        tmp_path / "s.yaml",
        base={"seed": 3, "evaluation": {"epochs": 7}},
        grid=[
            {"method": "covmatch", "settings.rho": [1, 2], "pairs": [10, 20]},
            {"method": ["random", "full"], "evaluation.lr_image": 0.5},
        ],
    )
    points = load_sweep(path, {"threads": 2})
    found = [
        (p.method, p.pairs, p.settings.rho if isinstance(p.settings, CovMatchConfig) else None)
        for p in points
    ]
    assert found == [
        ("covmatch", 10, 1.0),
        ("covmatch", 20, 1.0),
        ("covmatch", 10, 2.0),
        ("covmatch", 20, 2.0),
        ("random", 100, None),
        ("full", 100, None),
    ]
    assert all(p.seed == 3 and p.sweep == "mine" and p.runtime.threads == 2 for p in points)
    assert [p.evaluation.epochs for p in points] == [7] * 6
    usual = preset("tiny").evaluation.lr_image
    assert [p.evaluation.lr_image for p in points] == [usual] * 4 + [0.5] * 2
    # What the file does not say is the preset's.
    assert points[4].run_id == preset(
        "tiny", method="random", seed=3, evaluation={"epochs": 7, "lr_image": 0.5}
    ).run_id  # fmt: skip


def test_a_point_comes_once(tmp_path: Path) -> None:
    path = write(
        tmp_path / "s.yaml",
        grid=[
            {"method": ["random", "full"], "pairs": [10, 20]},  # pairs do not matter to "full"
            {"method": "random", "pairs": [10, 10]},
        ],
    )
    assert [(p.method, p.pairs) for p in load_sweep(path)] == [
        ("random", 10),
        ("random", 20),
        ("full", 10),
    ]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"grid": [{"method": "random"}, {"pears": 3}]}, r"block 2 \(pears=3\): pears: Extra"),
        ({"grid": [{"pairs": [10, 0]}]}, r"block 1 \(pairs=0\): pairs: "),
        ({"grid": [{"settings.rhoo": 1}]}, r"block 1 \(settings\.rhoo=1\): rhoo: Extra"),
        ({"grid": [{"method": "covmach"}]}, f"block 1 .*'covmach' is unknown; known: {KNOWN}"),
        ({"grid": [{"method": "random", "settings.rho": 1}]}, "block 1 .*'random' has no settings"),
        ({"grid": [{"pairs": []}]}, "block 1: 'pairs' has no value"),
        ({"grid": [{"pairs": 3}], "preset": "huge"}, "block 1 .*unknown preset 'huge'"),
        ({"grid": [{"seed.x": 3}], "base": {"seed": 1}}, r"block 1 .*'seed\.x' cannot be set"),
        ({"grid": [{"settings.rho": 1}], "base": {"settings": None}}, "'settings' is None"),
        ({"grid": [{"runtime.threads": 4}]}, r"block 1: 'runtime\.threads' is no matter of"),
        ({"grid": [{"pairs": 3}], "base": {"runtime": {}}}, "block 1: 'runtime' is no matter of"),
        ({"grid": [{"sweep": "other"}]}, "block 1: 'sweep' is no matter of"),
        ({"grid": [{"pairs": 3}], "sweep": "../x"}, "block 1 .*sweep: "),
        ({"grid": []}, "not a sweep file: grid: "),
        ({"grid": {"pairs": 3}}, "not a sweep file: grid: "),
        ({"grid": [{"pairs": 3}], "gird": 1}, "not a sweep file: gird: Extra"),
        ({}, "not a sweep file: grid: Field required"),
    ],
)  # fmt: skip
def test_a_wrong_sweep_is_named(tmp_path: Path, values: dict, named: str) -> None:
    path = write(tmp_path / "wrong.yaml", **values)
    with pytest.raises(ConfigError, match=rf"wrong\.yaml.*{named}") as error:
        load_sweep(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["grid: [", "[1, 2]", "", "a: b: c", "\xff\xfe"])
def test_a_file_that_is_no_sweep(tmp_path: Path, content: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"wrong\.yaml is not a sweep file"):
        load_sweep(path)
    with pytest.raises(ConfigError, match="none"):
        load_sweep(tmp_path / "none.yaml")


def test_a_dict_in_a_block_is_put_over_the_base(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(
        "sweep: merged\npreset: tiny\nbase: {method: random, evaluation: {students: 3}}\n"
        "grid: [{evaluation: {epochs: 7}, pairs: 5}]\n"
    )
    (point,) = load_sweep(path)
    assert (point.evaluation.students, point.evaluation.epochs) == (3, 7)


def test_nest() -> None:
    shared = {"b": [1]}
    nested = nest({"a.b.c": 1, "a.d": shared, "e": 2})
    assert nested == {"a": {"b": {"c": 1}, "d": {"b": [1]}}, "e": 2}
    nested["a"]["d"]["b"].append(2)
    assert shared == {"b": [1]}
    assert nest({"a": {"b": 1}, "a.c": 2}) == {"a": {"b": 1, "c": 2}}
    with pytest.raises(ConfigError, match=r"'a\.b' cannot be set: 'a' is 1"):
        nest({"a": 1, "a.b": 2})


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_sweeps_of_the_project(path: Path) -> None:
    points = load_sweep(path)
    assert points
    # Hyphens and underscores aside, records are filed under the file's own name.
    assert {p.sweep.replace("-", "_") for p in points} == {path.stem.replace("-", "_")}


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
            {"method": "random", "pairs": [6, 41]},  # there are 40
            {"method": "covmatch", "settings.iterations": 2, "settings.real_batch": 8},
        ],
    )
    points = load_sweep(path, {"threads": 1, "device": "cpu"})
    results = tmp_path / "results"
    failed = run_sweep(points, results, jobs=2, progress=False)
    assert list(failed) == [points[1].run_id]
    assert "cannot choose 41 pairs: the train split of 'scenes' has 40." in failed[points[1].run_id]
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
def test_an_interrupted_sweep_begins_no_other_point(tmp_path: Path, waiting_notebook: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    path = write(tmp_path / "s.yaml", base=SMALL, grid=[{"method": "random", "seed": [1, 2, 3]}])

    def interrupt() -> None:
        while not list(results.glob("began-*")) and not stop.is_set():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        (results / "leave").touch()

    stop = threading.Event()
    watcher = threading.Thread(target=interrupt, daemon=True)
    # A shell starts background jobs with this signal ignored.
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        watcher.start()
        with pytest.raises(KeyboardInterrupt):
            run_sweep(load_sweep(path), results, notebook=waiting_notebook, progress=False)
    finally:
        stop.set()
        watcher.join()
        signal.signal(signal.SIGINT, usual)
    assert len(list(results.glob("began-*"))) == 1


@pytest.mark.notebook
def test_a_point_without_a_record_has_failed(tmp_path: Path, waiting_notebook: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / "leave").touch()
    points = load_sweep(write(tmp_path / "s.yaml", base=SMALL, grid=[{"method": "random"}]))
    failed = run_sweep(points, results, notebook=waiting_notebook, progress=False)
    assert "exit code 0, no record written" in failed[points[0].run_id]
    failed = run_sweep(points, results, notebook=tmp_path / "none.ipynb", progress=False)
    assert "none.ipynb" in failed[points[0].run_id]
