"""Trajectories and moments together: where students go, and what the real pairs look like."""

from copy import deepcopy
from dataclasses import replace

from pydantic import Field
from torch import Tensor

from mmdd.distill.joined import JoinedTrajectory
from mmdd.distill.loop import Context
from mmdd.distill.moments import JointMoments
from mmdd.distill.trajectory import TrajectoryConfig


class MomentTrajectoryConfig(TrajectoryConfig):
    """Settings of both together, beside those of MTT-VL.

    moment_weight: length of the moments' gradient, as a multiple of the trajectory gradient's; the
    two losses have no common scale, their directions can be added. It holds for images and texts
    each; 0 is MTT-VL.

    Book: notebooks/16_beyond.
    """

    moment_weight: float = Field(default=1.0, ge=0)


class MomentTrajectory(JoinedTrajectory):
    """MTT-VL whose gradient on the set is joined by that of moment matching.

    The moments are those of all real pairs under the pretrained encoders (see `JointMoments`), and
    stay the same from the first iteration to the last, while experts and snapshots change.

    Source: the trajectory loss is that of MTT-VL (TMLR 2024); the moments, and joining them, are
    this project's. Book: notebooks/16_beyond.
    """

    name = "moment-trajectory"
    second = "moments"

    config: MomentTrajectoryConfig

    def __init__(self, config: MomentTrajectoryConfig, context: Context) -> None:
        super().__init__(config, context)
        # A model of its own: the student's has dropout on and its parameters replaced.
        pretrained = deepcopy(self.model).eval().requires_grad_(False)
        self.real = JointMoments(replace(context, model=pretrained))

    def weight(self) -> float:
        return self.config.moment_weight

    def second_loss(self, iteration: int) -> Tensor:
        means, cross, within = self.real.terms(self.set.pixels(), *self.set.text())
        return means + cross + within
