"""The file of measured mechanisms: what `python -m mmdd.claims` writes and the page reads.

Like a record it names the code that made it. Book: book/claims.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmdd.claims import measure
from mmdd.errors import ArtefactError, StoreError
from mmdd.files import atomic_write_text, file_sha256
from mmdd.provenance import environment, normalised, source_hash


@dataclass(frozen=True)
class Measurements:
    """Measured mechanisms.

    values: by measure, one number a seed, or a student of one set. deviation: of the measures of
    one set, how far sets of different seeds usually are apart. curves: "image" and "text", the
    cosine of features by seed at each of `steps`. maps: places of captions, by set. cosines: by
    set and student, within an image and between images. origin: where the numbers come from, in
    words. stale: made by other code, settings or sets than today's.
    """

    values: Mapping[str, Sequence[float]] = field(default_factory=dict)
    deviation: Mapping[str, float] = field(default_factory=dict)
    steps: Sequence[int] = ()
    curves: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    maps: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    cosines: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    origin: str = ""
    stale: bool = False


def code_today(shown: Path) -> str:
    """12 hex digits of what decides the measurements: code, settings and the sets that ship.

    As for a record: the code of every run that a measure goes by, and of the measures, without
    comments and docstrings. shown: the folder of the sets. Raises `OSError` where one is missing.
    """
    path = Path(measure.__file__)
    # Not as a plug-in of `source_hash`: the page and the rule of the claims would count as well.
    own, _ = normalised("claims/measure.py", path.read_text(encoding="utf-8"))
    runs = sorted({f"{c.run_id} {c.source_hash}" for c in measure.configurations()})
    sets = [file_sha256(shown / f"{name}.safetensors") for name in measure.CLUSTERED.values()]
    return source_hash("mmdd.statistics", entries=(own, *runs, *sets))


def take_measurements(file: Path) -> None:
    """Measure everything and write `load_measurements`' file. Book: book/claims."""
    shown = file.parent / "shown"
    code = code_today(shown)  # before anything runs: the files may change while it does
    values = {name: _rounded(take(shown)) for name, take in measure.MEASURES.items()}
    drift = [measure.feature_drift(seed) for seed in measure.SEEDS]
    deviation = round(measure.clustering_deviation(), 5)
    sources: dict[str, tuple[Any, str]] = {"random pairs": (measure.random_pairs(), "")}
    sources |= {name: (shown, name) for name in measure.CLUSTERED.values()}
    written = {
        "command": f"python -m mmdd.claims results/{file.name}",
        "environment": environment(torch.device("cpu"), code),
        "seeds": measure.SEEDS,
        "students": measure.STUDENTS,
        "values": values,
        "deviation": dict.fromkeys(measure.CLUSTERED, deviation),
        "steps": measure.STEPS,
        "curves": {side: [_rounded(seed[side]) for seed in drift] for side in ("image", "text")},
        "cosines": {name: measure.cosines_of(*source) for name, source in sources.items()},
        "maps": {name: measure.caption_map(*source) for name, source in sources.items()},
    }
    atomic_write_text(file, _text(written))


def _text(written: dict[str, Any]) -> str:
    """JSON in which a list of numbers is one line."""
    text = json.dumps(written, indent=1, ensure_ascii=False)
    short = re.sub(r"\[([\s\d.,e-]+)\]", lambda found: "[" + " ".join(found[1].split()) + "]", text)
    return short + "\n"


def load_measurements(path: str | Path) -> Measurements:
    """What `python -m mmdd.claims` wrote; nothing where there is no such file.

    Raises `StoreError` for another file. Book: book/claims.
    """
    path = Path(path)
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        made = read["environment"]
        code = str(made["source_hash"])
        return Measurements(
            {str(name): _floats(values) for name, values in read["values"].items()},
            {str(name): float(value) for name, value in read["deviation"].items()},
            [int(step) for step in read["steps"]],
            {side: [_floats(row) for row in rows] for side, rows in read["curves"].items()},
            {name: [_floats(row) for row in rows] for name, rows in read["maps"].items()},
            {name: [_floats(row) for row in rows] for name, rows in read["cosines"].items()},
            f"{path.name}, written by {read['command']} (code {code}, torch {made['torch']})",
            _stale(code, path.parent / "shown"),
        )
    except FileNotFoundError:
        return Measurements()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is not a file of measured mechanisms: {error!r}.") from error


def _stale(code: str, shown: Path) -> bool:
    try:
        return code != code_today(shown)
    except (OSError, ArtefactError):  # a set is missing: nobody can measure the same again
        return True


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _floats(values: Sequence[Any]) -> list[float]:
    return [float(value) for value in values]
