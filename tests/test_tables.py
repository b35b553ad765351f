"""The comparison table: references, shares, and no averaging over different settings."""

import math

import pandas as pd
import pytest

from mmdd.errors import ConfigError
from mmdd.tables import by_loss, comparison, listed, transfer


def rows(method, pairs, means, *, seed=0, settings=None, protocol="both", run_id="r", best=1.0):
    config = {"method": method, "pairs": pairs, "seed": seed, "settings": settings}
    return [
        {
            "run_id": f"{run_id}-{method}-{pairs}-{seed}",
            "dataset": "scenes",
            "protocol": protocol,
            "method": method,
            "pairs": pairs,
            "seed": seed,
            "student_seed": i,
            "mean": mean,
            "mean_best_on_test": mean + best,
            "chance_mean": 2.0,
            "config": config,
        }
        for i, mean in enumerate(means)
    ]


@pytest.fixture
def results():
    return pd.DataFrame(
        rows("random", 50, [8.0, 10.0])
        + rows("random", 50, [9.0, 9.0], seed=1)
        + rows("covmatch", 50, [30.0, 33.0], settings={"rho": 1.5})
        + rows("full", 4000, [60.0])
        + rows("random", 50, [5.0], protocol="heads")
    )


def test_references_and_shares(results):
    table = comparison(results, "scenes", "both")

    assert list(table.index) == [(0, "chance"), (50, "covmatch"), (50, "random"), (4000, "full")]
    covmatch = table.loc[(50, "covmatch")]
    assert covmatch["recall"] == 31.5
    assert covmatch["std"] == pytest.approx(math.sqrt(4.5))  # n - 1
    assert covmatch["× random"] == pytest.approx(31.5 / 9.0)
    assert covmatch["% of full"] == pytest.approx(100 * 31.5 / 60)
    assert covmatch["best on test"] == 32.5
    assert (covmatch["seeds"], covmatch["students"]) == (1, 2)
    assert table.loc[(50, "random"), "seeds"] == 2
    assert table.loc[(0, "chance"), "recall"] == 2.0


def test_without_a_full_data_record_the_share_is_unknown(results):
    table = comparison(results, "scenes", "heads")

    assert table.loc[(50, "random"), "recall"] == 5.0
    assert math.isnan(table.loc[(50, "random"), "% of full"])


def test_methods_are_chosen_and_the_full_data_stays(results):
    table = comparison(results, "scenes", "both", methods=["random"])

    assert set(table.index.get_level_values("method")) == {"chance", "random", "full"}


def test_different_settings_are_never_averaged(results):
    other = pd.DataFrame(rows("covmatch", 50, [1.0], settings={"rho": 3.0}, run_id="s"))

    with pytest.raises(ConfigError, match=r"2 different configurations.*s-covmatch-50-0"):
        comparison(pd.concat([results, other]), "scenes", "both")


def test_nothing_found_says_what_was_looked_for(results):
    with pytest.raises(ConfigError, match="'photos' under 'both'"):
        comparison(results, "photos", "both")


def test_lors_is_named_by_its_loss_in_the_budget_it_is_compared_in(results):
    lors = pd.DataFrame(
        rows("lors", 49, [40.0], settings={"loss": "wbce"})
        + rows("lors", 49, [44.0], settings={"loss": "ence"})
        + rows("tesla", 50, [43.0], settings={"loss": "info_nce"})
    )
    table = comparison(by_loss(pd.concat([results, lors])), "scenes", "both")

    assert table.loc[(50, "lors-wbce"), "recall"] == 40.0
    assert table.loc[(50, "lors-ence"), "× random"] == pytest.approx(44.0 / 9.0)
    assert table.loc[(50, "tesla"), "recall"] == 43.0  # the others keep name and budget
    assert table.loc[(50, "covmatch"), "recall"] == 31.5
    assert set(lors["method"]) == {"lors", "tesla"}  # the caller's rows are as they were


def of_students(method, pair, means, **kwargs):
    found = rows(method, 100, means, run_id=pair, **kwargs)
    return [row | {"student_model": pair} for row in found]


def test_transfer_compares_with_three_references():
    table = transfer(
        pd.DataFrame(
            of_students("random", "other", [4.0, 6.0])
            + of_students("random", "own", [10.0, 10.0])
            + of_students("covmatch", "other", [14.0, 16.0])
            + of_students("covmatch", "own", [39.0, 41.0])
            + of_students("covmatch", "third", [20.0])
            + of_students("full", "other", [50.0])
        ),
        own="own",
    )
    row = table.loc[("covmatch", "other")]
    assert row["recall"] == 15
    assert row["std"] == pytest.approx(2**0.5)
    assert row["% of own"] == pytest.approx(100 * 15 / 40)
    assert row["× random"] == pytest.approx(3)
    assert row["% of full"] == pytest.approx(30)
    assert row["students"] == 2
    assert table.loc[("covmatch", "own"), "% of own"] == 100
    assert table.loc[("covmatch", "own"), "× random"] == pytest.approx(4)
    assert table.loc[("random", "other"), "% of own"] == pytest.approx(50)
    # No random pairs and no full data for the third, no full data at home: nothing is made up.
    assert table.loc[("covmatch", "third"), ["× random", "% of full"]].isna().all()
    assert math.isnan(table.loc[("covmatch", "own"), "% of full"])
    assert math.isnan(table.loc[("full", "other"), "% of own"])
    assert table.loc["covmatch"].index.tolist() == ["own", "other", "third"]


def test_transfer_averages_no_mixtures():
    mixed = of_students("lors", "own", [1.0]) + of_students("lors", "own", [2.0], settings={"a": 1})
    with pytest.raises(ConfigError, match="lors with students own holds 2 different"):
        transfer(pd.DataFrame(mixed), own="own")


@pytest.mark.parametrize(
    ("values", "words"),
    [([25], "25"), ([25, 50], "25 and 50"), (["a", "b", "c"], "a, b and c")],
)
def test_a_list_in_words(values, words):
    assert listed(values) == words
