"""What a run changed, the rows of an ablation, and when a claim counts as decided."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mmdd.ablations import (
    coverage,
    in_sweeps,
    only,
    search_outcome,
    search_trials,
    setting,
    verdict,
    with_changes,
)
from mmdd.errors import ConfigError
from mmdd.grid import load_sweep
from mmdd.presets import preset

ROOT = Path(__file__).resolve().parent.parent


def rows_of(**wishes: Any) -> pd.DataFrame:
    """Two students of one run, as `load_results` would give them."""
    run = preset("small", **wishes)
    row = {"run_id": run.run_id, "config": run.identity(), "method": run.method}
    return pd.DataFrame([row | {"mean": value} for value in (30.0, 32.0)])


def test_a_run_is_known_by_what_it_changed() -> None:
    told = {
        "plain": {"method": "covmatch"},
        "another seed": {"method": "covmatch", "seed": 2},
        "tuned value written out": {"method": "covmatch", "settings": {"lambda_": 0.1}},
        "one setting": {"method": "covmatch", "settings": {"rho": 4.0}},
        "two": {"method": "covmatch", "settings": {"rho": 4.0}, "model": {"dim": 64}},
        "the students": {"method": "covmatch", "evaluation": {"lr_text": 0.0}},
        "a selection": {"method": "herding"},
        "full": {"method": "full", "evaluation": {"epochs": 20}},
        "a start": {"method": "mdm", "protocol": "image+text_head", "init": "herding"},
    }
    found = {
        name: with_changes(rows_of(**wishes)).iloc[0][["init", "changes"]].tolist()
        for name, wishes in told.items()
    }
    assert found == {
        "plain": ["random", {}],
        "another seed": ["random", {}],
        "tuned value written out": ["random", {}],
        "one setting": ["random", {"settings.rho": 4.0}],
        "two": ["random", {"settings.rho": 4.0, "model.dim": 64}],
        "the students": ["random", {"evaluation.lr_text": 0.0}],
        "a selection": [None, {}],
        "full": [None, {"evaluation.epochs": 20}],
        "a start": ["herding", {}],  # MDM's own start, k-means, is what a preset would take
    }


def test_every_run_of_the_ablation_grids_changes_only_what_its_grid_varies() -> None:
    """Or a chapter would miss it: the rows are found by their changes."""
    held = {"settings.real_batch": 256}  # of CovMatch, in its grids and in chapter 10
    known = {
        "rho_lambda": {"settings.rho", "settings.lambda_"},
        "rank": {"settings.rank", "settings.similarity", "settings.alpha"},
        "init": set(),
    }
    for name, keys in known.items():
        for point in load_sweep(ROOT / "sweeps" / f"{name}.yaml"):
            row = {"run_id": point.run_id, "config": point.identity()}
            here = held if name == "rho_lambda" else None
            (changes,) = with_changes(pd.DataFrame([row]), held=here)["changes"]
            assert set(changes) <= keys, (name, changes)


def test_what_an_ablation_holds_is_no_change_and_the_preset_then_is_one() -> None:
    held = {"settings.rho": 4.0}
    rows = pd.concat(
        [
            rows_of(method="covmatch"),
            rows_of(method="covmatch", settings={"rho": 4.0}),
            rows_of(method="covmatch", settings={"rho": 4.0, "lambda_": 0.5}),
            rows_of(method="random"),  # has no ρ to hold
        ],
        ignore_index=True,
    )
    found = with_changes(rows, held=held)["changes"].tolist()[::2]
    assert found == [{"settings.rho": 1.5}, {}, {"settings.lambda_": 0.5}, {}]


def test_only_leaves_what_changed_nothing_else() -> None:
    rows = with_changes(
        pd.concat(
            [
                rows_of(method="covmatch"),
                rows_of(method="covmatch", settings={"rho": 4.0}),
                rows_of(method="covmatch", settings={"rho": 4.0, "lambda_": 0.5}),
            ],
            ignore_index=True,
        )
    )
    assert setting(only(rows, "settings.rho"), "settings.rho").tolist() == [1.5, 1.5, 4.0, 4.0]
    assert len(only(rows)) == 2
    assert len(only(rows, "settings.rho", "settings.lambda_")) == 6
    assert only(rows.iloc[2:], "model.dim").empty
    nothing = only(with_changes(rows.iloc[:0]), "model.dim")
    assert nothing.empty
    assert set(nothing.columns) == set(rows.columns)  # and a chapter can go on with it


def test_setting_is_none_where_there_is_no_such_key() -> None:
    rows = rows_of(method="random")
    assert setting(rows, "settings.rho").tolist() == [None, None]
    assert setting(rows, "evaluation.epochs").tolist() == [100, 100]
    assert setting(rows.iloc[:0], "settings.rho").empty


def test_coverage_counts_runs_by_their_configuration(tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "sweep: any\nbase: {method: covmatch}\ngrid:\n  - settings.rho: [1.5, 3.0, 4.0]\n"
    )
    rows = pd.concat([rows_of(method="covmatch"), rows_of(method="mdm", protocol="heads")])
    assert coverage(rows, grid) == "1 of 3 runs"
    assert coverage(rows, grid, grid) == "1 of 3 runs"  # what two files want is one run
    grid.write_text("sweep: any\ngrid: []\n")
    with pytest.raises(ConfigError):
        coverage(rows, grid)


def test_a_run_that_two_sweeps_ask_for_is_in_both(tmp_path: Path) -> None:
    text = "sweep: {}\nbase: {{method: covmatch}}\ngrid:\n  - settings.rho: {}\n"
    (tmp_path / "the_first.yaml").write_text(text.format("the-first", "[1.5, 3.0]"))
    (tmp_path / "other.yaml").write_text(text.format("other", "[1.5]"))
    shared = rows_of(method="covmatch").assign(sweep="other")
    rows = pd.concat([shared, rows_of(method="mdm").assign(sweep="other")], ignore_index=True)
    for name in ("the-first", "other"):
        assert in_sweeps(rows, tmp_path, name).tolist() == [True, True, False, False]
    assert in_sweeps(rows, tmp_path, "the-first", "other").sum() == 2
    with pytest.raises(ConfigError, match=r"none\.yaml is not a sweep file"):
        in_sweeps(rows, tmp_path, "none")


def series(*values: float) -> pd.Series:
    return pd.Series(values, dtype=float)


@pytest.mark.parametrize(
    ("better", "other", "told"),
    [
        (series(20, 21, 22), series(10, 11, 12), "reproduced"),
        (series(10, 11, 12), series(20, 21, 22), "not reproduced"),
        (series(10, 11, 12), series(11, 12, 13), "inconclusive"),
        # Three students of standard deviation 1 each, τ = 1: 2u = 2 √(2 + 2/3) = 3.27.
        (series(13.3, 14.3, 15.3), series(10, 11, 12), "reproduced"),
        (series(13.2, 14.2, 15.2), series(10, 11, 12), "inconclusive"),
        (series(50), series(10, 11, 12), "inconclusive"),  # no spread of the first
        (series(), series(10, 11, 12), "not yet run"),
        (series(10, 11, 12), series(), "not yet run"),
    ],
)
def test_a_verdict_needs_twice_the_error(better: pd.Series, other: pd.Series, told: str) -> None:
    assert verdict(better, other, 1.0)["verdict"] == told


def test_the_numbers_of_a_verdict() -> None:
    found = verdict(series(20, 22, 24), series(11, 12, 13), 1.5)
    assert found["difference"] == pytest.approx(10)
    assert found["2u"] == pytest.approx(2 * np.sqrt(2 * 1.5**2 + (4 + 1) / 3))
    assert np.isnan(verdict(series(), series(1), 1.5)["difference"])
    # Without any configuration of three seeds, τ is not known, and nothing is decided.
    assert verdict(series(20, 22, 24), series(11, 12, 13), np.nan)["verdict"] == "inconclusive"


def test_a_search_replaces_a_setting_only_beyond_two_errors(tmp_path: Path) -> None:
    """Against the rule worked out by hand, with the first point of the file as the start."""
    grid = tmp_path / "s.yaml"
    grid.write_text(
        """sweep: s
preset: small
base: {seed: 10, protocol: heads}
grid:
  - {method: [covmatch, mdm]}
  - {method: [covmatch, mdm], settings.lr_image: [0.5, 0.6]}
  - {method: [mtt, moments]}
  - {method: [mdm, moments], init: herding}
"""
    )
    points = load_sweep(grid)
    scores = {
        "covmatch": [[40.0, 42.0], [42.0, 44.0], [41.0, 43.0]],  # +2 against 2·√(1 + 1)
        "mdm": [[30.0, 31.0], [31.0, 32.0], [10.0, 11.0], [40.0, 41.0]],  # +1 against 2·√½
        "mtt": [[1.0, 2.0]],  # has no trial
        "moments": [[20.0, 21.0], [30.0, 31.0]],
    }
    rows = []
    for method, of_method in scores.items():
        own = [p for p in points if p.method == method]
        for point, students in zip(own, of_method, strict=True):
            rows += [{"run_id": point.run_id, "validation_mean": value} for value in students]
    trials = search_trials(pd.DataFrame(rows), grid)
    assert trials["method"].tolist() == ["covmatch"] * 2 + ["mdm"] * 3 + ["moments"]
    assert trials["gain"].tolist() == [2.0, 1.0, 1.0, -20.0, 10.0, 10.0]
    assert trials.loc[4, ["changed", "init", "own init", "start", "recall"]].tolist() == [
        *("init = herding", "herding", points[1].init, 30.5, 40.5),
    ]
    assert trials.loc[[0, 1], ["start std", "recall std"]].to_numpy() == pytest.approx(2**0.5)
    found = search_outcome(pd.DataFrame(rows), grid).set_index("method")
    assert found["trials"].to_dict() == {"covmatch": 3, "mdm": 4, "moments": 2}
    assert found["start"].to_dict() == {"covmatch": 41.0, "mdm": 30.5, "moments": 20.5}
    assert found["best"].tolist() == ["lr_image = 0.5", "lr_image = 0.5", "init = herding"]
    assert found["gain"].tolist() == [2.0, 1.0, 10.0]
    assert found["2 errors"].tolist() == pytest.approx([8**0.5, 2**0.5, 2**0.5])
    assert found["outcome"].tolist() == ["keep", "keep", "replace"]
    assert found["in use"].tolist() == ["start"] * 3
    # A published method keeps its start: told, and never the best.
    assert found["other init"].tolist() == pytest.approx([np.nan, 10.0, np.nan], nan_ok=True)
    grid.write_text(grid.read_text() + "defaults: [{when: {method: mdm}, set: {init: noise}}]\n")
    left = search_outcome(pd.DataFrame(rows), grid)["method"].tolist()
    assert left == ["covmatch", "moments"]  # the others are other points, which have no record
    assert search_outcome(pd.DataFrame(rows).iloc[:2], grid).empty  # a start alone
