"""Which code and which machine made a number."""

import ast
import hashlib
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mmdd.devices import exact_float32

_PACKAGE = Path(__file__).resolve().parent
# Modules that only show, fetch or launch: changing them changes no result.
_WITHOUT_EFFECT = {
    "__main__.py",
    "allocator.py",
    "board.py",
    "combinations.py",  # it refuses, and what it lets pass stays the same
    "data/download.py",
    "disk.py",
    "doctor.py",
    "grid.py",
    "encoders/pairs.py",  # what an entry says counts for the runs that use it: see `entries`
    "mistakes.py",
    "plots.py",
    "presets.py",
    "provenance.py",
    "published.py",
    "results.py",
    "seal.py",
    "store.py",
    "sweep.py",
    "tables.py",
}


# Registries name every method and selection there is; a run uses one or two of them.
_REGISTRIES = {"distill/__init__.py": "METHODS", "selection/__init__.py": "SELECTORS"}
# Where a run begins, whatever its method.
_ROOT = "mmdd.runs"


@cache
def source_hash(*plugins: str, entries: tuple[str, ...] = ()) -> str:
    """12 hex digits of the code that decides a run's result.

    plugins: modules that the run uses beyond the common ones, such as "mmdd.distill.covmatch".
    entries: what the tables say that a run looks up by name, such as that of encoder pairs. What
    counts is every module that a run or a plug-in imports, directly or not, so that a new method
    leaves the records of the others fresh. Comments and docstrings do not count.
    """
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(f"{entry}\n".encode())
    for relative, code in sorted(_imported([_ROOT, *plugins]).items()):
        digest.update(f"{relative}\n{code}\n".encode())
    return digest.hexdigest()[:12]


def _imported(modules: list[str]) -> dict[str, str]:
    """Code of the package's files, by path within it, that importing `modules` leads to."""
    found: dict[str, str] = {}
    queue = list(modules)
    while queue:
        relative = _file(queue.pop(), _PACKAGE)
        if relative is None or relative in found or relative in _WITHOUT_EFFECT:
            continue
        found[relative], names = normalised(
            relative, (_PACKAGE / relative).read_text(encoding="utf-8")
        )
        queue += names
    return found


@cache  # a store holds runs of many kinds, which share most files
def normalised(relative: str, text: str) -> tuple[str, list[str]]:
    """What counts of a file, as text, and the modules of the package that it imports."""
    tree = ast.parse(text)
    if relative in _REGISTRIES:
        tree.body = [n for n in tree.body if not _registers(n, _REGISTRIES[relative])]
    names = _names(tree)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
            and isinstance(node.body[0].value, ast.Constant)
            and isinstance(node.body[0].value.value, str)
        ):
            node.body[0].value.value = ""
    return repr(_plain(tree)), names


def _registers(node: ast.stmt, registry: str) -> bool:
    """True for what changes with every entry of a registry: its imports, the table, `__all__`."""
    if isinstance(node, ast.AnnAssign):
        return isinstance(node.target, ast.Name) and node.target.id == registry
    if isinstance(node, ast.Assign):
        return any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
    return isinstance(node, ast.ImportFrom)


def _names(tree: ast.Module) -> list[str]:
    """Modules of the package that a file imports, wherever in it."""
    names = ["mmdd"]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from a import b` may mean the module a.b.
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    parts = [name.split(".") for name in names]
    return list(
        {".".join(p[:i]): None for p in parts if p[0] == "mmdd" for i in range(1, len(p) + 1)}
    )


@cache  # the files of a run import each other hundreds of times
def _file(module: str, package: Path) -> str | None:
    """The file of a module, by its path within the package; None for a name inside a module."""
    base = package.joinpath(*module.split(".")[1:])
    candidates = (base / "__init__.py", base.with_suffix(".py"))
    found = next((path for path in candidates if path.is_file()), None)
    return found.relative_to(package).as_posix() if found else None


def _plain(node: Any) -> Any:
    """A syntax tree as nested lists that are the same in every version of Python.

    `ast.unparse` and `ast.dump` change with it, and so do the empty fields, left out here.
    """
    if isinstance(node, ast.AST):
        fields = [[n, _plain(v)] for n, v in ast.iter_fields(node) if v is not None and v != []]
        return [type(node).__name__, fields]
    return [_plain(item) for item in node] if isinstance(node, list) else node


def environment(device: torch.device, code: str) -> dict[str, Any]:
    """Versions, device and threads; no host or user names. code: the `source_hash` of the run."""
    from mmdd import __version__

    return {
        "mmdd": __version__,
        "source_hash": code,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }


def resolve_device(name: str) -> torch.device:
    """ "auto" is the first GPU, or the CPU without one.

    From then on this process multiplies float32 numbers exactly, on a GPU too: see
    `mmdd.devices.exact_float32`.
    """
    exact_float32()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
