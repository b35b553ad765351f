"""Between a start and models that were trained from it: interpolation of weights, layer by layer.

A layer is one parameter tensor: a weight and its bias count as two.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmdd.errors import ConfigError


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
    k = len(displacements)
    layers = displacements.split(list(sizes), dim=1)
    grams = torch.stack([layer @ layer.T for layer in layers])  # (layers, k, k)
    norms = grams.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    products = norms[:, :, None] * norms[:, None, :]
    moved = products > 0
    cosines = torch.where(moved, grams / torch.where(moved, products, 1), 0)
    others = cosines.flatten(1).sum(dim=1) - cosines.diagonal(dim1=1, dim2=2).sum(dim=1)
    c = (others / (k * (k - 1))).clamp(0, 1)
    return k * c / (1 + (k - 1) * c)


def interpolate(
    start: Tensor, displacements: Tensor, sizes: Sequence[int], alpha: float
) -> tuple[Tensor, Tensor]:
    """θ0 + α·t·mean(Δ), layer by layer: returns (θ (p,), t (layers,)).

    start: (p,); displacements: (k, p), what each expert moved; sizes: see `layer_ratios`, which
    also says what is refused. α = 0 is the start; α = 1 with experts that agree is their mean.

    Source: MDM (CVPR 2026), model initialisation. Book: notebooks/08_mdm.
    """
    ratios = layer_ratios(displacements, sizes)
    found = torch.empty_like(start)
    # Layer by layer, as most layers fit into a cache of the processor and the whole does not.
    for ratio, piece, origin, moved in zip(
        ratios,
        found.split(list(sizes)),
        start.split(list(sizes)),
        displacements.split(list(sizes), dim=1),
        strict=True,
    ):
        torch.mean(moved, dim=0, out=piece)
        piece.mul_(ratio).mul_(alpha).add_(origin)
    return found, ratios
