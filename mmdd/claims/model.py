"""What a claim is, and the file that holds them all: `data/published/claims.yaml`."""

import itertools
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmdd.claims.measure import CLUSTERED, MEASURES
from mmdd.config import RunConfig
from mmdd.errors import ConfigError
from mmdd.grid import explain, nest
from mmdd.paths import data_file
from mmdd.presets import preset
from mmdd.published import RECALLS, published
from mmdd.tables import GIVE_UP_A_PAIR

Scale = Literal["scenes", "photos"]
SCALES: dict[Scale, str] = {"scenes": "small", "photos": "photos"}  # scale → preset of its runs
SEEDS = (0, 1, 2)  # distillation seeds that are looked for; tuning has used others
ALIKE = 0.1  # share of the larger score within which runs count as alike
METRICS = ("mean", *RECALLS, "seconds_per_iteration", "expert_seconds", "distillation_seconds")

# The tables beside the claims, by the name that a claim calls them.
_TABLES = ("lors_table5", "mdm_ablations", "mdm_cost", "cross_architecture", "peers", "reports")


class Printed(BaseModel):
    """A number that a paper prints.

    label: what it is. value: typed here, for facts that stand in no table of `data/published`; else
    table ("retrieval" or a file there) and where, columns with the values that a row has. column:
    what is read. Several fitting rows are averaged. unit: of the number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str
    value: float | None = None
    table: str | None = None
    where: dict[str, Any] = {}
    column: str = "mean"
    unit: str = "%"

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.value is None) == (self.table is None):
            raise ValueError(
                f"{self.label!r} needs either a value or a table, and has both or none"
            )
        return self

    def number(self) -> float:
        """The value, looked up. Raises `ConfigError` when nothing fits."""
        if self.value is not None:
            return self.value
        assert self.table is not None
        if self.table == "retrieval":
            rows = published(**self.where)
        else:
            rows = _table(self.table)
            for column, wanted in self.where.items():
                if column not in rows:
                    raise ConfigError(f"{self.table} has no column {column!r}.")
                keys = rows[column].astype(str)
                if column == "source":
                    keys = keys.str.split(n=1).str[0]
                rows = rows[keys.isin([str(v) for v in _as_list(wanted)])]
        if rows.empty:
            raise ConfigError(f"nothing in {self.table} has {self.where} ({self.label!r}).")
        return float(rows[self.column].mean())


class Test(BaseModel):
    """One comparison of runs, or several of a kind.

    scale: "scenes" or "photos". where: what all runs of the comparison share, as in a block of a
    sweep file; a list makes one comparison of each value. `budget` is the number of pairs before
    those that a method gives up for a similarity. Then one of

    - higher and lower: the sum of the runs named first should exceed that of the others;
    - alike: two runs that should hardly differ;
    - at_most: two runs, the first of which should be worth no more than the second;
    - measured, with above or below: a mechanism of `mmdd.claims.measure` against a bound, or above
      another one, both of them measured on the same students' seeds.

    A run is named by what is particular to it, in the words of a sweep file; `metric`, there or in
    where, is what is read of it: a recall, or seconds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: Scale = "scenes"
    where: dict[str, Any] = {}
    higher: list[dict[str, Any]] = []
    lower: list[dict[str, Any]] = []
    alike: list[dict[str, Any]] = []
    at_most: list[dict[str, Any]] = []
    measured: str | None = None
    above: float | str | None = None
    below: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_run_is_a_list(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        sides = {k: [values[k]] for k in ("higher", "lower") if isinstance(values.get(k), dict)}
        return values | sides

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        ordered = bool(self.higher) and bool(self.lower)
        if bool(self.higher) != bool(self.lower):
            raise ValueError("higher and lower go together")
        kinds = ordered + bool(self.alike) + bool(self.at_most) + (self.measured is not None)
        if kinds != 1:
            raise ValueError("a test has higher and lower, or alike, or at_most, or measured")
        if ordered and len(self.higher) != len(self.lower):
            # Else the sums differ by a whole score, whatever the runs are worth.
            raise ValueError("higher and lower name the same number of runs")
        for kind in ("alike", "at_most"):
            if getattr(self, kind) and len(getattr(self, kind)) != 2:
                raise ValueError(f"{kind} names two runs")
        bounds = (self.above is not None) + (self.below is not None)
        if bounds != (self.measured is not None):
            raise ValueError("above or below, one of them, belongs to measured")
        other = self.above if isinstance(self.above, str) else None
        for measure in (self.measured, other):
            if measure is not None and measure not in MEASURES:
                known = ", ".join(MEASURES)
                raise ValueError(f"nothing measures {measure!r}; known: {known}")
        if other is not None and not {self.measured, other} <= set(CLUSTERED):
            raise ValueError(f"{self.measured!r} and {other!r} are not of the same students")
        return self

    def comparisons(self) -> Iterator["Comparison"]:
        """The comparisons, one for each combination of the lists in `where`."""
        axes = {key: _as_list(values) for key, values in self.where.items()}
        for chosen in itertools.product(*axes.values()):
            shared = dict(zip(axes, chosen, strict=True))
            varied = {k: v for k, v in shared.items() if len(axes[k]) > 1}
            two = self.alike or self.at_most
            sides = {1: self.higher or two[:1], -1: self.lower or two[1:]}
            terms = [
                Term(sign, run, shared, SCALES[self.scale])
                for sign, runs in sides.items()
                for run in runs
            ]
            yield Comparison(self, terms, shared, varied)


class Term:
    """The runs of one side of a comparison: one configuration, several distillation seeds."""

    def __init__(
        self, sign: int, run: dict[str, Any], shared: dict[str, Any], preset_name: str
    ) -> None:
        self.sign = sign
        own, shared = dict(run), dict(shared)
        self.metric = own.pop("metric", shared.pop("metric", "mean"))
        if self.metric not in METRICS:
            raise ConfigError(f"no metric {self.metric!r}; choose from {', '.join(METRICS)}.")
        self.label = describe(own) or self.metric
        wishes = shared | own
        if "budget" in wishes:
            given_up = wishes.get("method") in GIVE_UP_A_PAIR
            wishes["pairs"] = wishes.pop("budget") - given_up
        try:
            self.configs: dict[int, RunConfig] = {
                seed: preset(preset_name, **nest(wishes | {"seed": seed})) for seed in SEEDS
            }
        except ValidationError as error:
            raise ConfigError(f"no run is {wishes}: {explain(error)}.") from error
        self.run_ids = {seed: config.run_id for seed, config in self.configs.items()}
        # The full data are neither selected nor distilled: no seed decides what they are.
        self.has_set = wishes.get("method") != "full"


class Comparison:
    """One decision: its terms, and in which setting."""

    def __init__(
        self, test: Test, terms: list[Term], shared: dict[str, Any], varied: dict[str, Any]
    ) -> None:
        self.test, self.terms, self.shared, self.varied = test, terms, shared, varied


class Claim(BaseModel):
    """A statement of a paper, what it prints for it, and the runs that test it here.

    id: for links. topic: the group that it is listed in. claim: the statement, in our words.
    source: paper and place. chapter: where the book measures it. tests: all have to hold. note:
    what a reader has to know of the test.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    topic: str
    claim: str
    source: str
    chapter: str
    published: list[Printed] = []
    tests: list[Test] = Field(min_length=1)
    note: str = ""

    @property
    def scales(self) -> list[Scale]:
        return [scale for scale in SCALES if any(test.scale == scale for test in self.tests)]

    def comparisons(self, scale: Scale) -> list[Comparison]:
        """Every comparison at one scale. Raises `ConfigError` naming the claim."""
        try:
            tests = [test for test in self.tests if test.scale == scale]
            return [comparison for test in tests for comparison in test.comparisons()]
        except ConfigError as error:
            raise ConfigError(f"claim {self.id!r}: {error}") from error

    def tolerance(self) -> float:
        """Share of the score within which runs count as alike: what the papers call alike.

        A tenth, or the largest relative difference among the published numbers of the claim.
        """
        numbers = [printed.number() for printed in self.published]
        return max([ALIKE, *([1 - min(numbers) / max(numbers)] if len(numbers) > 1 else [])])


def load_claims(path: str | Path | None = None) -> list[Claim]:
    """All claims of a file, in its order, validated. path: by default the shipped file.

    Raises `ConfigError` for a file that is no list of claims, an unknown key, an id that is there
    twice, a published number that is nowhere, or a run that no configuration allows.
    Book: book/claims.
    """
    path = Path(path) if path is not None else data_file("published/claims.yaml")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        claims = _File.model_validate({"claims": raw}).claims
    except ValidationError as error:
        raise ConfigError(f"{path.name}: {explain(error)}.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path.name} is not a file of claims: {error}") from error
    ids = [claim.id for claim in claims]
    twice = {name for name in ids if ids.count(name) > 1}
    if twice:
        raise ConfigError(f"{path.name} has {', '.join(sorted(twice))} twice.")
    for claim in claims:
        for printed in claim.published:
            try:
                printed.number()
            except (ConfigError, KeyError, TypeError) as error:
                raise ConfigError(f"claim {claim.id!r}, published: {error}") from error
    return claims


class _File(BaseModel):
    claims: list[Claim]


def describe(run: dict[str, Any]) -> str:
    """A run in few words: "lors, rank=1"."""
    named = dict(run)
    words = [str(named.pop("method"))] if "method" in named else []
    for key, value in named.items():
        name = key.split(".")[-1].rstrip("_")
        if key in ("init", "protocol"):
            words.append(str(value))
        elif key == "student.pair":
            words.append(f"students {value}")
        else:
            words.append(f"{name}={value}")
    return ", ".join(words)


@cache
def _table(name: str) -> pd.DataFrame:
    if name not in _TABLES:
        raise ConfigError(f"no published table {name!r}; known: retrieval, {', '.join(_TABLES)}.")
    table = pd.read_csv(data_file(f"published/{name}.csv"))
    if "mean" not in table and set(RECALLS) <= set(table):
        table["mean"] = table[list(RECALLS)].mean(axis=1)
    return table


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]
