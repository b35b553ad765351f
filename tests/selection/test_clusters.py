"""k-means: good clusters, the members closest to their centres, and N different rows whatever."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mmdd.errors import ConfigError
from mmdd.selection import clusters
from mmdd.selection.clusters import closest_members, k_means


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / norms if norms else 0.0


def naive_members(rows: np.ndarray, centres: np.ndarray, labels: np.ndarray) -> list[int]:
    chosen = [-1] * len(centres)
    for wanted in (True, False):  # clusters with members, then those without
        for k, centre in enumerate(centres):
            members = [i for i in range(len(rows)) if labels[i] == k]
            if bool(members) != wanted:
                continue
            pool = members or [i for i in range(len(rows)) if i not in chosen]
            best = pool[0]
            for i in pool:
                if cosine(rows[i], centre) > cosine(rows[best], centre) + 1e-12:
                    best = i
            chosen[k] = best
    return chosen


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_members_against_the_definition(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 10))
    k = data.draw(st.integers(1, n))
    # Powers of two: every product, norm and quotient is exact or the same for copies.
    vectors = st.sampled_from([0.0, 1.0, -1.0, 2.0, 4.0])
    rows = data.draw(arrays(np.float64, (n, 2), elements=vectors))
    centres = data.draw(arrays(np.float64, (k, 2), elements=vectors))
    labels = data.draw(arrays(np.int64, n, elements=st.integers(0, k - 1)))
    found = closest_members(rows, centres, labels)
    assert found.dtype == np.int64
    assert len(set(found.tolist())) == k
    expected = naive_members(rows, centres, labels)
    for cluster, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        # Parallel vectors of other lengths have the same cosine but for the last bit.
        if ours != theirs:
            a, b = (cosine(rows[i], centres[cluster]) for i in (ours, theirs))
            assert abs(a - b) < 1e-12
    assert ((labels[found] == np.arange(k)) | ~np.isin(np.arange(k), labels)).all()


def test_members_of_random_clusters() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 6))
    centres = rng.normal(size=(40, 6))
    labels = rng.integers(0, 35, size=300)  # five without a member
    expected = naive_members(rows, centres, labels)
    assert closest_members(rows, centres, labels).tolist() == expected


def groups(rng: np.random.Generator, count: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    centres = rng.normal(size=(count, 8))
    owner = np.repeat(np.arange(count), each)
    return centres[owner] + rng.normal(size=(count * each, 8)) * 0.02, owner


@pytest.mark.parametrize("limit", [10**6, 10], ids=["lloyd", "mini-batches"])
@pytest.mark.parametrize("seed", range(3))
def test_one_of_each_group(monkeypatch: pytest.MonkeyPatch, limit: int, seed: int) -> None:
    """Groups that are far apart; k-means++ may merge two of them now and then, but no more."""
    monkeypatch.setattr(clusters, "_LLOYD_ROWS", limit)
    rows, owner = groups(np.random.default_rng(seed), 12, 25)
    found = k_means(rows, 12, seed)
    assert len(set(found.tolist())) == 12
    assert len(set(owner[found].tolist())) >= 10
    assert k_means(rows, 12, seed).tolist() == found.tolist()
    assert k_means(rows.astype(np.float32), 12, seed).dtype == np.int64
    others = [k_means(rows, 12, other).tolist() for other in range(20, 23)]
    assert any(other != found.tolist() for other in others)


def test_mini_batches_come_close_to_lloyd(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).normal(size=(3000, 10)).astype(np.float32)

    def inertia() -> float:
        centres, labels = clusters._clusters(rows, 30, 0)
        assert centres.shape == (30, 10)
        distance = ((rows[:, None].astype(np.float64) - centres[None]) ** 2).sum(axis=2)
        assert (labels == distance.argmin(axis=1)).mean() > 0.999
        return float(distance.min(axis=1).sum())

    lloyd = inertia()
    monkeypatch.setattr(clusters, "_LLOYD_ROWS", 10)
    assert inertia() < 1.02 * lloyd
    drawn = rows[np.random.default_rng(1).choice(3000, 30, replace=False)]
    chance = ((rows[:, None] - drawn[None]) ** 2).sum(axis=2).min(axis=1).sum()
    assert lloyd < 0.9 * chance


@pytest.mark.parametrize("limit", [10**6, 2], ids=["lloyd", "mini-batches"])
@pytest.mark.parametrize("rows", [np.zeros((6, 3)), np.ones((6, 3)), np.eye(3)[[0, 0, 0, 1, 1, 2]]])
@pytest.mark.parametrize("pairs", [1, 2, 5, 6])
@pytest.mark.filterwarnings("error")
def test_copies_and_zeros(
    monkeypatch: pytest.MonkeyPatch, limit: int, rows: np.ndarray, pairs: int
) -> None:
    monkeypatch.setattr(clusters, "_LLOYD_ROWS", limit)
    found = k_means(rows, pairs, 0)
    assert len(set(found.tolist())) == pairs
    distinct = len(np.unique(rows, axis=0))
    if pairs >= distinct and limit > 2:
        assert len(np.unique(rows[found], axis=0)) == distinct


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot choose 5 of 4 rows"):
        k_means(np.ones((4, 2)), 5, 0)
    with pytest.raises(ConfigError, match="first row 3"):
        k_means(np.array([[1.0], [2.0], [3.0], [np.inf]]), 2, 0)
