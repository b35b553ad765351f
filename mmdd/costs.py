"""What a result cost: seconds by part, bytes, steps; fronts and rates over many results.

Seconds in records are of the wall clock, on machines that did other things too: load can only add
to them. Where the same work was done more than once, the least is therefore taken.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd

from mmdd.batches import steps_per_epoch
from mmdd.errors import ConfigError
from mmdd.tables import GIVE_UP_A_PAIR

# What it takes to have one student of a set, in the order in which it is done.
PARTS = ("experts", "start", "distillation", "student")
_KEY = ["dataset", "protocol", "pairs", "method"]


def ledger(rows: pd.DataFrame, results: pd.DataFrame | None = None) -> pd.DataFrame:
    """What each method and budget gave and what it cost, one configuration each.

    rows: those of `load_results` to be told of. results: all that there are, by default the same;
    they tell how many sets were distilled from the same expert buffer, and may hold a faster
    measurement of the same work (the same experts, students of the same steps).

    Index (dataset, protocol, pairs, method), where what gives up a pair for its similarity stands
    at the budget that it is compared in. Columns: recall and std (percent, over all students),
    seeds, students; bytes (of the set; NaN for the full data); student steps; experts, start,
    distillation, student (seconds, see `PARTS`; a student is one student); s/iteration, iterations;
    expert bytes; sets per buffer (distilled from it, whatever the evaluation); memory (bytes at the
    peak of the process, 0 where nothing was distilled). Seconds, and memory, are the least that
    were recorded.

    Raises `ConfigError` where a method and budget holds more than one configuration.
    Book: notebooks/14_efficiency.
    """
    if rows.empty:
        raise ConfigError("there is no record to tell the cost of.")
    results = rows if results is None else results
    experts = _by_buffer(results)
    students = results.groupby(results.apply(_student_work, axis=1))["student_seconds"].min()
    found = []
    for key, group in rows.groupby(_KEY):
        _refuse_mixtures(key, group)
        config, first = group["config"].iloc[0], group.iloc[0]
        buffer = _buffer(first)
        seconds, sets = experts.loc[buffer, ["seconds", "sets"]] if buffer else (0.0, 0)
        rate, iterations = group["seconds_per_iteration"].min(), group["iterations"].max()
        dataset, protocol, pairs, method = (first[name] for name in _KEY)
        found.append(
            {
                "dataset": dataset,
                "protocol": protocol,
                "pairs": pairs + (method in GIVE_UP_A_PAIR),
                "method": method,
                "recall": group["mean"].mean(),
                "std": group["mean"].std(),
                "seeds": group["seed"].nunique(),
                "students": len(group),
                "bytes": first["num_bytes"] or np.nan,
                "student steps": student_steps(int(pairs), config["evaluation"]),
                "experts": seconds,
                "start": group["init_seconds"].min(),
                "distillation": rate * iterations,
                "student": students[_student_work(first)],
                "s/iteration": rate,
                "iterations": iterations,
                "expert bytes": first["expert_bytes"],
                "sets per buffer": sets,
                "memory": group["peak_memory_bytes"].min(),
            }
        )
    return pd.DataFrame(found).set_index(_KEY).sort_index()


def student_steps(pairs: int, evaluation: Mapping[str, Any]) -> int:
    """Steps that one student takes on so many pairs. evaluation: that of a record's config."""
    return int(evaluation["epochs"]) * steps_per_epoch(pairs, int(evaluation["batch_size"]))


def total(
    costs: pd.DataFrame, experts: Literal["whole", "shared", "none"] = "whole"
) -> pd.DataFrame:
    """Seconds by part (see `PARTS`) and their sum `total`, from a `ledger`.

    experts: counted whole, as if the set were the only one that is ever distilled from them; shared
    by the sets that were distilled from the same buffer; or not at all.
    Book: notebooks/14_efficiency.
    """
    parts = costs[list(PARTS)].copy()
    if experts == "shared":
        parts["experts"] /= costs["sets per buffer"].clip(lower=1)
    elif experts == "none":
        parts["experts"] = 0.0
    return parts.assign(total=parts.sum(axis=1))


def students_until_it_pays(making: pd.Series, student: pd.Series, full: float) -> pd.Series:
    """How many students a set must train until they and its making cost less than on the full data.

    making: seconds until the set is there. student: seconds of one student of it. full: seconds of
    one student of the full data. Infinite where a student of the set is no faster.
    Book: notebooks/14_efficiency.
    """
    saved = full - student
    return (making / saved.where(saved > 0)).fillna(np.inf)


def pareto_front(cost: pd.Series, value: pd.Series) -> pd.Series:
    """True where nothing else costs no more and is worth more (or costs less and is worth as much).

    Of points that are equal in both, the first is on the front. NaN never is.
    Book: notebooks/14_efficiency.
    """
    points = pd.DataFrame({"cost": cost.to_numpy(), "value": value.to_numpy()}).dropna()
    points = points.sort_values(["cost", "value"], ascending=[True, False], kind="stable")
    best = points["value"].cummax().shift(fill_value=-np.inf)
    front = pd.Series(False, index=range(len(cost)))
    front[points.index[points["value"] > best]] = True
    return front.set_axis(cost.index)


def power_law(x: pd.Series, y: pd.Series) -> dict[str, float]:
    """The line through log x and log y: y ≈ factor · x^exponent, by least squares.

    Returns exponent, factor, and off: the largest ratio of a point to the line or back, 1 where all
    points lie on it. All NaN for fewer than three different x. Book: notebooks/14_efficiency.
    """
    if x.nunique() < 3:
        return dict.fromkeys(("exponent", "factor", "off"), float("nan"))
    log_x, log_y = np.log(x.to_numpy(dtype=float)), np.log(y.to_numpy(dtype=float))
    exponent, offset = np.polyfit(log_x, log_y, 1)
    off = np.exp(np.abs(log_y - exponent * log_x - offset).max())
    return {"exponent": float(exponent), "factor": float(np.exp(offset)), "off": float(off)}


def _by_buffer(results: pd.DataFrame) -> pd.DataFrame:
    """Least seconds and number of distilled sets of every expert buffer."""
    used = results[results["expert_bytes"] > 0]
    used = used.assign(
        buffer=[_buffer(row) for _, row in used.iterrows()],
        made=used["config"].map(lambda c: _told(c, ("evaluation", "student"))),
    )
    return used.groupby("buffer").agg(seconds=("expert_seconds", "min"), sets=("made", "nunique"))


def _buffer(row: pd.Series) -> str:
    """What decides an expert buffer; empty for a run without one.

    Which parts of the model were trained shows in the bytes: of an encoder and heads, or of heads.
    """
    if not row["expert_bytes"]:
        return ""
    settings = row["config"]["settings"]
    common = settings.get("common_start")
    parts = [row["dataset"], row["model"], settings["experts"], common, int(row["expert_bytes"])]
    return json.dumps(parts, sort_keys=True)


def _student_work(row: pd.Series) -> str:
    """What the time of a student depends on: not on how its pairs were made."""
    evaluation = row["config"]["evaluation"]
    names = ("epochs", "batch_size", "loss")
    parts = [row["dataset"], row["student_model"], row["protocol"], int(row["pairs"])]
    return json.dumps([*parts, *(evaluation[name] for name in names)])


def _refuse_mixtures(key: Any, group: pd.DataFrame) -> None:
    if group["config"].map(lambda config: _told(config, ("seed",))).nunique() > 1:
        runs = ", ".join(sorted(group["run_id"].unique()))
        raise ConfigError(
            f"{' '.join(map(str, key))} holds more than one configuration (runs {runs}): choose "
            "one first, for instance with `mmdd.rows.preset_rows`."
        )


def _told(config: Mapping[str, Any], left_out: tuple[str, ...]) -> str:
    return json.dumps({k: v for k, v in config.items() if k not in left_out}, sort_keys=True)
