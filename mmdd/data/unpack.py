"""Unpack a zip archive that need not be trusted: whole or not at all, never outside a folder."""

import json
import lzma
import os
import shutil
import stat
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from tqdm.auto import tqdm

from mmdd.data.transfer import require_free_space
from mmdd.errors import DownloadError

MARKER = ".unpacked.json"
_CHUNK = 1 << 20
_MAX_FILES = 1_000_000
# What `zipfile` raises on its way through a damaged archive; ValueError where a name is no text.
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    LookupError,
)
# What macOS leaves in archives; no part of any data set.
_LITTER = ("__MACOSX", ".DS_Store")


def unpack_zip(
    archive: Path,
    destination: Path,
    *,
    max_bytes: int,
    note: dict[str, object] | None = None,
    progress: bool = True,
) -> Path:
    """Unpack `archive` into the folder `destination`, which appears only once everything is in it.

    A single folder at the top of the archive is left away. max_bytes: refuse an archive that would
    take more. note: JSON values to keep with the result (see `unpacked_note`). An existing
    `destination` is replaced.

    Raises `DownloadError`, leaving no `destination`, for a damaged or encrypted archive, a member
    that is a link or device or would leave the folder, two members of one name, too many bytes or
    files, or a full disk.

    Book: notebooks/01_data.
    """
    partial = destination.with_name(destination.name + ".partial")
    _clear(partial)
    partial.mkdir(parents=True)
    try:
        with zipfile.ZipFile(archive) as content:
            members = _checked_members(content, archive, max_bytes)
            total = sum(info.file_size for _, info in members)
            require_free_space(partial, total, f"to unpack {archive.name}")
            with tqdm(
                total=total,
                unit="B",
                unit_scale=True,
                desc=f"unpacking {archive.name}",
                disable=not progress,
            ) as bar:
                for target, info in members:
                    _unpack_member(content, info, partial / target, bar)
    except _DAMAGED as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise DownloadError(f"{archive} is not a usable zip archive: {error}") from error
    except (DownloadError, OSError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, DownloadError):
            raise
        raise DownloadError(f"cannot unpack {archive} into {destination}: {error}") from error
    marker = {"files": len(members), "bytes": total, **(note or {})}
    (partial / MARKER).write_text(json.dumps(marker), encoding="utf-8")
    _clear(destination)
    os.replace(partial, destination)
    return destination


def _clear(folder: Path) -> None:
    """Remove a folder, or a link in its place but never what the link leads to."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def unpacked_note(destination: Path) -> dict[str, object] | None:
    """What was noted when `destination` was unpacked, or None if it never was, or not wholly."""
    try:
        note = json.loads((destination / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else None


def _checked_members(
    content: zipfile.ZipFile, archive: Path, max_bytes: int
) -> list[tuple[PurePosixPath, zipfile.ZipInfo]]:
    members: list[tuple[PurePosixPath, zipfile.ZipInfo]] = []
    for info in content.infolist():
        path = PurePosixPath(info.filename)
        if path.parts and (path.parts[0] == _LITTER[0] or path.name == _LITTER[1]):
            continue
        reason = _why_unsafe(info, path)
        if reason:
            raise DownloadError(
                f"{archive} is refused, nothing is unpacked: its member {info.filename!r} {reason}."
            )
        if not info.is_dir():
            members.append((path, info))
    if not members:
        raise DownloadError(f"{archive} holds no file.")
    if len(members) > _MAX_FILES:
        raise DownloadError(
            f"{archive} is refused: {len(members):,} files, at most {_MAX_FILES:,}."
        )
    total = sum(info.file_size for _, info in members)
    if total > max_bytes:
        raise DownloadError(
            f"{archive} is refused: it would unpack to {total:,} bytes, at most {max_bytes:,}."
        )
    tops = {path.parts[0] for path, _ in members}
    if len(tops) == 1 and all(len(path.parts) > 1 for path, _ in members):
        members = [(PurePosixPath(*path.parts[1:]), info) for path, info in members]
    # Compared without case: two such members would be one file on macOS and Windows.
    if len({str(path).casefold() for path, _ in members}) < len(members):
        raise DownloadError(f"{archive} is refused: two of its members have the same name.")
    return members


def _why_unsafe(info: zipfile.ZipInfo, path: PurePosixPath) -> str | None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    if info.flag_bits & 0x1:
        return "is encrypted"
    if path.is_absolute() or ".." in path.parts or not path.parts:
        return "would be written outside the folder"
    if any(character in info.filename for character in "\\:\0"):
        return "has a name that some systems read as a path"
    return None


def _unpack_member(
    content: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, bar: tqdm
) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Reading a member stops at its announced length, which `max_bytes` was checked against.
    with content.open(info) as reader, open(target, "xb") as writer:
        while chunk := reader.read(_CHUNK):
            writer.write(chunk)
            bar.update(len(chunk))
