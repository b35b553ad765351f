"""The baseline every other choice must beat."""

import numpy as np

from mmdd.selection.base import Candidates, Selection


def select_random(candidates: Candidates, pairs: int, rng: np.random.Generator) -> Selection:
    """N training images drawn without repetition, each with one of its captions at random.

    Book: notebooks/02_encoders_and_evaluation.
    """
    return candidates.dataset.draw("train", pairs, rng)
