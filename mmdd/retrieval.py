"""Recall@K between images and texts, with several captions per image, in bounded memory."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmdd.errors import DataError


def recall_at_k(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    image_of_text: Tensor | np.ndarray | Sequence[int],
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 4096,
) -> dict[str, float]:
    """Recall@K in percent, both directions, and their mean.

    image_embeddings: (n, d); text_embeddings: (t, d), both L2-normalised; image_of_text: (t,)
    position of each text's image. IR@K: a text finds its image among the K best (text → image).
    TR@K: an image finds at least one of its texts (image → text). A wrong candidate whose score
    ties with the right one counts as ranked before it, so a model that scores everything alike
    gets 0. Scores are computed in float64 and compared in float32, so that equal embeddings tie
    wherever they stand, in blocks of `chunk` queries: O(chunk · max(n, t)) memory.

    Returns {"IR@1": …, "TR@1": …, …, "mean": …}. Raises `DataError` for NaN or infinite
    embeddings, for shapes that do not fit, and for an image without any text.

    Book: notebooks/02_encoders_and_evaluation.
    """
    owner = torch.as_tensor(np.asarray(image_of_text), device=image_embeddings.device)
    _check(image_embeddings, text_embeddings, owner, ks, chunk)
    scores: dict[str, float] = {}
    for direction, rank in (
        ("IR", _text_to_image_ranks(image_embeddings, text_embeddings, owner, chunk)),
        ("TR", _image_to_text_ranks(image_embeddings, text_embeddings, owner, chunk)),
    ):
        for k in ks:
            scores[f"{direction}@{k}"] = 100.0 * (rank < k).double().mean().item()
    scores["mean"] = float(np.mean(list(scores.values())))
    return scores


def chance_recall(
    image_of_text: Tensor | np.ndarray | Sequence[int], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """The expected `recall_at_k` of a random ranking, in closed form, in percent.

    For an image with c of the t texts, one of them is among K random texts with probability
    1 - C(t - c, K) / C(t, K). Book: notebooks/02_encoders_and_evaluation.
    """
    owner = np.asarray(image_of_text)
    texts, counts = len(owner), np.bincount(owner)
    images = len(counts)
    scores = {f"IR@{k}": 100.0 * min(k, images) / images for k in ks}
    for k in ks:
        steps = np.arange(min(k, texts))
        # C(t-c, K) / C(t, K) = Π (t - c - i) / (t - i); a factor below 0 means "surely found".
        ratio = np.clip((texts - counts[:, None] - steps) / (texts - steps), 0, None)
        scores[f"TR@{k}"] = 100.0 * float(np.mean(1 - ratio.prod(axis=1)))
    scores["mean"] = float(np.mean(list(scores.values())))
    return scores


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Inner products, (q, d) and (n, d) → (q, n) float32.

    A float32 matrix product rounds the columns at the edge of its tiles differently, which breaks
    the ties of a collapsed model; float64 puts that noise far below the resolution of float32.
    """
    scores = keys.new_empty((len(queries), len(keys)), dtype=torch.float32)
    queries, keys = queries.detach(), keys.detach().double().T
    for start in range(0, len(queries), 512):  # float64 takes twice the room: in small pieces
        scores[start : start + 512] = queries[start : start + 512].double() @ keys
    return scores


def _text_to_image_ranks(images: Tensor, texts: Tensor, owner: Tensor, chunk: int) -> Tensor:
    ranks = []
    for start in range(0, len(texts), chunk):
        block = _scores(texts[start : start + chunk], images)  # (q, n)
        right = block.gather(1, owner[start : start + chunk, None])
        # The right image itself ties with its own score once; every other tie counts against.
        ranks.append((block >= right).sum(dim=1, dtype=torch.int32) - 1)
    return torch.cat(ranks)


def _image_to_text_ranks(images: Tensor, texts: Tensor, owner: Tensor, chunk: int) -> Tensor:
    order = torch.argsort(owner, stable=True)
    texts, owner = texts[order], owner[order]  # texts of one image now stand side by side
    bounds = torch.searchsorted(owner, torch.arange(len(images) + 1, device=owner.device))
    ranks = []
    for start in range(0, len(images), chunk):
        stop = min(start + chunk, len(images))
        block = _scores(images[start:stop], texts)  # (q, t)
        low, high = int(bounds[start]), int(bounds[stop])
        row = owner[low:high] - start
        own = block[row, torch.arange(low, high, device=owner.device)]
        best = own.new_full((stop - start,), -torch.inf)
        best = best.scatter_reduce(0, row, own, reduce="amax")
        # Own texts at or above the best are the best itself (and its ties): not rivals.
        own_at_best = torch.zeros(stop - start, dtype=torch.long, device=owner.device)
        own_at_best = own_at_best.scatter_add(0, row, (own >= best[row]).long())
        ranks.append((block >= best[:, None]).sum(dim=1, dtype=torch.int32) - own_at_best)
    return torch.cat(ranks)


def _check(images: Tensor, texts: Tensor, owner: Tensor, ks: Sequence[int], chunk: int) -> None:
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        raise DataError(
            "recall_at_k needs (n, d) images and (t, d) texts; "
            f"got {tuple(images.shape)} and {tuple(texts.shape)}."
        )
    if owner.is_floating_point() or owner.shape != (len(texts),) or len(texts) == 0:
        raise DataError(
            f"recall_at_k: image_of_text must name one image per text ({len(texts)}, at least "
            f"one) by an integer, but is {owner.dtype} of shape {tuple(owner.shape)}."
        )
    if chunk < 1 or not ks or min(ks) < 1:
        raise DataError(f"recall_at_k: chunk ({chunk}) and every K ({list(ks)}) must be ≥ 1.")
    if owner.min() < 0 or owner.max() >= len(images):
        raise DataError(
            f"recall_at_k: image_of_text names image {int(owner.max())} or a negative one, "
            f"but there are {len(images)} images."
        )
    bare = torch.bincount(owner, minlength=len(images)) == 0
    if bare.any():
        raise DataError(
            f"recall_at_k: {int(bare.sum())} images have no text, "
            f"first at position {int(bare.nonzero()[0])}."
        )
    for name, values in (("image", images), ("text", texts)):
        finite = torch.isfinite(values).all(dim=1)
        if not finite.all():
            raise DataError(
                f"recall_at_k: {int((~finite).sum())} {name} embeddings hold NaN or infinity, "
                f"first in row {int((~finite).nonzero()[0])}: the model diverged."
            )
