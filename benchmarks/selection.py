"""How long the selections take, and how much memory, on features of the size of COCO.

    python benchmarks/selection.py [--rows 113287] [--width 1024] [--pairs 500] [--threads 2]

Draws clustered float32 features (rows of two L2-normalised halves, like joint features), saves them
to a temporary file, and runs each algorithm on them in a fresh process. Writes the seconds of the
algorithm (wall clock, and CPU time of all threads) and the peak resident memory of its process (the
kernel's own count, reading the features included) to selection.json.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import psutil
from _measure import (
    COCO_TRAIN_IMAGES,
    Timer,
    load,
    machine,
    peak_resident_bytes,
    run_child,
    write,
)
from tqdm.auto import tqdm

RECORD = Path(__file__).with_suffix(".json")
ALGORITHMS = ("herding", "k-center", "k-means", "clip-filter")


def generate(path: Path, rows: int, width: int) -> None:
    """Save (rows, width) float32 features around 80 centres."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(80, width)).astype(np.float32)
    features = np.lib.format.open_memmap(path, "w+", np.float32, (rows, width))
    for start in range(0, rows, 10_000):
        part = features[start : start + 10_000]
        part[:] = rng.standard_normal(part.shape, dtype=np.float32)
        part += centres[rng.integers(80, size=len(part))]
        for half in np.split(part, 2, axis=1):
            half /= np.linalg.norm(half, axis=1, keepdims=True)
    features.flush()


def choose(algorithm: str, features: np.ndarray, pairs: int) -> np.ndarray:
    from mmdd.selection.clip_filter import most_alike
    from mmdd.selection.clusters import k_means
    from mmdd.selection.greedy import herding, k_center

    if algorithm == "herding":
        return herding(features, pairs)
    if algorithm == "k-center":
        return k_center(features, pairs, np.random.default_rng(0))
    if algorithm == "k-means":
        return k_means(features, pairs, 0)
    return most_alike(*np.split(features, 2, axis=1), pairs)


def measure(algorithm: str, path: Path, pairs: int) -> None:
    """What the fresh process does; prints its own figures as JSON."""
    choose(algorithm, np.eye(8, dtype=np.float32), 2)  # imports and first calls are not measured
    features = np.load(path)
    before = peak_resident_bytes()
    with Timer() as timer:
        chosen = choose(algorithm, features, pairs)
    if len(set(chosen.tolist())) != pairs:
        raise SystemExit(f"{algorithm} chose a row twice: that is a bug")
    print(
        json.dumps(
            {
                "algorithm": algorithm,
                "seconds": round(timer.seconds, 2),
                "cpu_seconds": round(timer.cpu_seconds, 2),
                "peak_rss_bytes": peak_resident_bytes(),
                "rss_bytes_with_features": before,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=COCO_TRAIN_IMAGES)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--child", nargs=2, metavar=("ALGORITHM", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        measure(arguments.child[0], Path(arguments.child[1]), arguments.pairs)
        return
    runs = []
    with tempfile.TemporaryDirectory(prefix="selection-") as folder:
        path = Path(folder) / "features.npy"
        generate(path, arguments.rows, arguments.width)
        for algorithm in tqdm(ALGORITHMS):
            runs.append(
                run_child(
                    __file__,
                    *("--child", algorithm, str(path), "--pairs", str(arguments.pairs)),
                    threads=arguments.threads,
                )
            )
    record = {
        "what": f"{arguments.pairs} of {arguments.rows} rows of {arguments.width} float32 features",
        "threads": arguments.threads,
        "runs": runs,
        "machine": {
            "memory_bytes": psutil.virtual_memory().total,
            "load_when_done": load(),
            **machine("numpy", "scikit-learn"),
        },
    }
    write(record, arguments.record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
