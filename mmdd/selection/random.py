"""The baseline every other choice must beat."""

import numpy as np

from mmdd.data.pairs import PairDataset
from mmdd.selection.base import Selection


def select_random(dataset: PairDataset, pairs: int, rng: np.random.Generator) -> Selection:
    """N training images drawn without repetition, each with one of its captions at random.

    Book: notebooks/02_encoders_and_evaluation.
    """
    return dataset.draw("train", pairs, rng)
