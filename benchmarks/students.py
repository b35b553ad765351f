"""Five students of one set evaluated together, against five evaluations one after the other.

    python benchmarks/students.py [--threads 1 2] [--pairs 100] [--epochs 100] [--repeats 2]

Scenes at 32 px with scenes-tiny, five seeds, ten looks at 500 test images. Together: one call of
`mmdd.evaluation.evaluate`, in which students share the features of what is frozen; one after the
other: a call for each. Both must give the same scores to 1e-4 (they are the same bits). For `heads`
a third way is measured on the training alone: the parameters of the five stacked, their losses
mapped over the stack with `torch.func.vmap`. The package does not use it: batched products round
otherwise than single ones, and a near tie in the ranking then falls the other way now and then;
the largest difference of a score is recorded. Given are medians of CPU seconds; the ratios are
medians of pairs. Results go to students.json, one entry per protocol and number of threads.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from _measure import Timer, add, load, machine, run_child

RECORD = Path(__file__).with_suffix(".json")
PROTOCOLS = ("heads", "image+text_head")
STUDENTS = 5


def measure(protocol: str, pairs: int, epochs: int, threads: int) -> None:
    """What a fresh process does; prints its own figures as JSON."""
    from copy import deepcopy

    import torch

    from mmdd import evaluation
    from mmdd.batches import SetBatches, real_pairs
    from mmdd.data.scenes import Scenes
    from mmdd.encoders import DualEncoder, ModelConfig, build_model
    from mmdd.selection import select

    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    dataset = Scenes.generate({"train": 1000, "val": 500, "test": 500})
    template = build_model(ModelConfig())
    chosen = real_pairs(dataset, *select("random", dataset, pairs, 0), template, protocol)

    def make_model(seed: int) -> DualEncoder:
        model = deepcopy(template)
        model.reset_heads(seed)
        return model

    def evaluate(seeds: list[int], epochs: int = epochs) -> list[dict[str, Any]]:
        config = evaluation.EvaluationConfig(epochs=epochs)
        return evaluation.evaluate(
            chosen, dataset, make_model, protocol, config, seeds=seeds, progress=False
        )

    evaluate([0], epochs=1)  # first calls are not measured
    seeds = list(range(STUDENTS))
    with Timer() as together:
        found = evaluate(seeds)
    with Timer() as apart:
        wanted = [evaluate([seed])[0] for seed in seeds]
    answer: dict[str, Any] = {
        "together": together.cpu_seconds,
        "one after the other": apart.cpu_seconds,
        "difference": _difference([r["test"] for r in found], [r["test"] for r in wanted]),
    }
    if protocol == "heads":
        source = SetBatches(chosen, cpu)
        config = evaluation.EvaluationConfig(epochs=epochs)
        features = evaluation.FrozenFeatures(source, template, cpu)
        singles = [make_model(seed) for seed in seeds]
        with Timer() as one_by_one:
            for seed, model in zip(seeds, singles, strict=True):
                evaluation.train_student(
                    source, model, protocol, config, seed, device=cpu, features=features
                )
        models = [make_model(seed) for seed in seeds]
        with Timer() as stacked:
            train_stacked(models, features, config, seeds)
        scorer = evaluation.SplitScorer(dataset, "test", template, protocol, cpu)
        answer |= {
            "training": one_by_one.cpu_seconds,
            "stacked": stacked.cpu_seconds,
            "stacked_difference": _difference(
                [scorer.score(m) for m in models], [scorer.score(m) for m in singles]
            ),
        }
    print(json.dumps(answer))


def _difference(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> float:
    pairs = zip(found, wanted, strict=True)
    return max(abs(a[name] - b[name]) for a, b in pairs for name in a)


def train_stacked(models: list[Any], features: Any, config: Any, seeds: list[int]) -> None:
    """`train_student` under `heads` for several linear projections in one step each, in place."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    from mmdd import losses

    names = ("image_head", "text_head")
    weights = {
        name: nn.Parameter(torch.stack([getattr(m, name).weight.detach() for m in models]))
        for name in names
    }
    optimiser = torch.optim.SGD(
        weights.values(),
        lr=config.lr_heads,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [config.epochs // 2], gamma=0.1)

    def loss_of(image: Tensor, text: Tensor, h_image: Tensor, h_text: Tensor) -> Tensor:
        z = (F.normalize(F.linear(h, w), dim=-1) for h, w in ((h_image, image), (h_text, text)))
        return losses.info_nce(*z, config.temperature)

    for epoch in range(config.epochs):
        orders = [features.batches(config.batch_size, seed, epoch) for seed in seeds]
        for batches in zip(*orders, strict=True):
            h_image, h_text, _ = (torch.stack(parts) for parts in zip(*batches, strict=True))
            loss = torch.func.vmap(loss_of)(*weights.values(), h_image, h_text)
            if not torch.isfinite(loss).all():
                raise SystemExit("a stacked loss is not finite")
            optimiser.zero_grad()
            loss.sum().backward()
            optimiser.step()
        schedule.step()
    with torch.no_grad():
        for number, model in enumerate(models):
            for name in names:
                getattr(model, name).weight.copy_(weights[name][number])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        measure(*json.loads(arguments.child))
        return
    for threads in arguments.threads:
        for protocol in PROTOCOLS:
            before = load()
            order = json.dumps([protocol, arguments.pairs, arguments.epochs, threads])
            runs = [
                run_child(__file__, "--child", order, threads=threads)
                for _ in range(arguments.repeats)
            ]
            if max(run["difference"] for run in runs) > 1e-4:
                raise SystemExit(f"students together score otherwise: {runs}")
            entry: dict[str, Any] = {
                "name": protocol,
                "threads": threads,
                "students": STUDENTS,
                "pairs": arguments.pairs,
                "epochs": arguments.epochs,
                "repeats": arguments.repeats,
            }
            for a, b in (("together", "one after the other"), ("stacked", "training")):
                if a in runs[0]:
                    ratios = [run[a] / run[b] for run in runs]
                    entry[f"{a}_ratio"] = round(statistics.median(ratios), 4)
                    for mode in (a, b):
                        seconds = statistics.median(run[mode] for run in runs)
                        entry[f"{mode.replace(' ', '_')}_cpu_seconds"] = round(seconds, 3)
            for name in ("difference", "stacked_difference"):
                if name in runs[0]:
                    entry[f"largest_{name}"] = max(run[name] for run in runs)
            entry["machine"] = {"load_before_and_after": [before, load()], **machine("torch")}
            add(entry, arguments.record)
            print({name: value for name, value in entry.items() if name != "machine"})


if __name__ == "__main__":
    main()
