"""How long `import mmdd` takes in a fresh interpreter, against `import torch`.

    python benchmarks/startup.py [--repeats 15]

The two take turns, each in an interpreter of its own; bytecode is compiled beforehand. CPU seconds
are user and system time of the whole interpreter, its start included, and of the modules that a run
needs (`import mmdd.runs`) beside. `…_to_limit` is the median over the pairs of runs of
(import mmdd) / (import torch + 0.15 s). Results go to startup.json.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _measure import environment, load, machine, write

RECORD = Path(__file__).with_suffix(".json")
SPARE = 0.15  # seconds that `import mmdd` may take over `import torch`
MODULES = ("torch", "mmdd", "mmdd.runs")


def start(module: str) -> dict[str, float]:
    """Seconds of an interpreter that imports a module and ends."""
    before, begin = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True, env=environment(1))
    seconds, after = time.perf_counter() - begin, os.times()
    worked = after.children_user + after.children_system
    return {
        "seconds": seconds,
        "cpu_seconds": worked - before.children_user - before.children_system,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--record", type=Path, default=RECORD)
    arguments = parser.parse_args()
    before = load()
    for module in MODULES:
        start(module)  # compiles, and fills the file cache
    runs: dict[str, list[dict[str, float]]] = {module: [] for module in MODULES}
    for _ in range(arguments.repeats):
        for module in MODULES:
            runs[module].append(start(module))
    record: dict[str, Any] = {
        "what": "a fresh interpreter that imports a module and ends",
        "repeats": arguments.repeats,
        "modules": {
            module: {
                f"median_{name}": round(statistics.median(run[name] for run in given), 4)
                for name in ("seconds", "cpu_seconds")
            }
            for module, given in runs.items()
        },
    }
    for module, suffix in (("mmdd", ""), ("mmdd.runs", "_of_runs")):
        for name in ("seconds", "cpu_seconds"):
            ratios = [
                ours[name] / (theirs[name] + SPARE)
                for ours, theirs in zip(runs[module], runs["torch"], strict=True)
            ]
            record[f"{name}_to_limit{suffix}"] = round(statistics.median(ratios), 3)
    record["machine"] = {"load_before_and_after": [before, load()], **machine("torch")}
    write(record, arguments.record)
    print({name: value for name, value in record.items() if name != "machine"})


if __name__ == "__main__":
    main()
