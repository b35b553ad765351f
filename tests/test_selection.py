"""Choosing real pairs."""

import numpy as np
import pytest

from mmdd.data.pairs import PairDataset
from mmdd.data.scenes import Scenes
from mmdd.errors import ConfigError
from mmdd.selection import SELECTORS, select


@pytest.fixture(scope="module")
def scenes() -> PairDataset:
    return Scenes.generate({"train": 30, "val": 5, "test": 5}, size=8)


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("pairs", [1, 10, 30])
def test_chosen_pairs(scenes: PairDataset, name: str, pairs: int) -> None:
    images, choice = select(name, scenes, pairs, 0)
    assert len(images) == len(choice) == pairs == len(set(images.tolist()))
    assert set(images.tolist()) <= set(scenes.indices("train").tolist())
    assert images.dtype == choice.dtype == np.int64
    assert all(0 <= c < len(scenes.captions[i]) for i, c in zip(images, choice, strict=True))
    again = select(name, scenes, pairs, 0)
    assert images.tolist() == again[0].tolist()
    assert choice.tolist() == again[1].tolist()


def test_seeds_choose_differently(scenes: PairDataset) -> None:
    np.random.seed(0)  # noqa: NPY002 - the global generator has no say
    first, second = select("random", scenes, 10, 0), select("random", scenes, 10, 1)
    assert first[0].tolist() != second[0].tolist()
    everything, choice = select("random", scenes, 30, 2)
    assert sorted(everything.tolist()) == scenes.indices("train").tolist()
    assert len(set(choice.tolist())) == 5


@pytest.mark.parametrize("pairs", [0, -1, 31])
def test_impossible_numbers(scenes: PairDataset, pairs: int) -> None:
    with pytest.raises(ConfigError, match=f"cannot choose {pairs} pairs: .*'scenes' has 30"):
        select("random", scenes, pairs, 0)


def test_unknown_name(scenes: PairDataset) -> None:
    with pytest.raises(ConfigError, match="unknown selection 'best'; known: random"):
        select("best", scenes, 3, 0)
