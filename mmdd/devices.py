"""What a device decides: how images lie, how float32 is multiplied, how numbers get there.

On the CPU none of this changes a bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmdd.errors import ConfigError

_Module = TypeVar("_Module", bound=nn.Module)


def channels_last(device: torch.device) -> bool:
    """Whether images and the weights of image encoders lie channels-last on a device.

    True on CUDA, whose tensor cores read convolutions in that order; in the other one cuDNN turns
    every activation around first. On the CPU the weights stay as they are, since another order adds
    up in another order and would change the bits of the records. Book: book/sweeps.
    """
    return device.type == "cuda"


def laid_out(images: Tensor) -> Tensor:
    """Images (m, 3, H, W) as convolutions on their device want them; the same numbers."""
    if not channels_last(images.device):
        return images
    return images.contiguous(memory_format=torch.channels_last)


def place(model: _Module, device: torch.device) -> _Module:
    """A model on a device, the weights of its image encoder laid out for it; changed in place."""
    model.to(device)
    if channels_last(device):
        encoder: Any = getattr(model, "image_encoder", model)  # torch's stubs lack the argument
        encoder.to(memory_format=torch.channels_last)
    return model


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; a GPU reads it from pinned memory while the host goes on.

    On the CPU it is the tensor itself.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def exact_float32() -> None:
    """Products of float32 numbers are float32 products, on GPUs too: no TF32.

    torch's own default allows TF32 (10 bits of 23) in convolutions. Book: book/sweeps.
    """
    _allow_tf32(False)


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """TF32 while it lasts if precision is "tf32"; exact float32 before, after and otherwise.

    Raises `ConfigError` for "tf32" where there is none. Book: book/sweeps.
    """
    if precision == "tf32" and device.type != "cuda":
        raise ConfigError(
            f"precision 'tf32' is a mode of NVIDIA GPUs, and this run is on {device.type}: choose "
            "'float32', or 'bfloat16'."
        )
    _allow_tf32(precision == "tf32")
    try:
        yield
    finally:
        _allow_tf32(False)


def _allow_tf32(allowed: bool) -> None:
    # torch has a newer way to say this, and refuses to answer when the two are mixed.
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
