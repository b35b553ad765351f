"""The small encoders of Scenes: the shipped file, the script that made it, and the networks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor

from mmdd.data.scenes import Scenes
from mmdd.encoders.image import ImageEncoderSpec, build_image_encoder
from mmdd.encoders.scenes import (
    WEIGHTS,
    FixedStandardisation,
    ScenesImageEncoder,
    ScenesTextEncoder,
    WeightStandardisedConv2d,
    build_scenes_encoder,
)
from mmdd.encoders.text import TextEncoderSpec, build_text_encoder
from mmdd.errors import ConfigError
from mmdd.files import file_sha256, load_tensors, tensors_sha256
from mmdd.paths import data_file

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "data" / "pretrained" / "make_scenes_tiny.py"
# Of the tensors, by name: every result of the book with these encoders depends on them.
SHA256 = "f131777546158812f812e9eb43f0c38d7df4b2623917dad09a031666c135be1e"


@pytest.fixture(scope="module")
def image_encoder() -> ScenesImageEncoder:
    encoder = build_scenes_encoder("image", "scenes-tiny", WEIGHTS, 0)
    assert isinstance(encoder, ScenesImageEncoder)
    return encoder.eval()


@pytest.fixture(scope="module")
def text_encoder() -> ScenesTextEncoder:
    encoder = build_scenes_encoder("text", "scenes-tiny", WEIGHTS, 0)
    assert isinstance(encoder, ScenesTextEncoder)
    return encoder.eval()


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# -- the shipped file ------------------------------------------------------------------------------


def test_the_shipped_weights() -> None:
    path = data_file(f"pretrained/{WEIGHTS}")
    assert path.stat().st_size < 1_000_000
    tensors, header = load_tensors(path)
    assert tensors_sha256(tensors) == header["sha256"] == SHA256
    assert header["made_by"] == "data/pretrained/make_scenes_tiny.py"
    assert (ROOT / header["made_by"]).is_file()
    assert {name.split(".")[0] for name in tensors} == {"image", "text"}
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_every_tensor_is_used_once() -> None:
    with safe_open(data_file(f"pretrained/{WEIGHTS}"), framework="pt") as file:
        stored = set(file.keys())
    wanted = {
        f"{part}.{name}"
        for part, encoder in (("image", ScenesImageEncoder()), ("text", ScenesTextEncoder()))
        for name in encoder.state_dict()
    }
    assert stored == wanted


# The corpus is cut down: rendering and reading all of it takes most of the script's time.
RUN_SCRIPT = """
import importlib.util, sys

spec = importlib.util.spec_from_file_location("make", sys.argv[1])
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)
make.CORPUS = 300
sys.argv = ["make", "--image-steps", "3", "--text-steps", "3", "--output", sys.argv[2]]
make.main()
"""


@pytest.mark.slow
def test_the_script_gives_the_same_bytes_twice(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    outputs = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", RUN_SCRIPT, str(SCRIPT), str(output)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for output in outputs
    ]
    said = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert file_sha256(outputs[0]) == file_sha256(outputs[1])
    tensors, header = load_tensors(outputs[0])
    assert header["sha256"] == tensors_sha256(tensors)
    assert header["sha256"] in said[0]
    shipped, _ = load_tensors(data_file(f"pretrained/{WEIGHTS}"))
    assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in shipped.items()
    }
    weights = tensors["image.conv1.weight"].float()
    assert not torch.equal(weights, shipped["image.conv1.weight"].float())


# -- sizes and statistics --------------------------------------------------------------------------


def test_sizes(image_encoder: ScenesImageEncoder, text_encoder: ScenesTextEncoder) -> None:
    assert parameters(image_encoder) == 357_280 <= 1_000_000
    assert parameters(text_encoder) < 120_000
    assert (image_encoder.dim, text_encoder.dim, text_encoder.embedding_dim) == (128, 64, 64)
    assert text_encoder.max_length == 21


def test_features_are_standardised_on_the_corpus(
    image_encoder: ScenesImageEncoder, text_encoder: ScenesTextEncoder
) -> None:
    corpus = Scenes.generate({"pretrain": 1500})
    images = torch.from_numpy(corpus.images).permute(0, 3, 1, 2) / 255
    texts = [text for captions in corpus.captions for text in captions[:2]]
    ids, mask = text_encoder.tokenize(texts)
    with torch.no_grad():
        h_image = torch.cat([image_encoder(part) for part in images.split(500)])
        h_text = torch.cat(
            [text_encoder(i, m) for i, m in zip(ids.split(500), mask.split(500), strict=True)]
        )
    for h in (h_image, h_text):
        assert h.mean(dim=0).abs().max() < 0.12
        assert (h.std(dim=0) - 1).abs().max() < 0.1
        assert h.mean().abs() < 0.02


def test_features_of_other_splits_are_about_as_large(image_encoder: ScenesImageEncoder) -> None:
    images = torch.from_numpy(Scenes.generate({"train": 500}).images).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        h = image_encoder(images)
    assert 0.9 < h.std() < 1.1


# -- the networks ----------------------------------------------------------------------------------


def test_the_image_network_written_out(image_encoder: ScenesImageEncoder) -> None:
    state = {n: t.double() for n, t in image_encoder.state_dict().items()}
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x = (pixels.double() - 0.5) / 0.25
    for layer, padding in (("conv1", 2), ("conv2", 1), ("conv3", 1)):
        filters = []
        for w, gain in zip(state[f"{layer}.weight"], state[f"{layer}.gain"], strict=True):
            scale = (w.var(unbiased=False) * w.numel() + 1e-6).sqrt()
            filters.append(gain.item() * (w - w.mean()) / scale)
        x = F.conv2d(x, torch.stack(filters), state[f"{layer}.bias"], stride=2, padding=padding)
        x = x / (1 + torch.exp(-x))
    x = x.flatten(1) @ state["linear.weight"].T + state["linear.bias"]
    x = (x - state["standardise.mean"]) / state["standardise.deviation"]
    with torch.no_grad():
        torch.testing.assert_close(image_encoder(pixels).double(), x, rtol=1e-4, atol=1e-4)


def test_filters_have_no_mean_and_unit_norm() -> None:
    conv = WeightStandardisedConv2d(3, 5, 3, 1)
    with torch.no_grad():
        conv.weight.mul_(7.0).add_(3.0)
        conv.bias.zero_()
    flat = torch.full((1, 3, 9, 9), 0.4)
    # A constant picture has no contrast, and far from the border no response.
    assert conv(flat)[:, :, 1:-1, 1:-1].abs().max() < 1e-4
    impulse = torch.zeros(3, 3, 5, 5)
    impulse[[0, 1, 2], [0, 1, 2], 2, 2] = 1.0
    squares = conv(impulse).square().sum(dim=(0, 2, 3))
    torch.testing.assert_close(squares, torch.ones(5), rtol=1e-3, atol=0)


def test_an_image_does_not_depend_on_its_neighbours(image_encoder: ScenesImageEncoder) -> None:
    pixels = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together = image_encoder(pixels)
        alone = torch.cat([image_encoder(pixels[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(image_encoder.train()(pixels), image_encoder.eval()(pixels))


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (32, 48)])
def test_another_image_size_is_an_error(
    image_encoder: ScenesImageEncoder, size: tuple[int, int]
) -> None:
    named = rf"takes 32 × 32 pixels, not {size[0]} × {size[1]}.*size to 32"
    with pytest.raises(ConfigError, match=named):
        image_encoder(torch.rand(2, 3, *size))


def test_gradients_reach_the_pixels(image_encoder: ScenesImageEncoder) -> None:
    double = ScenesImageEncoder().double()
    double.load_state_dict(image_encoder.state_dict())
    pixels = torch.rand(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(128, dtype=torch.float64)
    (double(pixels) @ weights).sum().backward()
    step = 1e-5
    for place in ((0, 0, 3, 4), (0, 2, 16, 31)):
        moved = [pixels.detach().clone() for _ in range(2)]
        moved[0][place] += step
        moved[1][place] -= step
        with torch.no_grad():
            up, down = ((double(x) @ weights).sum().item() for x in moved)
        assert pixels.grad[place].item() == pytest.approx((up - down) / (2 * step), rel=1e-4)


# -- text ------------------------------------------------------------------------------------------


def test_tokenizing(text_encoder: ScenesTextEncoder) -> None:
    words = text_encoder.words
    assert [words[w] for w in ("[PAD]", "[UNK]", "[CLS]", "[MASK]")] == [0, 1, 2, 3]
    assert sorted(words.values()) == list(range(len(words)))
    texts = ["a red star", "A Red STAR", "a crimson star", "a star, a ring , a box", ""]
    ids, mask = text_encoder.tokenize(texts)
    assert ids.shape == mask.shape == (5, 21)
    assert ids.dtype == torch.int64
    assert mask.dtype == torch.bool
    assert ids[0, :5].tolist() == [2, words["a"], words["red"], words["star"], 0]
    assert torch.equal(ids[0], ids[1])
    assert ids[2, :4].tolist() == [2, words["a"], words["[UNK]"], words["star"]]
    comma = words[","]
    assert ids[3, :9].tolist() == [
        2, words["a"], words["star"], comma, words["a"], words["ring"], comma, words["a"],
        words["box"],
    ]  # fmt: skip
    assert mask.sum(dim=1).tolist() == [4, 4, 4, 9, 1]
    assert text_encoder.tokenize([])[0].shape == (0, 21)


def test_no_caption_of_scenes_is_cut_or_unknown(text_encoder: ScenesTextEncoder) -> None:
    captions = [c for texts in Scenes.generate({"test": 800}, size=8).captions for c in texts]
    ids, mask = text_encoder.tokenize(captions)
    assert (ids != text_encoder.words["[UNK]"]).all()
    assert mask.sum(dim=1).tolist() == [len(c.split()) + 1 for c in captions]
    long_ids, long_mask = text_encoder.tokenize(["a star " * 30])
    assert long_mask.all()
    assert long_ids.shape == (1, 21)


def test_padding_has_no_say(text_encoder: ScenesTextEncoder) -> None:
    texts = [
        "a red star",
        "a small dotted blue ring in the upper left corner on a plain grey ground",
    ]
    ids, mask = text_encoder.tokenize(texts)
    with torch.no_grad():
        together = text_encoder(ids, mask)
        for row in range(2):
            length = int(mask[row].sum())
            alone = text_encoder(ids[row : row + 1, :length], mask[row : row + 1, :length])
            torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)
        filled = ids.masked_fill(~mask, 7)
        torch.testing.assert_close(text_encoder(filled, mask), together, rtol=1e-4, atol=1e-5)


def test_the_text_network_is_bert_and_a_mean(text_encoder: ScenesTextEncoder) -> None:
    ids, mask = text_encoder.tokenize(["a red star above a blue ring", "a box"])
    with torch.no_grad():
        hidden = text_encoder.bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        rows = [h[m].mean(dim=0) for h, m in zip(hidden, mask, strict=True)]
        standardise = text_encoder.standardise
        expected = (torch.stack(rows) - standardise.mean) / standardise.deviation
        torch.testing.assert_close(text_encoder(ids, mask), expected, rtol=1e-4, atol=1e-5)
    table = text_encoder.bert.embeddings.word_embeddings.weight
    assert torch.equal(text_encoder.embed(ids), table[ids])
    frozen = {id(p) for p in text_encoder.input_embedding_parameters()}
    assert {n for n, p in text_encoder.named_parameters() if id(p) in frozen} == {
        n for n, _ in text_encoder.named_parameters() if ".embeddings." in n
    }


def test_synonyms_are_close(text_encoder: ScenesTextEncoder) -> None:
    """What the masked words taught: words that can stand for each other are alike."""

    def feature(text: str) -> Tensor:
        with torch.no_grad():
            return text_encoder(*text_encoder.tokenize([text]))[0]

    def distance(a: str, b: str) -> float:
        return float((feature(a) - feature(b)).norm())

    assert distance("a small red star", "a red star") < distance("a small red star", "a blue ring")
    other = distance("a red ring and a blue box", "a red heart and a blue box")
    assert distance("a red ring and a blue box", "a red hoop and a blue box") < 1.5 * other


def test_standardisation() -> None:
    layer = FixedStandardisation(3)
    h = torch.tensor([[1.0, 2.0, 3.0]])
    assert torch.equal(layer(h), h)
    layer.mean.copy_(torch.tensor([1.0, 0.0, 1.0]))
    layer.deviation.copy_(torch.tensor([1.0, 2.0, 4.0]))
    assert torch.equal(layer(h), torch.tensor([[0.0, 1.0, 0.5]]))
    assert list(layer.parameters()) == []
    assert set(layer.state_dict()) == {"mean", "deviation"}


# -- by name ---------------------------------------------------------------------------------------


def test_built_by_name(image_encoder: ScenesImageEncoder, text_encoder: ScenesTextEncoder) -> None:
    file = "scenes_tiny.safetensors"
    image = build_image_encoder(
        ImageEncoderSpec(kind="scenes", name="scenes-tiny", weights=file, image_size=32)
    )
    text = build_text_encoder(TextEncoderSpec(kind="scenes", name="scenes-tiny", weights=file))
    for built, loaded in ((image, image_encoder), (text, text_encoder)):
        state = loaded.state_dict()
        assert all(torch.equal(t, state[n]) for n, t in built.state_dict().items())


def test_random_weights_come_from_the_seed() -> None:
    def image(seed: int) -> Tensor:
        spec = ImageEncoderSpec(kind="scenes", name="scenes-tiny", image_size=32, seed=seed)
        return build_image_encoder(spec).conv1.weight

    def text(seed: int) -> Tensor:
        spec = TextEncoderSpec(kind="scenes", name="scenes-tiny", seed=seed)
        return build_text_encoder(spec).bert.embeddings.word_embeddings.weight

    before = torch.get_rng_state()
    for make in (image, text):
        assert torch.equal(make(1), make(1))
        assert not torch.equal(make(1), make(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_refused() -> None:
    for values in ({"name": "scenes-large"}, {"name": "scenes-tiny", "weights": "other.pth"}):
        with pytest.raises(ConfigError, match="there are scenes-tiny"):
            build_image_encoder(ImageEncoderSpec(kind="scenes", image_size=32, **values))
        with pytest.raises(ConfigError, match="there are scenes-tiny"):
            build_text_encoder(TextEncoderSpec(kind="scenes", **values))
    with pytest.raises(ValidationError, match="image_size"):
        ImageEncoderSpec(kind="scenes", name="scenes-tiny")
