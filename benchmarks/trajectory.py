"""Seconds and peak memory of LoRS iterations, one gradient engine against the other.

    python benchmarks/trajectory.py [--settings test_nfnet] [--repeats 5] [--threads 1]

Every engine runs in a process of its own; the processes take turns, one iteration each, so that
all of them meet the same load. Times are medians and are given, like memory, as ratios to
`reference`: the two passes of the authors' LoRS code, written here once more in plain PyTorch. Its
gradient is compared with that of the exact engines before anything is timed. CPU seconds are those
that a process worked, whatever else the machine did; memory is what is resident at the peak, in all
and above what the process held between iterations. A second part measures how the peak grows with
the student's steps.

Weights, images and text vectors are random. Results go to trajectory.json, one entry per setting
and number of threads. The settings with `nfnet_l0` need several GB and minutes per iteration. Linux
only: peaks are the kernel's count.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from _measure import (
    MEBIBYTE,
    Timer,
    Worker,
    add,
    add_ratios,
    load,
    machine,
    report,
    require_peaks,
    serve,
)

RECORD = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Setting:
    """An image encoder, a set of `pairs` pairs, and a student of `steps` steps on `batch` pairs."""

    network: str
    image_size: int
    steps: int
    batch: int
    pairs: int

    @property
    def is_large(self) -> bool:
        """Whether the engines' processes cannot all keep an iteration's memory at a time."""
        return self.image_size > 64


SETTINGS = {
    "test_nfnet": Setting("test_nfnet", 64, steps=8, batch=20, pairs=100),
    "nfnet_l0-8": Setting("nfnet_l0", 224, steps=2, batch=8, pairs=40),
    "nfnet_l0-20": Setting("nfnet_l0", 224, steps=2, batch=20, pairs=40),
}
# How the project's engines are asked for; "reference" is written out below.
MODES: dict[str, dict[str, str]] = {
    "reference": {},
    "double-backward": {"gradient": "detached", "engine": "double-backward"},
    "forward-over-reverse": {"gradient": "detached", "engine": "forward-over-reverse"},
    "finite-difference": {"gradient": "detached", "engine": "finite-difference"},
    "unroll": {"gradient": "full", "engine": "unroll"},
    "double-backward, full": {"gradient": "full", "engine": "double-backward"},
    "forward-over-reverse, full": {"gradient": "full", "engine": "forward-over-reverse"},
}
# What each engine's gradient must equal. Finite differences are compared, but may differ.
AGREES_WITH = {
    "double-backward": "reference",
    "forward-over-reverse": "reference",
    "finite-difference": "reference",
    "double-backward, full": "unroll",
    "forward-over-reverse, full": "unroll",
}
TOLERANCE = 1e-3  # of the relative difference of two exact gradients in float32
GROWTH_MODES = (
    "reference",
    "double-backward",
    "forward-over-reverse",
    "finite-difference",
    "unroll",
)
GROWTH_STEPS = (2, 8, 32)
GROWTH_BATCH = 8


# -- one process per engine ------------------------------------------------------------------------


def build(setting: Setting, mode: str) -> Any:
    """The project's distiller for a setting, with random weights and an expert of two steps."""
    import torch
    from torch import Tensor, nn

    from mmdd.distill import Context
    from mmdd.distill.trajectory import Lors, LorsConfig
    from mmdd.encoders import DualEncoder, ImageEncoderSpec
    from mmdd.encoders.dual import MLPHead
    from mmdd.encoders.image import build_image_encoder
    from mmdd.encoders.text import TextEncoder
    from mmdd.experts import Layout
    from mmdd.losses import contrastive_loss
    from mmdd.protocols import trained_parameters
    from mmdd.synthetic import SyntheticPairs

    class Vectors(TextEncoder):
        """A frozen text encoder of which nothing but the width of its vectors is needed."""

        def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
            raise NotImplementedError

        def embed(self, ids: Tensor) -> Tensor:
            raise NotImplementedError

        def encode(self, embeddings: Tensor, mask: Tensor) -> Tensor:
            raise NotImplementedError

        def input_embedding_parameters(self) -> list[nn.Parameter]:
            return []

    class Experts:
        """One expert in memory: its start and where it went."""

        manifests = ({"snapshots": 1},)
        snapshots = 1

        def __init__(self, *flat: Tensor) -> None:
            self.flat = flat

        def __len__(self) -> int:
            return 1

        def read(self, expert: int, snapshot: int) -> Tensor:
            return self.flat[snapshot]

    torch.manual_seed(0)
    size = setting.image_size
    image_encoder = build_image_encoder(
        ImageEncoderSpec(kind="timm", name=setting.network, image_size=size)
    )
    text_encoder = Vectors(dim=768, embedding_dim=768, max_length=32)
    model = DualEncoder(image_encoder, text_encoder, nn.Identity(), MLPHead(768, image_encoder.dim))
    layout = Layout.of(model, "image+text_head")
    trained = trained_parameters(model, "image+text_head")
    first = layout.flatten(trained)
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(2):
        z_image, z_text = model(torch.rand(8, 3, size, size), torch.randn(8, 768))
        optimizer.zero_grad()
        contrastive_loss("info_nce", z_image, z_text, 0.07, None).backward()
        optimizer.step()
    optimizer.zero_grad()
    experts = Experts(first, layout.flatten(trained))
    start = SyntheticPairs(
        torch.rand(setting.pairs, 3, size, size), torch.randn(setting.pairs, 768)
    )
    options: dict[str, Any] = dict(MODES[mode])
    settings = LorsConfig(
        max_start_epoch=0,
        syn_steps=setting.steps,
        synthetic_batch=setting.batch,
        **options,
    )
    real: Any = SimpleNamespace(device=torch.device("cpu"))
    context = Context(start, real, model, "image+text_head", seed=0, prepared=experts)
    method = Lors(settings, context)
    with torch.no_grad():  # where every part of the similarity has a gradient
        method.learnables()["similarity.right"].normal_(std=0.1)
    return method


def reference(method: Any, iteration: int) -> None:
    """An iteration as the authors' LoRS code does it; puts gradients on the method's learnables.

    One flat vector of parameters per branch. First pass: every step is taken with
    `create_graph=True`, once per branch; of that graph nothing is used but the numbers of the
    gradient. The step's loss, and with it its first-order graph, stays until the next one replaces
    it; all intermediate parameters stay. Second pass: every step's loss is computed again at its
    kept parameters, again with `create_graph=True` per branch; the matching loss is, up to what
    does not depend on the step's inputs, an inner product with that gradient, and is differentiated
    by images, texts and the factors of the similarity.
    Of the method it takes what is learned, the network, the draws and the dropout masks.
    """
    import torch
    import torch.nn.functional as F
    from torch import Tensor
    from torch.func import functional_call

    from mmdd.experts import seeded_dropout

    learned = method.learnables()
    model, layout, alpha = method.model, method.layout, method.similarity.alpha
    std, mean = method.set.std, method.set.mean
    branches = list(layout.sizes)  # image encoder, text head
    rates = method.rates()
    rate = rates.tolist()
    names: dict[str, list[tuple[str, torch.Size]]] = {branch: [] for branch in branches}
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        branch, _, rest = name.partition(".")
        names[branch].append((rest, shape))
    start, target = (
        [piece.clone() for piece in flat.split(list(layout.sizes.values()))]
        for flat in (method.experts.read(0, 0), method.experts.read(0, 1))
    )

    def call(branch: str, flat: Tensor, x: Tensor) -> Tensor:
        # One split, as the authors do: the gradient of a slice each would be as long as all are.
        pieces = flat.split([shape.numel() for _, shape in names[branch]])
        found = {
            name: piece.view(shape)
            for (name, shape), piece in zip(names[branch], pieces, strict=True)
        }
        z = functional_call(getattr(model, branch), found, (x,))
        return z / z.norm(dim=1, keepdim=True)

    def criterion(logits: Tensor, similarity: Tensor) -> Tensor:
        terms = F.binary_cross_entropy_with_logits(logits, similarity, reduction="none")
        positive = (similarity > 0.5).float()
        negative = 1 - positive
        return 0.5 * (
            (terms * positive).sum() / positive.sum() + (terms * negative).sum() / negative.sum()
        )

    def step_loss(flat: Sequence[Tensor], inputs: Sequence[Tensor], step: int) -> Tensor:
        images, texts, omega, left, right = inputs
        similarity = torch.diag(omega) + alpha / left.shape[1] * left @ right.T
        with seeded_dropout([method.seed, iteration, step], images.device):
            z_image = call(branches[0], flat[0], images * std + mean)
            z_text = call(branches[1], flat[1], texts)
        return criterion(z_image @ z_text.T / method.config.temperature, similarity)

    parts = ("images", "texts", "similarity.omega", "similarity.left", "similarity.right")
    sums = [torch.zeros_like(learned[name]) for name in parts]
    batches = method.batches(iteration)
    path = [[t.requires_grad_() for t in start]]
    start = [t.detach() for t in start]
    total = [torch.zeros_like(t) for t in start]
    taken = []
    for step, rows in enumerate(batches):
        inputs = [learned[name].detach()[rows].requires_grad_() for name in parts]
        taken.append(inputs)
        loss = step_loss(path[-1], inputs, step)
        moved = []
        for b, here in enumerate(path[-1]):
            gradient = torch.autograd.grad(loss, here, create_graph=True)[0]
            kept = gradient.detach().clone()
            total[b] += kept
            moved.append((here.detach() - rate[b] * kept).requires_grad_())
            del gradient
        path.append(moved)
    apart = [(s - t).square().sum() for s, t in zip(start, target, strict=True)]
    for step, rows in enumerate(batches):
        again = step_loss(path[step], taken[step], step)
        outer = torch.zeros(())
        for b, here in enumerate(path[step]):
            weight = rate[b] * (target[b] - start[b]) + rate[b] ** 2 * total[b]
            gradient = torch.autograd.grad(again, here, create_graph=True)[0]
            outer = outer + weight @ gradient / apart[b]
        found = torch.autograd.grad(2 * outer, taken[step])
        with torch.no_grad():
            for accumulated, share in zip(sums, found, strict=True):
                accumulated[rows] += share
    for name, accumulated in zip(parts, sums, strict=True):
        learned[name].grad = accumulated
    ends = [start[b] - rates[b] * total[b] - target[b] for b in range(len(branches))]
    matching = sum(e.square().sum() / a for e, a in zip(ends, apart, strict=True))
    learned["rates"].grad = torch.autograd.grad(matching, learned["rates"])[0]


def answer(setting: Setting, mode: str, threads: int, gradients: Path) -> None:
    """What a process does: iterations when asked to; the first has the gradients written."""
    import torch

    torch.set_num_threads(threads)
    method = build(setting, mode)
    run: Callable[[int], Any] = method.backward
    if mode == "reference":
        run = lambda iteration: reference(method, iteration)  # noqa: E731

    def iterate(iteration: int) -> dict[str, Any]:
        method.optimizer.zero_grad(set_to_none=True)
        if setting.is_large and iteration:
            run(iteration)  # its memory was given back, and is not to be faulted in on the clock
            method.optimizer.zero_grad(set_to_none=True)
        with Timer() as timer:
            terms = run(iteration)
        found: dict[str, Any] = {"seconds": timer.seconds, "cpu_seconds": timer.cpu_seconds}
        if iteration == 0:
            torch.save({name: p.grad for name, p in method.learnables().items()}, gradients)
            method.optimizer.zero_grad(set_to_none=True)
            error = (terms or {}).get("relative_error")
            found["relative_error"] = None if error is None else float(error)
        return found

    serve(iterate, give_back=setting.is_large)


# -- the process that asks -------------------------------------------------------------------------


def start(setting: Setting, mode: str, threads: int, gradients: Path) -> Worker:
    """A process with one engine in it."""
    return Worker(__file__, mode, [asdict(setting), mode, threads, str(gradients)], threads)


def relative_differences(found: Path, wanted: Path) -> dict[str, float]:
    """‖found - wanted‖ / ‖wanted‖ for each thing that is learned."""
    import torch

    a, b = (torch.load(path, weights_only=True) for path in (found, wanted))
    if any(value.norm() == 0 for value in b.values()):
        raise SystemExit(f"{wanted.stem}: a gradient is zero: there is nothing to compare")
    return {name: float((a[name] - b[name]).norm() / b[name].norm()) for name in b}


def compare(setting: Setting, modes: Sequence[str], repeats: int, threads: int) -> dict[str, Any]:
    """Time and memory of one iteration, every engine in turn; entries by mode."""
    found: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trajectory-")))
        workers: list[Worker] = []
        gradients = {mode: folder / f"{number}.pt" for number, mode in enumerate(modes)}
        for mode in modes:
            worker = stack.enter_context(start(setting, mode, threads, gradients[mode]))
            workers.append(worker)
            error = worker.iterate(0)["relative_error"]
            found[mode] = {} if error is None else {"reported_relative_error": error}
            other = AGREES_WITH.get(mode, "")
            if other in found:
                differences = relative_differences(gradients[mode], gradients[other])
                worst = max(differences.values())
                say(f"  {mode}: relative difference to {other} at most {worst:.1e}")
                close = all(value < TOLERANCE for value in differences.values())  # no nan either
                if mode != "finite-difference" and not close:
                    raise SystemExit(f"{mode} disagrees with {other}: {differences}")
                found[mode] |= {"differs_from": other, "relative_difference": differences}
        seconds: dict[str, list[float]] = {mode: [] for mode in modes}
        work: dict[str, list[float]] = {mode: [] for mode in modes}
        for repeat in range(repeats):
            for worker in workers:
                answer = worker.iterate(repeat + 1)
                seconds[worker.mode].append(answer["seconds"])
                work[worker.mode].append(answer["cpu_seconds"])
                found[worker.mode] |= {
                    "peak_rss_bytes": answer["peak_bytes"],
                    "peak_bytes_above_base": answer["peak_bytes"] - answer["base_bytes"],
                }
            say(
                f"  repeat {repeat + 1} of {repeats}: "
                + ", ".join(f"{mode} {times[-1]:.2f} s" for mode, times in seconds.items())
            )
    for mode, entry in found.items():
        entry["seconds"] = [round(s, 4) for s in seconds[mode]]
        entry["median_seconds"] = round(statistics.median(seconds[mode]), 4)
        entry["median_cpu_seconds"] = round(statistics.median(work[mode]), 4)
    add_ratios(found, modes[0])
    return found


def growth(setting: Setting, threads: int) -> dict[str, dict[str, int]]:
    """Bytes above the base at the peak of one iteration, by mode and number of steps.

    On small mini-batches, where what grows shows beside what does not.
    """
    table: dict[str, dict[str, int]] = {mode: {} for mode in GROWTH_MODES}
    with tempfile.TemporaryDirectory(prefix="trajectory-") as folder:
        for mode in GROWTH_MODES:
            for steps in GROWTH_STEPS:
                longer = replace(setting, steps=steps, batch=GROWTH_BATCH)
                with start(longer, mode, threads, Path(folder) / "0.pt") as worker:
                    worker.iterate(0)
                    answer = worker.iterate(1)
                table[mode][str(steps)] = answer["peak_bytes"] - answer["base_bytes"]
            sizes = ", ".join(f"{s}: {b / MEBIBYTE:.0f} MiB" for s, b in table[mode].items())
            say(f"  {mode}, peak by steps: {sizes}")
    return table


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["test_nfnet"])
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=list(MODES), help="reference always runs"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-growth", action="store_true", help="leave memory by steps out")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        setting, mode, threads, gradients = json.loads(arguments.serve)
        answer(Setting(**setting), mode, threads, Path(gradients))
        return
    require_peaks()
    modes = [mode for mode in MODES if mode == "reference" or mode in arguments.modes]
    for name in arguments.settings:
        setting = SETTINGS[name]
        say(f"{name}: {setting}")
        before = load()
        entry: dict[str, Any] = {
            "name": name,
            "threads": arguments.threads,
            "setting": asdict(setting),
            "modes": compare(setting, modes, arguments.repeats, arguments.threads),
        }
        if name == "test_nfnet" and not arguments.no_growth:
            entry["growth"] = {
                "batch": GROWTH_BATCH,
                "peak_bytes_above_base_by_steps": growth(setting, arguments.threads),
            }
        entry["machine"] = {
            "load_before_and_after": [before, load()],
            **machine("torch", "timm"),
        }
        add(entry, arguments.record)
        print("\n".join(report(entry["modes"])))


if __name__ == "__main__":
    main()
