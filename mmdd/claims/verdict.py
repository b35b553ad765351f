"""The rule by which records decide a claim.

Every comparison is a difference D of mean scores, in points of recall: the runs that should score
higher minus those that should score lower. Runs are paired: only the distillation seeds and student
seeds that all sides have are used, and D is the mean of the paired differences.

Its standard error u has two parts, b for distillation (or selection) seeds and w for students:

    u² = (b² + w² / T) / S

with S seeds, T students of each, and w the standard deviation of the paired differences between the
students of one seed. b is the standard deviation over seeds of their mean differences, but never
less than what is usual: τ · √k, for k distilled or selected sets in the comparison and τ the pooled
deviation over seeds of all configurations of Scenes with three seeds. With fewer than three seeds b
is that usual value, so that one seed is never taken for certain; with three, a deviation that is
small by luck is not believed. Photos, of which there is one seed, borrow τ from Scenes.

- D ≥ 2u: **reproduced**. D ≤ -2u: **not reproduced**, the opposite was found. Else
  **inconclusive**.
- For "hardly differ": within a tolerance m, a tenth of the larger score, or the largest relative
  difference among the published numbers of the claim, if that is more. |D| + 2u ≤ m:
  **reproduced**; |D| - 2u > m: **not reproduced**; else **inconclusive**.
- For "no more than": D ≤ m is asked for, with m a tenth of the larger score. D + 2u ≤ m:
  **reproduced**; D - 2u > m: **not reproduced**; else **inconclusive**. A set that "fails" is one
  that ends below random pairs, or that is worth no more than they are: the claim says which.
- For seconds: the same as for recall, but with no usual value, so three seeds are needed.
- For a measured mechanism: D is the distance to the bound, u the standard error over its seeds.
  What is measured on students of one set has S = 1, w over those students, and for b that measure's
  own usual deviation, from sets that three seeds made, times √k.
- A comparison without records is **not yet run**.

τ is one number for all methods, although some seem to differ more from seed to seed than others.
‡ marks a verdict that would be another if a set were given its own method's deviation, pooled over
the configurations of that method, wherever that is more than τ. The verdict stays, as what is
pooled from so few is uncertain itself.

A claim with several comparisons is not reproduced if one of them is not; else not yet run if one is
not; else inconclusive if one is; else reproduced.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd

from mmdd.claims.measurements import Measurements
from mmdd.claims.model import ALIKE, SEEDS, Claim, Comparison, Scale, Term

Verdict = Literal["reproduced", "not reproduced", "inconclusive", "not yet run"]
VERDICTS: tuple[Verdict, ...] = ("reproduced", "not reproduced", "inconclusive", "not yet run")

_SECONDS = ("seconds_per_iteration", "expert_seconds", "distillation_seconds")


@dataclass(frozen=True)
class Score:
    """One side of a comparison: mean and standard deviation over all its students (or runs)."""

    label: str
    sign: int
    mean: float
    std: float
    count: int
    seeds: int
    run_ids: tuple[str, ...]
    stale: bool


@dataclass(frozen=True)
class Outcome:
    """What records say of one comparison. difference: D; error: u; seeds, students: S and T.

    tolerance: m, in the units of D, where the runs should be alike. missing: the sides that have no
    record, or none of a common seed. own: u rests on the deviation of these three seeds, not on the
    usual one. by_method: the verdict, and by_method_error u, with the deviations of the methods
    where they are more than the usual one. origin: where a measured mechanism comes from.
    """

    comparison: Comparison
    verdict: Verdict
    difference: float = math.nan
    error: float = math.nan
    seeds: int = 0
    students: int = 0
    tolerance: float | None = None
    scores: tuple[Score, ...] = ()
    missing: tuple[str, ...] = ()
    own: bool = False
    by_method: Verdict | None = None
    by_method_error: float = math.nan
    origin: str = ""

    @property
    def hangs_on_usual(self) -> bool:
        return self.by_method not in (None, self.verdict)


@dataclass(frozen=True)
class Judgement:
    """The outcomes of a claim at one scale, and what they add up to."""

    claim: Claim
    scale: Scale
    verdict: Verdict
    outcomes: tuple[Outcome, ...]

    @property
    def hangs_on_usual(self) -> bool:
        """Whether the methods' own deviations would make it another verdict."""
        return combine(o.by_method or o.verdict for o in self.outcomes) != self.verdict

    def counts(self) -> Counter[Verdict]:
        return Counter(outcome.verdict for outcome in self.outcomes)


@dataclass
class Evidence:
    """Records in the form that comparisons ask for: run → scores by student.

    results: rows of `load_results`. measurements: of mechanisms, from `load_measurements`.
    """

    results: pd.DataFrame
    measurements: Measurements = field(default_factory=Measurements)

    def __post_init__(self) -> None:
        rows = self.results.assign(
            distillation_seconds=self.results["iterations"] * self.results["seconds_per_iteration"]
        )
        self._runs = dict(tuple(rows.groupby("run_id"))) if len(rows) else {}
        self._found: dict[str, pd.Series] = {}

    def scores(self, term: Term) -> dict[int, pd.Series]:
        """By seed: the metric by student seed, or the one number of a run where it is seconds."""
        found = {}
        for seed, run_id in term.run_ids.items():
            run = self._runs.get(run_id)
            if run is not None:
                values = run.set_index("student_seed")[term.metric]
                found[seed] = values.iloc[:1] if term.metric in _SECONDS else values
        return found

    def stale(self, run_id: str) -> bool:
        return bool(self._runs[run_id]["stale"].any())

    def usual_seed_deviation(self, metric: str = "mean") -> float:
        """τ: pooled standard deviation over seeds of a configuration's mean score, on Scenes.

        Over all configurations with at least three distillation or selection seeds; NaN without
        any.
        """
        return _root_mean(self._variances(metric))

    def method_deviation(self, method: str, metric: str = "mean") -> float:
        """The same over the configurations of one method; NaN where none has three seeds."""
        variances = self._variances(metric)
        return _root_mean(variances[variances.index == method])

    def _variances(self, metric: str) -> pd.Series:
        """Over seeds, of the mean score of every configuration that has three; index: its method.

        None for seconds, which have no usual deviation.
        """
        if metric in _SECONDS:
            return pd.Series(dtype=float)
        if metric not in self._found:
            rows = self.results
            rows = rows[rows["dataset"].eq("scenes") & rows["seed"].isin(SEEDS)]
            rows = rows[rows["method"].ne("full")]
            same = rows["config"].map(
                lambda config: repr(sorted((k, v) for k, v in config.items() if k != "seed"))
            )
            means = rows.groupby(["method", same, "seed"])[metric].mean()
            by_configuration = means.groupby(level=[0, 1])
            variances = by_configuration.var()[by_configuration.size() >= 3]
            self._found[metric] = variances.droplevel(1)
        return self._found[metric]


def _root_mean(variances: pd.Series) -> float:
    return float(np.sqrt(variances.mean())) if len(variances) else math.nan


def judge(claim: Claim, evidence: Evidence, scale: Scale = "scenes") -> Judgement:
    """A claim's verdict at one scale, by the rule of this module. Book: book/claims."""
    outcomes = tuple(_decide(c, evidence, claim) for c in claim.comparisons(scale))
    return Judgement(claim, scale, combine(o.verdict for o in outcomes), outcomes)


def combine(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict of a claim whose comparisons have these."""
    found = set(verdicts)
    order: tuple[Verdict, ...] = ("not reproduced", "not yet run", "inconclusive", "reproduced")
    return next((verdict for verdict in order if verdict in found), "not yet run")


def _decide(comparison: Comparison, evidence: Evidence, claim: Claim) -> Outcome:
    if comparison.test.measured is not None:
        return _decide_measured(comparison, evidence)
    found = [evidence.scores(term) for term in comparison.terms]
    common = sorted(set.intersection(*(set(scores) for scores in found)))
    if not common:
        terms = zip(comparison.terms, found, strict=True)
        missing = tuple(dict.fromkeys(term.label for term, scores in terms if not scores))
        return Outcome(comparison, "not yet run", missing=missing or ("a seed in common",))

    scores = tuple(
        _score(term, {seed: values[seed] for seed in common}, evidence)
        for term, values in zip(comparison.terms, found, strict=True)
    )
    paired = [_paired(comparison.terms, [values[seed] for values in found]) for seed in common]
    difference = float(np.mean([d.mean() for d in paired]))
    tolerance = None
    if comparison.test.alike or comparison.test.at_most:
        share = claim.tolerance() if comparison.test.alike else ALIKE
        tolerance = share * max(abs(score.mean) for score in scores)
    usual, by_method = _usual(comparison, evidence)
    error, own = _error(paired, usual)
    wider, _ = _error(paired, by_method)
    return Outcome(
        comparison,
        _verdict(comparison, difference, error, tolerance),
        difference,
        error,
        len(common),
        min(len(d) for d in paired),
        tolerance,
        scores,
        own=own,
        by_method=_verdict(comparison, difference, wider, tolerance),
        by_method_error=wider,
    )


def _verdict(
    comparison: Comparison, difference: float, error: float, tolerance: float | None
) -> Verdict:
    if tolerance is None:
        return ordered(difference, error)
    # "No more than" says nothing of how much less.
    distance = difference if comparison.test.at_most else abs(difference)
    return _within(distance, error, tolerance)


def _paired(terms: Sequence[Term], values: Sequence[pd.Series]) -> np.ndarray:
    """Differences of one seed, by student: (students that all sides have,)."""
    table = pd.concat([t.sign * v for t, v in zip(terms, values, strict=True)], axis=1).dropna()
    if table.empty:  # other students on each side: nothing pairs but the means
        return np.array([sum(t.sign * v.mean() for t, v in zip(terms, values, strict=True))])
    return table.sum(axis=1).to_numpy()


def _usual(comparison: Comparison, evidence: Evidence) -> tuple[float, float]:
    """What b is at least: τ · √k, and the same with each method's own deviation where it is more.

    With several metrics the largest of the deviations counts.
    """
    metrics = sorted({term.metric for term in comparison.terms})
    usual = max(evidence.usual_seed_deviation(m) for m in metrics)
    sets = [term for term in comparison.terms if term.has_set]
    if not sets:
        return 0.0, 0.0
    own = [evidence.method_deviation(term.configs[0].method, term.metric) for term in sets]
    wider = math.sqrt(sum(np.fmax(usual, deviation) ** 2 for deviation in own))
    return usual * math.sqrt(len(sets)), wider


def _error(paired: Sequence[np.ndarray], usual: float) -> tuple[float, bool]:
    """u, and whether it rests on the deviation of these seeds rather than on the usual one."""
    seeds, students = len(paired), min(len(d) for d in paired)
    own = float(np.std([d.mean() for d in paired], ddof=1)) if seeds >= 3 else math.nan
    between = float(np.fmax(own, usual))  # the one that is known, where only one is
    within = [float(np.var(d, ddof=1)) for d in paired if len(d) > 1]
    by_students = float(np.mean(within)) / students if within else 0.0
    return standard_error(between, by_students, seeds), math.isfinite(own) and between == own


def standard_error(between: float, by_students: float, seeds: int) -> float:
    """u, from b and w² / T; NaN where one of them is. Book: book/claims."""
    return math.sqrt((between**2 + by_students) / seeds)


def ordered(difference: float, error: float) -> Verdict:
    """Whether the side that should score higher does, from D and u. Book: book/claims."""
    if not math.isfinite(error) or abs(difference) < 2 * error:
        return "inconclusive"
    return "reproduced" if difference > 0 else "not reproduced"


def _within(distance: float, error: float, tolerance: float) -> Verdict:
    """Whether a distance is at most a tolerance, from u."""
    if not math.isfinite(error):
        return "inconclusive"
    if distance + 2 * error <= tolerance:
        return "reproduced"
    return "not reproduced" if distance - 2 * error > tolerance else "inconclusive"


def _decide_measured(comparison: Comparison, evidence: Evidence) -> Outcome:
    test, found = comparison.test, evidence.measurements
    assert test.measured is not None
    names = [test.measured, *([test.above] if isinstance(test.above, str) else [])]
    missing = tuple(name for name in names if not found.values.get(name))
    if missing:
        return Outcome(comparison, "not yet run", missing=missing)
    sides = [np.asarray(found.values[name], dtype=float) for name in names]
    if len(sides) == 2:
        distances = sides[0] - sides[1]
    elif test.below is None:
        distances = sides[0] - float(test.above or 0)
    else:
        distances = test.below - sides[0]
    scores = tuple(
        Score(
            name,
            sign,
            float(values.mean()),
            float(values.std(ddof=1)) if values.size > 1 else math.nan,
            values.size,
            values.size,
            (),
            found.stale,
        )
        for name, values, sign in zip(names, sides, (1, -1), strict=False)
    )
    difference, number = float(distances.mean()), distances.size
    if names[0] in found.deviation:  # students of one set each
        between = math.sqrt(sum(found.deviation[name] ** 2 for name in names))
        by_students = float(distances.var(ddof=1)) / number if number > 1 else math.nan
        error, seeds, students, own = standard_error(between, by_students, 1), 1, number, False
    else:
        spread = float(distances.std(ddof=1)) if number >= 3 else math.nan
        error, seeds, students, own = spread / math.sqrt(number), number, 1, True
    return Outcome(
        comparison,
        ordered(difference, error),
        difference,
        error,
        seeds,
        students,
        scores=scores,
        own=own,
        origin=found.origin,
    )


def _score(term: Term, by_seed: dict[int, pd.Series], evidence: Evidence) -> Score:
    values = pd.concat(list(by_seed.values()))
    ids = tuple(term.run_ids[seed] for seed in by_seed)
    return Score(
        term.label,
        term.sign,
        float(values.mean()),
        float(values.std(ddof=1)),
        len(values),
        len(by_seed),
        ids,
        any(evidence.stale(run_id) for run_id in ids),
    )
