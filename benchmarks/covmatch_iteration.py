"""Seconds and peak memory of CovMatch iterations with `nfnet-bert` at 224 px, random weights.

    python benchmarks/covmatch_iteration.py [--pairs 100] [--real-batch 64] [--device auto]

Each setting runs in a fresh process, with generated pixels and captions: the time and the memory
depend on shapes only. On a GPU both fp32 and bf16 are measured. Results are added to
covmatch_iteration.json, one entry per device, precision, N and real batch.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

from _measure import Timer, add, peak_resident_bytes, run_child

RECORD = Path(__file__).with_suffix(".json")
KEY = ("device", "precision", "pairs", "real_batch")  # one entry each


def measure(pairs: int, real_batch: int, device_name: str, bf16: bool, repeats: int) -> dict:
    """One setting, in this process: warm-up iteration, then `repeats` timed ones."""
    import numpy as np
    import psutil
    import torch

    from mmdd.batches import RealBatches
    from mmdd.data import PairDataset
    from mmdd.distill import Context, CovMatch, CovMatchConfig
    from mmdd.distill import iterate as step
    from mmdd.encoders import ImageEncoderSpec, ModelConfig, TextEncoderSpec, build_model
    from mmdd.provenance import resolve_device
    from mmdd.synthetic import SyntheticPairs

    device = resolve_device(device_name)
    rng = np.random.default_rng(0)
    words = np.array(["a", "man", "two", "dogs", "run", "on", "the", "green", "grass", "ball"])
    dataset = PairDataset(
        rng.integers(0, 256, (max(real_batch, 2), 224, 224, 3), dtype=np.uint8),
        [[" ".join(rng.choice(words, 18))] for _ in range(max(real_batch, 2))],
        {"train": np.arange(max(real_batch, 2))},
        name="shapes-only",
    )
    model = build_model(
        ModelConfig(
            pair="nfnet-bert",
            image=ImageEncoderSpec(kind="timm", name="nfnet_l0", image_size=224),
            text=TextEncoderSpec(
                kind="huggingface", name="bert-base-uncased", weights="random", max_length=32
            ),
        )
    ).to(device)
    torch.manual_seed(0)
    length = model.text_encoder.max_length
    start = SyntheticPairs(
        torch.rand(pairs, 3, 224, 224),
        0.02 * torch.randn(pairs, length, model.text_encoder.embedding_dim),
        text_mask=torch.ones(pairs, length, dtype=torch.bool),
    )
    method = CovMatch(
        CovMatchConfig(real_batch=real_batch, synthetic_batch=pairs, lr_image=1e-3, lr_text=1e-3),
        Context(
            start=start,
            real=RealBatches(dataset, "train", model, "both", device),
            model=model,
            protocol="both",
            seed=0,
            precision="bfloat16" if bf16 else "float32",
        ),
    )

    def iterate(iteration: int) -> float:
        with Timer() as timer:
            step(method, iteration)
            if device.type == "cuda":
                torch.cuda.synchronize()
        return timer.seconds

    iterate(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [iterate(i + 1) for i in range(repeats)]
    if device.type == "cuda":
        peak = int(torch.cuda.max_memory_allocated())
    else:
        peak = peak_resident_bytes() or psutil.Process().memory_info().rss
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "device": name,
        "precision": "bf16" if bf16 else "fp32",
        "pairs": pairs,
        "real_batch": real_batch,
        "seconds_per_iteration": round(statistics.median(seconds), 4),
        "timed_iterations": repeats,
        "peak_memory_bytes": peak,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[16])
    parser.add_argument("--real-batch", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--one", choices=["fp32", "bf16"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        entry = measure(
            arguments.pairs[0],
            arguments.real_batch,
            arguments.device,
            arguments.one == "bf16",
            arguments.repeats,
        )
        print(json.dumps(entry))
        return
    import torch

    gpu = arguments.device != "cpu" and torch.cuda.is_available()
    for pairs in arguments.pairs:
        for precision in ("fp32", "bf16") if gpu else ("fp32",):
            command = ["--one", precision, "--pairs", str(pairs), "--device", arguments.device]
            command += ["--real-batch", str(arguments.real_batch)]
            command += ["--repeats", str(arguments.repeats)]
            try:
                entry = run_child(__file__, *command)
            except subprocess.CalledProcessError as error:
                print(f"N={pairs} {precision}: failed ({error})", file=sys.stderr)
                continue
            add(entry, arguments.record, KEY)
            print(entry)


if __name__ == "__main__":
    main()
