"""What methods that learn a set of pairs share: its settings, its optimiser, what is kept of it."""

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from mmdd.allocator import keep_freed_memory
from mmdd.batches import on_device
from mmdd.distill.learnable import LearnablePairs
from mmdd.distill.loop import Context, Distiller
from mmdd.errors import ConfigError
from mmdd.synthetic import SyntheticPairs


class PairsConfig(BaseModel):
    """Settings that all methods have.

    iterations: steps on the set. optimizer, lr_image, lr_text: of those steps, in the encoder's
    normalised pixel space and the text's own; momentum for "sgd". clip: largest norm of each
    learnable's gradient. learn_*: false keeps that side of the set as it started.
    Book: notebooks/05_trajectory_matching.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    iterations: int = Field(default=1_000, ge=1)
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr_image: float = Field(default=1.0, ge=0)
    lr_text: float = Field(default=1.0, ge=0)
    momentum: float = Field(default=0.5, ge=0, lt=1)
    clip: float | None = Field(default=None, gt=0)
    learn_images: bool = True
    learn_texts: bool = True


class PairDistiller(Distiller):
    """A method that learns images and texts, and more where `learned` says so.

    A subclass calls `make_optimizer` when all that it learns is there. Raises `ConfigError` with
    nothing to learn. Book: notebooks/05_trajectory_matching.
    """

    config: PairsConfig

    def __init__(self, config: PairsConfig, context: Context) -> None:
        super().__init__(config, context)
        keep_freed_memory()
        self.model, self.device = context.model, context.real.device
        self.set = LearnablePairs(
            context.start, self.model.image_encoder, config.learn_images, config.learn_texts
        )

    def learned(self) -> list[tuple[str, nn.Parameter, float]]:
        """Everything that can be learned, by name and with its step size; some of it may be kept.

        What is kept as it started does not require gradients.
        """
        config = self.config
        return [
            ("images", self.set.images, config.lr_image),
            ("texts", self.set.texts, config.lr_text),
        ]

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of the steps on what is learned."""
        groups = [{"params": [p], "lr": lr} for _, p, lr in self.learned() if p.requires_grad]
        if not groups:
            raise ConfigError(f"{self.name} has nothing to learn: one of learn_* must be true.")
        if self.config.optimizer == "adam":
            return torch.optim.Adam(groups)
        return torch.optim.SGD(groups, momentum=self.config.momentum)

    def learnables(self) -> dict[str, Tensor]:
        return {name: p for name, p, _ in self.learned() if p.requires_grad}

    def differentiate(self, loss: Tensor) -> None:
        """Put the gradient of a loss on the learnables; a learnable that it misses gets zeros."""
        learned = list(self.learnables().values())
        # Only the path to the set is walked: no gradient of the model is computed here.
        gradients = torch.autograd.grad(loss, learned, materialize_grads=True)
        for tensor, gradient in zip(learned, gradients, strict=True):
            tensor.grad = gradient

    def some_pairs(self, size: int, stream: int, iteration: int) -> Tensor | None:
        """Rows of a random part of the set on the device; None, for all in their order, if small.

        stream: of random numbers (see `rng`).
        """
        if size >= len(self.set):
            return None
        order = self.rng(stream, iteration).permutation(len(self.set))
        return on_device(order[:size], self.device)

    def hint(self) -> str:
        return f"lower lr_image ({self.config.lr_image}) and lr_text ({self.config.lr_text})"

    def export(self) -> SyntheticPairs:
        return self.set.export(
            {
                **self.context.start.metadata,
                "method": self.name,
                "settings": self.config.model_dump(mode="json"),
            }
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "learned": {name: p for name, p, _ in self.learned()},
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter, _ in self.learned():
                parameter.copy_(state["learned"][name])
        self.optimizer.load_state_dict(state["optimizer"])
