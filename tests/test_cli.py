"""The command line: what it prints, where it writes, and exit codes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mmdd import __main__ as cli
from mmdd.distill import METHODS
from mmdd.presets import preset
from mmdd.runs import set_path
from mmdd.selection import SELECTORS
from mmdd.store import ResultsStore

ROOT = Path(__file__).parents[1]
KNOWN = ", ".join([*METHODS, *SELECTORS, "full"])
SMALL = (
    *("--preset", "tiny", "--set", "dataset={train: 40, val: 20, test: 20}"),
    *("--set", "model.dim=12", "--set", "runtime.progress=false"),
    *("--set", "evaluation={students: 2, epochs: 2, scores: 1}", "--pairs", "6"),
)
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """call(*words): exit code, stdout and stderr of the entry point, in this process."""

    def invoke(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mmdd", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return invoke


def test_the_command_in_a_process_of_its_own() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "mmdd", "run", "--set", "settings.rhoo=1"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == "mmdd: rhoo: Extra inputs are not permitted\n"


def test_help_names_the_commands() -> None:
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    for command in (
        "prepare",
        "run",
        "evaluate",
        "inspect",
        "export",
        "sweep",
        "experts",
        "doctor",
    ):
        assert command in result.output


def test_run_and_evaluate(call: Call, tmp_path: Path) -> None:
    code, out, _ = call(
        "run", "--method", "random", *SMALL, "--results", tmp_path, "--sweep", "mine"
    )
    assert code == 0
    record = next(iter(ResultsStore(tmp_path).records()))
    means = [s["test"]["mean"] for s in record["students"]]
    assert len(means) == 2
    assert f"mean recall {sum(means) / 2:.2f} ± {abs(means[0] - means[1]) / 2**0.5:.2f}" in out
    assert record["run_id"] in out
    assert "random on scenes, protocol both, 6 pairs" in out
    assert record["config"]["model"]["dim"] == 12
    code, again, _ = call("run", "--method", "random", *SMALL, "--results", tmp_path, "--json")
    assert code == 0
    assert json.loads(again) == record

    config = preset(
        "tiny",
        method="random",
        pairs=6,
        dataset={"train": 40, "val": 20, "test": 20},
        model={"dim": 12},
        evaluation={"students": 2, "epochs": 2, "scores": 1},
    )
    assert record["run_id"] == config.run_id
    file = set_path(tmp_path / "mine", config)
    code, out, _ = call("evaluate", file, "--preset", "tiny")
    assert code == 0
    lines = out.strip().splitlines()
    assert len(lines) == config.evaluation.students
    assert lines[0].startswith("student 0: mean ")


def test_run_distils(call: Call, tmp_path: Path) -> None:
    settings = "settings={iterations: 2, real_batch: 8}"
    code, out, _ = call(
        "run", *SMALL, "--protocol", "heads", "--seed", "4", "--set", settings,
        "--results", tmp_path,
    )  # fmt: skip
    assert code == 0
    assert "covmatch on scenes, protocol heads" in out
    record = next(iter(ResultsStore(tmp_path).records()))
    assert record["cost"]["iterations"] == 2
    assert record["config"]["seed"] == 4
    assert record["config"]["settings"]["real_batch"] == 8


def test_set_wins_over_options(call: Call, tmp_path: Path) -> None:
    code, out, _ = call(
        "run", "--method", "random", *SMALL, "--set", "pairs=3", "--set", "seed=9",
        "--results", tmp_path,
    )  # fmt: skip
    assert code == 0
    assert "3 pairs" in out
    assert next(iter(ResultsStore(tmp_path).records()))["config"]["seed"] == 9


def test_a_set_is_shown_and_taken_elsewhere(call: Call, tmp_path: Path) -> None:
    file = ROOT / "results" / "shown" / "scenes-covmatch-50.safetensors"
    picture = tmp_path / "set.png"
    code, output, _ = call("inspect", str(file), "--draw", str(picture))
    assert code == 0
    for fact in ("50 pairs", "covmatch", "image+text_head", "MIT", "identity"):
        assert fact in output
    assert picture.read_bytes()[:4] == b"\x89PNG"
    for form in ("folder", "dataset", "tensors"):
        code, output, _ = call("export", str(file), str(tmp_path / form), "--as", form)
        assert code == 0
        assert str(tmp_path / form) in output
        assert (tmp_path / form).exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["export", "missing.safetensors", "x"], "missing.safetensors does not exist"),
        (["run", "--method", "covmach"], f"method 'covmach' is unknown; known: {KNOWN}"),
        (["run", "--preset", "huge"], "unknown preset 'huge'"),
        (["run", "--pairs", "0"], "pairs: Input should be greater"),
        (["run", "--set", "evaluation.epoch=3", "--set", "pears=1"], "pears: Extra"),
        (["run", "--set", "dataset.reader=karpathy"], "set runtime.data to its folder"),
        (["run", "--set", "seed=1", "--set", "seed.x=3"], "'seed.x' cannot be set"),
        (["evaluate", "none.safetensors"], "none.safetensors does not exist"),
        (["sweep", "none.yaml"], "none.yaml is not a sweep file"),
        (["prepare", "imagenet"], "imagenet"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_deliberate_errors_are_one_line(
    call: Call, words: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*words)
    assert code == 2
    assert out == ""
    assert err.startswith("mmdd: ")
    assert named in err
    assert err.count("\n") == 1
    assert list(tmp_path.rglob("*.json")) == []


def test_an_option_that_is_no_assignment(call: Call) -> None:
    code, _, err = call("run", "--set", "nonsense")
    assert code == 2
    assert "'nonsense' is not of the form key=value" in err


def test_too_many_pairs(call: Call, tmp_path: Path) -> None:
    code, _, err = call("run", "--method", "random", *SMALL, "--set", "pairs=41",
                        "--results", tmp_path)  # fmt: skip
    assert code == 2
    assert "cannot choose 41 pairs" in err


def test_doctor(call: Call) -> None:
    code, out, _ = call("doctor")
    assert code == 0
    for word in ("torch", "GPU", "cache:", "tiny: ready", "photos:", "paper:"):
        assert word in out


@pytest.mark.notebook
@pytest.mark.slow
def test_sweep(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    results = tmp_path / "results"
    values: dict[str, Any] = {
        "preset": "tiny",
        "base": {
            "method": "random",
            "dataset": {"train": 40, "val": 20, "test": 20},
            "evaluation": {"students": 1, "epochs": 1, "scores": 1},
        },
    }

    def write(name: str, pairs: list[int]) -> Path:
        path = tmp_path / f"{name}.yaml"
        grid = [{"pairs": pairs}]
        path.write_text(yaml.safe_dump(values | {"sweep": name, "grid": grid}))
        return path

    both = write("one", [4, 41])
    code, out, err = call("sweep", both, "--jobs", "2", "--results", results)
    assert code == 1
    assert err.count("FAILED") == 1
    assert "cannot choose 41 pairs" in err
    assert f"packed into {results / 'one.jsonl'}" in out
    packed = (results / "one.jsonl").read_text()
    assert packed.count("\n") == 1
    # What is done is done, also in another sweep, where nothing is left to pack.
    done = [write(name, [4]) for name in ("one", "two")]
    code, out, _ = call("sweep", *done, "--results", results)
    assert (code, out) == (0, "")
    assert (results / "one.jsonl").read_text() == packed
    assert not (results / "two.jsonl").exists()
    # Grids after one another; a mistake in the second is told before the first runs.
    missing = write("three", [5])
    code, _, err = call("sweep", missing, tmp_path / "no.yaml", "--results", results)
    assert code == 2
    assert "no.yaml is not a sweep file" in err
    assert not (results / "three.jsonl").exists()
    code, out, _ = call("sweep", *done, missing, "--results", results)
    assert (code, out) == (0, f"packed into {results / 'three.jsonl'}\n")


def test_experts(call: Call, tmp_path: Path) -> None:
    words = [w for w in SMALL if w not in ("--pairs", "6")]
    words = words[: words.index("evaluation={students: 2, epochs: 2, scores: 1}") - 1]
    settings = "settings.experts={count: 2, epochs: 1, snapshot_every: 1}"
    where = f"runtime.experts={tmp_path}"
    code, out, _ = call("experts", *words, "--set", "pairs=6", "--set", settings, "--set", where)
    assert code == 0
    assert "2 experts, 2 snapshots each" in out
    assert len(list(tmp_path.rglob("snapshot-*.safetensors"))) == 4
    code, _, err = call("experts", "--method", "covmatch", *words)
    assert (code, err) == (2, "mmdd: method 'covmatch' uses no experts.\n")
