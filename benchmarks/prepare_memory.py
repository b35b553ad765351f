"""Time and memory of decoding JPEGs into the image cache, against a plain loop over Pillow.

    python benchmarks/prepare_memory.py [--images 4000] [--size 224] [--workers 1 2] [--quick]

Generates the images in a temporary folder and prepares them in a fresh process per number of
workers (threads), and once more by a loop as one would write it: one process, open, turn upright,
to RGB, cut and scale with the same filter, into an array file of the same form, which is synced to
disk at the end, as the cache is. Its pixels must be the same; what it lacks is the journal that a
killed run goes on from, the check sums, and the report of damaged files. Everything runs twice, in
the order a, b, c, c, b, a, and the faster time counts: a disk is busy with the last one's writes.

Written to prepare_memory.json: seconds by the clock and CPU seconds, the rate, and the peak
resident memory of each process and its children (sampled every 20 ms, or the kernel's own count of
the process where that is higher).
"""

import argparse
import hashlib
import json
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from _measure import COCO_TRAIN_IMAGES, Timer, load, machine, peak_resident_bytes, run_child, write
from PIL import Image, ImageOps
from tqdm.auto import tqdm

RECORD = Path(__file__).with_suffix(".json")


def generate(folder: Path, count: int) -> int:
    """Write `count` 320 × 240 JPEGs of gradients and noise; returns their bytes."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:240, 0:320].astype(np.float32)
    noise = rng.normal(0, 18, (16, 240, 320, 3)).astype(np.float32)
    total = 0
    for i in tqdm(range(count), desc="generating", unit="img"):
        slopes = rng.uniform(-0.5, 0.5, (2, 3)).astype(np.float32)
        ramp = x[..., None] * slopes[0] + y[..., None] * slopes[1] + 128
        picture = np.clip(ramp + noise[i % 16], 0, 255).astype(np.uint8)
        path = folder / f"{i:06d}.jpg"
        Image.fromarray(picture).save(path, quality=85)
        total += path.stat().st_size
    return total


def prepare(root: Path, cache: Path, size: int, workers: int) -> None:
    """What the fresh process does; prints its own figures as JSON. workers: 0 is the plain loop."""
    from mmdd.data.cache import prepare_images

    process = psutil.Process()
    peak, stop = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.02):
            family = [process, *process.children(recursive=True)]
            total = 0
            for member in family:
                try:
                    total += member.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peak = max(peak, total)

    names = sorted(p.name for p in root.iterdir())
    if workers:
        work = lambda: prepare_images(names, root, size, cache, workers=workers)  # noqa: E731
    else:
        work = lambda: plain_loop(names, root, size, cache)  # noqa: E731
    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    with Timer() as decoding:
        prepared = work()
    stop.set()
    watcher.join()
    found = {
        "workers": workers,
        "seconds": round(decoding.seconds, 2),
        "cpu_seconds": round(decoding.cpu_seconds, 2),
        "images_per_second": round(len(names) / decoding.seconds, 1),
        "rss_bytes_before": before,
        "peak_rss_bytes": max(peak, peak_resident_bytes()),
        "pixels": digest(prepared if isinstance(prepared, np.ndarray) else prepared.images),
    }
    if workers:
        with Timer() as opening:
            prepare_images(names, root, size, cache, workers=workers)
        found["seconds_to_open_again"] = round(opening.seconds, 3)
    print(json.dumps(found))


def plain_loop(names: list[str], root: Path, size: int, cache: Path) -> np.ndarray:
    """Every image, one after the other, into one array file."""
    cache.mkdir()
    images = np.lib.format.open_memmap(
        cache / "images.npy", "w+", np.uint8, (len(names), size, size, 3)
    )
    for row, name in enumerate(tqdm(names, desc="plain loop", unit="img")):
        with Image.open(root / name) as image:
            image.draft(None, (2 * size, 2 * size))
            upright = ImageOps.exif_transpose(image).convert("RGB")
            width, height = upright.size
            side = min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side)
            images[row] = np.asarray(upright.resize((size, size), Image.Resampling.BICUBIC, box))
    images.flush()
    return images


def digest(images: np.ndarray) -> str:
    """A check sum of all pixels, without holding them."""
    found = hashlib.sha256()
    for i in range(0, len(images), 256):
        found.update(np.ascontiguousarray(images[i : i + 256]))
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--quick", action="store_true", help="100 images")
    parser.add_argument("--child", nargs=2, metavar=("ROOT", "CACHE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        root, cache = map(Path, arguments.child)
        prepare(root, cache, arguments.size, arguments.workers[0])
        return
    if arguments.quick:
        arguments.images = 100
    before = load()
    found: dict[int, list[dict[str, Any]]] = {0: [], **{w: [] for w in arguments.workers}}
    with tempfile.TemporaryDirectory(prefix="prepare-memory-") as folder:
        root = Path(folder) / "images"
        root.mkdir()
        source_bytes = generate(root, arguments.images)
        for workers in (*found, *reversed(found)):
            cache = Path(folder) / "cache"
            command = ["--child", str(root), str(cache), "--size", str(arguments.size)]
            found[workers].append(run_child(__file__, *command, "--workers", str(workers)))
            shutil.rmtree(cache)
    if len({run["pixels"] for runs in found.values() for run in runs}) != 1:
        raise SystemExit("the pixels depend on who decodes them: that is a bug")
    best = {w: min(runs, key=lambda run: run["seconds"]) for w, runs in found.items()}
    for workers, run in best.items():
        run["seconds_of_both"] = [other["seconds"] for other in found[workers]]
        run["seconds_ratio"] = round(run["seconds"] / best[0]["seconds"], 3)
    fastest = max(run["images_per_second"] for run in best.values())
    record = {
        "what": f"{arguments.images} JPEGs of 320x240 px to a {arguments.size} px uint8 array",
        "images": arguments.images,
        "source_bytes": source_bytes,
        "cache_bytes": arguments.images * arguments.size**2 * 3,
        "plain_loop": best.pop(0),
        "runs": list(best.values()),
        "coco_train_cache_bytes": COCO_TRAIN_IMAGES * arguments.size**2 * 3,
        "coco_train_minutes_at_this_rate": round(COCO_TRAIN_IMAGES / fastest / 60, 1),
        "machine": {
            "memory_bytes": psutil.virtual_memory().total,
            "load_before_and_after": [before, load()],
            **machine("numpy", "pillow"),
        },
    }
    write(record, arguments.record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
