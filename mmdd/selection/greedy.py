"""Herding and k-center: coresets that grow by one pair at a time."""

import numpy as np

from mmdd.selection.base import Candidates, Selection
from mmdd.selection.features import check, features, pairs_of

_SLACK = 32  # roundings of one inner product, in units of the last place of its largest value


def herding(rows: np.ndarray, pairs: int) -> np.ndarray:
    """Rows whose running sum stays closest to (t + 1) times the mean of all; no row twice.

    rows: (n, d) float. Returns (pairs,) int64, in the order of choice. Among rows that are equally
    good to within rounding the lowest index is taken. Raises `ConfigError` for features that are
    not finite and for impossible numbers of pairs.

    Source: Welling (ICML 2009); as a coreset: MDM (CVPR 2026), supplement.
    Book: notebooks/03_coresets.
    """
    check(rows, pairs)
    half_squares = 0.5 * np.einsum("nd,nd->n", rows, rows)
    largest = float(np.sqrt(2 * half_squares.max()))
    mean = rows.mean(axis=0, dtype=np.float64)
    total = np.zeros_like(mean)
    free = np.ones(len(rows), dtype=bool)
    chosen = np.empty(pairs, dtype=np.int64)
    for step in range(pairs):
        # ‖goal - x‖² = ‖goal‖² - 2 (⟨x, goal⟩ - ‖x‖²/2): one pass over the rows per step.
        goal = (step + 1) * mean - total
        gain = rows @ goal.astype(rows.dtype) - half_squares
        slack = _slack(rows, largest * (float(np.linalg.norm(goal)) + largest))
        chosen[step] = pick = _first_best(gain, free, slack)
        free[pick] = False
        total += rows[pick]
    return chosen


def k_center(rows: np.ndarray, pairs: int, rng: np.random.Generator) -> np.ndarray:
    """Farthest-first traversal: a random first centre, then always the row farthest from all.

    rows: (n, d) float; distances are Euclidean. Returns (pairs,) int64, in the order of choice, no
    row twice. Among rows that are equally far to within rounding the lowest index is taken, so
    copies of a centre come last, in their order. Raises `ConfigError` as `herding` does.

    Source: Gonzalez (1985); Sener and Savarese (ICLR 2018). Book: notebooks/03_coresets.
    """
    check(rows, pairs)
    squares = np.einsum("nd,nd->n", rows, rows)
    slack = _slack(rows, 4 * float(squares.max()))
    nearest = np.full(len(rows), np.inf, dtype=rows.dtype)
    free = np.ones(len(rows), dtype=bool)
    chosen = np.empty(pairs, dtype=np.int64)
    pick = int(rng.integers(len(rows)))
    for step in range(pairs):
        if step:
            pick = _first_best(nearest, free, slack)
        chosen[step] = pick
        free[pick] = False
        # ‖x - c‖² = ‖x‖² + ‖c‖² - 2 ⟨x, c⟩
        np.minimum(nearest, squares + squares[pick] - 2 * (rows @ rows[pick]), out=nearest)
    return chosen


def _slack(rows: np.ndarray, scale: float) -> float:
    """How far two sums of products up to `scale` may lie apart by rounding alone."""
    return _SLACK * float(np.finfo(rows.dtype).eps) * scale


def _first_best(scores: np.ndarray, free: np.ndarray, slack: float) -> int:
    """The lowest free index whose score is the largest, to within `slack`."""
    return int(np.argmax(free & (scores >= scores[free].max() - slack)))


def select_herding(candidates: Candidates, pairs: int, rng: np.random.Generator) -> Selection:
    """`herding` on joint features. Book: notebooks/03_coresets."""
    return pairs_of(candidates, herding(features(candidates).joint, pairs))


def select_k_center(candidates: Candidates, pairs: int, rng: np.random.Generator) -> Selection:
    """`k_center` on joint features. Book: notebooks/03_coresets."""
    return pairs_of(candidates, k_center(features(candidates).joint, pairs, rng))
