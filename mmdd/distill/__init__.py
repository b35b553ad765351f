"""Distillation methods by name. Adding one is a file here and a line in `METHODS`."""

from dataclasses import dataclass

from pydantic import BaseModel

from mmdd.distill.covmatch import CovMatch, CovMatchConfig
from mmdd.distill.loop import Context, Distiller, Progress, distill


@dataclass(frozen=True)
class Method:
    """A registered method: its configuration and the class that the loop runs.

    The configuration has at least `iterations` and `clip`.
    """

    config: type[BaseModel]
    distiller: type[Distiller]


METHODS: dict[str, Method] = {
    "covmatch": Method(CovMatchConfig, CovMatch),
}

__all__ = [
    "METHODS",
    "Context",
    "CovMatch",
    "CovMatchConfig",
    "Distiller",
    "Method",
    "Progress",
    "distill",
]
