"""Files that are either whole or absent: atomic writes, and tensors with JSON beside them.

Nothing here unpickles: nested states are split into safetensors and a JSON header. What is read
back later carries a checksum of all that it says, so that a flipped bit is an error, not a result.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmdd.disk import writing
from mmdd.errors import ArtefactError
from mmdd.seal import CHECKSUM, canonical

log = logging.getLogger(__name__)

_FORMAT_KEY = "mmdd"
_ABANDONED_SECONDS = 3600.0


def atomic_write(path: Path, write: Callable[[Path], None], previous: Path | None = None) -> None:
    """Call `write` with a temporary path beside `path`, flush it to disk, rename it into place.

    After a kill at any moment `path` holds its old content or its new one, never a part. previous:
    where the old content goes; between two renames it is then there and nothing at `path`. Raises
    `DiskError` naming `path` when the disk is full or the folder may not be written; the old
    content stays.
    """
    with writing(path):
        _replace(path, write, previous)


def _replace(path: Path, write: Callable[[Path], None], previous: Path | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder, as writers such as safetensors put temporary files of their own beside the file.
    # What a kill leaves of it goes with a later write, when nobody can be at it any more.
    for left in path.parent.glob(f".{path.name}.*.part"):
        with suppress(FileNotFoundError):  # another process has just finished with it
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        dir=path.parent, prefix=f".{path.name}.", suffix=".part"
    ) as folder:
        temporary = Path(folder) / path.name
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors makes it private; give it the usual rights
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    _sync_folder(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """`atomic_write` for a string, as UTF-8."""
    atomic_write(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    previous: Path | None = None,
) -> None:
    """Write tensors and a JSON header into one .safetensors file, as `atomic_write` does."""
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    metadata = {_FORMAT_KEY: json.dumps(header, sort_keys=True)}
    atomic_write(
        path, lambda temporary: save_file(contiguous, temporary, metadata=metadata), previous
    )


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: (tensors on the CPU, header).

    Raises `ArtefactError` naming the file when it is missing, damaged, or not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ArtefactError(f"{path} does not exist.") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtefactError(
            f"{path} is not a readable .safetensors file ({error}): it is damaged or cut off; "
            "make it again or fetch a fresh copy."
        ) from error
    try:
        header = json.loads(metadata[_FORMAT_KEY])
    except (KeyError, ValueError, RecursionError) as error:
        raise ArtefactError(
            f"{path} is a .safetensors file, but not one that mmdd wrote: its header is missing."
        ) from error
    if not isinstance(header, dict):
        raise ArtefactError(f"{path}: the header is a {type(header).__name__}, not an object.")
    return tensors, header


def pack_state(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Split nested dicts and lists into (tensors by path, JSON skeleton with references)."""
    tensors: dict[str, Tensor] = {}

    def visit(node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            # The paths in {1: …, "1": …} or {"a/b": …, "a": {"b": …}} look alike: keep both.
            name = path
            while name in tensors:
                name += "#"
            # Clone: two names may share one storage, which safetensors refuses.
            tensors[name] = node.detach().clone()
            return {"tensor": name}
        if isinstance(node, Mapping):
            return {"items": [[key, visit(value, f"{path}/{key}")] for key, value in node.items()]}
        if isinstance(node, list | tuple):
            return {"list": [visit(value, f"{path}/{i}") for i, value in enumerate(node)]}
        return {"value": node}

    return tensors, visit(state, "")


def unpack_state(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """The inverse of `pack_state`; tuples come back as lists."""
    if "tensor" in skeleton:
        return tensors[skeleton["tensor"]]
    if "items" in skeleton:
        return {key: unpack_state(tensors, value) for key, value in skeleton["items"]}
    if "list" in skeleton:
        return [unpack_state(tensors, value) for value in skeleton["list"]]
    return skeleton["value"]


def save_state(path: Path, state: Any, previous: Path | None = None) -> None:
    """Save a nested state (dicts, lists, tensors, JSON values) atomically, without pickling."""
    tensors, skeleton = pack_state(state)
    save_checked(path, tensors, {"state": skeleton}, previous)


def load_state(path: Path) -> Any:
    """Load what `save_state` wrote. Raises `ArtefactError` naming a damaged file."""
    tensors, header = load_tensors(path)
    if "state" not in header:
        raise ArtefactError(f"{path} holds no saved state: it is another kind of mmdd file.")
    verify(path, tensors, header)
    try:
        return unpack_state(tensors, header["state"])
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path}: the saved state is incomplete ({error}).") from error


def save_checkpoint(path: Path, state: Any) -> None:
    """`save_state`, where the state that `path` held so far is kept beside it."""
    save_state(path, state, _previous(path))


def load_checkpoint(path: Path) -> Any | None:
    """The latest state of `save_checkpoint` that is whole, or None where there is none.

    A damaged one is warned of, and the one before it taken.
    """
    for candidate in (path, _previous(path)):
        if not candidate.exists():
            continue
        try:
            return load_state(candidate)
        except ArtefactError as error:
            log.warning(
                "%s It is left out: going on from an older state, or from the start.", error
            )
    return None


def remove_checkpoint(path: Path) -> None:
    """Remove what `save_checkpoint` has written, if there is something."""
    with writing(path):
        for candidate in (path, _previous(path)):
            if candidate.exists():  # on a disk that may only be read there is nothing to say then
                candidate.unlink(missing_ok=True)


def _previous(path: Path) -> Path:
    return path.with_suffix(f".previous{path.suffix}")


def save_checked(
    path: Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    previous: Path | None = None,
) -> None:
    """`save_tensors` with a checksum of tensors and header in the header."""
    told = {**header, CHECKSUM: content_sha256(tensors, header)}
    save_tensors(path, tensors, told, previous)


def load_checked(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`load_tensors` of what `save_checked` wrote. Raises `ArtefactError` for any other bit."""
    tensors, header = load_tensors(path)
    verify(path, tensors, header)
    return tensors, header


def verify(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Raise `ArtefactError` naming `path` unless the checksum in the header fits the content."""
    if content_sha256(tensors, header) != header.get(CHECKSUM):
        raise ArtefactError(
            f"{path}: the checksum in the header does not match the content: the file was changed "
            "or damaged; fetch a fresh copy, or remove it to make it again."
        )


def content_sha256(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """SHA-256 over tensors and a JSON header, as 64 hex digits; a checksum in it does not count."""
    return hashlib.sha256(f"{tensors_sha256(tensors)}|{canonical(header)}".encode()).hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
