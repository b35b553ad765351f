"""What the benchmarks share, and that every script of `make bench` can be asked what it does."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
import torch

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
SCRIPTS = sorted(p for p in FOLDER.glob("*.py") if not p.name.startswith("_"))


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_measure", FOLDER / "_measure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_a_script_says_what_it_does(script: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("usage:")
    assert "--help" in done.stdout


def test_make_bench_runs_the_scripts_and_not_what_they_share(tmp_path: Path) -> None:
    planned = subprocess.run(
        ["make", "--dry-run", "bench"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for script in SCRIPTS:
        assert f"benchmarks/{script.name}" in planned
    assert "_measure" not in planned


QUICK = {
    "growth": ["--methods", "covmatch", "lors", "--axes", "dimension"],
    "waiting": [],
    "prepare_memory": [],
}


@pytest.mark.parametrize("name", QUICK)
def test_a_quick_run_writes_a_record(name: str, tmp_path: Path, measure: ModuleType) -> None:
    if name == "growth" and not measure.peak_resident_bytes():
        return  # it says that it needs Linux
    path = tmp_path / "record.json"
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick", "--record", str(path)]
    subprocess.run([*command, *QUICK[name]], check=True, capture_output=True)
    record = json.loads(path.read_text())
    if name == "growth":
        found = {(r["method"], r["value"]): r for r in record["runs"]}
        assert set(found) == {(m, d) for m in ("covmatch", "lors") for d in (64, 256)}
        for method in ("covmatch", "lors"):  # counted, so the same on every machine
            assert found[method, 64]["operations"] < found[method, 256]["operations"]
        assert all(r["peak_bytes_above_base"] > 0 for r in record["runs"])
    elif name == "waiting":
        for mode in record[0]["modes"].values():
            assert 0 < mode["seconds_waiting"] < mode["seconds_of_an_iteration"]
    else:
        runs = [record["plain_loop"], *record["runs"]]
        assert [run["workers"] for run in runs] == [0, 1, 2]
        assert len({run["pixels"] for run in runs}) == 1
        assert all(run["peak_rss_bytes"] > 2**20 for run in runs)


def test_gradient_engines_are_compared_with_the_published_passes(
    tmp_path: Path, measure: ModuleType
) -> None:
    if not measure.peak_resident_bytes():
        return  # it says that it needs Linux
    path = tmp_path / "record.json"
    engines = ["forward-over-reverse", "finite-difference"]
    command = [sys.executable, str(FOLDER / "trajectory.py"), "--settings", "test_nfnet"]
    command += ["--modes", "reference", *engines, "--repeats", "1", "--no-growth"]
    subprocess.run([*command, "--record", str(path)], check=True, capture_output=True)
    modes = json.loads(path.read_text())[0]["modes"]
    assert modes["reference"]["median_seconds_ratio"] == 1.0
    for name in engines:
        differs = modes[name]["relative_difference"]
        assert 0 < max(differs.values()) < 1e-3
        assert modes[name]["median_seconds"] > 0
    # What the mode says of its own error, and what the published passes say of it.
    assert 0 < modes["finite-difference"]["reported_relative_error"] < 1e-3


def test_chapters_of_a_checkout_are_timed(tmp_path: Path) -> None:
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "mmdd.py").write_text("loops = 3_000_000\n")
    work = nbformat.v4.new_code_cell("import mmdd\nfor _ in range(mmdd.loops): pass")
    for name, cells in {"01_busy": [work], "02_idle": []}.items():
        notebook = nbformat.v4.new_notebook(cells=cells)
        nbformat.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")
    record = tmp_path / "record.json"
    command = [sys.executable, str(FOLDER / "chapters.py"), "--checkout", str(tmp_path)]
    subprocess.run([*command, "--record", str(record)], check=True, capture_output=True)
    (entry,) = json.loads(record.read_text())
    busy, idle = (entry["chapters"][name] for name in ("01_busy", "02_idle"))
    assert busy["cpu_seconds"] > busy["start_cpu_seconds"] >= 0
    assert entry["cpu_seconds"] == pytest.approx(busy["cpu_seconds"] + idle["cpu_seconds"])
    assert entry["seconds"] >= max(busy["seconds"], idle["seconds"])


def gpu(*arguments: str) -> str:
    command = [sys.executable, str(FOLDER / "gpu.py"), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_gpu_benchmark_in_small(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    first = gpu("--smoke", "--record", str(path))
    record = json.loads(path.read_text())
    methods = {"covmatch", "mdm", "lors", "tesla", "mtt"}
    assert {name.split()[0] for name in record["iterations"]} == methods
    for found in record["iterations"].values():
        assert found["operations"] > 1e6
        assert found["median_seconds"] > 0
    assert set(record["gains"]) == {"TF32", "bfloat16", "channels-last", "torch.compile"}
    assert set(record["waits"]) == methods
    # Methods with experts read those from the disk on a CPU; nothing else is asked for.
    assert record["waits"]["covmatch"]["waits"] == record["waits"]["mdm"]["waits"] == {}
    assert record["students"]["image+text_head"]["ratio"] > 0
    assert set(record["end-to-end"]["scenes"]["recall"]) >= {"random pairs", "CovMatch", "chance"}
    assert "error" not in path.read_text()
    # What is there is left out; what is lost is measured again, alone.
    del record["waits"]["mdm"]
    path.write_text(json.dumps(record))
    assert [line.split(":")[0] for line in gpu("--smoke", "--record", str(path)).splitlines()] == [
        "waits, mdm"
    ]
    assert len(first.splitlines()) == 16


def test_the_gpu_benchmark_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        return  # it would measure
    assert gpu().startswith("no CUDA device here: nothing was measured")
    assert not (FOLDER / "gpu.json").exists()  # and a trial's numbers never go there


def test_bench_goes_on_after_a_failure_and_ends_with_the_table(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    (tmp_path / "good.py").write_text("print('measured')")
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "tools" / "bench.py"), "--folder", str(tmp_path)),
            *(str(tmp_path / "bad.py"), str(tmp_path / "good.py")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "bad.py" in done.stderr.splitlines()[-1]
    lines = done.stdout.splitlines()
    assert "== 2 of 2" in done.stdout
    assert lines.index("measured") < next(i for i, s in enumerate(lines) if s.startswith("what "))
    assert lines[-1].startswith("targets met: ")


def test_an_entry_replaces_that_of_the_same_key(measure: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    for entry in (
        {"name": "b", "threads": 2, "x": 1},
        {"name": "b", "threads": 10, "x": 2},
        {"name": "a", "threads": 2, "x": 3},
        {"name": "b", "threads": 2, "x": 4},
    ):
        measure.add(entry, path)
    found = [(e["name"], e["threads"], e["x"]) for e in json.loads(path.read_text())]
    assert found == [("a", 2, 3), ("b", 2, 4), ("b", 10, 2)]
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_an_interrupted_write_leaves_the_old_record(measure: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    measure.write([1], path)
    with pytest.raises(TypeError):
        measure.write([object()], path)
    assert json.loads(path.read_text()) == [1]


def test_a_timer_tells_work_from_waiting(measure: ModuleType) -> None:
    with measure.Timer() as waiting:
        time.sleep(0.2)
    assert waiting.seconds >= 0.2
    assert waiting.cpu_seconds < waiting.seconds / 2


WORKER = """
import sys
sys.path.insert(0, {folder!r})
from _measure import serve
held = []
def iterate(number):
    if number == 9:
        sys.exit(3)
    held[:] = [bytearray(50 * 2**20)] if number == 2 else []
    return {{"number": number}}
print("ready", flush=True)
serve(iterate)
"""


def test_a_worker_counts_the_peak_of_what_it_was_asked_for(
    measure: ModuleType, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(WORKER.format(folder=str(FOLDER)))
    with measure.Worker(str(script), "mode", [], 1, greets=True) as worker:
        assert worker.iterate(0) == {"number": 0}
        small, large = worker.iterate(1), worker.iterate(2)
        above = [answer["peak_bytes"] - answer["base_bytes"] for answer in (small, large)]
        if measure.peak_resident_bytes():  # 0 where the kernel keeps no count
            assert above[0] < 20 * 2**20 < 50 * 2**20 <= above[1] < 80 * 2**20
        with pytest.raises(SystemExit, match="mode: the process ended with 3"):
            worker.iterate(9)


def test_ratios_stand_beside_what_is_compared(measure: ModuleType) -> None:
    modes = {
        "a": dict.fromkeys(measure.COMPARED, 4.0),
        "b": dict.fromkeys(measure.COMPARED, 6.0) | {"other": 1},
    }
    measure.add_ratios(modes, "a")
    assert all(modes["b"][f"{name}_ratio"] == 1.5 for name in measure.COMPARED)
    assert "other_ratio" not in modes["b"]
    title, first, second = measure.report(modes)
    assert "1.50" in second
    assert "1.50" not in first
    assert len(title) == len(first)
