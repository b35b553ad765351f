"""What fuzzing found stays mended: `tools/fuzz.py`'s targets over its seeds and what was kept."""

import importlib.util
import json
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


def test_what_the_fuzzer_prints_is_counted() -> None:
    text = (
        "#2\tINITED cov: 80 ft: 80 corp: 1/1b exec/s: 0 rss: 300Mb\n"
        "#391\tDONE   cov: 85 ft: 99 corp: 9/9b lim: 4 exec/s: 55 rss: 384Mb\n"
        "Done 391 runs in 7 second(s)\nstat::number_of_executed_units: 391\n"
    )
    whole = {"executions": 391, "seconds": 7, "coverage": 85, "findings": []}
    assert fuzz.told(text) == whole
    crashed = "#12\tNEW cov: 3 ft: 3\nTest unit written to /somewhere/fuzz-findings/x/crash-ab\n"
    stopped = {"executions": 12, "seconds": 0, "coverage": 3, "findings": ["crash-ab"]}
    assert fuzz.told(crashed) == stopped


def test_the_record_of_fuzzing_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "fuzz.json"
    part = {"executions": 10, "seconds": 60, "coverage": 5, "findings": ["crash-ab"]}
    for _ in range(2):  # as after a kill: read again
        fuzz.Record(path, "one").add("coco", part)
    fuzz.Record(path, "one").add("image", part | {"findings": []})
    whole = json.loads(path.read_text())
    assert [entry["target"] for entry in whole["targets"]] == ["coco", "image"]
    assert (whole["executions"], whole["seconds"], whole["findings"]) == (30, 180, 2)
    assert fuzz.Record(path, "one").of("coco")["seconds"] == 120
    assert fuzz.Record(path, "other code").of("coco")["seconds"] == 0
    assert set(tmp_path.iterdir()) == {path}


def test_every_target_was_fuzzed_for_ten_minutes() -> None:
    targets = json.loads((ROOT / "benchmarks" / "fuzz.json").read_text())["targets"]
    assert {entry["target"] for entry in targets} == set(fuzz.TARGETS)
    for entry in targets:
        assert entry["seconds"] >= 600
        assert entry["executions"] > 0
        assert entry["findings"] == []


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
