"""The committed notebooks: parameters, no outputs, one kernel; and the workhorse, carried out."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml

from mmdd.store import ResultsStore
from tools.check_notebooks import TINY, mark_deterministic, warnings_in

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PAGES = sorted((ROOT / "book").glob("*.ipynb"))


def load(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def test_there_are_notebooks() -> None:
    names = [path.name for path in NOTEBOOKS]
    assert "run.ipynb" in names
    assert all(re.fullmatch(r"(\d\d_[a-z0-9_]+|run)\.ipynb", name) for name in names)
    numbers = [name[:2] for name in names if name != "run.ipynb"]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("path", NOTEBOOKS + PAGES, ids=lambda p: p.stem)
def test_a_committed_notebook(path: Path) -> None:
    notebook = load(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        assert cell.outputs == []
        assert cell.execution_count is None
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    tagged = [c for c in code if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1, "papermill needs one cell with the tag parameters"
    assert code.index(tagged[0]) == 0 or all(
        "import" in c.source for c in code[: code.index(tagged[0])]
    )
    # The title is the first line of the page.
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    assert sum(bool(re.match("# ", c.source)) for c in notebook.cells
               if c.cell_type == "markdown") == 1  # fmt: skip


@pytest.mark.parametrize("path", NOTEBOOKS + PAGES, ids=lambda p: p.stem)
def test_nothing_of_the_machine_is_in_a_notebook(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert str(Path.home()) + "/" not in text
    assert str(ROOT) not in text
    assert "widgets" not in load(path).metadata


@pytest.mark.parametrize("path", NOTEBOOKS + PAGES, ids=lambda p: p.stem)
def test_a_command_executes_a_chapter_where_it_lies(path: Path) -> None:
    """Its `../results` is beside it; from the root of the repository papermill would miss it."""
    for cell in load(path).cells:
        for command in re.findall(r"papermill [^`]*?\.ipynb", cell.source):
            folder = command.split()[-1].rsplit("/", 1)[0]
            alone = command.endswith("notebooks/run.ipynb")  # reads nothing beside it
            assert alone or command.startswith(f"papermill --cwd {folder} {folder}/"), command


@pytest.mark.parametrize("path", NOTEBOOKS + PAGES, ids=lambda p: p.stem)
def test_a_notebook_opens_with_what_it_takes_and_needs(path: Path) -> None:
    if path.stem == "status":  # about the build, and executed by it alone
        return
    opening = load(path).cells[0].source
    assert re.search(r"\b(second|minute|hour)s?\b", opening), "say how long it takes"
    assert re.search(r"\bneeds?\b\W+(nothing|no|only|the|a)\b", opening, re.IGNORECASE)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_chapter_sets_itself_up_on_colab(path: Path) -> None:
    """The same first code cell everywhere; tools/check_setup.py executes it for real."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    cell = next(cell for cell in load(path).cells if cell.cell_type == "code")
    expected = next(c for c in load(FOLDER / "00_start.ipynb").cells if c.cell_type == "code")
    assert cell.source == expected.source, "copy the first code cell of 00_start"
    assert cell.id == "setup"
    assert cell.metadata.tags == ["remove-cell"], "the page of the book does not show it"
    assert 'if "google.colab" in sys.modules' in cell.source
    assert f"git clone -q --depth 1 {config['repository']['url']} " in cell.source


def test_binder_installs_the_package_as_make_does() -> None:
    install = "-m pip install --disable-pip-version-check --no-deps --no-build-isolation -e ."
    assert install in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"python {install}" in (ROOT / "postBuild").read_text(encoding="utf-8")
    assert (ROOT / "postBuild").stat().st_mode & 0o100


def test_tiny_parameters_are_parameters_of_their_notebooks() -> None:
    for name, parameters in TINY.items():
        cells = load(FOLDER / f"{name}.ipynb").cells
        (cell,) = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
        for parameter in parameters:
            assert re.search(rf"^{parameter} = ", cell.source, re.MULTILINE), (name, parameter)


def test_warnings_in_outputs_are_found_and_clocks_are_not_compared() -> None:
    def cell(source: str, text: str) -> Any:
        output = nbformat.v4.new_output("stream", name="stderr", text=text)
        return nbformat.v4.new_code_cell(source, outputs=[output])

    notebook = nbformat.v4.new_notebook(
        cells=[
            cell("f()", "a.py:3: FutureWarning: old\n  f()"),
            cell("perf_counter()", "0.3"),
            nbformat.v4.new_code_cell("x = 1"),
        ]
    )
    assert warnings_in(notebook) == ["a.py:3: FutureWarning: old"]
    assert mark_deterministic(notebook) == 1
    assert ["tags" in c.metadata for c in notebook.cells] == [True, False, False]


def execute(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--log-level", "ERROR"]
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    return subprocess.run(
        [*command, "notebooks/run.ipynb", str(output), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
    )


WISHES: dict[str, Any] = {
    "method": "covmatch",
    "pairs": 6,
    "protocol": "heads",
    "dataset": {"train": 40, "val": 20, "test": 20},
    "settings": {"iterations": 3, "real_batch": 8},
    "evaluation": {"students": 2, "epochs": 2, "scores": 1},
    "runtime": {"progress": False},
}


@pytest.mark.notebook
@pytest.mark.slow
def test_the_workhorse(tmp_path: Path) -> None:
    """By the command that the notebook itself names: wishes over a preset."""
    output, results = tmp_path / "out.ipynb", tmp_path / "results"
    parameters = yaml.safe_dump({"config": WISHES, "results_dir": str(results)})
    done = execute(output, "-y", parameters, "-p", "preset_name", "tiny")
    assert done.returncode == 0, done.stderr
    (record,) = ResultsStore(results).records()
    assert record["config"]["settings"]["iterations"] == 3
    assert record["dataset"]["splits"]["train"] == 40
    outputs = [o for c in load(output).cells if c.cell_type == "code" for o in c.outputs]
    text = "".join(o.get("text", "") for o in outputs)
    assert f"run {record['run_id']}" in text
    tables = [o["data"]["text/plain"] for o in outputs if "text/plain" in o.get("data", {})]
    mean = sum(s["test"]["mean"] for s in record["students"]) / 2
    assert any(f"{mean:.2f}" in table and "chance" in table for table in tables)
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 2
    assert not any(o.output_type == "error" for o in outputs)


@pytest.mark.notebook
def test_the_workhorse_stops_at_an_unknown_key(tmp_path: Path) -> None:
    done = execute(tmp_path / "out.ipynb", "-y", "config: {pears: 3}")
    assert done.returncode != 0
    assert "pears" in done.stderr
