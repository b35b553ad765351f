"""What one point of a sweep takes beside its result: kernel, imports, dataset, encoders, hashing.

    python benchmarks/points.py [--repeats 2]
    git worktree add /tmp/before b6aa098
    python benchmarks/points.py --name before --checkout /tmp/before

Each point is carried out as `mmdd sweep` does it, by papermill in a process of its own with one
thread, and counted whole: CPU seconds of papermill and its kernel. The parts are those of a second
process that does the same without a kernel, one step after the other; "run" is what is left for
`mmdd.runs.run` once all is loaded: selection, distillation, students, scores. Medians. --checkout
measures the package and the notebook of another checkout. Results go to points.json, one entry per
name.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _measure import add, environment, load, machine

RECORD = Path(__file__).with_suffix(".json")
ROOT = Path(__file__).resolve().parents[1]
POINTS: dict[str, dict[str, Any]] = {
    "random, heads": {"method": "random", "protocol": "heads"},
    "k-means, heads": {"method": "k-means", "protocol": "heads"},
    "random, image+text_head": {"method": "random", "protocol": "image+text_head"},
}
STEPS = """
import json, sys, tempfile, time
seconds = {}
def step(name):
    seconds[name] = time.process_time() - sum(seconds.values())
wishes = json.loads(sys.argv[1])
step("interpreter")
import torch
step("import torch")
import mmdd.runs
from mmdd.presets import preset
step("import mmdd.runs")
config = preset("small", **wishes)
config.source_hash
step("hash of the code")
from mmdd.data.open import open_dataset
open_dataset(config.dataset, config.runtime)
step("dataset")
from mmdd.encoders import build_model
build_model(config.model)
step("encoders")
with tempfile.TemporaryDirectory() as folder:
    record = mmdd.runs.run(config, folder)
step("run")
print(json.dumps({"seconds": seconds, "scores": [s["test"] for s in record["students"]]}))
"""


def child(command: list[str], checkout: Path, cache: str) -> tuple[str, float, float]:
    """Output, seconds by the clock and CPU seconds of a process and of those that it waited for."""
    variables = environment(1) | {"PYTHONPATH": str(checkout), "MMDD_CACHE": cache}
    before, begin = os.times(), time.perf_counter()
    done = subprocess.run(
        command, check=True, cwd=checkout, env=variables, stdout=subprocess.PIPE, text=True
    )
    wall, after = time.perf_counter() - begin, os.times()
    worked = after.children_user + after.children_system
    return done.stdout, wall, worked - before.children_user - before.children_system


def measure(wishes: dict[str, Any], checkout: Path, repeats: int) -> dict[str, Any]:
    """Medians of one kind of point: whole, and its steps."""
    wishes = wishes | {"pairs": 100, "runtime": {"progress": False, "threads": 1}}
    whole, steps = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(prefix="points-") as folder:
            command = [sys.executable, "-m", "papermill", "--no-progress-bar"]
            command += ["notebooks/run.ipynb", f"{folder}/out.ipynb", "--parameters_yaml"]
            parameters = {"preset_name": "small", "config": wishes, "results_dir": folder}
            _, *seconds = child([*command, json.dumps(parameters)], checkout, f"{folder}/cache")
            whole.append(seconds)
        with tempfile.TemporaryDirectory(prefix="points-") as cache:
            command = [sys.executable, "-c", STEPS, json.dumps(wishes)]
            steps.append(json.loads(child(command, checkout, cache)[0].splitlines()[-1]))
    wall, cpu = (statistics.median(column) for column in zip(*whole, strict=True))
    names = steps[0]["seconds"]
    return {
        "median_seconds": round(wall, 2),
        "median_cpu_seconds": round(cpu, 2),
        "steps": {
            name: round(statistics.median(s["seconds"][name] for s in steps), 3) for name in names
        },
        "scores": [round(student["mean"], 4) for student in steps[0]["scores"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--name", default="now", help="of the code that is measured")
    parser.add_argument("--checkout", type=Path, default=ROOT)
    parser.add_argument("--points", nargs="+", choices=POINTS, default=list(POINTS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--record", type=Path, default=RECORD)
    arguments = parser.parse_args()
    before = load()
    found = {
        name: measure(POINTS[name], arguments.checkout.resolve(), arguments.repeats)
        for name in arguments.points
    }
    entry: dict[str, Any] = {
        "name": arguments.name,
        "repeats": arguments.repeats,
        "points": found,
        "machine": {"load_before_and_after": [before, load()], **machine("torch", "papermill")},
    }
    add(entry, arguments.record, ("name",))
    print(json.dumps(entry, indent=1))


if __name__ == "__main__":
    main()
