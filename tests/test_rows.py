"""Rows are chosen by the configuration that a preset gives, whatever sweep they are filed under."""

import pandas as pd
import pytest

from mmdd.presets import preset
from mmdd.rows import preset_rows
from mmdd.tables import comparison


def rows(sweep, *, name="small", **wishes):
    config = preset(name, **wishes)
    return [
        {
            "run_id": config.run_id,
            "sweep": sweep,
            "dataset": config.dataset.name,
            "method": config.method,
            "pairs": 4000 if config.method == "full" else config.pairs,
            "protocol": config.protocol,
            "seed": config.seed,
            "student_seed": student,
            "mean": 10.0 + student,
            "mean_best_on_test": 12.0,
            "chance_mean": 2.0,
            "config": config.identity(),
        }
        for student in range(2)
    ]


FROZEN = {"protocol": "image+text_head"}


@pytest.mark.parametrize(
    "wishes",
    [
        {"method": "random", "pairs": 50, "protocol": "both", "seed": 2},
        {"method": "mdm", "pairs": 25, **FROZEN},
        {"method": "lors", "pairs": 49, **FROZEN},
        {"method": "k-means", "pairs": 100, "protocol": "heads"},
        {"name": "photos", "method": "covmatch", "pairs": 50, "protocol": "both"},
        {"method": "full", "evaluation": {"epochs": 20}, **FROZEN},
    ],
)
def test_what_a_preset_makes_is_taken(wishes):
    table = pd.DataFrame(rows("anything", **wishes))
    assert len(preset_rows(table)) == 2


@pytest.mark.parametrize(
    "wishes",
    [
        {"method": "mdm", "init": "random", "pairs": 25, **FROZEN},
        {"method": "lors", "pairs": 99, "settings": {"rank": 5}, **FROZEN},
        {"method": "random", "pairs": 50, "evaluation": {"students": 2}},
        {"method": "random", "pairs": 50, "student": {"pair": "scenes-vit"}, **FROZEN},
        {"method": "full", "evaluation": {"epochs": 20, "students": 1}},
        {"name": "tiny", "method": "random", "pairs": 50},
    ],
)
def test_what_deviates_is_not(wishes):
    table = pd.DataFrame(rows("budgets", **wishes))
    assert preset_rows(table).empty


def test_one_start_of_mdm_is_left_and_the_table_accepts_it():
    table = pd.DataFrame(
        rows("scenes-mdm", method="mdm", init="random", pairs=50, **FROZEN)
        + rows("budgets", method="mdm", pairs=50, **FROZEN)
        + rows("scenes-mdm", method="mdm", init="random", pairs=100, **FROZEN)
    )
    found = preset_rows(table)
    assert found["config"].map(lambda c: c["init"]).unique().tolist() == ["k-means"]
    assert comparison(found, "scenes", "image+text_head").loc[(50, "mdm"), "students"] == 2


def test_of_the_full_data_the_longest_training_is_taken():
    def full(epochs, **more):
        return rows(f"e{epochs}", method="full", evaluation={"epochs": epochs}, **more)

    table = pd.DataFrame(full(4, **FROZEN) + full(20, **FROZEN) + full(8, protocol="both"))
    assert sorted(preset_rows(table)["sweep"].unique()) == ["e20", "e8"]


def test_a_record_under_two_labels_counts_once():
    twice = rows("a", method="random", pairs=50) + rows("b", method="random", pairs=50)
    assert len(preset_rows(pd.DataFrame(twice))) == 2


def test_a_record_of_an_unknown_method_is_left_out():
    (known, _) = rows("a", method="random", pairs=50)
    table = pd.DataFrame([known, known | {"method": "of-tomorrow", "run_id": "x"}])
    assert preset_rows(table)["method"].tolist() == ["random"]


def test_an_empty_store_stays_empty():
    table = pd.DataFrame(rows("a", method="random", pairs=50)).iloc[:0]
    assert preset_rows(table).empty
