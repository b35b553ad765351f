"""What fuzzing found stays mended: `tools/fuzz.py`'s targets over its seeds and what was kept."""

import importlib.util
import random
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("mmdd_fuzz", ROOT / "tools" / "fuzz.py")
assert _spec is not None
assert _spec.loader is not None
fuzz = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fuzz)

KEPT = sorted(path for path in fuzz.KEPT.glob("*/*") if path.is_file())


def test_what_was_kept_belongs_to_targets() -> None:
    assert {path.parent.name for path in KEPT} <= set(fuzz.TARGETS)
    assert len(KEPT) >= 8


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_finding_stays_mended(path: Path, tmp_path: Path) -> None:
    fuzz.TARGETS[path.parent.name](path.read_bytes(), tmp_path)


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_short_blind_run(name: str, tmp_path: Path) -> None:
    """Without coverage to guide it: each seed, and each with a few bytes changed."""
    rng = random.Random(name)
    for seed in fuzz.seeds(name):
        fuzz.TARGETS[name](seed, tmp_path)
        for _ in range(4):
            data = bytearray(seed)
            for _ in range(rng.randrange(1, 6)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            fuzz.TARGETS[name](bytes(data), tmp_path)
