"""Files that must agree with each other do: metadata, lock, make targets, CI, README, licences."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import mmdd
from mmdd.distill import METHODS
from mmdd.selection import SELECTORS
from tools.check_book import problems, toc_entries
from tools.draw_architecture import PICTURE, STAGES, imported, imports_between_stages, svg
from tools.lock import portable

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
LOCK = (ROOT / "requirements.lock").read_text()
PYTHON = (ROOT / ".python-version").read_text().strip()

# Tracked files above the limit: pattern -> (bytes allowed, why it is worth its size).
SIZE_LIMIT = 1_000_000
MAY_BE_LARGE = {
    "data/pretrained/*.safetensors": (3_000_000, "weights that spare every reader the pretraining"),
    "results/budgets.jsonl": (1_700_000, "200 runs with the losses of 200 iterations each"),
    "results/tune-equal.jsonl": (1_300_000, "123 runs with the losses of 200 iterations each"),
}


def output(*command: str, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """What a command prints; the test fails with its error output when it fails."""
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


@cache
def tracked() -> tuple[str, ...]:
    listing = output("git", "ls-files", "-z")
    names = [name for name in listing.split("\0") if name and (ROOT / name).is_file()]
    assert names, "git names no file: run the tests in a clone"
    return tuple(names)


@cache
def pins() -> dict[str, Version]:
    found = {}
    for line in LOCK.splitlines():
        requirement = line.split("#")[0].strip()
        if requirement:
            name, version = requirement.split("==")
            assert name not in found, f"{name} is pinned twice"
            found[canonicalize_name(name)] = Version(version)
    return found


def direct_requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(text) for group in groups for text in group]


# --- versions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("requirement", direct_requirements(), ids=lambda r: r.name)
def test_every_direct_dependency_is_pinned_inside_its_range(requirement):
    pin = pins().get(canonicalize_name(requirement.name))
    assert pin is not None, f"{requirement.name} is not in requirements.lock: run `make lock`"
    assert requirement.specifier.contains(pin, prereleases=True), f"{requirement} excludes {pin}"


def test_the_lock_holds_for_any_machine():
    for line in LOCK.splitlines():
        assert re.fullmatch(r"(#.*)?|[a-z0-9][a-z0-9.-]*==[0-9][0-9a-z.]*( +# via .*)?", line), line
    foreign = [name for name in pins() if re.match(r"nvidia-|cuda-|triton$", name)]
    assert not foreign, "the CUDA wheel of torch pins these itself"
    assert pins()["torch"].local is None


def test_the_lock_tool_removes_what_holds_for_one_machine_only():
    compiled = (
        "--find-links /some/folder\n"
        "numpy==2.0.0               # via torch\n"
        "nvidia-cublas==13.0.0      # via torch\n"
        "torch==2.13.0+cpu          # via mmdd (pyproject.toml)\n"
        "triton==3.5.0              # via torch\n"
    )
    assert portable(compiled) == (
        "numpy==2.0.0               # via torch\n"
        "torch==2.13.0          # via mmdd (pyproject.toml)\n"
    )


def test_python_is_the_same_everywhere():
    assert f"CPython {PYTHON}" in LOCK.splitlines()[0]
    assert PYTHON in SpecifierSet(PYPROJECT["project"]["requires-python"])
    assert f"command -v python{PYTHON}" in MAKEFILE
    assert PYPROJECT["tool"]["mypy"]["python_version"] == PYTHON
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + PYTHON.replace(".", "")


def test_conda_users_get_the_locked_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (from_pip,) = [
        entry["pip"] for entry in environment["dependencies"] if not isinstance(entry, str)
    ]
    assert conda == [f"python={PYTHON}", "pip"], "every other version comes from the lock"
    assert from_pip == ["-r requirements.lock"]
    assert "pip install -r requirements.lock" not in MAKEFILE.replace("-m pip install", "")
    assert "-r requirements.lock" in MAKEFILE


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == mmdd.__version__
    assert PYPROJECT["project"]["dynamic"] == ["version"]


# --- make, CI, README -------------------------------------------------------------------------


def rule_names() -> list[str]:
    return re.findall(r"^([a-z]+):", MAKEFILE, flags=re.MULTILINE)


def test_every_target_is_phony_and_explained():
    assert {"book", "test", "lint", "lock", "sweep", "bench", "lab", "clean", "help"} <= set(
        rule_names()
    )
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)
    assert phony is not None
    assert sorted(phony[1].split()) == sorted(rule_names())
    shown = output("make", "-s")
    for name in rule_names():
        assert re.search(rf"^  make {name} +\S", shown, flags=re.MULTILINE), name


@pytest.mark.parametrize(
    "target", [name for name in rule_names() if name not in ("help", "lock", "clean")]
)
def test_each_target_installs_first_on_a_fresh_clone(target, tmp_path):
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    planned = output("make", "--dry-run", target, cwd=tmp_path).splitlines()
    # Each recipe line that calls the environment, but for those that only make it. The interpreter
    # that makes it may itself stand in some .venv/bin: an absolute path, so it does not count.
    steps = [line for line in planned if re.search(r"(^|[ ;])\.venv/bin/", line)]
    steps = [line for line in steps if "-m venv" not in line]
    assert "pip install" in steps[0]
    assert "-r requirements.lock" in steps[0]
    assert "--no-deps" in steps[1]
    assert len(steps) >= 3, "nothing happens after the installation"


def test_the_book_is_built_with_warnings_as_errors_and_checked():
    recipe = MAKEFILE.split("\nbook:")[1].split("\n\n")[0]
    build = next(line for line in recipe.splitlines() if "jupyter-book build" in line)
    assert {"-n", "-W", "--keep-going"} <= set(build.split())
    assert not build.lstrip().startswith("-"), "a leading dash would ignore the failure"
    assert "tools/check_book.py" in recipe
    assert "|| true" not in MAKEFILE
    assert ".SHELLFLAGS := -eo pipefail -c" in MAKEFILE


def test_cleaning_leaves_results_and_the_environment():
    recipe = MAKEFILE.split("\nclean:")[1]
    assert "results" not in recipe.split("##")[1].split("\n", 1)[1]
    assert "rm -rf .venv" not in recipe
    assert "-path ./$(VENV) -prune" in recipe


def test_ci_runs_the_commands_of_the_readme():
    script = ROOT / ".ci" / "run"
    text = script.read_text()
    assert script.stat().st_mode & 0o100, ".ci/run must be executable"
    assert "set -euo pipefail" in text
    output("bash", "-n", str(script))
    commands = [line for line in text.splitlines() if line.startswith("make ")]
    assert commands == ["make lint", "make book", "make test"], "the tests look at the book"
    readme = (ROOT / "README.md").read_text()
    for command in ("make test", "make book"):
        assert command in readme, f"README.md does not name `{command}`"


def test_the_book_check_finds_what_is_missing(tmp_path):
    toc = {
        "format": "jb-book",
        "root": "book/intro",
        "parts": [{"caption": "A", "chapters": [{"file": "notebooks/00_start.ipynb"}]}],
    }
    assert list(toc_entries(toc)) == ["book/intro", "notebooks/00_start"]
    assert problems({"format": "jb-book"}, tmp_path) == ["_toc.yml names no page"]
    assert len(problems(toc, tmp_path / "never_built")) == 4
    for page in ("index", "book/intro"):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / f"{page}.html").write_text("<html></html>")
    (found,) = problems(toc, tmp_path)
    assert "notebooks/00_start" in found
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "00_start.html").write_text("<html></html>")
    assert problems(toc, tmp_path) == []


def test_the_pre_commit_configuration_is_valid():
    output(sys.executable, "-m", "pre_commit", "validate-config", ".pre-commit-config.yaml")


def test_the_citation_has_what_the_format_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == PYPROJECT["project"]["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= set(reference)


# --- what the pages say of the files ------------------------------------------------------------


def test_every_file_of_data_has_a_licence():
    page = (ROOT / "book" / "data_and_licences.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(data/[^`]+)` \| ([^|]+) \| ([^|]+) \|", page, flags=re.MULTILINE)
    listed = [file for file, _, _ in rows]
    assert len(set(listed)) == len(listed)
    assert sorted(listed) == sorted(name for name in tracked() if name.startswith("data/"))
    assert {licence.strip() for _, _, licence in rows} == {"MIT", "BSD-2-Clause"}
    others = {file for file, holder, _ in rows if holder.strip() != "the project"}
    notice = (ROOT / "data/pretrained/LICENSE.cifar_resnet20").read_text(encoding="utf-8")
    assert "Yerlan Idelbayev" in notice
    assert others == {n for n in tracked() if n.startswith("data/") and "cifar_resnet20" in n}


def test_every_method_and_selection_is_in_the_list_of_names():
    page = (ROOT / "book" / "notation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]+) \|", page, flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert {*METHODS, *SELECTORS} <= named


def test_the_picture_of_the_architecture_is_the_codes():
    counts = imports_between_stages()
    assert PICTURE.read_text(encoding="utf-8") == svg(counts), "python tools/draw_architecture.py"
    order = list(STAGES)
    backwards = {pair for pair in counts if order.index(pair[0]) > order.index(pair[1])}
    assert backwards == {("Readers of records", "Runs")}, "the page names the exceptions"


def test_the_search_for_imports_finds_those_that_run():
    source = """
import mmdd.losses
from mmdd import plots
from mmdd.data.pairs import PairDataset
if TYPE_CHECKING:
    from mmdd.config import RunConfig
def f():
    from mmdd.runs import run
import torch
"""
    assert imported(source) == {"losses", "plots", "data", "runs"}


def test_a_module_without_a_stage_is_named(tmp_path):
    (tmp_path / "novelty.py").write_text("")
    with pytest.raises(SystemExit, match=r"without a stage \['novelty'\]"):
        imports_between_stages(tmp_path)


def test_issue_forms_are_what_the_host_reads():
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    forms = [path for path in folder.glob("*.yml") if path.name != "config.yml"]
    assert len(forms) == 3
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= set(form), path.name
        ids = [field["id"] for field in form["body"]]
        assert len(set(ids)) == len(ids)
        for field in form["body"]:
            assert field["type"] in {"input", "textarea", "checkboxes", "dropdown"}
            assert field["attributes"]["label"]


def test_the_changelog_knows_the_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (Unreleased|\d+\.\d+\.\d+)", text, flags=re.MULTILINE)
    assert versions[0] == "Unreleased" or versions[0] == mmdd.__version__


# --- what is tracked --------------------------------------------------------------------------


def test_no_tracked_file_is_large_without_a_reason():
    for name in tracked():
        allowed = [limit for pattern, (limit, _) in MAY_BE_LARGE.items() if fnmatch(name, pattern)]
        size = (ROOT / name).stat().st_size
        assert size <= max([SIZE_LIMIT, *allowed]), f"{name} has {size} bytes"


def test_no_tracked_file_names_a_place_on_somebodys_machine():
    places = [re.escape(f"{ROOT}/")] if ROOT.parent != ROOT else []
    home = Path.home()
    if len(home.parts) > 1:
        places.append(re.escape(f"{home}/"))
    places += [r"/(?:home|Users)/[A-Za-z]", r"[A-Z]:\\Users\\"]
    pattern = re.compile(rf"(?<![\w.:/-])(?:{'|'.join(places)})")
    found = []
    for name in tracked():
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{name}: {hit[0]}" for hit in pattern.finditer(text)]
    assert not found


# --- the package ---------------------------------------------------------------------------------


def test_a_built_wheel_carries_the_shipped_data(tmp_path):
    output(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    unpacked = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(unpacked)
    shipped = [n for n in tracked() if n.startswith(("data/pretrained/", "data/published/"))]
    assert "data/published/retrieval.csv" in shipped
    assert {f"mmdd/_{name}" for name in shipped} <= names
    assert {name.split("/")[0] for name in names} == {
        "mmdd",
        f"mmdd-{mmdd.__version__}.dist-info",
    }, "nothing but the package is installed"
    code = (
        "from mmdd.published import published\n"
        "from mmdd.paths import data_file\n"
        "print(len(published()), data_file('published/retrieval.csv'))"
    )
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    out = output(sys.executable, "-c", code, cwd=tmp_path, env=environment)
    rows, path = out.split(maxsplit=1)
    assert rows == "156"
    assert Path(path.strip()) == unpacked / "mmdd" / "_data" / "published" / "retrieval.csv"


# --- the tests themselves ---------------------------------------------------------------------


def test_tests_cannot_leave_the_machine():
    with pytest.raises(RuntimeError, match="local servers only"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)  # an address reserved for examples
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
