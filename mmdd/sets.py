"""A distilled set as a file: what it says of itself, and what it is worth on a dataset."""

import math
from pathlib import Path
from typing import Any

from mmdd.config import RunConfig
from mmdd.data.open import open_dataset
from mmdd.files import file_sha256
from mmdd.presets import merge, preset
from mmdd.retrieval import chance_recall
from mmdd.runs import evaluate_pairs
from mmdd.similarity import LowRankSimilarity
from mmdd.synthetic import SyntheticPairs


def describe_file(path: str | Path) -> dict[str, Any]:
    """What a set's file holds, as JSON values; its checksum is verified.

    Keys: file, format, version, sha256 (of the content, as in the header), pairs, images and texts
    (shape of one), text ("vectors" or "tokens"), text_mask, similarity (kind, and rank and alpha of
    a low-rank one), num_bytes (see `SyntheticPairs.num_bytes`), outside (share of pixel values
    beyond black and white), learning_rates, metadata. Raises `ArtefactError` for an unusable file.
    Book: book/format.
    """
    path = Path(path)
    pairs, header = SyntheticPairs.load_with_header(path)
    similarity: dict[str, Any] = {"kind": "identity"}
    if pairs.similarity is not None:
        similarity = {"kind": pairs.similarity.kind}
    if isinstance(pairs.similarity, LowRankSimilarity):
        similarity |= {"rank": pairs.similarity.rank, "alpha": pairs.similarity.alpha}
    beyond = (pairs.images < 0) | (pairs.images > 1)
    return {
        "file": path.name,
        "format": header["format"],
        "version": header["version"],
        "sha256": header["sha256"],
        "pairs": len(pairs),
        "images": list(pairs.images.shape[1:]),
        "texts": list(pairs.texts.shape[1:]),
        "text": "vectors" if pairs.texts.ndim == 2 else "tokens",
        "text_mask": pairs.text_mask is not None,
        "similarity": similarity,
        "num_bytes": pairs.num_bytes(),
        "outside": round(beyond.float().mean().item(), 4),
        "learning_rates": pairs.learning_rates,
        "metadata": pairs.metadata,
    }


def config_for(
    pairs: SyntheticPairs,
    dataset: str | None = None,
    protocol: str | None = None,
    preset_name: str | None = None,
    wishes: dict[str, Any] | None = None,
) -> RunConfig:
    """The configuration under which a set is scored: what is not asked for, its metadata tell.

    dataset: "scenes", or the name of a dataset on disk, whose folder stands in
    wishes["runtime"]["data"]; by default the one that the set was made from. protocol: by default
    the set's own, and for a file without one `both` for token embeddings, else `image+text_head`.
    preset_name: by default "small" for Scenes and "photos" for everything else. wishes: as in
    `mmdd.presets.preset`; they win. Book: book/format.
    """
    about, wishes = pairs.metadata, wishes or {}
    dataset = dataset or (None if preset_name else about.get("dataset", "scenes"))
    preset_name = preset_name or ("small" if dataset == "scenes" else "photos")
    if dataset is not None:
        wishes = merge({"dataset": {"name": dataset}}, wishes)
        if dataset == "scenes":
            wishes = merge({"dataset": {"reader": "scenes"}}, wishes)
    from_texts = "both" if pairs.texts.ndim == 3 else "image+text_head"
    protocol = protocol or about.get("protocol", from_texts)
    # The method decides on nothing here: the set is there already.
    return preset(preset_name, **merge({"method": "random", "protocol": protocol}, wishes))


def score_file(path: str | Path, config: RunConfig) -> dict[str, Any]:
    """Train students on a saved set and score them; a report of JSON values.

    Keys: file, sha256 (of the file), pairs, made (what the set's metadata say), dataset (name,
    fingerprint, and whether the set was made from the same data), protocol, model, students (as
    `mmdd.evaluation.evaluate` gives them), mean and std (of the mean recall on test over students,
    n - 1; std is None for one student), chance. Raises `ArtefactError` for an unusable file.
    Book: book/format.
    """
    path = Path(path)
    pairs = SyntheticPairs.load(path)
    dataset = open_dataset(config.dataset, config.runtime)
    students = evaluate_pairs(pairs, dataset, config)
    about = pairs.metadata
    means = [student["test"]["mean"] for student in students]
    mean, std = mean_and_std(means)
    same = about.get("dataset_fingerprint") == dataset.fingerprint
    return {
        "file": path.name,
        "sha256": file_sha256(path),
        "pairs": len(pairs),
        "made": {key: about.get(key) for key in ("method", "dataset", "protocol", "licence")},
        "dataset": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "made_from_it": same,
        },
        "protocol": config.protocol,
        "model": (config.student or config.model).pair,
        "students": students,
        "mean": mean,
        "std": std,
        "chance": chance_recall(dataset.caption_table("test")[1])["mean"],
    }


def mean_and_std(values: list[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation (n - 1), which a single value does not have."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
