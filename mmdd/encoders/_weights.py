"""Reading pretrained weights without running anything that came with them."""

import hashlib
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmdd.errors import ConfigError, DataError
from mmdd.paths import data_file

# Keys under which training scripts keep the parameters inside a larger checkpoint.
_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")


def find_weights(weights: str) -> Path:
    """Path of a weights file: an existing path, or the name of a file in ``data/pretrained``.

    Raises `ConfigError` naming every place that was looked at.
    """
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    shipped = ""
    if not path.is_absolute():
        try:
            return data_file(f"pretrained/{weights}")
        except DataError:
            shipped = " and no file of that name ships in data/pretrained"
    raise ConfigError(
        f"weights {weights!r} not found: {path.absolute()} is not a file{shipped}. "
        "Give the path of a .safetensors or .pth file, or leave the weights random."
    )


def weights_identity(weights: str | None) -> str | None:
    """What names weights in a record: a path is told by its last part and its content.

    "hub", "random", "package", a file that ships with the project and None stay as they are.
    """
    path = Path(weights).expanduser() if weights else None
    if path is None or weights in ("hub", "random", "package") or not path.exists():
        return weights
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return f"local:{path.name}:{_content_of(files)}"


def shipped_content(weights: str | None) -> str | None:
    """12 hex digits of a weights file that ships with the project; None for any other weights."""
    if not weights or weights in ("hub", "random", "package") or ":" in weights:
        return None
    try:
        path = data_file(f"pretrained/{weights}")
    except DataError:
        return None
    return _content_of([path])


def _content_of(files: list[Path]) -> str:
    return _content(tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files))


@lru_cache(maxsize=32)
def _content(stamps: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, _, _ in stamps:
        with open(name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of a ``torch.save`` checkpoint, on the CPU.

    A checkpoint may nest its parameters under ``state_dict`` or ``model``, and may carry the
    ``module.`` prefix of `torch.nn.DataParallel`; both are undone. Only tensors and plain
    containers are read (``weights_only=True``), so no code inside the file can run.
    Raises `ConfigError` when the file is damaged or holds something else.
    """
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        # torch's own message advises to load the file all the same.
        why = "it holds more than tensors, and reading the rest could run code"
        raise _unreadable(path, why) from error
    except Exception as error:
        # A damaged file fails with whatever its bytes happen to trigger (SafetensorError,
        # IndexError, UnicodeDecodeError, ...): there is no list to name.
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error
    if isinstance(content, dict):
        content = next((content[k] for k in _NESTED if isinstance(content.get(k), dict)), content)
    if not isinstance(content, dict):
        raise _unreadable(path, f"expected a dictionary of tensors, found {type(content).__name__}")
    state = {
        key.removeprefix("module."): value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if not state:
        raise _unreadable(path, "it holds no tensors")
    return state


def _unreadable(path: Path, why: str) -> ConfigError:
    first_line = why.strip().split("\n", 1)[0][:300]
    return ConfigError(
        f"cannot read weights from {path}: {first_line}. "
        "Expected a .safetensors file, or a checkpoint that torch.load(weights_only=True) accepts; "
        "download it again or convert it to safetensors."
    )


def fit_weights(
    module: nn.Module, state: dict[str, Tensor], source: str, ignore: tuple[str, ...] = ()
) -> None:
    """Copy ``state`` into ``module``, every tensor exactly once.

    Entries whose name starts with one of ``ignore`` (a classifier, say) are left out. Floating
    tensors are converted to the module's type, so half-precision files fit float32 modules.
    Raises `ConfigError` naming ``source`` and the first missing, unexpected or misshapen entries.
    """
    wanted = module.state_dict()
    # Batch counters steer momentum=None batch norm only; old checkpoints do not have them.
    counters = {k for k in wanted if k.endswith("num_batches_tracked")}
    given = {k: v for k, v in state.items() if not k.startswith(ignore)} if ignore else dict(state)
    missing = sorted(wanted.keys() - given.keys() - counters)
    unexpected = sorted(given.keys() - wanted.keys())
    misshapen = [
        f"{k} {tuple(given[k].shape)} instead of {tuple(wanted[k].shape)}"
        for k in sorted(given.keys() & wanted.keys())
        if given[k].shape != wanted[k].shape
    ]
    problems = [
        f"{len(names)} {what} ({_first(names)})"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if names
    ]
    if problems:
        raise ConfigError(
            f"the weights in {source} do not fit {type(module).__name__}: entries "
            + "; ".join(problems)
            + ". Choose the architecture these weights were made for, or other weights."
        )
    module.load_state_dict(given, strict=False)


def _first(names: list[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
