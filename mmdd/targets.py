"""What the project asks of its speed and memory, and what its benchmarks say of it.

Each target is a ratio of two things that were measured in one run: a ratio means the same on a
busy machine and an idle one, and seconds do not. Book: notebooks/14_efficiency.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

Read = Callable[[Any], float | None]


@dataclass(frozen=True)
class Target:
    """A limit on a ratio. subject, against: what is compared; quantity: by what.

    record: the file in `benchmarks/` that would hold it, without suffix; read: takes the ratio out
    of its content, None where that lacks it. note: what the measurement is not.
    """

    subject: str
    against: str
    quantity: str
    limit: float
    record: str = ""
    read: Read = lambda content: None
    note: str = ""


def _on_one_thread(content: Any, name: str) -> dict[str, Any]:
    """The entry of a setting in a record that lists settings; empty where there is none."""
    return next((e for e in content if e.get("name") == name and e.get("threads") == 1), {})


def _modes(first: str, second: str, quantity: str, setting: str) -> Read:
    """The worse of one and two threads of the ratio of two modes; quantity: "time" or "memory"."""

    def read(content: Any) -> float | None:
        ratios = []
        for entry in content:
            modes = entry["modes"]
            if entry["name"] == setting and first in modes and second in modes:
                field = _time(entry) if quantity == "time" else "peak_bytes_above_base"
                ratios.append(modes[first][field] / modes[second][field])
        return max(ratios, default=None)

    return read


def _time(entry: dict[str, Any]) -> str:
    """What tells the time of an entry: CPU seconds of one thread, the clock of more: they spin."""
    return "median_cpu_seconds" if entry["threads"] == 1 else "median_seconds"


def _ratio(name: str, setting: str | None = None) -> Read:
    """A ratio that the record itself holds, in the entry of a setting where there are some."""

    def read(content: Any) -> float | None:
        entry = content if setting is None else _on_one_thread(content, setting)
        value = entry.get(name)
        return None if value is None else float(value)

    return read


def _of_iterations(method: str, setting: str, ratio: str) -> Read:
    """The worse of one and two threads of a ratio that the record itself holds."""

    def read(content: Any) -> float | None:
        found = [
            e["ratios"][ratio][_time(e).removeprefix("median_")]
            for e in content
            if (e["method"], e["name"]) == (method, setting)
        ]
        return max(found, default=None)

    return read


def _two_processes(content: Any) -> float | None:
    seconds = {run["workers"]: run["seconds"] for run in content["runs"]}
    loop = content.get("plain_loop")
    return seconds[2] / loop["seconds"] if loop and 2 in seconds else None


def _waiting(where: str) -> Read:
    """The share of an iteration that waits, from the cache in memory or on the disk."""

    def read(content: Any) -> float | None:
        found = _on_one_thread(content, "test_nfnet").get("modes", {}).get(where)
        return None if found is None else float(found["share"])

    return read


def _gigabytes(content: Any) -> float | None:
    return max(run["peak_rss_bytes"] for run in content["runs"]) / 1e9


_TWICE = "the two passes of the published code"
_WORSE = "the worse of one and two threads"

TARGETS = (
    *(
        Target(
            f"{subject}, {setting}",
            against,
            "time",
            limit,
            "iteration",
            _of_iterations(method, setting, ratio),
            _WORSE + (", batches of 4" if "l0" in setting else ""),
        )
        for subject, against, limit, method, ratio in (
            (
                "CovMatch iteration",
                "floor: its forward and backward passes alone",
                1.10,
                "covmatch",
                "loop/floor",
            ),
            (
                "CovMatch iteration",
                "as published: two passes over the real batch, decoded anew",
                0.75,
                "covmatch",
                "loop/naive",
            ),
            (
                "MDM iteration, interpolation included",
                "floor: its passes alone",
                1.20,
                "mdm",
                "loop/floor",
            ),
        )
        for setting in ("scenes-tiny", "test_nfnet", "nfnet_l0")
    ),
    *(
        Target(
            f"{subject}, {network}",
            against,
            quantity,
            limit,
            "trajectory",
            _modes(mode, other, quantity, setting),
            _WORSE + (", two steps of eight" if setting != network else ""),
        )
        for subject, against, mode, other, limits in (
            (
                "LoRS / TESLA, exact (forward-over-reverse)",
                _TWICE,
                "forward-over-reverse",
                "reference",
                {"time": 0.70, "memory": 0.65},
            ),
            (
                "LoRS / TESLA, exact (double-backward)",
                _TWICE,
                "double-backward",
                "reference",
                {"time": 0.70, "memory": 0.65},
            ),
            (
                "LoRS / TESLA, finite differences",
                _TWICE,
                "finite-difference",
                "reference",
                {"time": 0.45, "memory": 0.35},
            ),
            (
                "MTT with checkpointing",
                "unrolled graph",
                "double-backward, full",
                "unroll",
                {"time": 1.40, "memory": 0.50},
            ),
        )
        for network, setting in (("test_nfnet", "test_nfnet"), ("nfnet_l0", "nfnet_l0-8"))
        for quantity, limit in limits.items()
    ),
    *(
        Target(
            f"five students evaluated together, {protocol}",
            "one after the other",
            "time",
            0.50,
            "students",
            _ratio("together_ratio", protocol),
        )
        for protocol in ("heads", "image+text_head")
    ),
    Target(
        "five students' steps stacked, heads",
        "one step after the other",
        "time",
        0.50,
        "students",
        _ratio("stacked_ratio", "heads"),
        "not used: a near tie may fall the other way",
    ),
    *(
        target
        for size, limit in (("1000 x 5000", 0.12), ("5000 x 25000", 0.15))
        for target in (
            Target(
                f"recall, {size.replace('x', '×')}",
                "a ranking per query",
                "time",
                limit,
                "retrieval",
                _ratio("cpu_seconds_ratio", size),
            ),
            Target(
                f"recall, {size.replace('x', '×')}",
                "a ranking per query",
                "memory",
                0.30,
                "retrieval",
                _ratio("peak_bytes_above_base_ratio", size),
            ),
        )
    ),
    *(
        Target(
            f"waiting for data, cache {place}",
            "a CovMatch iteration at 224 px",
            "time",
            0.03,
            "waiting",
            _waiting(where),
            "by the wall clock, test_nfnet",
        )
        for where, place in (("memory", "in memory"), ("disk", "on disk"))
    ),
    Target(
        "preparing JPEGs, two workers",
        "one plain loop over PIL",
        "time",
        0.55,
        "prepare_memory",
        _two_processes,
        "by the wall clock",
    ),
    Target("preparing JPEGs", "1 GB", "memory", 1.0, "prepare_memory", _gigabytes, "at the peak"),
    Target(
        "import mmdd",
        "import torch + 0.15 s",
        "time",
        1.0,
        "startup",
        _ratio("cpu_seconds_to_limit"),
    ),
)


def measured(folder: str | Path, targets: tuple[Target, ...] = TARGETS) -> pd.DataFrame:
    """Every target beside what the records in a folder say, in the order of the targets.

    folder: holds `<record>.json`. Columns: subject, against, quantity, ratio (NaN where no record
    holds it), target (the limit), met ("yes", "no", "not yet measured"), load (how many processes
    wanted a core, where told), machine (system, cores and torch, where told), note.
    Book: notebooks/14_efficiency.
    """
    rows = []
    for target in targets:
        path = Path(folder) / f"{target.record}.json"
        content = json.loads(path.read_text("utf-8")) if target.record and path.exists() else None
        ratio = None if content is None else target.read(content)
        machine = {} if ratio is None else _machine(content)
        rows.append(
            {
                "subject": target.subject,
                "against": target.against,
                "quantity": target.quantity,
                "ratio": float("nan") if ratio is None else ratio,
                "target": target.limit,
                "met": "not yet measured"
                if ratio is None
                else ("yes" if ratio <= target.limit else "no"),
                "load": _load(machine),
                "machine": f"{machine['cores']} cores, {machine['architecture']}"
                if machine
                else "",
                "note": target.note,
            }
        )
    return pd.DataFrame(rows)


def _machine(content: Any) -> dict[str, Any]:
    entry = content[0] if isinstance(content, list) else content
    return dict(entry["machine"])


def _load(machine: dict[str, Any]) -> str:
    told = machine.get("load_before_and_after", machine.get("load_when_done", []))
    return " to ".join(f"{load:.0f}" for load in (told if isinstance(told, list) else [told]))
