"""Forget executed notebooks when something that they import or read has changed.

The execution cache of jupyter-book is keyed on the code cells alone: after a change in mmdd/ or
results/ it would show old outputs, and Sphinx would not even read the unchanged notebook again.
This script keeps a hash of those inputs beside the cache and empties both when it differs.
"""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATTERNS = (
    "mmdd/**/*.py",
    "results/*.jsonl",
    "results/shown/*",
    "data/published/*",
    "data/pretrained/*",
    "sweeps/*.yaml",
    "requirements.lock",
)


def inputs(root: Path) -> Iterator[Path]:
    """Files that a notebook's output depends on besides its own cells, in a fixed order."""
    for pattern in PATTERNS:
        yield from sorted(path for path in root.glob(pattern) if path.is_file())


def inputs_hash(root: Path) -> str:
    """SHA-256 over the names and contents of the inputs, as 64 hex digits."""
    digest = hashlib.sha256()
    for path in inputs(root):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(root).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def refresh(root: Path) -> bool:
    """Empty the caches under `root` if the inputs changed since the last call; True if it did."""
    build = root / "_build"
    stamp = build / ".inputs.sha"
    now = inputs_hash(root)
    if stamp.is_file() and stamp.read_text() == now:
        return False
    for cache in (".jupyter_cache", ".doctrees"):
        if (build / cache).exists():
            shutil.rmtree(build / cache)
    build.mkdir(parents=True, exist_ok=True)
    stamp.write_text(now)
    return True


def main() -> None:
    if refresh(ROOT):
        print("mmdd/, results/ or data/ changed since the last build: all notebooks run again")


if __name__ == "__main__":
    main()
