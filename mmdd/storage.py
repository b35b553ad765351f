"""Scores at equal bytes: what a set takes, and what a method makes of a number of bytes."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from mmdd.data.pairs import PairDataset
from mmdd.errors import ConfigError


def real_pair_bytes(dataset: PairDataset, split: str = "train") -> float:
    """Bytes of a real pair as it is: its uint8 pixels, and one caption in UTF-8.

    The mean over all captions of a split. `SyntheticPairs.num_bytes` counts the same pair as
    float32 pixels and a float32 text vector, which a learned pair needs and a real one does not.
    No compression is assumed on either side. Book: notebooks/09_comparison.
    """
    pixels = int(np.prod(dataset.images.shape[1:]))
    captions = [text for i in dataset.indices(split) for text in dataset.captions[i]]
    return pixels + float(np.mean([len(text.encode()) for text in captions]))


def at_bytes(recall: pd.DataFrame, budgets: Sequence[float], by: str = "method") -> pd.DataFrame:
    """What each method scores at given numbers of bytes.

    recall: one row per method and measured budget, with columns `by`, num_bytes and recall (in
    percent). Between two measured sizes of a method the recall is interpolated linearly over the
    logarithm of the bytes; outside of what was measured it is NaN, as nothing is extrapolated.
    Index: methods, columns: `budgets` in bytes.

    Raises `ConfigError` when a method has two rows of the same size or bytes that are not
    positive. Book: notebooks/09_comparison.
    """
    rows = {}
    for method, group in recall.groupby(by, sort=False):
        group = group.sort_values("num_bytes")
        size = group["num_bytes"].to_numpy(float)
        if (size <= 0).any() or (np.diff(size) <= 0).any():
            raise ConfigError(f"{method}: sizes must be positive and differ, not {size.tolist()}.")
        rows[method] = np.interp(
            np.log(np.asarray(budgets, float)),
            np.log(size),
            group["recall"].to_numpy(float),
            left=np.nan,
            right=np.nan,
        )
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(budgets))
    table.index.name = by
    return table
