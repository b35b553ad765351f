"""What every selection takes and returns."""

from collections.abc import Callable

import numpy as np

from mmdd.data.pairs import PairDataset

Selection = tuple[np.ndarray, np.ndarray]  # image indices and caption numbers, (N,) int64 each
Selector = Callable[[PairDataset, int, np.random.Generator], Selection]
