"""Choosing real pairs, as a baseline of its own and as the start of a distillation."""

from collections.abc import Callable

import numpy as np

from mmdd.data.pairs import PairDataset
from mmdd.errors import ConfigError

Selection = tuple[np.ndarray, np.ndarray]  # image indices and caption numbers, (N,) int64 each


def select_random(dataset: PairDataset, pairs: int, rng: np.random.Generator) -> Selection:
    """N training images drawn without repetition, each with one of its captions at random.

    Book: notebooks/02_encoders_and_evaluation.
    """
    return dataset.draw("train", pairs, rng)


SELECTORS: dict[str, Callable[[PairDataset, int, np.random.Generator], Selection]] = {
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
