"""More small encoders of Scenes, for the question how a set fares with other architectures.

Three image encoders of other families than the CNN of `scenes-tiny`, and a text encoder of half its
layers that was distilled from it. Each is pretrained separately by
`data/pretrained/make_scenes_more.py`, on the corpus that scenes-tiny saw; the weights ship with the
project. All give vectors of the width of their counterpart in scenes-tiny, standardised by fixed
statistics of that corpus.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from mmdd.encoders.image import ImageEncoder
from mmdd.encoders.scenes import IMAGE_SIZE, FixedStandardisation, ScenesTextEncoder
from mmdd.errors import ConfigError

_DIM = 128


class _MoreImageEncoder(ImageEncoder):
    """(B, 3, 32, 32) pixels in [0, 1] → (B, 128): a trunk, its mean per quadrant, a linear layer.

    Scenes puts objects into 2 × 2 cells and captions name the cells: a mean over the whole picture
    would leave their places out.
    """

    name: str

    def __init__(self, trunk: nn.Module, channels: int) -> None:
        super().__init__(dim=_DIM, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        self.trunk = trunk
        self.linear = nn.Linear(4 * channels, _DIM)
        self.standardise = FixedStandardisation(_DIM)
        self.train(self.training)  # puts batch norm on its stored statistics

    def features(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            raise ConfigError(
                f"{self.name} takes {IMAGE_SIZE} × {IMAGE_SIZE} pixels, "
                f"not {x.shape[-2]} × {x.shape[-1]}: its last layer knows positions. "
                f"Set the dataset's size to {IMAGE_SIZE} or use another image encoder."
            )
        grid = self.trunk(x)  # (B, C, G, G)
        cells = grid.unflatten(-1, (2, -1)).unflatten(-3, (2, -1)).mean(dim=(-3, -1))
        return self.standardise(self.linear(cells.flatten(1)))  # (B, C, 2, 2) → (B, 128)


def _conv(
    channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution and batch norm, the grid divided by the stride."""
    conv = nn.Conv2d(
        channels_in, channels_out, kernel, stride, kernel // 2, groups=groups, bias=False
    )
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out))


class _Residual(nn.Module):
    """relu(branch(x) + x), with a 1 × 1 convolution on the way where the shape changes."""

    def __init__(self, branch: nn.Module, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        same = stride == 1 and channels_in == channels_out
        self.branch = branch
        self.shortcut = nn.Identity() if same else _conv(channels_in, channels_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


def _basic(channels_in: int, channels_out: int, stride: int) -> _Residual:
    branch = nn.Sequential(
        _conv(channels_in, channels_out, 3, stride),
        nn.ReLU(),
        _conv(channels_out, channels_out, 3),
    )
    return _Residual(branch, channels_in, channels_out, stride)


class ScenesResNet(_MoreImageEncoder):
    """(B, 3, 32, 32) pixels in [0, 1] → (B, 128): a strided stem and three residual blocks.

    0.21 M parameters; batch norm on stored statistics. Raises `ConfigError` for another size.
    Source: He et al. 2016 (basic blocks). Book: notebooks/13_cross_architecture.
    """

    name = "scenes-resnet"

    def __init__(self) -> None:
        trunk = nn.Sequential(
            _conv(3, 16, 3, 2),
            nn.ReLU(),  # (B, 16, 16, 16)
            _basic(16, 16, 1),
            _basic(16, 48, 2),  # (B, 48, 8, 8)
            _basic(48, 96, 2),  # (B, 96, 4, 4)
        )
        super().__init__(trunk, channels=96)


def _bottleneck(channels_in: int, channels_out: int, stride: int, width: int = 16) -> _Residual:
    """RegNet's X block: 1 × 1, grouped 3 × 3 with `width` channels a group, 1 × 1."""
    branch = nn.Sequential(
        _conv(channels_in, channels_out, 1),
        nn.ReLU(),
        _conv(channels_out, channels_out, 3, stride, groups=channels_out // width),
        nn.ReLU(),
        _conv(channels_out, channels_out, 1),
    )
    return _Residual(branch, channels_in, channels_out, stride)


class ScenesRegNet(_MoreImageEncoder):
    """(B, 3, 32, 32) pixels in [0, 1] → (B, 128): a strided stem and four grouped bottlenecks.

    0.14 M parameters; batch norm on stored statistics. Raises `ConfigError` for another size.
    Source: Radosavovic et al. 2020 (X blocks, no bottleneck ratio).
    Book: notebooks/13_cross_architecture.
    """

    name = "scenes-regnet"

    def __init__(self) -> None:
        trunk = nn.Sequential(
            _conv(3, 24, 3, 2),
            nn.ReLU(),  # (B, 24, 16, 16)
            _bottleneck(24, 48, 2),  # (B, 48, 8, 8)
            _bottleneck(48, 48, 1),
            _bottleneck(48, 96, 2),  # (B, 96, 4, 4)
            _bottleneck(96, 96, 1),
        )
        super().__init__(trunk, channels=96)


class _Attention(nn.Module):
    """Self-attention of a few heads, written out: fused kernels cannot be differentiated twice."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, L, 3, h, w/h)
        q, k, v = split.permute(2, 0, 3, 1, 4)  # each (B, h, L, w/h)
        weight = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, h, L, L)
        return self.out((weight @ v).transpose(1, 2).flatten(2))


class _Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Patches(nn.Module):
    """Transformer over square patches: (B, 3, H, W) → (B, w, H/p, W/p)."""

    def __init__(self, width: int, layers: int, heads: int, patch: int) -> None:
        super().__init__()
        side = IMAGE_SIZE // patch
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(0.02 * self.embed.weight.new_empty(side**2, width).normal_())
        self.layers = nn.Sequential(*(_Layer(width, heads, 2 * width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.embed(x)  # (B, w, G, G)
        tokens = grid.flatten(2).transpose(1, 2) + self.position  # (B, G², w)
        return self.norm(self.layers(tokens)).transpose(1, 2).unflatten(2, grid.shape[2:])


class ScenesViT(_MoreImageEncoder):
    """(B, 3, 32, 32) pixels in [0, 1] → (B, 128): a two-layer transformer over 4 × 4 patches.

    0.11 M parameters, no dropout; tokens are averaged per quadrant, there is no class token. Raises
    `ConfigError` for another size. Source: Dosovitskiy et al. 2021.
    Book: notebooks/13_cross_architecture.
    """

    name = "scenes-vit"

    def __init__(self) -> None:
        super().__init__(_Patches(width=64, layers=2, heads=4, patch=4), channels=64)


class ScenesDistilText(ScenesTextEncoder):
    """Captions of Scenes → (B, 64): the text encoder of scenes-tiny with one layer instead of two.

    Distilled from it, its embedding layer kept, so vectors made for one fit the other. Source: Sanh
    et al. 2019 (DistilBERT). Book: notebooks/13_cross_architecture.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bert.encoder.layer = self.bert.encoder.layer[:1]
        self.bert.config.num_hidden_layers = 1


ENCODERS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "image": {
        "scenes-resnet": ScenesResNet,
        "scenes-regnet": ScenesRegNet,
        "scenes-vit": ScenesViT,
    },
    "text": {"scenes-distil": ScenesDistilText},
}
