"""Choosing real pairs, as a baseline of its own and as the start of a distillation.

Adding a selection is a file here and a line in `SELECTORS`.
"""

import numpy as np

from mmdd.data.pairs import PairDataset
from mmdd.errors import ConfigError
from mmdd.selection.base import Selection, Selector
from mmdd.selection.random import select_random

SELECTORS: dict[str, Selector] = {
    "random": select_random,
}


def select(name: str, dataset: PairDataset, pairs: int, seed: int) -> Selection:
    """Choose real training pairs by a method's name.

    Returns (image indices, caption numbers), (N,) int64 each. Raises `ConfigError` for an unknown
    name, fewer than one pair, or more pairs than the train split has.
    Book: notebooks/02_encoders_and_evaluation.
    """
    if name not in SELECTORS:
        raise ConfigError(f"unknown selection {name!r}; known: {', '.join(SELECTORS)}.")
    available = len(dataset.indices("train"))
    if not 1 <= pairs <= available:
        raise ConfigError(
            f"cannot choose {pairs} pairs: the train split of {dataset.name!r} has {available}."
        )
    return SELECTORS[name](dataset, pairs, np.random.default_rng([seed, 17]))
