"""How CPU seconds and memory of an iteration grow with pairs, batch, pixels and feature dimension.

    python benchmarks/growth.py [--methods covmatch mdm …] [--axes pairs …] [--repeats 3] [--quick]

One axis changes at a time, from a common setting: 100 pairs, batches of 64 real and 64 synthetic
pairs (student steps of 32), 32 px, a shared space of 128. The image encoder is three convolutions,
pooling and a linear layer, so that it takes any number of pixels; texts are vectors, under the
protocol `image+text_head`; weights, pixels and texts are random. The trajectory methods take 4
student steps: MTT-VL with one graph over all of them, TESLA and LoRS with the default engine.

Every point is a fresh process on one thread: one iteration to warm up, one whose floating-point
operations are counted (matrix products and convolutions, by torch's own counter), then `repeats`
timed ones. CPU seconds are those that the process worked; memory is what is resident at the peak
above what the process held between iterations. Results go to growth.json, all timed iterations
among them. Linux only: peaks are the kernel's count.
"""

import argparse
import multiprocessing
import os
import statistics
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from _measure import (
    Timer,
    environment,
    load,
    machine,
    operations_of,
    peak_resident_bytes,
    require_peaks,
    resident_bytes,
    settle,
    write,
)
from tqdm.auto import tqdm

RECORD = Path(__file__).with_suffix(".json")
METHODS = ("dm", "dc", "mtt", "tesla", "lors", "mdm", "covmatch")
STEPS = 4  # of a student of the trajectory methods
TEXT_WIDTH = 128
PRELOADED = (
    *("mmdd.batches", "mmdd.data", "mmdd.distill", "mmdd.encoders.text", "mmdd.experts"),
    *("torch.utils.flop_counter", "torch._dynamo"),
)


@dataclass(frozen=True)
class Point:
    """Where an iteration is measured. batch: of real and of synthetic pairs, half for a student."""

    pairs: int = 100
    batch: int = 64
    pixels: int = 32
    dimension: int = 128


# On the axis `batch` there are as many pairs as the largest batch, so that none is cut short.
AXES: dict[str, tuple[int, ...]] = {
    "pairs": (25, 50, 100, 200, 500, 1000),
    "batch": (16, 32, 64, 128, 256),
    "pixels": (16, 32, 48, 64, 96),
    "dimension": (64, 128, 256, 512, 1024),
}
QUICK = {axis: (values[0], values[2]) for axis, values in AXES.items()}


def at(axis: str, value: int) -> Point:
    """The common setting with one thing changed."""
    point = replace(Point(), **{axis: value})
    return replace(point, pairs=max(AXES["batch"])) if axis == "batch" else point


def build(name: str, point: Point) -> Any:
    """A distiller with random weights, pixels and texts, and experts of no training."""
    import numpy as np
    import torch
    from torch import Tensor, nn

    from mmdd.batches import RealBatches
    from mmdd.data import PairDataset
    from mmdd.distill import METHODS as REGISTRY
    from mmdd.distill import Context
    from mmdd.encoders import DualEncoder
    from mmdd.encoders.image import ImageEncoder
    from mmdd.encoders.text import TextEncoder
    from mmdd.experts import Layout
    from mmdd.protocols import trained_parameters
    from mmdd.synthetic import SyntheticPairs

    class Convolutions(ImageEncoder):
        def __init__(self) -> None:
            super().__init__(dim=128, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
            widths = (3, 32, 64, 128)
            self.layers = nn.ModuleList(
                nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths)
            )
            self.linear = nn.Linear(128, 128)

        def features(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.tanh(layer(x))  # has every derivative that a method asks for
            return self.linear(x.mean(dim=(2, 3)))

    class Vectors(TextEncoder):
        """A frozen text encoder whose vectors are drawn, not computed."""

        def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
            ids = torch.ones(len(texts), 1, dtype=torch.int64)
            return ids, ids.bool()

        def embed(self, ids: Tensor) -> Tensor:
            return torch.randn(*ids.shape, TEXT_WIDTH)

        def encode(self, embeddings: Tensor, mask: Tensor) -> Tensor:
            return embeddings[:, 0]

        def input_embedding_parameters(self) -> list[nn.Parameter]:
            return []

    class Experts:
        """Two experts of one snapshot in memory: a start, and a little beside it."""

        snapshots = 1
        manifests = ({"snapshots": 1},) * 2

        def __init__(self, start: Tensor) -> None:
            self.flat = [start, *(start + 0.01 * torch.randn_like(start) for _ in range(2))]

        def __len__(self) -> int:
            return 2

        def read(self, expert: int, snapshot: int) -> Tensor:
            return self.flat[snapshot and expert + 1]

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    size, real = point.pixels, max(point.batch, 64)
    model = DualEncoder(
        Convolutions(),
        Vectors(dim=TEXT_WIDTH, embedding_dim=TEXT_WIDTH, max_length=1),
        nn.Linear(128, point.dimension, bias=False),
        nn.Linear(TEXT_WIDTH, point.dimension, bias=False),
    )
    dataset = PairDataset(
        rng.integers(0, 256, (real, size, size, 3), dtype=np.uint8),
        [["a caption"]] * real,
        {"train": np.arange(real)},
        name="shapes-only",
    )
    layout = Layout.of(model, "image+text_head")
    experts = Experts(layout.flatten(trained_parameters(model, "image+text_head")))
    options: dict[str, Any] = {"real_batch": point.batch, "synthetic_batch": point.batch}
    if name in ("mtt", "tesla", "lors"):
        options = {"synthetic_batch": point.batch // 2, "syn_steps": STEPS, "max_start_epoch": 0}
    entry: Any = REGISTRY[name]
    context = Context(
        start=SyntheticPairs(
            torch.rand(point.pairs, 3, size, size), torch.randn(point.pairs, TEXT_WIDTH)
        ),
        real=RealBatches(dataset, "train", model, "image+text_head", torch.device("cpu")),
        model=model,
        protocol="image+text_head",
        seed=0,
        prepared=experts,
    )
    return entry.distiller(entry.config(**options, lr_image=1e-3, lr_text=1e-3), context)


def measure(name: str, point: Point, repeats: int) -> dict[str, Any]:
    """One point, in this process."""
    import torch

    torch.set_num_threads(1)
    method = build(name, point)

    def iterate(iteration: int) -> Timer:
        method.optimizer.zero_grad(set_to_none=True)
        with Timer() as timer:
            method.backward(iteration)
            method.optimizer.step()
            method.after_step(iteration)
        return timer

    iterate(0)
    operations = operations_of(lambda: iterate(1))
    method.optimizer.zero_grad(set_to_none=True)
    settle()
    base = resident_bytes()
    timers = [iterate(2 + i) for i in range(repeats)]
    return {
        "cpu_seconds": [round(t.cpu_seconds, 5) for t in timers],
        "median_cpu_seconds": round(statistics.median(t.cpu_seconds for t in timers), 5),
        "median_seconds": round(statistics.median(t.seconds for t in timers), 5),
        "peak_bytes_above_base": peak_resident_bytes() - base,
        "operations": operations,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="two points an axis, one iteration")
    parser.add_argument("--record", type=Path, default=RECORD)
    arguments = parser.parse_args()
    require_peaks()
    before = load()
    os.environ |= environment(threads=1)
    # Modules are loaded once: every child is a fork of a server that has done nothing else.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    axes = QUICK if arguments.quick else AXES
    plan = [
        (name, axis, value)
        for name in arguments.methods
        for axis in arguments.axes
        for value in axes[axis]
    ]
    runs: dict[tuple[str, Point], dict[str, Any]] = {}
    rows = []
    # One child at a time, a new one for every point.
    with context.Pool(1, maxtasksperchild=1) as pool:
        for name, axis, value in tqdm(plan, desc="points"):
            point = at(axis, value)
            if (name, point) not in runs:  # the common setting lies on three axes
                repeats = 1 if arguments.quick else arguments.repeats
                runs[name, point] = pool.apply(measure, (name, point, repeats))
            rows.append({"method": name, "axis": axis, "value": value, **runs[name, point]})
    record = {
        "what": "one iteration on one thread; one axis changes, the others stay",
        "common": asdict(Point()),
        "pairs_on_the_axis_batch": max(AXES["batch"]),
        "student_steps": STEPS,
        "repeats": 1 if arguments.quick else arguments.repeats,
        "runs": rows,
        "machine": {"load_before_and_after": [before, load()], **machine("torch")},
    }
    write(record, arguments.record)
    for name in arguments.methods:
        print(name)
        for axis in arguments.axes:
            mine = [r for r in rows if r["method"] == name and r["axis"] == axis]
            told = ", ".join(f"{r['value']}: {1e3 * r['median_cpu_seconds']:.0f}" for r in mine)
            print(f"  {axis:10} {told} ms of CPU")


if __name__ == "__main__":
    main()
