"""A small round of tools/kill_runs.py: real processes, real signals, and what must be left."""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "kill_runs.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_runs_lose_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(TOOL), "--kills", "8", "--record", str(tmp_path / "kills.json"),
         "--steps", "prepare", "experts", "distil", "evaluate"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "kills.json").read_text())
    assert (record["tried"], record["survived"], record["lost"]) == (8, 8, 0)
    assert record["problems"] == []
    assert {entry["step"] for entry in record["steps"]} == {
        "prepare", "experts", "distil", "evaluate"
    }  # fmt: skip
    assert {entry["signal"] for entry in record["steps"]} == {"SIGKILL", "SIGTERM", "SIGINT"}


def test_the_records_of_kills_are_whole() -> None:
    """What the status page shows: as many as were asked for, and every one survived."""
    runs = json.loads((ROOT / "benchmarks" / "kills.json").read_text())
    assert runs["tried"] == runs["survived"] >= 100
    assert sum(step["tried"] for step in runs["steps"]) == runs["tried"]
    assert (runs["lost"], runs["problems"]) == (0, [])
    sweep = json.loads((ROOT / "benchmarks" / "sweep_kills.json").read_text())
    assert sum(sweep["kills"].values()) >= 20
    assert sweep["records_equal_to_the_bit"] == sweep["records"] == sweep["points"] >= 30


def test_every_kill_has_a_step_and_a_signal() -> None:
    tool = runpy.run_path(str(TOOL))
    for kills in (1, 8, 100):
        shares = tool["shares"](kills, list(tool["STEPS"]))
        assert sum(sum(hits.values()) for hits in shares.values()) == kills
    assert {step: sum(hits.values()) for step, hits in shares.items()} == {
        "prepare": 23, "experts": 22, "distil": 22, "evaluate": 22, "sweep": 11
    }  # fmt: skip
    for hits in shares.values():
        assert set(hits) == {signal.SIGKILL, signal.SIGTERM, signal.SIGINT}


def test_what_is_half_written_or_gone_counts_as_lost(tmp_path: Path) -> None:
    """The checks of the tool are no matter of course: each finds what it is there for."""
    tool = runpy.run_path(str(TOOL))
    work = tool["Work"]("experts", tmp_path, {})
    folder = tmp_path / "cache" / "experts" / "ab"
    (folder / ".x.part").mkdir(parents=True)
    (folder / ".x.part" / "snapshot-0001.safetensors").write_bytes(b"half")
    assert tool["finished"](work, {}) == set()
    (folder / "snapshot-0001.safetensors").write_bytes(b"half")
    with pytest.raises(Exception, match=r"snapshot-0001\.safetensors is not a readable"):
        tool["finished"](work, {})
    (folder / "snapshot-0001.safetensors").unlink()
    (folder / "manifest.json").write_text('{"bytes": 1}')
    with pytest.raises(ValueError, match="checksum"):
        tool["finished"](work, {})
    (folder / "manifest.json").unlink()
    (folder / "images.npy").write_bytes(b"other")
    with pytest.raises(AssertionError, match="other pixels"):
        tool["finished"](work, {"cache/experts/ab/images.npy": "0"})
