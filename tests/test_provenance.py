"""The hash of the code that decides results, and what a record says of its machine."""

import getpass
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmdd
from mmdd import provenance
from mmdd.provenance import environment, resolve_device, source_hash

PACKAGE = Path(mmdd.__file__).parent


@pytest.fixture
def copy_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "mmdd"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__", "_data"))
    monkeypatch.setattr(provenance, "_PACKAGE", folder)
    return folder


COVMATCH = "mmdd.distill.covmatch"


def fresh(*plugins: str) -> str:
    return source_hash.__wrapped__(*plugins)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_the_hash_is_that_of_the_files(copy_of_the_package: Path) -> None:
    assert fresh() == source_hash()
    assert len(source_hash()) == 12
    int(source_hash(), 16)


def test_words_for_readers_do_not_count(copy_of_the_package: Path) -> None:
    path = copy_of_the_package / "losses.py"
    path.write_text('"""Something else."""\n' + path.read_text().split('"""', 2)[2])
    edit(path, "def info_nce", "# a comment\n\n\ndef info_nce")
    edit(path, '"""InfoNCE, the mean of', '"""The mean of')
    edit(copy_of_the_package / "plots.py", "0.15", "0.25")
    edit(copy_of_the_package / "results.py", "ddof=1", "ddof=0")
    edit(copy_of_the_package / "data/download.py", "import", "import os\nimport")
    assert fresh() == source_hash()


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("losses.py", "0.07", "0.08"),
        ("losses.py", "return 0.5 * (", "return 1.0 * ("),
        ("distill/loop.py", "method.optimizer.step()", "pass"),
        ("evaluation.py", "gamma=0.1", "gamma=0.2"),
        ("data/scenes.py", '"red": (0.86', '"red": (0.87'),
        ("data/captions.py", '"small", "little", "tiny"', '"small", "tiny"'),
        ("encoders/dual.py", "p_image = self.image_head(", "p_image = 2 * self.image_head("),
    ],
)
def test_whatever_decides_a_result_counts(
    copy_of_the_package: Path, file: str, old: str, new: str
) -> None:
    edit(copy_of_the_package / file, old, new)
    assert fresh() != source_hash()


def test_a_method_counts_for_its_own_runs_alone(copy_of_the_package: Path) -> None:
    before = fresh(COVMATCH)
    assert before == source_hash(COVMATCH) != source_hash()
    edit(copy_of_the_package / "distill/covmatch.py", "config.lambda_ * means", "means")
    assert fresh() == source_hash()
    assert fresh(COVMATCH) != before


def test_what_a_method_imports_counts(copy_of_the_package: Path) -> None:
    edit(copy_of_the_package / "distill/learnable.py", "images * self.std", "images")
    assert fresh() == source_hash()
    assert fresh(COVMATCH) != source_hash(COVMATCH)


def test_an_entry_in_a_registry_changes_no_result(copy_of_the_package: Path) -> None:
    (copy_of_the_package / "distill/other.py").write_text("VALUE = 1\n")
    path = copy_of_the_package / "distill/__init__.py"
    selection = copy_of_the_package / "selection/__init__.py"
    loop = "from mmdd.distill.loop"
    edit(path, loop, f"from mmdd.distill.other import VALUE\n{loop}")
    edit(path, "[str, Method] = {", "[str, Method] = {\n    'other': VALUE,")
    edit(path, "__all__ = [", '__all__ = [\n    "VALUE",')
    edit(selection, '    "random"', '    "other": None,\n    "random"')
    assert fresh() == source_hash()
    assert fresh(COVMATCH) == source_hash(COVMATCH)
    edit(selection, "[seed, 17]", "[seed, 18]")
    assert fresh() != source_hash()


def test_everything_that_a_run_loads_is_hashed() -> None:
    """Against the interpreter's own account of what a run imports."""
    code = "import sys, mmdd.runs; print(*[m for m in sys.modules if m.split('.')[0] == 'mmdd'])"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True)
    every = [f"mmdd.distill.{p.stem}" for p in (PACKAGE / "distill").glob("*.py")]
    every += [f"mmdd.selection.{p.stem}" for p in (PACKAGE / "selection").glob("*.py")]
    hashed = set(provenance._imported(["mmdd.runs", *every]))
    names = {provenance._file(module, PACKAGE) for module in loaded.stdout.split()} - {None}
    assert "losses.py" in names
    assert names - provenance._WITHOUT_EFFECT <= hashed


def test_entries_count_by_what_they_say(copy_of_the_package: Path) -> None:
    """A new encoder pair changes no other run, but a run on a changed pair is another run."""
    edit(copy_of_the_package / "encoders/pairs.py", "dim=128,", "dim=129,")
    assert fresh() == source_hash()
    assert source_hash(entries=("a",)) != source_hash(entries=("b",)) != source_hash()


def test_names_of_files_count(copy_of_the_package: Path) -> None:
    (copy_of_the_package / "similarity.py").rename(copy_of_the_package / "likeness.py")
    edit(copy_of_the_package / "synthetic.py", "mmdd.similarity", "mmdd.likeness")
    assert fresh() != source_hash()
    edit(copy_of_the_package / "synthetic.py", "mmdd.likeness", "mmdd.similarity")
    (copy_of_the_package / "likeness.py").rename(copy_of_the_package / "similarity.py")
    assert fresh() == source_hash()


def test_the_modules_without_effect_exist() -> None:
    for name in provenance._WITHOUT_EFFECT:
        assert (PACKAGE / name).is_file(), name


# Quotes inside f-strings, type parameters and empty lists are where Python's versions differ.
SAMPLE = '''"""A module."""
def f(x, *, y=None):
    """Text."""
    return f"{x!r} {', '.join(y or [])} it's {x:>{y}.2f}" "more" f'{x["a"]}'
class A: ...
async def g(): return [i async for i in h() if i]
'''


def test_the_hash_is_the_same_in_every_python(tmp_path: Path) -> None:
    """Against a literal, so that a run of the tests under another Python shows a difference."""
    import ast
    import hashlib

    plain = repr(provenance._plain(ast.parse(SAMPLE)))
    assert hashlib.sha256(plain.encode()).hexdigest()[:12] == "48d43535f6f1"


def test_a_run_names_the_code_that_it_loaded(copy_of_the_package: Path) -> None:
    """Files that change while a process runs do not change what it calls itself."""
    before = source_hash()
    edit(copy_of_the_package / "losses.py", "0.07", "0.08")
    assert source_hash() == before != fresh()


def test_environment() -> None:
    found = environment(torch.device("cpu"), "0123456789ab")
    assert found["mmdd"] == mmdd.__version__
    assert found["source_hash"] == "0123456789ab"
    assert found["torch"] == torch.__version__
    assert found["device"] == "cpu"
    assert found["threads"] == torch.get_num_threads()
    assert found["python"] == sys.version.split()[0]
    text = json.dumps(found)
    for private in (socket.gethostname(), getpass.getuser(), str(Path.home()), str(PACKAGE)):
        assert len(private) < 4 or private not in text


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    hidden = subprocess.run(
        [sys.executable, "-c", "from mmdd.provenance import *; print(resolve_device('auto'))"],
        env={"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert hidden.stdout.strip() == "cpu"
