"""What a sweep survives: its processes are killed at random moments, and nothing may be lost.

    python benchmarks/sweep_kills.py [--kills 20] [--points 30] [--jobs 2] [--record FILE]

Carries out a grid of small runs once undisturbed, and once while `kill -9` hits, in turn, a kernel,
a papermill process, and the whole sweep, which is then started again. Compares the records of both:
the same runs with the same scores to the last bit, no leftover under a final name, and nothing left
to do. Writes the counts to sweep_kills.json; exits with 1 where anything differs.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from _kills import command, family, records, shoot
from _measure import code_version, machine
from tqdm.auto import tqdm

from mmdd.files import atomic_write_text
from mmdd.grid import load_sweep
from mmdd.runs import run

RECORD = Path(__file__).with_suffix(".json")
ROOT = Path(__file__).parents[1]
TARGETS = ("kernel", "papermill", "sweep")


def write_grid(path: Path, points: int) -> None:
    """A grid of small runs: half of them distil and leave checkpoints, half select."""
    seeds = points // 2
    grid: dict[str, Any] = {
        "sweep": "kills",
        "preset": "tiny",
        "base": {
            "protocol": "image+text_head",
            "dataset": {"train": 200, "val": 40, "test": 40},
            "evaluation": {"students": 2, "epochs": 3, "scores": 1},
        },
        "grid": [
            {"method": "covmatch", "pairs": 8, "seed": list(range(seeds))},
            {"method": "random", "pairs": 8, "seed": list(range(points - seeds))},
        ],
    }
    path.write_text(yaml.safe_dump(grid))


def start(grid: Path, results: Path, jobs: int) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "mmdd", "sweep", str(grid), "--jobs", str(jobs)]
    words += ["--results", str(results), "--retries", "0"]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def hit(sweep: subprocess.Popen[bytes], target: str, rng: random.Random) -> bool:
    """Kill what is aimed at and all that it started; false where there is no such thing."""
    victims = family(sweep.pid)
    if target != "sweep":
        word = {"kernel": "ipykernel_launcher", "papermill": "papermill"}[target]
        fitting = [p for p in victims[1:] if word in " ".join(command(p))]
        victims = family(rng.choice(fitting).pid) if fitting else []
    shoot(victims)
    return bool(victims)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--points", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, default=RECORD)
    wanted = parser.parse_args()
    rng = random.Random(wanted.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        grid = folder / "kills.yaml"
        write_grid(grid, wanted.points)
        torch.set_num_threads(1)
        points = load_sweep(grid, {"threads": 1, "progress": False})
        for point in tqdm(points, desc="undisturbed"):
            run(point, folder / "calm")
        calm = records(folder / "calm")

        results = folder / "killed"
        done, rounds, begin = dict.fromkeys(TARGETS, 0), 0, time.perf_counter()
        bar = tqdm(total=wanted.kills, desc="kills")
        sweep = start(grid, results, wanted.jobs)
        while True:
            killed = sum(done.values())
            if sweep.poll() is not None:
                rounds += 1
                if killed >= wanted.kills and sweep.returncode == 0:
                    break
                if sweep.returncode == 0:
                    raise SystemExit(f"all points were done after {killed} kills: add --points")
                sweep = start(grid, results, wanted.jobs)
            elif killed < wanted.kills:
                time.sleep(rng.uniform(4, 16))
                target = TARGETS[killed % len(TARGETS)]
                if sweep.poll() is None and hit(sweep, target, rng):
                    done[target] += 1
                    bar.update()
            else:
                sweep.wait()
        bar.close()
        seconds = time.perf_counter() - begin
        again = start(grid, results, wanted.jobs)
        found = records(results)
        leftovers = [p.name for p in (results / "kills").rglob("*.part.ipynb")]
        record = {
            "points": len(points),
            "kills": done,
            "starts_of_the_sweep": rounds,
            "seconds": round(seconds, 1),
            "records": len(found),
            "records_equal_to_the_bit": sum(found.get(key) == value for key, value in calm.items()),
            "unfinished_notebooks": len(leftovers),
            "exit_code_of_another_call": again.wait(),
            "code": code_version(Path(__file__).resolve()),
            "machine": machine("torch"),
        }
    atomic_write_text(wanted.record, json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    if found != calm or record["exit_code_of_another_call"] != 0:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
