"""Experts as jobs: in processes of their own, on a Dask cluster, and what their run finds."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmdd.config import RunConfig
from mmdd.errors import ConfigError, NonFiniteError
from mmdd.expert_jobs import train_all, train_expert
from mmdd.runs import run


def make(folder: Path, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "method": "mtt",
        "pairs": 6,
        "protocol": "image+text_head",
        "dataset": {"train": 40, "val": 20, "test": 20},
        "model": {"dim": 12},
        "settings": {
            "iterations": 2,
            "syn_steps": 2,
            "max_start_epoch": 1,
            "experts": {"count": 3, "epochs": 2, "batch_size": 20, "lr_image": 0.01},
        },
        "evaluation": {"students": 1, "epochs": 1, "scores": 1},
        "runtime": {"experts": str(folder), "progress": False, "threads": 1},
    }
    return RunConfig.model_validate(values | changes)


def test_processes_make_what_the_run_would_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = train_all(make(tmp_path / "jobs"), jobs=2, progress=False)
    assert len(buffer) == 3
    record = run(make(tmp_path / "alone"), tmp_path / "results")
    names = sorted(p.relative_to(tmp_path / "jobs") for p in (tmp_path / "jobs").rglob("snap*"))
    assert len(names) == 9
    for name in names:
        assert (tmp_path / "jobs" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    # A run that finds them trains none.
    monkeypatch.setattr("mmdd.experts._train", None)
    again = run(make(tmp_path / "jobs", sweep="again"), tmp_path / "other")
    assert again["students"][0]["test"] == record["students"][0]["test"]
    assert again["cost"]["expert_bytes"] == record["cost"]["expert_bytes"] > 0
    assert again["cost"]["expert_seconds"] == pytest.approx(buffer.seconds, abs=1e-3)
    assert str(tmp_path) not in json.dumps(record)


def test_repblends_experts_are_those_of_the_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its protocol: the run finds what was trained ahead of it."""
    config = make(tmp_path / "jobs", method="repblend")
    train_all(config, progress=False)
    monkeypatch.setattr("mmdd.experts._train", None)
    assert run(config, tmp_path / "results")["cost"]["expert_bytes"] > 0


def test_a_dask_cluster(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        buffer = train_all(make(tmp_path), cluster=cluster.scheduler_address, progress=False)
    assert len(buffer) == 3
    assert buffer.snapshots == 2


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'covmatch' uses no experts"):
        train_expert(RunConfig(method="covmatch"), 0)
    assert not list(tmp_path.iterdir())


def test_a_failing_job_is_raised(tmp_path: Path) -> None:
    values = make(tmp_path).settings.model_dump()  # type: ignore[union-attr]
    values["experts"] |= {"lr_image": 1e30, "lr_heads": 1e30}
    with pytest.raises(NonFiniteError, match="lower its learning rates"):
        train_all(make(tmp_path, settings=values), jobs=1, progress=False)
