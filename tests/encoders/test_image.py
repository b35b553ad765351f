"""Image encoders against plain re-implementations, timm itself, and damaged or foreign weights."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch.nn.modules.batchnorm import _BatchNorm

from mmdd._torchvision import ensure_torchvision
from mmdd.encoders.image import CifarResNet, ImageEncoderSpec, build_image_encoder
from mmdd.errors import ConfigError, DataError, DownloadError
from mmdd.paths import data_file

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])


def build(**changes):
    defaults = {"kind": "timm", "name": "test_nfnet", "image_size": 64}
    return build_image_encoder(ImageEncoderSpec(**{**defaults, **changes}))


def create_timm(name, **arguments):
    ensure_torchvision()
    import timm

    torch.manual_seed(1)
    return timm.create_model(name, **arguments).eval()


def images(count, size, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


# -- CIFAR ResNet ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cifar_tensors():
    """The shipped file as numbers, read without this package."""
    return {
        k: v.float()
        for k, v in load_file(data_file("pretrained/cifar_resnet20.safetensors")).items()
    }


def plain_resnet20(tensors, pixels):
    """The network of He et al. 2016, section 4.2, in float64: features (B, 64)."""
    t = {k: v.double() for k, v in tensors.items()}

    def batch_norm(x, name):
        scale = t[f"{name}.weight"] / (t[f"{name}.running_var"] + 1e-5).sqrt()
        shift = t[f"{name}.bias"] - t[f"{name}.running_mean"] * scale
        return x * scale[None, :, None, None] + shift[None, :, None, None]

    def convolve(x, name, stride):
        # As a matrix product over unfolded patches, to share nothing with the network under test.
        weight = t[f"{name}.weight"]
        patches = F.unfold(x, 3, padding=1, stride=stride)  # (B, 9C, positions)
        height = (x.shape[2] + stride - 1) // stride
        return (weight.flatten(1) @ patches).unflatten(2, (height, -1))

    x = (pixels.double() - IMAGENET_MEAN[:, None, None]) / IMAGENET_STD[:, None, None]
    x = batch_norm(convolve(x, "conv1", 1), "bn1").clamp(min=0)
    for stage in (1, 2, 3):
        for i in range(3):
            name = f"layer{stage}.{i}"
            stride = 2 if stage > 1 and i == 0 else 1
            y = batch_norm(convolve(x, f"{name}.conv1", stride), f"{name}.bn1").clamp(min=0)
            y = batch_norm(convolve(y, f"{name}.conv2", 1), f"{name}.bn2")
            if stride == 2:
                small = x[:, :, ::2, ::2]
                shortcut = torch.zeros_like(y)
                quarter = y.shape[1] // 4
                shortcut[:, quarter : quarter + small.shape[1]] = small
            else:
                shortcut = x
            x = (y + shortcut).clamp(min=0)
    return x.flatten(2).mean(dim=2)


@pytest.mark.parametrize("size", [32, 48, 37])
def test_shipped_resnet20_equals_a_plain_reimplementation(cifar_tensors, size):
    encoder = build(
        kind="cifar_resnet", name="resnet20", weights="cifar_resnet20.safetensors", image_size=size
    )
    pixels = images(4, size)
    expected = plain_resnet20(cifar_tensors, pixels)
    with torch.no_grad():
        features = encoder(pixels)
    assert encoder.dim == 64
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.double(), expected, rtol=1e-4, atol=1e-5)
    assert expected.std(dim=0).max() > 0.05  # the images are told apart, not all mapped alike


def test_shipped_resnet20_is_small_half_precision_and_tells_where_it_comes_from():
    path = data_file("pretrained/cifar_resnet20.safetensors")
    assert path.stat().st_size < 570_000
    tensors = load_file(path)
    is_batch_norm = {name: ".bn" in f".{name}" for name in tensors}
    assert {t.dtype for n, t in tensors.items() if is_batch_norm[n]} == {torch.float32}
    assert {t.dtype for n, t in tensors.items() if not is_batch_norm[n]} == {torch.float16}
    assert all(torch.isfinite(t).all() for t in tensors.values())
    licence = path.with_name("LICENSE.cifar_resnet20").read_text()
    assert "Yerlan Idelbayev" in licence
    assert "Redistributions in binary form" in licence
    assert b"BSD-2-Clause" in path.read_bytes()[:20_000]


def test_conversion_script_turns_a_public_style_checkpoint_into_the_shipped_file(
    cifar_tensors, tmp_path
):
    # The public checkpoint nests its tensors and comes from DataParallel, with batch counters.
    state = {f"module.{k}": v for k, v in cifar_tensors.items()}
    state["module.bn1.num_batches_tracked"] = torch.tensor(7)
    torch.save({"state_dict": state, "best_prec1": 91.73}, tmp_path / "resnet20.th")
    script = data_file("pretrained/convert_cifar_resnet.py")
    output = tmp_path / "made.safetensors"
    result = subprocess.run(
        [sys.executable, script, tmp_path / "resnet20.th", "--output", output],
        capture_output=True,
        text=True,
        check=True,
        cwd=script.parents[2],
        env={"PYTHONPATH": str(script.parents[2]), "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    assert output.read_bytes() == data_file("pretrained/cifar_resnet20.safetensors").read_bytes()
    assert "largest feature difference: 0\n" in result.stdout


def test_option_a_shortcut_has_no_parameters():
    count = {
        name: sum(p.numel() for p in CifarResNet(name).parameters())
        for name in ("resnet20", "resnet56")
    }

    # 3x3 convolutions of the paper's 16/32/64 widths and two batch-norm numbers per channel.
    def expected(n):
        convolutions = 9 * (3 * 16 + 2 * n * 16 * 16 + 16 * 32 + (2 * n - 1) * 32 * 32)
        convolutions += 9 * (32 * 64 + (2 * n - 1) * 64 * 64)
        return convolutions + 2 * (16 + 2 * n * (16 + 32 + 64))

    assert count == {"resnet20": expected(3), "resnet56": expected(9)}


def test_random_weights_follow_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for kind, name in (("cifar_resnet", "resnet20"), ("timm", "test_nfnet")):
        one, same, other = (build(kind=kind, name=name, seed=s) for s in (3, 3, 4))
        pixels = images(2, 64)
        one.eval(), same.eval(), other.eval()
        with torch.no_grad():
            torch.testing.assert_close(one(pixels), same(pixels), rtol=0, atol=0)
            assert not torch.allclose(one(pixels), other(pixels))
    assert torch.equal(before, torch.get_rng_state())


# -- base class ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), [("cifar_resnet", "resnet20"), ("timm", "resnet18")])
def test_batch_norm_keeps_its_statistics_while_everything_else_trains(kind, name):
    encoder = build(kind=kind, name=name)
    parent = torch.nn.Sequential(encoder, torch.nn.Dropout(0.5))
    parent.train()
    assert encoder.training
    assert parent[1].training
    norms = [m for m in encoder.modules() if isinstance(m, _BatchNorm)]
    assert norms
    assert not any(m.training for m in norms)
    statistics = [m.running_mean.clone() for m in norms]
    pixels = images(4, 64)
    features = encoder(pixels)
    torch.testing.assert_close(features[:2], encoder(pixels[:2]), rtol=1e-4, atol=1e-5)
    features.square().sum().backward()
    for norm, mean in zip(norms, statistics, strict=True):
        assert torch.equal(norm.running_mean, mean)
        assert norm.weight.requires_grad
    assert all(p.grad is not None for p in encoder.parameters())
    assert any(m.weight.grad.abs().max() > 0 for m in norms)


def test_pixels_are_normalised_inside_and_receive_gradients():
    encoder = build().eval()
    assert encoder.mean.shape == encoder.std.shape == (3,)
    assert encoder.mean.tolist() == encoder.std.tolist() == [0.5, 0.5, 0.5]
    network = create_timm("test_nfnet", num_classes=0)
    network.load_state_dict(encoder.network.state_dict())
    pixels = images(2, 64).requires_grad_()
    features = encoder(pixels)
    torch.testing.assert_close(features, network(2 * pixels - 1), rtol=1e-5, atol=1e-6)
    features.sum().backward()
    assert torch.isfinite(pixels.grad).all()
    assert pixels.grad.abs().max() > 0
    assert "mean" not in encoder.state_dict()


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(2, 64, 64, 3),
        torch.zeros(3, 64, 64),
        torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
    ],
)
def test_wrong_pixels_are_refused(pixels):
    with pytest.raises(DataError, match=r"\(B, 3, H, W\)"):
        build()(pixels)


# -- timm ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dim", "mean"),
    [
        ("nfnet_l0", 2304, 0.485),
        ("nf_resnet50", 2048, 0.485),
        ("nf_regnet_b1", 960, 0.485),
        ("resnet50", 2048, 0.485),
        ("regnety_002", 368, 0.485),
        ("vit_base_patch16_224", 768, 0.5),
        ("test_nfnet", 192, 0.5),
    ],
)
def test_timm_models_give_their_pooled_features(name, dim, mean):
    encoder = build(name=name).eval()
    assert encoder.dim == dim
    assert encoder.mean[0].item() == pytest.approx(mean)
    with torch.no_grad():
        features = encoder(images(1, 64))
    assert features.shape == (1, dim)
    assert torch.isfinite(features).all()


@pytest.mark.parametrize("name", ["ghostnet_050", "swin_tiny_patch4_window7_224"])
def test_dropout_and_stochastic_depth_are_off(name):
    # timm's own definitions have dropout 0.2 in the first, stochastic depth in the second.
    encoder = build(name=name, image_size=56).train()
    pixels = images(4, 56)
    with torch.no_grad():
        assert torch.equal(encoder(pixels), encoder(pixels))


@pytest.mark.parametrize("name", ["test_nfnet", "test_vit", "resnet18"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_timm_weights_with_a_classifier(name, suffix, tmp_path):
    whole = create_timm(name)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"model": whole.state_dict(), "epoch": 3}, path)
    else:
        save_file(whole.state_dict(), path)
    size = whole.pretrained_cfg["input_size"][-1]
    encoder = build(name=name, weights=str(path), image_size=size).eval()
    pixels = images(2, size)
    normalized = (pixels - encoder.mean[:, None, None]) / encoder.std[:, None, None]
    with torch.no_grad():
        expected = whole.forward_head(whole.forward_features(normalized), pre_logits=True)
        torch.testing.assert_close(encoder(pixels), expected, rtol=1e-5, atol=1e-6)


def test_vision_transformer_weights_are_resampled_to_the_image_size(tmp_path):
    save_file(create_timm("test_vit").state_dict(), tmp_path / "vit.safetensors")
    encoder = build(name="test_vit", weights=str(tmp_path / "vit.safetensors"), image_size=64)
    assert encoder.network.pos_embed.shape[1] == 1 + (64 // 16) ** 2
    assert encoder(images(1, 64)).shape == (1, encoder.dim)


@pytest.mark.parametrize("name", ["nfnet_l00", "nfnet_l0.not_a_tag", "hf-hub:timm/nfnet_l0"])
def test_unknown_timm_names_are_refused(name):
    with pytest.raises(ConfigError, match="no image model called"):
        build(name=name)
    if name == "nfnet_l00":
        with pytest.raises(ConfigError, match=r"did you mean 'nfnet_l0' or '"):
            build(name=name)


def test_image_size_that_leaves_no_patch_is_refused():
    with pytest.raises(ConfigError, match="cannot take images of 8x8 px"):
        build(name="test_vit", image_size=8)


# -- weights ---------------------------------------------------------------------------------------


def test_missing_file_names_both_places():
    with pytest.raises(ConfigError, match=r"nowhere\.safetensors.*data/pretrained"):
        build(weights="nowhere.safetensors")


def test_foreign_weights_name_file_and_keys(tmp_path):
    path = tmp_path / "resnet18.safetensors"
    save_file(create_timm("resnet18").state_dict(), path)
    with pytest.raises(ConfigError, match=r"(?s)resnet18\.safetensors.*missing \(.*unexpected \("):
        build(weights=str(path))
    with pytest.raises(ConfigError, match=r"of another shape \(layer1\.0\.conv1\.weight \(64, 64"):
        build(name="resnet50", weights=str(path))


def test_half_empty_weights_are_refused(tmp_path):
    state = create_timm("test_nfnet").state_dict()
    del state["stem.conv1.weight"]
    save_file(state, tmp_path / "half.safetensors")
    with pytest.raises(ConfigError, match=r"1 missing \(stem\.conv1\.weight\)"):
        build(weights=str(tmp_path / "half.safetensors"))


class _Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_weights_files_cannot_run_code(tmp_path):
    torch.save({"state_dict": _Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
    with pytest.raises(ConfigError, match="could run code"):
        build(weights=str(tmp_path / "trap.pth"))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["cut.safetensors", "junk.safetensors", "junk.pth", "empty.pth"])
def test_damaged_weights_are_reported(name, tmp_path):
    path = tmp_path / name
    whole = data_file("pretrained/cifar_resnet20.safetensors").read_bytes()
    path.write_bytes({"cut": whole[:5000], "junk": b"no weights " * 50, "empty": b""}[path.stem])
    with pytest.raises(ConfigError, match="cannot read weights from"):
        build(kind="cifar_resnet", name="resnet20", weights=str(path))


def test_hub_weights_without_a_network_say_how_to_go_on(monkeypatch, tmp_path):
    ensure_torchvision()
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DownloadError, match=r"hf download timm/test_nfnet\.r160_in1k"):
        build(weights="hub")


def test_models_without_hub_weights_say_so():
    with pytest.raises(ConfigError, match="offers no pretrained weights for 'nf_resnet26'"):
        build(name="nf_resnet26", weights="hub")
    with pytest.raises(ConfigError, match="no hub weights"):
        build(kind="cifar_resnet", name="resnet20", weights="hub")


# -- specification ---------------------------------------------------------------------------------


def test_specification_refuses_unknown_keys_and_is_frozen():
    with pytest.raises(ValidationError, match="pretrained"):
        ImageEncoderSpec(kind="timm", name="nfnet_l0", image_size=64, pretrained=True)
    spec = ImageEncoderSpec(kind="timm", name="nfnet_l0", image_size=64)
    with pytest.raises(ValidationError, match="frozen"):
        spec.name = "resnet50"
    assert ImageEncoderSpec.model_validate_json(spec.model_dump_json()) == spec


def test_wrong_names_of_the_other_kinds_are_refused():
    with pytest.raises(ConfigError, match="choose resnet20"):
        build(kind="cifar_resnet", name="resnet50")
    with pytest.raises(ConfigError, match="there are scenes-tiny"):
        build(kind="scenes", name="scenes-huge", image_size=32)


def test_scenes_encoder_is_built_through_the_same_door():
    encoder = build(kind="scenes", name="scenes-tiny", image_size=32)
    assert encoder(images(2, 32)).shape == (2, encoder.dim)


def test_importing_the_module_loads_neither_timm_nor_transformers():
    code = (
        "import sys, mmdd.encoders.image, mmdd.encoders.text;"
        "print([m for m in ('timm', 'transformers', 'torchvision') if m in sys.modules])"
    )
    root = data_file("pretrained/cifar_resnet20.safetensors").parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout.strip() == "[]"
