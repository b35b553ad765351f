"""Kill runs at random moments, start them again, and compare with runs that nobody disturbed.

    python tools/kill_runs.py [--kills 100] [--steps prepare experts …] [--seed 0] [--record FILE]

Five steps: decoding images into the cache, training experts, distilling, training students, and a
sweep. Each is a real process that gets SIGKILL, SIGTERM or SIGINT after a random time, and is
started again, up to four times in a row, before it may finish. After every kill each file under a
final name must be whole, and what was finished before must still be there; what comes out in the
end must be, but for times, what the undisturbed run gave, to the bit. Writes how many kills were
tried and survived to benchmarks/kills.json; exits with 1 where one was not. 100 kills take about
ten minutes on two cores.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from PIL import Image
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from _kills import (  # type: ignore[import-not-found]  # noqa: E402
    family,
    marked,
    records,
    shoot,
)
from _measure import (  # type: ignore[import-not-found]  # noqa: E402
    code_version,
    environment,
    load,
    machine,
    write,
)

from mmdd.files import file_sha256, load_checked, tensors_sha256  # noqa: E402
from mmdd.seal import unsealed  # noqa: E402

RECORD = ROOT / "benchmarks" / "kills.json"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STEPS = ("prepare", "experts", "distil", "evaluate", "sweep")
IN_A_ROW = 4  # kills of one piece of work, at most, before it is let alone
MARK = "MMDD_KILLED_RUN"  # an environment variable by which what a sweep leaves behind is found

SMALL = {"train": 160, "val": 40, "test": 40}
FEW = {"students": 1, "epochs": 2, "scores": 1}
DISTIL: dict[str, dict[str, Any]] = {
    "covmatch": {"iterations": 60, "real_batch": 64, "normalize": True},
    "lors": {
        "iterations": 16,
        "syn_steps": 4,
        "max_start_epoch": 1,
        "experts": {"count": 2, "epochs": 2, "batch_size": 32},
    },
}
EXPERTS = {"count": 3, "epochs": 3, "batch_size": 16, "snapshot_every": 3, "momentum": 0.9}


# -- the work, in the process that is shot at ------------------------------------------------------

# Reads lines of JSON and forks `job` for each: importing torch once saves seconds each.
SERVER = """
import json, os, sys, tempfile, traceback
import torch
from mmdd.__main__ import main
from mmdd.config import DatasetConfig, RunConfig, RuntimeConfig
from mmdd.data.open import open_dataset
from mmdd.data import readers
from mmdd.expert_jobs import train_expert
from mmdd.presets import preset
from mmdd.runs import run

torch.set_num_threads(1)

def job(step, folder, options):
    os.environ["MMDD_CACHE"] = folder + "/cache"
    if step == "prepare":
        dataset = DatasetConfig(name="photos", reader="karpathy", size=64)
        open_dataset(dataset, RuntimeConfig(data=options["photos"], progress=False))
    elif step == "experts":
        config = preset("tiny", **options)
        for number in range(config.settings.experts.count):
            train_expert(config, number)
    else:
        words = [f"{key}={json.dumps(value)}" for key, value in options.items()]
        sys.argv = ["mmdd", "run", "--preset", "tiny", "--results", folder + "/results"]
        sys.argv += [word for text in words for word in ("--set", text)]
        main()

# A first run here, and what it imports is not imported by each child.
with tempfile.TemporaryDirectory() as folder:
    os.environ["MMDD_CACHE"] = folder
    options = json.loads(sys.argv[1])
    run(preset("tiny", **options), folder)
print("ready", flush=True)
for line in sys.stdin:
    step, folder, options, log = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            job(step, folder, options)
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Work:
    """One step on one folder: where it works, and what it is told."""

    step: str
    folder: Path
    options: dict[str, Any]

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"


class Forks:
    """Starts work as children of one process that has imported everything."""

    def __init__(self) -> None:
        warm = {"dataset": SMALL, "protocol": "image+text_head", "pairs": 2, "evaluation": FEW}
        warm |= {"method": "covmatch", "settings": {"iterations": 1, "real_batch": 8}}
        warm["runtime"] = {"progress": False, "device": "cpu"}
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER, json.dumps(warm)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(threads=1),
            cwd=ROOT,
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.server.stdout is not None
        return self.server.stdout.readline().strip()

    def start(self, work: Work) -> Callable[[float | None, signal.Signals], int]:
        assert self.server.stdin is not None
        order = [work.step, str(work.folder), work.options, str(work.log)]
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        child = psutil.Process(int(self._line()))

        def end(after: float | None, number: signal.Signals) -> int:
            if after is not None:
                time.sleep(after)
                with suppress(psutil.NoSuchProcess):
                    # A zombie takes signals too, but has said how it ended.
                    child.send_signal(number)
            return int(self._line())

        return end

    def close(self) -> None:
        self.server.communicate()


def start_sweep(work: Work, rng: random.Random) -> Callable[[float | None, signal.Signals], int]:
    """Start `mmdd sweep`; what comes back waits, or shoots at it after a time."""
    words = [sys.executable, "-m", "mmdd", "sweep", str(work.options["grid"]), "--jobs", "2"]
    words += ["--results", str(work.folder / "results"), "--retries", "0"]
    cache = {"MMDD_CACHE": str(work.folder / "cache"), MARK: str(work.folder)}
    with open(work.log, "a") as log:
        sweep = subprocess.Popen(
            words, cwd=ROOT, stdout=log, stderr=log, env=environment(threads=1) | cache
        )

    def end(after: float | None, number: signal.Signals) -> int:
        if after is not None:
            with suppress(subprocess.TimeoutExpired):
                sweep.wait(after)
            # Alone, as a scheduler does, or with all that it started, as Ctrl-C and a crash do.
            victims = family(sweep.pid)
            shoot(victims if rng.random() < 0.5 else victims[:1], number)
        return sweep.wait()

    return end


# -- what must hold --------------------------------------------------------------------------------


def is_final(path: Path) -> bool:
    """False for what says by its name, or its folder's, that somebody is still at it."""
    unfinished = (".part", ".partial", ".lock", ".part.ipynb", ".failed.ipynb", ".tmp")
    hidden = any(part.startswith(".") for part in path.parts)
    return path.is_file() and not hidden and not any(
        part.endswith(unfinished) for part in path.parts
    )  # fmt: skip


def finished(work: Work, expected: dict[str, Any]) -> set[str]:
    """What is done under final names; raises where one of them is not whole.

    expected: the sums of what is the same in every undisturbed run.
    """
    found: set[str] = set()
    for path in sorted(work.folder.rglob("*")):
        name = path.relative_to(work.folder).as_posix()
        if not is_final(path) or path == work.log:
            continue
        with suppress(FileNotFoundError):  # an orphan of a killed sweep has just replaced it
            if path.suffix == ".safetensors":
                load_checked(path)
            elif path.suffix == ".ipynb":
                json.loads(path.read_text(encoding="utf-8"))["cells"]
            elif path.name in ("manifest.json", "cache.json"):
                unsealed(json.loads(path.read_text(encoding="utf-8")))
            elif path.suffix == ".npy":
                assert file_sha256(path) == expected[name], f"{name} holds other pixels"
            if path.parent.name == "checkpoints" or path.name.startswith("state."):
                continue  # goes when what it was for is done
            if path.parent.name == "errors":
                continue  # of an attempt that was killed; goes when the point is tried again
            if path.suffix != ".json" or "results" not in path.parts:
                found.add(name)
    if (work.folder / "results").exists():
        found |= set(records(work.folder / "results"))
        found = {name for name in found if not name.endswith(".jsonl")}
    return found


def to_go_on_from(work: Work) -> bool:
    """True where a killed run has left some of its work."""
    patterns = ("**/checkpoints/*.safetensors", "**/state.safetensors", "**/journal.jsonl")
    kept = [path for pattern in patterns for path in work.folder.glob(pattern)]
    done = [*work.folder.glob("**/snapshot-*.safetensors"), *work.folder.glob("results/*/*.json")]
    return bool(done) or any(path.stat().st_size for path in kept)


def outcome(work: Work) -> dict[str, Any]:
    """All that a step has made and that does not depend on the clock."""
    made: dict[str, Any] = {}
    for path in sorted(work.folder.rglob("*")):
        name = path.relative_to(work.folder).as_posix()
        if not is_final(path):
            continue
        if path.suffix == ".npy" or path.name.startswith("snapshot-"):
            made[name] = file_sha256(path)
        elif path.parent.name == "sets":
            made[name] = tensors_sha256(load_checked(path)[0])
        elif path.name in ("cache.json", "manifest.json"):
            told = json.loads(path.read_text(encoding="utf-8"))
            made[name] = {k: v for k, v in told.items() if k not in ("seconds", "sha256")}
        elif path.parent.name == "checkpoints" or path.name.startswith("state."):
            made[name] = "is left over"
    if (work.folder / "results").exists():
        made |= records(work.folder / "results")
    return made


# -- stories: work that is killed some times, and then let alone -----------------------------------


class Killer:
    """Kills work of one step until each signal has hit it as often as asked for."""

    def __init__(
        self,
        step: str,
        wanted: dict[signal.Signals, int],
        folder: Path,
        forks: Forks | None,
        rng: random.Random,
        bar: "tqdm[Any]",
    ) -> None:
        self.step, self.folder, self.forks, self.rng, self.bar = step, folder, forks, rng, bar
        self.left = +Counter(wanted)
        self.tried: Counter[signal.Signals] = Counter()
        self.lost: Counter[signal.Signals] = Counter()
        self.went_on: Counter[signal.Signals] = Counter()
        self.problems: list[str] = []
        self.stories = 0

    def work(self, name: str, kind: int) -> Work:
        folder = self.folder / f"{self.step}-{name}"
        folder.mkdir(parents=True)
        return Work(self.step, folder, self._options(kind))

    def _options(self, kind: int) -> dict[str, Any]:
        if self.step == "prepare":
            return {"photos": str(self.folder / "photos")}
        if self.step == "sweep":
            return {"grid": str(self.folder / "kills.yaml")}
        shared = {"dataset": SMALL, "protocol": "image+text_head", "pairs": 8}
        if self.step == "experts":
            return shared | {"method": "mtt", "settings": {"experts": EXPERTS},
                             "runtime": {"progress": False}}  # fmt: skip
        runtime = {"progress": False, "checkpoint_every": 5}
        if self.step == "evaluate":
            students = {"students": 3, "epochs": 30, "scores": 2}
            return shared | {"method": "random", "evaluation": students, "runtime": runtime}
        method = list(DISTIL)[kind % len(DISTIL)]
        return shared | {
            "method": method, "settings": DISTIL[method], "evaluation": FEW, "runtime": runtime
        }  # fmt: skip

    def _start(self, work: Work) -> Callable[[float | None, signal.Signals], int]:
        if self.forks is None or self.step == "sweep":
            return start_sweep(work, self.rng)
        return self.forks.start(work)

    def run(self) -> None:
        kinds = len(DISTIL) if self.step == "distil" else 1
        references, seconds = [], []
        for kind in range(kinds):
            self.bar.set_description(f"{self.step}, undisturbed")
            calm, begin = self.work(f"calm-{kind}", kind), time.perf_counter()
            code = self._start(calm)(None, signal.SIGKILL)
            seconds.append(time.perf_counter() - begin)
            references.append(outcome(calm))
            if code != 0 or not references[-1]:
                raise SystemExit(f"{self.step} fails undisturbed:\n{calm.log.read_text()[-3000:]}")
        while self.left:
            kind = self.stories % kinds
            self._story(kind, references[kind], seconds[kind])
            self.stories += 1
            if self.stories > 20 + 4 * sum(self.tried.values()):
                raise SystemExit(f"{self.step}: the kills come too late, all of them")

    def _story(self, kind: int, reference: dict[str, Any], seconds: float) -> None:
        work = self.work(str(self.stories), kind)
        shots: list[signal.Signals] = []
        problem = ""
        before: set[str] = set()
        for _ in range(self.rng.randint(2, IN_A_ROW)):
            if not self.left:
                break
            number = max(self.left, key=lambda n: self.left[n])
            self.bar.set_description(f"{self.step}, {number.name}")
            after = self.rng.uniform(0, seconds)
            code = self._start(work)(after, number)
            if code == 0:
                break  # it was faster: no kill
            shots.append(number)
            self.tried[number] += 1
            self.went_on[number] += to_go_on_from(work)
            self.left = self.left - Counter([number])
            self.bar.update()
            try:
                now = finished(work, reference)
            except Exception as error:
                problem = f"after {number.name}: {type(error).__name__}: {error}"
                break
            if before - now:
                problem = f"after {number.name}, gone: {sorted(before - now)}"
                break
            before = now
        if not problem:
            code = self._start(work)(None, signal.SIGKILL)
            shoot(marked(MARK, str(work.folder)))  # what a killed sweep has left
            problem = "" if code == 0 else f"exit code {code}: {work.log.read_text()[-2000:]}"
        if not problem:
            made = outcome(work)
            other = sorted(
                key for key in made.keys() | reference.keys() if made.get(key) != reference.get(key)
            )
            problem = f"differs: {other}" if other else ""
        if problem:
            self.problems.append(f"{self.step}, {[n.name for n in shots]}: {problem}")
            tqdm.write(self.problems[-1], file=sys.stderr)
            self.lost.update(shots)
            return
        shutil.rmtree(work.folder)

    def counts(self) -> list[dict[str, Any]]:
        return [
            {
                "step": self.step,
                "signal": number.name,
                "tried": self.tried[number],
                "survived": self.tried[number] - self.lost[number],
                "lost": self.lost[number],
                "left_work_to_go_on_from": self.went_on[number],
            }
            for number in SIGNALS
            if self.tried[number]
        ]


def write_photos(folder: Path, count: int = 160) -> None:
    """Photos that take some milliseconds each to decode, with a captions file of Karpathy's."""
    (folder / "images").mkdir(parents=True)
    random_pixels = np.random.default_rng(0)
    entries = []
    for i in range(count):
        name = f"{i:03d}.jpg"
        coarse = random_pixels.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((960, 720)).save(folder / "images" / name)
        split = "train" if i < count - 8 else ("val", "test")[i % 2]
        entries.append({"filename": name, "split": split, "sentences": [{"raw": f"thing {i}"}]})
    (folder / "dataset_mine.json").write_text(json.dumps({"images": entries, "dataset": "mine"}))


def write_grid(path: Path) -> None:
    """A sweep of three runs, two of which distil."""
    grid = {
        "sweep": "kills",
        "preset": "tiny",
        "base": {"protocol": "image+text_head", "dataset": SMALL, "evaluation": FEW, "pairs": 8},
        "grid": [{"method": name, "settings": DISTIL[name]} for name in DISTIL]
        + [{"method": "random"}],
    }
    path.write_text(yaml.safe_dump(grid))


def shares(kills: int, steps: list[str]) -> dict[str, dict[signal.Signals, int]]:
    """How often each signal is to hit each step; a sweep, which takes longer, half as often."""
    weights = {step: 1 if step == "sweep" else 2 for step in steps}
    turns = [step for step in steps for _ in range(weights[step])]
    hits: dict[str, int] = Counter(turns[i % len(turns)] for i in range(kills))
    wanted: dict[str, dict[signal.Signals, int]] = {}
    begin = 0
    for step, count in hits.items():
        # Where few are asked for, one step begins with the signal that the one before ended with.
        wanted[step] = Counter(SIGNALS[(begin + i) % len(SIGNALS)] for i in range(count))
        begin += count
    return wanted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, default=RECORD)
    wanted = parser.parse_args()
    # In the background of a shell interrupts are ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rng, begin = random.Random(wanted.seed), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder / "photos")
        write_grid(folder / "kills.yaml")
        # A sweep starts processes of its own.
        forks = Forks() if set(wanted.steps) != {"sweep"} else None
        killers = []
        with tqdm(total=wanted.kills, unit="kill") as bar:
            for step, hits in shares(wanted.kills, wanted.steps).items():
                killers.append(Killer(step, hits, folder, forks, rng, bar))
                killers[-1].run()
        if forks is not None:
            forks.close()
    counts = [entry for killer in killers for entry in killer.counts()]
    total = {key: sum(e[key] for e in counts) for key in ("tried", "survived", "lost")}
    record = {
        **total,
        "seed": wanted.seed,
        "steps": counts,
        "problems": [problem for killer in killers for problem in killer.problems],
        "seconds": round(time.perf_counter() - begin, 1),
        "load": load(),
        "code": code_version(Path(__file__).resolve()),
        "machine": machine("torch", "safetensors", "filelock"),
    }
    write(record, wanted.record)
    for entry in counts:
        print(
            "{step:<10}{signal:<10}{tried:>4} tried{survived:>5} survived{lost:>4} lost".format_map(
                entry
            )
        )
    print(f"in all: {total['tried']} tried, {total['survived']} survived, {total['lost']} lost")
    if total["lost"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
