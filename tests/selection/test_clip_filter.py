"""The filter by similarity of image and text."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mmdd.errors import ConfigError
from mmdd.selection.clip_filter import most_alike

AXES = np.concatenate([np.zeros((1, 3)), np.eye(3), -np.eye(3), 2 * np.eye(3)])


@given(data=st.data())
def test_against_the_definition(data: st.DataObject) -> None:
    """Vectors along the axes: cosines are -1, 0 or 1, with ties in plenty."""
    n = data.draw(st.integers(1, 12))
    image, text = (
        AXES[data.draw(arrays(np.int64, n, elements=st.integers(0, len(AXES) - 1)))]
        for _ in range(2)
    )
    pairs = data.draw(st.integers(1, n))
    scores = []
    for a, b in zip(image, text, strict=True):
        norms = np.sqrt((a**2).sum()) * np.sqrt((b**2).sum())
        scores.append(float(a @ b / norms) if norms else 0.0)
    expected = sorted(range(n), key=lambda i: (-scores[i], i))[:pairs]
    assert most_alike(image, text, pairs).tolist() == expected


def test_lengths_do_not_count() -> None:
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(2, 30, 5))
    cosine = [
        a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(image, text, strict=True)
    ]
    expected = sorted(range(30), key=lambda i: -cosine[i])
    assert most_alike(image, text, 30).tolist() == expected
    assert most_alike(image * 7, text * rng.random((30, 1)), 9).tolist() == expected[:9]


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"image features are \(4, 2\), text features \(5, 2\)"):
        most_alike(np.ones((4, 2)), np.ones((5, 2)), 2)
    with pytest.raises(ConfigError, match="NaN"):
        most_alike(np.ones((4, 2)), np.full((4, 2), np.nan), 2)
    with pytest.raises(ConfigError, match="cannot choose 5 of 4"):
        most_alike(np.ones((4, 2)), np.ones((4, 2)), 5)
