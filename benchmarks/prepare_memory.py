"""How much memory and time decoding 20,000 JPEGs into the image cache takes.

    python benchmarks/prepare_memory.py [--images 20000] [--size 224] [--workers 1 2]

Generates the images in a temporary folder, prepares them in a fresh process per number of workers,
and writes the peak resident memory of that process and its children (sampled every 20 ms, or the
kernel's own count of the process where that is higher), the seconds and the rate to
prepare_memory.json.
"""

import argparse
import json
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
import psutil
from _measure import COCO_TRAIN_IMAGES, Timer, machine, peak_resident_bytes, run_child, write
from PIL import Image
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
    """What the fresh process does; prints its own figures as JSON."""
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
    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    with Timer() as decoding:
        prepared = prepare_images(names, root, size, cache, workers=workers)
    with Timer() as opening:
        prepare_images(names, root, size, cache, workers=workers)
    stop.set()
    watcher.join()
    print(
        json.dumps(
            {
                "workers": workers,
                "seconds": round(decoding.seconds, 2),
                "images_per_second": round(len(names) / decoding.seconds, 1),
                "seconds_to_open_again": round(opening.seconds, 3),
                "rss_bytes_before": before,
                "peak_rss_bytes": max(peak, peak_resident_bytes()),
                "cache_bytes": prepared.images.nbytes,
                "content": prepared.content,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--child", nargs=2, metavar=("ROOT", "CACHE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        root, cache = map(Path, arguments.child)
        prepare(root, cache, arguments.size, arguments.workers[0])
        return
    runs = []
    with tempfile.TemporaryDirectory(prefix="prepare-memory-") as folder:
        root = Path(folder) / "images"
        root.mkdir()
        source_bytes = generate(root, arguments.images)
        for workers in arguments.workers:
            cache = Path(folder) / "cache"
            command = ["--child", str(root), str(cache), "--size", str(arguments.size)]
            runs.append(run_child(__file__, *command, "--workers", str(workers)))
            shutil.rmtree(cache)
    if len({run["content"] for run in runs}) != 1:
        raise SystemExit("the pixels depend on the number of workers: that is a bug")
    fastest = max(run["images_per_second"] for run in runs)
    record = {
        "what": f"{arguments.images} JPEGs of 320x240 px to a {arguments.size} px uint8 cache",
        "source_bytes": source_bytes,
        "runs": runs,
        "coco_train_cache_bytes": COCO_TRAIN_IMAGES * arguments.size**2 * 3,
        "coco_train_minutes_at_this_rate": round(COCO_TRAIN_IMAGES / fastest / 60, 1),
        "machine": {
            "memory_bytes": psutil.virtual_memory().total,
            **machine("numpy", "pillow"),
        },
    }
    write(record, arguments.record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
