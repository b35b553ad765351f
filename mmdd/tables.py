"""The book's tables: every score beside chance, a random set of the same size and the full data."""

from collections.abc import Iterable, Sequence

import pandas as pd

from mmdd.errors import ConfigError

# These give up one pair for the numbers of their similarity.
GIVE_UP_A_PAIR = ("lors", "repblend", "amd", "cov-similarity")


def comparison(
    results: pd.DataFrame, dataset: str, protocol: str, methods: Sequence[str] | None = None
) -> pd.DataFrame:
    """Methods and budgets of one dataset and protocol, with their references, all in percent.

    results: rows of `load_results`, one configuration per method and budget. Index (pairs,
    method). Columns: recall (mean over all students, last epoch), std (over all students), × random
    (of the same size), % of full, best on test (mean, what choosing on test would have shown),
    seeds, students. The row of chance comes first, that of the full data last.

    Raises `ConfigError` when nothing fits, or when a method and budget holds more than one
    configuration, which must not be averaged. Book: notebooks/02_encoders_and_evaluation.
    """
    rows = results[(results["dataset"] == dataset) & (results["protocol"] == protocol)]
    if methods is not None:
        rows = rows[rows["method"].isin([*methods, "full"])]
    if rows.empty:
        raise ConfigError(f"there is no record of dataset {dataset!r} under {protocol!r}.")
    _refuse_mixtures(rows)
    table = rows.groupby(["pairs", "method"]).agg(
        recall=("mean", "mean"),
        std=("mean", "std"),
        best_on_test=("mean_best_on_test", "mean"),
        seeds=("seed", "nunique"),
        students=("mean", "size"),
    )
    full = rows.loc[rows["method"] == "full", "mean"].mean()  # NaN without a full-data record
    table.insert(2, "% of full", 100 * table["recall"] / full)
    random = table["recall"].xs("random", level="method") if _has(table, "random") else None
    if random is not None:
        budgets = table.index.get_level_values("pairs")
        table.insert(2, "× random", table["recall"].to_numpy() / random.reindex(budgets).to_numpy())
    chance = pd.DataFrame(
        {"recall": [rows["chance_mean"].iloc[0]]},
        index=pd.MultiIndex.from_tuples([(0, "chance")], names=["pairs", "method"]),
    )
    whole = pd.concat([chance, table]).rename(columns={"best_on_test": "best on test"})
    return whole.astype({"seeds": "Int64", "students": "Int64"})  # integers that may be missing


def by_loss(results: pd.DataFrame) -> pd.DataFrame:
    """The same rows with LoRS named after its loss, in the budget that it is compared in.

    `method` becomes "lors-wbce", "lors-ence" …. LoRS and its heirs give up one pair for their
    similarity, so their 99 pairs stand beside the 100 of the others. Book: notebooks/06_lors.
    """
    lors = results["method"].eq("lors")
    loss = results["config"].map(lambda config: (config.get("settings") or {}).get("loss", ""))
    fewer = results["method"].isin(GIVE_UP_A_PAIR)
    return results.assign(
        method=results["method"].where(~lors, "lors-" + loss),
        pairs=results["pairs"].where(~fewer, results["pairs"] + 1),
    )


def transfer(results: pd.DataFrame, own: str) -> pd.DataFrame:
    """What students of every encoder pair make of sets that were distilled with one of them.

    results: rows of `load_results` of one dataset, protocol and budget, one configuration per
    method and student pair. own: the pair of the distillation. Index (method, student), the own
    pair first. Columns: recall (mean over all students, percent), std, % of own (the share that is
    kept of the same method's recall on `own`), × random (of the same student pair), % of full (of
    the same student pair), students. What has no reference is NaN.

    Raises `ConfigError` when a method and student pair holds more than one configuration.
    Book: notebooks/13_cross_architecture.
    """
    _refuse_mixtures(results, ("method", "student_model"), "{0} with students {1}")
    table = results.groupby(["method", "student_model"]).agg(
        recall=("mean", "mean"), std=("mean", "std"), students=("mean", "size")
    )
    table.index.names = ["method", "student"]
    recall = table["recall"]
    methods, students = (table.index.get_level_values(level) for level in (0, 1))

    def reference(method: str) -> pd.Series:
        found = recall[methods == method].droplevel("method")
        return found.reindex(students).set_axis(table.index)

    at_home = recall[students == own].droplevel("student").reindex(methods).set_axis(table.index)
    table.insert(2, "% of own", 100 * recall / at_home)
    table.insert(3, "× random", recall / reference("random"))
    table.insert(4, "% of full", 100 * recall / reference("full"))
    order = [own, *sorted(set(students) - {own})]
    return table.reindex([(m, s) for m in methods.unique() for s in order if (m, s) in table.index])


def _has(table: pd.DataFrame, method: str) -> bool:
    return method in table.index.get_level_values("method")


def _refuse_mixtures(
    rows: pd.DataFrame,
    by: tuple[str, str] = ("pairs", "method"),
    where: str = "{1} at {0} pairs",
) -> None:
    """Scores of different settings must not be averaged into one number."""
    for key, group in rows.groupby(list(by)):
        settings = {
            repr({k: v for k, v in sorted(config.items()) if k != "seed"})
            for config in group["config"]
        }
        if len(settings) > 1:
            raise ConfigError(
                f"{where.format(*key)} holds {len(settings)} different configurations "
                f"(runs {', '.join(sorted(group['run_id'].unique()))}): filter by sweep first."
            )


def listed(values: Iterable[object]) -> str:
    """At least one value in words: "25", "25 and 50", "25, 50 and 100".

    Book: notebooks/09_comparison.
    """
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last
