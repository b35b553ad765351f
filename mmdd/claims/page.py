"""The page of claims: a table, the details of each claim, and a picture of the counts."""

import html
import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mmdd.claims.model import SCALES, Claim, Scale, describe
from mmdd.claims.verdict import VERDICTS, Evidence, Judgement, Outcome, Score, Verdict, judge

# Okabe and Ito's green, vermilion and yellow: told apart with colour blindness; each has its word.
VERDICT_COLOURS: dict[Verdict, str] = {
    "reproduced": "#009E73",
    "not reproduced": "#D55E00",
    "inconclusive": "#E6C229",
    "not yet run": "#BBBBBB",
}
_SIGNS: dict[Verdict, str] = {
    "reproduced": "✓",
    "not reproduced": "✗",
    "inconclusive": "?",
    "not yet run": "–",
}


_DIGITS = 2  # of differences, so that one that just decides can be told from its bound


def judge_all(claims: Sequence[Claim], evidence: Evidence) -> dict[str, dict[Scale, Judgement]]:
    """Every claim's judgement at every scale that it is tested at, by id. Book: book/claims."""
    return {
        claim.id: {scale: judge(claim, evidence, scale) for scale in claim.scales}
        for claim in claims
    }


def counts(
    claims: Sequence[Claim], judged: dict[str, dict[Scale, Judgement]], scale: Scale = "scenes"
) -> pd.DataFrame:
    """Number of claims by topic (rows, in the file's order) and verdict (columns) at one scale."""
    found = {topic: dict.fromkeys(VERDICTS, 0) for topic in dict.fromkeys(c.topic for c in claims)}
    for claim in claims:
        if scale in judged[claim.id]:
            found[claim.topic][judged[claim.id][scale].verdict] += 1
    return pd.DataFrame.from_dict(found, orient="index", columns=list(VERDICTS))


def verdict_bars(table: pd.DataFrame, axes: Axes | None = None) -> Axes:
    """The rows of `counts` as bars, one colour for each verdict, totals in the legend."""
    axes = axes or plt.subplots(figsize=(8, 0.42 * len(table) + 1.2))[1]
    left = pd.Series(0, index=table.index)
    for verdict in VERDICTS:
        values, label = table[verdict], f"{verdict} ({table[verdict].sum()})"
        colour = VERDICT_COLOURS[verdict]
        bars = axes.barh(list(table.index), values, left=left, color=colour, label=label)
        axes.bar_label(bars, [str(v) if v else "" for v in values], label_type="center")
        left = left + values
    axes.invert_yaxis()
    axes.set_xlabel("claims")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", visible=False)
    axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.45, 1.0))
    return axes


def claims_table(claims: Sequence[Claim], judged: dict[str, dict[Scale, Judgement]]) -> str:
    """All claims with their verdicts as an HTML table, in groups by topic."""
    head = "".join(
        f"<th>{name}</th>"
        for name in ("claim", "source", "published", "Scenes", "photos", "chapter")
    )
    body = []
    topic = None
    for claim in claims:
        if claim.topic != topic:
            topic = claim.topic
            body.append(f'<tr class="topic"><th colspan="6">{_text(topic)}</th></tr>')
        verdicts = [_verdict_cell(judged[claim.id].get(scale)) for scale in SCALES]
        body.append(
            f'<tr><td><a href="#claim-{claim.id}">{_text(claim.claim)}</a></td>'
            f"<td>{_text(claim.source)}</td><td>{_published(claim)}</td>{''.join(verdicts)}"
            f"<td>{_chapter(claim)}</td></tr>"
        )
    rows = "\n".join(body)
    return (
        f'<div class="claims-scroll"><table class="claims"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>"
    )


def claims_details(claims: Sequence[Claim], judged: dict[str, dict[Scale, Judgement]]) -> str:
    """What stands behind each verdict, folded: numbers, errors, records."""
    return "\n".join(_details(claim, judged[claim.id]) for claim in claims)


def _details(claim: Claim, judgements: dict[Scale, Judgement]) -> str:
    verdicts = ", ".join(
        f"{scale}: {_SIGNS[judgement.verdict]} {judgement.verdict}"
        for scale, judgement in judgements.items()
    )
    printed, chapter = _published(claim, whole=True), _chapter(claim, "Chapter ")
    said = [f"<p>{_text(claim.source)}. {printed} {chapter}.</p>"]
    if claim.note:
        said.append(f"<p>{_text(claim.note)}</p>")
    rows = "\n".join(
        _outcome_row(scale, outcome)
        for scale, judgement in judgements.items()
        for outcome in judgement.outcomes
    )
    head = "".join(
        f"<th>{name}</th>"
        for name in ("setting", "measured", "difference ± 2u", "seeds × students", "verdict")
    )
    return (
        f"<details class='claim'><summary>{_text(claim.claim)} <em>{verdicts}</em></summary>"
        f'<div id="claim-{claim.id}" class="claims-scroll">{"".join(said)}'
        f'<table class="claims"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        f"{_records(judgements)}{_origin(judgements)}</div></details>"
    )


def _outcome_row(scale: Scale, outcome: Outcome) -> str:
    setting = ", ".join(filter(None, (scale, _shared(outcome.comparison.shared))))
    if outcome.verdict == "not yet run":
        measured = f"no record of {'; '.join(outcome.missing)}"
        cells = [setting, measured, "", ""]
    else:
        low, high = ([score for score in outcome.scores if score.sign == sign] for sign in (-1, 1))
        test = outcome.comparison.test
        relation = " ≈ " if test.alike else " ≤ " if test.at_most else " > "
        sides = [" + ".join(map(_score, side)) for side in (high, low) if side]
        measured = f"{relation.join(sides)}?" if low else f"{sides[0]}, {_bound(outcome)}?"
        difference = _difference(outcome)
        if outcome.tolerance is not None:
            asked = "at most +" if test.at_most else "within ± "
            difference += f", {asked}{outcome.tolerance:.{_DIGITS}f}?"
        if outcome.hangs_on_usual:
            difference += f" (‡ ± {2 * outcome.by_method_error:.{_DIGITS}f})"
        cells = [setting, measured, difference, f"{outcome.seeds} × {outcome.students}"]
    body = "".join(f"<td>{_text(cell)}</td>" for cell in cells)
    told = outcome.verdict + " ‡" * outcome.hangs_on_usual
    return f"<tr>{body}{_coloured(outcome.verdict, told)}</tr>"


def _difference(outcome: Outcome) -> str:
    if not math.isfinite(outcome.difference):
        return ""
    # Seconds and cosines are small numbers, and recalls are not.
    digits = _DIGITS + all(abs(score.mean) < 1 for score in outcome.scores)
    error = f" ± {2 * outcome.error:.{digits}f}" if math.isfinite(outcome.error) else ""
    return f"{outcome.difference:+.{digits}f}".replace("-", "−") + error


def _shared(shared: dict[str, Any]) -> str:
    return describe({k: v for k, v in shared.items() if k != "metric"})


def _score(score: Score) -> str:
    digits = _digits(score.mean)
    spread = f" ± {score.std:.{digits}f}" if math.isfinite(score.std) else ""
    return f"{score.label} {score.mean:.{digits}f}{spread} ({score.count}){' †' * score.stale}"


def _bound(outcome: Outcome) -> str:
    test = outcome.comparison.test
    return f"above {test.above:g}" if test.above is not None else f"below {test.below:g}"


def _digits(value: float) -> int:
    """Decimals: one for recalls, three for numbers below one such as cosines and seconds."""
    return 3 if abs(value) < 1 else 1


def _records(judgements: dict[Scale, Judgement]) -> str:
    found = dict.fromkeys(
        run_id
        for judgement in judgements.values()
        for outcome in judgement.outcomes
        for score in outcome.scores
        for run_id in score.run_ids
    )
    if not found:
        return ""
    return f"<p>Records: {', '.join(f'<code>{name}</code>' for name in found)}</p>"


def _origin(judgements: dict[Scale, Judgement]) -> str:
    """Where measured mechanisms come from, of which there is no record."""
    outcomes = [o for judgement in judgements.values() for o in judgement.outcomes if o.origin]
    if not outcomes:
        return ""
    stale = " †" * any(score.stale for outcome in outcomes for score in outcome.scores)
    return f"<p>Measured: {_text(outcomes[0].origin)}{stale}</p>"


def _verdict_cell(judgement: Judgement | None) -> str:
    if judgement is None:
        return "<td></td>"
    total, told = len(judgement.outcomes), judgement.verdict + " ‡" * judgement.hangs_on_usual
    if total == 1:
        return _coloured(judgement.verdict, told, _difference(judgement.outcomes[0]))
    counted = judgement.counts()[judgement.verdict]
    return _coloured(judgement.verdict, told, f"{counted} of {total}")


def _coloured(verdict: Verdict, text: str, below: str = "") -> str:
    kind = verdict.replace(" ", "-")
    below = f"<br><small>{_text(below)}</small>" if below else ""
    return f'<td class="verdict {kind}">{_SIGNS[verdict]} {text}{below}</td>'


def _published(claim: Claim, whole: bool = False) -> str:
    numbers = [(p.label, f"{p.number():.3g}", p.unit) for p in claim.published]
    if not numbers:
        return "Published: no number." if whole else ""
    if whole:
        told = "; ".join(f"{label}: {value} {unit}".strip() for label, value, unit in numbers)
        return _text(f"Published: {told}.")
    units = {unit for _, _, unit in numbers} - {"%", ""}
    told = " / ".join(f"{value} {unit}".strip() if units else value for _, value, unit in numbers)
    return (
        f'<span title="{_text("; ".join(label for label, _, _ in numbers))}">{_text(told)}</span>'
    )


def _chapter(claim: Claim, word: str = "") -> str:
    name = claim.chapter.rsplit("/", 1)[-1]
    return f'<a href="../{claim.chapter}.html">{_text(word + name.split("_", 1)[0])}</a>'


def _text(words: str) -> str:
    return html.escape(words, quote=True)
