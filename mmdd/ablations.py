"""Ablations from records: what a run changed, which runs a grid still lacks, and plain verdicts."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mmdd.claims.verdict import ordered, standard_error
from mmdd.config import RunConfig
from mmdd.grid import load_sweep, read_sweep
from mmdd.presets import OURS, PresetName, preset


def with_changes(
    results: pd.DataFrame, usual: PresetName = "small", held: dict[str, Any] | None = None
) -> pd.DataFrame:
    """The same rows with two more columns: `init`, and `changes`, what the run does its own way.

    results: rows of `load_results`. `changes` is a dict by dotted key, such as `settings.rho`, of
    every value that is not the one of the preset `usual` for the run's method, protocol, number of
    pairs and start. Seed and start are columns of their own and no changes; `init` is None where
    nothing is distilled. A run is known by these, and not by the sweep that it is filed under: two
    grids that want the same configuration share one record. held: values by dotted key that an
    ablation keeps to in place of the preset's, for the runs that have such a key.

    Book: notebooks/10_ablate_rho_lambda.
    """
    plain: dict[tuple[Any, ...], dict[str, Any]] = {}
    found: dict[str, dict[str, Any]] = {}
    for run_id, config in zip(results["run_id"], results["config"], strict=True):
        if run_id in found:
            continue
        kind = (config["method"], config["protocol"], config.get("pairs"), config.get("init"))
        if kind not in plain:
            named = zip(("method", "protocol", "pairs", "init"), kind, strict=True)
            wishes = {key: value for key, value in named if value is not None}
            base = _flat(preset(usual, **wishes).identity())
            plain[kind] = base | {k: v for k, v in (held or {}).items() if k in base}
        own, base = _flat(config), plain[kind]
        # A key that the record lacks was no choice yet when it was made.
        found[run_id] = {k: v for k, v in own.items() if k != "seed" and (k, v) not in base.items()}
    return results.assign(
        init=[config.get("init") for config in results["config"]],
        changes=pd.Series(
            [found[run_id] for run_id in results["run_id"]], index=results.index, dtype=object
        ),
    )


def only(rows: pd.DataFrame, *keys: str) -> pd.DataFrame:
    """The rows of `with_changes` that changed nothing beside these keys, or nothing at all.

    Book: notebooks/10_ablate_rho_lambda.
    """
    kept = [set(changes) <= set(keys) for changes in rows["changes"]]
    return rows[np.array(kept, dtype=bool)]  # an empty list would be read as names of columns


def setting(rows: pd.DataFrame, key: str) -> pd.Series:
    """The value of a dotted key in each row's configuration; None where it has no such key.

    Book: notebooks/10_ablate_rho_lambda.
    """

    def value(config: dict[str, Any]) -> Any:
        found: Any = config
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found

    values = [value(config) for config in rows["config"]]
    return pd.Series(values, index=rows.index, dtype=object if not values else None, name=key)


def in_sweeps(results: pd.DataFrame, folder: str | Path, *names: str) -> pd.Series:
    """Which rows are of runs that some sweeps ask for, as a mask.

    results: rows of `load_results`. folder: of the sweep files. names: of the sweeps, as records
    have them; "scenes-mdm" is in `scenes_mdm.yaml`. A run that two sweeps ask for has one record,
    filed under the sweep that came first or redid it: the column `sweep` alone would leave it out
    of the other. Raises `ConfigError` for what is no sweep file.
    Book: notebooks/07_covmatch.
    """
    return results["run_id"].isin(_wanted(*(f"{folder}/{n.replace('-', '_')}.yaml" for n in names)))


def _wanted(*grids: str | Path) -> set[str]:
    return {point.run_id for grid in grids for point in load_sweep(grid)}


def coverage(results: pd.DataFrame, *grids: str | Path) -> str:
    """How much of some sweep files is in the records, in words: "12 of 36 runs".

    Raises `ConfigError` for what is no sweep file. Book: notebooks/10_ablate_rho_lambda.
    """
    wanted = _wanted(*grids)
    return f"{len(wanted & set(results['run_id']))} of {len(wanted)} runs"


def search_trials(results: pd.DataFrame, *grids: str | Path) -> pd.DataFrame:
    """Every trial of searches that change one thing at a time, beside where its search starts.

    grids: sweep files; of each method in a file, under each protocol, the first point is where the
    search starts, and the others are its trials.

    One row for each trial that is there with its start: grid (the file's name), dataset, protocol,
    method, changed, words such as "iterations = 240", init and own init, of the trial and of the
    start, start, start std, recall and recall std (validation, percent, the deviations over
    students), gain, and 2 errors, two standard errors of the gain by the students of both: the
    least that a difference must have, as there is one distillation seed. in use: which of the two
    the file's preset has today, "start", "trial" or "other". Book: notebooks/12_ablate_init.
    """
    of_run = results.groupby("run_id")["validation_mean"].agg(["mean", "std", "count"])
    told = []
    for grid in grids:
        size = read_sweep(Path(grid))[0].preset
        searches: dict[tuple[str, str, str], list[RunConfig]] = {}
        for point in load_sweep(grid):
            search = (point.dataset.name, point.protocol, point.method)
            searches.setdefault(search, []).append(point)
        for key, (start, *trials) in searches.items():
            for trial in trials:
                if not {start.run_id, trial.run_id} <= set(of_run.index):
                    continue
                one, two = of_run.loc[start.run_id], of_run.loc[trial.run_id]
                errors = one["std"] ** 2 / one["count"] + two["std"] ** 2 / two["count"]
                told.append(
                    {"grid": Path(grid).stem}
                    | dict(zip(["dataset", "protocol", "method"], key, strict=True))
                    | {
                        "changed": _difference(start, trial),
                        "init": trial.init,
                        "own init": start.init,
                        "start": one["mean"],
                        "start std": one["std"],
                        "recall": two["mean"],
                        "recall std": two["std"],
                        "gain": two["mean"] - one["mean"],
                        "2 errors": 2 * errors**0.5,
                        "in use": _in_use(size, start, trial),
                    }
                )
    names = ["grid", "dataset", "protocol", "method", "changed", "init", "own init"]
    scores = ["start", "start std", "recall", "recall std", "gain", "2 errors"]
    return pd.DataFrame(told, columns=[*names, *scores, "in use"])


def search_outcome(results: pd.DataFrame, *grids: str | Path) -> pd.DataFrame:
    """What searches found (`search_trials`), and whether it is to be taken over.

    The best trial decides: it replaces the start when its recall on validation is above by more
    than two standard errors, and a lesser one does not, however alike its students are. The best of
    many is flattered by having been picked. A published method keeps the start of the set that it
    is published with: what another one gains is told, and is never the best.

    One row for each (dataset, protocol, method) whose start and one trial are there: trials (with
    the start), start, best (what the best trial changed), gain, 2 errors (percent), outcome,
    "replace" or "keep", in use, which of the two the file's preset has today: "start", "best" or
    "other", and other init, what the best start of another kind gains for a published method, NaN
    where none was tried. Book: notebooks/09_comparison.
    """
    told = []
    of_search = ["grid", "dataset", "protocol", "method"]
    for key, tried in search_trials(results, *grids).groupby(of_search, sort=False):
        allowed = tried["method"].isin(OURS) | tried["init"].eq(tried["own init"])
        if not allowed.any():
            continue
        best = tried.iloc[int(tried["gain"].where(allowed).argmax())]
        told.append(
            dict(zip(of_search, key, strict=True))
            | {"trials": 1 + len(tried), "start": best["start"], "best": best["changed"]}
            | {"gain": best["gain"], "2 errors": best["2 errors"]}
            | {"outcome": "replace" if best["gain"] > best["2 errors"] else "keep"}
            | {"in use": "best" if best["in use"] == "trial" else best["in use"]}
            | {"other init": tried["gain"].mask(allowed).max()}
        )
    names = ["dataset", "protocol", "method", "trials", "start", "best", "gain"]
    return pd.DataFrame(told, columns=[*names, "2 errors", "outcome", "in use", "other init"])


def _in_use(size: PresetName, start: RunConfig, trial: RunConfig) -> str:
    """Which of two runs has the settings that a preset has today."""
    today = preset(size, method=start.method, protocol=start.protocol)
    for name, run in (("start", start), ("trial", trial)):
        if (run.settings, run.init) == (today.settings, today.init):
            return name
    return "other"


def _difference(start: RunConfig, other: RunConfig) -> str:
    """What another run changes, in words such as "iterations = 240"."""
    old, new = _flat(start.identity()), _flat(other.identity())
    # What only the other has, such as how its start is selected, comes with what it changes.
    changed = [
        f"{k.removeprefix('settings.')} = {v}" for k, v in new.items() if k in old and old[k] != v
    ]
    return ", ".join(changed)


def verdict(better: pd.Series, other: pd.Series, seed_std: float) -> dict[str, Any]:
    """Whether the first recalls are above the second, as a paper claims, or not, or not decided.

    better, other: recalls of the students of each, one distillation seed (percent). seed_std: τ,
    how far a configuration's mean usually falls from seed to seed, which one seed cannot tell: see
    `mmdd.claims.verdict.Evidence.usual_seed_deviation`. It is the rule of the claims' page for two
    sets of one seed: the difference of the means D against its standard error u, with
    u² = 2 τ² + s₁² / n₁ + s₂² / n₂ for n students of standard deviation s.

    Keys: difference; "2u"; and verdict, "reproduced" for D ≥ 2u, "not reproduced" (the opposite was
    found) for D ≤ -2u, else "inconclusive", also where a side has fewer than two students; "not yet
    run" where a side has none, and the numbers are NaN then. Book: notebooks/10_ablate_rho_lambda.
    """
    if better.empty or other.empty:
        return {"difference": np.nan, "2u": np.nan, "verdict": "not yet run"}
    difference = float(better.mean() - other.mean())
    by_students = better.var(ddof=1) / len(better) + other.var(ddof=1) / len(other)
    error = standard_error(seed_std * math.sqrt(2), by_students, seeds=1)
    return {"difference": difference, "2u": 2 * error, "verdict": ordered(difference, error)}


def _flat(nested: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted keys of nested dicts; None and empty dicts stay values."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{above}{key}.")
        else:
            flat[f"{above}{key}"] = value
    return flat
