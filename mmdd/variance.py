"""How much the examples of a dataset differ: the variance of their features, with and without
classes, and the cosines between them.

LoRS (ICML 2024, appendix A) holds that image–text data are hard to distil because they vary more
than data with classes, and compares the variance of all images of the one kind with the variance
*within* a class of the other. Both can be asked of either kind here.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans

from mmdd.batches import inference, pixels
from mmdd.data.pairs import PairDataset
from mmdd.encoders.dual import DualEncoder
from mmdd.errors import DataError

# Borders of the histogram of cosines.
BINS = np.round(np.linspace(-1, 1, 41), 3)


def variance(features: np.ndarray) -> float:
    """The unbiased variance of (n, d) features, averaged over their d entries.

    Raises `DataError` for fewer than two. Source: LoRS, Table 6. Book: notebooks/01_data.
    """
    if len(features) < 2:
        raise DataError("the variance of fewer than two examples is not defined.")
    return float(features.var(axis=0, ddof=1, dtype=np.float64).mean())


def variance_within(features: np.ndarray, labels: Sequence[int] | np.ndarray) -> float:
    """The unbiased variance of (n, d) features about the mean of their own class.

    labels: (n,) class of each example. Squares are pooled over classes, so that a class counts by
    its size. Raises `DataError` where no class has two examples. Book: notebooks/01_data.
    """
    total, freedom = 0.0, 0
    labels = np.asarray(labels)
    for label in np.unique(labels):
        members = features[labels == label].astype(np.float64)
        total += float(((members - members.mean(axis=0)) ** 2).sum()) / features.shape[1]
        freedom += len(members) - 1
    if freedom == 0:
        raise DataError("no class has two examples: there is no variance within classes.")
    return total / freedom


def unit(features: np.ndarray) -> np.ndarray:
    """(n, d) features divided by their lengths."""
    return features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)


def spread(features: np.ndarray, labels: Sequence[int] | np.ndarray | None = None) -> float:
    """Mean cosine distance of two examples, 1 - cos; with labels, about the mean of the class.

    This is the variance of the features brought to length 1, summed over their entries. It does
    not depend on the scale of an encoder's outputs. Book: notebooks/01_data.
    """
    normed = unit(features)
    found = variance(normed) if labels is None else variance_within(normed, labels)
    return found * features.shape[1]


def clustered(features: np.ndarray, clusters: int = 10, seed: int = 0) -> float:
    """Share of the spread that is left within `clusters` clusters of k-means on unit features.

    It asks for classes where there are no labels. A small share alone is no sign of clusters, as a
    few directions of large variance give one too: `clustered_gaussian` is what to compare with.
    Book: notebooks/01_data.
    """
    return _left_within(unit(features), clusters, seed)


def clustered_gaussian(features: np.ndarray, clusters: int = 10, seed: int = 0) -> float:
    """`clustered` of as many draws from a Gaussian with the mean and covariance of the features.

    What k-means leaves of data that have the same directions and no clusters at all.
    Book: notebooks/01_data.
    """
    normed = unit(features).astype(np.float64)
    centred = normed - normed.mean(axis=0)
    _, scales, directions = np.linalg.svd(centred, full_matrices=False)
    noise = np.random.default_rng(seed).normal(size=(len(normed), len(scales)))
    drawn = noise @ (scales[:, None] * directions) / np.sqrt(len(normed) - 1)
    return _left_within(drawn, clusters, seed)


def _left_within(points: np.ndarray, clusters: int, seed: int) -> float:
    found = KMeans(clusters, n_init=3, random_state=seed).fit(points)
    return variance_within(points, found.labels_) / variance(points)


def cosine_histogram(features: np.ndarray) -> list[float]:
    """Share of the pairs of different examples in each of `BINS`, (len(BINS) - 1,) adding up to 1.

    Book: notebooks/01_data.
    """
    normed = unit(features)
    cosines = (normed @ normed.T)[np.triu_indices(len(normed), 1)].clip(-1, 1)
    return list(np.histogram(cosines, BINS)[0] / len(cosines))


def describe(
    features: np.ndarray, labels: Sequence[int] | np.ndarray | None = None
) -> dict[str, Any]:
    """Everything the book shows of one kind of feature of one dataset.

    Keys: n, d, variance, spread, clustered, clustered_gaussian, histogram; with labels also
    variance_within and spread_within. Book: notebooks/01_data.
    """
    found: dict[str, Any] = {
        "n": len(features),
        "d": features.shape[1],
        "variance": variance(features),
        "spread": spread(features),
        "clustered": clustered(features),
        "clustered_gaussian": clustered_gaussian(features),
        "histogram": cosine_histogram(features),
    }
    if labels is not None:
        found["variance_within"] = variance_within(features, labels)
        found["spread_within"] = spread(features, labels)
    return found


def image_features(images: np.ndarray, model: DualEncoder | None, block: int = 250) -> np.ndarray:
    """(n, H, W, 3) uint8 images to features (n, d_v) of a model's image encoder.

    Without a model the pixels themselves, in [0, 1]. Book: notebooks/01_data.
    """
    device = torch.device("cpu")
    parts = [pixels(images[i : i + block], device) for i in range(0, len(images), block)]
    if model is None:
        return torch.cat(parts).flatten(1).numpy()
    with inference(model):
        return torch.cat([model.image_features(part) for part in parts]).numpy()


def text_features(texts: list[str], model: DualEncoder, block: int = 250) -> np.ndarray:
    """Captions to features (n, d_l) of a model's text encoder. Book: notebooks/01_data."""
    ids, mask = model.text_encoder.tokenize(texts)
    with inference(model):
        parts = [
            model.text_features(ids[i : i + block], mask[i : i + block])
            for i in range(0, len(ids), block)
        ]
    return torch.cat(parts).numpy()


def describe_pairs(
    dataset: PairDataset,
    members: np.ndarray,
    image_models: dict[str, DualEncoder | None],
    text_model: DualEncoder,
) -> dict[str, Any]:
    """`describe` of the images, captions and pairs of a dataset.

    members: (n,) indices of images. image_models: by name, see `image_features`. Captions: all of
    the members, the picture being their class. Pairs: image features of the last of `image_models`
    and those of the first caption, each brought to length 1, side by side.
    Keys: images (by encoder), texts, pairs. Book: notebooks/01_data.
    """
    features = {
        name: image_features(dataset.images[members], model) for name, model in image_models.items()
    }
    captions = [dataset.captions[i] for i in members]
    owner = np.repeat(np.arange(len(members)), [len(texts) for texts in captions])
    words = text_features([text for texts in captions for text in texts], text_model)
    first = np.unique(owner, return_index=True)[1]
    last = list(features.values())[-1]
    return {
        "images": {name: describe(found) for name, found in features.items()},
        "texts": describe(words, owner),
        "pairs": describe(np.concatenate([unit(last), unit(words[first])], axis=1)),
    }
