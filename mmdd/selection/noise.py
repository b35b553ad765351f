"""No real pairs at all: a start without any knowledge of the data but its scale."""

import numpy as np
import torch
from torch import Tensor

from mmdd.encoders.dual import DualEncoder
from mmdd.synthetic import SyntheticPairs


def noise_like(pairs: SyntheticPairs, model: DualEncoder, seed: int) -> SyntheticPairs:
    """Noise in the shapes of `pairs`; normal pixels in the encoder's normalised space.

    The texts, normal too, have the mean and deviation of all entries of the real ones; a mask is
    kept, so that token sequences have real lengths. Book: notebooks/12_ablate_init.
    """
    generator = torch.Generator().manual_seed(
        int(np.random.default_rng([seed, 19]).integers(2**62))
    )
    encoder = model.image_encoder
    mean, std = (t.detach().cpu().view(1, 3, 1, 1) for t in (encoder.mean, encoder.std))
    kept = ("dataset", "dataset_fingerprint", "protocol", "licence")
    return SyntheticPairs(
        torch.randn(pairs.images.shape, generator=generator) * std + mean,
        _texts_like(pairs.texts, pairs.text_mask, generator),
        text_mask=pairs.text_mask,
        metadata={key: pairs.metadata[key] for key in kept},
    )


def _texts_like(texts: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
    real = texts if mask is None else texts[mask]
    noise = torch.randn(texts.shape, generator=generator)
    return noise * real.std(unbiased=False) + real.mean()
