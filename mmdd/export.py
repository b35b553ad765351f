"""Take a distilled set elsewhere: pictures with a table, a dataset folder, plain tensors."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from mmdd.batches import TextTable
from mmdd.config import RunConfig
from mmdd.data.open import open_dataset
from mmdd.encoders import build_model
from mmdd.errors import ConfigError
from mmdd.files import atomic_write, atomic_write_text
from mmdd.synthetic import SyntheticPairs

TENSORS = "pairs.safetensors"


def export_tensors(pairs: SyntheticPairs, path: str | Path) -> Path:
    """One .safetensors file of plain tensors that any training code can read without mmdd.

    Keys: images (N, 3, H, W) float32 in [0, 1] units, unclamped; texts (N, d) or (N, L, d);
    text_mask (N, L) bool where texts are tokens; similarity (N, N); learning_rate.<part> scalars.
    Raises `ConfigError` where `path` exists: it may be the set itself. Book: book/format.
    """
    path = _new_file(path)
    atomic_write(path, lambda temporary: save_file(_plain(pairs), temporary))
    return path


def export_test_split(config: RunConfig, path: str | Path) -> Path:
    """The test split that a set is scored on, as plain tensors in one .safetensors file.

    Keys: images (n, 3, H, W) uint8; texts (T, d) float32, the vectors of all captions by the frozen
    text encoder of `config`; image_of_text (T,) int64, the image that each belongs to. A split of
    photos holds the photos: it falls under their licence. Raises `ConfigError` where `path`
    exists. Book: book/format.
    """
    path = _new_file(path)
    dataset = open_dataset(config.dataset, config.runtime)
    model = build_model(config.student or config.model)
    # Vectors, whatever the protocol: code elsewhere brings no text encoder.
    table = TextTable(dataset, "test", model, "image+text_head", torch.device("cpu"))
    images = torch.from_numpy(np.array(dataset.images[dataset.indices("test")]))
    tensors = {
        "images": images.permute(0, 3, 1, 2).contiguous(),
        "texts": table.texts.float().contiguous(),
        "image_of_text": torch.from_numpy(np.asarray(table.image_of_text, dtype=np.int64)),
    }
    atomic_write(path, lambda temporary: save_file(tensors, temporary))
    return path


def export_folder(pairs: SyntheticPairs, folder: str | Path) -> Path:
    """A folder of PNG files, `pairs.jsonl` with a row for each pair, and `pairs.safetensors`.

    The pictures are what can be shown: clipped to [0, 1] and rounded to 8 bits. The tensors (see
    `export_tensors`) are exact. Raises `ConfigError` where the folder exists and is not empty.
    Book: book/format.
    """

    def fill(target: Path) -> None:
        names = _pictures(pairs, target / "images")
        rows = [_row(pairs, i) | {"image": f"images/{name}"} for i, name in enumerate(names)]
        _write_rows(target / "pairs.jsonl", rows)
        export_tensors(pairs, target / TENSORS)

    return _whole_folder(Path(folder), fill)


def export_dataset(
    pairs: SyntheticPairs, folder: str | Path, name: str = "distilled pairs"
) -> Path:
    """A folder that Hugging Face `datasets` loads, with a dataset card.

    `load_dataset(folder)`, or `load_dataset("imagefolder", data_dir=folder)`, gives for each pair
    its picture, its text (a vector, or a list of token embeddings with `text_mask`; as float32 the
    exact numbers) and where it began; the tensors lie beside them as `pairs.safetensors`. name: the
    card's title. Raises `ConfigError` where the folder exists and is not empty. Book: book/format.
    """

    def fill(target: Path) -> None:
        names = _pictures(pairs, target / "train")
        rows = [
            {"file_name": file} | _row(pairs, i) | _text(pairs, i) for i, file in enumerate(names)
        ]
        _write_rows(target / "train" / "metadata.jsonl", rows)
        export_tensors(pairs, target / TENSORS)
        atomic_write_text(target / "README.md", dataset_card(pairs, name))

    return _whole_folder(Path(folder), fill)


def dataset_card(pairs: SyntheticPairs, name: str) -> str:
    """The README.md of `export_dataset`: what the set is, where it is from, how to read it."""
    about = pairs.metadata
    kind = "vectors of a frozen text encoder" if pairs.texts.ndim == 2 else "token embeddings"
    similarity = "identity" if pairs.similarity is None else pairs.similarity.kind
    rates = ", ".join(f"{part} {rate:.4g}" for part, rate in pairs.learning_rates.items())
    licence = str(about.get("licence", "unknown"))
    known = {"MIT": "mit", "CC BY 4.0": "cc-by-4.0"}
    lines = [
        "---",
        f"pretty_name: {json.dumps(name)}",
        f"license: {known.get(licence, 'other')}",
        "tags: [dataset-distillation, image-text-retrieval]",
        f"size_categories: [{'n<1K' if len(pairs) < 1000 else '1K<n<10K'}]",
        # Only the pictures and their table: the tensors beside them are no split.
        "configs: [{config_name: default, data_files: [{split: train, path: train/**}]}]",
        "---",
        "",
        f"# {name}",
        "",
        f"{len(pairs)} image–text pairs of {pairs.images.shape[-2]} × {pairs.images.shape[-1]} "
        f"pixels, made from {about.get('dataset', 'an unnamed dataset')} by "
        f"{about.get('method', 'an unnamed method')} for the protocol "
        f"{about.get('protocol', 'unknown')}.",
        "",
        f"- Texts: {kind}, shape {tuple(pairs.texts.shape)}; they are no sentences.",
        f"- Similarity between images and texts: {similarity}.",
        f"- Learning rates learned with the set: {rates or 'none'}.",
        f"- Licence of the source data: {licence}.",
        f"- Fingerprint of the source data: {about.get('dataset_fingerprint', 'unknown')}.",
        "",
        "The pictures are clipped and rounded to 8 bits; `text` of a row is exact as float32. For",
        "training take the tensors:",
        "",
        "```python",
        "from datasets import load_dataset",
        "from safetensors.torch import load_file",
        "",
        'rows = load_dataset(".", split="train")  # image, text, where the pair began',
        f'pairs = load_file("{TENSORS}")  # images, texts and what else there is',
        "```",
        "",
    ]
    return "\n".join(lines)


def _plain(pairs: SyntheticPairs) -> dict[str, Tensor]:
    tensors = {"images": pairs.images, "texts": pairs.texts}
    if pairs.text_mask is not None:
        tensors["text_mask"] = pairs.text_mask
    if pairs.similarity is not None:
        tensors["similarity"] = pairs.similarity.matrix()
    for part, rate in pairs.learning_rates.items():
        tensors[f"learning_rate.{part}"] = pairs.images.new_tensor(rate)
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def _pictures(pairs: SyntheticPairs, folder: Path) -> list[str]:
    folder.mkdir(parents=True)
    shown = (pairs.images.detach().cpu().clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    names = [f"{i:06d}.png" for i in range(len(pairs))]
    for name, image in zip(names, shown.numpy().astype(np.uint8), strict=True):
        Image.fromarray(image).save(folder / name)
    return names


def _row(pairs: SyntheticPairs, i: int) -> dict[str, Any]:
    """What a table says of a pair: its number, and the real pair that it started from."""
    row: dict[str, Any] = {"pair": i}
    for key, column in (("source_images", "source_image"), ("source_captions", "source_caption")):
        if key in pairs.metadata:
            row[column] = pairs.metadata[key][i]
    return row


def _text(pairs: SyntheticPairs, i: int) -> dict[str, Any]:
    """The text of a pair in the fewest digits that give the same float32 again."""
    values = pairs.texts[i].detach().cpu().numpy()
    digits = [float(str(value)) for value in values.reshape(-1)]
    if values.ndim == 1:
        return {"text": digits}
    width = values.shape[1]
    tokens = [digits[at : at + width] for at in range(0, len(digits), width)]
    mask = pairs.text_mask
    counted = [True] * len(tokens) if mask is None else mask[i].tolist()
    return {"text": tokens, "text_mask": counted}


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _new_file(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name the file to write.")
    if path.exists():
        raise ConfigError(f"{path} exists: choose another name, or remove it first.")
    return path


def _whole_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Fill a folder beside `folder` and rename it, so that a half-written one is never seen."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty: choose another, or remove it first.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
    try:
        fill(part)
        part.chmod(0o755)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder
