"""Damage and disks: every flipped byte and every cut is noticed, and what refuses is named.

Each kind of file that mmdd reads back is damaged at many positions. Reading it must raise one of
mmdd's errors, or give exactly what was written: never other data, never a foreign exception.
"""

import ctypes
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmdd import runs
from mmdd.config import RunConfig
from mmdd.data import cache as image_cache
from mmdd.data.cache import prepare_images
from mmdd.disk import require_writable, writing
from mmdd.errors import ArtefactError, DataError, DiskError, MmddError
from mmdd.experts import ExpertBuffer, Layout
from mmdd.files import (
    atomic_write,
    load_checked,
    load_checkpoint,
    load_state,
    save_checked,
    save_checkpoint,
    save_state,
)
from mmdd.runs import run, set_path
from mmdd.seal import sealed
from mmdd.similarity import LowRankSimilarity
from mmdd.store import ResultsStore
from mmdd.synthetic import SyntheticPairs

LIBC = ctypes.CDLL(None, use_errno=True)
SMALL: dict[str, Any] = {
    "pairs": 4,
    "dataset": {"train": 20, "val": 8, "test": 8},
    "model": {"dim": 8},
    "evaluation": {"students": 1, "epochs": 1, "scores": 1},
    "sweep": "mine",
    "runtime": {"progress": False, "device": "cpu", "checkpoint_every": 2},
}
SETTINGS = {"iterations": 6, "real_batch": 8, "normalize": True, "lr_image": 0.01, "lr_text": 0.01}


def make(**changes: Any) -> RunConfig:
    values = {"method": "covmatch", "settings": SETTINGS, **SMALL, **changes}
    return RunConfig.model_validate(values)


# -- every kind of file, byte by byte --------------------------------------------------------------


@dataclass
class Kind:
    """A file, how it is read, and whether what was read is what was written."""

    path: Path
    read: Callable[[], Any]
    same: Callable[[Any], bool]
    flips: int = 250
    cuts: int = 120


def _tensors_equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def a_set(folder: Path) -> Kind:
    path = folder / "set.safetensors"
    similarity = LowRankSimilarity(3, 1, 0.5)
    written = SyntheticPairs(
        torch.rand(3, 3, 4, 4),
        torch.rand(3, 2),
        similarity=similarity,
        learning_rates={"image": 0.125},
        metadata={"method": "lors", "licence": "MIT"},
    )
    written.save(path)

    def same(read: SyntheticPairs) -> bool:
        alike = read.learning_rates == written.learning_rates and read.metadata == written.metadata
        assert read.similarity is not None
        return alike and _tensors_equal(read._tensors(), written._tensors())

    return Kind(path, lambda: SyntheticPairs.load(path), same)


def a_checkpoint(folder: Path) -> Kind:
    path = folder / "checkpoint.safetensors"
    state = {"x": torch.rand(20), "progress": {"iterations": 12, "history": {"loss": [0.5, 0.25]}}}
    save_state(path, state)

    def same(read: Any) -> bool:
        return torch.equal(read["x"], state["x"]) and read["progress"] == state["progress"]

    return Kind(path, lambda: load_state(path), same)


def _buffer(folder: Path) -> tuple[Path, Layout]:
    here = folder / "expert-000"
    sizes = 0
    for snapshot in range(2):
        path = here / f"snapshot-{snapshot:04d}.safetensors"
        save_checked(path, {"parameters": torch.arange(24.0) + snapshot}, {"snapshot": snapshot})
        sizes += path.stat().st_size
    manifest = {"expert": 0, "snapshots": 1, "seconds": 1.5, "bytes": sizes, "losses": [0.5]}
    (here / "manifest.json").write_text(json.dumps(sealed(manifest), indent=1))
    return here, Layout(("w",), (torch.Size([24]),), {"image_head": 24})


def a_snapshot(folder: Path) -> Kind:
    here, layout = _buffer(folder)
    read = lambda: ExpertBuffer(folder, layout, 1).read(0, 1)  # noqa: E731
    return Kind(
        here / "snapshot-0001.safetensors", read, lambda x: torch.equal(x, torch.arange(24.0) + 1)
    )


def a_manifest(folder: Path) -> Kind:
    here, layout = _buffer(folder)
    read = lambda: ExpertBuffer(folder, layout, 1).manifests  # noqa: E731
    good = read()
    return Kind(here / "manifest.json", read, lambda found: bool(found == good))


def features(folder: Path) -> Kind:
    path = folder / "features.safetensors"
    tensors = {"image": torch.rand(4, 3), "text": torch.rand(4, 3)}
    save_checked(path, tensors, {"seconds": 2.25})

    def same(read: Any) -> bool:
        return _tensors_equal(read[0], tensors) and read[1]["seconds"] == 2.25

    return Kind(path, lambda: load_checked(path), same)


def _record(run_id: str) -> dict[str, Any]:
    scores = {"mean": 12.3456, "IR@1": 5.25}
    students = [{"student_seed": 0, "test": scores, "seconds": 0.5}]
    return {"schema": 2, "run_id": run_id, "sweep": "s", "students": students, "note": "größer"}


def a_record(folder: Path) -> Kind:
    store = ResultsStore(folder)
    path = store.write(_record("a"))
    return Kind(path, lambda: list(store.records()), lambda found: bool(found == [_record("a")]))


def packed_records(folder: Path) -> Kind:
    store = ResultsStore(folder)
    names = ("a", "b", "c")
    for name in names:
        store.write(_record(name))
    path = store.pack("s")

    def same(found: list[Any]) -> bool:
        # A cut between two lines leaves whole records: those that are gone are run again.
        return found == [_record(name) for name in names[: len(found)]]

    return Kind(path, lambda: list(store.records()), same)


def _photos(folder: Path) -> tuple[list[str], Path]:
    random = np.random.default_rng(0)
    (folder / "photos").mkdir()
    names = [f"{i}.png" for i in range(5)]
    for name in names:
        pixels = random.integers(0, 256, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / name)
    return names, folder / "photos"


def _image_cache(folder: Path, file: str) -> Kind:
    """Opening it may say that it is no use, with None, and it is then made again."""
    names, root = _photos(folder)
    prepare = lambda: prepare_images(names, root, 8, folder / "c", progress=False)  # noqa: E731
    good = prepare()
    pixels = np.array(good.images)
    key = json.loads((good.path / "cache.json").read_text())["source_key"]

    def read() -> Any:
        return image_cache._open(good.path, names, 8, key)

    def same(found: Any) -> bool:
        if found is None:
            return True
        alike = found.content == good.content and found.identical == good.identical
        return alike and found.failures == {} and np.array_equal(found.images, pixels)

    return Kind(good.path / file, read, same)


def image_pixels(folder: Path) -> Kind:
    return _image_cache(folder, "images.npy")


def image_sidecar(folder: Path) -> Kind:
    return _image_cache(folder, "cache.json")


def image_journal(folder: Path) -> Kind:
    """A journal of a call that was interrupted: what is read is what the next call makes."""
    names, root = _photos(folder)
    prepare = lambda where: prepare_images(  # noqa: E731
        names, root, 8, folder / where, progress=False, workers=1
    )
    good = prepare("c")
    pixels = np.array(good.images)
    [lock] = (folder / "c" / "images").glob("*.lock")
    (good.path / "cache.json").unlink()
    partial = lock.with_suffix(".partial")
    os.rename(good.path, partial)
    before = {path.name: path.read_bytes() for path in partial.iterdir()}
    (folder / "journal.jsonl").write_bytes(before["journal.jsonl"])

    def read() -> Any:
        shutil.rmtree(good.path, ignore_errors=True)
        partial.mkdir(exist_ok=True)
        for name, content in before.items():
            (partial / name).write_bytes(content)
        shutil.copyfile(folder / "journal.jsonl", partial / "journal.jsonl")
        return np.array(prepare("c").images)

    return Kind(folder / "journal.jsonl", read, lambda found: np.array_equal(found, pixels), 60, 25)


KINDS = [
    a_set,
    a_checkpoint,
    a_snapshot,
    a_manifest,
    features,
    a_record,
    packed_records,
    image_pixels,
    image_sidecar,
    image_journal,
]


def _damages(whole: bytes, flips: int, cuts: int) -> Iterator[tuple[str, bytes]]:
    random = np.random.default_rng(len(whole))
    for position in range(0, len(whole), max(1, len(whole) // flips)):
        content = bytearray(whole)
        content[position] ^= int(1 << random.integers(8))
        yield f"bit of byte {position}", bytes(content)
    for length in range(0, len(whole), max(1, len(whole) // cuts)):
        yield f"cut to {length}", whole[:length]
    yield "cut by one", whole[:-1]
    yield "longer", whole + b"\0"
    yield "zeros", bytes(len(whole))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_damage_is_taken_for_data(
    tmp_path: Path, kind: Callable[[Path], Kind], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    built = kind(tmp_path)
    assert built.same(built.read())
    whole = built.path.read_bytes()
    noticed = 0
    for what, content in _damages(whole, built.flips, built.cuts):
        caplog.clear()
        built.path.write_bytes(content)
        try:
            read = built.read()
        except MmddError as error:
            noticed += 1
            if built.path.name not in str(error) and "expert 0 of" not in str(error):
                pytest.fail(f"{what}: the file is not named: {error}")
        except Exception as error:
            pytest.fail(f"{what}: {type(error).__name__}: {error}")
        else:
            assert built.same(read), f"{what} was taken for data"
            noticed += bool(caplog.records)
    # The others changed nothing that is said: a space, a letter of a number's exponent.
    assert noticed > (10 if kind is image_journal else 0.4 * (built.flips + built.cuts))


def test_a_vanished_file_is_named(tmp_path: Path) -> None:
    for kind in (a_set, a_checkpoint, a_snapshot, a_manifest, features):
        built = kind(tmp_path / kind.__name__)
        built.path.unlink()
        with pytest.raises(ArtefactError, match=r"does not exist|No such file"):
            built.read()


# -- a run that meets damage -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> SyntheticPairs:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(make(), folder)
    return SyntheticPairs.load(set_path(folder / "mine", make()))


def _same_set(folder: Path, expected: SyntheticPairs) -> bool:
    made = SyntheticPairs.load(set_path(folder / "mine", make()))
    return torch.equal(made.images, expected.images) and torch.equal(made.texts, expected.texts)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[2 * len(content) // 3] ^= 4
    path.write_bytes(bytes(content))


def test_a_damaged_set_is_made_again(
    tmp_path: Path, undisturbed: SyntheticPairs, caplog: pytest.LogCaptureFixture
) -> None:
    run(make(), tmp_path)
    path = set_path(tmp_path / "mine", make())
    for damage in (_flip, lambda p: p.write_bytes(p.read_bytes()[:100])):
        damage(path)
        (tmp_path / "mine" / f"{make().run_id}.json").unlink()
        caplog.clear()
        run(make(), tmp_path)
        assert str(path) in caplog.text
        assert "made again" in caplog.text
        assert _same_set(tmp_path, undisturbed)


def test_a_damaged_checkpoint_costs_no_more_than_its_step(
    tmp_path: Path,
    undisturbed: SyntheticPairs,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    step = runs.METHODS["covmatch"].distiller.after_step

    def stop(self: Any, iteration: int) -> dict[str, float]:
        if iteration == 5:
            raise KeyboardInterrupt
        return step(self, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(runs.METHODS["covmatch"].distiller, "after_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run(make(), tmp_path)
    names = sorted(path.name for path in (tmp_path / "mine" / "checkpoints").iterdir())
    assert len(names) == 2  # after four iterations, and after two
    current = next(n for n in names if ".previous." not in n)
    _flip(tmp_path / "mine" / "checkpoints" / current)
    seen: list[int] = []
    monkeypatch.setattr(
        runs.METHODS["covmatch"].distiller,
        "after_step",
        lambda self, iteration: [seen.append(iteration), step(self, iteration)][1],
    )
    run(make(), tmp_path)
    assert current in caplog.text
    assert seen == [2, 3, 4, 5]
    assert _same_set(tmp_path, undisturbed)
    assert list((tmp_path / "mine" / "checkpoints").iterdir()) == []


def test_a_cache_that_vanishes_under_a_run(tmp_path: Path) -> None:
    """Images that were opened stay readable; the next call decodes them again."""
    names, root = _photos(tmp_path)
    first = prepare_images(names, root, 8, tmp_path / "c", progress=False)
    before = np.array(first.images)
    shutil.rmtree(tmp_path / "c")
    assert np.array_equal(first.images, before)
    again = prepare_images(names, root, 8, tmp_path / "c", progress=False)
    assert np.array_equal(again.images, before)


MATCHING = {
    "iterations": 6, "expert_epochs": 1, "max_start_epoch": 1, "syn_steps": 1,
    "experts": {"count": 2, "epochs": 2},
}  # fmt: skip


@pytest.mark.parametrize("vanishing", ["experts", "checkpoints", "mine"])
def test_what_vanishes_under_a_run_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vanishing: str
) -> None:
    """The whole buffer, the checkpoints, or all that the run has written, in its midst."""
    config = make(
        method="mtt",
        protocol="heads",
        settings=MATCHING,
        runtime=SMALL["runtime"] | {"experts": str(tmp_path / "experts")},
    )
    run(config, tmp_path / "calm")
    expected = SyntheticPairs.load(set_path(tmp_path / "calm" / "mine", config))
    results = tmp_path / "results"
    gone = tmp_path / "experts" if vanishing == "experts" else results / "mine"
    distiller = runs.METHODS["mtt"].distiller
    step, removed = distiller.after_step, []

    def remove(self: Any, iteration: int) -> dict[str, float]:
        if iteration == 3:
            removed.append(gone)
            shutil.rmtree(gone / "checkpoints" if vanishing == "checkpoints" else gone)
        return step(self, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(distiller, "after_step", remove)
        told = ""
        try:
            run(config, results)
        except MmddError as error:
            told = str(error)
    assert removed == [gone]
    assert not told or str(gone) in told  # it goes on, or names what it lacks
    record = run(config, results)
    assert record["run_id"] == config.run_id
    made = SyntheticPairs.load(set_path(results / "mine", config))
    assert torch.equal(made.images, expected.images)
    assert torch.equal(made.texts, expected.texts)


# -- disks that refuse -----------------------------------------------------------------------------


@contextmanager
def limit_on_files(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: the system refuses it as too large."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A file system of `size` bytes at `folder`, where this process may mount one: tells if."""
    folder.mkdir(exist_ok=True)
    mounted = LIBC.mount(b"none", bytes(folder), b"tmpfs", 0, f"size={size}".encode()) == 0
    try:
        yield mounted
    finally:
        if mounted:
            LIBC.umount2(bytes(folder), 2)


def grow(folder: Path, size: int) -> None:
    """Give the file system of `small_disk` more room; what it holds stays."""
    remount = 32  # MS_REMOUNT
    assert LIBC.mount(b"none", bytes(folder), b"tmpfs", remount, f"size={size}".encode()) == 0


def _full(folder: Path, size: int) -> Iterator[str]:
    """Ways in which a disk is full while the loop's body runs."""
    with limit_on_files(size):
        yield "limit"
    with small_disk(folder, size) as mounted:
        if mounted:
            yield "disk"


def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    for way in _full(folder, 64 * 1024):
        path = folder / f"{way}.safetensors"
        save_checkpoint(path, {"step": 1, "x": torch.zeros(2_000)})
        for _ in range(3):
            with pytest.raises(DiskError, match=rf"{way}\.safetensors could not be.*is full"):
                save_checkpoint(path, {"step": 2, "x": torch.zeros(50_000)})
            assert load_checkpoint(path)["step"] == 1
        assert os.listdir(folder) == [path.name]
        store = ResultsStore(folder / "results")
        store.write(_record("a"))
        large = _record("a") | {"note": "x" * 70_000}
        with pytest.raises(DiskError, match=r"a\.json could not be written"):
            store.write(large)
        assert store.find("a") == _record("a")
        if way == "limit":
            shutil.rmtree(folder)


def test_what_a_device_says_is_passed_on(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text("half")
        with open("/dev/full", "w") as device:
            device.write("the other half")

    (tmp_path / "file").write_text("old")
    with pytest.raises(DiskError, match="file could not be written: the disk"):
        atomic_write(tmp_path / "file", write)
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    for number, words in (
        (errno.EROFS, "may not be written"),
        (errno.EIO, "Input/output error"),
    ):
        with pytest.raises(DiskError, match=words), writing(tmp_path):
            raise OSError(number, os.strerror(number))
    with pytest.raises(DiskError, match=r"may not be written|system says"):
        require_writable(Path("/proc/mmdd"))


def test_a_full_disk_under_the_image_cache(tmp_path: Path) -> None:
    names, root = _photos(tmp_path)
    good = np.array(prepare_images(names, root, 8, tmp_path / "c", progress=False).images)
    folder = tmp_path / "disk"
    with limit_on_files(500), pytest.raises(DataError, match="disk is full"):
        prepare_images(names, root, 8, folder, progress=False)
    assert not list(folder.glob("images/*px"))
    again = prepare_images(names, root, 8, folder, progress=False)
    assert np.array_equal(again.images, good)


# -- the command line ------------------------------------------------------------------------------

SCRIPT = textwrap.dedent(
    """
    import ctypes, os, resource, shlex, sys, traceback
    from pathlib import Path
    from mmdd.__main__ import main
    from mmdd.encoders import build_model
    from mmdd.presets import preset

    build_model(preset("tiny").model)


    def forbid():
        # Root writes wherever it likes: without these capabilities it is a user like any other.
        libc = ctypes.CDLL(None)
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        data = (ctypes.c_uint32 * 6)()
        assert libc.capget(header, data) == 0
        data[0] &= ~0b1110  # DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER: effective
        assert libc.capset(header, data) == 0


    def job(*words):
        order, log, *words = words
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 2)
        if order == "forbid":
            forbid()
        elif order != "-":
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(order), int(order)))
        sys.argv = ["mmdd", *words]
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 99
        sys.stderr.flush()
        os._exit(code)
    """
)


@pytest.fixture(scope="module")
def mmdd(
    forking: Callable[[str], "subprocess.Popen[str]"], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[int, str]]:
    """mmdd(order, *words): exit code and errors of the command in a process of its own.

    order: "-", "forbid" for a user without root's rights, or the largest file in bytes.
    """
    server = forking(SCRIPT)
    log = tmp_path_factory.mktemp("log") / "err.txt"

    def call(order: str, *words: str) -> tuple[int, str]:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(" ".join([order, str(log), *words]) + "\n")
        server.stdin.flush()
        for line in server.stdout:
            if line.startswith("ended"):
                return int(line.split()[1]), log.read_text()
        raise AssertionError("the server ended")

    return call


VALUES = {
    "dataset.train": 20, "dataset.val": 8, "dataset.test": 8, "model.dim": 8,
    "runtime.progress": "false", "evaluation.students": 1, "evaluation.epochs": 1,
    "evaluation.scores": 1,
}  # fmt: skip


def _sets(values: dict[str, Any]) -> list[str]:
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def _words(results: Path) -> list[str]:
    begin = ["run", "--method", "random", "--preset", "tiny", "--pairs", "4"]
    return [*begin, *_sets(VALUES), "--results", str(results)]


def _distil(results: Path) -> list[str]:
    steps = {"settings.iterations": 6, "settings.real_batch": 8, "runtime.checkpoint_every": 2}
    begin = ["run", "--method", "covmatch", "--preset", "tiny", "--pairs", "4"]
    return [*begin, *_sets(VALUES | steps), "--results", str(results)]


def _train_experts(folder: Path) -> list[str]:
    values = {
        "settings.experts.count": 3, "settings.experts.epochs": 1, "settings.iterations": 1,
        "settings.expert_epochs": 1, "settings.max_start_epoch": 0, "settings.syn_steps": 1,
        "runtime.experts": folder / "experts",
    }  # fmt: skip
    begin = ["run", "--method", "mtt", "--protocol", "heads", "--preset", "tiny", "--pairs", "4"]
    return [*begin, *_sets(VALUES | values), "--results", str(folder / "results")]


def test_a_full_disk_ends_in_one_line(mmdd: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    results = tmp_path / "results"
    code, errors = mmdd("3000", *_words(results))
    assert code == 1
    assert "Traceback" not in errors
    assert "mmdd: " in errors
    assert "could not be written: the disk" in errors
    assert not list(results.glob("*/*.json"))
    assert not list(results.glob("*/sets/*.safetensors"))
    with small_disk(tmp_path / "disk", 32 * 1024) as mounted:
        if mounted:
            code, errors = mmdd("-", *_words(tmp_path / "disk"))
            assert (code, "Traceback" in errors) == (1, False)
            assert "is full: make room" in errors
    code, errors = mmdd("-", *_words(results))  # there is room again
    assert code == 0
    assert len(list(ResultsStore(results).records())) == 1


def _contents(folder: Path, pattern: str) -> dict[str, dict[str, list[Any]]]:
    """What the files of a pattern hold, by path; headers tell times and are left out."""
    return {
        str(path.relative_to(folder)): {k: v.tolist() for k, v in load_file(path).items()}
        for path in folder.rglob(pattern)
    }


def _called(*words: str) -> tuple[int, str]:
    """Exit code and errors of the command as a shell starts it: it starts others itself."""
    ended = subprocess.run(
        [sys.executable, "-m", "mmdd", *words], stderr=subprocess.PIPE, text=True, timeout=250
    )
    return ended.returncode, ended.stderr


@pytest.mark.parametrize(
    ("words", "kept", "step"),
    [
        (_distil, "sets/*.safetensors", 4_000_000),
        (_train_experts, "snapshot-*.safetensors", 16_000),
    ],
    ids=["distilling", "experts"],
)
def test_work_goes_on_as_a_full_disk_gets_room(
    mmdd: Callable[..., tuple[int, str]],
    tmp_path: Path,
    words: Callable[[Path], list[str]],
    kept: str,
    step: int,
) -> None:
    """A disk that is full again and again, at another moment of the work each time."""
    calm, disk = tmp_path / "calm", tmp_path / "disk"
    assert mmdd("-", *words(calm))[0] == 0
    size, times, code = step, 0, 1
    with small_disk(disk, size) as mounted:
        if not mounted:
            pytest.skip("only root may mount a file system, and not in every container")
        while code:
            before = _contents(disk, kept)
            code, errors = mmdd("-", *words(disk))
            if code:
                assert (code, "Traceback" in errors) == (1, False), errors
                assert errors.count("mmdd: ") == 1
                assert "is full: make room" in errors
                times += 1
            after = _contents(disk, kept)
            assert before.items() <= after.items()  # what was whole is not made again
            expected = _contents(calm, kept)
            assert after.items() <= expected.items()  # and nothing else has a final name
            size += step
            grow(disk, size)
        assert times >= 2
        assert _contents(disk, kept) == _contents(calm, kept)


@pytest.mark.notebook
@pytest.mark.slow
def test_a_sweep_goes_on_as_a_full_disk_gets_room(tmp_path: Path) -> None:
    grid = tmp_path / "g.yaml"
    small = {"train": 20, "val": 8, "test": 8}
    evaluation = {"students": 1, "epochs": 1, "scores": 1}
    base = {"method": "random", "pairs": 4, "dataset": small, "evaluation": evaluation}
    grid.write_text(
        json.dumps({"sweep": "s", "preset": "tiny", "base": base, "grid": [{"seed": [0, 1]}]})
    )
    disk = tmp_path / "disk"
    words = ["sweep", str(grid), "--jobs", "2", "--retries", "0", "--results", str(disk)]
    with small_disk(disk, 64 * 1024) as mounted:
        if not mounted:
            pytest.skip("only root may mount a file system, and not in every container")
        code, errors = _called(*words)
        assert (code, "disk" in errors) == (1, True)
        assert list(ResultsStore(disk).records()) == []
        grow(disk, 4 * 1024 * 1024)
        assert _called(*words)[0] == 0
        assert len(list(ResultsStore(disk).records())) == 2


def test_a_results_folder_that_may_not_be_written(
    mmdd: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    results.chmod(0o555)
    try:
        code, errors = mmdd("forbid", *_words(results))
        assert (code, "Traceback" in errors) == (1, False)
        assert f"{results}" in errors
        assert "may not be written: choose another one" in errors
        assert list(results.iterdir()) == []
        grid = tmp_path / "g.yaml"
        grid.write_text("sweep: s\npreset: tiny\nbase: {method: random}\ngrid: [{seed: [0, 1]}]\n")
        code, errors = mmdd("forbid", "sweep", str(grid), "--results", str(results))
        assert (code, "Traceback" in errors) == (1, False)
        assert errors.count("may not be written") == 1
    finally:
        results.chmod(0o755)


def test_damage_ends_in_one_line(mmdd: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    built = a_set(tmp_path)
    _flip(built.path)
    for words in (("inspect",), ("evaluate",)):
        code, errors = mmdd("-", *words, str(built.path))
        assert (code, "Traceback" in errors) == (1, False)
        assert "set.safetensors" in errors
    store = ResultsStore(tmp_path / "results")
    for name in ("a", "b"):
        store.write(_record(name))
    path = store.pack("s")
    path.write_bytes(path.read_bytes()[:-40])
    grid = tmp_path / "g.yaml"
    grid.write_text("sweep: s\npreset: tiny\nbase: {method: random}\ngrid: [{seed: [0, 1]}]\n")
    code, errors = mmdd("-", "sweep", str(grid), "--results", str(store.folder))
    assert (code, "Traceback" in errors) == (1, False)
    assert "s.jsonl, line 3 is not a result record" in errors
    assert store.find("a") == _record("a")
