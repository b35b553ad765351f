"""The ledger against sums done by hand, fronts by their definition, targets against records."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmdd import costs
from mmdd.errors import ConfigError
from mmdd.presets import preset
from mmdd.rows import preset_rows
from mmdd.targets import TARGETS, measured

ROOT = Path(__file__).parents[1]


def row(method: str = "random", student: int = 0, preset_name: str = "small", **values: Any) -> Any:
    """A row of `load_results` for a run of a preset; values over it, dots go into the wishes."""
    wishes = {k[5:]: values.pop(k) for k in list(values) if k.startswith("wish_")}
    config = preset(preset_name, method=method, **wishes)
    found = {
        "run_id": config.run_id,
        "dataset": config.dataset.name,
        "model": config.model.pair,
        "student_model": config.model.pair,
        "method": method,
        "pairs": 4000 if method == "full" else config.pairs,
        "protocol": config.protocol,
        "seed": config.seed,
        "student_seed": student,
        "mean": 10.0,
        "student_seconds": 2.0,
        "expert_seconds": 0.0,
        "expert_bytes": 0,
        "init_seconds": 0.0,
        "seconds_per_iteration": 0.0,
        "iterations": 0,
        "peak_memory_bytes": 0,
        "num_bytes": 1000,
        "config": config.identity(),
    }
    return found | values


def distilled(method: str, student: int = 0, **values: Any) -> Any:
    given = {"expert_seconds": 60.0, "expert_bytes": 500, "seconds_per_iteration": 0.5}
    return row(method, student, **given | {"iterations": 120} | values)


HEAD = {"wish_protocol": "image+text_head"}


def test_the_ledger_adds_up_and_takes_the_least_that_was_measured() -> None:
    rows = pd.DataFrame(
        [
            distilled("mtt", 0, mean=30.0, student_seconds=3.0, **HEAD),
            distilled("mtt", 1, mean=34.0, student_seconds=9.0, **HEAD),
            distilled(
                "mtt", 0, mean=35.0, expert_seconds=80.0, seconds_per_iteration=0.25,
                wish_seed=1, **HEAD,
            ),
            row("random", 0, student_seconds=2.5, **HEAD),
        ]
    )  # fmt: skip
    table = costs.ledger(rows)
    mtt = table.loc[("scenes", "image+text_head", 100, "mtt")]
    assert (mtt["recall"], mtt["seeds"], mtt["students"]) == (33.0, 2, 3)
    assert (mtt["experts"], mtt["distillation"]) == (60.0, 0.25 * 120)
    # A student's time does not depend on who made its pairs: the third one took two seconds.
    assert mtt["student"] == 2.0
    assert table.loc[("scenes", "image+text_head", 100, "random"), "student"] == 2.0
    assert mtt["sets per buffer"] == 2
    assert mtt["student steps"] == 100  # 100 epochs of one batch
    assert costs.total(table).loc[mtt.name, "total"] == 60 + 30 + 2
    assert costs.total(table, "shared").loc[mtt.name, "total"] == 30 + 30 + 2
    assert costs.total(table, "none").loc[mtt.name, "total"] == 30 + 2


def test_experts_are_shared_by_sets_and_not_by_evaluations_or_other_buffers() -> None:
    shared = [
        distilled("mtt", **HEAD),
        distilled("mtt", wish_evaluation={"epochs": 7}, **HEAD),  # the same set
        distilled("tesla", wish_pairs=50, **HEAD),
    ]
    other = [
        distilled("mtt", wish_settings={"experts": {"count": 3}}, **HEAD),
        distilled("repblend", expert_bytes=70, wish_pairs=99, **HEAD),  # of the projections alone
    ]
    chosen, everything = pd.DataFrame(shared[:1]), pd.DataFrame(shared + other)
    assert costs.ledger(chosen, everything)["sets per buffer"].tolist() == [2]


def test_what_gives_up_a_pair_stands_at_its_budget_and_the_full_data_have_no_bytes() -> None:
    rows = pd.DataFrame([distilled("lors", wish_pairs=99, **HEAD), row("full", num_bytes=0)])
    table = costs.ledger(rows)
    assert table.index.get_level_values("pairs").tolist() == [4000, 100]
    assert np.isnan(table["bytes"].iloc[0])
    assert table["student steps"].tolist() == [100 * 32, 100]


def test_the_ledger_refuses_mixtures_and_nothing() -> None:
    rows = pd.DataFrame([row(), row(wish_evaluation={"epochs": 3})])
    with pytest.raises(ConfigError, match="more than one configuration"):
        costs.ledger(rows)
    with pytest.raises(ConfigError, match="no record"):
        costs.ledger(rows.iloc[:0])


def test_the_rows_of_a_preset() -> None:
    rows = pd.DataFrame(
        [
            row("random"),
            row("random", wish_evaluation={"epochs": 3}),
            distilled("mtt", **HEAD),
            distilled("mtt", wish_settings={"syn_steps": 2}, **HEAD),
            row("full", wish_evaluation={"epochs": 8}),
            row("full", wish_evaluation={"epochs": 20, "scores": 5}),
            row("full", wish_evaluation={"epochs": 50, "lr_image": 0.5}),
        ]
    )
    assert preset_rows(rows).index.tolist() == [0, 2, 5]
    started = pd.DataFrame([row("mdm"), row("mdm", wish_init="random")])
    assert preset_rows(started).index.tolist() == [0]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_the_front_is_what_nothing_dominates(points: list[tuple[int, int]]) -> None:
    cost, value = (pd.Series([p[i] for p in points], dtype=float) for i in (0, 1))
    front = costs.pareto_front(cost, value)
    for i, (c, v) in enumerate(points):
        dominated = any(
            (a <= c and b >= v) and ((a, b) != (c, v) or j < i) for j, (a, b) in enumerate(points)
        )
        assert front[i] == (not dominated)


def test_a_point_without_a_number_is_not_on_the_front() -> None:
    front = costs.pareto_front(pd.Series([1.0, np.nan, 3.0]), pd.Series([np.nan, 9.0, 2.0]))
    assert front.tolist() == [False, False, True]


def test_a_power_law_is_found_again() -> None:
    x = pd.Series([25, 100, 400])
    found = costs.power_law(x, 3 * x**0.7)
    assert found == pytest.approx({"exponent": 0.7, "factor": 3.0, "off": 1.0})
    bent = costs.power_law(x, pd.Series([1.0, 2.0, 1.0]))
    assert bent["exponent"] == pytest.approx(0.0, abs=1e-12)
    assert bent["off"] == pytest.approx(2 ** (2 / 3))
    assert np.isnan(costs.power_law(x[:2], x[:2])["exponent"])


def test_how_many_students_pay_for_a_set() -> None:
    found = costs.students_until_it_pays(
        pd.Series([90.0, 90.0, 0.0]), pd.Series([1.0, 12.0, 1.0]), full=10.0
    )
    assert found.tolist() == [10.0, np.inf, 0.0]


def test_targets_are_read_from_the_committed_records() -> None:
    table = measured(ROOT / "benchmarks").set_index(["subject", "quantity"])
    entries = json.loads((ROOT / "benchmarks" / "trajectory.json").read_text())
    entries = [e for e in entries if e["name"] == "test_nfnet"]
    modes = {e["threads"]: e["modes"]["finite-difference"] for e in entries}
    assert set(modes) == {1, 2}
    wanted = max(modes[1]["median_cpu_seconds_ratio"], modes[2]["median_seconds_ratio"])
    found = table.loc[("LoRS / TESLA, finite differences, test_nfnet", "time")]
    assert found["ratio"] == pytest.approx(wanted, abs=1e-3)
    assert found["met"] == ("yes" if wanted <= 0.45 else "no")
    assert len(table) == len(TARGETS)


def test_waiting_and_preparing_are_read_from_their_records(tmp_path: Path) -> None:
    machine = {"cores": 2, "architecture": "some"}
    modes = {"memory": {"share": 0.002}, "disk": {"share": 0.04}}
    waiting = [{"name": "test_nfnet", "threads": 1, "modes": modes, "machine": machine}]
    (tmp_path / "waiting.json").write_text(json.dumps(waiting))
    runs = [{"workers": w, "seconds": s, "peak_rss_bytes": 5e8} for w, s in ((1, 11.0), (2, 6.0))]
    prepared = {"runs": runs, "plain_loop": {"seconds": 10.0}, "machine": machine}
    path = tmp_path / "prepare_memory.json"
    path.write_text(json.dumps(prepared))
    found = measured(tmp_path).set_index(["subject", "quantity"])
    assert found.loc[("waiting for data, cache in memory", "time"), "ratio"] == 0.002
    assert found.loc[("waiting for data, cache on disk", "time"), "met"] == "no"
    assert found.loc[("preparing JPEGs, two workers", "time"), "ratio"] == 0.6
    assert found.loc[("preparing JPEGs", "memory"), "met"] == "yes"
    del prepared["plain_loop"]  # a record from before there was one
    path.write_text(json.dumps(prepared))
    found = measured(tmp_path).set_index(["subject", "quantity"])
    assert found.loc[("preparing JPEGs, two workers", "time"), "met"] == "not yet measured"


def test_without_records_nothing_is_measured(tmp_path: Path) -> None:
    (tmp_path / "trajectory.json").write_text("[]")
    table = measured(tmp_path)
    assert set(table["met"]) == {"not yet measured"}
    assert table["ratio"].isna().all()


def test_an_iteration_counts_at_its_worst(tmp_path: Path) -> None:
    def entry(threads: int, seconds: float, cpu_seconds: float) -> dict:
        ratio = {"seconds": seconds, "cpu_seconds": cpu_seconds, "memory": 1.0}
        return {
            "method": "covmatch",
            "name": "test_nfnet",
            "threads": threads,
            "ratios": {"loop/floor": ratio, "loop/naive": ratio},
            "machine": {"cores": 2, "architecture": "x86_64", "load_before_and_after": [0, 1]},
        }

    # The clock of one thread tells of other work, CPU seconds of two of threads that spin.
    record = [entry(1, 9.0, 1.07), entry(2, 1.09, 0.5)]
    (tmp_path / "iteration.json").write_text(json.dumps(record))
    table = measured(tmp_path).set_index("subject")
    rows = table.loc[["CovMatch iteration, test_nfnet"]]
    assert rows["ratio"].tolist() == [1.09, 1.09]
    assert rows["met"].tolist() == ["yes", "no"]
    assert table.loc["MDM iteration, interpolation included, nfnet_l0", "met"] == "not yet measured"
