"""Which code and which machine made a number."""

import ast
import hashlib
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent
# Modules that only show, fetch or launch: changing them changes no result.
_WITHOUT_EFFECT = {
    "__main__.py",
    "data/download.py",
    "doctor.py",
    "plots.py",
    "presets.py",
    "provenance.py",
    "published.py",
    "store.py",
    "sweep.py",
    "tables.py",
}


@cache
def source_hash() -> str:
    """12 hex digits of the code that decides results; comments and docstrings do not count."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        relative = path.relative_to(_PACKAGE).as_posix()
        if relative in _WITHOUT_EFFECT:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                and node.body
                and isinstance(node.body[0], ast.Expr)
                and isinstance(node.body[0].value, ast.Constant)
                and isinstance(node.body[0].value.value, str)
            ):
                node.body[0].value.value = ""
        digest.update(f"{relative}\n{_plain(tree)!r}\n".encode())
    return digest.hexdigest()[:12]


def _plain(node: Any) -> Any:
    """A syntax tree as nested lists that are the same in every version of Python.

    `ast.unparse` and `ast.dump` change with it, and so do the empty fields, left out here.
    """
    if isinstance(node, ast.AST):
        fields = [[n, _plain(v)] for n, v in ast.iter_fields(node) if v is not None and v != []]
        return [type(node).__name__, fields]
    return [_plain(item) for item in node] if isinstance(node, list) else node


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and threads; no host or user names."""
    from mmdd import __version__

    return {
        "mmdd": __version__,
        "source_hash": source_hash(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }


def resolve_device(name: str) -> torch.device:
    """ "auto" is the first GPU, or the CPU without one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
