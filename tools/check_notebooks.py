"""Execute every notebook with tiny parameters through papermill, then again through nbval.

Run as `python tools/check_notebooks.py [notebooks/15_gallery.ipynb ...]`; a minute or less each.
papermill must get through without an error, and no output may hold a warning. nbval then runs what
papermill wrote once more and compares the outputs, cell by cell, except of cells that read a clock
or a record's age, and except pictures: those are looked at in the built book.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import papermill

ROOT = Path(__file__).resolve().parent.parent
# Parameters that make the live parts of a chapter small. A name that its notebook does not have is
# an error (tests/notebooks).
TINY: dict[str, dict[str, Any]] = {
    "00_start": {"pairs": 20, "iterations": 5},
    "04_linear_contrastive": {"pairs": 64, "descent_steps": 600},
    "06_lors": {"toy_iterations": 4, "scan_iterations": 4},
    "10_ablate_rho_lambda": {"live_iterations": 4},
    "12_ablate_init": {"live_iterations": 4},
    "15_gallery": {"live_iterations": 50, "shown_captions": 100, "permutations": 19},
    "16_beyond": {"live_iterations": 5},
    "17_repblend_amd": {"iterations": 4},
    "run": {"config": {"method": "covmatch", "pairs": 8, "settings": {"iterations": 3}}},
}
# What nbval takes for the same: where an object lies in memory, the id of a styled table, and the
# name of a temporary folder.
SANITIZE = "".join(
    f"[{name}]\nregex: {pattern}\nreplace: {name.upper()}\n"
    for name, pattern in (
        ("address", "0x[0-9a-f]{6,}"),
        ("style", "T_[0-9a-f]{5}"),
        ("folder", "tmp[a-z0-9_]{8}"),
    )
)
CLOCK = re.compile(
    r"perf_counter|\[.cost.\]|process_time|seconds|monotonic|timeit|created|stale|ratio"
)
WARNING = re.compile(r"\b\w*Warning\b")


def warnings_in(notebook: Any) -> list[str]:
    """Lines of a notebook's outputs that are warnings."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            text = output.get("text", "") or output.get("data", {}).get("text/plain", "")
            found += [line for line in text.splitlines() if WARNING.search(line)]
    return found


def mark_deterministic(notebook: Any) -> int:
    """Tag the code cells whose output nbval has to compare; → how many."""
    marked = 0
    for cell in notebook.cells:
        if cell.cell_type != "code" or not cell.outputs:
            continue
        kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
        if CLOCK.search(cell.source) or kinds & {
            "image/png",
            "application/vnd.jupyter.widget-view+json",
        }:
            continue
        cell.metadata.setdefault("tags", []).append("nbval-check-output")
        marked += 1
    return marked


def check(path: Path, folder: Path) -> tuple[list[str], int]:
    """What is wrong with a notebook, and how many outputs were the same twice."""
    out = folder / path.name
    parameters = TINY.get(path.stem, {})
    try:
        papermill.execute_notebook(path, out, parameters, cwd=path.parent, progress_bar=False)
    except papermill.PapermillExecutionError as error:
        return [f"papermill: {error}"], 0
    notebook = nbformat.read(out, as_version=4)
    faults = [f"warning: {line}" for line in warnings_in(notebook)]
    marked = mark_deterministic(notebook)
    # nbval executes a notebook where it lies; a folder of links beside it serves relative paths.
    lies = folder / path.stem / path.parent.name
    lies.mkdir(parents=True)
    for entry in ROOT.iterdir():
        if entry.name not in (path.parent.name, "_build", ".git"):
            (lies.parent / entry.name).symlink_to(entry)
    nbformat.write(notebook, lies / path.name)
    (lies / "sanitize.cfg").write_text(SANITIZE, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "--nbval-lax", "--no-header", "-rN"]
    command += ["--nbval-cell-timeout=600", "--timeout=0", "-p", "no:cacheprovider"]
    command += ["--nbval-sanitize-with", "sanitize.cfg"]
    command += ["--rootdir", str(lies), "-c", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        [*command, lies / path.name], cwd=lies, capture_output=True, text=True, check=False
    )
    if done.returncode:
        faults.append(f"nbval:\n{done.stdout}{done.stderr}")
    return faults, marked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path)
    given = parser.parse_args().notebooks
    paths = given or [*sorted((ROOT / "notebooks").glob("*.ipynb")), ROOT / "book/claims.ipynb"]
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        for path in (path.resolve() for path in paths):
            faults, marked = check(path, Path(folder))
            bad += bool(faults)
            print(f"{path.stem}: {'; '.join(faults) or 'sound'}, {marked} outputs compared")
            sys.stdout.flush()
    if bad:
        sys.exit(f"{bad} of {len(paths)} notebooks have faults")


if __name__ == "__main__":
    main()
