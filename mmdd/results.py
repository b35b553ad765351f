"""The records of a store as a table, and its summary. Nothing here decides a result."""

from pathlib import Path

import numpy as np
import pandas as pd

from mmdd.config import is_stale
from mmdd.errors import ConfigError
from mmdd.store import ResultsStore

METRICS = ("IR@1", "IR@5", "IR@10", "TR@1", "TR@5", "TR@10", "mean")
# Of a record's cost ledger.
_COSTS = (
    *("expert_seconds", "expert_bytes", "init_seconds"),
    *("seconds_per_iteration", "iterations", "peak_memory_bytes", "num_bytes"),
)


def load_results(path: str | Path = "results") -> pd.DataFrame:
    """Every record of a store as a table, one row per (run, student seed).

    Columns: run_id, sweep, dataset, model, method, pairs, protocol, seed, student_seed, the six
    recalls and their mean on test after the last epoch, validation_mean, mean_best_on_test,
    chance_mean, costs, device, `stale` (made by other code than today's), `difference` (largest, to
    the stale record that this one replaced, in points of the mean; NaN where it replaced none),
    `cpu_seconds` (of the attempt that finished it, its sets and experts included where they were
    not there yet; None in older records) and `config` (a dict). `model` is the pair of the
    distillation, `student_model` the students'.
    `pairs` of the full-data reference is the size of its train split. An empty store gives an
    empty table with the same columns. Raises `StoreError` naming an unreadable record.

    Book: notebooks/02_encoders_and_evaluation.
    """
    rows = []
    for record in ResultsStore(path).records():
        config, cost = record["config"], record["cost"]
        shared = {
            "run_id": record["run_id"],
            "sweep": record["sweep"],
            "dataset": record["dataset"]["name"],
            "model": config["model"]["pair"],
            "student_model": config.get("student", config["model"])["pair"],
            "method": config["method"],
            "pairs": config.get("pairs", record["dataset"]["splits"].get("train")),
            "protocol": record["protocol"],
            "seed": config["seed"],
        }
        for student in record["students"]:
            rows.append(
                shared
                | {"student_seed": student["student_seed"]}
                | {metric: student["test"][metric] for metric in METRICS}
                | {
                    "validation_mean": student["validation"]["mean"],
                    "mean_best_on_test": student["best_on_test"]["mean"],
                    "chance_mean": record["chance"]["mean"],
                    "student_seconds": student["seconds"],
                }
                | {name: cost[name] for name in _COSTS}
                | {
                    "device": record["environment"]["device"],
                    "stale": is_stale(record),
                    "difference": record.get("replaced", {}).get("largest_difference"),
                    "cpu_seconds": record.get("cpu_seconds"),
                    "finished": record["finished"],
                    "config": config,
                }
            )
    frame = pd.DataFrame(rows, columns=None if rows else _columns())
    return frame.sort_values(["sweep", "run_id", "student_seed"], ignore_index=True)


_RUN_COLUMNS = (
    *("run_id", "sweep", "dataset", "model", "student_model"),
    *("method", "pairs", "protocol", "seed"),
)
_STUDENT_COLUMNS = ("validation_mean", "mean_best_on_test", "chance_mean", "student_seconds")


def _columns() -> list[str]:
    return [
        *_RUN_COLUMNS,
        "student_seed",
        *METRICS,
        *_STUDENT_COLUMNS,
        *_COSTS,
        "device",
        "stale",
        "difference",
        "cpu_seconds",
        "finished",
        "config",
    ]


def summarise(
    results: pd.DataFrame, by: list[str] | None = None, metric: str = "mean"
) -> pd.DataFrame:
    """Mean and standard deviation over students, and over distillation seeds where there are some.

    Columns: the grouping ones, `mean`, `std` (over all students, n - 1), `students`, `seeds`.
    Raises `ConfigError` for a column that the table lacks. Book: notebooks/07_covmatch.
    """
    by = by or ["dataset", "protocol", "pairs", "method"]
    missing = [name for name in [*by, metric] if name not in results]
    if missing:
        raise ConfigError(
            f"the results have no column {missing[0]!r}: {', '.join(map(str, results.columns))}."
        )
    grouped = results.groupby(by, sort=True)
    return pd.DataFrame(
        {
            "mean": grouped[metric].mean(),
            "std": grouped[metric].std(ddof=1).fillna(np.nan),
            "students": grouped[metric].size(),
            "seeds": grouped["seed"].nunique(),
        }
    ).reset_index()
