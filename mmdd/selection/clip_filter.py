"""The pairs whose image and text agree most, as data sets crawled from the web are filtered."""

import numpy as np

from mmdd.errors import ConfigError
from mmdd.selection.base import Candidates, Selection
from mmdd.selection.features import check, features, pairs_of


def most_alike(image: np.ndarray, text: np.ndarray, pairs: int) -> np.ndarray:
    """The rows whose image and text features have the largest cosine, best first.

    image, text: (n, d) float. Returns (pairs,) int64. Ties go to the lower index, and the cosine
    with a zero vector is 0. Raises `ConfigError` for shapes that differ, features that are not
    finite and impossible numbers of pairs. Book: notebooks/03_coresets.
    """
    check(image, pairs)
    check(text, pairs)
    if image.shape != text.shape:
        raise ConfigError(f"image features are {image.shape}, text features {text.shape}.")
    products = np.einsum("nd,nd->n", image, text)
    norms = np.linalg.norm(image, axis=1) * np.linalg.norm(text, axis=1)
    cosine = np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
    return np.argsort(-cosine, kind="stable")[:pairs]


def select_clip_filter(candidates: Candidates, pairs: int, rng: np.random.Generator) -> Selection:
    """`most_alike` under the warmed-up model, which takes CLIP's place here.

    Source: the CLIP-score filter of LAION-400M (2021). Book: notebooks/03_coresets.
    """
    found = features(candidates)
    return pairs_of(candidates, most_alike(found.image, found.text, pairs))
