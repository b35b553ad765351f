"""What the papers print: the published retrieval tables as one DataFrame.

The rows are typed from the papers, not measured; `data/published/README.md` names the sources and
says what was checked.
"""

from collections.abc import Iterable, Sequence
from functools import cache

import pandas as pd

from mmdd.errors import ConfigError
from mmdd.paths import data_file

RECALLS = ("IR@1", "IR@5", "IR@10", "TR@1", "TR@5", "TR@10")

# The papers' names where they are not simply this project's names in other letters.
_PROJECT_NAMES = {"mtt-vl": "mtt", "full data": "full"}

Filter = str | int | Iterable[str | int] | None


@cache
def _table() -> pd.DataFrame:
    table = pd.read_csv(data_file("published/retrieval.csv"), dtype={"pairs": str})
    table = table.rename(columns={"method": "printed_name"})
    position = list(table.columns).index("printed_name")
    table.insert(position, "method", [_project_name(name) for name in table["printed_name"]])
    table["note"] = table["note"].fillna("")
    return table


def _project_name(name: str) -> str:
    """This project's name for a method, from its own name or a paper's, in any case."""
    lowered = name.lower()
    return _PROJECT_NAMES.get(lowered, lowered)


def published(
    dataset: Filter = None,
    pairs: Filter = None,
    method: Filter = None,
    protocol: Filter = None,
    source: Filter = None,
) -> pd.DataFrame:
    """Published retrieval results, one row per source, dataset, budget and method.

    Each filter takes one value, several, or None for all: `dataset` ("flickr8k", "flickr30k",
    "coco"), `pairs` (100, 200, 500 or "full"), `method` (this project's name or the paper's),
    `protocol` ("image+text_head", "both"), `source` (its first word is enough: "LoRS").

    Columns: source, dataset, pairs (integers; missing where the full data was used), method
    (this project's name), printed_name (the paper's), protocol, the six recalls and their mean in
    percent, the recalls' standard deviations where printed, note (empty, or what is wrong with the
    row). Raises `ConfigError` naming the known values when a filter asks for another one.

    Source: `data/published/README.md`. Book: notebooks/00_start.
    """
    table = _table()
    keep = pd.Series(True, index=table.index)
    for column, wanted in (
        ("dataset", _as_strings(dataset)),
        ("pairs", _as_strings(pairs)),
        ("method", _as_strings(method)),
        ("protocol", _as_strings(protocol)),
        ("source", _as_strings(source)),
    ):
        if wanted is None:
            continue
        keys = table[column]
        if column == "method":
            wanted = [_project_name(name) for name in wanted]
        elif column == "source":
            keys = keys.str.split(n=1).str[0]
            wanted = [text.split()[0] if text.split() else text for text in wanted]
        _require_known(column, wanted, list(dict.fromkeys(keys)))
        keep &= keys.isin(wanted)
    rows = table[keep].reset_index(drop=True)
    rows["pairs"] = pd.to_numeric(rows["pairs"], errors="coerce").astype("Int64")
    return rows


def _as_strings(wanted: Filter) -> list[str] | None:
    if wanted is None:
        return None
    if isinstance(wanted, str | int):
        return [str(wanted)]
    return [str(value) for value in wanted]


def _require_known(column: str, wanted: Sequence[str], known: Sequence[str]) -> None:
    unknown = [value for value in wanted if value not in known]
    if unknown:
        raise ConfigError(
            f"published(): no {column} {', '.join(map(repr, unknown))} in the published tables; "
            f"choose from {', '.join(map(repr, known))}."
        )


def disagreements(above: float = 0.15) -> pd.DataFrame:
    """Numbers that several papers print for the same dataset, budget and method, and not alike.

    above: differences up to this many points are taken for rounding. Index (dataset, pairs, method,
    quantity), where quantity is a recall or the mean; columns: the papers (first word of the
    source), difference (largest minus smallest), protocols (those that differ, or the common one).
    Differences of a mean come with those of its recalls. The full data have pairs "full".
    Book: book/claims.
    """
    table = _table()
    table = table.assign(paper=table["source"].str.split(n=1).str[0])
    keys = ["dataset", "pairs", "method"]
    wide = table.melt([*keys, "paper"], [*RECALLS, "mean"], "quantity").pivot_table(
        index=[*keys, "quantity"], columns="paper", values="value"
    )
    difference = wide.max(axis=1) - wide.min(axis=1)
    wide.columns.name = None
    found = wide.assign(difference=difference.round(2))[difference > above]
    protocols = table.groupby(keys)["protocol"].agg(lambda names: " / ".join(names.unique()))
    groups = pd.MultiIndex.from_frame(found.index.to_frame()[keys])
    return found.assign(protocols=protocols.reindex(groups).to_numpy())
