"""Recall@K between images and texts, with several captions per image, in bounded memory.

Nothing is sorted: a rank is the number of rivals whose score is at least that of the right answer.
Most queries are settled by a coarse product of rounded embeddings, in one pass for both directions,
because the error of that product has a bound: a query is settled once its rank lies on one side of
every K for certain. Only the others are asked again, with a finer product, and at last in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmdd.errors import DataError

# Queries and candidates of one block of scores: it stays in the processor's cache.
_ROWS, _COLUMNS = 512, 1024
_FEW = 128  # vectors that are worked on at a time, for the same reason


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
    gets 0. The result is that of scores computed in float64 and compared in float32, so that equal
    embeddings tie wherever they stand; coarser products decide only what they decide beyond doubt.
    Blocks hold at most `chunk` queries, and no more than fit a cache. Beside a copy of the
    embeddings at half precision that takes O(n + t) memory.

    Returns {"IR@1": …, "TR@1": …, …, "mean": …}. Raises `DataError` for NaN or infinite
    embeddings, for shapes that do not fit, and for an image without any text.

    Book: notebooks/02_encoders_and_evaluation.
    """
    owner = torch.as_tensor(np.asarray(image_of_text), device=image_embeddings.device)
    images, texts = image_embeddings.detach(), text_embeddings.detach()
    _check(images, texts, owner, ks, chunk)
    owner = owner.long()
    ranks = dict(
        zip(("IR", "TR"), _ranks(images, texts, owner, ks, min(chunk, _ROWS)), strict=True)
    )
    scores = {
        f"{direction}@{k}": 100.0 * (rank < k).double().mean().item()
        for direction, rank in ranks.items()
        for k in ks
    }
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


def _ranks(
    images: Tensor, texts: Tensor, owner: Tensor, ks: Sequence[int], rows: int
) -> tuple[Tensor, Tensor]:
    """Ranks of the right answers from 0, (t,) of texts and (n,) of images.

    They are only as exact as they must be: on the right side of every K.
    """
    text_rank, image_rank = torch.zeros_like(owner), owner.new_zeros(len(images))
    text_open = torch.arange(len(texts), device=owner.device)
    image_open = torch.arange(len(images), device=owner.device)
    text_tally = image_tally = None
    dtype = _coarse_type(images, texts)
    if dtype is not None:
        z_text, z_image = _Rounded.of(texts, dtype), _Rounded.of(images, dtype)
        own = _own_scores(images, texts, owner)
        text_tally = _Tally(z_text, z_image, own)
        image_tally = _Tally(z_image, z_text, _best(own, owner, len(images)))
        _count(text_tally, image_tally, rows)
        text_rank, text_open = text_tally.low, text_tally.open(ks)
        image_rank, image_open = image_tally.low, image_tally.open(ks)
    for part in text_open.split(rows):
        near = None if text_tally is None else text_tally.near(part)
        text_rank[part] = _text_ranks(images, texts, owner, part, near)
    for part in image_open.split(rows):
        near = None if image_tally is None else image_tally.near(part)
        image_rank[part] = _image_ranks(images, texts, owner, part, near)
    return text_rank, image_rank


def _best(own: Tensor, row: Tensor, rows: int) -> Tensor:
    """(rows,) the largest of the scores of each row."""
    return own.new_full((rows,), -torch.inf).scatter_reduce(0, row, own, "amax")


def _lengths(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=1)


def _own_scores(images: Tensor, texts: Tensor, owner: Tensor) -> Tensor:
    """(t,) the score of each text with its own image, added up in float32."""
    own = texts.new_empty(len(texts), dtype=torch.float32)
    for start in range(0, len(texts), _FEW):
        part = slice(start, start + _FEW)
        own[part] = images[owner[part]].float().mul_(texts[part]).sum(dim=1)
    return own


# -- a coarse product of all pairs -----------------------------------------------------------------


def _coarse_type(images: Tensor, texts: Tensor) -> torch.dtype | None:
    """The type whose product is worth trying before float64, on these embeddings and here.

    None off the CPU, where what is added up in which precision depends on settings and kernels.
    """
    if images.device.type != "cpu" or torch.get_float32_matmul_precision() != "highest":
        return None
    if max(float(_lengths(z).max()) for z in (images, texts)) > 2.0**40:
        return None  # might overflow
    return torch.bfloat16 if _multiplies_bfloat16() else torch.float32


def _multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself, several times as fast as float32."""
    told: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(told.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


@dataclass(frozen=True)
class _Rounded:
    """Embeddings in a coarser type: values (m, d), lengths (m,) and lengths of what is lost (m,).

    Both lengths are a percent too large, which more than makes up for their own rounding.
    """

    values: Tensor
    length: Tensor
    lost: Tensor

    @classmethod
    def of(cls, embeddings: Tensor, dtype: torch.dtype) -> "_Rounded":
        values = embeddings.to(dtype)
        length = 1.01 * _lengths(embeddings).float()
        lost = torch.zeros_like(length)
        if values.dtype != embeddings.dtype:
            for start in range(0, len(embeddings), _FEW):
                part = slice(start, start + _FEW)
                difference = values[part].to(embeddings.dtype).sub_(embeddings[part])
                lost[part] = 1.01 * _lengths(difference)
        return cls(values, length, lost)

    def margin(self, others: "_Rounded") -> Tensor:
        """(m,) the most that a coarse score with any of the others may be off, and then some.

        With x = a + e and y = b + f, where a and b are what is left: |xy - ab| ≤ |x||f| + |e||y| +
        |e||f|. Adding up d products in float32, in any order, is off by at most d · 2⁻²⁴ |a||b|, or
        twice that where the hardware adds pairs (Higham 2002, section 3.1); the right answer's own
        score, added up likewise, by as much again; and the scores that count in the end are
        rounded to float32. 2⁻⁶⁰ covers numbers so small that the hardware takes them for 0.
        """
        width = self.values.shape[1]
        length, lost = others.length.max(), others.lost.max()
        inexact = (4 * width + 16) * 2.0**-24 * self.length * length
        return self.length * lost + self.lost * (length + lost) + inexact + 2.0**-60


class _Tally:
    """Bounds of the ranks of all queries, counted block by block from coarse scores.

    queries: (q, d), candidates: (n, d); right: (q,) float32, the score of each right answer.
    low counts what is above the right answer for certain, high what is not below it for certain.
    """

    def __init__(self, queries: _Rounded, candidates: _Rounded, right: Tensor) -> None:
        self.queries, self.candidates = queries.values, candidates.values
        margin = queries.margin(candidates)
        # Scores come rounded to their type, and so do the limits: rounding keeps the order.
        self.above = (right + margin).to(self.queries.dtype)[:, None]
        self.below = (right - margin).to(self.queries.dtype)[:, None]
        self.low = torch.zeros(len(right), dtype=torch.int64)
        self.high = torch.zeros(len(right), dtype=torch.int64)

    def add(self, part: slice, scores: Tensor, room: Tensor) -> None:
        """Count the scores (q', n') of the queries in `part`; room: a tensor to write over."""
        torch.gt(scores, self.above[part], out=room)
        self.low[part] += room.sum(dim=1, dtype=torch.float32).long()
        torch.ge(scores, self.below[part], out=room)
        self.high[part] += room.sum(dim=1, dtype=torch.float32).long()

    def open(self, ks: Sequence[int]) -> Tensor:
        """The queries with a K between their bounds."""
        high = self.high - 1  # the right answer itself is not below itself
        doubtful = [(self.low < k) & (high >= k) for k in ks]
        return torch.stack(doubtful).any(dim=0).nonzero()[:, 0]

    def near(self, part: Tensor) -> "_Near | None":
        """Candidates of the queries `part` that are not below; None where they are many."""
        scores = self.queries.new_empty(len(part), len(self.candidates))
        torch.mm(self.queries[part], self.candidates.T, out=scores)
        # Into the same type and only then to bool: several times as fast as at once.
        found = torch.ge(scores, self.below[part], out=torch.empty_like(scores)).bool()
        if torch.count_nonzero(found) > found.numel() // 32:
            return None
        row, candidate = found.nonzero().unbind(dim=1)
        sure = scores[row, candidate] > self.above[part[row], 0]
        return _Near(len(part), row, candidate, sure)


@dataclass(frozen=True)
class _Near:
    """(p,) each: number of the query, candidate, and whether that is above for certain."""

    queries: int
    row: Tensor
    candidate: Tensor
    sure: Tensor

    def ranks(self, rival: Tensor, score: Tensor, right: Tensor) -> Tensor:
        """(q,) the exact ranks. rival: (p,) whether it counts; score: (p,); right: (q,)."""
        ahead = self.sure | (rival & (score >= right[self.row]))
        return torch.bincount(self.row[ahead], minlength=self.queries)


def _count(rows: _Tally, columns: _Tally, most: int) -> None:
    """One product for both directions, in blocks of at most `most` rows."""
    queries, keys = rows.queries, rows.candidates
    most, width = min(most, len(queries)), min(_COLUMNS, len(keys))
    rooms = torch.empty(2, most * width, dtype=queries.dtype)
    for start in range(0, len(queries), most):
        row = slice(start, min(start + most, len(queries)))
        for first in range(0, len(keys), width):
            column = slice(first, min(first + width, len(keys)))
            shape = (row.stop - row.start, column.stop - column.start)
            scores, room = (z[: shape[0] * shape[1]].view(shape) for z in rooms)
            # Written into a given block, a product keeps its type under autocast too.
            torch.mm(queries[row], keys[column].T, out=scores)
            rows.add(row, scores, room)
            columns.add(column, scores.T, room.T)


# -- the definition --------------------------------------------------------------------------------


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Inner products, (q, d) and (n, d) → (q, n) float32.

    A float32 matrix product rounds the columns at the edge of its tiles differently, which breaks
    the ties of a collapsed model; float64 puts that noise far below the resolution of float32.
    """
    scores = keys.new_empty((len(queries), len(keys)), dtype=torch.float32)
    queries = queries.double()
    for start in range(0, len(keys), _COLUMNS):  # float64 takes twice the room: in small pieces
        part = slice(start, start + _COLUMNS)
        scores[:, part] = queries @ keys[part].double().T
    return scores


def _pair_scores(a: Tensor, b: Tensor, row: Tensor, other: Tensor) -> Tensor:
    """(p,) inner products of rows of a with rows of b, in float64 and rounded to float32."""
    scores = a.new_empty(len(row), dtype=torch.float32)
    for start in range(0, len(row), _FEW):
        part = slice(start, start + _FEW)
        scores[part] = a[row[part]].double().mul_(b[other[part]]).sum(dim=1)
    return scores


def _text_ranks(
    images: Tensor, texts: Tensor, owner: Tensor, asked: Tensor, near: _Near | None
) -> Tensor:
    """(q,) ranks of the images of the texts `asked`; all are compared unless `near` is given."""
    right = owner[asked]
    if near is not None:
        own = _pair_scores(texts, images, asked, right)
        score = _pair_scores(texts, images, asked[near.row], near.candidate)
        return near.ranks(near.candidate != right[near.row], score, own)
    block = _scores(texts[asked], images)  # (q, n)
    # The right image itself ties with its own score once; every other tie counts against.
    return (block >= block.gather(1, right[:, None])).sum(dim=1) - 1


def _image_ranks(
    images: Tensor, texts: Tensor, owner: Tensor, asked: Tensor, near: _Near | None
) -> Tensor:
    """(q,) ranks of the best text of each image `asked`; all are compared without `near`."""
    place = owner.new_full((len(images),), -1)
    place[asked] = torch.arange(len(asked), device=owner.device)
    text = (place[owner] >= 0).nonzero()[:, 0]  # their own texts
    row = place[owner[text]]
    if near is not None:
        own = _pair_scores(images, texts, asked[row], text)
        score = _pair_scores(images, texts, asked[near.row], near.candidate)
        rival = owner[near.candidate] != asked[near.row]
        return near.ranks(rival, score, _best(own, row, len(asked)))
    block = _scores(images[asked], texts)  # (q, t)
    own = block[row, text]
    best = _best(own, row, len(asked))
    # Own texts at or above the best are the best itself (and its ties): not rivals.
    own_at_best = torch.zeros_like(asked).scatter_add(0, row, (own >= best[row]).long())
    return (block >= best[:, None]).sum(dim=1) - own_at_best


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
        if torch.isfinite(_lengths(values)).all():
            continue  # then the entries are finite, too
        finite = torch.isfinite(values).all(dim=1)
        if not finite.all():
            raise DataError(
                f"recall_at_k: {int((~finite).sum())} {name} embeddings hold NaN or infinity, "
                f"first in row {int((~finite).nonzero()[0])}: the model diverged."
            )
