"""Run the commands that are printed under figures, and compare what they draw with the book.

    make book && python tools/check_figures.py [notebooks/06_lors.ipynb ...] [--jobs 2]

Every figure of a chapter is drawn by executing that chapter with papermill; most captions say so,
with the command. Others name the sweep that made the records: it is carried out as well, and must
end well, which takes seconds where the records are there. Sweeps over photos, which not everybody
has, benchmarks and tools are not run. A figure is the same when each of its pixels is.
"""

import argparse
import base64
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nbformat
import numpy as np
from jupyter_cache import get_cache
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
COMMAND = re.compile(r"`((?:papermill|python -m mmdd sweep) [^`]+)`")


@dataclass(frozen=True)
class Check:
    """What became of the figures of one chapter."""

    chapter: str
    figures: int
    different: tuple[int, ...] = ()
    error: str = ""

    def __str__(self) -> str:
        if self.error:
            return f"{self.chapter}: {self.error}"
        told = f", different: {', '.join(map(str, self.different))}" if self.different else ""
        return f"{self.chapter}: {self.figures - len(self.different)} of {self.figures} equal{told}"

    @property
    def sound(self) -> bool:
        return not self.error and not self.different


def printed_commands(notebook: nbformat.NotebookNode) -> list[str]:
    """The papermill and sweep commands of a chapter that need no photos and change no parameter."""
    texts = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    found = dict.fromkeys(COMMAND.findall(texts))
    draws = [c for c in found if c.startswith("papermill") and " -p " not in c]
    return draws + [c for c in found if ".yaml" in c and "--data" not in c]


def pictures(notebook: nbformat.NotebookNode) -> list[np.ndarray]:
    """The pixels of every picture that the cells of an executed notebook show, in order."""
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"]))))
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]


def different(ours: list[np.ndarray], theirs: list[np.ndarray]) -> tuple[int, ...]:
    """Places, from 1, of the pictures that are not the same in every pixel."""
    longest = max(len(ours), len(theirs))
    return tuple(
        i + 1
        for i in range(longest)
        if i >= min(len(ours), len(theirs)) or not np.array_equal(ours[i], theirs[i])
    )


def in_the_book(path: Path, build: Path) -> nbformat.NotebookNode:
    """A chapter with the outputs that the built book shows. Raises `KeyError` without a build."""
    for folder in build.glob(".jupyter_cache/*/"):
        cache = get_cache(str(folder))
        try:
            record = cache.match_cache_notebook(nbformat.read(path, as_version=4))
        except KeyError:
            continue
        return cache.get_cache_bundle(record.pk).nb
    raise KeyError(f"the built book has no outputs of {path.stem}: make book")


def check(path: Path, root: Path = ROOT) -> Check:
    """Run what `path`, a notebook of the checkout `root`, prints, and compare its pictures."""
    notebook = nbformat.read(path, as_version=4)
    try:
        shown = pictures(in_the_book(path, root / "_build"))
    except KeyError as error:
        return Check(path.stem, 0, error=str(error.args[0]))
    commands = printed_commands(notebook)
    drawing = [command for command in commands if command.startswith("papermill")]
    if shown and not drawing:
        return Check(path.stem, len(shown), error="no caption says how its figures are drawn")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "JUPYTER_PREFER_ENV_PATH": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.ipynb"
        for command in commands:
            words = [str(out) if w == "out.ipynb" else w for w in shlex.split(command)]
            ended = subprocess.run(
                words, cwd=root, env=environment, capture_output=True, text=True, check=False
            )
            if ended.returncode:
                lines = (ended.stdout + ended.stderr).strip().splitlines()
                return Check(path.stem, len(shown), error=f"{command}: {' '.join(lines[-2:])}")
        drawn = pictures(nbformat.read(out, as_version=4)) if drawing else []
    return Check(path.stem, len(shown), different(drawn, shown))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="chapters at a time")
    wanted = parser.parse_args()
    chapters = [path.resolve() for path in wanted.notebooks] or [
        *sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")),
        ROOT / "book" / "claims.ipynb",
    ]
    with ThreadPoolExecutor(wanted.jobs) as pool:
        found = []
        for result in pool.map(check, chapters):
            print(result, flush=True)
            found.append(result)
    figures = sum(result.figures for result in found)
    equal = sum(result.figures - len(result.different) for result in found if not result.error)
    print(f"{equal} of {figures} figures are what their commands draw")
    if not all(result.sound for result in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
