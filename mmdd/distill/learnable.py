"""The synthetic pairs as something an optimiser can move."""

from typing import Any

import torch
from torch import Tensor, nn

from mmdd.devices import laid_out
from mmdd.encoders.image import ImageEncoder
from mmdd.synthetic import SyntheticPairs


class LearnablePairs(nn.Module):
    """A set of pairs with learnable images and texts.

    Images are learned in the encoder's normalised space, (pixel - mean) / std, as the papers do:
    their learning rates are meant there. `pixels()` gives them back in [0, 1] units, unclamped.
    """

    mean: Tensor
    std: Tensor
    mask: Tensor | None

    def __init__(
        self,
        start: SyntheticPairs,
        encoder: ImageEncoder,
        learn_images: bool = True,
        learn_texts: bool = True,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", encoder.mean.detach().clone().view(1, 3, 1, 1))
        self.register_buffer("std", encoder.std.detach().clone().view(1, 3, 1, 1))
        device = self.mean.device
        images = laid_out((start.images.to(device) - self.mean) / self.std)
        self.images = nn.Parameter(images, requires_grad=learn_images)
        self.texts = nn.Parameter(start.texts.to(device).clone(), requires_grad=learn_texts)
        mask = start.text_mask
        self.register_buffer("mask", None if mask is None else mask.to(device))

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, index: Tensor | None = None) -> Tensor:
        """Images (k, 3, H, W) in pixel units, differentiable."""
        images = self.images if index is None else self.images[index]
        return laid_out(images * self.std + self.mean)

    def text(self, index: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Texts and their mask at `index`, differentiable."""
        if index is None:
            return self.texts, self.mask
        return self.texts[index], None if self.mask is None else self.mask[index]

    def export(self, metadata: dict[str, Any] | None = None) -> SyntheticPairs:
        """A copy of the set as it is now, on the CPU."""
        with torch.no_grad():
            return SyntheticPairs(
                self.pixels().float().cpu().clone(memory_format=torch.contiguous_format),
                self.texts.detach().float().cpu().clone(),
                text_mask=None if self.mask is None else self.mask.cpu().clone(),
                metadata=metadata,
            )
