"""Where files live: the small ones that ship with `mmdd`, and the caches on the reader's disk."""

import os
from pathlib import Path

import platformdirs

from mmdd.errors import DataError

_PACKAGE = Path(__file__).resolve().parent


def data_file(relative: str) -> Path:
    """Path of a file that ships with the project, such as ``pretrained/scenes_tiny.safetensors``.

    A checkout keeps these files in ``data/`` beside the package; a built wheel carries them inside
    it, as ``mmdd/_data``. Raises `DataError` naming both places when the file is in neither.

    Book: notebooks/01_data.
    """
    candidates = [_PACKAGE / "_data" / relative, _PACKAGE.parent / "data" / relative]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise DataError(
        f"the project file {relative!r} is missing: looked for "
        + " and ".join(str(c) for c in candidates)
        + ". Reinstall the package, or run `git status` in the checkout to see what was removed."
    )


def cache_dir() -> Path:
    """Folder for decoded images and downloads: ``$MMDD_CACHE``, or the user's cache folder.

    Created on first use. Book: notebooks/01_data.
    """
    root = os.environ.get("MMDD_CACHE")
    path = Path(root) if root else Path(platformdirs.user_cache_dir("mmdd"))
    path.mkdir(parents=True, exist_ok=True)
    return path
