"""What became of the real pairs that a distilled set began with: pictures, texts, similarities.

The measures of the gallery. None of them says how good a set is; recall does
(`mmdd.evaluation`). A distilled text is a vector, so its neighbours are sought among the vectors
that the frozen text encoder gives for real captions, by cosine: students read texts through a
linear projection and a normalisation, to which the length of a vector is nothing.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from mmdd.batches import RealBatches, inference, real_pairs
from mmdd.data.pairs import PairDataset
from mmdd.data.scenes import Scene
from mmdd.encoders.dual import DualEncoder
from mmdd.errors import ArtefactError, ConfigError
from mmdd.evaluation import EvaluationConfig, train_student
from mmdd.protocols import Protocol
from mmdd.synthetic import SyntheticPairs

# The sets in results/shown: what `preset("small", **wishes)` makes, seed 0. All of one protocol
# start from the same random pairs; LoRS and RepBlend leave out the last for their similarity.
SHOWN: dict[str, dict[str, Any]] = {
    "scenes-covmatch-50": {"method": "covmatch", "pairs": 50, "protocol": "image+text_head"},
    "scenes-mdm-50": {
        "method": "mdm",
        "pairs": 50,
        "protocol": "image+text_head",
        "init": "random",
    },
    "scenes-lors-49": {"method": "lors", "pairs": 49, "protocol": "image+text_head"},
    "scenes-repblend-49": {"method": "repblend", "pairs": 49, "protocol": "image+text_head"},
    "scenes-moment-trajectory-50": {
        "method": "moment-trajectory",
        "pairs": 50,
        "protocol": "image+text_head",
    },
    "scenes-covmatch-both-50": {"method": "covmatch", "pairs": 50, "protocol": "both"},
}


def start_of(pairs: SyntheticPairs, dataset: PairDataset, model: DualEncoder) -> SyntheticPairs:
    """The real pairs that a set began with, rebuilt from its provenance, in its own form.

    Raises `ArtefactError` where the provenance names no pairs, or pairs of other data.
    Book: notebooks/15_gallery.
    """
    about = pairs.metadata
    if "source_images" not in about or "source_captions" not in about:
        raise ArtefactError("this set does not say which real pairs it began with.")
    if about.get("dataset_fingerprint") != dataset.fingerprint:
        raise ArtefactError(
            f"this set was made of data with fingerprint {about.get('dataset_fingerprint')}, not "
            f"of {dataset.name!r} ({dataset.fingerprint})."
        )
    images = np.asarray(about["source_images"], dtype=np.int64)
    choice = np.asarray(about["source_captions"], dtype=np.int64)
    return real_pairs(dataset, images, choice, model, about["protocol"])


@dataclass(frozen=True)
class Captions:
    """The distinct captions of a split as strings, and their unit vectors (T, d_l)."""

    texts: list[str]
    vectors: Tensor


def captions_of(dataset: PairDataset, model: DualEncoder, split: str = "train") -> Captions:
    """Every distinct caption of a split with its vector of the frozen text encoder, length 1.

    Book: notebooks/15_gallery.
    """
    texts = list(dict.fromkeys(dataset.caption_table(split)[0]))
    ids, mask = model.text_encoder.tokenize(texts)
    with inference(model):
        parts = [
            model.text_features(ids[i : i + 512], mask[i : i + 512])
            for i in range(0, len(texts), 512)
        ]
    return Captions(texts, F.normalize(torch.cat(parts), dim=1))


def text_vectors(pairs: SyntheticPairs, model: DualEncoder) -> Tensor:
    """(N, d_l) vectors of a set's texts; token embeddings pass the text encoder."""
    with inference(model):
        return model.text_features(pairs.texts, pairs.text_mask)


def nearest(queries: Tensor, candidates: Tensor, block: int = 1024) -> tuple[Tensor, Tensor]:
    """For each query (Q, d) the candidate (C, d) of the largest cosine: indices (Q,), cosines (Q,).

    Book: notebooks/15_gallery.
    """
    unit = F.normalize(candidates, dim=1)
    found = [
        (F.normalize(part, dim=1) @ unit.T).max(dim=1)  # (block, C)
        for part in queries.split(block)
    ]
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])


def evenness(assignment: Tensor, n: int) -> float:
    """How evenly items are shared out among n bins: exp(entropy) / n, in (0, 1].

    assignment: (T,) int64, the bin of each item. 1 is an even share, 1/n is all in one.
    """
    share = torch.bincount(assignment, minlength=n).double() / len(assignment)
    share = share[share > 0]
    return float(torch.exp(-(share * share.log()).sum()) / n)


def detail_share(images: Tensor) -> Tensor:
    """Share of each image's contrast that is finer than four pixels: (N, 3, H, W) → (N,).

    Power of the Fourier spectrum at more than a quarter of a cycle per pixel (half the Nyquist
    frequency, in any direction), over all power but that of the constant. White noise has about
    0.8 (its density is flat, and most of the square of frequencies lies outside that circle).
    Book: notebooks/15_gallery.
    """
    height, width = images.shape[-2:]
    power = torch.fft.fft2(images.double()).abs().square().sum(dim=1)  # (N, H, W)
    down = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    across = torch.fft.fftfreq(width, dtype=torch.float64)[None, :]
    radius = torch.sqrt(down.square() + across.square())
    power[:, 0, 0] = 0
    return power[:, radius > 0.25].sum(dim=1) / power.sum(dim=(1, 2)).clamp_min(1e-12)


def scene_facts(scene: Scene) -> set[tuple[str, ...]]:
    """What can be said of a scene: background, and shape, colour, both, size, texture of objects.

    Book: notebooks/15_gallery.
    """
    facts: set[tuple[str, ...]] = {("hue", scene.hue), ("pattern", scene.pattern)}
    for thing in scene.objects:
        facts |= {
            ("shape", thing.shape),
            ("colour", thing.colour),
            ("thing", thing.colour, thing.shape),
            ("shape and size", thing.size, thing.shape),
            ("shape and texture", thing.texture, thing.shape),
        }
    return facts


def scene_overlap(a: Scene, b: Scene) -> float:
    """How much two scenes have in common: facts of both over facts of either, in [0, 1].

    Places count for nothing, as most captions name none. Book: notebooks/15_gallery.
    """
    ours, theirs = scene_facts(a), scene_facts(b)
    return len(ours & theirs) / len(ours | theirs)


def matrix_correlation(
    a: np.ndarray, b: np.ndarray, permutations: int = 999, seed: int = 0
) -> tuple[float, float]:
    """Spearman's correlation of the off-diagonal entries of two (n, n) matrices, and its p-value.

    Entries of one row depend on each other, so p comes from renumbering the rows *and* columns of
    `b` alike (Mantel's test, two-sided): the share of renumberings that correlate as strongly.
    Raises `ConfigError` for matrices of different or unsuitable shapes. Book: notebooks/15_gallery.
    """
    if a.shape != b.shape or a.ndim != 2 or a.shape[0] != a.shape[1] or len(a) < 3:
        raise ConfigError(f"two (n, n) matrices with n ≥ 3, not {a.shape} and {b.shape}.")
    off = ~np.eye(len(a), dtype=bool)

    def ranked(matrix: np.ndarray) -> np.ndarray:
        ranks = np.zeros(matrix.shape)
        ranks[off] = pd.Series(matrix[off]).rank().to_numpy()
        ranks[off] -= ranks[off].mean()
        return ranks / np.sqrt((ranks**2).sum())

    ours, theirs = ranked(a), ranked(b)
    found = float((ours * theirs).sum())
    rng = np.random.default_rng(seed)
    as_strong = 0
    for _ in range(permutations):
        order = rng.permutation(len(a))
        as_strong += abs((ours * theirs[np.ix_(order, order)]).sum()) >= abs(found) - 1e-12
    return found, (as_strong + 1) / (permutations + 1)


def trained_reference(
    dataset: PairDataset, model: DualEncoder, epochs: int = 4, seed: int = 0
) -> DualEncoder:
    """`model` (changed in place) after some epochs of InfoNCE on all real pairs.

    A model for which both modalities have a common space, in which pairs can be looked at; it has
    seen none of the distilled sets. Book: notebooks/15_gallery.
    """
    model.reset_heads(seed)
    protocol: Protocol = "image+text_head"
    source = RealBatches(dataset, "train", model, protocol, torch.device("cpu"))
    config = EvaluationConfig(epochs=epochs, lr_image=0.003)
    trained = train_student(source, model, protocol, config, seed, device=torch.device("cpu"))
    return trained.requires_grad_(False)


def measure(
    pairs: SyntheticPairs,
    start: SyntheticPairs,
    captions: Captions,
    model: DualEncoder,
    reference: DualEncoder | None = None,
) -> dict[str, float]:
    """A set beside the real pairs that it began with, in numbers.

    model: with the frozen text encoder that the set was made with; reference: see
    `trained_reference`. Shares are in [0, 1], pixels in units of [0, 1]:

    pixel_change: root mean square; outside: share of pixel values outside [0, 1]; detail,
    detail_start: `detail_share`. text_cosine: of a text with its start; nearest_cosine: with the
    nearest real caption, nearest_other: of a *real* start with its nearest other caption, the
    scale for it; nearest_is_start: share of texts whose nearest caption is still the start's.
    among: mean cosine of two texts of the set, among_start. reached: mean over all real captions of
    the cosine with the set's nearest text, reached_start; evenness, evenness_start: `evenness` of
    that assignment. In the space of the reference: gap, gap_start: between the means of image and
    text embeddings; own, own_start: mean cosine of a pair's image and text; other, other_start: of
    an image and the texts of other pairs.

    Book: notebooks/15_gallery.
    """
    n = len(pairs)
    begin, end = text_vectors(start, model), text_vectors(pairs, model)
    words = captions.texts
    first, _ = nearest(begin, captions.vectors)
    found, cosine = nearest(end, captions.vectors)
    near = F.normalize(begin, dim=1) @ captions.vectors.T  # (N, T)
    near[torch.arange(n), first] = -1  # the caption itself
    values = {
        "pixel_change": (pairs.images - start.images).square().mean().sqrt().item(),
        "outside": ((pairs.images < 0) | (pairs.images > 1)).float().mean().item(),
        "detail": detail_share(pairs.images).mean().item(),
        "detail_start": detail_share(start.images).mean().item(),
        "text_cosine": F.cosine_similarity(begin, end).mean().item(),
        "nearest_cosine": cosine.mean().item(),
        "nearest_other": near.max(dim=1).values.mean().item(),
        "nearest_is_start": float(
            np.mean([words[i] == words[j] for i, j in zip(first, found, strict=True)])
        ),
    }
    for name, vectors in (("", end), ("_start", begin)):
        unit = F.normalize(vectors, dim=1)
        values[f"among{name}"] = ((unit @ unit.T).sum() - n).item() / (n * (n - 1))
        owner, reached = nearest(captions.vectors, unit)
        values[f"reached{name}"] = reached.mean().item()
        values[f"evenness{name}"] = evenness(owner, n)
    if reference is not None:
        with inference(reference):
            for name, members, vectors in (("", pairs, end), ("_start", start, begin)):
                z_image = reference.embed_images(members.images)
                z_text = reference.embed_texts(vectors)
                cosines = z_image @ z_text.T
                values[f"gap{name}"] = (z_image.mean(0) - z_text.mean(0)).norm().item()
                values[f"own{name}"] = cosines.diagonal().mean().item()
                values[f"other{name}"] = (cosines.sum() - cosines.trace()).item() / (n * (n - 1))
    return values
