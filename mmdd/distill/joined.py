"""A second loss beside a trajectory's, with no common scale: gradients are added by direction."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from mmdd.distill.loop import Terms
from mmdd.distill.trajectory import TrajectoryMatching


class JoinedTrajectory(TrajectoryMatching):
    """MTT-VL whose gradient on the set is joined by that of a second loss.

    For images and texts each: g + w · ‖g‖ / ‖g₂‖ · g₂, which is w · ‖g‖ long in the second
    direction; where g₂ is zero, g stays. At w = 0 it is MTT-VL. Book: notebooks/16_beyond.
    """

    second: ClassVar[str]  # the name of the second loss among the terms

    @abstractmethod
    def weight(self) -> float:
        """w, the length of the second gradient as a multiple of the trajectory's."""

    @abstractmethod
    def second_loss(self, iteration: int) -> Tensor:
        """A scalar that depends on all images and texts of the set."""

    def backward(self, iteration: int) -> Terms:
        terms = super().backward(iteration)
        sides = [p for p in (self.set.images, self.set.texts) if p.requires_grad]
        if self.weight() == 0 or not sides:
            return terms
        loss = self.second_loss(iteration)
        for side, gradient in zip(sides, torch.autograd.grad(loss, sides), strict=True):
            assert side.grad is not None
            length = gradient.norm()
            scale = self.weight() * side.grad.norm() / length
            side.grad += torch.where(length > 0, scale, 0.0) * gradient
        return {**terms, self.second: loss}
