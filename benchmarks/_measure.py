"""What the benchmarks share: clocks, the kernel's counts of memory, child processes and records.

No benchmark itself: `make bench` leaves files that start with an underscore out. Each script puts
what it compares into processes of their own, so that one's memory is not counted as another's.
"""

import ctypes
import gc
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

MEBIBYTE = 2**20
COCO_TRAIN_IMAGES = 113_287  # Karpathy's training split
_ROOT = Path(__file__).resolve().parents[1]
_CLEAR = Path("/proc/self/clear_refs")  # Linux: writing 5 sets the peak back to what is held

# -- inside the process that is measured -----------------------------------------------------------


class Timer:
    """Seconds of a `with` block by the clock, and CPU seconds of all threads of this process.

    The second say how long the process worked, whatever else the machine did.
    """

    seconds = 0.0
    cpu_seconds = 0.0

    def __enter__(self) -> "Timer":
        self._begin, self._worked = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._begin
        self.cpu_seconds = time.process_time() - self._worked


def operations_of(work: Callable[[], Any]) -> int:
    """Multiplications and additions of products and convolutions, as torch counts them."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Counter(TorchDispatchMode):
        """Torch's counts without the tracking of modules, which `autograd.grad` cannot stand."""

        operations = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            count = flop_registry.get(func.overloadpacket)
            if count is not None:
                self.operations += count(*args, **(kwargs or {}), out_val=out)
            return out

    with Counter() as counter:
        work()
    return counter.operations


def resident_bytes() -> int:
    """What this process holds in memory now; 0 where the kernel does not say."""
    return _kernel("VmRSS")


def peak_resident_bytes() -> int:
    """The most that this process held since it started, or since `settle`; 0 where not known.

    Not `ru_maxrss`: on Linux that starts at the peak of the process that started this one.
    """
    return _kernel("VmHWM")


def _kernel(field: str) -> int:
    """A number of /proc/self/status in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def settle() -> None:
    """Give back what was freed, and let the kernel count the peak from here on, where it does."""
    gc.collect()
    if _CLEAR.exists():
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")


def serve(iterate: Callable[[int], dict[str, Any]], give_back: bool = False) -> None:
    """Carry out one iteration per line of the input; a line of JSON back for each.

    iterate(number) returns what it found, its times among it. Number 0 is for warming up: from its
    end on memory is counted, and later answers hold `base_bytes` and `peak_bytes`. give_back:
    return freed memory to the system after every iteration, so that several large ones can wait for
    their turns beside each other.
    """
    base = 0
    for line in sys.stdin:
        iteration = int(line)
        answer = iterate(iteration)
        if iteration == 0:
            settle()
            base = resident_bytes()
        else:
            answer |= {"base_bytes": base, "peak_bytes": peak_resident_bytes()}
            if give_back:
                settle()
        print(json.dumps(answer), flush=True)


# -- the process that asks -------------------------------------------------------------------------


def require_peaks() -> None:
    """End the script where the kernel does not count peaks that can be set back."""
    if not _CLEAR.exists():
        raise SystemExit("this benchmark reads peak memory from /proc: it needs Linux")


def environment(threads: int | None = None) -> dict[str, str]:
    """The variables of a child: this checkout first, and as many threads as told."""
    count = {} if threads is None else dict.fromkeys(_THREADS, str(threads))
    return {**os.environ, "PYTHONPATH": str(_ROOT), **count}


_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_child(script: str, *arguments: str, threads: int | None = None) -> dict[str, Any]:
    """Run a script in a fresh process and return the JSON of the last line that it prints.

    Raises `CalledProcessError` when it fails.
    """
    done = subprocess.run(
        [sys.executable, script, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(threads),
    )
    return json.loads(done.stdout.splitlines()[-1])


class Worker:
    """A process of its own that carries out iterations when it is asked to (see `serve`).

    order: what the script's `--serve` gets, as JSON. With `greets` the process says when it is
    ready, and is waited for.
    """

    def __init__(
        self, script: str, mode: str, order: Sequence[Any], threads: int, greets: bool = False
    ) -> None:
        self.mode = mode
        self.process = subprocess.Popen(
            [sys.executable, script, "--serve", json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(threads),
        )
        if greets:
            self._line()

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


# What is compared of each mode, in the order of the columns of `report`, and the unit there.
COMPARED = {
    "median_seconds": ("seconds", 1),
    "median_cpu_seconds": ("CPU seconds", 1),
    "peak_bytes_above_base": ("MiB above base", MEBIBYTE),
    "peak_rss_bytes": ("MiB in all", MEBIBYTE),
}


def add_ratios(modes: dict[str, dict[str, Any]], reference: str) -> None:
    """Put beside each compared number of each mode its ratio to the mode `reference`."""
    for found in modes.values():
        for name in [name for name in found if name in COMPARED]:
            found[f"{name}_ratio"] = round(found[name] / modes[reference][name], 3)


def report(modes: dict[str, dict[str, Any]], digits: int = 2) -> list[str]:
    """Lines of a table, a title and one per mode: every number with its ratio."""
    width = max(map(len, modes)) + 2
    lines = [" " * width + "".join(f"{title:>20}" for title, _ in COMPARED.values())]
    for mode, found in modes.items():
        cells = [
            f"{found[name] / unit:13.{digits if unit == 1 else 0}f}{found[f'{name}_ratio']:7.2f}"
            for name, (_, unit) in COMPARED.items()
        ]
        lines.append(mode.ljust(width) + "".join(cells))
    return lines


def machine(*packages: str) -> dict[str, Any]:
    """What the numbers were measured on; no host or user names. packages: whose version counts."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "python": platform.python_version(),
        **{name.replace("-", "_"): version(name) for name in packages},
    }


def code_version(*scripts: str | Path) -> str:
    """12 hex digits of the package and of the scripts: what the counts of a record are about."""
    digest = hashlib.sha256()
    for path in (*sorted((_ROOT / "mmdd").rglob("*.py")), *map(Path, scripts)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def load() -> float:
    """How many processes wanted a core in the last minute."""
    return round(os.getloadavg()[0], 1)


def write(record: Any, path: Path) -> None:
    """Write JSON to a temporary file first: a record is whole, or the old one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def add(entry: dict[str, Any], path: Path, key: Sequence[str] = ("name", "threads")) -> None:
    """Put an entry into the list of a record in place of an older one with the same key."""
    entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    entries = [e for e in entries if any(e[k] != entry[k] for k in key)]
    # Numbers by their size: as text of one width.
    entries = sorted([*entries, entry], key=lambda e: [str(e[k]).zfill(6) for k in key])
    write(entries, path)
