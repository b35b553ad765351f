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
- For seconds: the same as for recall, but with no usual value, so three seeds are needed.
- For a measured mechanism: D is the distance to the bound, u the standard error over its seeds.
- A comparison without records is **not yet run**.

A claim with several comparisons is not reproduced if one of them is not; else not yet run if one is
not; else inconclusive if one is; else reproduced.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd

from mmdd.claims.model import SEEDS, Claim, Comparison, Scale, Term

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
    record, or none of a common seed.
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


@dataclass(frozen=True)
class Judgement:
    """The outcomes of a claim at one scale, and what they add up to."""

    claim: Claim
    scale: Scale
    verdict: Verdict
    outcomes: tuple[Outcome, ...]

    def counts(self) -> Counter[Verdict]:
        return Counter(outcome.verdict for outcome in self.outcomes)


@dataclass
class Evidence:
    """Records in the form that comparisons ask for: run → scores by student.

    results: rows of `load_results`. measurements: by name, one number per seed.
    """

    results: pd.DataFrame
    measurements: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = self.results.assign(
            distillation_seconds=self.results["iterations"] * self.results["seconds_per_iteration"]
        )
        self._runs = dict(tuple(rows.groupby("run_id"))) if len(rows) else {}
        self._usual: dict[str, float] = {}

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
        if metric in _SECONDS:
            return math.nan
        if metric not in self._usual:
            rows = self.results
            rows = rows[rows["dataset"].eq("scenes") & rows["seed"].isin(SEEDS)]
            rows = rows[rows["method"].ne("full")]
            same = rows["config"].map(
                lambda config: repr(sorted((k, v) for k, v in config.items() if k != "seed"))
            )
            means = rows.groupby([same, "seed"])[metric].mean()
            by_configuration = means.groupby(level=0)
            variances = by_configuration.var()[by_configuration.size() >= 3]
            self._usual[metric] = float(np.sqrt(variances.mean())) if len(variances) else math.nan
        return self._usual[metric]


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
    error = _error(comparison, paired, evidence)
    tolerance = None
    if comparison.test.alike:
        tolerance = claim.tolerance() * max(abs(score.mean) for score in scores)
        verdict = _alike(difference, error, tolerance)
    else:
        verdict = ordered(difference, error)
    students = min(len(d) for d in paired)
    return Outcome(comparison, verdict, difference, error, len(common), students, tolerance, scores)


def _paired(terms: Sequence[Term], values: Sequence[pd.Series]) -> np.ndarray:
    """Differences of one seed, by student: (students that all sides have,)."""
    table = pd.concat([t.sign * v for t, v in zip(terms, values, strict=True)], axis=1).dropna()
    if table.empty:  # other students on each side: nothing pairs but the means
        return np.array([sum(t.sign * v.mean() for t, v in zip(terms, values, strict=True))])
    return table.sum(axis=1).to_numpy()


def _error(comparison: Comparison, paired: Sequence[np.ndarray], evidence: Evidence) -> float:
    seeds, students = len(paired), min(len(d) for d in paired)
    sets = sum(term.has_set for term in comparison.terms)
    metrics = {term.metric for term in comparison.terms}
    usual = max(evidence.usual_seed_deviation(m) for m in sorted(metrics)) * math.sqrt(sets)
    if sets == 0:
        usual = 0.0
    own = float(np.std([d.mean() for d in paired], ddof=1)) if seeds >= 3 else math.nan
    between = float(np.fmax(own, usual))  # the one that is known, where only one is
    within = [float(np.var(d, ddof=1)) for d in paired if len(d) > 1]
    by_students = float(np.mean(within)) / students if within else 0.0
    return standard_error(between, by_students, seeds)


def standard_error(between: float, by_students: float, seeds: int) -> float:
    """u, from b and w² / T; NaN where one of them is. Book: book/claims."""
    return math.sqrt((between**2 + by_students) / seeds)


def ordered(difference: float, error: float) -> Verdict:
    """Whether the side that should score higher does, from D and u. Book: book/claims."""
    if not math.isfinite(error) or abs(difference) < 2 * error:
        return "inconclusive"
    return "reproduced" if difference > 0 else "not reproduced"


def _alike(difference: float, error: float, tolerance: float) -> Verdict:
    if not math.isfinite(error):
        return "inconclusive"
    if abs(difference) + 2 * error <= tolerance:
        return "reproduced"
    return "not reproduced" if abs(difference) - 2 * error > tolerance else "inconclusive"


def _decide_measured(comparison: Comparison, evidence: Evidence) -> Outcome:
    test = comparison.test
    assert test.measured is not None
    values = np.asarray(evidence.measurements.get(test.measured, ()), dtype=float)
    if values.size == 0:
        return Outcome(comparison, "not yet run", missing=(test.measured,))
    mean = float(values.mean())
    std = float(values.std(ddof=1)) if values.size > 1 else math.nan
    bound = test.above if test.above is not None else test.below
    assert bound is not None
    difference = mean - bound if test.above is not None else bound - mean
    error = std / math.sqrt(values.size) if values.size >= 3 else math.nan
    score = Score(test.measured, 1, mean, std, values.size, values.size, (), False)
    verdict = ordered(difference, error)
    return Outcome(comparison, verdict, difference, error, values.size, 1, None, (score,))


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
