"""k-means: one pair per cluster, the one closest to its centre."""

import warnings

import numpy as np
from threadpoolctl import threadpool_limits

from mmdd.selection.base import Candidates, Selection
from mmdd.selection.features import check, features, pairs_of

# Beyond this Lloyd's algorithm takes minutes on a CPU; mini-batches of it take seconds.
_LLOYD_ROWS = 50_000
_LLOYD_STEPS, _BATCH, _BATCH_STEPS = 100, 8192, 100
_BLOCK = 8192


def k_means(rows: np.ndarray, pairs: int, seed: int) -> np.ndarray:
    """Row closest (cosine) to the centre of each of `pairs` clusters; no row twice.

    rows: (n, d) float. Lloyd's algorithm from a k-means++ start; above 50,000 rows mini-batches of
    it. Returns (pairs,) int64. A cluster without members, as copies of one row make it, takes the
    row closest to its centre that no other has. Ties go to the lower index, and the cosine with a
    zero vector is 0. Raises `ConfigError` for features that are not finite and for impossible
    numbers of pairs.

    Source: MDM (CVPR 2026), Sec. 3, with K = N. Book: notebooks/03_coresets.
    """
    check(rows, pairs)
    centres, labels = _clusters(rows, pairs, seed)
    return closest_members(rows, centres, labels)


def _clusters(rows: np.ndarray, pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres (pairs, d) and the number of each row's cluster (n,)."""
    # Imported here: it takes a second, and the registry of selections loads this file for all.
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    state = int(np.random.default_rng([seed, 20]).integers(2**31))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters
        if len(rows) <= _LLOYD_ROWS:
            # Threads add up their parts of a centre in no fixed order; one thread does.
            with threadpool_limits(1, user_api="openmp"):
                fit = KMeans(
                    pairs, n_init=1, max_iter=_LLOYD_STEPS, random_state=state, algorithm="lloyd"
                ).fit(rows)
        else:
            fit = MiniBatchKMeans(
                pairs,
                n_init=1,
                batch_size=_BATCH,
                # A fixed number of steps: where to stop would hang on a sum over threads.
                max_iter=-(-_BATCH_STEPS * _BATCH // len(rows)),
                max_no_improvement=None,
                random_state=state,
            ).fit(rows)
    return fit.cluster_centers_, fit.labels_


def closest_members(rows: np.ndarray, centres: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For each cluster the index of its row with the largest cosine to its centre.

    rows: (n, d), centres: (k, d) with k ≤ n, labels: (n,) in [0, k). Returns (k,) int64, all
    different; clusters without rows come last to choose, in their order, from what is left.
    Book: notebooks/03_coresets.
    """
    norms = np.linalg.norm(rows, axis=1)
    lengths = np.linalg.norm(centres, axis=1)
    cosine = np.empty(len(rows), dtype=np.float64)
    for start in range(0, len(rows), _BLOCK):
        part = slice(start, start + _BLOCK)
        own = labels[part]
        cosine[part] = _cosine(
            np.einsum("nd,nd->n", rows[part], centres[own]), norms[part] * lengths[own]
        )
    order = np.lexsort((np.arange(len(rows)), -cosine, labels))
    first = np.searchsorted(labels[order], np.arange(len(centres)))
    sizes = np.bincount(labels, minlength=len(centres))
    chosen = np.where(sizes > 0, order[np.minimum(first, len(rows) - 1)], -1)
    free = np.ones(len(rows), dtype=bool)
    free[chosen[chosen >= 0]] = False
    for empty in np.flatnonzero(sizes == 0):
        found = _cosine(rows @ centres[empty], norms * lengths[empty])
        chosen[empty] = np.argmax(np.where(free, found, -np.inf))
        free[chosen[empty]] = False
    return chosen.astype(np.int64)


def _cosine(products: np.ndarray, norms: np.ndarray) -> np.ndarray:
    return np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)


def select_k_means(candidates: Candidates, pairs: int, rng: np.random.Generator) -> Selection:
    """`k_means` on joint features: where MDM starts. Book: notebooks/03_coresets."""
    return pairs_of(candidates, k_means(features(candidates).joint, pairs, candidates.seed))


def select_k_means_image(candidates: Candidates, pairs: int, rng: np.random.Generator) -> Selection:
    """`k_means` on image features alone. Book: notebooks/03_coresets."""
    return pairs_of(candidates, k_means(features(candidates).image, pairs, candidates.seed))


def select_k_means_text(candidates: Candidates, pairs: int, rng: np.random.Generator) -> Selection:
    """`k_means` on text features alone. Book: notebooks/03_coresets."""
    return pairs_of(candidates, k_means(features(candidates).text, pairs, candidates.seed))
