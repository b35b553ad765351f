"""What every selection takes and returns."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from mmdd.data.pairs import PairDataset
from mmdd.encoders.dual import DualEncoder
from mmdd.errors import ConfigError

Selection = tuple[np.ndarray, np.ndarray]  # image indices and caption numbers, (N,) int64 each


class SelectionConfig(BaseModel):
    """How the features (or scores) are made that selections other than "random" go by.

    A model with fresh projections is trained on the train split, its text encoder frozen, for
    warm_up_epochs (forgetting_epochs for "forgetting", which counts while it trains) with InfoNCE
    and SGD. lr_image: of the image encoder, lr_heads: of the projections.
    Source: MDM (CVPR 2026), supplement; its learning rate is 0.1 for everything.
    Book: notebooks/03_coresets.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    warm_up_epochs: int = Field(default=5, ge=0)
    forgetting_epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=64, ge=2)
    lr_image: float = Field(default=0.1, ge=0)
    lr_heads: float = Field(default=0.1, ge=0)
    temperature: float = Field(default=0.07, gt=0)


@dataclass
class Candidates:
    """The real pairs to choose from, and what a selection may look at to do so.

    Each training image comes with one of its captions, drawn from the seed. model: pretrained, not
    to be changed; None will do for "random". model_config: what the model was built from, as JSON
    values. saved_seconds: a selection adds here what it found in the cache instead of computing it.
    """

    dataset: PairDataset
    seed: int
    model: DualEncoder | None = None
    model_config: dict[str, Any] = field(default_factory=dict)
    config: SelectionConfig = field(default_factory=SelectionConfig)
    progress: bool = True
    saved_seconds: float = 0.0

    @cached_property
    def pairs(self) -> Selection:
        """Every training image in the split's order, each with one random caption."""
        images = np.asarray(self.dataset.indices("train"), dtype=np.int64)
        counts = np.array([len(self.dataset.captions[i]) for i in images])
        rng = np.random.default_rng([self.seed, 18])
        return images, rng.integers(counts).astype(np.int64)

    def trainable(self) -> tuple[DualEncoder, torch.device]:
        """The model and its device. Raises `ConfigError` where there is none."""
        if self.model is None:
            raise ConfigError("this selection goes by features: give `select` a model.")
        return self.model, next(self.model.parameters()).device


Selector = Callable[[Candidates, int, np.random.Generator], Selection]
