"""Herding and k-center against their definitions, one row at a time and in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mmdd.errors import ConfigError
from mmdd.selection.greedy import herding, k_center

# Small integers: copies and ties in plenty, and every sum exact.
ROWS = arrays(
    np.float64,
    st.tuples(st.integers(1, 12), st.integers(1, 3)),
    elements=st.integers(-2, 2).map(float),
)


def naive_herding(rows: np.ndarray, pairs: int) -> list[int]:
    rows = rows.astype(np.float64)
    mean = rows.mean(axis=0)
    chosen: list[int] = []
    for step in range(pairs):
        best, best_distance = -1, np.inf
        for i in range(len(rows)):
            if i in chosen:
                continue
            total = rows[chosen].sum(axis=0) + rows[i]
            distance = float(((total - (step + 1) * mean) ** 2).sum())
            if distance < best_distance - 1e-9:
                best, best_distance = i, distance
        chosen.append(best)
    return chosen


def naive_k_center(rows: np.ndarray, pairs: int, first: int) -> list[int]:
    rows = rows.astype(np.float64)
    chosen = [first]
    while len(chosen) < pairs:
        best, best_distance = -1, -1.0
        for i in range(len(rows)):
            if i in chosen:
                continue
            distance = min(float(((rows[i] - rows[c]) ** 2).sum()) for c in chosen)
            if distance > best_distance + 1e-9:
                best, best_distance = i, distance
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(5))
def test_against_the_definition(seed: int, dtype: type) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(40, 7)).astype(dtype)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for pairs in (1, 13, 40):
        assert herding(rows, pairs).tolist() == naive_herding(rows, pairs)
        first = int(np.random.default_rng(seed).integers(40))
        found = k_center(rows, pairs, np.random.default_rng(seed))
        assert found.tolist() == naive_k_center(rows, pairs, first)


@settings(max_examples=150, deadline=None)
@given(rows=ROWS, data=st.data())
def test_copies_zeros_and_ties(rows: np.ndarray, data: st.DataObject) -> None:
    pairs = data.draw(st.integers(1, len(rows)))
    found = herding(rows, pairs)
    assert len(set(found.tolist())) == pairs
    assert found.tolist() == naive_herding(rows, pairs)
    first = int(np.random.default_rng(3).integers(len(rows)))
    found = k_center(rows, pairs, np.random.default_rng(3))
    assert len(set(found.tolist())) == pairs
    assert found.tolist() == naive_k_center(rows, pairs, first)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_copies_tie_wherever_they_stand(dtype: type) -> None:
    """A matrix product rounds its last rows differently: a copy there must not win."""
    rng = np.random.default_rng(0)
    once = rng.normal(size=(53, 101)).astype(dtype)
    once /= np.linalg.norm(once, axis=1, keepdims=True)
    thrice = np.concatenate([once, once, once])
    assert herding(thrice, 20).max() < 2 * 53  # the second copies may be due, the third never
    found = k_center(thrice, 53, np.random.default_rng(1))
    assert len(set((found % 53).tolist())) == 53  # every point before any copy
    assert (found[1:] < 53).sum() >= 52


def test_what_they_are_for() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(400, 5))
    rows[7] += 40  # an outlier: k-center goes there at once, herding never
    herded, centres = herding(rows, 20), k_center(rows, 20, np.random.default_rng(0))
    drawn = rng.choice(400, 20, replace=False)

    def off(chosen: np.ndarray) -> float:
        return float(np.linalg.norm(rows[chosen].mean(axis=0) - rows.mean(axis=0)))

    assert 7 not in herded
    assert centres[1] == 7
    assert off(herded) < off(drawn) / 2
    distance = np.linalg.norm(rows[:, None] - rows[None], axis=2)
    assert distance[:, centres].min(axis=1).max() < distance[:, drawn].min(axis=1).max()


def test_first_centre_is_random() -> None:
    rows = np.eye(50)
    firsts = {int(k_center(rows, 2, np.random.default_rng(seed))[0]) for seed in range(20)}
    assert len(firsts) > 10


@pytest.mark.parametrize(
    "algorithm", [herding, lambda r, n: k_center(r, n, np.random.default_rng())]
)
def test_what_is_refused(algorithm) -> None:
    rows = np.ones((4, 2))
    for pairs in (0, 5, -1):
        with pytest.raises(ConfigError, match=f"cannot choose {pairs} of 4 rows"):
            algorithm(rows, pairs)
    rows[2, 1] = np.nan
    with pytest.raises(ConfigError, match=r"1 rows of the features hold NaN .* first row 2"):
        algorithm(rows, 2)
    with pytest.raises(ConfigError, match=r"float array, not int64 of shape \(4, 2\)"):
        algorithm(np.ones((4, 2), dtype=np.int64), 2)
    with pytest.raises(ConfigError, match=r"float array, not float64 of shape \(4,\)"):
        algorithm(np.ones(4), 2)
