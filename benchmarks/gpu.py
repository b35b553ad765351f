"""Iterations at the papers' size on one NVIDIA GPU: seconds, memory, what they use of it, waits.

    python benchmarks/gpu.py [--parts iterations gains waits students end-to-end] [--minutes 9]
    python benchmarks/gpu.py --smoke       # all of it in small, on any machine; keeps no numbers

nfnet_l0 at 224 px and BERT base with random weights, on Scenes; CovMatch under `both` with batches
of 128, the others under `image+text_head` with their papers' batches and two short experts.

iterations: CovMatch, MDM, LoRS, TESLA and MTT in bfloat16 at 100, 200 and 500 pairs. Seconds are
medians, memory is torch's peak above what was held between iterations, and in all; operations of
products and convolutions are counted by torch in one iteration, and utilisation is their rate over
the peak rate of the GPU's tensor cores, where that is known.
gains: two CovMatch runs that differ in one thing take turns; the ratio is the median over turns.
waits: what a profile of one iteration shows the host waiting for; 1 is the reading of the losses.
students: five that train their image encoder, one after the other and each on a stream of its own.
end-to-end: encoders trained from scratch on Scenes, CovMatch with them, students of the set and of
random pairs.

The pieces that gpu.json holds already, made on the same GPU, are left out (--redo makes them
again); after --minutes no further piece is started, and the next call goes on. Without CUDA nothing
is measured.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from _measure import machine, operations_of, peak_resident_bytes, resident_bytes, write

RECORD = Path(__file__).with_suffix(".json")
METHODS = ("covmatch", "mdm", "lors", "tesla", "mtt")
GAINS = {  # what is compared: (with it, without it)
    "TF32": ("tf32", "float32"),
    "bfloat16": ("bfloat16", "float32"),
    "channels-last": ("bfloat16", "bfloat16, channels first"),
    "torch.compile": ("bfloat16, compiled", "bfloat16"),
}
# Dense products per second by the makers' data sheets: bfloat16, TF32, float32 without either.
PEAKS = {
    "H200": {"bfloat16": 989e12, "tf32": 494e12, "float32": 67e12},
    "H100": {"bfloat16": 989e12, "tf32": 494e12, "float32": 67e12},
    "A100": {"bfloat16": 312e12, "tf32": 156e12, "float32": 19.5e12},
}
# The host stands still in these until the GPU has caught up.
WAITS = (
    *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
    *("cudaMemcpy", "cudaFree", "cudaMalloc"),
)
CPU_WAITS = ("aten::_local_scalar_dense",)  # what of it a CPU shows


@dataclass(frozen=True)
class Size:
    """How large everything is. train, test: images; turns: timed iterations."""

    image_size: int
    pairs: tuple[int, ...]
    train: int
    test: int
    batch: int
    turns: int
    epochs: int  # of the encoders' own training
    iterations: int  # of the distillation end to end
    student_epochs: int
    options: dict[str, Any] = field(default_factory=dict)  # of all methods


FULL = Size(224, (100, 200, 500), 1000, 200, 128, 7, epochs=60, iterations=200, student_epochs=100)
SMOKE = Size(
    *(32, (4,), 24, 8, 4, 1),
    epochs=1,
    iterations=2,
    student_epochs=2,
    options={"real_batch": 4, "synthetic_batch": 4, "syn_steps": 2},
)


class Bench:
    """What the pieces share: device, data, encoders, a folder for experts."""

    def __init__(self, size: Size, smoke: bool, folder: Path) -> None:
        import torch

        from mmdd.data.scenes import Scenes
        from mmdd.provenance import resolve_device

        self.size, self.smoke, self.folder = size, smoke, folder
        self.device = resolve_device("cpu" if smoke else "cuda")
        self.gpu = "none" if smoke else torch.cuda.get_device_name(self.device)
        splits = {"train": size.train, "val": 8, "test": size.test}
        self.dataset = Scenes.generate(splits, size=size.image_size, seed=0)
        self._templates: dict[str, Any] = {}

    def model_config(self, name: str) -> Any:
        from mmdd.encoders import ImageEncoderSpec, ModelConfig, TextEncoderSpec

        if self.smoke:
            return ModelConfig(dim=12)
        bert = TextEncoderSpec(kind="huggingface", name="bert-base-uncased", max_length=32)
        return ModelConfig(
            pair="nfnet-bert" if name == "covmatch" else "nfnet-bert-lors",
            image=ImageEncoderSpec(kind="timm", name="nfnet_l0", image_size=self.size.image_size),
            text=bert,
        )

    def model(self, name: str) -> Any:
        """A method's model of its own, on the device."""
        from mmdd.devices import place
        from mmdd.encoders import build_model

        config = self.model_config(name)
        if config.pair not in self._templates:
            self._templates[config.pair] = build_model(config)  # on the host, and not counted
        return place(deepcopy(self._templates[config.pair]), self.device)

    def context(self, name: str, pairs: int, precision: str, model: Any = None) -> Any:
        from mmdd.batches import RealBatches, real_pairs
        from mmdd.distill import Context
        from mmdd.selection import select

        model = self.model(name) if model is None else model
        protocol: Any = "both" if name == "covmatch" else "image+text_head"
        chosen: Any = precision
        return Context(
            start=real_pairs(
                self.dataset, *select("random", self.dataset, pairs, 0), model, protocol
            ),
            real=RealBatches(self.dataset, "train", model, protocol, self.device),
            model=model,
            protocol=protocol,
            seed=0,
            precision=chosen,
            model_config=self.model_config(name).model_dump(mode="json"),
        )

    def method(self, name: str, pairs: int, precision: str) -> Any:
        """A distiller with all snapshots of its experts where they are kept."""
        from mmdd.distill import METHODS as REGISTERED

        options: dict[str, Any] = {"lr_image": 1e-3, "lr_text": 1e-3}
        if name == "covmatch":
            options |= {"real_batch": self.size.batch, "synthetic_batch": self.size.batch}
        else:
            rates = {"lr_image": 1e-3, "lr_heads": 1e-2}
            batch = {"batch_size": min(self.size.batch, self.size.train // 2)}
            options |= {"experts": {"count": 2, "epochs": 2, **batch, **rates}}
            options |= {"max_start_epoch": 1}
        entry: Any = REGISTERED[name]
        options |= self.size.options
        fields = entry.config.model_fields
        config = entry.config(**{k: v for k, v in options.items() if k in fields})
        context = self.context(name, pairs, precision)
        prepared, _ = entry.distiller.prepare(config, context, self.folder, progress=False)
        method = entry.distiller(config, replace(context, prepared=prepared))
        if getattr(method, "snapshots", None) is not None:
            for expert in range(len(prepared)):
                for number in range(prepared.snapshots + 1):
                    method.snapshots.read(expert, number)
        return method

    # -- clocks ------------------------------------------------------------------------------------

    def wait(self) -> None:
        import torch

        if not self.smoke:
            torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        """Give the memory of the last piece back, and count the peak from here on."""
        import gc

        import torch

        gc.collect()
        if not self.smoke:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def held(self) -> int:
        import torch

        return resident_bytes() if self.smoke else torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        import torch

        return peak_resident_bytes() if self.smoke else torch.cuda.max_memory_allocated(self.device)

    def seconds(self, work: Callable[[], Any]) -> float:
        self.wait()
        begin = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - begin

    def iterate(self, method: Any, iteration: int) -> None:
        from mmdd.devices import arithmetic
        from mmdd.distill.loop import iterate

        with arithmetic(method.context.precision, self.device):
            iterate(method, iteration, clip=method.config.clip)

    def peak_rate(self, precision: str) -> float | None:
        found = (rates[precision] for name, rates in PEAKS.items() if name in self.gpu)
        return next(found, None)


# -- pieces ----------------------------------------------------------------------------------------


def iterations(bench: Bench, name: str, pairs: int) -> dict[str, Any]:
    """Seconds, memory and operations of one method at one budget."""
    precision = "bfloat16"
    method = bench.method(name, pairs, precision)
    bench.iterate(method, 0)
    operations = operations_of(partial(bench.iterate, method, 1))
    bench.forget()
    held = bench.held()
    spent = [
        bench.seconds(partial(bench.iterate, method, i)) for i in range(2, 2 + bench.size.turns)
    ]
    median = statistics.median(spent)
    rate, possible = operations / median, bench.peak_rate(precision)
    return {
        "precision": precision,
        "median_seconds": round(median, 5),
        "seconds": [round(s, 5) for s in spent],
        "peak_bytes": bench.peak(),
        "peak_bytes_above_held": bench.peak() - held,
        "operations": operations,
        "utilisation": round(rate / possible, 4) if possible else None,
    }


@contextmanager
def _channels_first() -> Iterator[None]:
    """The images' layout as it would be without channels-last, real batches included."""
    from mmdd import batches, devices

    kept = devices.channels_last, batches._pixels
    devices.channels_last = lambda device: False
    batches._pixels = lambda raw: kept[1](raw).contiguous()
    try:
        yield
    finally:
        devices.channels_last, batches._pixels = kept


def gain(bench: Bench, what: str) -> dict[str, Any]:
    """An iteration of CovMatch with something over one without it, in turns."""
    pairs = bench.size.pairs[0]
    if bench.smoke and what == "TF32":
        return {"ratio": None, "ways": list(GAINS[what]), "note": "no TF32 on a CPU"}

    def prepared(way: str) -> tuple[Any, Any]:
        around = _channels_first if "channels first" in way else nullcontext
        with around():
            method = bench.method("covmatch", pairs, way.split(",")[0])
            if "compiled" in way:
                # tracing alone, where there may be no compiler
                method.compile_encoders(*(["eager"] if bench.smoke else []))
        return method, around

    ways = {way: prepared(way) for way in GAINS[what]}
    spent: dict[str, list[float]] = {way: [] for way in ways}
    # The first iterations compile and choose kernels.
    for iteration in range(3 + bench.size.turns):
        for way, (method, around) in ways.items():
            with around():
                took = bench.seconds(partial(bench.iterate, method, iteration))
            if iteration >= 3:
                spent[way].append(took)
    there, without = (spent[way] for way in GAINS[what])
    return {
        "ratio": round(statistics.median(a / b for a, b in zip(there, without, strict=True)), 4),
        "seconds": {way: [round(s, 5) for s in times] for way, times in spent.items()},
        "ways": list(GAINS[what]),
    }


def waits(bench: Bench, name: str) -> dict[str, Any]:
    """How often the host waited for the device in an iteration, by what it called."""
    from torch.profiler import ProfilerActivity, profile, record_function

    method = bench.method(name, bench.size.pairs[0], "bfloat16")
    for iteration in range(3):  # memory is found, kernels are chosen
        bench.iterate(method, iteration)
    bench.wait()
    activities = [ProfilerActivity.CPU]
    if not bench.smoke:
        activities.append(ProfilerActivity.CUDA)
    profiler = profile(activities=activities, acc_events=True)
    with profiler, record_function("iteration"):
        bench.iterate(method, 3)
    events = profiler.events() or []
    # The profiler waits at its end, too: what counts lies within the iteration.
    whole = next(e.time_range for e in events if e.name == "iteration")
    inside = [e for e in events if whole.start <= e.time_range.start < whole.end]
    names = CPU_WAITS if bench.smoke else WAITS
    counts = {n: sum(e.name == n for e in inside) for n in names}
    return {"waits": {n: c for n, c in counts.items() if c}, "events": len(inside)}


def students(bench: Bench) -> dict[str, Any]:
    """Five students with image encoders of their own: in turn, and each on its own stream."""
    import torch

    from mmdd import losses
    from mmdd.batches import SetBatches
    from mmdd.protocols import freeze_all_but

    count = 2 if bench.smoke else 5
    source = SetBatches(bench.context("mdm", bench.size.pairs[0], "float32").start, bench.device)
    rows = torch.arange(len(source), device=bench.device)

    class Student:
        def __init__(self, seed: int) -> None:
            self.model = bench.model("mdm")
            self.model.reset_heads(seed)
            trained = freeze_all_but(self.model, "image+text_head")
            self.optimiser = torch.optim.SGD(list(trained.values()), lr=1e-3, momentum=0.9)
            self.stream = None if bench.smoke else torch.cuda.Stream(bench.device)

        def step(self) -> None:
            batch = source.take(rows)
            loss = losses.info_nce(*self.model(batch.images, batch.texts, batch.mask))
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()

    steps = 1 if bench.smoke else 5
    group = [Student(seed) for seed in range(count)]

    def in_turn() -> None:
        for student in group:
            for _ in range(steps):
                student.step()

    def at_once() -> None:
        for _ in range(steps):
            for student in group:
                with nullcontext() if bench.smoke else torch.cuda.stream(student.stream):
                    student.step()

    in_turn()
    bench.wait()
    at_once()
    found = [(bench.seconds(at_once), bench.seconds(in_turn)) for _ in range(3)]
    return {
        "students": count,
        "steps": steps,
        "ratio": round(statistics.median(a / b for a, b in found), 4),
        "seconds": [[round(a, 4), round(b, 4)] for a, b in found],
    }


def end_to_end(bench: Bench) -> dict[str, Any]:
    """From encoders that know nothing to the recall of students; all parts timed."""
    import torch

    from mmdd.batches import RealBatches
    from mmdd.distill import CovMatch, CovMatchConfig, distill
    from mmdd.evaluation import EvaluationConfig, SplitScorer, evaluate
    from mmdd.losses import info_nce

    size, pairs = bench.size, bench.size.pairs[0]
    model = bench.model("covmatch")
    real = RealBatches(bench.dataset, "train", model, "both", bench.device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-4)

    def train_encoders() -> None:
        model.train()
        for epoch in range(size.epochs):
            for batch in real.epoch(size.batch, 0, epoch):
                if len(batch.images) < 2:
                    continue
                with torch.autocast(bench.device.type, torch.bfloat16):
                    z_image, z_text = model(batch.images, batch.texts, batch.mask)
                loss = info_nce(z_image.float(), z_text.float())
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()

    spent = {"training the encoders": bench.seconds(train_encoders)}
    scorer = SplitScorer(bench.dataset, "test", model, "both", bench.device)
    recall = {"the encoders": scorer.score(model)["mean"]}
    context = bench.context("covmatch", pairs, "bfloat16", deepcopy(model))
    settings = CovMatchConfig(
        **{"real_batch": size.batch, "synthetic_batch": size.batch, "normalize": True},
        **{"rho": 1.5, "optimizer": "adam", "lr_image": 0.01, "lr_text": 0.002},
        iterations=size.iterations,
    )
    sets = {"random pairs": context.start}

    def distil() -> None:
        method = CovMatch(settings, context)
        sets["CovMatch"] = distill(method, settings.iterations, progress=False)[0]

    spent["distilling"] = bench.seconds(distil)
    wanted = EvaluationConfig(
        students=2, epochs=size.student_epochs, batch_size=size.batch, scores=1
    )

    def student(seed: int) -> Any:
        fresh = deepcopy(model)
        fresh.reset_heads(seed)
        return fresh

    for name, chosen in sets.items():
        found: list[Any] = []

        def score(chosen: Any = chosen, found: list[Any] = found) -> None:
            found += evaluate(
                *(chosen, bench.dataset, student, "both", wanted),
                device=bench.device,
                progress=False,
            )

        spent[f"students of {name}"] = bench.seconds(score)
        recall[name] = statistics.mean(s["test"]["mean"] for s in found)
    recall["chance"] = scorer.chance()["mean"]
    return {
        "pairs": pairs,
        "images": {"train": size.train, "test": size.test},
        "iterations": size.iterations,
        "seconds": {name: round(s, 2) for name, s in spent.items()},
        "recall": {name: round(value, 3) for name, value in recall.items()},
        "peak_bytes": bench.peak(),
    }


def pieces(size: Size) -> dict[str, dict[str, Callable[[Bench], dict[str, Any]]]]:
    """Everything there is to measure: part → name of the piece → what measures it."""
    return {
        "iterations": {
            f"{name} {pairs}": partial(iterations, name=name, pairs=pairs)
            for pairs in size.pairs
            for name in METHODS
        },
        "gains": {what: partial(gain, what=what) for what in GAINS},
        "waits": {name: partial(waits, name=name) for name in METHODS},
        "students": {"image+text_head": students},
        "end-to-end": {"scenes": end_to_end},
    }


def measure(bench: Bench, parts: list[str], record: Path, minutes: float, redo: bool) -> None:
    """Carry out what the record lacks, and write it after every piece."""
    import torch

    begin = time.perf_counter()
    found: dict[str, Any] = {}
    if record.exists():
        found = json.loads(record.read_text(encoding="utf-8"))
    if found.get("machine", {}).get("gpu") != bench.gpu:  # two GPUs make no table
        found = {}
    found["image_size"] = bench.size.image_size
    found["machine"] = {"gpu": bench.gpu, "cuda": torch.version.cuda} | machine(
        "torch", "timm", "transformers"
    )
    todo = [
        (part, name, work)
        for part, members in pieces(bench.size).items()
        for name, work in members.items()
        if part in parts and (redo or "error" in found.get(part, {}).get(name, {"error": ""}))
    ]
    failed = 0
    for place, (part, name, work) in enumerate(todo):
        if time.perf_counter() - begin > 60 * minutes:
            print(f"{len(todo) - place} pieces are left: run the script again")
            break
        bench.forget()
        started = time.perf_counter()
        try:
            answer = work(bench)
        except Exception as error:  # the other pieces may do
            told = str(error).splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {told[0]}"}
        answer["took"] = round(time.perf_counter() - started, 1)
        found.setdefault(part, {})[name] = answer
        write(found, record)
        short = {k: v for k, v in answer.items() if not isinstance(v, list)}
        print(f"{part}, {name}: {short}", flush=True)
        failed += "error" in answer
    if failed:
        raise SystemExit(f"{failed} pieces failed; the next call tries them again")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    known = list(pieces(FULL))
    parser.add_argument("--parts", nargs="+", choices=known, default=known, metavar="PART")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no piece after these")
    parser.add_argument("--redo", action="store_true", help="measure again what is there")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU; keeps no numbers")
    parser.add_argument("--record", type=Path, help="another file than gpu.json")
    arguments = parser.parse_args()
    if arguments.smoke and (arguments.record or RECORD).resolve() == RECORD.resolve():
        arguments.record = Path(tempfile.mkdtemp()) / "smoke.json"
    import torch

    if not arguments.smoke and not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured (--smoke tries the script on a CPU)")
        return
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(SMOKE if arguments.smoke else FULL, arguments.smoke, Path(folder))
        record = arguments.record or RECORD
        measure(bench, arguments.parts, record, arguments.minutes, arguments.redo)


if __name__ == "__main__":
    main()
