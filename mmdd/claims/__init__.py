"""The papers' claims beside this project's records: what was claimed, what came out, who decides.

`data/published/claims.yaml` holds the claims, `mmdd.claims.model` says what one is,
`mmdd.claims.verdict` how records decide it. Book: book/claims.
"""

from mmdd.claims.measurements import Measurements, load_measurements
from mmdd.claims.model import Claim, load_claims
from mmdd.claims.page import claims_details, claims_table, counts, judge_all, verdict_bars
from mmdd.claims.verdict import Evidence, Judgement, Outcome, Verdict, judge

__all__ = [
    "Claim",
    "Evidence",
    "Judgement",
    "Measurements",
    "Outcome",
    "Verdict",
    "claims_details",
    "claims_table",
    "counts",
    "judge",
    "judge_all",
    "load_claims",
    "load_measurements",
    "verdict_bars",
]
