"""Choosing real pairs, as a baseline of its own and as the start of a distillation.

Adding a selection is a file here and a line in `SELECTORS`.
"""

import numpy as np

from mmdd.data.pairs import PairDataset
from mmdd.errors import ConfigError
from mmdd.selection.base import Candidates, Selection, SelectionConfig, Selector
from mmdd.selection.clip_filter import select_clip_filter
from mmdd.selection.clusters import select_k_means, select_k_means_image, select_k_means_text
from mmdd.selection.forgetting import select_forgetting
from mmdd.selection.greedy import select_herding, select_k_center
from mmdd.selection.random import select_random

SELECTORS: dict[str, Selector] = {
    "random": select_random,
    "herding": select_herding,
    "k-center": select_k_center,
    "forgetting": select_forgetting,
    "k-means": select_k_means,
    "k-means-image": select_k_means_image,
    "k-means-text": select_k_means_text,
    "clip-filter": select_clip_filter,
}

__all__ = ["SELECTORS", "Candidates", "Selection", "SelectionConfig", "select"]


def select(
    name: str,
    dataset: PairDataset,
    pairs: int,
    seed: int,
    candidates: Candidates | None = None,
) -> Selection:
    """Choose real training pairs by a method's name.

    candidates: what selections other than "random" need to see, of the same dataset and seed.
    Returns (image indices, caption numbers), (N,) int64 each. Raises `ConfigError` for an unknown
    name, fewer than one pair, more pairs than the train split has, or a missing model.
    Book: notebooks/03_coresets.
    """
    if name not in SELECTORS:
        raise ConfigError(f"unknown selection {name!r}; known: {', '.join(SELECTORS)}.")
    available = len(dataset.indices("train"))
    if not 1 <= pairs <= available:
        raise ConfigError(
            f"cannot choose {pairs} pairs: the train split of {dataset.name!r} has {available}."
        )
    candidates = candidates or Candidates(dataset, seed)
    return SELECTORS[name](candidates, pairs, np.random.default_rng([seed, 17]))
