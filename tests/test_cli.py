"""The command line: what it prints, where it writes, and exit codes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

from mmdd import __main__ as cli
from mmdd.distill import METHODS
from mmdd.files import file_sha256
from mmdd.presets import preset
from mmdd.protocols import PROTOCOLS
from mmdd.runs import set_path
from mmdd.selection import SELECTORS
from mmdd.sets import config_for
from mmdd.store import ResultsStore
from mmdd.synthetic import FORMAT, VERSION, SyntheticPairs

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
    assert ended.stderr == (
        "mmdd: settings.rhoo: Extra inputs are not permitted; did you mean 'rho'?\n"
    )


COMMANDS = {
    command.name or command.callback.__name__: command for command in cli.app.registered_commands
}


def test_help_names_the_commands_in_groups() -> None:
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    assert set(COMMANDS) == {
        *("prepare", "doctor", "run", "sweep", "experts"),
        *("evaluate", "inspect", "export", "list", "results"),
    }
    for word in [*COMMANDS, cli.MAKE, cli.LOOK, cli.SET_UP, "Exit codes", "--install-completion"]:
        assert word in result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_a_person_can_follow_the_help_of_a_command(name: str) -> None:
    result = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    command = typer.main.get_command(cli.app).commands[name]
    assert result.output.count("Examples:") == 1
    assert command.help.splitlines()[0].endswith((".", ":")), "one line of what it does"
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{name}: {parameter.name} is not explained"
    # What the examples say is what there is.
    examples = [line.split() for line in COMMANDS[name].epilog.splitlines() if "  mmdd " in line]
    assert examples
    known = {option for parameter in command.params for option in parameter.opts}
    for _, called, *words in examples:
        assert called == name
        assert {word for word in words if word.startswith("--")} <= known


def test_a_misspelt_command_is_guessed(call: Call) -> None:
    code, _, err = call("evalute", "set.safetensors")
    assert code == 2
    assert "No such command 'evalute'" in err
    assert "Did you mean 'evaluate'?" in err


def test_completion_knows_commands_and_options() -> None:
    def complete(words: str) -> list[str]:
        ended = subprocess.run(
            [sys.executable, "-m", "mmdd"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ
            | {"_MMDD_COMPLETE": "complete_bash", "COMP_WORDS": words}
            | {"COMP_CWORD": str(words.count(" "))},
        )
        return ended.stdout.split()

    assert sorted(complete("mmdd e")) == ["evaluate", "experts", "export"]
    assert complete("mmdd export SET out --as ") == ["folder", "dataset", "tensors"]
    assert "--protocol" in complete("mmdd evaluate --pro")
    assert complete("mmdd run --method cov") == [
        "covmatch",
        "cov-trajectory",
        "cov-similarity",
        "cov-blend",
    ]
    assert complete("mmdd run --method k-c") == ["k-center"]
    assert complete("mmdd evaluate SET --protocol ") == list(PROTOCOLS)
    assert complete("mmdd run --preset ") == ["tiny", "small", "photos", "gpu", "paper"]
    assert complete("mmdd prepare fl") == ["flickr8k", "flickr30k"]
    assert complete("mmdd results --sweep photos-m") == ["photos-mdm"]


def test_completion_installs_itself(tmp_path: Path) -> None:
    ended = subprocess.run(
        ["bash", "-c", '"$0" -m mmdd --install-completion; exit $?', sys.executable],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"HOME": str(tmp_path)},
    )
    assert ended.returncode == 0, ended.stderr
    assert "bash completion installed" in ended.stdout
    (script,) = (tmp_path / ".bash_completions").iterdir()
    assert "_MMDD_COMPLETE=complete_bash" in script.read_text()
    assert str(script) in (tmp_path / ".bashrc").read_text()


def test_an_interrupted_run_exits_130_and_goes_on(tmp_path: Path) -> None:
    """A real SIGINT in the middle of a distillation; the same command then ends."""
    command = [
        *(sys.executable, "-m", "mmdd", "run", *SMALL, "--protocol", "heads"),
        *("--set", "settings={iterations: 400, real_batch: 8}"),
        *("--set", "runtime.checkpoint_every=5", "--results", str(tmp_path)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    checkpoints = tmp_path / "default" / "checkpoints"
    while not list(checkpoints.glob("*.safetensors")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err == "mmdd: interrupted; the same command goes on from what is done.\n"
    assert list(ResultsStore(tmp_path).records()) == []
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    (record,) = ResultsStore(tmp_path).records()
    assert record["cost"]["iterations"] == 400


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
    code, out, err = call("evaluate", file, "--preset", "tiny", "--set", "runtime.progress=false")
    assert code == 0
    lines = out.strip().splitlines()
    assert len(lines) == 2 + 1
    assert lines[0].startswith("student 0: mean ")
    assert lines[-1].startswith("6 pairs on scenes, protocol both, scenes-tiny: mean recall ")
    assert "made from other data" in err  # more scenes than the set was made from


def test_evaluate_in_one_line(call: Call, tmp_path: Path) -> None:
    """What is not asked for comes from the file; what a script reads is JSON and complete."""
    file = ROOT / "results" / "shown" / "scenes-repblend-49.safetensors"
    quick = ("--set", "evaluation={students: 2, epochs: 2, scores: 1}")
    code, out, err = call("evaluate", file, "--json", *quick, "--set", "runtime.progress=false")
    assert (code, err) == (0, "")
    scored = json.loads(out)
    assert scored["protocol"] == "image+text_head"
    assert scored["dataset"]["made_from_it"]
    assert scored["sha256"] == file_sha256(file)
    means = [student["test"]["mean"] for student in scored["students"]]
    assert len(means) == 2
    assert scored["mean"] == pytest.approx(sum(means) / 2)
    assert scored["std"] == pytest.approx(abs(means[0] - means[1]) / 2**0.5)
    code, out, _ = call(
        "evaluate", file, "--dataset", "scenes", "--protocol", "heads", *quick, "--json",
        "--set", "runtime.progress=false", "--set", "dataset={train: 40, val: 20, test: 20}",
    )  # fmt: skip
    other = json.loads(out)
    assert (code, other["protocol"]) == (0, "heads")
    assert not other["dataset"]["made_from_it"]
    assert other["chance"] > scored["chance"]  # fewer to be mistaken for
    # Photos are asked for by name, and are not there.
    code, out, err = call("evaluate", file, "--dataset", "flickr8k")
    assert (code, out) == (2, "")
    assert "dataset 'flickr8k' is read from disk" in err


@pytest.mark.parametrize(
    ("texts", "metadata", "dataset", "expected"),
    [
        ((3, 64), {}, None, ("image+text_head", "scenes", "scenes", "scenes-tiny")),
        ((3, 5, 64), {}, None, ("both", "scenes", "scenes", "scenes-tiny")),
        ((3, 64), {"protocol": "heads", "dataset": "scenes"}, None,
         ("heads", "scenes", "scenes", "scenes-tiny")),
        ((3, 64), {"dataset": "flickr8k-991"}, None,
         ("image+text_head", "flickr8k-991", "karpathy", "cifar-minilm")),
        ((3, 64), {"dataset": "flickr8k-991"}, "scenes",
         ("image+text_head", "scenes", "scenes", "scenes-tiny")),
        ((3, 64), {}, "coco", ("image+text_head", "coco", "karpathy", "cifar-minilm")),
    ],
)  # fmt: skip
def test_what_a_set_is_scored_on(texts, metadata, dataset, expected) -> None:
    pairs = SyntheticPairs(torch.zeros(3, 3, 8, 8), torch.zeros(texts), metadata=metadata)
    config = config_for(pairs, dataset)
    found = (config.protocol, config.dataset.name, config.dataset.reader, config.model.pair)
    assert found == expected


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
    for fact in ("mmdd.SyntheticPairs", "covmatch", "image+text_head", "MIT", "identity"):
        assert fact in output
    assert re.search(r"^images +3 × 32 × 32$", output, re.MULTILINE)
    assert re.search(r"^size +627 kB$", output, re.MULTILINE)
    assert re.search(r"^beyond black and white +\d\.\d % of pixel values$", output, re.MULTILINE)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    for form in ("folder", "dataset", "tensors"):
        code, output, _ = call("export", str(file), str(tmp_path / form), "--as", form)
        assert code == 0
        assert str(tmp_path / form) in output
        assert (tmp_path / form).exists()
    code, _, err = call("export", str(file), str(tmp_path / "x"), "--as", "parquet")
    assert code == 2
    assert "parquet" in err


@pytest.mark.parametrize("words", [("sweep", "x.yaml"), ("experts", "--method", "mtt")])
def test_no_processes_at_all_are_refused(call: Call, words: tuple[str, ...]) -> None:
    code, _, err = call(*words, "--jobs", "0")
    assert code == 2
    assert "--jobs" in err


@pytest.mark.parametrize("value", ["[", "{a: 1", "a: b: c", "@", "\x01"])
def test_a_value_that_is_no_yaml_is_refused_by_name(call: Call, value: str) -> None:
    code, _, err = call("run", "--method", "random", "--set", f"pairs={value}")
    assert code == 2
    assert "the value is no YAML" in err


def test_a_set_is_not_written_over_by_what_is_made_of_it(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "set.safetensors"
    shutil.copyfile(ROOT / "results" / "shown" / "scenes-covmatch-50.safetensors", file)
    before = file.read_bytes()
    code, _, err = call("export", file, file, "--as", "tensors")
    assert (code, "exists: choose another name" in err) == (2, True)
    code, _, err = call("inspect", file, "--draw", file)
    assert code == 2
    assert err == f"mmdd: --draw {file}: name a PNG file, such as {file.with_suffix('.png')}.\n"
    assert file.read_bytes() == before


def test_inspect_for_scripts(call: Call) -> None:
    file = ROOT / "results" / "shown" / "scenes-lors-49.safetensors"
    code, out, _ = call("inspect", str(file), "--json")
    assert code == 0
    about, pairs = json.loads(out), SyntheticPairs.load(file)
    assert (about["format"], about["version"]) == (FORMAT, VERSION)
    assert about["pairs"] == len(pairs) == 49
    assert about["images"] == [3, 32, 32]
    assert about["similarity"] == {"kind": "low_rank", "rank": 10, "alpha": 3.0}
    assert about["learning_rates"] == pairs.learning_rates
    assert about["num_bytes"] == pairs.num_bytes()
    assert about["metadata"] == pairs.metadata
    assert re.fullmatch("[0-9a-f]{64}", about["sha256"])


def test_lists(call: Call) -> None:
    code, out, _ = call("list", "--json")
    assert code == 0
    names = json.loads(out)
    assert names["methods"] == [*METHODS, "full"]
    assert names["selections"] == list(SELECTORS)
    assert names["protocols"] == list(PROTOCOLS)
    code, out, _ = call("list", "presets")
    assert (code, out) == (0, "presets     tiny, small, photos, gpu, paper\n")
    assert call("list", "colours")[0] == 2


def test_results(call: Call, tmp_path: Path) -> None:
    record = next(
        r for r in ResultsStore(ROOT / "results").records()
        if (r["config"]["method"], r["config"].get("pairs")) == ("covmatch", 50)
    )  # fmt: skip
    ResultsStore(tmp_path).write(record)
    means = [s["test"]["mean"] for s in record["students"]]
    code, out, _ = call("results", tmp_path, "--method", "covmatch", "--json")
    assert code == 0
    (row,) = json.loads(out)
    assert (row["run_id"], row["students"]) == (record["run_id"], len(means))
    assert row["mean"] == pytest.approx(sum(means) / len(means))
    assert f"{row['mean']:.2f}" in call("results", tmp_path)[1]
    code, out, err = call("results", tmp_path, "--pairs", "3")
    assert (code, out, err) == (0, "", "no record fits\n")
    # A method without a record is none that is misspelt.
    assert call("results", tmp_path, "--method", "lors") == (0, "", "no record fits\n")
    for option, wrong, near in (
        ("--method", "covmach", "covmatch"),
        ("--protocol", "head", "heads"),
        ("--dataset", record["dataset"]["name"] + "x", record["dataset"]["name"]),
        ("--sweep", record["sweep"] + "x", record["sweep"]),
    ):
        code, out, err = call("results", tmp_path, option, wrong)
        assert (code, out) == (2, "")
        assert f"{wrong!r} is unknown; known: " in err
        assert err.endswith(f"did you mean {near!r}?\n")
    assert call("results", tmp_path / "none")[0] == 2


@pytest.mark.parametrize(
    ("code", "words", "named"),
    [
        (1, ["export", "missing.safetensors", "x"], "missing.safetensors does not exist"),
        (1, ["evaluate", "none.safetensors"], "none.safetensors does not exist"),
        (1, ["inspect", "none.safetensors"], "none.safetensors does not exist"),
        (2, ["prepare", "imagenet"], "source 'imagenet' is unknown; known: flickr8k,"),
        (2, ["prepare", "flickr8kk"], "did you mean 'flickr8k'?"),
        (2, ["run", "--set", "dataset.name=sceens"], "dataset.name: dataset 'sceens' is none"),
        (2, ["run", "--method", "covmach"], f"method 'covmach' is unknown; known: {KNOWN}"),
        (2, ["run", "--preset", "huge"], "unknown preset 'huge'; known: tiny,"),
        (2, ["run", "--preset", "smal"], "did you mean 'small'?"),
        (2, ["run", "--pairs", "0"], "pairs: Input should be greater"),
        (2, ["run", "--set", "evaluation.epoch=3", "--set", "pears=1"], "pears: Extra"),
        (2, ["run", "--set", "dataset.reader=karpathy"], "set runtime.data to its folder"),
        (2, ["run", "--set", "seed=1", "--set", "seed.x=3"], "'seed.x' cannot be set"),
        (2, ["sweep", "none.yaml"], "none.yaml is not a sweep file: it does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_deliberate_errors_are_one_line(
    call: Call,
    code: int,
    words: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    found, out, err = call(*words)
    assert found == code
    assert out == ""
    assert err.startswith("mmdd: ")
    assert named in err
    assert err.count("\n") == 1
    assert list(tmp_path.rglob("*.json")) == []


def test_places_that_cannot_be_are_told(call: Call, tmp_path: Path) -> None:
    file = ROOT / "results" / "shown" / "scenes-covmatch-50.safetensors"
    code, _, err = call("evaluate", file, "--dataset", "sceens")
    assert code == 2
    assert "name its folder with --data" in err
    assert err.endswith("; did you mean 'scenes'?\n")
    picture = tmp_path / "none" / "x.png"
    code, _, err = call("inspect", file, "--draw", picture)
    assert (code, f"there is no folder {picture.parent}" in err) == (2, True)
    for command in ("inspect", "evaluate"):
        code, _, err = call(command, tmp_path)
        assert code == 2
        assert "directory" in err
    occupied = tmp_path / "file"
    occupied.write_text("no folder")
    code, _, err = call("run", "--method", "random", "--results", occupied)
    assert code == 2
    assert "'--results'" in err
    # What a test split cannot be made of is told before the set is written.
    photos = SyntheticPairs.load(file)
    photos.metadata["dataset"] = "flickr8k-991"
    photos.save(tmp_path / "photos.safetensors")
    out = tmp_path / "out.safetensors"
    code, _, err = call(
        "export", tmp_path / "photos.safetensors", out, "--as", "tensors",
        "--test", tmp_path / "test.safetensors",
    )  # fmt: skip
    assert (code, "name its folder with --data" in err) == (2, True)
    assert not out.exists()


def test_a_misspelt_grid_is_guessed(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    code, _, err = call("sweep", "sweeps/buget.yaml")
    assert code == 2
    assert err == (
        "mmdd: sweeps/buget.yaml is not a sweep file: it does not exist; did you mean "
        "'sweeps/budgets.yaml'?\n"
    )


def test_a_place_that_cannot_be_written_to_is_named(call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    file = ROOT / "results" / "shown" / "scenes-covmatch-50.safetensors"
    code, _, err = call("export", file, tmp_path / "file" / "out.safetensors", "--as", "tensors")
    assert code == 1
    assert err.startswith("mmdd: ")
    assert str(tmp_path / "file") in err
    assert "[Errno" not in err
    assert err.count("\n") == 1


def test_a_defect_is_not_hidden(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise KeyError("a defect")

    monkeypatch.setattr("mmdd.doctor.examine", broken)
    with pytest.raises(KeyError, match="a defect"):
        call("doctor")


def test_an_option_that_is_no_assignment(call: Call) -> None:
    code, _, err = call("run", "--set", "nonsense")
    assert code == 2
    assert "'nonsense' is not of the form key=value" in err


def test_too_many_pairs(call: Call, tmp_path: Path) -> None:
    code, _, err = call("run", "--method", "random", *SMALL, "--set", "pairs=41",
                        "--results", tmp_path)  # fmt: skip
    assert code == 2
    assert "cannot choose 41 pairs" in err


@pytest.mark.notebook
@pytest.mark.slow
def test_sweep(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    results = tmp_path / "results"
    values: dict[str, Any] = {
        "preset": "tiny",
        "base": {
            "method": "covmatch",
            "settings": {"iterations": 1, "real_batch": 8},
            "dataset": {"train": 40, "val": 20, "test": 20},
            "evaluation": {"students": 1, "epochs": 1, "scores": 1},
        },
    }

    def write(name: str, pairs: list[int]) -> Path:
        path = tmp_path / f"{name}.yaml"
        grid = [{"pairs": pairs}]
        path.write_text(yaml.safe_dump(values | {"sweep": name, "grid": grid}))
        return path

    both = write("one", [4, 1])  # one pair has no covariance
    code, out, err = call("sweep", both, "--jobs", "2", "--results", results)
    assert code == 1
    assert err.count("FAILED") == 1
    assert "covmatch needs at least two synthetic" in err
    assert f"packed into {results / 'one.jsonl'}" in out
    packed = (results / "one.jsonl").read_text()
    assert packed.count("\n") == 2  # how many there are, and the one
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
