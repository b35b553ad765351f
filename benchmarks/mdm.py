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
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_suffix(".json")
MEBIBYTE = 2**20
PAIRS = 100
MODES = ("lors", "covmatch", "mdm", "mdm, nothing kept")
SETTINGS = {"scenes-tiny": 32, "test_nfnet": 64}  # pixels a side


# -- one process per method ------------------------------------------------------------------------


def build(setting: str, mode: str, folder: Path) -> Any:
    """A distiller, with experts of a few steps where it has some."""
    import torch

    from mmdd.batches import RealBatches, real_pairs
    from mmdd.data.scenes import Scenes
    from mmdd.distill import METHODS, Context
    from mmdd.encoders import ImageEncoderSpec, ModelConfig, TextEncoderSpec, build_model
    from mmdd.interpolation import SnapshotCache
    from mmdd.presets import preset
    from mmdd.selection import select

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
    dataset = Scenes.generate({"train": 300, "val": 20, "test": 20}, size=SETTINGS[setting])
    model = build_model(config)
    images, choice = select("random", dataset, PAIRS, 0)
    context = Context(
        start=real_pairs(dataset, images, choice, model, "image+text_head"),
        real=RealBatches(dataset, "train", model, "image+text_head", torch.device("cpu")),
        model=model,
        protocol="image+text_head",
        seed=0,
        model_config=config.model_dump(mode="json"),
    )
    name = mode.split(",")[0]
    entry: Any = METHODS[name]
    options: dict[str, Any] = {}  # the papers' batches
    if setting == "scenes-tiny":
        tuned: Any = preset("small", method=name, protocol="image+text_head").settings
        options = tuned.model_dump()
    if name != "covmatch":
        options["experts"] = {"count": 4, "epochs": 5, "lr_image": 0.01, "lr_heads": 0.01}
    settings = entry.config(**options | {"lr_image": 0.01, "lr_text": 0.01})
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


def _kernel(field: str) -> int:
    """A number of /proc/self/status in bytes: VmRSS is what is resident, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _settle() -> None:
    """Give back what was freed, and let the kernel count the peak from here on."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def serve(setting: str, mode: str, threads: int, folder: Path) -> None:
    """What a process does: one iteration per line of its input; a line of JSON back for each."""
    import torch

    torch.set_num_threads(threads)
    method = build(setting, mode, folder)
    spent = {"seconds": 0.0, "cpu": 0.0}
    if mode.startswith("mdm"):
        draw = method.draw_model

        def timed(iteration: int) -> Any:
            begin, worked = time.perf_counter(), time.process_time()
            found = draw(iteration)
            spent["seconds"] = time.perf_counter() - begin
            spent["cpu"] = time.process_time() - worked
            return found

        method.draw_model = timed
        if "nothing" not in mode:  # what later iterations find in memory
            for expert in range(4):
                for number in range(method.snapshots.buffer.snapshots + 1):
                    method.snapshots.read(expert, number)
    print("ready", flush=True)
    base = 0
    for line in sys.stdin:
        iteration = int(line)
        method.optimizer.zero_grad(set_to_none=True)
        begin, worked = time.perf_counter(), time.process_time()
        method.backward(iteration)
        method.optimizer.step()
        method.after_step(iteration)
        answer: dict[str, Any] = {
            "seconds": time.perf_counter() - begin,
            "cpu_seconds": time.process_time() - worked,
            "model_cpu_seconds": spent["cpu"],
        }
        if iteration == 0:
            method.optimizer.zero_grad(set_to_none=True)
            _settle()
            base = _kernel("VmRSS")
        else:
            answer |= {"base_bytes": base, "peak_bytes": _kernel("VmHWM")}
        print(json.dumps(answer), flush=True)


# -- the process that asks -------------------------------------------------------------------------


class Worker:
    """A process with one method in it."""

    def __init__(self, setting: str, mode: str, threads: int, folder: Path) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
        }
        self.mode = mode
        self.process = subprocess.Popen(
            [
                sys.executable,
                __file__,
                "--serve",
                json.dumps([setting, mode, threads, str(folder)]),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._line()  # experts are trained by one process after the other

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.mode}: the process ended with {self.process.wait()}")
        return line

    def iterate(self, iteration: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{iteration}\n")
        self.process.stdin.flush()
        return json.loads(self._line())


def compare(setting: str, repeats: int, threads: int) -> dict[str, dict[str, Any]]:
    """Every method's times and memory, the methods taking turns."""
    answers: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory(prefix="mdm-") as name, ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(setting, mode, threads, Path(name))) for mode in MODES
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
    for entry in found.values():
        for name in [name for name in entry if name.startswith(("median", "peak"))]:
            entry[f"{name}_ratio"] = round(entry[name] / found["lors"][name], 3)
    return found


def report(modes: dict[str, dict[str, Any]]) -> str:
    """An entry as a table: every figure with its ratio to LoRS."""
    columns = {
        "seconds": ("median_seconds", 1.0),
        "CPU seconds": ("median_cpu_seconds", 1.0),
        "MiB above base": ("peak_bytes_above_base", MEBIBYTE),
        "MiB in all": ("peak_rss_bytes", MEBIBYTE),
    }
    titles = "".join(f"{title:>20}" for title in columns)
    lines = ["".ljust(20) + titles + "   share of the model"]
    for mode, found in modes.items():
        cells = [
            f"{found[name] / unit:13.{3 if unit == 1 else 0}f}{found[f'{name}_ratio']:7.2f}"
            for name, unit in columns.values()
        ]
        share = found.get("share_of_the_model")
        lines.append(mode.ljust(20) + "".join(cells) + (f"{share:15.1%}" if share else ""))
    return "\n".join(lines)


def add(entry: dict[str, Any], record: Path) -> None:
    """Put an entry into the record in place of an older one of the same setting and threads."""
    entries = json.loads(record.read_text(encoding="utf-8")) if record.exists() else []
    entries = [e for e in entries if any(e[k] != entry[k] for k in ("name", "threads"))]
    entries = sorted([*entries, entry], key=lambda e: (e["name"], e["threads"]))
    temporary = record.with_suffix(".tmp")
    temporary.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, record)


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
        serve(setting, mode, threads, Path(folder))
        return
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("this benchmark reads peak memory from /proc: it needs Linux")
    import torch

    for name in arguments.settings:
        load = os.getloadavg()[0]
        entry: dict[str, Any] = {
            "name": name,
            "threads": arguments.threads,
            "image_size": SETTINGS[name],
            "pairs": PAIRS,
            "modes": compare(name, arguments.repeats, arguments.threads),
            "machine": {
                "load_before_and_after": [round(load, 1), round(os.getloadavg()[0], 1)],
                "cores": os.cpu_count(),
                "system": platform.system(),
                "architecture": platform.machine(),
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
        }
        add(entry, arguments.record)
        print(name)
        print(report(entry["modes"]))


if __name__ == "__main__":
    main()
