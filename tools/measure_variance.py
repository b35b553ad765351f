"""Measure how much photos vary, as numbers for chapter 01: data/measured/variance.json.

python tools/measure_variance.py FOLDER    # with Flickr8k's listing and images
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from mmdd.data.open import open_dataset
from mmdd.data.scenes import Scenes
from mmdd.encoders import ModelConfig, build_model
from mmdd.files import atomic_write_text
from mmdd.presets import preset
from mmdd.variance import describe_pairs

TARGET = Path(__file__).resolve().parents[1] / "data" / "measured" / "variance.json"


def rounded(value: Any) -> Any:
    """The same nested dicts and lists with five digits."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 5) if isinstance(value, float) else value


def main(folder: str) -> None:
    torch.set_num_threads(1)
    config = preset("photos", dataset={"size": 32}, runtime={"data": folder, "progress": False})
    photos = open_dataset(config.dataset, config.runtime)
    scenes = Scenes.generate({"train": 1000})
    minilm = build_model(ModelConfig(pair="cifar-minilm"))
    tiny = build_model(ModelConfig(pair="scenes-tiny"))
    models = {"pixels": None, "scenes-tiny": tiny, "ResNet-20": minilm}
    record: dict[str, Any] = {"command": "python tools/measure_variance.py FOLDER", "sets": {}}
    for dataset in (photos, scenes):
        members = dataset.indices("train")
        found = describe_pairs(dataset, members, models, minilm)
        about = {"fingerprint": dataset.fingerprint, "images": len(members), "size": 32}
        record["sets"][dataset.name] = about | {"measures": rounded(found)}
    atomic_write_text(TARGET, json.dumps(record, indent=1) + "\n")
    print(f"measured: {', '.join(record['sets'])}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
