"""Decode a folder of images once, into one memory-mapped uint8 array that is whole or absent.

    <cache>/images/<source key>-<size>px/    a finished cache: images.npy, cache.json, journal.jsonl
    <cache>/images/<work key>.partial/       the same while it is being made
    <cache>/images/<work key>.lock           held by the process that is making it

The source key is made of the images' names and file sizes and the bytes of a sample of the files:
moving or copying the images keeps it, and opening a finished cache reads no image. A partial cache
is picked up where its journal ends; it gets its final name by one rename, after everything in it
has been synced to disk.
"""

import hashlib
import io
import json
import logging
import os
import shutil
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
from filelock import Timeout
from tqdm.auto import tqdm

from mmdd.data.decode import Undecodable, decode_image, truncation_is_an_error
from mmdd.data.report import Report
from mmdd.disk import FULL, locked, writing
from mmdd.errors import DataError
from mmdd.paths import cache_dir
from mmdd.seal import sealed, unsealed

log = logging.getLogger(__name__)

# Raised whenever the same file would decode to other pixels, so that old caches are not taken up.
_RECIPE = 1
# Files whose bytes enter the source key: sizes alone would not tell two sets of bitmaps apart.
_SAMPLED_FILES = 64
# At most this much work is lost to a kill; a sync per image would cost more than decoding it.
_FLUSH_ROWS = 256
_FLUSH_SECONDS = 1.0
# Images per task handed to a thread.
_CHUNK = 8
_SPARE_BYTES = 64 * 2**20
# Rows that are read at a time to check them: what they take in memory.
_CHECKED_ROWS = 64
_SIDECAR_FORMAT = 2  # the first with a checksum

_DATA, _SIDECAR, _JOURNAL = "images.npy", "cache.json", "journal.jsonl"

Failures = dict[str, dict[str, str]]


@dataclass(frozen=True)
class PreparedImages:
    """Decoded images and what is known about them.

    images: (k, size, size, 3) uint8, a read-only memory map. kept: (k,) int64, for each row its
    position in the list of names that was asked for. failures: kind of fault → {name: why}, the
    names without a row. content: sha256 over all pixels. identical: groups of names whose pixels
    are the same. path: the folder that holds the cache.

    Book: notebooks/01_data.
    """

    images: np.ndarray
    kept: np.ndarray
    failures: Failures
    content: str
    identical: list[list[str]]
    path: Path


@dataclass(frozen=True)
class _Row:
    """One journal line: the outcome for one image, and the file it came from."""

    row: int
    bytes: int
    mtime_ns: int
    pixels: str  # sha256 of the decoded pixels, empty when decoding failed
    kind: str = ""
    detail: str = ""


_Stat = tuple[int, int] | None  # bytes and modification time; None for no such file


def prepare_images(
    names: Sequence[str],
    root: str | Path,
    size: int,
    cache: str | Path | None = None,
    *,
    on_failures: Callable[[Failures], None] | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> PreparedImages:
    """Decode every `root/name` to (size, size, 3) uint8, or open the cache an earlier call made.

    names: distinct paths relative to `root`. cache: folder for caches, by default
    `mmdd.paths.cache_dir()`. on_failures is called once with the images that cannot be decoded
    (maybe none), before anything gets its final name; it may raise to refuse them (the default),
    or return to have them left out. workers: decoding threads, by default one per core. An
    interrupted call is continued by the next one, and two processes may ask for the same cache.

    Raises `SourceError` naming every image that cannot be decoded, and `DataError` for no or
    repeated names, a size below one, no folder `root`, no decodable image, or a full disk;
    `DiskError` where the cache may not be written. A finished cache is read once and checked when
    it is opened; one that is damaged is made again.

    Book: notebooks/01_data.
    """
    names = list(names)
    root = Path(root)
    _check_request(names, root, size)
    refuse = on_failures or _refuse(root)
    folder = Path(cache) if cache is not None else cache_dir()
    folder = folder / "images"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)

    stats = [_stat(root / name) for name in names]
    key = _source_key(names, root, stats)
    final = folder / f"{key[:20]}-{size}px"
    prepared = _open(final, names, size, key)
    if prepared is None:
        work = folder / f"{_work_key(names, root, size)[:20]}.partial"
        with _locked(work.with_suffix(".lock")), writing(work):
            prepared = _open(final, names, size, key)
            if prepared is None:
                _make(work, final, names, root, size, stats, key, refuse, workers, progress)
                # Every row's checksum was taken before it was written: nothing to find out.
                prepared = _open(final, names, size, key, check=False)
                if prepared is None:
                    raise DataError(f"the image cache {final} vanished or broke: run again.")
                return prepared
    refuse(prepared.failures)
    return prepared


def default_workers() -> int:
    """Decoding threads when the caller names no number: one per core this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


def _check_request(names: list[str], root: Path, size: int) -> None:
    if size < 1:
        raise DataError(f"images cannot be prepared at {size} px: give a size of at least 1.")
    if not names:
        raise DataError(f"no image names were given to prepare from {root}.")
    if len(set(names)) != len(names):
        raise DataError(f"the names of the images to prepare from {root} are not distinct.")
    if not root.is_dir():
        raise DataError(f"the image folder {root} does not exist: check image_root.")


def _refuse(root: Path) -> Callable[[Failures], None]:
    def refuse(failures: Failures) -> None:
        report = Report(f"images in {root}")
        report.extend(failures)
        report.settle("raise")

    return refuse


# Keys


def _stat(path: Path) -> _Stat:
    try:
        found = os.stat(path)
    except OSError:  # absent, or behind a forbidden folder: the decoder says which
        return None
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
        return None
    return found.st_size, found.st_mtime_ns


def _source_key(names: list[str], root: Path, stats: list[_Stat]) -> str:
    digest = hashlib.sha256(f"recipe {_RECIPE}\n".encode())
    for name, found in zip(names, stats, strict=True):
        digest.update(
            f"{name}\0{found[0] if found else 'missing'}\n".encode(errors="surrogatepass")
        )
    step = max(1, len(names) // _SAMPLED_FILES)
    for name, found in zip(names[::step], stats[::step], strict=True):
        if found is None:
            continue
        try:
            with open(root / name, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError:
            digest.update(b"unreadable")
    return digest.hexdigest()


def _work_key(names: list[str], root: Path, size: int) -> str:
    # Says what is being made, not from which bytes: the journal checks each file for itself, so
    # repairing one image does not cost decoding the others again. Rows of two Pillow versions
    # must not mix, their decoders may round differently.
    what = [_RECIPE, PIL.__version__, str(root.resolve()), size, names]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


# Opening a finished cache


def _open(
    folder: Path, names: list[str], size: int, key: str, check: bool = True
) -> PreparedImages | None:
    """The finished cache in `folder`, or None when there is none or it is damaged.

    check: whether its pixels are read and compared with their checksum.
    """
    try:
        sidecar = _read_sidecar(folder)
        if sidecar["source_key"] != key:
            return None
        failed = {name for group in sidecar["failures"].values() for name in group}
        kept = np.array([i for i, name in enumerate(names) if name not in failed], dtype=np.int64)
        images = _read_only(folder / sidecar["data"], len(kept), size)
        if check:
            rows = _row_digests(folder / sidecar["data"], range(len(kept)), len(kept), size)
            if _content(list(rows), size) != sidecar["content"]:
                raise ValueError("its pixels do not match their checksum")
    except FileNotFoundError:
        return None
    # What a sidecar from before it had a checksum can hold, too.
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        log.warning("the image cache %s is damaged (%s): it will be made again", folder, error)
        return None
    return PreparedImages(
        images, kept, sidecar["failures"], sidecar["content"], sidecar["identical"], folder
    )


def _read_sidecar(folder: Path) -> dict[str, Any]:
    sidecar = json.loads((folder / _SIDECAR).read_text(encoding="utf-8"))
    # Those of before have neither; a flipped bit leaves one of the two.
    if "format" in sidecar or "sha256" in sidecar:
        sidecar = unsealed(sidecar)
    return dict(sidecar)


def _read_only(data: Path, rows: int, size: int) -> np.ndarray:
    """The array of a file that starts and ends as it should, as a memory map."""
    header, shape = _header(rows, size), (rows, size, size, 3)
    with open(data, "rb") as file:
        if file.read(len(header)) != header:
            raise ValueError("its array does not begin as it should")
    if data.stat().st_size != len(header) + rows * size * size * 3:
        raise ValueError("its array does not have the size that it should")
    return np.memmap(data, np.uint8, "r", len(header), shape)


def _row_digests(data: Path, rows: Sequence[int], total: int, size: int) -> Iterator[bytes]:
    """SHA-256 of the pixels of some rows of an array file, in their order.

    Read, not mapped: pages of a map would count as memory of this process.
    """
    row_bytes, offset = size * size * 3, len(_header(total, size))
    with open(data, "rb") as file, ThreadPoolExecutor(default_workers()) as pool:

        def read(row: int) -> bytes:
            file.seek(offset + row * row_bytes)
            return file.read(row_bytes)

        for start in range(0, len(rows), _CHECKED_ROWS):
            part = rows[start : start + _CHECKED_ROWS]
            yield from pool.map(lambda held: hashlib.sha256(held).digest(), map(read, part))


def _content(digests: Sequence[bytes], size: int) -> str:
    """What names all pixels together. digests: SHA-256 of each row."""
    content = hashlib.sha256(f"{len(digests)} {size} {size} 3\n".encode())
    for digest in digests:
        content.update(digest)
    return content.hexdigest()


# Making a cache


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes out; the system drops the lock if its holder is killed."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path, 0))
        except Timeout:
            log.info("another process is preparing these images (%s): waiting", path)
            stack.enter_context(locked(path))
        yield


def _make(
    work: Path,
    final: Path,
    names: list[str],
    root: Path,
    size: int,
    stats: list[_Stat],
    key: str,
    on_failures: Callable[[Failures], None],
    workers: int | None,
    progress: bool,
) -> None:
    if final.exists():  # `_open` found it damaged
        shutil.rmtree(final)
    work.mkdir(exist_ok=True)
    stopped = _open(work, names, size, key)  # an earlier call was stopped just before the rename
    if stopped is None:
        (work / _SIDECAR).unlink(missing_ok=True)
        try:
            rows = _decode_all(work, names, root, size, stats, workers, progress)
            failures = _failures(names, rows)
            on_failures(failures)
            _seal(work, names, size, rows, failures, key, progress)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise DataError(
                f"the disk is full while preparing images in {work}: make room and run again, "
                "what is decoded so far is kept."
            ) from error
    else:
        on_failures(stopped.failures)
    _tidy(work)
    try:
        os.rename(work, final)
    except OSError:
        # The same images under another root finished first: one copy is enough.
        if not final.exists():
            raise
        shutil.rmtree(work)
    _sync_folder(final.parent)


def _decode_all(
    work: Path,
    names: list[str],
    root: Path,
    size: int,
    stats: list[_Stat],
    workers: int | None,
    progress: bool,
) -> list[_Row]:
    """Decode what the journal does not already hold; the outcome of every image, in order."""
    data, journal = work / _DATA, work / _JOURNAL
    header = _header(len(names), size)
    row_bytes = size * size * 3
    length = len(header) + len(names) * row_bytes
    whole = data.exists() and data.stat().st_size == length
    done = _read_journal(journal, stats) if whole else {}
    done = _still_there(data, done, len(names), size)
    _allocate(data, header, length, fresh=not done)
    _write_atomically(journal, "".join(_line(done[i]) for i in sorted(done)))
    if done:
        log.info("resuming: %d of %d images already decoded", len(done), len(names))
    threads = workers or default_workers()
    todo = [i for i in range(len(names)) if i not in done]
    started = time.monotonic()

    def outcome(row: int, pixels: BinaryIO) -> _Row:
        length, mtime_ns = stats[row] or (-1, -1)
        try:
            array = decode_image(root / names[row], size)
        except Undecodable as error:
            return _Row(row, length, mtime_ns, "", error.kind, error.detail)
        pixels.seek(len(header) + row * row_bytes)
        _write_all(pixels, array)
        return _Row(row, length, mtime_ns, hashlib.sha256(array.data).hexdigest())

    def outcomes(rows: list[int]) -> list[_Row]:
        with open(data, "r+b", buffering=0) as pixels:  # a position of its own for every thread
            return [outcome(row, pixels) for row in rows]

    with (
        open(data, "r+b", buffering=0) as pixels,
        open(journal, "a", encoding="utf-8") as lines,
        tqdm(
            total=len(names), initial=len(done), desc="decoding", unit="img", disable=not progress
        ) as bar,
        truncation_is_an_error(),
    ):
        waiting: list[_Row] = []
        flushed = started
        for row in _in_order(outcomes, todo, threads):
            waiting.append(row)
            done[row.row] = row
            bar.update()
            if len(waiting) >= _FLUSH_ROWS or time.monotonic() - flushed >= _FLUSH_SECONDS:
                _flush(pixels, lines, waiting)
                waiting, flushed = [], time.monotonic()
        _flush(pixels, lines, waiting)
    log.info("decoded %d images to %d px in %.1f s", len(todo), size, time.monotonic() - started)
    return [done[i] for i in range(len(names))]


def _in_order(
    outcomes: Callable[[list[int]], list[_Row]], todo: list[int], threads: int
) -> Iterator[_Row]:
    """Outcomes in order, worked out ahead of the consumer by a few chunks and what it flushes.

    Pixels are written by the thread that decodes them, so what waits here is a line per image, and
    decoding goes on while the consumer waits for the disk. Threads, not processes: Pillow lets go
    of the interpreter while it decodes and scales, and threads were as fast or faster on two cores,
    without a second interpreter's memory.
    """
    ahead = 2 * threads + _FLUSH_ROWS // _CHUNK
    chunks = (todo[i : i + _CHUNK] for i in range(0, len(todo), _CHUNK))
    pending: deque[Future[list[_Row]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        while True:
            while len(pending) < ahead and (chunk := next(chunks, None)) is not None:
                pending.append(pool.submit(outcomes, chunk))
            if not pending:
                return
            yield from pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _header(rows: int, size: int) -> bytes:
    """The start of a .npy file of (rows, size, size, 3) uint8."""
    buffer = io.BytesIO()
    shape = (rows, size, size, 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def _allocate(data: Path, header: bytes, length: int, fresh: bool) -> None:
    """Give the array file its header and full length; with `fresh` nothing of it is kept."""
    present = 0 if fresh else getattr(data.stat(), "st_blocks", 0) * 512
    _require_space(data.parent, length - present, "decode to")
    with open(data, "wb" if fresh else "r+b") as file:
        file.write(header)
        file.truncate(length)


def _require_space(folder: Path, needed: int, purpose: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed + _SPARE_BYTES > free:
        raise DataError(
            f"not enough disk space to {purpose} {folder}: {needed / 2**30:.1f} GiB needed, "
            f"{free / 2**30:.1f} GiB free. Make room, or point MMDD_CACHE at a larger disk."
        )


def _write_all(file: BinaryIO, array: np.ndarray) -> None:
    view = array.data.cast("B")
    while view:  # an unbuffered write may be short
        view = view[file.write(view) :]


def _flush(pixels, lines, rows: list[_Row]) -> None:
    # The order matters: a journal line promises that its pixels are on disk.
    os.fsync(pixels.fileno())
    lines.writelines(_line(row) for row in rows)
    lines.flush()
    os.fsync(lines.fileno())


def _line(row: _Row) -> str:
    return json.dumps(row.__dict__) + "\n"


def _read_journal(journal: Path, stats: list[_Stat]) -> dict[int, _Row]:
    """Rows that were decoded from files which have not changed since. Failures are tried again."""
    done: dict[int, _Row] = {}
    try:
        text = journal.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return done
    for line in text.splitlines(keepends=True):
        try:
            row = _Row(**json.loads(line))
        except (ValueError, TypeError):
            break  # cut off by a kill: everything after it is unknown
        if not line.endswith("\n"):
            break
        known = isinstance(row.row, int) and 0 <= row.row < len(stats)
        if row.pixels and known and stats[row.row] == (row.bytes, row.mtime_ns):
            done[row.row] = row
    return done


def _still_there(data: Path, done: dict[int, _Row], total: int, size: int) -> dict[int, _Row]:
    """The rows whose pixels are what the journal promises."""
    if not done:
        return {}
    rows = list(done)
    digests = zip(rows, _row_digests(data, rows, total, size), strict=True)
    whole = {row: done[row] for row, digest in digests if digest.hex() == done[row].pixels}
    if len(whole) < len(done):
        log.warning("%d images of %s are damaged and decoded again", len(done) - len(whole), data)
    return whole


def _failures(names: list[str], rows: list[_Row]) -> Failures:
    failures: Failures = {}
    for name, row in zip(names, rows, strict=True):
        if not row.pixels:
            failures.setdefault(row.kind, {})[name] = row.detail
    return failures


def _seal(
    work: Path,
    names: list[str],
    size: int,
    rows: list[_Row],
    failures: Failures,
    key: str,
    progress: bool,
) -> None:
    """Close the gaps that failures left, and write the sidecar that declares the cache complete."""
    kept = [row for row in rows if row.pixels]
    if not kept:
        raise DataError(f"none of the {len(names)} images could be decoded.")
    data = _DATA
    if failures:
        data = "kept.npy"
        offset = len(_header(len(names), size))
        _copy_rows(work / _DATA, work / data, offset, [row.row for row in kept], size, progress)
    owners: dict[str, list[str]] = {}
    for row in kept:
        owners.setdefault(row.pixels, []).append(names[row.row])
    sidecar = {
        "format": _SIDECAR_FORMAT,
        "data": data,
        "source_key": key,
        "size": size,
        "content": _content([bytes.fromhex(row.pixels) for row in kept], size),
        "failures": failures,
        "identical": [group for group in owners.values() if len(group) > 1],
        "pillow": PIL.__version__,
    }
    _write_atomically(work / _SIDECAR, json.dumps(sealed(sidecar), indent=1))


def _tidy(work: Path) -> None:
    """Remove what the sidecar does not name, such as rows from before the gaps were closed."""
    data = json.loads((work / _SIDECAR).read_text(encoding="utf-8"))["data"]
    for path in work.iterdir():
        if path.name not in (data, _SIDECAR, _JOURNAL):
            path.unlink()
    _sync_folder(work)


def _copy_rows(
    source: Path, target: Path, offset: int, rows: list[int], size: int, progress: bool
) -> None:
    row_bytes = size * size * 3
    _require_space(target.parent, len(rows) * row_bytes, "leave out undecodable images in")
    with open(source, "rb") as reader, open(target, "wb") as writer:
        writer.write(_header(len(rows), size))
        for row in tqdm(rows, desc="compacting", unit="img", disable=not progress):
            reader.seek(offset + row * row_bytes)
            writer.write(reader.read(row_bytes))
        writer.flush()
        os.fsync(writer.fileno())


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
