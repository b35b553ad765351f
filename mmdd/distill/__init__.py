"""Distillation methods by name. Adding one is a file here and a line in `METHODS`."""

from dataclasses import dataclass

from pydantic import BaseModel

from mmdd.distill.cov_trajectory import CovTrajectory, CovTrajectoryConfig
from mmdd.distill.covmatch import CovMatch, CovMatchConfig
from mmdd.distill.decoupled import Decoupled, DecoupledConfig
from mmdd.distill.loop import Context, Distiller, Progress, distill, iterate
from mmdd.distill.matching import (
    DistributionMatching,
    DistributionMatchingConfig,
    GradientMatching,
    GradientMatchingConfig,
)
from mmdd.distill.mdm import Mdm, MdmConfig
from mmdd.distill.moment_trajectory import MomentTrajectory, MomentTrajectoryConfig
from mmdd.distill.moments import Moments, MomentsConfig
from mmdd.distill.repblend import RepBlend, RepBlendConfig
from mmdd.distill.soft_covmatch import (
    CovBlend,
    CovBlendConfig,
    CovSimilarity,
    CovSimilarityConfig,
)
from mmdd.distill.trajectory import (
    Lors,
    LorsConfig,
    Tesla,
    TeslaConfig,
    TeslaWbce,
    TeslaWbceConfig,
    TrajectoryConfig,
    TrajectoryMatching,
)


@dataclass(frozen=True)
class Method:
    """A registered method: its configuration and the class that the loop runs.

    The configuration has at least `iterations` and `clip`.
    """

    config: type[BaseModel]
    distiller: type[Distiller]


METHODS: dict[str, Method] = {
    "dc": Method(GradientMatchingConfig, GradientMatching),
    "dm": Method(DistributionMatchingConfig, DistributionMatching),
    "mtt": Method(TrajectoryConfig, TrajectoryMatching),
    "tesla": Method(TeslaConfig, Tesla),
    "tesla-wbce": Method(TeslaWbceConfig, TeslaWbce),
    "lors": Method(LorsConfig, Lors),
    "repblend": Method(RepBlendConfig, RepBlend),
    "amd": Method(DecoupledConfig, Decoupled),
    "covmatch": Method(CovMatchConfig, CovMatch),
    "mdm": Method(MdmConfig, Mdm),
    "moments": Method(MomentsConfig, Moments),
    "cov-trajectory": Method(CovTrajectoryConfig, CovTrajectory),
    "moment-trajectory": Method(MomentTrajectoryConfig, MomentTrajectory),
    "cov-similarity": Method(CovSimilarityConfig, CovSimilarity),
    "cov-blend": Method(CovBlendConfig, CovBlend),
}

__all__ = [
    "METHODS",
    "Context",
    "CovBlend",
    "CovBlendConfig",
    "CovMatch",
    "CovMatchConfig",
    "CovSimilarity",
    "CovSimilarityConfig",
    "CovTrajectory",
    "CovTrajectoryConfig",
    "Decoupled",
    "DecoupledConfig",
    "Distiller",
    "DistributionMatching",
    "DistributionMatchingConfig",
    "GradientMatching",
    "GradientMatchingConfig",
    "Lors",
    "LorsConfig",
    "Mdm",
    "MdmConfig",
    "Method",
    "MomentTrajectory",
    "MomentTrajectoryConfig",
    "Moments",
    "MomentsConfig",
    "Progress",
    "RepBlend",
    "RepBlendConfig",
    "Tesla",
    "TeslaConfig",
    "TeslaWbce",
    "TeslaWbceConfig",
    "TrajectoryConfig",
    "TrajectoryMatching",
    "distill",
    "iterate",
]
