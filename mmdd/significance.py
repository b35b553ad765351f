"""Which differences between methods stand out of the differences between distillation seeds."""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from mmdd.errors import ConfigError


def seed_means(results: pd.DataFrame, methods: Sequence[str], metric: str = "mean") -> pd.DataFrame:
    """One score per distillation seed and method: the average of its students, in percent.

    results: rows of `load_results` of one dataset, protocol and budget, one configuration per
    method. Index seed, columns the methods. Students of one set share the set, so they are no
    independent draws of a method: the seed is the unit of all tests here.

    Raises `ConfigError` when a method lacks a seed that another one has.
    Book: notebooks/09_comparison.
    """
    rows = results[results["method"].isin(methods)]
    table = rows.pivot_table(index="seed", columns="method", values=metric, aggfunc="mean")
    table = table.reindex(columns=list(methods))
    for method in methods:
        missing = table.index[table[method].isna()].tolist()
        if missing or table.empty:
            raise ConfigError(f"{method} lacks the seeds {missing}: nothing to pair it with.")
    return table


def pairwise(scores: pd.DataFrame) -> pd.DataFrame:
    """All differences between methods, paired by seed, with two p values for "no difference".

    scores: (S seeds, M methods) of `seed_means`, S and M at least 2. Index (better, worse), by
    mean. Columns: difference (of the means over seeds, in points, never negative); p, of a
    randomised complete block design with the seeds as blocks: t with (M - 1)(S - 1) degrees of
    freedom, whose error is what is left of all scores after the means of methods and seeds, the
    same for all methods; p_own, of the t test on the S differences of this pair alone, with S - 1
    degrees of freedom. With two methods both are the same test. None is corrected: see `holm`.

    Raises `ConfigError` for a missing score, or for fewer than two seeds or methods.
    Book: notebooks/09_comparison.
    """
    seeds, methods = scores.shape
    if seeds < 2 or methods < 2 or scores.isna().any(axis=None):
        raise ConfigError(f"nothing to compare: {methods} methods, {seeds} seeds, or gaps.")
    values = scores.to_numpy()
    left = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    freedom = (methods - 1) * (seeds - 1)
    error = np.sqrt(2 * (left**2).sum() / freedom / seeds)
    order = scores.mean().sort_values(ascending=False, kind="stable").index
    rows = {}
    for better, worse in itertools.combinations(order, 2):
        apart = (scores[better] - scores[worse]).to_numpy()
        own = apart.std(ddof=1) / np.sqrt(seeds)
        rows[better, worse] = {
            "difference": apart.mean(),
            "p": _two_sided(apart.mean(), error, freedom),
            "p_own": _two_sided(apart.mean(), own, seeds - 1),
        }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index = pd.MultiIndex.from_tuples(table.index, names=["better", "worse"])
    return table


def _two_sided(difference: float, error: float, freedom: int) -> float:
    if error < 1e-9:  # points: scores without any spread, up to rounding
        return float(abs(difference) < 1e-9)
    return float(2 * stats.t.sf(abs(difference) / error, freedom))


def holm(p: Sequence[float] | np.ndarray | pd.Series) -> np.ndarray:
    """p values (k,) corrected for there being k of them, after Holm; at most 1.

    Ordered from the smallest, the i-th (from 0) is multiplied by k - i and may not fall below the
    one before it. Those under α are the differences that stand with a chance of at most α for any
    false one among them. Source: Holm (1979). Raises `ConfigError` for values outside [0, 1].
    Book: notebooks/09_comparison.
    """
    values = np.asarray(p, dtype=float)
    if not ((values >= 0) & (values <= 1)).all():
        raise ConfigError("p values lie between 0 and 1.")
    order = np.argsort(values, kind="stable")
    grown = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(grown, 1)
    return corrected
