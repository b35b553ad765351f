"""Distilled sets elsewhere: read back by libraries that know nothing of this project."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from mmdd.data.open import open_dataset
from mmdd.encoders import build_model
from mmdd.errors import ConfigError
from mmdd.export import (
    dataset_card,
    export_dataset,
    export_folder,
    export_tensors,
    export_test_split,
)
from mmdd.presets import preset
from mmdd.similarity import LowRankSimilarity
from mmdd.synthetic import SyntheticPairs


@pytest.fixture
def pairs() -> SyntheticPairs:
    generator = torch.Generator().manual_seed(0)
    similarity = LowRankSimilarity(3, rank=2, alpha=1.0)
    with torch.no_grad():
        similarity.right += torch.rand(3, 2, generator=generator)
    return SyntheticPairs(
        torch.rand(3, 3, 8, 6, generator=generator) * 1.5 - 0.25,  # beyond black and white
        torch.randn(3, 4, 5, generator=generator),
        text_mask=torch.tensor([[True] * 4, [True, True, False, False], [True] * 4]),
        similarity=similarity,
        learning_rates={"image": 0.25, "text_head": 0.5},
        metadata={
            "dataset": "scenes",
            "method": "lors",
            "protocol": "both",
            "licence": "MIT",
            "source_images": [7, 8, 9],
            "source_captions": [0, 1, 2],
        },
    )


def check_tensors(path: Path, pairs: SyntheticPairs) -> None:
    found = load_file(path)
    assert set(found) == {
        *("images", "texts", "text_mask", "similarity"),
        *("learning_rate.image", "learning_rate.text_head"),
    }
    assert torch.equal(found["images"], pairs.images)
    assert torch.equal(found["texts"], pairs.texts)
    assert pairs.text_mask is not None
    assert torch.equal(found["text_mask"], pairs.text_mask)
    assert pairs.similarity is not None
    assert torch.equal(found["similarity"], pairs.similarity.matrix())
    assert found["learning_rate.image"].item() == 0.25


def check_picture(path: Path, image: torch.Tensor) -> None:
    shown = np.asarray(Image.open(path)).astype(float) / 255
    expected = image.clamp(0, 1).permute(1, 2, 0).numpy()
    assert shown.shape == (8, 6, 3)
    assert np.abs(shown - expected).max() <= 0.5 / 255 + 1e-6


def test_plain_tensors(pairs: SyntheticPairs, tmp_path: Path) -> None:
    check_tensors(export_tensors(pairs, tmp_path / "a" / "x.safetensors"), pairs)
    bare = SyntheticPairs(pairs.images, pairs.texts[:, 0])
    assert set(load_file(export_tensors(bare, tmp_path / "y.safetensors"))) == {"images", "texts"}


def test_a_file_is_no_folder(pairs: SyntheticPairs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder: name the file"):
        export_tensors(pairs, tmp_path)


def test_no_file_is_written_over(pairs: SyntheticPairs, tmp_path: Path) -> None:
    """Least of all the set itself: plain tensors have none of its provenance."""
    path = tmp_path / "set.safetensors"
    pairs.save(path)
    before = path.read_bytes()
    config = preset("tiny", method="random", dataset={"train": 40, "val": 5, "test": 7})
    for export in (lambda: export_tensors(pairs, path), lambda: export_test_split(config, path)):
        with pytest.raises(ConfigError, match=r"set\.safetensors exists: choose another name"):
            export()
    assert path.read_bytes() == before


def test_a_folder(pairs: SyntheticPairs, tmp_path: Path) -> None:
    folder = export_folder(pairs, tmp_path / "deep" / "set")
    check_tensors(folder / "pairs.safetensors", pairs)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert [(r["pair"], r["source_image"], r["source_caption"]) for r in rows] == [
        (0, 7, 0),
        (1, 8, 1),
        (2, 9, 2),
    ]
    for row, image in zip(rows, pairs.images, strict=True):
        check_picture(folder / row["image"], image)
    assert os.listdir(tmp_path / "deep") == ["set"]


def test_a_dataset_with_its_card(pairs: SyntheticPairs, tmp_path: Path) -> None:
    """In the layout of `imagefolder`: pictures and metadata.jsonl in a split's folder."""
    folder = export_dataset(pairs, tmp_path / "set", name='A "small" set')
    rows = [
        json.loads(line) for line in (folder / "train" / "metadata.jsonl").read_text().splitlines()
    ]
    assert [row["file_name"] for row in rows] == ["000000.png", "000001.png", "000002.png"]
    for row, image in zip(rows, pairs.images, strict=True):
        check_picture(folder / "train" / row["file_name"], image)
        # float32 → decimal → float32 loses nothing.
        assert torch.equal(torch.tensor(row["text"]), pairs.texts[row["pair"]])
        assert pairs.text_mask is not None
        assert row["text_mask"] == pairs.text_mask[row["pair"]].tolist()
    check_tensors(folder / "pairs.safetensors", pairs)
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "mit"
    assert front["pretty_name"] == 'A "small" set'
    # One configuration, one split, of nothing but the pictures and their table.
    (config,) = front["configs"]
    assert config["data_files"] == [{"split": "train", "path": "train/**"}]
    kinds = {path.suffix for path in folder.glob("train/**/*") if path.is_file()}
    assert kinds == {".png", ".jsonl"}
    assert all(row.keys() == rows[0].keys() for row in rows)
    for fact in (
        "3 image–text pairs",
        "image 0.25, text_head 0.5",
        "8 × 6",
        "scenes by lors",
        "token embeddings",
        "low_rank",
    ):
        assert fact in card
    bare = dataset_card(SyntheticPairs(pairs.images, pairs.texts), "x")
    assert "an unnamed dataset by an unnamed method" in bare
    assert "license: other" in bare
    assert "learned with the set: none." in bare


@pytest.mark.parametrize(
    "words", [lambda folder: [folder], lambda folder: ["imagefolder", None, folder]]
)
def test_datasets_loads_it(
    pairs: SyntheticPairs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: Callable[[str], list[str | None]],
) -> None:
    """The library itself, by either of the two calls that are documented."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from datasets import load_dataset

    folder = export_dataset(pairs, tmp_path / "set")
    loaded = load_dataset(*words(str(folder)), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train"]
    rows = loaded["train"]
    assert len(rows) == len(pairs)
    assert pairs.text_mask is not None
    for row in rows:
        image = torch.from_numpy(np.asarray(row["image"]).astype(np.float32) / 255)
        expected = pairs.images[row["pair"]].clamp(0, 1).permute(1, 2, 0)
        assert (image - expected).abs().max() <= 0.5 / 255 + 1e-6
        assert torch.equal(torch.tensor(row["text"]), pairs.texts[row["pair"]])
        assert row["text_mask"] == pairs.text_mask[row["pair"]].tolist()
    assert sorted(rows["source_image"]) == [7, 8, 9]


@pytest.mark.parametrize("export", [export_folder, export_dataset])
def test_nothing_is_overwritten(pairs: SyntheticPairs, tmp_path: Path, export) -> None:
    (tmp_path / "set").mkdir()
    export(pairs, tmp_path / "set")  # an empty folder is as good as none
    before = sorted(p.name for p in (tmp_path / "set").iterdir())
    with pytest.raises(ConfigError, match="set exists and is not empty"):
        export(pairs, tmp_path / "set")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file exists"):
        export(pairs, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == before
    assert sorted(os.listdir(tmp_path)) == ["file", "set"]


def test_a_dataset_of_vectors(pairs: SyntheticPairs, tmp_path: Path) -> None:
    bare = SyntheticPairs(pairs.images, pairs.texts[:, 0])
    folder = export_dataset(bare, tmp_path / "set")
    lines = (folder / "train" / "metadata.jsonl").read_text().splitlines()
    texts = torch.tensor([json.loads(line)["text"] for line in lines])
    assert torch.equal(texts, bare.texts)
    assert "text_mask" not in json.loads(lines[0])


def test_the_test_split_as_plain_tensors(tmp_path: Path) -> None:
    """Against what the package itself scores on."""
    config = preset("tiny", method="random", dataset={"train": 40, "val": 5, "test": 7})
    found = load_file(export_test_split(config, tmp_path / "test.safetensors"))
    dataset = open_dataset(config.dataset, config.runtime)
    captions, owner = dataset.caption_table("test")
    model = build_model(config.model)
    with torch.no_grad():
        vectors = model.text_features(*model.text_encoder.tokenize(captions))
    assert found["texts"].shape == (len(captions), 64)
    torch.testing.assert_close(found["texts"], vectors)
    assert found["image_of_text"].tolist() == list(owner)
    images = np.array(dataset.images[dataset.indices("test")])
    assert torch.equal(found["images"], torch.from_numpy(images).permute(0, 3, 1, 2))
    with pytest.raises(ConfigError, match="is a folder: name the file"):
        export_test_split(config, tmp_path)
