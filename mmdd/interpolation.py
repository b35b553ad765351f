"""Between a start and models that were trained from it: interpolation of weights, layer by layer.

A layer is one parameter tensor: a weight and its bias count as two.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmdd.errors import ConfigError

_BLOCK = 2**18  # entries of an expert that are worked on at a time
_LINE = 16  # entries


def layer_ratios(displacements: Tensor, sizes: Sequence[int]) -> Tensor:
    """How far to go from the start towards the mean of the experts, for each layer: (layers,).

    displacements: (k, p), what each of k ≥ 2 experts moved, layer after layer; sizes: entries of
    each layer, p in all. With c the mean cosine over pairs of experts, t = k·c / (1 + (k - 1)·c);
    for two experts that is 2⟨Δ1, Δ2⟩ / (‖Δ1‖‖Δ2‖ + ⟨Δ1, Δ2⟩). t is 1 for experts that agree and 0
    for experts at right angles. It is also 0 where the formula would point away from the experts
    or has no value: past a right angle, up to opposite experts, where its denominator is 0, and
    where an expert did not move. Raises `ConfigError` for fewer than two experts, or sizes that do
    not add up to p.

    Source: MDM (CVPR 2026), model initialisation; Model Stock (ECCV 2024). Book: notebooks/08_mdm.
    """
    if displacements.ndim != 2 or len(displacements) < 2 or sum(sizes) != displacements.shape[1]:
        raise ConfigError(
            "an interpolation needs what at least two experts moved, (k, p), and layers of p "
            f"entries in all; got {tuple(displacements.shape)} and layers of {sum(sizes)}."
        )
    return _ratios(_grams(displacements, sizes))


def _grams(displacements: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """(k, p) → inner products of what the experts moved, (k, k) for each layer."""
    return [layer @ layer.T for layer in displacements.split(list(sizes), dim=1)]


def _ratios(grams: list[Tensor]) -> Tensor:
    products = torch.stack(grams)  # (layers, k, k)
    k = products.shape[1]
    norms = products.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    lengths = norms[:, :, None] * norms[:, None, :]
    moved = lengths > 0
    cosines = torch.where(moved, products / torch.where(moved, lengths, 1), 0)
    others = cosines.flatten(1).sum(dim=1) - cosines.diagonal(dim1=1, dim2=2).sum(dim=1)
    c = (others / (k * (k - 1))).clamp(0, 1)
    return k * c / (1 + (k - 1) * c)


def interpolate(
    starts: Sequence[Tensor],
    ends: Sequence[Tensor],
    sizes: Sequence[int],
    alpha: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """θ0 + α·t·mean(Δ), layer by layer: returns (θ (p,), t (layers,)).

    starts, ends: (p,) each, of k ≥ 2 experts, Δ = end - start; θ0 is the first start. sizes, t and
    what is refused: see `layer_ratios`. out: what θ is written to, a new tensor by default. α = 0
    is the start; α = 1 with experts that agree is θ0 and their mean move.

    Source: MDM (CVPR 2026), model initialisation. Book: notebooks/08_mdm.
    """
    shape = (len(ends), len(starts[0]))
    if len(starts) != len(ends) or len(ends) < 2 or sum(sizes) != shape[1]:
        raise ConfigError(
            "an interpolation needs what at least two experts moved, (k, p), and layers of p "
            f"entries in all; got {shape}, {len(starts)} starts and layers of {sum(sizes)}."
        )
    # Block by block, twice: a block fits into a cache of the processor, the whole often does not.
    blocks = _blocks(sizes)
    # Every entry lies to a cache line as in a matrix of all that moved: sums may round by that.
    width = max(sum(block) for _, block in blocks) + _LINE
    room = starts[0].new_empty(len(ends), width + (shape[1] - width) % _LINE)

    def moved(first: int, block: list[int]) -> Tensor:
        part = slice(first, first + sum(block))
        rows = room[:, first % _LINE :][:, : sum(block)]
        for row, start, end in zip(rows, starts, ends, strict=True):
            torch.sub(end[part], start[part], out=row)
        return rows

    ratios = _ratios([gram for at, block in blocks for gram in _grams(moved(at, block), block)])
    found = torch.empty_like(starts[0]) if out is None else out
    layers = iter(ratios)
    for at, block in blocks:
        piece = found[at : at + sum(block)]
        torch.mean(moved(at, block), dim=0, out=piece)
        for layer in piece.split(block):
            layer.mul_(next(layers))
        piece.mul_(alpha).add_(starts[0][at : at + sum(block)])
    return found, ratios


def _blocks(sizes: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Runs of layers of `_BLOCK` entries at most, or one larger layer: (first entry, sizes)."""
    blocks: list[tuple[int, list[int]]] = []
    at, room = 0, 0
    for size in sizes:
        if size > room:
            blocks.append((at, []))
            room = _BLOCK
        blocks[-1][1].append(size)
        at, room = at + size, room - size
    return blocks
