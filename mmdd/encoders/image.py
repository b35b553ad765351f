"""Image encoders: pixels in, one feature vector per image out.

Any timm model without its classifier, and the CIFAR residual networks for small images. Batch
norm always uses its stored statistics, also while experts and students train: a synthetic batch
of a few images has statistics of its own, and an unrolled student must not change a buffer.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdd._torchvision import ensure_torchvision
from mmdd.encoders._weights import find_weights, fit_weights, read_weights
from mmdd.errors import ConfigError, DataError, DownloadError
from mmdd.mistakes import suggestion

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Blocks per stage n of the 6n+2 layer networks of He et al. 2016, section 4.2.
_CIFAR_BLOCKS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}


class ImageEncoderSpec(BaseModel):
    """Which image encoder to build, and where its weights come from.

    ``weights``: None for random weights drawn from ``seed``; "hub" for the pretrained weights
    that timm knows for ``name``; otherwise the path of a .safetensors or .pth file, or the name of
    a file in ``data/pretrained``. ``image_size`` in pixels, images are square.
    Book: notebooks/02_encoders_and_evaluation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["timm", "cifar_resnet", "scenes"]
    name: str
    weights: str | None = None
    image_size: int = Field(ge=8)
    seed: int = Field(default=0, ge=0)


class ImageEncoder(nn.Module, ABC):
    """Base of the image encoders: normalises pixels, then calls `features`.

    ``dim`` is the length d_v of the feature vector; ``mean`` and ``std`` are buffers of shape (3,).
    Batch-norm layers stay in evaluation mode whatever `train` is told; their scale and shift are
    trained like every other parameter.
    Book: notebooks/02_encoders_and_evaluation.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        dim: int,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.dim = dim
        # Constants of the architecture, not weights: kept out of the state dict.
        self.register_buffer("mean", torch.tensor(tuple(mean)), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)), persistent=False)

    @abstractmethod
    def features(self, normalized: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to features (B, dim)."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Features (B, dim) of images (B, 3, H, W), RGB, floating point in [0, 1].

        Values outside [0, 1] are allowed: synthetic images leave the range while they are learned.
        Raises `DataError` for another shape, or for integer pixels.
        Book: notebooks/02_encoders_and_evaluation.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise DataError(
                f"an image encoder takes floating-point pixels in [0, 1] of shape (B, 3, H, W), "
                f"not {pixels.dtype} of shape {tuple(pixels.shape)}: divide uint8 images by 255 "
                "and move the colour axis to place 1."
            )
        normalized = (pixels - self.mean[:, None, None]) / self.std[:, None, None]
        return self.features(normalized)  # (B, dim)

    def train(self, mode: bool = True) -> Self:
        """Set the training mode of every layer but batch norm, which keeps its statistics."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


class TimmImageEncoder(ImageEncoder):
    """A timm model without classifier: pooled features in front of it.

    Dropout and stochastic depth are switched off, since distilled sets are learned through a
    deterministic network. Normalisation is that of the model's own pretraining.
    ``nfnet_l0`` gives 2304 features, ``resnet50`` 2048, ``vit_base_patch16_224`` 768. Models built
    for one image size (vision transformers) are built for ``image_size`` instead.
    Convolutional networks can be differentiated twice; vision transformers with timm's fused
    attention cannot, on a CPU (set ``fused_attn = False`` on their attention layers: the forward
    and backward pass of ``vit_base_patch16_224`` then took 26 % longer at 224 px).
    Raises `ConfigError` for a name unknown to timm, an image size the model cannot take, or weights
    that do not fit; `DownloadError` when hub weights cannot be fetched.
    Book: notebooks/02_encoders_and_evaluation.
    """

    def __init__(
        self, name: str, image_size: int, weights: str | None = None, seed: int = 0
    ) -> None:
        timm = _import_timm()
        # timm checks the part before the dot only, and would fetch from anywhere after a colon.
        known = timm.list_models(pretrained=True) if "." in name else timm.list_models()
        if name not in known:
            near = suggestion(name, known, most=4)
            raise ConfigError(f"timm.list_models() has no image model called {name!r}{near or '.'}")
        network, arguments = _create_timm(name, image_size, seed)
        if weights == "hub":
            network = _download_timm(name, network.pretrained_cfg, arguments)
        elif weights is not None:
            _load_timm(network, name, weights)
        _switch_off_dropout(network)
        cfg = network.pretrained_cfg
        super().__init__(
            dim=_probe_dim(network, name, image_size),
            mean=cfg.get("mean") or IMAGENET_MEAN,
            std=cfg.get("std") or IMAGENET_STD,
        )
        self.network = network

    def features(self, normalized: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to pooled features (B, dim)."""
        return self.network(normalized)


def _import_timm() -> Any:
    ensure_torchvision()
    import timm

    return timm


def _create_timm(name: str, image_size: int, seed: int) -> tuple[Any, dict[str, Any]]:
    """A randomly initialised feature extractor, and the arguments that it needed."""
    timm = _import_timm()

    def create(arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return timm.create_model(name, num_classes=0, **arguments), arguments

    try:
        # Only models with positions take a size, and timm has no flag that tells which do.
        return create({"img_size": image_size})
    except TypeError as error:
        if "img_size" not in str(error):
            raise
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(_bad_size(name, image_size, error)) from error
    return create({})


def _bad_size(name: str, image_size: int, error: Exception) -> str:
    return (
        f"timm model {name!r} cannot take images of {image_size}x{image_size} px "
        f"({str(error)[:200]}): choose a size that suits its strides and patches."
    )


def _download_timm(name: str, cfg: dict[str, Any], arguments: dict[str, Any]) -> Any:
    timm = _import_timm()
    repository = cfg.get("hf_hub_id")
    if not repository and not cfg.get("url"):
        raise ConfigError(
            f"timm offers no pretrained weights for {name!r}: give a file, or weights=None."
        )
    try:
        with torch.random.fork_rng(devices=[]):
            return timm.create_model(name, num_classes=0, pretrained=True, **arguments)
    except Exception as error:
        # Whatever the HTTP stack raised; the reader needs to know how to go on without it.
        raise DownloadError(
            f"the pretrained weights of timm model {name!r} could not be fetched from the hub "
            f"({type(error).__name__}: {str(error)[:300]}). Check the network, or fetch them "
            f"elsewhere with `hf download {repository}` and give the path of the model.safetensors "
            "file as weights; weights=None builds the same network with random weights."
        ) from error


def _load_timm(network: Any, name: str, weights: str) -> None:
    timm = _import_timm()
    path = find_weights(weights)
    state = read_weights(path)
    # timm itself turns the key check off as soon as there is no classifier, so a half-empty file
    # would load in silence: apply its conversion of foreign checkpoints, then check every key.
    module = inspect.getmodule(timm.model_entrypoint(name))
    convert = getattr(module, "checkpoint_filter_fn", None)
    if convert is not None:
        state = convert(state, network)
    classifier = network.pretrained_cfg.get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    fit_weights(network, state, str(path), ignore=tuple(f"{n}." for n in names))


def _switch_off_dropout(network: Any) -> None:
    from timm.layers import DropPath

    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, DropPath):
            module.drop_prob = 0.0
        # Some models keep the rate as a number and call the functional form.
        if isinstance(getattr(module, "drop_rate", None), float):
            module.drop_rate = 0.0


def _probe_dim(network: nn.Module, name: str, image_size: int) -> int:
    """Length of the feature vector, read off one forward pass at the size that will be used."""
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            output = network(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(_bad_size(name, image_size, error)) from error
    network.train(was_training)
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise ConfigError(
            f"timm model {name!r} does not pool to one vector per image without its classifier: "
            "choose another model."
        )
    return output.shape[1]


class CifarResNet(ImageEncoder):
    """The CIFAR residual network of 6n+2 layers without its classifier: 64 features.

    Shortcuts have no parameters: where the shape changes, the input is subsampled and new channels
    are zero (option A). Works on images of 8 px and more; ``name`` is resnet20, 32, 44, 56 or 110.
    Names of the parameters are those of public checkpoints: conv1, bn1,
    layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}.
    Raises `ConfigError` for another name, or weights that do not fit.
    Source: He et al. 2016, section 4.2. Book: notebooks/02_encoders_and_evaluation.
    """

    def __init__(self, name: str = "resnet20", weights: str | None = None, seed: int = 0) -> None:
        if name not in _CIFAR_BLOCKS:
            raise ConfigError(
                f"no CIFAR residual network is called {name!r}: choose {', '.join(_CIFAR_BLOCKS)}."
            )
        super().__init__(dim=64)
        blocks = _CIFAR_BLOCKS[name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(16)
            self.layer1 = _stage(16, 16, blocks, stride=1)
            self.layer2 = _stage(16, 32, blocks, stride=2)
            self.layer3 = _stage(32, 64, blocks, stride=2)
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight)
        if weights == "hub":
            raise ConfigError(
                "CIFAR residual networks have no hub weights here: "
                "weights='cifar_resnet20.safetensors' takes the ones that ship in data/pretrained."
            )
        if weights is not None:
            path = find_weights(weights)
            fit_weights(self, read_weights(path), str(path), ignore=("linear.",))
        self.train(self.training)

    def features(self, normalized: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to globally pooled features (B, 64)."""
        x = F.relu(self.bn1(self.conv1(normalized)))  # (B, 16, H, W)
        x = self.layer3(self.layer2(self.layer1(x)))  # (B, 64, H/4, W/4)
        return x.mean(dim=(2, 3))  # (B, 64)


class _Block(nn.Module):
    """Two 3x3 convolutions around a shortcut that has no parameters."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.stride = stride
        self.new_channels = channels_out - channels_in

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.new_channels:
            # Half of the new channels in front, half behind: the order of the public checkpoints.
            before = self.new_channels // 2
            after = self.new_channels - before
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, after))
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


def _stage(channels_in: int, channels_out: int, blocks: int, stride: int) -> nn.Sequential:
    first = _Block(channels_in, channels_out, stride)
    return nn.Sequential(first, *(_Block(channels_out, channels_out, 1) for _ in range(blocks - 1)))


def build_image_encoder(spec: ImageEncoderSpec) -> ImageEncoder:
    """The image encoder that ``spec`` describes, on the CPU, in training mode (batch norm frozen).

    Raises `ConfigError` for an unknown name, an image size that does not suit the network, or
    weights that are missing or do not fit; `DownloadError` when hub weights cannot be fetched.
    Book: notebooks/02_encoders_and_evaluation.
    """
    if spec.kind == "timm":
        return TimmImageEncoder(spec.name, spec.image_size, spec.weights, spec.seed)
    if spec.kind == "cifar_resnet":
        return CifarResNet(spec.name, spec.weights, spec.seed)
    # Imported here because scenes builds on this module.
    from mmdd.encoders.scenes import build_scenes_encoder

    return build_scenes_encoder("image", spec.name, spec.weights, spec.seed)
