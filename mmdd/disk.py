"""What a disk refuses, said by name: full, read-only, forbidden; and locks that say so too."""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from mmdd.errors import DiskError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FORBIDDEN = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says while `path` is written into a `DiskError` that names it.

    Book: notebooks/run.
    """
    try:
        yield
    except Timeout:  # an OSError too, of a lock that another process holds
        raise
    except OSError as error:
        raise _named(path, error.errno, error) from error
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise _named(path, int(number[1]), error) from error


def _named(path: Path, number: int | None, error: Exception) -> DiskError:
    if number in FULL:
        why = "the disk, a quota or a limit on file sizes is full: make room"
    elif number in _FORBIDDEN:
        why = "the folder may not be written: choose another one, or change its permissions"
    else:
        why = f"the system says: {os.strerror(number) if number else error}"
    return DiskError(
        f"{path} could not be written: {why}. What was there before is kept; run again to go on."
    )


@contextmanager
def locked(path: Path, timeout: float = -1.0) -> Iterator[None]:
    """Hold the lock file `path`; the system drops it when its holder is killed.

    timeout: seconds to wait, without end if negative. Raises `filelock.Timeout` when another
    process holds it for longer, and `DiskError` where it cannot be made.
    """
    lock = FileLock(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=timeout)
    try:
        yield
    finally:
        lock.release()


def require_writable(folder: Path) -> None:
    """Make `folder` if need be and try whether a file can be put into it.

    Raises `DiskError` before any work is done for nothing.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
