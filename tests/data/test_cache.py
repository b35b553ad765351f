"""The image cache: decoding, resuming after kill -9, two processes at once, damage, full disks."""

import errno
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from mmdd.data import cache as cache_module
from mmdd.data.cache import prepare_images
from mmdd.data.decode import MAX_PIXELS, Undecodable, decode_image, truncation_is_an_error
from mmdd.data.report import SourceError
from mmdd.errors import DataError


def gradient(width: int, height: int, phase: float = 0.0) -> np.ndarray:
    """A smooth picture, (height, width, 3) uint8, that differs from phase to phase."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 17 + phase + c) + np.cos(y / 23 + 2 * phase - c) for c in range(3)]
    return (127 + 63 * np.stack(waves, axis=-1)).astype(np.uint8)


def write_images(root: Path, count: int, width: int = 60, height: int = 40) -> list[str]:
    root.mkdir(parents=True, exist_ok=True)
    names = [f"{i:04d}.jpg" for i in range(count)]
    for i, name in enumerate(names):
        Image.fromarray(gradient(width, height, i / 7)).save(root / name, quality=95)
    return names


def tree(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


# Decoding one image


def test_square_is_the_scaled_centre(tmp_path):
    array = gradient(90, 50)
    Image.fromarray(array).save(tmp_path / "a.png")
    found = decode_image(tmp_path / "a.png", 20)
    expected = Image.fromarray(array[:, 20:70]).resize((20, 20), Image.Resampling.BICUBIC)
    assert found.shape == (20, 20, 3)
    assert found.dtype == np.uint8
    # only the outermost columns see pixels beyond the cut
    assert np.abs(found[:, 2:-2].astype(int) - np.asarray(expected)[:, 2:-2]).max() <= 1


def test_shorter_side_is_scaled_up_and_slivers_stay_small(tmp_path):
    Image.fromarray(gradient(8, 6)).save(tmp_path / "small.png")
    assert decode_image(tmp_path / "small.png", 32).shape == (32, 32, 3)
    Image.new("RGB", (20000, 1), (10, 200, 30)).save(tmp_path / "sliver.png")
    assert (decode_image(tmp_path / "sliver.png", 16) == [10, 200, 30]).all()


def test_draft_mode_is_close_to_full_decoding(tmp_path):
    Image.fromarray(gradient(1600, 1200)).save(tmp_path / "a.jpg", quality=92)
    found = decode_image(tmp_path / "a.jpg", 48).astype(int)
    with Image.open(tmp_path / "a.jpg") as image:
        box = (200, 0, 1400, 1200)
        full = np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC, box=box)).astype(int)
    assert np.abs(found - full).mean() < 1.0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_tag_is_honoured(tmp_path, orientation):
    upright = np.zeros((64, 64, 3), np.uint8)
    upright[:32, :32] = (250, 0, 0)  # one coloured quarter tells all eight orientations apart
    upright[:32, 32:] = (0, 250, 0)
    undo = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    image = Image.fromarray(np.ascontiguousarray(undo[orientation]))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", quality=98, subsampling=0, exif=exif)
    found = decode_image(tmp_path / "a.jpg", 64).astype(int)
    assert np.abs(found - upright).mean() < 4


def test_every_colour_mode_becomes_rgb(tmp_path):
    colour = gradient(40, 40)
    picture = Image.fromarray(colour)
    grey = np.asarray(picture.convert("L"))
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=98)
    picture.convert("L").save(tmp_path / "grey.jpg", quality=98)
    picture.quantize(256).save(tmp_path / "palette.png")
    picture.convert("1").save(tmp_path / "bits.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    Image.fromarray(grey.astype(np.int32) * 257).save(tmp_path / "sixteen.tif")
    grey_rgb = np.repeat(grey[..., None], 3, axis=2)
    for name, expected, tolerance in [
        ("cmyk.jpg", colour, 5),
        ("grey.jpg", grey_rgb, 2),
        ("palette.png", colour, 8),
        ("sixteen.png", grey_rgb, 0.01),
        ("sixteen.tif", grey_rgb, 0.01),
    ]:
        found = decode_image(tmp_path / name, 40)
        assert found.shape == (40, 40, 3), name
        assert np.abs(found.astype(int) - expected).mean() <= tolerance, name
    assert set(np.unique(decode_image(tmp_path / "bits.png", 40))) == {0, 255}


def test_transparency_is_laid_on_white(tmp_path):
    layer = np.zeros((10, 10, 4), np.uint8)
    layer[:5] = (200, 0, 0, 255)
    Image.fromarray(layer).save(tmp_path / "a.png")
    found = decode_image(tmp_path / "a.png", 10)
    assert (found[0] == (200, 0, 0)).all()
    assert (found[9] == 255).all()


def test_bombs_are_refused_before_decoding(tmp_path):
    side = int(MAX_PIXELS**0.5) + 2
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with pytest.raises(Undecodable, match="bomb") as caught:
        decode_image(tmp_path / "bomb.png", 32)
    assert str(side) in caught.value.detail


def test_an_eps_file_never_reaches_ghostscript(tmp_path):
    (tmp_path / "a.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"
    )
    with pytest.raises(Undecodable, match="not an image"):
        decode_image(tmp_path / "a.jpg", 32)


def test_truncation_is_found_even_where_pillow_was_told_to_ignore_it(tmp_path, monkeypatch):
    [name] = write_images(tmp_path, 1, 200, 200)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with truncation_is_an_error(), pytest.raises(Undecodable, match="truncated"):
        decode_image(tmp_path / name, 32)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


# The whole cache


def test_rows_are_the_decoded_images_in_order_whatever_the_workers(tmp_path):
    names = write_images(tmp_path / "img", 37)
    contents = set()
    for workers in (1, 3):
        prepared = prepare_images(
            names, tmp_path / "img", 24, tmp_path / f"c{workers}", workers=workers, progress=False
        )
        assert prepared.images.shape == (37, 24, 24, 3)
        assert isinstance(prepared.images, np.memmap)
        assert not prepared.images.flags.writeable
        for i, name in enumerate(names):
            assert (prepared.images[i] == decode_image(tmp_path / "img" / name, 24)).all()
        contents.add(prepared.content)
    assert len(contents) == 1


def test_a_finished_cache_opens_no_image_beyond_the_sample(tmp_path, caplog):
    names = write_images(tmp_path / "img", 5)
    caplog.set_level(logging.INFO)
    first = prepare_images(names, tmp_path / "img", 16, tmp_path / "c", progress=False)
    assert "decoded 5 images" in caplog.text
    caplog.clear()
    second = prepare_images(names, tmp_path / "img", 16, tmp_path / "c", progress=False)
    assert caplog.text == ""
    assert second.content == first.content
    assert second.path == first.path


def test_the_cache_follows_moved_images_and_notices_changed_ones(tmp_path, caplog):
    names = [f"{i}.bmp" for i in range(4)]
    (tmp_path / "img").mkdir()
    for i, name in enumerate(names):
        Image.fromarray(gradient(20, 20, i)).save(tmp_path / "img" / name)
    caplog.set_level(logging.INFO)
    first = prepare_images(names, tmp_path / "img", 16, tmp_path / "c", progress=False)
    (tmp_path / "img").rename(tmp_path / "moved")
    caplog.clear()
    moved = prepare_images(names, tmp_path / "moved", 16, tmp_path / "c", progress=False)
    assert moved.content == first.content
    assert caplog.text == ""
    # another bitmap of the very same length
    Image.fromarray(gradient(20, 20, 99)).save(tmp_path / "moved" / names[2])
    changed = prepare_images(names, tmp_path / "moved", 16, tmp_path / "c", progress=False)
    assert changed.content != first.content
    assert (changed.images[1] == first.images[1]).all()
    assert (changed.images[2] != first.images[2]).any()


def test_sizes_do_not_share_a_cache(tmp_path):
    names = write_images(tmp_path / "img", 3)
    small = prepare_images(names, tmp_path / "img", 8, tmp_path / "c", progress=False)
    large = prepare_images(names, tmp_path / "img", 12, tmp_path / "c", progress=False)
    assert small.images.shape[1] == 8
    assert large.images.shape[1] == 12
    assert small.path != large.path


def spoil(root: Path, names: list[str]) -> None:
    data = (root / names[1]).read_bytes()
    (root / names[1]).write_bytes(data[: len(data) // 2])
    (root / names[3]).unlink()
    (root / names[4]).write_text("<html>404</html>")
    (root / names[6]).write_bytes(b"")
    (root / names[7]).unlink()
    (root / names[7]).mkdir()


def test_every_offender_is_named_at_once_and_nothing_is_finished(tmp_path):
    names = write_images(tmp_path / "img", 10)
    spoil(tmp_path / "img", names)
    with pytest.raises(SourceError) as caught:
        prepare_images(names, tmp_path / "img", 16, tmp_path / "c", progress=False)
    assert caught.value.offenders.keys() == {
        "truncated or damaged image",
        "missing image file",
        "not an image",
        "not a regular file",
    }
    assert set(caught.value.offenders["not an image"]) == {names[4], names[6]}
    for i in (1, 3, 4, 6, 7):
        assert names[i] in str(caught.value)
    assert not any("cache.json" in path for path in tree(tmp_path / "c"))


def test_dropping_leaves_no_gaps_and_takes_over_what_was_decoded(tmp_path, caplog):
    names = write_images(tmp_path / "img", 10)
    spoil(tmp_path / "img", names)
    with pytest.raises(SourceError):
        prepare_images(names, tmp_path / "img", 16, tmp_path / "c", progress=False)
    caplog.set_level(logging.INFO)
    prepared = prepare_images(
        names,
        tmp_path / "img",
        16,
        tmp_path / "c",
        on_failures=lambda failures: None,
        progress=False,
    )
    assert "resuming: 5 of 10 images already decoded" in caplog.text
    assert prepared.kept.tolist() == [0, 2, 5, 8, 9]
    for row, i in enumerate(prepared.kept):
        assert (prepared.images[row] == decode_image(tmp_path / "img" / names[i], 16)).all()
    # the content is that of a source that never had the offenders
    good = [names[i] for i in prepared.kept]
    clean = prepare_images(good, tmp_path / "img", 16, tmp_path / "d", progress=False)
    assert clean.content == prepared.content
    assert sum(path.endswith(".npy") for path in tree(tmp_path / "c")) == 1
    # a finished cache with failures is still refused by a caller who does not drop
    with pytest.raises(SourceError, match="not an image"):
        prepare_images(names, tmp_path / "img", 16, tmp_path / "c", progress=False)


def test_a_repaired_image_costs_only_itself(tmp_path, caplog):
    names = write_images(tmp_path / "img", 9)
    good = (tmp_path / "img" / names[4]).read_bytes()
    (tmp_path / "img" / names[4]).write_bytes(good[:200])
    with pytest.raises(SourceError):
        prepare_images(names, tmp_path / "img", 16, tmp_path / "c", progress=False)
    (tmp_path / "img" / names[4]).write_bytes(good)
    caplog.set_level(logging.INFO)
    prepared = prepare_images(names, tmp_path / "img", 16, tmp_path / "c", progress=False)
    assert "resuming: 8 of 9" in caplog.text
    assert len(prepared.images) == 9
    assert prepared.failures == {}


def test_identical_pictures_are_noticed(tmp_path):
    names = write_images(tmp_path / "img", 4)
    (tmp_path / "img" / "copy.jpg").write_bytes((tmp_path / "img" / names[2]).read_bytes())
    names.append("copy.jpg")
    prepared = prepare_images(names, tmp_path / "img", 16, tmp_path / "c", progress=False)
    assert prepared.identical == [[names[2], "copy.jpg"]]


@pytest.mark.parametrize("damage", ["cut", "sidecar", "array"])
def test_a_damaged_cache_is_made_again(tmp_path, damage):
    names = write_images(tmp_path / "img", 4)
    first = prepare_images(names, tmp_path / "img", 16, tmp_path / "c", progress=False)
    pixels = np.array(first.images)
    data = first.path / "images.npy"
    if damage == "cut":
        os.truncate(data, data.stat().st_size - 100)
    elif damage == "sidecar":
        (first.path / "cache.json").write_text("{")
    else:
        data.unlink()
    again = prepare_images(names, tmp_path / "img", 16, tmp_path / "c", progress=False)
    assert (again.images == pixels).all()


def test_impossible_requests_are_refused(tmp_path):
    names = write_images(tmp_path / "img", 2)
    for bad in (
        lambda: prepare_images(names, tmp_path / "img", 0, tmp_path / "c"),
        lambda: prepare_images([], tmp_path / "img", 8, tmp_path / "c"),
        lambda: prepare_images([names[0], names[0]], tmp_path / "img", 8, tmp_path / "c"),
        lambda: prepare_images(names, tmp_path / "nowhere", 8, tmp_path / "c"),
        lambda: prepare_images(
            ["gone.jpg"], tmp_path / "img", 8, tmp_path / "c", on_failures=lambda f: None
        ),
    ):
        with pytest.raises(DataError):
            bad()


def test_too_small_a_disk_is_noticed_before_decoding(tmp_path):
    names = write_images(tmp_path / "img", 2)
    with pytest.raises(DataError, match="not enough disk space"):
        prepare_images(names, tmp_path / "img", 4_000_000, tmp_path / "c", progress=False)


def test_a_full_disk_says_so(tmp_path, monkeypatch):
    names = write_images(tmp_path / "img", 2)

    def to_a_full_disk(file, array):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module, "_write_all", to_a_full_disk)
    with pytest.raises(DataError, match="disk is full"):
        prepare_images(names, tmp_path / "img", 8, tmp_path / "c", progress=False)


# Real processes

_CHILD = """
import logging, sys
from pathlib import Path
from mmdd.data import cache
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
root, folder, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
cache._FLUSH_ROWS = 8
names = sorted(p.name for p in root.iterdir())
print("ready", flush=True)
if sys.argv[4] == "wait":
    sys.stdin.readline()
print(cache.prepare_images(names, root, size, folder, workers=1, progress=False).content)
"""


def start(root: Path, folder: Path, wait: bool = False) -> subprocess.Popen:
    arguments = [str(root), str(folder), "32", "wait" if wait else "go"]
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(cache_module.__file__).parents[2])},
    )


def slow_images(root: Path, count: int) -> list[str]:
    """Images that take some ten milliseconds each to decode, copied from a few."""
    root.mkdir()
    originals = []
    for i in range(6):
        buffer = io.BytesIO()
        Image.fromarray(gradient(900, 700, i)).save(buffer, "PNG", compress_level=1)
        originals.append(buffer.getvalue())
    names = [f"{i:04d}.png" for i in range(count)]
    for i, name in enumerate(names):
        (root / name).write_bytes(originals[i % 6])
    return names


def journal_lines(folder: Path) -> int:
    return sum(p.read_bytes().count(b"\n") for p in folder.glob("images/*.partial/journal.jsonl"))


def test_kill_nine_midway_then_resume(tmp_path, caplog):
    root, folder = tmp_path / "img", tmp_path / "c"
    names = slow_images(root, 100)
    for _ in range(2):  # killed twice, so that a resumed run is also killed
        before = journal_lines(folder)
        child = start(root, folder)
        try:
            deadline = time.monotonic() + 30
            while journal_lines(folder) < before + 8 and child.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            assert child.poll() is None, "the child was done before it could be killed"
        finally:
            os.kill(child.pid, signal.SIGKILL)
            child.communicate()
    assert not any("cache.json" in path for path in tree(folder))
    [journal] = folder.glob("images/*.partial/journal.jsonl")
    done = journal_lines(folder)
    with open(journal, "a") as file:  # as a kill in the middle of a write leaves it
        file.write('{"row": 99, "bytes": 12, "mti')
    caplog.set_level(logging.INFO)
    prepared = prepare_images(names, root, 32, folder, progress=False)
    assert f"resuming: {done} of 100 images already decoded" in caplog.text
    assert 16 <= done < 100
    fresh = prepare_images(names, root, 32, tmp_path / "d", progress=False)
    assert prepared.content == fresh.content
    assert (prepared.images == fresh.images).all()
    assert not list(folder.glob("images/*.partial"))


def test_files_changed_between_kill_and_resume_are_decoded_again(tmp_path):
    names = write_images(tmp_path / "img", 6)
    (tmp_path / "img" / names[5]).write_bytes(b"no image")
    with pytest.raises(SourceError):  # leaves rows 0–4 in the journal
        prepare_images(names, tmp_path / "img", 16, tmp_path / "c", progress=False)
    for i in (2, 5):
        Image.fromarray(gradient(60, 40, 50 + i)).save(tmp_path / "img" / names[i])
    prepared = prepare_images(names, tmp_path / "img", 16, tmp_path / "c", progress=False)
    for i, name in enumerate(names):
        assert (prepared.images[i] == decode_image(tmp_path / "img" / name, 16)).all()


def test_a_kill_between_sealing_and_renaming_is_resumed(tmp_path, caplog):
    names = write_images(tmp_path / "img", 5)
    finished = prepare_images(names, tmp_path / "img", 16, tmp_path / "c", progress=False)
    [lock] = (tmp_path / "c" / "images").glob("*.lock")
    os.rename(finished.path, lock.with_suffix(".partial"))
    caplog.set_level(logging.INFO)
    again = prepare_images(names, tmp_path / "img", 16, tmp_path / "c", progress=False)
    assert "decoded" not in caplog.text
    assert again.content == finished.content


def test_two_processes_share_the_work_of_one(tmp_path):
    root, folder = tmp_path / "img", tmp_path / "c"
    slow_images(root, 40)
    children = [start(root, folder, wait=True) for _ in range(2)]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    outcomes = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert outcomes[0][0] == outcomes[1][0] != ""
    assert sum("decoded 40 images" in err for _, err in outcomes) == 1
    sidecars = list(folder.glob("images/*/cache.json"))
    assert len(sidecars) == 1
    assert json.loads(sidecars[0].read_text())["failures"] == {}
