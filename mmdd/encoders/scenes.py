"""The small encoders of Scenes: a normaliser-free CNN and a two-layer BERT over whole words.

Both are pretrained separately, on attributes and on masked words of a disjoint corpus, never on
image–text pairs, by `data/pretrained/make_scenes_tiny.py`; the weights ship with the project.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdd._torchvision import ensure_torchvision
from mmdd.data.captions import MAX_WORDS, VOCABULARY
from mmdd.encoders.image import ImageEncoder
from mmdd.encoders.text import TextEncoder, attention_mask
from mmdd.errors import ConfigError
from mmdd.files import load_tensors
from mmdd.paths import data_file

WEIGHTS = "scenes_tiny.safetensors"
IMAGE_SIZE = 32


class WeightStandardisedConv2d(nn.Conv2d):
    """A convolution whose filters have zero mean and unit variance, times a learned gain.

    It needs no statistics of the batch, so a pair's features do not depend on its neighbours.
    Source: NFNet (Brock et al. 2021), scaled weight standardisation.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, padding=kernel // 2)
        self.gain = nn.Parameter(torch.ones(out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        fan_in = w[0].numel()
        centred = w - w.mean(dim=(1, 2, 3), keepdim=True)
        variance = centred.square().mean(dim=(1, 2, 3), keepdim=True)
        w = self.gain * centred * torch.rsqrt(variance * fan_in + 1e-6)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class FixedStandardisation(nn.Module):
    """Subtract a fixed mean and divide by a fixed deviation, measured once on the corpus."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))

    def forward(self, h: Tensor) -> Tensor:
        return (h - self.mean) / self.deviation


def _silu(x: Tensor) -> Tensor:
    # Written out: torch's silu has no forward-mode derivative of its backward (torch 2.13).
    return x * torch.sigmoid(x)


class ScenesImageEncoder(ImageEncoder):
    """(B, 3, 32, 32) pixels in [0, 1] → (B, 128): three strided convolutions and a linear layer.

    0.36 M parameters; outputs standardised by fixed statistics of the pretraining corpus.
    Book: notebooks/02_encoders_and_evaluation.
    """

    def __init__(self) -> None:
        super().__init__(dim=128, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        self.conv1 = WeightStandardisedConv2d(3, 32, 5, 2)
        self.conv2 = WeightStandardisedConv2d(32, 64, 3, 2)
        self.conv3 = WeightStandardisedConv2d(64, 128, 3, 2)
        self.linear = nn.Linear(128 * (IMAGE_SIZE // 8) ** 2, 128)
        self.standardise = FixedStandardisation(128)

    def features(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            raise ConfigError(
                f"scenes-tiny takes {IMAGE_SIZE} × {IMAGE_SIZE} pixels, "
                f"not {x.shape[-2]} × {x.shape[-1]}: its linear layer knows positions. "
                "Set the dataset's size to 32 or use another image encoder."
            )
        x = _silu(self.conv1(x))  # (B, 32, 16, 16)
        x = _silu(self.conv2(x))  # (B, 64, 8, 8)
        x = _silu(self.conv3(x))  # (B, 128, 4, 4)
        return self.standardise(self.linear(x.flatten(1)))


class ScenesTextEncoder(TextEncoder):
    """Captions of Scenes → (B, 64): a word tokenizer and a two-layer BERT, mean-pooled.

    0.1 M parameters, no dropout; outputs standardised by fixed statistics of the corpus. A word
    outside the vocabulary becomes [UNK]. Book: notebooks/02_encoders_and_evaluation.
    """

    specials = ("[PAD]", "[UNK]", "[CLS]", "[MASK]")

    def __init__(self) -> None:
        super().__init__(dim=64, embedding_dim=64, max_length=MAX_WORDS + 1)
        ensure_torchvision()
        from transformers import BertConfig, BertModel

        self.words = {w: i for i, w in enumerate((*self.specials, *VOCABULARY))}
        config = BertConfig(
            vocab_size=len(self.words),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=self.max_length,
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.bert.set_attn_implementation("eager")  # differentiable twice, and forward-mode
        self.standardise = FixedStandardisation(64)

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(len(texts), self.max_length, dtype=torch.int64)  # 0 is [PAD]
        for row, text in enumerate(texts):
            words = text.lower().replace(",", " , ").split()[: self.max_length - 1]
            known = [self.words.get(w, self.words["[UNK]"]) for w in words]
            ids[row, : len(known) + 1] = torch.tensor([self.words["[CLS]"], *known])
        return ids, ids != 0

    def embed(self, ids: Tensor) -> Tensor:
        return self.bert.embeddings.word_embeddings(ids)

    def hidden(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Contextual token vectors, (B, L, 64)."""
        given = attention_mask(self.bert, mask, embeddings.dtype)
        return self.bert(inputs_embeds=embeddings, attention_mask=given).last_hidden_state

    def encode(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        if len(embeddings) == 0:  # attention cannot split a batch of nothing into heads
            return embeddings.new_zeros((0, self.dim))
        hidden = self.hidden(embeddings, mask)
        weight = mask.to(hidden.dtype)[..., None]
        pooled = (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
        return self.standardise(pooled)

    def input_embedding_parameters(self) -> list[nn.Parameter]:
        return list(self.bert.embeddings.parameters())


# Encoders of kind "scenes" by the module that has them in its `ENCODERS`: further ones stand in a
# module of their own, which only those runs load that use it.
_ELSEWHERE = "mmdd.encoders.scenes_more"
ENCODERS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "image": {"scenes-tiny": ScenesImageEncoder},
    "text": {"scenes-tiny": ScenesTextEncoder},
}


def scenes_module(part: Literal["image", "text"], name: str) -> str:
    """The module that an encoder of kind "scenes" is written in."""
    return __name__ if name in ENCODERS[part] else _ELSEWHERE


@overload
def build_scenes_encoder(
    part: Literal["image"], name: str, weights: str | None, seed: int
) -> ImageEncoder: ...


@overload
def build_scenes_encoder(
    part: Literal["text"], name: str, weights: str | None, seed: int
) -> TextEncoder: ...


def build_scenes_encoder(
    part: Literal["image", "text"], name: str, weights: str | None, seed: int
) -> nn.Module:
    """An encoder of kind "scenes" by name, with random weights (None) or the shipped ones.

    Raises `ConfigError` for another name, or weights other than the file of that name.
    """
    module = import_module(scenes_module(part, name))
    shipped = f"{name.replace('-', '_')}.safetensors"
    if name not in module.ENCODERS[part] or weights not in (None, shipped):
        known = [*ENCODERS[part], *import_module(_ELSEWHERE).ENCODERS[part]]
        raise ConfigError(
            f"{part} encoder of kind 'scenes' called {name!r} with weights {weights!r}: there are "
            f"{', '.join(known)}, with no weights or those of their own file, such as {WEIGHTS!r}."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder: nn.Module = module.ENCODERS[part][name]()
    if weights is not None:
        tensors, _ = load_tensors(data_file(f"pretrained/{weights}"))
        prefix = f"{part}."
        encoder.load_state_dict(
            {k[len(prefix) :]: v.float() for k, v in tensors.items() if k.startswith(prefix)}
        )
    return encoder
