"""From a dataset's configuration to the dataset."""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from mmdd.data.pairs import PairDataset
from mmdd.data.scenes import Scenes
from mmdd.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mmdd.config import DatasetConfig, RuntimeConfig

# The official split files of Flickr8k, by the split they list.
_FLICKR8K_SPLITS = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
_SCENES = {"train": 4000, "val": 300, "test": 300}


class _Options(TypedDict):
    on_error: Literal["raise", "drop"]
    progress: bool
    name: str


def open_dataset(config: "DatasetConfig", runtime: "RuntimeConfig") -> PairDataset:
    """Render the scenes, or read the files under `runtime.data`.

    For the reader "karpathy" that folder holds one `dataset_*.json` and the images, below it or in
    `Images` / `images`; for "coco" `annotations/captions_*.json` and an image folder per split (the
    test captions were never published: every second validation image becomes a test image); for
    "flickr8k" `captions.txt` or `Flickr8k.token.txt` and `Images`. Raises `ConfigError` without a
    folder, `DataError` when files are missing. Book: notebooks/01_data.
    """
    limits = {
        split: limit
        for split in ("train", "val", "test")
        if (limit := getattr(config, split)) is not None
    }
    if config.reader == "scenes":
        return _scenes(tuple((_SCENES | limits).items()), config.size, config.seed)
    if runtime.data is None:
        raise ConfigError(
            f"dataset {config.name!r} is read from disk: set runtime.data to its folder "
            "(`mmdd prepare` tells how to get one)."
        )
    dataset = _read(config, Path(runtime.data), runtime)
    if not limits:
        return dataset
    splits = {
        split: members[: limits.get(split, len(members))]
        for split, members in dataset.splits.items()
    }
    return PairDataset(
        dataset.images,
        dataset.captions,
        splits,
        name=dataset.name,
        fingerprint=f"{dataset.fingerprint}:{sorted(limits.items())}",
        metadata=dataset.metadata,
    )


@lru_cache(maxsize=2)
def _scenes(sizes: tuple[tuple[str, int], ...], size: int, seed: int) -> PairDataset:
    return Scenes.generate(dict(sizes), size, seed)


def _read(config: "DatasetConfig", folder: Path, runtime: "RuntimeConfig") -> PairDataset:
    from mmdd.data import readers

    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: it should hold the dataset {config.name!r}.")
    images = next((folder / n for n in ("Images", "images") if (folder / n).is_dir()), folder)
    options: _Options = {
        "on_error": runtime.on_error,
        "progress": runtime.progress,
        "name": config.name,
    }
    if config.reader == "karpathy":
        return readers.read_karpathy(
            _only(folder, "dataset_*.json"), images, config.size, **options
        )
    if config.reader == "coco":
        files = sorted((folder / "annotations").glob("captions_*.json"))
        if not files:
            raise DataError(f"no captions_*.json in {folder / 'annotations'}.")
        annotations = {"train" if "train" in file.name else "val": str(file) for file in files}
        return _with_test(readers.read_coco_captions(annotations, images, config.size, **options))
    captions = next(
        (
            folder / n
            for n in ("captions.txt", "captions.csv", "Flickr8k.token.txt")
            if (folder / n).exists()
        ),
        None,
    )
    if captions is None:
        raise DataError(f"neither captions.txt, captions.csv nor Flickr8k.token.txt in {folder}.")
    found = {split: folder / name for split, name in _FLICKR8K_SPLITS.items()}
    split_files = {split: file for split, file in found.items() if file.exists()}
    return readers.read_flickr8k(
        captions, images, config.size, split_files=split_files or None, **options
    )


def _with_test(dataset: PairDataset) -> PairDataset:
    if "test" in dataset.splits or "val" not in dataset.splits:
        return dataset
    held_out = dataset.splits["val"]
    return PairDataset(
        dataset.images,
        dataset.captions,
        dataset.splits | {"val": held_out[::2], "test": held_out[1::2]},
        name=dataset.name,
        fingerprint=f"{dataset.fingerprint}:half of val is test",
        metadata=dataset.metadata,
    )


def _only(folder: Path, pattern: str) -> Path:
    files = sorted(folder.glob(pattern))
    if len(files) != 1:
        raise DataError(f"expected one {pattern} in {folder}, found {len(files)}.")
    return files[0]
