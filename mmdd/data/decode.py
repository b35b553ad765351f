"""One image file → one square uint8 array: orientation, colour, shorter side, centre crop."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

# Larger pictures are refused before a pixel of them is decoded.
MAX_PIXELS = 80_000_000
# Pillow would hand an EPS file to Ghostscript whatever its suffix, so formats are listed.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000")
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".jp2")
)
# JPEG decoders can halve an image while decoding it. Asking for no less than twice the final size
# moved a pixel by 0.03–0.4 grey levels on average against full decoding at 48 px, and by 1.4–2.5
# when asking for the final size itself; it is about twice as fast as full decoding there.
_DRAFT_FACTOR = 2


class Undecodable(Exception):
    """A file that cannot become an image. kind: a phrase for the report; detail: why."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


def decode_image(path: Path, size: int) -> np.ndarray:
    """Read an image file as (size, size, 3) uint8 RGB.

    Scales the shorter side to `size` (bicubic with antialiasing) and cuts the centre. The camera's
    orientation tag is applied. Greyscale, palette, CMYK and 16-bit images become 8-bit RGB;
    transparent pixels are laid on white; of an animation the first frame counts.

    Raises `Undecodable` for a file that is missing, unreadable, truncated, damaged, no image, or
    of more than `MAX_PIXELS` pixels.

    Book: notebooks/01_data.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Undecodable("not a regular file", "a folder, pipe or device")
        with open(path, "rb") as file:
            return _decode(file, size)
    except (FileNotFoundError, NotADirectoryError):
        raise Undecodable("missing image file", "") from None
    except PermissionError:
        raise Undecodable("unreadable image file", "permission denied") from None
    except OSError as error:  # a name longer than the file system takes, a failing disk …
        raise Undecodable("unreadable image file", error.strerror or str(error)) from None


def _decode(file, size: int) -> np.ndarray:
    try:
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise _too_large(f"{width}×{height} pixels, the limit is {MAX_PIXELS:,}")
            image.draft(None, (_DRAFT_FACTOR * size, _DRAFT_FACTOR * size))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)  # most have no tag, and need no copy
            return _square(_to_rgb(image), size)
    except (Undecodable, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(str(error)) from None
    except UnidentifiedImageError:
        raise Undecodable("not an image", "no known image format") from None
    except Exception as error:
        # Pillow's plugins raise whatever their parser stumbled over: OSError, SyntaxError,
        # ValueError, struct.error, zlib.error, IndexError …
        detail = str(error) or type(error).__name__
        raise Undecodable("truncated or damaged image", detail) from None


def _too_large(detail: str) -> Undecodable:
    return Undecodable("image too large (possible decompression bomb)", detail)


def _square(image: Image.Image, size: int) -> np.ndarray:
    # Cutting and scaling in one step: a 10000 × 1 picture never becomes a long strip in memory,
    # and the filter still sees the real pixels beyond the cut.
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        return _from_integers(image).convert("RGB")
    if image.mode == "F":
        raise Undecodable("truncated or damaged image", "floating-point pixels have no known range")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _from_integers(image: Image.Image) -> Image.Image:
    # Pillow clips 16-bit greys at 255 when converting; the upper byte is what is meant.
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise Undecodable("truncated or damaged image", "integer pixels beyond 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))


@contextmanager
def truncation_is_an_error() -> Iterator[None]:
    """While open, Pillow refuses truncated files even where other code has told it not to."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
