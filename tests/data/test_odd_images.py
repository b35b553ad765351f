"""Images as they come from the world: sizes, modes, animations, rotations, bombs and damage."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdd.data.decode import MAX_PIXELS, Undecodable, decode_image
from mmdd.data.readers import read_karpathy
from mmdd.data.report import SourceError

RED, BLUE = (200, 30, 30), (30, 30, 200)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff", "ppm"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1)])
def test_the_smallest_images(tmp_path: Path, suffix: str, shape: tuple[int, int]) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", shape, RED).save(path)
    found = decode_image(path, 32)
    assert found.shape == (32, 32, 3)
    assert np.abs(found.astype(int) - RED).max() <= 12, "one colour stays one colour"


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("shape", [(20_000, 20), (20, 20_000)])
def test_a_long_strip_shows_its_middle(tmp_path: Path, suffix: str, shape: tuple[int, int]) -> None:
    strip = Image.new("RGB", shape, BLUE)
    middle = (shape[0] // 2 - 40, shape[1] // 2 - 40, shape[0] // 2 + 40, shape[1] // 2 + 40)
    strip.paste(RED, middle)
    strip.save(tmp_path / f"a.{suffix}")
    found = decode_image(tmp_path / f"a.{suffix}", 32)
    assert np.abs(found.astype(int) - RED).mean() < 4


def test_a_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([*RED, *BLUE])
    image.paste(1, (0, 4, 8, 8))
    image.save(tmp_path / "a.png", transparency=1)
    image.save(tmp_path / "a.gif", transparency=1)
    image.save(tmp_path / "half.png", transparency=bytes([255, 128]))
    for name in ("a.png", "a.gif"):
        found = decode_image(tmp_path / name, 8)
        assert (found[0] == RED).all(), name
        assert (found[7] == 255).all(), f"{name}: what is transparent is white"
    half = decode_image(tmp_path / "half.png", 8)[7].astype(int)
    assert np.abs(half - (np.array(BLUE) + 255) / 2).max() <= 2


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_counts(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, BLUE, BLUE)]
    path = tmp_path / f"a.{kind}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50, lossless=True)
    with Image.open(path) as image:
        assert image.n_frames >= 2
    assert np.abs(decode_image(path, 8).astype(int) - RED).max() <= 8


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "LA", "YCbCr", "CMYK", "LAB", "1"])
def test_rarer_modes(tmp_path: Path, mode: str) -> None:
    grey = np.full((16, 16), 128, np.uint8)
    if mode.startswith("I"):
        image = Image.fromarray(grey.astype(">u2" if mode.endswith("B") else "<u2") * 257)
    elif mode in ("LAB", "1"):
        image = Image.new(mode, (16, 16), (128, 128, 128) if mode == "LAB" else 1)
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode)
    path = tmp_path / ("a.png" if mode in ("LA", "1") else "a.tiff")
    image.save(path)
    found = decode_image(path, 16)
    assert found.shape == (16, 16, 3)
    assert found.dtype == np.uint8
    if mode not in ("LAB", "1"):
        assert np.abs(found.astype(int) - 128).max() <= 3


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(Undecodable, match="no known range"):
        decode_image(tmp_path / "a.tiff", 8)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_rotation_is_applied_in_every_format_that_has_it(tmp_path: Path, suffix: str) -> None:
    image = Image.new("RGB", (40, 40), BLUE)
    image.paste(RED, (0, 0, 40, 20))  # red above
    exif = image.getexif()
    exif[0x0112] = 6  # shown turned a quarter clockwise: red to the right
    image.save(tmp_path / f"a.{suffix}", exif=exif, quality=95)
    found = decode_image(tmp_path / f"a.{suffix}", 8).astype(int)
    assert np.abs(found[:, 6:] - RED).mean() < 12
    assert np.abs(found[:, :2] - BLUE).mean() < 12


def png(width: int, height: int, data: bytes) -> bytes:
    """A PNG of 8-bit greys whose header says what it likes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [int(MAX_PIXELS**0.5) + 1, 20_000, 2**31 - 1])
def test_a_header_that_promises_a_bomb(tmp_path: Path, side: int) -> None:
    (tmp_path / "a.png").write_bytes(png(side, side, zlib.compress(bytes(100))))
    with pytest.raises(Undecodable) as caught:
        decode_image(tmp_path / "a.png", 32)
    assert caught.value.kind == "image too large (possible decompression bomb)"


def test_a_text_chunk_that_unpacks_to_a_hundred_megabytes(tmp_path: Path) -> None:
    body = b"zTXtcomment\0\0" + zlib.compress(bytes(100_000_000), 9)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    sound = png(1, 1, zlib.compress(b"\0\x80"))
    (tmp_path / "a.png").write_bytes(sound[:33] + chunk + sound[33:])
    with pytest.raises(Undecodable):
        decode_image(tmp_path / "a.png", 8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000"])
def test_every_truncation_is_refused_or_harmless(tmp_path: Path, kind: str) -> None:
    """Cut anywhere, a file is refused, or nothing of its pixels was cut."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    whole = tmp_path / "whole"
    image.save(whole, kind)
    data, pixels = whole.read_bytes(), decode_image(whole, 24)
    refused = []
    for keep in np.unique(np.linspace(0, len(data) - 1, 40).astype(int)).tolist():
        (tmp_path / "cut").write_bytes(data[:keep])
        try:
            found = decode_image(tmp_path / "cut", 24)
        except Undecodable as error:
            refused.append(error.kind)
        else:
            # Some decoders give up only with the last bytes, such as an end marker.
            assert keep > 0.9 * len(data), f"{keep} of {len(data)} bytes passed"
            assert (found == pixels).mean() > 0.5
    assert len(refused) >= 30
    assert set(refused) <= {"not an image", "truncated or damaged image"}


def test_names_and_places_that_hold_no_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    for name, kind in (
        ("a.png", "not an image"),
        ("b.png", "missing image file"),
        ("a.png/c.png", "missing image file"),
        ("folder.png", "not a regular file"),
        ("n" * 300, "unreadable image file"),
    ):
        with pytest.raises(Undecodable) as caught:
            decode_image(tmp_path / name, 8)
        assert caught.value.kind == kind, name


def test_the_reader_reports_them_by_kind(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    Image.new("RGB", (1, 1), RED).save(root / "tiny.png")
    Image.new("RGB", (20_000, 20), RED).save(root / "strip.png")
    (root / "bomb.png").write_bytes(png(30_000, 30_000, zlib.compress(bytes(100))))
    (root / "cut.png").write_bytes((root / "strip.png").read_bytes()[:200])
    (root / "page.jpg").write_text("<html>not found</html>")
    names = ["tiny.png", "strip.png", "bomb.png", "cut.png", "page.jpg", "gone.png", "n" * 300]
    source = tmp_path / "dataset_x.json"
    source.write_text(
        json.dumps({"images": [{"filename": n, "sentences": [{"raw": "a"}]} for n in names]})
    )
    with pytest.raises(SourceError) as caught:
        read_karpathy(source, root, 16, tmp_path / "cache", progress=False)
    assert {kind: set(found) for kind, found in caught.value.offenders.items()} == {
        "image too large (possible decompression bomb)": {"bomb.png"},
        "truncated or damaged image": {"cut.png"},
        "not an image": {"page.jpg"},
        "missing image file": {"gone.png"},
        "unreadable image file": {"n" * 300},
    }
    data = read_karpathy(source, root, 16, tmp_path / "cache", progress=False, on_error="drop")
    assert len(data) == 2
    assert (data.images == RED).all()
