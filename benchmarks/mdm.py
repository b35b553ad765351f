"""Seconds and peak memory of an MDM iteration against LoRS and CovMatch, with the same encoders.

    python benchmarks/mdm.py [--settings scenes-tiny test_nfnet] [--repeats 9] [--threads 1]

Each method runs in a process of its own, at N = 100 under the protocol `image+text_head`; the
processes take turns, one iteration each, so that all of them meet the same load. Times are medians
and are given, like memory, as ratios to LoRS. CPU seconds are those that a process worked, whatever
else the machine did; memory is what is resident at the peak, in all and above what the process held
between iterations. MDM runs twice, with and without snapshots kept in memory, and says how much of
its time goes into making the model of an iteration: reading snapshots and interpolating them.

`scenes-tiny` has this project's encoders and its tuned batches. `test_nfnet` is timm's smallest
NFNet at 64 px with random weights and a text head of two layers, as in the LoRS paper, and has the
papers' batches: MDM 64 real and 64 synthetic pairs, CovMatch 256 and all, LoRS 8 steps of 20.
Experts are trained for a few steps: time and memory do not depend on how well.
Results go to mdm.json, one entry per setting and number of threads. Linux only: peaks are the
kernel's count.
"""

import argparse
import json
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from _measure import (
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
PAIRS = 100
MODES = ("lors", "covmatch", "mdm", "mdm, nothing kept")
SETTINGS = {"scenes-tiny": 32, "test_nfnet": 64}  # pixels a side


# -- one process per method ------------------------------------------------------------------------


def build(setting: str, mode: str, folder: Path, pairs: int = PAIRS) -> Any:
    """A distiller, with experts of a few steps where it has some."""
    import torch

    from mmdd.batches import RealBatches, real_pairs
    from mmdd.data.scenes import Scenes
    from mmdd.distill import METHODS, Context
    from mmdd.encoders import ImageEncoderSpec, ModelConfig, TextEncoderSpec, build_model
    from mmdd.presets import preset
    from mmdd.selection import select
    from mmdd.snapshots import SnapshotCache

    config = ModelConfig()
    if setting != "scenes-tiny":
        sizes = {"hidden_size": 768, "num_hidden_layers": 1, "num_attention_heads": 12}
        config = ModelConfig(
            pair="nfnet-bert-lors",
            image=ImageEncoderSpec(kind="timm", name=setting, image_size=SETTINGS[setting]),
            text=TextEncoderSpec(
                kind="huggingface",
                name="minilm",
                pooling="mean",
                max_length=24,
                config_overrides=sizes | {"intermediate_size": 64, "vocab_size": 200},
            ),
            dim=_width(setting),
        )
    name = mode.split(",")[0]
    entry: Any = METHODS[name]
    options: dict[str, Any] = {}  # the papers' batches
    if setting == "scenes-tiny":
        tuned: Any = preset("small", method=name, protocol="image+text_head").settings
        options = tuned.model_dump()
    if "experts" in entry.config.model_fields:
        options["experts"] = {"count": 4, "epochs": 5, "lr_image": 0.01, "lr_heads": 0.01}
    settings = entry.config(**options | {"lr_image": 0.01, "lr_text": 0.01})
    # A real batch holds no more than there is: with too few scenes an iteration is too cheap.
    train = max(300, 2 * pairs, getattr(settings, "real_batch", 0))
    dataset = Scenes.generate({"train": train, "val": 20, "test": 20}, size=SETTINGS[setting])
    model = build_model(config)
    images, choice = select("random", dataset, pairs, 0)
    context = Context(
        start=real_pairs(dataset, images, choice, model, "image+text_head"),
        real=RealBatches(dataset, "train", model, "image+text_head", torch.device("cpu")),
        model=model,
        protocol="image+text_head",
        seed=0,
        model_config=config.model_dump(mode="json"),
    )
    prepared, _ = entry.distiller.prepare(settings, context, folder, progress=False)

    method = entry.distiller(settings, replace(context, prepared=prepared))
    if mode == "mdm, nothing kept":
        method.snapshots = SnapshotCache(prepared, torch.device("cpu"), limit=0)
    return method


def _width(setting: str) -> int:
    from mmdd.encoders import ImageEncoderSpec
    from mmdd.encoders.image import build_image_encoder

    spec = ImageEncoderSpec(kind="timm", name=setting, image_size=SETTINGS[setting])
    return build_image_encoder(spec).dim


def answer(setting: str, mode: str, threads: int, folder: Path) -> None:
    """What a process does: says when it is ready, then iterations when asked to."""
    import torch

    torch.set_num_threads(threads)
    method = build(setting, mode, folder)
    drawing = Timer()
    if mode.startswith("mdm"):
        draw = method.draw_model

        def timed(iteration: int) -> Any:
            with drawing:
                return draw(iteration)

        method.draw_model = timed
        if "nothing" not in mode:  # what later iterations find in memory
            for expert in range(4):
                for number in range(method.snapshots.buffer.snapshots + 1):
                    method.snapshots.read(expert, number)

    def iterate(iteration: int) -> dict[str, Any]:
        method.optimizer.zero_grad(set_to_none=True)
        with Timer() as timer:
            method.backward(iteration)
            method.optimizer.step()
            method.after_step(iteration)
        if iteration == 0:
            method.optimizer.zero_grad(set_to_none=True)
        return {
            "seconds": timer.seconds,
            "cpu_seconds": timer.cpu_seconds,
            "model_cpu_seconds": drawing.cpu_seconds,
        }

    print("ready", flush=True)
    serve(iterate)


# -- the process that asks -------------------------------------------------------------------------


def compare(setting: str, repeats: int, threads: int) -> dict[str, dict[str, Any]]:
    """Every method's times and memory, the methods taking turns."""
    answers: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory(prefix="mdm-") as name, ExitStack() as stack:
        workers = [  # each is waited for: experts are trained by one process after the other
            stack.enter_context(
                Worker(__file__, mode, [setting, mode, threads, name], threads, greets=True)
            )
            for mode in MODES
        ]
        for worker in workers:
            worker.iterate(0)
        for repeat in range(repeats):
            for worker in workers:
                answers[worker.mode].append(worker.iterate(repeat + 1))
    found: dict[str, dict[str, Any]] = {}
    for mode, given in answers.items():
        median = {key: statistics.median(a[key] for a in given) for key in given[0]}
        found[mode] = {
            "median_seconds": round(median["seconds"], 4),
            "median_cpu_seconds": round(median["cpu_seconds"], 4),
            "peak_rss_bytes": given[-1]["peak_bytes"],
            "peak_bytes_above_base": given[-1]["peak_bytes"] - given[-1]["base_bytes"],
        }
        if mode.startswith("mdm"):
            share = statistics.median(a["model_cpu_seconds"] / a["cpu_seconds"] for a in given)
            found[mode]["share_of_the_model"] = round(share, 4)
    add_ratios(found, "lors")
    return found


def lines(modes: dict[str, dict[str, Any]]) -> list[str]:
    """An entry as a table: every number with its ratio to LoRS, and MDM's share of the model."""
    title, *rows = report(modes, digits=3)
    shares = [found.get("share_of_the_model") for found in modes.values()]
    ends = ["" if share is None else f"{share:15.1%}" for share in shares]
    return [
        title + "   share of the model",
        *(row + end for row, end in zip(rows, ends, strict=True)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        setting, mode, threads, folder = json.loads(arguments.serve)
        answer(setting, mode, threads, Path(folder))
        return
    require_peaks()
    for name in arguments.settings:
        before = load()
        entry: dict[str, Any] = {
            "name": name,
            "threads": arguments.threads,
            "image_size": SETTINGS[name],
            "pairs": PAIRS,
            "modes": compare(name, arguments.repeats, arguments.threads),
            "machine": {"load_before_and_after": [before, load()], **machine("torch")},
        }
        add(entry, arguments.record)
        print(name)
        print("\n".join(lines(entry["modes"])))


if __name__ == "__main__":
    main()
