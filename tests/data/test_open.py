"""From a configuration to a dataset: folders as their sources lay them out."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdd.config import DatasetConfig, RuntimeConfig
from mmdd.data.open import open_dataset
from mmdd.errors import ConfigError, DataError


def coco(root: Path, per_split: dict[str, int]) -> RuntimeConfig:
    """The official layout: annotations/captions_*.json and a folder of images per split."""
    number = 0
    for split, count in per_split.items():
        images, annotations = [], []
        for _ in range(count):
            name = f"{number:012d}.jpg"
            (root / split).mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / name)
            images.append({"id": number, "file_name": name})
            annotations += [{"image_id": number, "caption": f"{number} {i}"} for i in range(5)]
            number += 1
        path = root / "annotations" / f"captions_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return RuntimeConfig(data=str(root), progress=False)


def test_cocos_own_files_get_a_test_split(tmp_path: Path) -> None:
    """Its test captions were never published: half of the validation images take their place."""
    runtime = coco(tmp_path, {"train2014": 6, "val2014": 5})
    dataset = open_dataset(DatasetConfig(name="coco", reader="coco", size=16), runtime)
    assert dataset.indices("train").tolist() == [0, 1, 2, 3, 4, 5]
    assert dataset.indices("val").tolist() == [6, 8, 10]
    assert dataset.indices("test").tolist() == [7, 9]
    assert dataset.captions[7][0] == "7 0"
    assert "half of val is test" in dataset.fingerprint
    limited = DatasetConfig(name="coco", reader="coco", size=16, train=2, test=1)
    small = open_dataset(limited, runtime)
    assert [len(small.indices(s)) for s in ("train", "val", "test")] == [2, 3, 1]
    assert small.fingerprint != dataset.fingerprint


def test_scenes_need_no_folder() -> None:
    dataset = open_dataset(DatasetConfig(train=10, val=4, test=5), RuntimeConfig())
    assert [len(dataset.indices(s)) for s in ("train", "val", "test")] == [10, 4, 5]
    assert dataset.images.shape[1:] == (32, 32, 3)


def test_refusals(tmp_path: Path) -> None:
    config = DatasetConfig(name="mine", reader="karpathy")
    with pytest.raises(ConfigError, match=r"set runtime\.data"):
        open_dataset(config, RuntimeConfig())
    with pytest.raises(DataError, match="is not a folder"):
        open_dataset(config, RuntimeConfig(data=str(tmp_path / "none")))
    with pytest.raises(DataError, match=r"expected one dataset_\*\.json"):
        open_dataset(config, RuntimeConfig(data=str(tmp_path)))
    with pytest.raises(DataError, match="no captions_"):
        open_dataset(DatasetConfig(reader="coco"), RuntimeConfig(data=str(tmp_path)))
    with pytest.raises(DataError, match=r"neither captions\.txt"):
        open_dataset(DatasetConfig(reader="flickr8k"), RuntimeConfig(data=str(tmp_path)))
