"""Runs end to end on a few scenes: records, what is reused, and what a record may not hold."""

import json
import shutil
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from mmdd import runs
from mmdd.config import RunConfig
from mmdd.data.scenes import Scenes
from mmdd.distill import Distiller
from mmdd.encoders import build_model
from mmdd.errors import ArtefactError, ConfigError, DataError, NonFiniteError, StoreError
from mmdd.runs import (
    METRICS,
    _no_cost,
    evaluate_file,
    initial_pairs,
    load_results,
    run,
    set_path,
    summarise,
)
from mmdd.store import ResultsStore
from mmdd.synthetic import SyntheticPairs

# Names that tests outside the project rely on.
COLUMNS = (
    *("run_id", "sweep", "dataset", "model", "method", "pairs", "protocol", "seed"),
    *("student_seed", "IR@1", "IR@5", "IR@10", "TR@1", "TR@5", "TR@10", "mean"),
    *("mean_best_on_test", "chance_mean", "seconds_per_iteration", "iterations"),
    *("expert_seconds", "peak_memory_bytes", "num_bytes", "device", "stale"),
)
SMALL: dict[str, Any] = {
    "pairs": 6,
    "dataset": {"train": 40, "val": 20, "test": 20},
    "model": {"dim": 12},
    "evaluation": {"students": 2, "epochs": 3, "scores": 2, "lr_image": 0.001, "lr_text": 0.001},
    "sweep": "mine",
    "runtime": {"progress": False, "device": "cpu"},
}
FAST: dict[str, Any] = {
    "iterations": 4,
    "real_batch": 8,
    "normalize": True,
    "optimizer": "adam",
    "lr_image": 0.01,
    "lr_text": 0.01,
}


def make(**changes: Any) -> RunConfig:
    values = SMALL | changes
    if values.get("method", "covmatch") == "covmatch":
        values["settings"] = FAST | values.get("settings", {})
    return RunConfig.model_validate(values)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one run of each kind."""
    folder = tmp_path_factory.mktemp("store") / "results"
    for method in ("covmatch", "random", "full"):
        run(make(method=method), folder)
    return folder


def stored(folder: Path, **changes: Any) -> dict[str, Any]:
    found = ResultsStore(folder).find(make(**changes).run_id)
    assert found is not None
    return found


# -- records ---------------------------------------------------------------------------------------


def test_a_record(results: Path) -> None:
    config, found = make(), stored(results)
    assert found["run_id"] == config.run_id
    assert found["config"] == config.identity()
    assert found["sweep"] == "mine"
    assert found["protocol"] == "both"
    assert found["dataset"]["name"] == "scenes"
    assert found["dataset"]["splits"] == {"train": 40, "val": 20, "test": 20}
    expected = Scenes.generate({"train": 40, "val": 20, "test": 20}).fingerprint
    assert found["dataset"]["fingerprint"] == expected
    assert [s["student_seed"] for s in found["students"]] == [0, 1]
    for student in found["students"]:
        for scores in ("test", "validation", "best_on_test"):
            assert set(student[scores]) == set(METRICS)
            assert all(0 <= v <= 100 for v in student[scores].values())
        assert student["best_on_test"]["mean"] >= student["test"]["mean"]
        assert student["curve"][-1][0] == 3
    assert found["chance"]["IR@5"] == 25.0
    cost = found["cost"]
    assert cost["iterations"] == 4
    assert cost["seconds_per_iteration"] > 0
    assert cost["peak_memory_bytes"] > 1e7
    assert len(cost["history"]["loss"]) == 4
    assert found["environment"]["source_hash"] == config.source_hash
    assert found["model"]["tokenizer"] == "scenes"
    assert found["model"]["parameters"] > 400_000
    assert datetime.fromisoformat(found["finished"]).tzinfo is not None
    training = sum(student["seconds"] for student in found["students"])
    assert 0.3 * training < found["cpu_seconds"] < 3_600
    assert found == json.loads(json.dumps(found))


def test_cost_of_a_selection_and_of_the_full_data(results: Path) -> None:
    random, full = stored(results, method="random"), stored(results, method="full")
    for found in (random, full):
        assert found["cost"]["iterations"] == 0
        assert found["cost"]["expert_seconds"] == 0
        assert "history" not in found["cost"]
    assert full["cost"]["num_bytes"] == 0
    chosen = SyntheticPairs.load(set_path(results / "mine", make(method="random")))
    assert random["cost"]["num_bytes"] == chosen.num_bytes()
    assert not set_path(results / "mine", make(method="full")).exists()


def test_no_file_names_the_machine(results: Path, tmp_path: Path) -> None:
    for private in (str(results), str(tmp_path.parent), str(Path.home()), str(Path.cwd())):
        for path in results.rglob("*"):
            if path.is_file():
                assert private.encode() not in path.read_bytes(), path


def test_the_kept_sets(results: Path) -> None:
    distilled = SyntheticPairs.load(set_path(results / "mine", make()))
    assert len(distilled) == 6
    assert distilled.metadata["method"] == "covmatch"
    assert distilled.metadata["set_id"] == make().set_id
    assert distilled.metadata["cost"]["iterations"] == 4
    assert distilled.metadata["licence"] == "MIT"
    random = SyntheticPairs.load(set_path(results / "mine", make(method="random")))
    # The distillation starts from the same pairs that the random selection takes.
    assert distilled.metadata["source_images"] == random.metadata["source_images"]
    assert (distilled.images - random.images).abs().max() > 1e-3
    assert list((results / "mine" / "checkpoints").iterdir()) == []


def test_initial_pairs() -> None:
    config = make(protocol="heads", pairs=3)
    scenes = Scenes.generate({"train": 40, "val": 20, "test": 20})
    pairs = initial_pairs(config, scenes, build_model(config.model))
    assert pairs.texts.shape == (3, 64)
    other = initial_pairs(
        make(protocol="heads", pairs=3, seed=1), scenes, build_model(config.model)
    )
    assert not torch.equal(pairs.images, other.images)


# -- what is done once -----------------------------------------------------------------------------


def test_a_finished_run_is_not_repeated(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p: p.stat().st_mtime_ns for p in results.rglob("*")}
    monkeypatch.setattr(runs, "build_model", None)  # any work would call it
    monkeypatch.setattr(runs, "open_dataset", None)
    for method in ("covmatch", "random", "full"):
        assert run(make(method=method), results) == stored(results, method=method)
    # Not even for another sweep or another machine's settings.
    assert run(make(sweep="other", runtime={"threads": 1}), results) == stored(results)
    assert {p: p.stat().st_mtime_ns for p in results.rglob("*")} == before


def test_a_stale_record_is_replaced_on_request(results: Path, tmp_path: Path) -> None:
    old = stored(results, method="random")
    old["environment"]["source_hash"] = "0123456789ab"
    for student in old["students"]:
        student["test"]["mean"] += 0.25  # other code may have given other numbers
    ResultsStore(tmp_path).write(old)
    assert run(make(method="random"), tmp_path) == old
    again = {"redo_stale": True, "progress": False}
    new = run(make(method="random", runtime=again), tmp_path)
    assert new["environment"]["source_hash"] == make(method="random").source_hash
    assert new["students"][0]["test"] == stored(results, method="random")["students"][0]["test"]
    assert new["replaced"] == {
        "source_hash": "0123456789ab",
        "finished": old["finished"],
        "largest_difference": 0.25,
    }
    assert stored(tmp_path, method="random") == new
    assert run(make(method="random", runtime=again), tmp_path) == new  # fresh now
    assert load_results(tmp_path)["difference"].tolist() == [0.25, 0.25]
    assert load_results(results)["difference"].isna().all()


def test_a_start_from_noise(tmp_path: Path) -> None:
    scenes = Scenes.generate({"train": 40, "val": 20, "test": 20})
    model = build_model(make().model)
    for protocol, shape in (("both", 3), ("image+text_head", 2)):
        noise = initial_pairs(make(init="noise", protocol=protocol), scenes, model)
        real = initial_pairs(make(protocol=protocol), scenes, model)
        assert noise.images.shape == real.images.shape
        assert noise.texts.shape == real.texts.shape
        assert noise.texts.ndim == shape
        centred = (noise.images - model.image_encoder.mean[0]) / model.image_encoder.std[0]
        assert centred.mean().abs() < 0.05
        assert abs(centred.std() - 1) < 0.05
        entries = real.texts if real.text_mask is None else real.texts[real.text_mask]
        assert abs(noise.texts.std() / entries.std(unbiased=False) - 1) < 0.1
        again = initial_pairs(make(init="noise", protocol=protocol), scenes, model)
        assert torch.equal(noise.texts, again.texts)
        assert torch.equal(noise.images, again.images)
        assert "source_images" not in noise.metadata
    record = run(make(init="noise"), tmp_path)
    assert record["config"]["init"] == "noise"
    assert record["cost"]["iterations"] == 4


def test_students_of_another_architecture(results: Path, tmp_path: Path) -> None:
    student = {"pair": "scenes-tiny", "dim": 20}
    for method in ("covmatch", "random", "full"):
        record = run(make(method=method, student=student), tmp_path)
        assert record["config"]["student"]["dim"] == 20
        other = stored(results, method=method)["students"]
        assert [s["test"] for s in record["students"]] != [s["test"] for s in other]
    # The set is that of the run without students of their own.
    mine, theirs = (
        SyntheticPairs.load(set_path(folder / "mine", make())) for folder in (tmp_path, results)
    )
    assert torch.equal(mine.images, theirs.images)
    table = load_results(tmp_path)
    assert set(table["student_model"]) == set(table["model"]) == {"scenes-tiny"}


def test_the_same_run_gives_the_same_numbers(results: Path, tmp_path: Path) -> None:
    def numbers(found: dict[str, Any]) -> Any:
        students = [{k: v for k, v in s.items() if k != "seconds"} for s in found["students"]]
        return students, found["cost"].get("history"), found["chance"]

    for method in ("covmatch", "random"):
        again = run(make(method=method), tmp_path)
        assert numbers(again) == numbers(stored(results, method=method))


def test_sets_are_reused_when_only_the_evaluation_differs(results: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    shutil.copytree(results, folder)
    path = set_path(folder / "mine", make())
    before = path.stat().st_mtime_ns
    other = make(evaluation=SMALL["evaluation"] | {"epochs": 2})
    found = run(other, folder)
    assert path.stat().st_mtime_ns == before
    assert found["cost"] == stored(folder)["cost"]
    assert found["students"][0]["curve"][-1][0] == 2
    assert len(list(path.parent.glob("*.safetensors"))) == 2
    # The shortcut gives what the long way gives.
    direct = run(other, tmp_path / "direct")
    assert direct["students"][0]["test"] == found["students"][0]["test"]


def test_points_that_share_a_set_make_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers of a sweep at the same time: the second waits for the first one's set."""
    made = []
    plain = runs.distill_run

    def noted(*arguments: Any, **options: Any) -> Any:
        made.append(threading.current_thread().name)
        return plain(*arguments, **options)

    monkeypatch.setattr(runs, "distill_run", noted)
    records: list[dict[str, Any]] = []
    workers = [
        threading.Thread(
            target=lambda epochs=epochs: records.append(
                run(make(evaluation={"students": 1, "epochs": epochs}), tmp_path)
            )
        )
        for epochs in (1, 2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(made) == 1
    assert len({record["run_id"] for record in records}) == 2
    assert records[0]["cost"] == records[1]["cost"]


@pytest.mark.parametrize("key", ["source_hash", "dataset_fingerprint"])
def test_sets_of_other_code_or_data_are_made_again(results: Path, tmp_path: Path, key: str) -> None:
    folder = tmp_path / "results"
    shutil.copytree(results, folder)
    path = set_path(folder / "mine", make())
    kept = SyntheticPairs.load(path)
    kept.metadata[key] = "0" * 12
    kept.images.zero_()
    kept.save(path)
    run(make(evaluation=SMALL["evaluation"] | {"epochs": 1, "students": 1}), folder)
    made = SyntheticPairs.load(path)
    assert made.metadata[key] != "0" * 12
    assert made.images.abs().max() > 0.1


def test_a_broken_off_run_goes_on(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(runtime=SMALL["runtime"] | {"checkpoint_every": 1})
    real_step = runs.METHODS["covmatch"].distiller.after_step

    def stop(self: Any, iteration: int) -> dict[str, float]:
        if iteration == 2:
            raise KeyboardInterrupt
        return real_step(self, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(runs.METHODS["covmatch"].distiller, "after_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path)
    checkpoints = list((tmp_path / "mine" / "checkpoints").iterdir())
    assert len(checkpoints) == 2  # the last, and the one before it
    seen = []

    def note(self: Any, iteration: int) -> dict[str, float]:
        seen.append(iteration)
        return real_step(self, iteration)

    monkeypatch.setattr(runs.METHODS["covmatch"].distiller, "after_step", note)
    run(config, tmp_path)
    assert seen == [2, 3]
    first, second = (
        SyntheticPairs.load(set_path(folder / "mine", make())) for folder in (results, tmp_path)
    )
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.texts, second.texts)
    assert list((tmp_path / "mine" / "checkpoints").iterdir()) == []


def test_a_checkpoint_that_a_kill_left_beside_its_set_is_removed(
    results: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "results"
    shutil.copytree(results, folder)
    left = runs._checkpoint_path(folder / "mine", make())
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"the state of the last iteration")
    run(make(evaluation=SMALL["evaluation"] | {"epochs": 1, "students": 1}), folder)
    assert list(left.parent.iterdir()) == []


# -- errors ----------------------------------------------------------------------------------------


def test_impossible_runs_leave_no_record(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot choose 41 pairs"):
        run(make(pairs=41, method="random"), tmp_path)
    with pytest.raises(ValidationError, match=r"model\.pair\s+encoder pair 'clip' is unknown"):
        run(make(model={"pair": "clip"}), tmp_path)
    with pytest.raises(ConfigError, match=r"scenes-tiny takes 32 × 32"):
        run(make(dataset=SMALL["dataset"] | {"size": 16}), tmp_path)
    with pytest.raises(ConfigError, match=r"set runtime\.data"):
        run(make(dataset={"reader": "karpathy", "name": "photos"}), tmp_path)
    diverging = {"optimizer": "sgd", "normalize": False, "lr_image": 1e8, "lr_text": 1e8}
    with pytest.raises(NonFiniteError, match="covmatch, iteration"):
        run(make(settings={**diverging, "iterations": 30}), tmp_path)
    assert len(load_results(tmp_path)) == 0


# -- photos ----------------------------------------------------------------------------------------


def write_photos(
    folder: Path, seed: int, splits: tuple[str, ...] = ("train", "val", "test")
) -> Path:
    """Twelve photos with the captions file of Karpathy and Fei-Fei."""
    (folder / "images").mkdir(parents=True)
    random = np.random.default_rng(seed)
    entries = []
    for i in range(12):
        name = f"{i}.png"
        pixels = random.integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
        split = splits[0] if i < 6 else splits[1 + i % (len(splits) - 1)]
        texts = [{"raw": f"a {w} thing number {i}"} for w in ("red", "small")]
        entries.append({"filename": name, "split": split, "sentences": texts})
    (folder / "dataset_mine.json").write_text(json.dumps({"images": entries, "dataset": "mine"}))
    return folder


def photos(folder: Path | None, **changes: Any) -> RunConfig:
    return make(
        **{
            "method": "random",
            "pairs": 4,
            "dataset": {"name": "photos", "reader": "karpathy", "size": 32},
            "runtime": SMALL["runtime"] | {"data": None if folder is None else str(folder)},
            **changes,
        }
    )


def test_photos(tmp_path: Path) -> None:
    results = tmp_path / "results"
    first, second = (write_photos(tmp_path / n, seed) for n, seed in (("one", 1), ("two", 2)))
    found = run(photos(first), results)
    assert found["dataset"]["name"] == "photos"
    assert found["dataset"]["splits"] == {"train": 6, "val": 3, "test": 3}
    for path in results.rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), path
    assert run(photos(first), results) == found
    assert run(photos(None), results) == found  # the photos are not needed to look at a record
    with pytest.raises(StoreError, match="made with other data"):
        run(photos(second), results)
    assert run(photos(second), tmp_path / "elsewhere")["dataset"] != found["dataset"]
    few = photos(first, dataset={"name": "photos", "reader": "karpathy", "size": 32, "train": 5})
    limited = run(few, results)
    assert limited["dataset"]["splits"]["train"] == 5
    assert limited["dataset"]["fingerprint"] != found["dataset"]["fingerprint"]


def test_a_missing_split_is_noticed_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_photos(tmp_path / "photos", 1, splits=("train", "val"))
    monkeypatch.setattr(runs, "distill", None)
    with pytest.raises(DataError, match="no split 'test'"):
        run(photos(folder, method="covmatch"), tmp_path / "results")


# -- tables ----------------------------------------------------------------------------------------


def test_the_table(results: Path) -> None:
    table = load_results(results)
    assert set(COLUMNS) <= set(table.columns)
    assert len(table) == 6
    assert set(table["method"]) == {"covmatch", "random", "full"}
    assert table.set_index("method")["pairs"].groupby("method").first().to_dict() == {
        "covmatch": 6,
        "random": 6,
        "full": 40,
    }
    assert set(table["model"]) == {"scenes-tiny"}
    assert not table["stale"].any()
    assert table["chance_mean"].nunique() == 1
    row = table[(table["method"] == "covmatch") & (table["student_seed"] == 1)].iloc[0]
    student = stored(results)["students"][1]
    for metric in METRICS:
        assert row[metric] == student["test"][metric]
    assert row["mean_best_on_test"] == student["best_on_test"]["mean"]
    assert row["validation_mean"] == student["validation"]["mean"]
    assert row["num_bytes"] == stored(results)["cost"]["num_bytes"]
    assert row["config"] == make().identity()
    assert (table["mean_best_on_test"] >= table["mean"]).all()
    order = table[["sweep", "run_id", "student_seed"]]
    assert order.equals(order.sort_values(list(order.columns)))


def test_packing_changes_no_table(results: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    shutil.copytree(results, folder)
    ResultsStore(folder).pack("mine")
    pd.testing.assert_frame_equal(load_results(folder), load_results(results))
    assert run(make(), folder) == stored(results)


def test_the_table_of_an_empty_store(tmp_path: Path, results: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        table = load_results(folder)
        assert len(table) == 0
        assert list(table.columns) == list(load_results(results).columns)


def test_records_of_other_code_are_stale(results: Path, tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    for method, code in (
        ("covmatch", make().source_hash),
        ("random", make().source_hash),  # right for another method
    ):
        found = stored(results, method=method)
        found["environment"]["source_hash"] = code
        store.write(found)
    table = load_results(tmp_path)
    assert table.groupby("method")["stale"].first().to_dict() == {"covmatch": False, "random": True}


def test_a_corrupt_record_is_named(results: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    shutil.copytree(results, folder)
    path = ResultsStore(folder).pack("mine")
    lines = path.read_text().splitlines()
    lines[1] = lines[1][:100]
    path.write_text("\n".join(lines))
    with pytest.raises(StoreError, match=r"mine\.jsonl, line 2"):
        load_results(folder)


def test_summary(results: Path) -> None:
    table = load_results(results)
    summary = summarise(table).set_index("method")
    means = table[table["method"] == "random"]["mean"]
    assert summary.loc["random", "mean"] == pytest.approx(means.mean())
    assert summary.loc["random", "std"] == pytest.approx(np.std(means, ddof=1))
    assert summary.loc["random", "students"] == 2
    assert summary.loc["random", "seeds"] == 1
    by_hand = summarise(table, by=["method"], metric="TR@10").set_index("method")
    expected = table[table["method"] == "full"]["TR@10"].mean()
    assert by_hand.loc["full", "mean"] == pytest.approx(expected)
    with pytest.raises(ConfigError, match="no column 'budget'"):
        summarise(table, by=["budget"])


# -- a set from a file -----------------------------------------------------------------------------


def test_evaluate_file(results: Path, tmp_path: Path) -> None:
    for method in ("covmatch", "random"):
        path = set_path(results / "mine", make(method=method))
        students = evaluate_file(path, make(method="random"))
        expected = stored(results, method=method)["students"]
        for mine, theirs in zip(students, expected, strict=True):
            rounded = {k: round(v, 4) for k, v in mine["test"].items()}
            assert rounded == theirs["test"]
    with pytest.raises(ArtefactError, match="does not exist"):
        evaluate_file(tmp_path / "none.safetensors", make())
    (tmp_path / "junk.safetensors").write_bytes(b"junk" * 10)
    with pytest.raises(ArtefactError, match="junk"):
        evaluate_file(tmp_path / "junk.safetensors", make())


# -- settings for a GPU ----------------------------------------------------------------------------


def test_a_record_says_that_its_encoders_were_compiled(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch's tracing without its compiler, which takes a minute.
    monkeypatch.setattr(Distiller.compile_encoders, "__defaults__", ("eager",))
    wished = SMALL["runtime"] | {"compile": True}
    found = run(make(runtime=wished), tmp_path)
    plain = stored(results)
    assert found["cost"]["compiled"] is True
    assert "compiled" not in plain["cost"]
    assert found["run_id"] == plain["run_id"]
    assert found["students"][0]["test"] == pytest.approx(plain["students"][0]["test"], abs=5)
    with pytest.raises(ConfigError, match="dc cannot be compiled: it differentiates a gradient"):
        run(make(method="dc", runtime=wished), tmp_path)


def test_tf32_is_no_precision_of_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'tf32' is a mode of NVIDIA GPUs"):
        run(make(precision="tf32"), tmp_path)


# -- what only shows -------------------------------------------------------------------------------


def test_a_run_loads_nothing_that_only_shows() -> None:
    """Nor scikit-learn, which one selection needs: a second of every point of a sweep."""
    code = (
        "import sys, mmdd.runs, mmdd.config\n"
        "print(*[m for m in ('mmdd.results', 'pandas', 'sklearn') if m in sys.modules])\n"
        "from mmdd.runs import load_results, summarise\n"
        "print('mmdd.results' in sys.modules, load_results.__module__)\n"
    )
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == ["", "True mmdd.results"]


def test_the_table_knows_every_cost(results: Path) -> None:
    assert set(_no_cost()) <= set(load_results(results).columns)
    with pytest.raises(AttributeError, match="no attribute 'load_result'"):
        getattr(runs, "load_result")  # noqa: B009
