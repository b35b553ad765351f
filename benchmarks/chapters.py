"""Where the time of `make book` goes: CPU seconds of each chapter, and of its dearest cells.

    python benchmarks/chapters.py [--notebooks notebooks/14_efficiency.ipynb …] [--jobs 2]
    git worktree add /tmp/before b6aa098
    python benchmarks/chapters.py --name before --checkout /tmp/before

Executes the notebooks as the book does, `--jobs` kernels at a time that share the cores, and stores
nothing of their outputs. CPU seconds are those of the kernel with the processes it started: they
say how much work there was, whatever else the machine did. "start" is the kernel before its first
cell. The seconds of all are by the clock. --checkout measures the package and the notebooks of
another checkout. Results go to chapters.json, one entry per name and number of jobs, unless only
some notebooks were asked for.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
import psutil
from _measure import add, environment, load, machine
from nbclient import NotebookClient
from tqdm.auto import tqdm

RECORD = Path(__file__).with_suffix(".json")
ROOT = Path(__file__).resolve().parents[1]


def cpu_seconds(process: psutil.Process) -> float:
    """CPU seconds of a process, of children that it waited for, and of those still alive."""
    seconds = 0.0
    for member in (process, *process.children(recursive=True)):
        try:
            times = member.cpu_times()
        except psutil.NoSuchProcess:  # ended in between: its parent has its seconds now
            continue
        seconds += times.user + times.system
        seconds += times.children_user + times.children_system
    return seconds


def time_chapter(path: Path, variables: dict[str, str]) -> dict[str, Any]:
    """Seconds of one notebook: in all, and (CPU seconds, first line) of each code cell."""
    notebook = nbformat.read(path, as_version=4)
    cells: list[tuple[float, str]] = []
    marks: list[float] = []
    client = NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(path.parent)}}
    )

    def kernel() -> psutil.Process:
        return psutil.Process(client.km.provisioner.process.pid)  # type: ignore[union-attr]

    def before(cell: Any, cell_index: int, **_: Any) -> None:
        marks.append(cpu_seconds(kernel()))

    def after(cell: Any, cell_index: int, **_: Any) -> None:
        lines = [line for line in cell.source.splitlines() if line.strip()]
        cells.append((cpu_seconds(kernel()) - marks[-1], f"[{cell_index}] {lines[0]}"))

    client.on_cell_execute = before
    client.on_cell_executed = after
    begin = time.perf_counter()
    client.execute(env=variables)
    wall = time.perf_counter() - begin
    start = marks[0] if marks else 0.0
    return {
        "chapter": path.stem,
        "seconds": round(wall, 2),
        "cpu_seconds": round(start + sum(seconds for seconds, _ in cells), 2),
        "start_cpu_seconds": round(start, 2),
        "cells": sorted(cells, reverse=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--notebooks", nargs="+", type=Path, help="only these; no record is made")
    parser.add_argument("--name", default="now", help="of the code that is measured")
    parser.add_argument("--checkout", type=Path, default=ROOT)
    parser.add_argument("--jobs", type=int, default=2, help="kernels at a time")
    parser.add_argument("--cells", type=int, default=3, help="how many of each chapter to show")
    parser.add_argument("--record", type=Path, default=RECORD)
    arguments = parser.parse_args()
    checkout = arguments.checkout.resolve()
    chapters = arguments.notebooks or sorted((checkout / "notebooks").glob("[0-9]*.ipynb"))
    cores = machine()["cores"]
    variables = environment(max(1, cores // arguments.jobs)) | {"PYTHONPATH": str(checkout)}
    before, begin = load(), time.perf_counter()
    with ThreadPoolExecutor(arguments.jobs) as pool:  # threads: they only wait for their kernels
        asked = pool.map(lambda path: time_chapter(path.resolve(), variables), chapters)
        found = list(tqdm(asked, total=len(chapters), desc="chapters", disable=None))
    seconds = round(time.perf_counter() - begin, 2)
    print(f"{'chapter':32}{'CPU s':>8}{'wall s':>8}{'start':>8}")
    for entry in found:
        print(
            f"{entry['chapter']:32}{entry['cpu_seconds']:8.1f}{entry['seconds']:8.1f}"
            f"{entry['start_cpu_seconds']:8.1f}"
        )
        for cell_seconds, line in entry["cells"][: arguments.cells]:
            print(f"    {cell_seconds:6.1f}  {line[:80]}")
    worked = round(sum(entry["cpu_seconds"] for entry in found), 2)
    print(f"{'all':32}{worked:8.1f}{seconds:8.1f}")
    if arguments.notebooks:
        return
    whole = {
        "name": arguments.name,
        "jobs": arguments.jobs,
        "seconds": seconds,
        "cpu_seconds": worked,
        "chapters": {
            e["chapter"]: {k: v for k, v in e.items() if k not in ("chapter", "cells")}
            for e in found
        },
        "machine": {"load_before_and_after": [before, load()], **machine("torch", "nbclient")},
    }
    add(whole, arguments.record, ("name", "jobs"))


if __name__ == "__main__":
    main()
