"""Trajectories and moments together: where students go, and what the real pairs look like."""

from copy import deepcopy
from dataclasses import replace

from pydantic import Field

from mmdd.distill.joined import join_gradient
from mmdd.distill.loop import Context, Terms
from mmdd.distill.moments import JointMoments
from mmdd.distill.trajectory import TrajectoryConfig, TrajectoryMatching


class MomentTrajectoryConfig(TrajectoryConfig):
    """Settings of both together, beside those of MTT-VL.

    moment_weight: length of the moments' gradient, as a multiple of the trajectory gradient's; the
    two losses have no common scale, their directions can be added. It holds for images and texts
    each; 0 is MTT-VL.

    Book: notebooks/16_beyond.
    """

    moment_weight: float = Field(default=1.0, ge=0)


class MomentTrajectory(TrajectoryMatching):
    """MTT-VL whose gradient on the set is joined by that of moment matching.

    The moments are those of all real pairs under the pretrained encoders (see `JointMoments`), and
    stay the same from the first iteration to the last, while experts and snapshots change.

    Source: the trajectory loss is that of MTT-VL (TMLR 2024); the moments, and joining them, are
    this project's. Book: notebooks/16_beyond.
    """

    name = "moment-trajectory"

    config: MomentTrajectoryConfig

    def __init__(self, config: MomentTrajectoryConfig, context: Context) -> None:
        super().__init__(config, context)
        # A model of its own: the student's has dropout on and its parameters replaced.
        pretrained = deepcopy(self.model).eval().requires_grad_(False)
        self.real = JointMoments(replace(context, model=pretrained))

    def backward(self, iteration: int) -> Terms:
        terms = super().backward(iteration)
        sides = [p for p in (self.set.images, self.set.texts) if p.requires_grad]
        if self.config.moment_weight == 0 or not sides:
            return terms
        means, cross, within = self.real.terms(self.set.pixels(), *self.set.text())
        loss = means + cross + within
        join_gradient(sides, loss, self.config.moment_weight)
        return {**terms, "moments": loss}
