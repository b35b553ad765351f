"""What the tests of distillation share: a few scenes, two kinds of encoder pairs, a start."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mmdd.batches import RealBatches, real_pairs
from mmdd.data.pairs import PairDataset
from mmdd.data.scenes import Scenes
from mmdd.distill import METHODS, Context, Distiller
from mmdd.encoders import (
    DualEncoder,
    ImageEncoderSpec,
    ModelConfig,
    TextEncoderSpec,
    build_model,
)
from mmdd.protocols import Protocol
from mmdd.selection import select

MODELS = {
    "scenes-tiny": ModelConfig(dim=12),
    # The kind of networks that `cifar-minilm` is made of, in small and with random weights.
    "resnet-bert": ModelConfig(
        pair="cifar-minilm",
        image=ImageEncoderSpec(kind="cifar_resnet", name="resnet20", image_size=32),
        text=TextEncoderSpec(
            kind="huggingface",
            name="minilm",
            pooling="mean",
            max_length=24,
            dropout=0.1,
            config_overrides={
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "vocab_size": 200,
            },
        ),
        dim=12,
    ),
}


@pytest.fixture(scope="session")
def scenes() -> PairDataset:
    return Scenes.generate({"train": 40, "val": 20, "test": 20})


@pytest.fixture(scope="session")
def models() -> dict[str, DualEncoder]:
    return {name: build_model(config) for name, config in MODELS.items()}


@pytest.fixture
def make_context(scenes: PairDataset, models: dict[str, DualEncoder]) -> Callable[..., Context]:
    """make_context(protocol, model=…, pairs=…, seed=…): a context with a model of its own."""

    def make(
        protocol: Protocol = "both", model: str = "scenes-tiny", pairs: int = 6, seed: int = 0
    ) -> Context:
        own = deepcopy(models[model])
        images, choice = select("random", scenes, pairs, seed)
        return Context(
            start=real_pairs(scenes, images, choice, own, protocol),
            real=RealBatches(scenes, "train", own, protocol, torch.device("cpu")),
            model=own,
            protocol=protocol,
            seed=seed,
        )

    return make


# The smallest settings of every method.
SMALL: dict[str, Any] = {
    "real_batch": 8,
    "synthetic_batch": 4,
    "syn_steps": 2,
    "max_start_epoch": 1,
    "max_start_text": 1,
    "model_steps": 2,
    "reset_every": 2,
    "lr_image": 0.01,
    "lr_text": 0.01,
    "lr_similarity": 0.01,
    "experts": {"count": 2, "epochs": 2, "batch_size": 20, "lr_image": 0.02},
}


@pytest.fixture(scope="session")
def make_method(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Distiller]:
    """make_method(name, context, …): any method on its smallest settings; experts are shared."""
    folder = tmp_path_factory.mktemp("experts")

    def make(name: str, context: Context, **changes: Any) -> Distiller:
        entry = METHODS[name]
        values = {k: v for k, v in (SMALL | changes).items() if k in entry.config.model_fields}
        config: Any = entry.config(**values)
        # What a buffer is named by: the wide model's experts are not the narrow one's.
        context = replace(context, model_config={"width": str(type(context.model.image_encoder))})
        prepared, _ = entry.distiller.prepare(config, context, folder, progress=False)
        method: Any = entry.distiller
        return method(config, replace(context, prepared=prepared))

    return make


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
