"""Paired comparisons against independent computations, and Holm's correction by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mmdd.errors import ConfigError
from mmdd.significance import holm, pairwise, seed_means


def test_holm_by_hand():
    # 0.005 · 4, 0.01 · 3, 0.03 · 2, and 0.04 · 1, which may not fall below the one before it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([0.2]) == pytest.approx([0.2])
    assert len(holm([])) == 0


def test_holm_refuses_what_is_no_probability():
    with pytest.raises(ConfigError, match="between 0 and 1"):
        holm([0.1, 1.2])
    with pytest.raises(ConfigError, match="between 0 and 1"):
        holm([0.1, float("nan")])


@pytest.fixture
def scores():
    rng = np.random.default_rng(3)
    values = rng.normal(size=(4, 3)) + np.array([40.0, 42.0, 30.0]) + rng.normal(size=(4, 1))
    return pd.DataFrame(values, columns=["a", "b", "c"])


def test_the_pooled_p_is_that_of_a_least_squares_fit(scores):
    """Methods and seeds as dummy variables, the contrast of two methods by its standard error."""
    found = pairwise(scores)
    assert list(found.index) == [("b", "a"), ("b", "c"), ("a", "c")]
    seeds, methods = scores.shape
    y = scores.to_numpy().ravel()
    seed, method = np.divmod(np.arange(y.size), methods)
    design = np.column_stack(
        [method == m for m in range(methods)] + [seed == s for s in range(1, seeds)]
    ).astype(float)
    beta, squares, *_ = np.linalg.lstsq(design, y, rcond=None)
    freedom = y.size - design.shape[1]
    covariance = np.linalg.inv(design.T @ design) * squares[0] / freedom
    for (better, worse), row in found.iterrows():
        contrast = np.zeros(design.shape[1])
        contrast["abc".index(better)], contrast["abc".index(worse)] = 1, -1
        assert row["difference"] == pytest.approx(contrast @ beta)
        t = contrast @ beta / np.sqrt(contrast @ covariance @ contrast)
        assert row["p"] == pytest.approx(2 * stats.t.sf(abs(t), freedom))


def test_the_own_p_is_that_of_the_paired_t_test(scores):
    for (better, worse), row in pairwise(scores).iterrows():
        expected = stats.ttest_rel(scores[better], scores[worse]).pvalue
        assert row["p_own"] == pytest.approx(expected)


def test_two_methods_have_one_test(scores):
    (row,) = pairwise(scores[["a", "b"]]).to_dict("records")
    assert row["p"] == pytest.approx(row["p_own"])


def test_by_hand():
    # Differences 1, 2, 3: mean 2, standard error 1/√3, t = 3.4641 with two degrees of freedom.
    (row,) = pairwise(pd.DataFrame({"a": [11.0, 12, 13], "b": [10.0, 10, 10]})).to_dict("records")
    assert row["difference"] == 2
    assert row["p"] == pytest.approx(0.0742, abs=5e-5)


def test_scores_without_any_spread():
    table = pairwise(pd.DataFrame({"a": [2.0, 3.0], "b": [1.0, 2.0], "c": [1.0, 2.0]}))
    assert table.loc[("a", "b"), "p"] == 0
    assert table.loc[("b", "c"), "p"] == 1


def test_a_shift_of_a_seed_changes_nothing(scores):
    shifted = scores.add([0, 5, -3, 100], axis=0)
    pd.testing.assert_frame_equal(pairwise(shifted), pairwise(scores))


@pytest.mark.parametrize("columns", [["a"], ["a", "b"]])
def test_nothing_to_compare(scores, columns):
    with pytest.raises(ConfigError, match="nothing to compare"):
        pairwise(scores[columns].iloc[:1])


def rows(method, seed, means):
    return [{"method": method, "seed": seed, "mean": mean} for mean in means]


def test_students_are_averaged_within_their_seed():
    results = pd.DataFrame(
        rows("a", 0, [1, 3]) + rows("a", 1, [5]) + rows("b", 0, [4, 6]) + rows("b", 1, [7, 7])
        + rows("c", 0, [0])
    )  # fmt: skip
    table = seed_means(results, ["b", "a"])
    assert table.columns.tolist() == ["b", "a"]
    assert table.loc[0].tolist() == [5, 2]
    assert table.loc[1].tolist() == [7, 5]
    with pytest.raises(ConfigError, match=r"c lacks the seeds \[1\]"):
        seed_means(results, ["a", "c"])
    with pytest.raises(ConfigError, match="d lacks"):
        seed_means(results, ["a", "d"])
