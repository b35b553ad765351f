"""Recall@K of the package against a ranking per query, as published code does it.

    python benchmarks/retrieval.py [--sizes 1000x5000 5000x25000] [--repeats 5] [--threads 1]

The ranking per query is the evaluation of BLIP, which the public code of MTT-VL and LoRS took over
(`epoch_test` and `itm_eval` of their `epoch.py`), written here once more: the whole matrix of
scores; in each direction a second matrix, filled with -100, to which a Python loop copies the 128
best scores of each query; then, query by query, a NumPy sort of all candidates and a search for the
positions of the right ones. At 5,000 x 25,000 that are three matrices of half a gigabyte.

Both get the same features of 768 numbers, the width in the published code, and must agree on all
six recalls. Every measurement is a fresh process, the two take turns. Given are medians; the ratios
are medians of the pairs. Memory is what is resident at the peak above what the process held with
the features. `product_cpu_seconds` is the part of the published way that is its matrix product, in
float32. Results go to retrieval.json, one entry per size and number of threads. Linux only: peaks
are the kernel's count.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from _measure import (
    Timer,
    add,
    load,
    machine,
    peak_resident_bytes,
    require_peaks,
    resident_bytes,
    run_child,
    settle,
)

RECORD = Path(__file__).with_suffix(".json")
WIDTH = 768
KEPT = 128
KS = (1, 5, 10)
MODES = ("per query", "mmdd")


def generate(images: int, texts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """L2-normalised float32 features of images and texts that resemble their images, and owners."""
    rng = np.random.default_rng(0)
    owner = np.arange(texts) % images
    z_image = rng.standard_normal((images, WIDTH), dtype=np.float32)
    z_text = z_image[owner] + 6 * rng.standard_normal((texts, WIDTH), dtype=np.float32)
    for z in (z_image, z_text):
        z /= np.linalg.norm(z, axis=1, keepdims=True)
    return z_image, z_text, owner


def per_query(z_image: np.ndarray, z_text: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    """All six recalls, and the CPU seconds of the matrix product under "product"."""
    import torch

    with Timer() as product:
        scores = torch.from_numpy(z_image) @ torch.from_numpy(z_text).T
    kept_i2t, kept_t2i = _best_of_rows(scores), _best_of_rows(scores.T)
    texts_of: list[list[int]] = [[] for _ in z_image]
    for text, image in enumerate(owner):
        texts_of[image].append(text)
    ranks = np.zeros(len(z_image))
    for index, score in enumerate(kept_i2t):
        order = np.argsort(score)[::-1]
        ranks[index] = min(np.where(order == text)[0][0] for text in texts_of[index])
    found = {f"TR@{k}": 100.0 * float(np.mean(ranks < k)) for k in KS}
    ranks = np.zeros(len(z_text))
    for index, score in enumerate(kept_t2i):
        order = np.argsort(score)[::-1]
        ranks[index] = np.where(order == owner[index])[0][0]
    found |= {f"IR@{k}": 100.0 * float(np.mean(ranks < k)) for k in KS}
    return found | {"product": product.cpu_seconds}


def _best_of_rows(scores: Any) -> np.ndarray:
    """A matrix of -100 with the `KEPT` largest scores of each row in their places."""
    import torch

    kept = torch.full(scores.shape, -100.0)
    for row, score in enumerate(scores):
        value, place = score.topk(min(KEPT, len(score)))
        kept[row, place] = value
    return kept.numpy()


def measure(mode: str, images: int, texts: int, threads: int) -> None:
    """What the fresh process does; prints its own figures as JSON."""
    import torch

    from mmdd.retrieval import recall_at_k

    torch.set_num_threads(threads)

    def score(z_image: np.ndarray, z_text: np.ndarray, owner: np.ndarray) -> dict[str, float]:
        if mode == "per query":
            return per_query(z_image, z_text, owner)
        found = recall_at_k(torch.from_numpy(z_image), torch.from_numpy(z_text), owner)
        return {name: value for name, value in found.items() if name != "mean"}

    score(*generate(10, 50))  # first calls are not measured
    features = generate(images, texts)
    settle()
    base = resident_bytes()
    with Timer() as timer:
        recalls = score(*features)
    answer = {
        "seconds": timer.seconds,
        "cpu_seconds": timer.cpu_seconds,
        "peak_bytes_above_base": peak_resident_bytes() - base,
        "product_cpu_seconds": recalls.pop("product", 0.0),
        "recalls": recalls,
    }
    print(json.dumps(answer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["1000x5000", "5000x25000"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        measure(*json.loads(arguments.child))
        return
    require_peaks()
    for size in arguments.sizes:
        images, texts = map(int, size.split("x"))
        before = load()
        runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
        for _ in range(arguments.repeats):
            for mode in MODES:
                order = json.dumps([mode, images, texts, arguments.threads])
                runs[mode].append(run_child(__file__, "--child", order, threads=arguments.threads))
        wanted, found = (runs[mode][0]["recalls"] for mode in MODES)
        # A float64 product may order near ties otherwise than a float32 one: a query or two.
        if any(abs(wanted[name] - found[name]) > 200 / images for name in wanted):
            raise SystemExit(f"the recalls differ: {wanted} and {found}")
        entry: dict[str, Any] = {
            "name": f"{images} x {texts}",
            "threads": arguments.threads,
            "repeats": arguments.repeats,
            "modes": {},
        }
        for name in ("seconds", "cpu_seconds", "peak_bytes_above_base"):
            pairs = zip(runs["mmdd"], runs["per query"], strict=True)
            entry[f"{name}_ratio"] = round(
                statistics.median(a[name] / b[name] for a, b in pairs), 4
            )
            for mode in MODES:
                median = statistics.median(run[name] for run in runs[mode])
                entry["modes"].setdefault(mode, {})[name] = round(median, 4)
        entry["modes"]["per query"]["product_cpu_seconds"] = round(
            statistics.median(run["product_cpu_seconds"] for run in runs["per query"]), 4
        )
        entry["recalls"] = {mode: runs[mode][0]["recalls"] for mode in MODES}
        entry["machine"] = {"load_before_and_after": [before, load()], **machine("torch", "numpy")}
        add(entry, arguments.record)
        print({name: value for name, value in entry.items() if name != "machine"})


if __name__ == "__main__":
    main()
