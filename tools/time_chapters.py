"""Where the time of `make book` goes: CPU seconds of each chapter, and of its dearest cells.

    python tools/time_chapters.py [notebooks/14_efficiency.ipynb ...] [--cells 3] [--json out.json]

Executes the notebooks as the book does, one kernel after the other, and stores nothing of their
outputs. CPU seconds are those of the kernel with the processes it started: they say how much work
there was, whatever else the machine did. "start" is the kernel before its first cell.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import nbformat
import psutil
from nbclient import NotebookClient

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


def time_chapter(path: Path) -> dict[str, Any]:
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
    client.execute()
    wall = time.perf_counter() - begin
    start = marks[0] if marks else 0.0
    return {
        "chapter": path.stem,
        "wall": wall,
        "cpu": start + sum(seconds for seconds, _ in cells),
        "start": start,
        "cells": cells,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--cells", type=int, default=3, help="how many of each chapter to show")
    parser.add_argument("--json", type=Path, help="write every cell's seconds here")
    arguments = parser.parse_args()
    chapters = arguments.notebooks or sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    found = []
    print(f"{'chapter':32}{'CPU s':>8}{'wall s':>8}{'start':>8}")
    for path in chapters:
        entry = time_chapter(path)
        found.append(entry)
        print(f"{path.stem:32}{entry['cpu']:8.1f}{entry['wall']:8.1f}{entry['start']:8.1f}")
        for seconds, line in sorted(entry["cells"], reverse=True)[: arguments.cells]:
            print(f"    {seconds:6.1f}  {line[:80]}", flush=True)
    print(f"{'all':32}{sum(e['cpu'] for e in found):8.1f}{sum(e['wall'] for e in found):8.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
