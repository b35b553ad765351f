"""What a device decides, on a CPU that is told to do as a GPU does where that is possible."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mmdd import devices
from mmdd.devices import arithmetic, exact_float32, laid_out, place, upload
from mmdd.encoders import ModelConfig, build_model
from mmdd.errors import ConfigError
from mmdd.provenance import resolve_device

CPU = torch.device("cpu")


@pytest.fixture
def tf32() -> Iterator[Callable[[], tuple[bool, bool]]]:
    """tf32(): whether matrix products and convolutions may use TF32; put back afterwards."""
    flags = [(torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")]
    before = [getattr(*flag) for flag in flags]
    yield lambda: tuple(getattr(*flag) for flag in flags)  # type: ignore[return-value]
    for flag, value in zip(flags, before, strict=True):
        setattr(*flag, value)


def test_float32_is_float32_unless_asked(tf32: Callable[[], tuple[bool, bool]]) -> None:
    torch.backends.cudnn.allow_tf32 = True  # torch's own default
    resolve_device("cpu")
    assert tf32() == (False, False)
    with arithmetic("tf32", torch.device("cuda")):
        assert tf32() == (True, True)
    assert tf32() == (False, False)
    with pytest.raises(ZeroDivisionError), arithmetic("tf32", torch.device("cuda")):
        raise ZeroDivisionError
    assert tf32() == (False, False)
    for precision in ("float32", "bfloat16"):
        torch.backends.cudnn.allow_tf32 = True
        with arithmetic(precision, CPU):
            assert tf32() == (False, False)
    exact_float32()
    # torch answers only as long as nobody mixes its two ways to say this.
    assert torch.get_float32_matmul_precision() == "highest"


def test_tf32_is_refused_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="and this run is on cpu"), arithmetic("tf32", CPU):
        pass


def test_on_a_cpu_nothing_is_laid_out_anew() -> None:
    images = torch.rand(2, 3, 8, 8)
    assert laid_out(images) is images
    assert upload(images, CPU) is images
    model = build_model(ModelConfig(dim=4))
    strides = {name: p.stride() for name, p in model.named_parameters()}
    assert place(model, CPU) is model
    assert {name: p.stride() for name, p in model.named_parameters()} == strides


def test_on_a_gpu_images_and_their_encoder_are_channels_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert devices.channels_last(torch.device("cuda"))
    monkeypatch.setattr(devices, "channels_last", lambda device: True)
    images = torch.rand(2, 3, 8, 8)
    assert laid_out(images).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(laid_out(images), images)
    plain = build_model(ModelConfig(dim=4))
    placed = place(build_model(ModelConfig(dim=4)), CPU)
    wide = [p for p in placed.image_encoder.parameters() if p.ndim == 4]
    assert len(wide) > 2
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in wide)
    pixels = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(placed.image_features(pixels), plain.image_features(pixels))
    assert all(
        torch.equal(a, b) for a, b in zip(placed.parameters(), plain.parameters(), strict=True)
    )


def test_one_place_decides() -> None:
    """No other module names a memory format of the device's, or a switch of TF32."""
    package = Path(devices.__file__).parent
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name != "devices.py":
            assert "tf32 =" not in text, path
            assert "pin_memory" not in text or path.name == "snapshots.py", path
