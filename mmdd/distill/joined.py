"""Two losses with no common scale on one set: their gradients are added by direction."""

from collections.abc import Sequence

import torch
from torch import Tensor


def join_gradient(sides: Sequence[Tensor], loss: Tensor, weight: float) -> None:
    """Add a second loss's gradient to the .grad of tensors, `weight` times as long as that is.

    For each tensor alone: g + weight · ‖g‖ / ‖g₂‖ · g₂; where g₂ is zero, g stays. sides: leaves
    that have a .grad and that the loss depends on.

    Book: notebooks/16_beyond.
    """
    for side, gradient in zip(sides, torch.autograd.grad(loss, list(sides)), strict=True):
        assert side.grad is not None
        length = gradient.norm()
        scale = weight * side.grad.norm() / length
        side.grad += torch.where(length > 0, scale, 0.0) * gradient
