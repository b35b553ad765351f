"""Selections as methods of their own and as starts of a distillation, from config to record."""

from pathlib import Path
from typing import Any

import pytest

from mmdd.config import RunConfig
from mmdd.runs import run, set_path
from mmdd.selection import SELECTORS
from mmdd.synthetic import SyntheticPairs

SMALL: dict[str, Any] = {
    "pairs": 6,
    "protocol": "heads",
    "dataset": {"train": 40, "val": 10, "test": 10},
    "model": {"dim": 12},
    "selection": {
        "warm_up_epochs": 2, "forgetting_epochs": 2, "batch_size": 16, "lr_image": 0.01
    },
    "evaluation": {"students": 2, "epochs": 2, "scores": 1},
    "sweep": "mine",
    "runtime": {"progress": False, "device": "cpu"},
}  # fmt: skip
FAST = {
    "iterations": 2, "real_batch": 8, "normalize": True, "optimizer": "adam",
    "lr_image": 0.0, "lr_text": 0.0, "learn_texts": False,
}  # fmt: skip


@pytest.mark.parametrize("name", SELECTORS)
def test_as_a_method_and_as_a_start(tmp_path: Path, name: str) -> None:
    alone = RunConfig.model_validate(SMALL | {"method": name})
    record = run(alone, tmp_path)
    assert record["config"]["method"] == name
    assert ("selection" in record["config"]) == (name != "random")
    assert record["cost"]["init_seconds"] > 0
    assert all(student["test"]["mean"] >= 0 for student in record["students"])
    start = RunConfig.model_validate(SMALL | {"method": "covmatch", "init": name, "settings": FAST})
    distilled = run(start, tmp_path)
    assert distilled["config"]["init"] == name
    chosen, kept = (
        SyntheticPairs.load(set_path(tmp_path / "mine", config)) for config in (alone, start)
    )
    # The distillation began at the pairs that the selection keeps.
    for key in ("source_images", "source_captions"):
        assert chosen.metadata[key] == kept.metadata[key]
    assert len(set(chosen.metadata["source_images"])) == 6


@pytest.mark.parametrize("name", ["herding", "forgetting"])
def test_the_ledger_has_the_seconds_that_the_cache_saved(tmp_path: Path, name: str) -> None:
    """Two protocols share one warm-up; both records say what it took."""
    first = run(RunConfig.model_validate(SMALL | {"method": name, "seed": 5}), tmp_path)
    other = SMALL | {"method": name, "seed": 5, "protocol": "image+text_head"}
    second = run(RunConfig.model_validate(other), tmp_path)
    seconds = [record["cost"]["init_seconds"] for record in (first, second)]
    assert seconds[1] > seconds[0] / 4


def test_only_runs_that_select_by_features_depend_on_how(tmp_path: Path) -> None:
    def make(**changes: Any) -> RunConfig:
        return RunConfig.model_validate(SMALL | changes)

    other = SMALL["selection"] | {"lr_heads": 0.7}
    for name in SELECTORS:
        same = make(method=name).run_id == make(method=name, selection=other).run_id
        assert same == (name == "random")
    hashes = {make(method=name).source_hash for name in ("random", "herding", "forgetting")}
    assert len(hashes) == 3
