"""Fetch public sources: checksums, resume, free space, safe unpacking. Nothing runs at import."""

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from mmdd.data.sources import SOURCES, HubFile, RemoteFile, Source
from mmdd.data.transfer import ResumingDownloader, require_free_space
from mmdd.data.unpack import unpack_zip, unpacked_note
from mmdd.errors import DownloadError
from mmdd.paths import cache_dir

log = logging.getLogger(__name__)


def fetch(
    source: str | Source,
    root: str | Path | None = None,
    *,
    progress: bool = True,
    keep_archives: bool = False,
    retries: int = 6,
    backoff: float = 1.0,
    endpoint: str | None = None,
) -> dict[str, Path]:
    """Fetch every file of a public source into `root`/<name of the source>, unpack its archives.

    source: a name in `mmdd.data.sources.SOURCES`, or a `Source`. root: by default
    `mmdd.paths.cache_dir()`/downloads. keep_archives: keep the .zip beside its contents. retries,
    backoff: see `mmdd.data.transfer.ResumingDownloader`. endpoint: another Hugging Face hub.

    Returns {name of the file: path of the file, or of the folder it was unpacked to}. What is
    already there is not fetched again; what was interrupted is continued. Where nobody published a
    checksum, the sum of the first download is recorded in <file>.sha256.json, and any later
    download must agree with it.

    Raises `DownloadError` saying which file, why, and what to do.

    Book: notebooks/01_data.
    """
    if isinstance(source, str):
        if source not in SOURCES:
            raise DownloadError(f"no source is named {source!r}; known: {', '.join(SOURCES)}.")
        source = SOURCES[source]
    folder = (Path(root) if root is not None else cache_dir() / "downloads") / source.name
    folder.mkdir(parents=True, exist_ok=True)
    log.info("%s — %s Terms: %s", source.title, source.licence, source.homepage)
    paths = {}
    for file in source.files:
        with FileLock(folder / f"{file.name}.lock"):
            paths[file.name] = _fetch_one(
                file, folder, progress, keep_archives, retries, backoff, endpoint
            )
    return paths


def fetch_url(
    url: str,
    path: str | Path,
    *,
    sha256: str | None = None,
    progress: bool = True,
    retries: int = 6,
    backoff: float = 1.0,
) -> Path:
    """Download `url` to `path`, resuming, and check it; a right file already there is kept.

    sha256: hex digits, or the leading ones; None to trust the first download and hold later ones
    to it (recorded in <path>.sha256.json).

    Raises `DownloadError` when the server refuses, the connection keeps failing, the disk is too
    small, or the bytes are not the expected ones (they are removed).

    Book: notebooks/01_data.
    """
    import pooch

    path = Path(path)
    expected = _expected(path, sha256)
    if path.exists() and _verify(path, expected, url):
        return path
    path.unlink(missing_ok=True)
    full = expected if expected and len(expected) == 64 else None
    downloader = ResumingDownloader(
        path.with_name(path.name + ".part"), retries=retries, backoff=backoff, progress=progress
    )
    # Bytes that an earlier process left may be the wrong ones: one more try from the start.
    for last_try in (False, True):
        downloader.resumed = False
        try:
            with _quiet_pooch():
                pooch.retrieve(
                    url,
                    known_hash=f"sha256:{full}" if full else None,
                    fname=path.name,
                    path=path.parent,
                    downloader=downloader,
                )
        except ValueError as error:  # pooch's word for another checksum
            if downloader.resumed and not last_try:
                log.warning("%s: the resumed download has another checksum, starting over", url)
                continue
            found = re.findall(r"[0-9a-f]{64}", str(error))[-1:] or ["another"]
            raise _wrong_bytes(url, str(full), found[0]) from error
        break
    came = _sha256(path)
    if expected and not came.startswith(expected):
        path.unlink()
        raise _wrong_bytes(url, expected, came)
    _record(path, url, came, trusted=sha256 is not None)
    return path


def fetch_hub(
    file: HubFile,
    path: str | Path,
    *,
    sha256: str | None = None,
    progress: bool = True,
    endpoint: str | None = None,
) -> Path:
    """Download a file of a Hugging Face repository to `path` (huggingface_hub resumes by itself).

    sha256: as for `fetch_url`; when None, the sum that the hub states for large files is used.
    endpoint: another hub than huggingface.co.

    Raises `DownloadError` as `fetch_url` does.

    Book: notebooks/01_data.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    path = Path(path)
    where = f"{file.repo}/{file.path}"
    expected = _expected(path, sha256)
    if path.exists() and _verify(path, expected, where):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    store = path.with_name(path.name + ".hub")
    try:
        url = hf_hub_url(
            file.repo,
            file.path,
            repo_type=file.repo_type,
            revision=file.revision,
            endpoint=endpoint,
        )
        metadata = get_hf_file_metadata(url, endpoint=endpoint)
        stated = metadata.etag if metadata.etag and len(metadata.etag) == 64 else None
        require_free_space(path.parent, metadata.size or 0, f"to download {where}")
        with _hub_progress(progress):
            found_path = hf_hub_download(
                file.repo,
                file.path,
                repo_type=file.repo_type,
                revision=file.revision,
                local_dir=store,
                endpoint=endpoint,
            )
    except DownloadError:
        raise
    except Exception as error:
        # The hub library has changed its HTTP client more than once; the errors share no base.
        raise DownloadError(
            f"cannot download {where} from the Hugging Face hub: {error}. Check the connection "
            "(and a login, if the repository asks for one) and run again: it goes on where it was."
        ) from error
    found = _sha256(Path(found_path))
    wanted = expected or stated
    if wanted and not found.startswith(wanted):
        Path(found_path).unlink()
        raise _wrong_bytes(where, wanted, found)
    os.replace(found_path, path)
    _record(path, where, found, trusted=sha256 is not None or stated is not None)
    return path


def _fetch_one(
    file: RemoteFile,
    folder: Path,
    progress: bool,
    keep_archives: bool,
    retries: int,
    backoff: float,
    endpoint: str | None,
) -> Path:
    path = folder / file.name
    target = folder / file.unpack_to if file.unpack_to else None
    if target is not None and (note := unpacked_note(target)) is not None:
        wanted = _expected(path, file.sha256)
        if not wanted or str(note.get("sha256", "")).startswith(wanted):
            return target
    if file.hub is not None:
        fetch_hub(file.hub, path, sha256=file.sha256, progress=progress, endpoint=endpoint)
    elif file.url is not None:
        fetch_url(
            file.url, path, sha256=file.sha256, progress=progress, retries=retries, backoff=backoff
        )
    else:
        raise DownloadError(f"the source's file {file.name} has neither an address nor a hub.")
    if target is None:
        return path
    try:
        unpack_zip(
            path,
            target,
            max_bytes=file.max_bytes,
            note={"sha256": _expected(path, None)},
            progress=progress,
        )
    except DownloadError:
        if file.sha256 is None:  # such as an error page: its sum must not bind later downloads
            path.unlink(missing_ok=True)
            _lock_file(path).unlink(missing_ok=True)
        raise
    if not keep_archives:
        path.unlink()
    return target


# Checksums


def _lock_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256.json")


def _expected(path: Path, sha256: str | None) -> str | None:
    """The checksum a file must have: the published one, else that of its first download."""
    if sha256 is not None:
        return sha256.lower()
    try:
        recorded = json.loads(_lock_file(path).read_text(encoding="utf-8"))["sha256"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise DownloadError(
            f"{_lock_file(path)} is damaged: remove it to trust the next download anew."
        ) from None
    return str(recorded)


def _verify(path: Path, expected: str | None, where: str) -> bool:
    """Whether a file that is already there may stay."""
    found = _sha256(path)
    if expected is None or found.startswith(expected):
        _record(path, where, found, trusted=expected is not None)
        return True
    log.warning("%s is not the expected file (sha256 %s…): fetching it again", path, found[:12])
    return False


def _record(path: Path, where: str, sha256: str, trusted: bool) -> None:
    lock = _lock_file(path)
    if lock.exists():
        return
    if not trusted:
        log.info(
            "%s: no checksum is published for it; recorded sha256 %s in %s, later downloads must "
            "agree",
            where,
            sha256,
            lock.name,
        )
    content = {"source": where, "sha256": sha256, "bytes": path.stat().st_size}
    temporary = lock.with_name(lock.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(temporary, lock)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _wrong_bytes(where: str, expected: str, found: str) -> DownloadError:
    return DownloadError(
        f"{where} sent other bytes than expected (sha256 {found} instead of {expected}); they were "
        "removed. Try again; if it stays so, the file changed at its source: compare with what its "
        "owner publishes, and only then remove the .sha256.json beside it."
    )


@contextlib.contextmanager
def _quiet_pooch() -> Iterator[None]:
    # pooch prints the sum of every unchecked file as if to paste it; here it is recorded instead.
    import pooch

    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _hub_progress(progress: bool) -> Iterator[None]:
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if progress or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
