"""Bytes of real pairs, and scores between measured sizes but never beyond them."""

import math

import numpy as np
import pandas as pd
import pytest

from mmdd.data.pairs import PairDataset
from mmdd.errors import ConfigError
from mmdd.storage import at_bytes, real_pair_bytes


def test_a_real_pair_is_its_pixels_and_a_caption():
    images = np.zeros((3, 4, 5, 3), np.uint8)
    captions = [["ab", "abcd"], ["é"], ["never counted, of the test split"]]
    dataset = PairDataset(images, captions, {"train": [0, 1], "test": [2]}, name="three")
    assert real_pair_bytes(dataset) == pytest.approx(4 * 5 * 3 + (2 + 4 + 2) / 3)


def measured(method, sizes, recalls):
    return pd.DataFrame({"method": method, "num_bytes": sizes, "recall": recalls})


def test_scores_are_interpolated_over_the_logarithm():
    rows = pd.concat(
        [measured("a", [400, 100, 1600], [20.0, 10.0, 22.0]), measured("b", [200, 800], [5.0, 9.0])]
    )
    table = at_bytes(rows, [100, 200, 400, 800])
    assert table.loc["a"].tolist() == pytest.approx([10, 15, 20, 21])
    assert table.loc["b"].tolist()[1:] == pytest.approx([5, 7, 9])
    assert math.isnan(table.loc["b", 100])


def test_nothing_is_extrapolated():
    table = at_bytes(measured("a", [100, 200], [1.0, 2.0]), [99, 201])
    assert table.isna().all(axis=None)
    assert at_bytes(measured("a", [100], [1.0]), [100]).loc["a", 100] == 1.0


@pytest.mark.parametrize("sizes", [[100, 100], [0, 100]])
def test_sizes_must_tell_budgets_apart(sizes):
    with pytest.raises(ConfigError, match="positive and differ"):
        at_bytes(measured("a", sizes, [1.0, 2.0]), [100])
