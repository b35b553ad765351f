"""Mechanisms: the counting of directions, the file, and that it holds what the code measures."""

from pathlib import Path

import pytest
import torch

from mmdd.claims.measure import (
    MEASURES,
    covariance_rank,
    directions,
    feature_stability,
    load_measurements,
)
from mmdd.errors import StoreError

COMMITTED = Path(__file__).parents[2] / "results" / "mechanisms.json"


def test_directions_of_known_spectra():
    assert directions(torch.eye(8), 0.99) == 8
    assert directions(torch.eye(8), 0.5) == 4
    assert directions(torch.ones(5, 7), 0.99) == 1
    # squares 100, 1, 1: the first holds 98 %
    assert directions(torch.diag(torch.tensor([1.0, 10.0, 1.0])), 0.98) == 1
    assert directions(torch.diag(torch.tensor([1.0, 10.0, 1.0])), 0.99) == 2


def test_the_committed_file_has_every_measure_and_three_seeds():
    found = load_measurements(COMMITTED)
    assert set(found) == set(MEASURES)
    assert all(len(values) == 3 for values in found.values())


@pytest.mark.slow
def test_the_committed_numbers_are_what_the_code_measures():
    found = load_measurements(COMMITTED)
    ranks, images = (list(found.values())[i] for i in (0, 1))
    assert covariance_rank(seeds=(1,)) == pytest.approx(ranks[1:2], abs=1.6)  # two directions
    assert feature_stability("image", seeds=(0,)) == pytest.approx(images[:1], abs=0.005)


def test_a_file_of_something_else_is_refused_and_none_is_nothing(tmp_path):
    assert load_measurements(tmp_path / "none.json") == {}
    for text in ("[", "[1]", '{"values": [1]}', '{"values": {"a": ["x"]}}'):
        path = tmp_path / "m.json"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(StoreError, match=r"m\.json"):
            load_measurements(path)
