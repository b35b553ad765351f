"""More encoders of Scenes: the shipped files, the script that made them, and the networks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.nn.modules.batchnorm import _BatchNorm

from mmdd.data.scenes import Scenes
from mmdd.encoders import PAIRS, ModelConfig, build_model
from mmdd.encoders.image import ImageEncoder, ImageEncoderSpec, build_image_encoder
from mmdd.encoders.scenes import WEIGHTS, ScenesTextEncoder, build_scenes_encoder
from mmdd.encoders.scenes_more import ENCODERS, ScenesDistilText, ScenesResNet, ScenesViT
from mmdd.encoders.text import TextEncoderSpec, build_text_encoder
from mmdd.errors import ConfigError
from mmdd.files import file_sha256, load_tensors, tensors_sha256
from mmdd.paths import data_file

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "data" / "pretrained" / "make_scenes_more.py"
IMAGES, TEXT = ["scenes-resnet", "scenes-regnet", "scenes-vit"], "scenes-distil"
# Of the tensors, by name: every result of the book with these encoders depends on them.
SHA256 = {
    "scenes-resnet": "dabe5514465e2838b9372cdccc92bf75c0463fa33e769ffc3f67285061d3b4ad",
    "scenes-regnet": "97b734feb7d6ceff2417fd9ed1025fb1a4114043fa275f86226c503e0b516985",
    "scenes-vit": "b2467f9fe6c1be471933f7eea76a965efdb7b785c226a3eb14fb09e14f6bd330",
    "scenes-distil": "06ceff94295c2c90d1cf6ac2ce9c98a44f127f11fc288608faccca25f7ad3a55",
}
PARAMETERS = {
    "scenes-resnet": 212_720,
    "scenes-regnet": 139_544,
    "scenes-vit": 107_200,
    "scenes-distil": 57_344,
}


def file_of(name: str) -> str:
    return f"{name.replace('-', '_')}.safetensors"


@pytest.fixture(scope="module", params=IMAGES)
def image_encoder(request: pytest.FixtureRequest) -> ImageEncoder:
    return build_scenes_encoder("image", request.param, file_of(request.param), 0).eval()


@pytest.fixture(scope="module")
def text_encoder() -> ScenesTextEncoder:
    encoder = build_scenes_encoder("text", TEXT, file_of(TEXT), 0)
    assert isinstance(encoder, ScenesTextEncoder)
    return encoder.eval()


@pytest.fixture(scope="module")
def teacher() -> ScenesTextEncoder:
    encoder = build_scenes_encoder("text", "scenes-tiny", WEIGHTS, 0)
    assert isinstance(encoder, ScenesTextEncoder)
    return encoder.eval()


def build(name: str) -> nn.Module:
    return ENCODERS["text" if name == TEXT else "image"][name]()


# -- the shipped files -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*IMAGES, TEXT])
def test_the_shipped_weights(name: str) -> None:
    path = data_file(f"pretrained/{file_of(name)}")
    assert path.stat().st_size < 600_000
    tensors, header = load_tensors(path)
    assert tensors_sha256(tensors) == header["sha256"] == SHA256[name]
    assert header["made_by"] == "data/pretrained/make_scenes_more.py"
    assert (ROOT / header["made_by"]).is_file()
    part = "text" if name == TEXT else "image"
    assert set(tensors) == {f"{part}.{key}" for key in build(name).state_dict()}
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert sum(p.numel() for p in build(name).parameters()) == PARAMETERS[name]


def test_the_readme_names_every_file() -> None:
    readme = (ROOT / "data" / "pretrained" / "README.md").read_text(encoding="utf-8")
    for name, digest in SHA256.items():
        size = data_file(f"pretrained/{file_of(name)}").stat().st_size
        assert all(part in readme for part in (file_of(name), digest, f"{size:,}"))


# The corpus is cut down: rendering and reading all of it takes most of the script's time.
RUN_SCRIPT = """
import pathlib, sys

sys.path.insert(0, str(pathlib.Path(sys.argv[1]).parent))
import make_scenes_more as make

make.tiny.CORPUS = 300
sys.argv = ["make", *sys.argv[3:], "--steps", "3", "--folder", sys.argv[2]]
make.main()
"""


@pytest.mark.slow
def test_the_script_gives_the_same_bytes_twice(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", RUN_SCRIPT, str(SCRIPT), str(folder)],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    for name in (*IMAGES, TEXT):
        paths = [folder / file_of(name) for folder in folders]
        assert file_sha256(paths[0]) == file_sha256(paths[1])
        tensors, header = load_tensors(paths[0])
        assert header["sha256"] == tensors_sha256(tensors)
        assert header["sha256"] in done.stdout
        shipped, _ = load_tensors(data_file(f"pretrained/{file_of(name)}"))
        assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {
            n: (t.shape, t.dtype) for n, t in shipped.items()
        }
        # Three steps are not the shipped training.
        assert any(not torch.equal(tensor, shipped[n]) for n, tensor in tensors.items())


def test_the_script_refuses_an_unknown_name(tmp_path: Path) -> None:
    arguments = [sys.executable, str(SCRIPT), "scenes-lenet", "--folder", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "'scenes-lenet': there are scenes-resnet" in done.stderr


# -- statistics and neighbours ---------------------------------------------------------------------


def pixels_of(split: str, count: int) -> Tensor:
    corpus = Scenes.generate({split: count})
    return torch.from_numpy(corpus.images).permute(0, 3, 1, 2) / 255


@pytest.fixture(scope="module")
def corpus() -> Tensor:
    return pixels_of("pretrain", 1500)


def test_image_features_are_standardised_on_the_corpus(
    image_encoder: ImageEncoder, corpus: Tensor
) -> None:
    assert image_encoder.dim == 128
    with torch.no_grad():
        h = torch.cat([image_encoder(part) for part in corpus.split(500)])
        other = image_encoder(pixels_of("train", 300))
    assert h.shape == (1500, 128)
    assert h.mean(dim=0).abs().max() < 0.12
    assert (h.std(dim=0) - 1).abs().max() < 0.1
    assert h.mean().abs() < 0.02
    assert 0.85 < other.std() < 1.15


def test_text_features_are_standardised_on_the_corpus(text_encoder: ScenesTextEncoder) -> None:
    captions = Scenes.generate({"pretrain": 1500}, size=8).captions
    ids, mask = text_encoder.tokenize([text for texts in captions for text in texts[:2]])
    with torch.no_grad():
        h = torch.cat(
            [text_encoder(i, m) for i, m in zip(ids.split(500), mask.split(500), strict=True)]
        )
    assert h.shape[1] == text_encoder.dim == 64
    assert h.mean(dim=0).abs().max() < 0.12
    assert (h.std(dim=0) - 1).abs().max() < 0.1


def test_an_image_does_not_depend_on_its_neighbours(image_encoder: ImageEncoder) -> None:
    pixels = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together = image_encoder(pixels)
        alone = torch.cat([image_encoder(pixels[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", IMAGES)
def test_training_mode_changes_neither_output_nor_statistics(name: str) -> None:
    encoder = build_scenes_encoder("image", name, file_of(name), 0)  # as built: never told a mode
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    before = {n: b.clone() for n, b in encoder.named_buffers()}
    built, training = encoder(pixels), encoder.train()(pixels)
    assert torch.equal(built, training)
    assert torch.equal(training, encoder.eval()(pixels))
    assert all(torch.equal(b, before[n]) for n, b in encoder.named_buffers())
    norms = [m for m in encoder.modules() if isinstance(m, _BatchNorm)]
    assert bool(norms) == (name != "scenes-vit")


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (32, 48)])
def test_another_image_size_is_an_error(image_encoder: ImageEncoder, size: tuple[int, int]) -> None:
    named = rf"scenes-\w+ takes 32 × 32 pixels, not {size[0]} × {size[1]}.*size to 32"
    with pytest.raises(ConfigError, match=named):
        image_encoder(torch.rand(2, 3, *size))


def test_an_encoder_sees_where_things_are(image_encoder: ImageEncoder) -> None:
    """A picture and its mirror image hold the same things at other places."""
    pixels = pixels_of("test", 40)
    with torch.no_grad():
        h, mirrored = image_encoder(pixels), image_encoder(pixels.flip(-1))
    moved = (h - mirrored).norm(dim=1).mean()
    apart = (h - h.roll(1, dims=0)).norm(dim=1).mean()
    assert moved > 0.3 * apart


# -- the networks, written out ---------------------------------------------------------------------


def normalised(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    mean, variance = (state[f"{name}.running_{s}"][:, None, None] for s in ("mean", "var"))
    scale, shift = (state[f"{name}.{s}"][:, None, None] for s in ("weight", "bias"))
    return (x - mean) / (variance + 1e-5).sqrt() * scale + shift


def finished(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Mean per quadrant in the order channel, row, column; linear layer; standardisation."""
    middle = x.shape[-1] // 2
    halves = (slice(None, middle), slice(middle, None))
    cells = [x[:, :, r, c].mean(dim=(2, 3)) for r in halves for c in halves]
    h = torch.stack(cells, dim=2).flatten(1) @ state["linear.weight"].T + state["linear.bias"]
    return (h - state["standardise.mean"]) / state["standardise.deviation"]


def written_out(name: str, state: dict[str, Tensor], x: Tensor) -> Tensor:
    def conv(x: Tensor, layer: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = state[f"{layer}.0.weight"]
        padding = weight.shape[-1] // 2
        return normalised(
            F.conv2d(x, weight, None, stride, padding, 1, groups), state, f"{layer}.1"
        )

    x = conv(x, "trunk.0", stride=2).clamp(min=0)
    if name == "scenes-resnet":
        blocks = [(2, 1), (3, 2), (4, 2)]
    else:
        blocks = [(2, 2), (3, 1), (4, 2), (5, 1)]
    for number, stride in blocks:
        block = f"trunk.{number}"
        known = f"{block}.shortcut.0.weight" in state
        shortcut = conv(x, f"{block}.shortcut", stride) if known else x
        if name == "scenes-resnet":
            y = conv(x, f"{block}.branch.0", stride).clamp(min=0)
            y = conv(y, f"{block}.branch.2")
        else:
            y = conv(x, f"{block}.branch.0").clamp(min=0)
            y = conv(y, f"{block}.branch.2", stride, groups=y.shape[1] // 16).clamp(min=0)
            y = conv(y, f"{block}.branch.4")
        x = (y + shortcut).clamp(min=0)
    return finished(x, state)


def vit_written_out(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """One picture and one head at a time, (3, 32, 32) → (128,)."""

    def linear(h: Tensor, layer: str) -> Tensor:
        return h @ state[f"{layer}.weight"].T + state[f"{layer}.bias"]

    def norm(h: Tensor, layer: str) -> Tensor:
        centred = h - h.mean(dim=1, keepdim=True)
        unit = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
        return unit * state[f"{layer}.weight"] + state[f"{layer}.bias"]

    filters = state["trunk.embed.weight"].flatten(1)
    tokens = [
        filters @ x[:, r : r + 4, c : c + 4].flatten() + state["trunk.embed.bias"]
        for r in range(0, 32, 4)
        for c in range(0, 32, 4)
    ]
    h = torch.stack(tokens) + state["trunk.position"]  # (64, 64)
    for layer in ("trunk.layers.0", "trunk.layers.1"):
        q, k, v = linear(norm(h, f"{layer}.norm1"), f"{layer}.attention.qkv").split(64, dim=1)
        heads = []
        for i in range(4):
            part = slice(16 * i, 16 * i + 16)
            scores = (q[:, part] @ k[:, part].T / 4).exp()
            heads.append(scores / scores.sum(dim=1, keepdim=True) @ v[:, part])
        h = h + linear(torch.cat(heads, dim=1), f"{layer}.attention.out")
        hidden = linear(norm(h, f"{layer}.norm2"), f"{layer}.mlp.0")
        h = h + linear(hidden * (1 + torch.erf(hidden / 2**0.5)) / 2, f"{layer}.mlp.2")
    grid = norm(h, "trunk.norm").T.unflatten(1, (8, 8))
    return finished(grid[None], state)[0]


@pytest.mark.parametrize("name", IMAGES)
def test_the_network_written_out(name: str) -> None:
    encoder = build_scenes_encoder("image", name, file_of(name), 0)
    state = {n: t.double() for n, t in encoder.state_dict().items()}
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    x = (pixels - 0.5) / 0.25
    expected = (
        torch.stack([vit_written_out(state, image) for image in x])
        if name == "scenes-vit"
        else written_out(name, state, x)
    )
    with torch.no_grad():
        torch.testing.assert_close(encoder.double()(pixels), expected, rtol=1e-8, atol=1e-8)


# -- derivatives -----------------------------------------------------------------------------------


def scalar(encoder: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """A curved function of the features, as a loss is."""
    h = functional_call(encoder, {}, inputs)
    return (h.flatten() * torch.linspace(-1, 1, h.numel(), dtype=h.dtype)).sum() + h.pow(3).mean()


@pytest.fixture(params=[*IMAGES, TEXT])
def doubled(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor]:
    """An encoder in float64 without a frozen text table, an input, and a direction in its space."""
    name = request.param
    generator = torch.Generator().manual_seed(3)
    if name != TEXT:
        encoder = build_scenes_encoder("image", name, file_of(name), 0).double()
        x = torch.rand(2, 3, 32, 32, generator=generator, dtype=torch.float64)
        return encoder, x, torch.randn(x.shape, generator=generator, dtype=torch.float64)
    text = build_scenes_encoder("text", name, file_of(name), 0).double()
    ids, mask = text.tokenize(["a red star", "a box and a small blue ring"])
    embeddings = text.embed(ids).detach()

    class Encode(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = text

        def forward(self, x: Tensor) -> Tensor:
            return self.text.encode(x, mask)

    direction = torch.randn(embeddings.shape, generator=generator, dtype=torch.float64)
    return Encode(), embeddings, 0.1 * direction


def test_first_and_second_derivatives(doubled: tuple[nn.Module, Tensor, Tensor]) -> None:
    """By the input: against differences, reverse twice, and forward over reverse."""
    encoder, x, v = doubled
    step = 1e-6

    def value(x: Tensor) -> Tensor:
        return scalar(encoder, (x,))

    first = grad(value)
    slope = (first(x) * v).sum()
    with torch.no_grad():
        difference = (value(x + step * v) - value(x - step * v)) / (2 * step)
    assert slope.item() == pytest.approx(difference.item(), rel=1e-5)

    change = (first(x + step * v) - first(x - step * v)) / (2 * step)
    leaf = x.clone().requires_grad_()
    (once,) = torch.autograd.grad(value(leaf), leaf, create_graph=True)
    (twice,) = torch.autograd.grad((once * v).sum(), leaf)
    _, forward = jvp(first, (x,), (v,))
    scale = change.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(twice, change, rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(forward, twice, rtol=1e-8, atol=1e-10 * scale)


def test_the_gradient_of_a_gradient_step(doubled: tuple[nn.Module, Tensor, Tensor]) -> None:
    """By the input through the gradient of the parameters, as a trajectory needs it."""
    encoder, x, v = doubled
    trained = {n: p.detach() for n, p in encoder.named_parameters() if ".embeddings." not in n}
    generator = torch.Generator().manual_seed(4)
    direction = {
        n: torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.abs().mean()
        for n, p in trained.items()
    }

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        h = functional_call(encoder, parameters, (x,))
        return h.pow(3).mean() + (h[0] * h[1]).sum()

    def along(x: Tensor) -> Tensor:
        """⟨∂loss/∂θ, direction⟩, a scalar that depends on x."""
        gradient = grad(loss)(trained, x)
        return torch.stack([(gradient[n] * direction[n]).sum() for n in trained]).sum()

    leaf = x.clone().requires_grad_()
    (reverse,) = torch.autograd.grad(along(leaf), leaf)
    # The same number the cheaper way: the change of ∂loss/∂x along the direction.
    _, forward = jvp(lambda theta: grad(loss, argnums=1)(theta, x), (trained,), (direction,))
    step = 1e-6
    with torch.no_grad():
        difference = (along(x + step * v) - along(x - step * v)) / (2 * step)
    assert (reverse * v).sum().item() == pytest.approx(difference.item(), rel=1e-4)
    scale = reverse.abs().max().item()
    torch.testing.assert_close(forward, reverse, rtol=1e-7, atol=1e-9 * scale)


# -- text ------------------------------------------------------------------------------------------


def captions(count: int = 300) -> list[str]:
    texts = Scenes.generate({"test": count}, size=8).captions
    return [text for group in texts for text in group]


def test_tokens_are_those_of_the_teacher(
    text_encoder: ScenesTextEncoder, teacher: ScenesTextEncoder
) -> None:
    texts = [*captions(100), "", "a star, a crimson box", "a star " * 30]
    for ours, theirs in zip(text_encoder.tokenize(texts), teacher.tokenize(texts), strict=True):
        assert torch.equal(ours, theirs)
    ids, _ = teacher.tokenize(texts)
    assert torch.equal(text_encoder.embed(ids), teacher.embed(ids))
    kept = dict(teacher.bert.embeddings.named_parameters())
    for name, parameter in text_encoder.bert.embeddings.named_parameters():
        assert torch.equal(parameter, kept[name])


def test_padding_has_no_say(text_encoder: ScenesTextEncoder) -> None:
    texts = ["a red star", "a small dotted blue ring in the upper left corner on a plain ground"]
    ids, mask = text_encoder.tokenize(texts)
    with torch.no_grad():
        together = text_encoder(ids, mask)
        for row in range(2):
            length = int(mask[row].sum())
            alone = text_encoder(ids[row : row + 1, :length], mask[row : row + 1, :length])
            torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-4)
        filled = ids.masked_fill(~mask, 7)
        torch.testing.assert_close(text_encoder(filled, mask), together, rtol=1e-4, atol=1e-4)


def test_vectors_fit_those_of_the_teacher(
    text_encoder: ScenesTextEncoder, teacher: ScenesTextEncoder
) -> None:
    """On captions that neither saw: what was distilled for one can be put into the other."""
    ids, mask = teacher.tokenize(captions())
    with torch.no_grad():
        ours, theirs = text_encoder(ids, mask), teacher(ids, mask)
        one_layer = ScenesDistilText()
        one_layer.load_state_dict(teacher.state_dict(), strict=False)
        cut = one_layer(ids, mask)
    cosine = F.cosine_similarity(ours, theirs).mean()
    assert cosine > 0.9
    # Leaving the second layer out is not enough.
    assert cosine > F.cosine_similarity(cut, theirs).mean() + 0.1
    nearest = (F.normalize(ours, dim=1) @ F.normalize(theirs, dim=1).T).argmax(dim=1)
    same = (theirs[nearest] - theirs).norm(dim=1) < 1e-4  # a caption may come twice
    assert same.float().mean() > 0.9


def test_the_text_network_has_one_layer(text_encoder: ScenesTextEncoder) -> None:
    assert len(text_encoder.bert.encoder.layer) == 1
    ids, mask = text_encoder.tokenize(["a red star above a blue ring", "a box"])
    with torch.no_grad():
        embedded = text_encoder.bert.embeddings(input_ids=ids)
        rows = []
        for row, attended in zip(embedded, mask, strict=True):
            hidden = text_encoder.bert.encoder.layer[0](row[None, attended])
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            rows.append(hidden[0].mean(dim=0) if hidden.ndim == 3 else hidden.mean(dim=0))
        standardise = text_encoder.standardise
        expected = (torch.stack(rows) - standardise.mean) / standardise.deviation
        torch.testing.assert_close(text_encoder(ids, mask), expected, rtol=1e-4, atol=1e-4)


# -- by name ---------------------------------------------------------------------------------------


def test_random_weights_come_from_the_seed() -> None:
    def weights(name: str, seed: int) -> Tensor:
        encoder: nn.Module
        if name == TEXT:
            encoder = build_text_encoder(TextEncoderSpec(kind="scenes", name=name, seed=seed))
        else:
            spec = ImageEncoderSpec(kind="scenes", name=name, image_size=32, seed=seed)
            encoder = build_image_encoder(spec)
        return torch.cat([p.detach().flatten() for p in encoder.parameters()])

    before = torch.get_rng_state()
    for name in (*IMAGES, TEXT):
        assert torch.equal(weights(name, 1), weights(name, 1))
        assert not torch.equal(weights(name, 1), weights(name, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_eight_pairs() -> None:
    names = [name for name in PAIRS if name.startswith("scenes-")]
    expected = {f"{image}{text}" for image in ("scenes-tiny", *IMAGES) for text in ("", "-distil")}
    assert set(names) == expected
    kinds = set()
    for name in names:
        model = build_model(ModelConfig(pair=name), seed=1)
        kinds.add((type(model.image_encoder), type(model.text_encoder)))
        images, texts = torch.rand(2, 3, 32, 32), ["a red star", "a box"]
        with torch.no_grad():
            z_image, z_text = model(images, *model.text_encoder.tokenize(texts))
            z_vector = model.embed_texts(torch.randn(2, 64))
        assert z_image.shape == z_text.shape == z_vector.shape == (2, 128)
    assert len(kinds) == 8
    assert PAIRS["scenes-vit-distil"].image.name == "scenes-vit"
    assert PAIRS["scenes-tiny-distil"].text.weights == "scenes_distil.safetensors"
    assert isinstance(build_model(ModelConfig(pair="scenes-resnet")).image_encoder, ScenesResNet)
    assert isinstance(build_model(ModelConfig(pair="scenes-vit-distil")).image_encoder, ScenesViT)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="scenes-tiny, scenes-resnet, scenes-regnet, scenes-vit"):
        build_scenes_encoder("image", "scenes-lenet", None, 0)
    with pytest.raises(ConfigError, match="scenes-tiny, scenes-distil"):
        build_scenes_encoder("text", "scenes-vit", None, 0)
    with pytest.raises(ConfigError, match="those of their own file"):
        build_scenes_encoder("image", "scenes-vit", WEIGHTS, 0)
