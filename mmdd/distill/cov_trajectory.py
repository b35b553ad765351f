"""Trajectories and cross-covariances together: CovMatch's loss at the snapshots of the experts."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mmdd import losses
from mmdd.distill.joined import JoinedTrajectory
from mmdd.distill.trajectory import TrajectoryConfig
from mmdd.experts import seeded_dropout

_REAL = 5  # stream of random numbers


class CovTrajectoryConfig(TrajectoryConfig):
    """Settings of both together, beside those of MTT-VL.

    cov_weight: length of the covariance gradient, as a multiple of the trajectory gradient's; the
    two losses have no common scale, their directions can be added. It holds for images and texts
    each; 0 is MTT-VL. rho, lambda_: CovMatch's scale of the real covariance and weight of the
    means. real_batch: real pairs in an iteration, all of the set's against them. snapshot: of the
    expert that the student starts from or should arrive at, whose features are compared.

    Book: notebooks/16_beyond.
    """

    cov_weight: float = Field(default=1.0, ge=0)
    rho: float = Field(default=2.0, ge=0)
    lambda_: float = Field(default=0.1, ge=0)
    real_batch: int = Field(default=256, ge=2)
    snapshot: Literal["start", "target"] = "target"


class CovTrajectory(JoinedTrajectory):
    """MTT-VL whose gradient on the set is joined by that of the covariance matching loss.

    The features come from the expert of the iteration, so no model is trained beside the experts:
    the snapshots are to CovMatch's loss what its online model is. Features are L2-normalised.

    Source: the losses are those of MTT-VL (TMLR 2024) and CovMatch (NeurIPS 2025); joining them is
    this project's. Book: notebooks/16_beyond.
    """

    name = "cov-trajectory"
    second = "covariance"

    config: CovTrajectoryConfig

    def weight(self) -> float:
        return self.config.cov_weight

    def second_loss(self, iteration: int) -> Tensor:
        config = self.config
        start, target = self._draw(iteration)
        parameters = self.layout.named(start if config.snapshot == "start" else target)
        real = self.real_batch(config.real_batch, _REAL, iteration)
        with seeded_dropout([self.seed, iteration, _REAL], self.device):
            with torch.no_grad():
                of_real = self._embed(parameters, real.images, real.texts, real.mask)
            of_set = self._embed(parameters, self.set.pixels(), *self.set.text())
        covariance, means = losses.covmatch_terms(*of_real, *of_set, config.rho)
        return covariance + config.lambda_ * means
