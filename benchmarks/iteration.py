"""CovMatch and MDM iterations against the passes that they cannot do without, and as published.

    python benchmarks/iteration.py [--settings scenes-tiny test_nfnet nfnet_l0] [--threads 1 2]

"loop" is an iteration of `mmdd.distill.loop.iterate`, with all that belongs to it. "floor" is the
encoders' unavoidable work on batches of the same shapes that already lie there: for CovMatch the
forward and backward pass of a real batch to the weights, for MDM its forward pass alone, and for
both the forward and backward pass of a synthetic batch to images and texts; no loss, no optimiser.
"naive", for CovMatch, is the algorithm in its plain form: real JPEGs of 500 × 375 pixels are opened
and their captions tokenised for every batch, one forward pass without a graph serves the matching
loss and another one the model update. It takes no gradient that it has no use for.

Every mode runs in a process of its own; the processes take turns, one iteration each. Ratios are
medians over turns of the ratio within a turn, by CPU seconds and by the clock; above one thread the
clock counts, as waiting threads spin. Memory is what is resident at the peak, above what the
process held between iterations. `scenes-tiny` has this project's encoders and tuned settings, but
real batches of 256; `test_nfnet` timm's smallest NFNet at 64 px and the papers' batches, `nfnet_l0`
the papers' network at 224 px and batches of 4; both have random weights and a BERT of two layers.
N = 100, but 4 for `nfnet_l0`. CovMatch runs under `both`, MDM under `image+text_head`.
Results go to iteration.json, one entry per method, setting and number of threads. Linux only.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from _measure import Timer, Worker, add, load, machine, require_peaks, serve

RECORD = Path(__file__).with_suffix(".json")
MODES = {"covmatch": ("floor", "loop", "naive"), "mdm": ("floor", "loop")}
PROTOCOLS = {"covmatch": "both", "mdm": "image+text_head"}
RATIOS = {
    "covmatch": (("loop", "floor"), ("loop", "naive"), ("floor", "naive")),
    "mdm": (("loop", "floor"),),
}
PHOTO = (500, 375)  # pixels of the JPEGs that "naive" opens, as photos of Flickr have them


@dataclass(frozen=True)
class Setting:
    """An image encoder at a size, a set of `pairs` pairs, `real` photos, `repeats` turns.

    batch: real and synthetic pairs in an iteration; None for the methods' own.
    """

    image_size: int
    pairs: int
    real: int
    repeats: int
    batch: int | None = None


SETTINGS = {
    "scenes-tiny": Setting(32, pairs=100, real=300, repeats=15),
    "test_nfnet": Setting(64, pairs=100, real=300, repeats=7),
    "nfnet_l0": Setting(224, pairs=4, real=8, repeats=3, batch=4),
}


# -- one process per mode --------------------------------------------------------------------------


def build(method: str, setting: str, folder: Path) -> Any:
    """The project's distiller, with experts of a few steps where it has some."""
    import torch

    from mmdd.batches import RealBatches, real_pairs
    from mmdd.data.scenes import Scenes
    from mmdd.distill import METHODS, Context
    from mmdd.encoders import ImageEncoderSpec, ModelConfig, TextEncoderSpec, build_model
    from mmdd.encoders.image import build_image_encoder
    from mmdd.presets import preset
    from mmdd.selection import select

    sizes, protocol = SETTINGS[setting], PROTOCOLS[method]
    config = ModelConfig()
    if setting != "scenes-tiny":
        image = ImageEncoderSpec(kind="timm", name=setting, image_size=sizes.image_size)
        small = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = ModelConfig(
            pair="nfnet-bert" if method == "covmatch" else "nfnet-bert-lors",
            image=image,
            text=TextEncoderSpec(
                kind="huggingface",
                name="bert-base-uncased",
                weights="random",
                max_length=24,
                config_overrides=small | {"intermediate_size": 512, "vocab_size": 200},
            ),
            dim=build_image_encoder(image).dim,
        )
    dataset = Scenes.generate(
        {"train": sizes.real, "val": 4, "test": 4}, size=sizes.image_size, seed=0
    )
    model = build_model(config)
    images, choice = select("random", dataset, sizes.pairs, 0)
    context = Context(
        start=real_pairs(dataset, images, choice, model, protocol),
        real=RealBatches(dataset, "train", model, protocol, torch.device("cpu")),
        model=model,
        protocol=protocol,
        seed=0,
        model_config=config.model_dump(mode="json"),
    )
    options: dict[str, Any] = {}
    if setting == "scenes-tiny":
        tuned: Any = preset("small", method=method, protocol=protocol).settings
        options = tuned.model_dump() | {"real_batch": 256}  # more than all `real` photos else
    if sizes.batch is not None:
        options |= {"real_batch": sizes.batch, "synthetic_batch": sizes.batch}
    if method == "mdm":
        rates = {"lr_image": 0.01, "lr_heads": 0.01}
        options["experts"] = {"count": 2, "epochs": 2, "batch_size": sizes.batch or 100, **rates}
    entry: Any = METHODS[method]
    settings = entry.config(**options | {"lr_image": 1e-3, "lr_text": 1e-3})
    prepared, _ = entry.distiller.prepare(settings, context, folder, progress=False)
    return entry.distiller(settings, replace(context, prepared=prepared))


def loop(method: Any, folder: Path) -> Callable[[int], None]:
    """The iteration itself. Snapshots of experts are in memory, as after some iterations."""
    from mmdd.distill.loop import iterate

    if getattr(method, "snapshots", None) is not None:
        for expert in range(len(method.snapshots.buffer)):
            for number in range(method.snapshots.buffer.snapshots + 1):
                method.snapshots.read(expert, number)

    def run(iteration: int) -> None:
        iterate(method, iteration, clip=method.config.clip)

    return run


def floor(method: Any, folder: Path) -> Callable[[int], None]:
    """The passes alone, on batches that are there."""
    import torch

    model, config = method.model, method.config
    real = method.context.real.draw(config.real_batch, method.rng(1, 0))
    rows = torch.arange(min(config.synthetic_batch, len(method.set)))
    with torch.no_grad():
        images, (texts, mask) = method.set.pixels(rows), method.set.text(rows)
    inputs = [images.clone().requires_grad_(), texts.clone().requires_grad_()]
    weights = [p for p in model.parameters() if p.requires_grad]

    def backward(outputs: Any, wanted: Any) -> None:
        ones = [torch.ones_like(o) for o in outputs]
        torch.autograd.grad(outputs, wanted, ones, allow_unused=True)

    def run(iteration: int) -> None:
        with torch.set_grad_enabled(bool(weights)):
            outputs = model(real.images, real.texts, real.mask, normalize=False)
        if weights:
            backward(outputs, weights)
        del outputs
        backward(model(*inputs, mask, normalize=False), inputs)

    return run


def naive(method: Any, folder: Path) -> Callable[[int], None]:
    """CovMatch's algorithm from its description, nothing shared between its steps."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from PIL import Image
    from torch import Tensor

    model, config, dataset = method.model, method.config, method.context.real.dataset
    size = dataset.images.shape[1]
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(dataset.images):
        path = folder / f"{number}.jpg"
        Image.fromarray(pixels).resize(PHOTO, Image.Resampling.BICUBIC).save(path, quality=90)
    encoder, pairs = model.image_encoder, method.set
    mean, std = encoder.mean[:, None, None], encoder.std[:, None, None]
    weights = list(method.trained.values())
    step_model, step_set = method.model_optimizer, method.optimizer

    def read(number: int) -> Tensor:
        with Image.open(folder / f"{number}.jpg") as photo:
            small = photo.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255

    def match(projected: Tensor) -> Tensor:
        return F.normalize(projected, dim=1) if config.normalize else projected

    def covariance(a: Tensor, b: Tensor) -> Tensor:
        return (a - a.mean(0)).T @ (b - b.mean(0)) / (len(a) - 1)

    def run(iteration: int) -> None:
        rng = np.random.default_rng([0, 1, iteration])
        numbers, choice = dataset.draw("train", config.real_batch, rng)
        images = torch.stack([read(number) for number in numbers.tolist()])
        tokens, mask = model.text_encoder.tokenize(dataset.texts_of(numbers, choice))
        with torch.no_grad():
            real = [match(p) for p in model(images, tokens, mask, normalize=False)]
        order = torch.randperm(len(pairs))[: config.synthetic_batch]
        pixels = pairs.images[order] * std + mean
        own_mask = None if pairs.mask is None else pairs.mask[order]
        synthetic = [match(p) for p in model(pixels, pairs.texts[order], own_mask, normalize=False)]
        loss = (config.rho * covariance(*real) - covariance(*synthetic)).square().sum()
        for a, b in zip(real, synthetic, strict=True):
            loss = loss + config.lambda_ * (a.mean(0) - b.mean(0)).square().sum()
        pairs.images.grad, pairs.texts.grad = torch.autograd.grad(loss, [pairs.images, pairs.texts])
        step_set.step()
        loss.item()
        a, b = (F.normalize(p, dim=1) for p in model(images, tokens, mask, normalize=False))
        logits = a @ b.T / config.temperature
        target = torch.arange(len(logits))
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        for weight, gradient in zip(weights, torch.autograd.grad(contrast, weights), strict=True):
            weight.grad = gradient
        step_model.step()
        contrast.item()

    return run


def answer(method: str, setting: str, mode: str, threads: int, folder: Path) -> None:
    """What a process does: iterations when asked to."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    make = {"floor": floor, "loop": loop, "naive": naive}[mode]
    run = make(build(method, setting, folder / "experts"), folder / "photos")

    def iterate(iteration: int) -> dict[str, Any]:
        with Timer() as timer:
            run(iteration)
        return {"seconds": timer.seconds, "cpu_seconds": timer.cpu_seconds}

    print("ready", flush=True)
    serve(iterate)


# -- the process that asks -------------------------------------------------------------------------


def compare(
    method: str, setting: str, threads: int, folder: Path, repeats: int | None = None
) -> dict[str, Any]:
    """What the modes of a method take, and their ratios, the modes taking turns."""
    modes = MODES[method]
    answers: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
    with ExitStack() as stack:
        workers = [  # each is waited for: experts are trained by one process after the other
            stack.enter_context(
                Worker(__file__, mode, [method, setting, mode, threads, str(folder)], threads, True)
            )
            for mode in modes
        ]
        for worker in workers:
            worker.iterate(0)
        for turn in range(repeats or SETTINGS[setting].repeats):
            for worker in workers:
                answers[worker.mode].append(worker.iterate(turn + 1))
    found = {
        mode: {
            "median_seconds": round(statistics.median(a["seconds"] for a in given), 4),
            "median_cpu_seconds": round(statistics.median(a["cpu_seconds"] for a in given), 4),
            "peak_rss_bytes": given[-1]["peak_bytes"],
            "peak_bytes_above_base": given[-1]["peak_bytes"] - given[-1]["base_bytes"],
        }
        for mode, given in answers.items()
    }
    ratios: dict[str, dict[str, float]] = {}
    for first, second in RATIOS[method]:
        turns = list(zip(answers[first], answers[second], strict=True))
        ratios[f"{first}/{second}"] = {
            clock: round(statistics.median(a[clock] / b[clock] for a, b in turns), 3)
            for clock in ("seconds", "cpu_seconds")
        } | {
            "memory": round(
                found[first]["peak_bytes_above_base"] / found[second]["peak_bytes_above_base"], 3
            )
        }
    return {"turns": len(answers["floor"]), "modes": found, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, help="turns, by default as many as fit into minutes")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        method, setting, mode, threads, where = json.loads(arguments.serve)
        answer(method, setting, mode, threads, Path(where))
        return
    require_peaks()
    with tempfile.TemporaryDirectory(prefix="iteration-") as name:
        for setting in arguments.settings:
            for method in arguments.methods:
                for threads in arguments.threads:
                    before = load()
                    folder = Path(name, setting)
                    found = compare(method, setting, threads, folder, arguments.repeats)
                    entry: dict[str, Any] = {
                        "method": method,
                        "name": setting,
                        "threads": threads,
                        "setting": asdict(SETTINGS[setting]),
                        "protocol": PROTOCOLS[method],
                        **found,
                        "machine": {
                            "load_before_and_after": [before, load()],
                            **machine("torch", "timm"),
                        },
                    }
                    add(entry, arguments.record, ("method", "name", "threads"))
                    print(f"{method}, {setting}, {threads} thread(s): {found['ratios']}")


if __name__ == "__main__":
    main()
