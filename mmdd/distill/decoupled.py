"""Decoupled trajectories: image and text start from different moments of an expert, as in AMD."""

from pydantic import Field, model_validator
from torch import Tensor

from mmdd.distill.loop import Context
from mmdd.distill.trajectory import LorsConfig, TrajectoryMatching
from mmdd.errors import ConfigError

_DRAW = 4  # stream of random numbers


class DecoupledConfig(LorsConfig):
    """Settings of decoupled trajectory matching, beside those of LoRS.

    min_start_epoch and max_start_epoch: first and last snapshot that the image branch may start
    from; min_start_text and max_start_text: those of the text branch.

    Source: AMD (ICLR 2026), known from reports. Book: notebooks/17_repblend_amd.
    """

    min_start_epoch: int = Field(default=0, ge=0)
    min_start_text: int = Field(default=0, ge=0)
    max_start_text: int = Field(default=2, ge=0)

    @model_validator(mode="after")
    def _ranges(self) -> "DecoupledConfig":
        for low, high in (
            (self.min_start_epoch, self.max_start_epoch),
            (self.min_start_text, self.max_start_text),
        ):
            if low > high:
                raise ValueError(f"a range of start epochs goes from {low} to {high}: none is left")
        return self


class Decoupled(TrajectoryMatching):
    """LoRS whose image and text branch start at snapshots drawn apart from each other.

    Both come from the same expert; each branch is compared with its own expert's snapshot
    `expert_epochs` later. AMD also adapts the ranges while it runs, by how fast each modality
    converges; here they are settings. Raises `ConfigError` for experts that are too short.

    Source: AMD (ICLR 2026), known from reports. Book: notebooks/17_repblend_amd.
    """

    name = "amd"

    config: DecoupledConfig

    def __init__(self, config: DecoupledConfig, context: Context) -> None:
        super().__init__(config, context)
        needed = config.max_start_text + config.expert_epochs
        if needed > self.experts.snapshots:
            raise ConfigError(
                f"max_start_text ({config.max_start_text}) + expert_epochs "
                f"({config.expert_epochs}) is {needed}, but the experts have "
                f"{self.experts.snapshots} snapshots after their start."
            )

    def _draw(self, iteration: int) -> tuple[list[Tensor], list[Tensor]]:
        config = self.config
        rng = self.rng(_DRAW, iteration)
        expert = int(rng.integers(len(self.experts)))
        image = int(rng.integers(config.min_start_epoch, config.max_start_epoch + 1))
        text = int(rng.integers(config.min_start_text, config.max_start_text + 1))
        start, target = (
            self._joined(expert, image + later, text + later) for later in (0, config.expert_epochs)
        )
        return start, target

    def _joined(self, expert: int, image: int, text: int) -> list[Tensor]:
        """The image branch of one snapshot and the text branch of another, part by part."""
        of_image = self._snapshot(expert, image)
        of_text = of_image if text == image else self._snapshot(expert, text)
        return [
            a if part.startswith("image") else b
            for part, a, b in zip(self.layout.sizes, of_image, of_text, strict=True)
        ]
