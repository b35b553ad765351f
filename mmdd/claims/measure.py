"""Mechanisms that no record of a run can hold, measured on Scenes: one number per seed or student.

`python -m mmdd.claims FILE` writes them to the file that the page reads; sets that ship are read
from the folder `shown` beside it. Book: book/claims.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.manifold import TSNE
from torch import Tensor

from mmdd.batches import Batch, SetBatches, TextTable, inference
from mmdd.config import RunConfig
from mmdd.data.open import open_dataset
from mmdd.data.pairs import PairDataset
from mmdd.distill import METHODS, CovMatch
from mmdd.distill.loop import Context
from mmdd.encoders import DualEncoder, build_model
from mmdd.evaluation import train_student
from mmdd.presets import preset
from mmdd.runs import distill_run, initial_pairs, make_context, student_factory
from mmdd.statistics import streamed_statistics
from mmdd.synthetic import SyntheticPairs

SEEDS = (0, 1, 2)
STUDENTS = (0, 1, 2)
_CPU = torch.device("cpu")
_IMAGES = 200  # real images whose features are followed
_BATCH = 256  # pairs held at a time where all of them are gone over
RESET = 50  # iterations after which the tuned CovMatch puts its model back
# Iterations at which features are looked at; beyond `RESET` the model is left to go on.
STEPS = (*range(0, RESET, 5), *range(RESET, 301, 25))
MAPPED = 12  # test images whose captions are shown on a map

# Sets that ship: what `preset("small", **wishes)` made.
SETS = {
    "scenes-lors-49": {"method": "lors", "pairs": 49, "protocol": "image+text_head"},
    "scenes-covmatch-50": {"method": "covmatch", "pairs": 50, "protocol": "image+text_head"},
    "scenes-covmatch-both-50": {"method": "covmatch", "pairs": 50, "protocol": "both"},
}
# Measures of one set each, by name: the set that students are trained on.
CLUSTERED = {
    "clustering of captions, LoRS": "scenes-lors-49",
    "clustering of captions, CovMatch": "scenes-covmatch-50",
    "clustering of captions, CovMatch under both": "scenes-covmatch-both-50",
}
# What tells how far sets of different seeds are apart: cheap ones, under the protocols of those.
_CHEAP = [(m, p) for m in ("random", "moments") for p in ("image+text_head", "both")]


def covariance_rank(share: float = 0.99, seeds: tuple[int, ...] = SEEDS) -> list[float]:
    """Directions that hold `share` of the squared norm of the real cross-covariance, in percent.

    C is the cross-covariance of h_v and h_l, the pretrained features of all training pairs (one
    caption an image, drawn by the seed), (d_v, d_l); the answer is 100 · k / min(d_v, d_l) for the
    smallest k with Σ_{i≤k} σ_i² ≥ share · Σ σ_i². A matrix of equal singular values would give
    100 · share. Source: CovMatch (NeurIPS 2025), on why means have to be matched too.
    """
    config = _covmatch("heads")
    dataset, model = _dataset(), build_model(config.model)
    found = []
    for seed in seeds:
        context = _context(config, dataset, model, seed)
        images, choice = context.real.dataset.draw(
            context.real.split, len(context.real), np.random.default_rng(seed)
        )
        batches = (
            _features(model, context.real.take(images[i : i + _BATCH], choice[i : i + _BATCH]))
            for i in range(0, len(images), _BATCH)
        )
        covariance = streamed_statistics(batches).cross_covariance()
        found.append(100 * directions(covariance, share) / min(covariance.shape))
    return found


def directions(matrix: Tensor, share: float) -> int:
    """How many singular directions of a matrix (p, q) hold `share` of its squared norm."""
    squares = torch.linalg.svdvals(matrix) ** 2
    return int((squares.cumsum(0) < share * squares.sum()).sum()) + 1


@cache
def feature_drift(seed: int, last: int = STEPS[-1]) -> dict[str, list[float]]:
    """Cosine of features of the same real pairs with those of the start, at each of `STEPS`.

    CovMatch, protocol `both`, with its tuned settings but for the reset, which comes after `last`
    iterations; up to `RESET` that is the tuned run. The model is updated on real batches; h of the
    same 200 pairs is compared with h of the pretrained model, both centred at the mean of the
    latter, mean over pairs. 1 is what an argument with fixed features assumes.
    Source: CovMatch (NeurIPS 2025), linearised objective and Algorithm 1.

    Returns "image" and "text", one number for each of `STEPS` up to `last`.
    """
    config = _covmatch("both")
    settings = config.settings.model_copy(  # type: ignore[union-attr]
        update={"reset_every": max(last, 1)}
    )
    context = _context(config, _dataset(), build_model(config.model), seed)
    method = CovMatch(settings, context)  # type: ignore[arg-type]
    watched = context.real.draw(_IMAGES, np.random.default_rng(seed))
    start = _features(method.model, watched)
    found: dict[str, list[float]] = {"image": [], "text": []}
    for iteration in range(last + 1):
        if iteration in STEPS:
            now = _features(method.model, watched)
            for side, a, b in zip(found, start, now, strict=True):
                centre = a.mean(0)
                cosines = torch.cosine_similarity(a - centre, b - centre, dim=1)
                found[side].append(cosines.mean().item())
        if iteration < last:  # the next one would put the pretrained model back
            method.backward(iteration)
            method.after_step(iteration)
    return found


def feature_stability(encoder: str, seeds: tuple[int, ...] = SEEDS) -> list[float]:
    """`feature_drift` of an encoder, "image" or "text", between one reset and the next."""
    return [feature_drift(seed)[encoder][STEPS.index(RESET)] for seed in seeds]


def clustering(embeddings: Tensor, owner: np.ndarray) -> tuple[float, float]:
    """Mean cosine of two captions of one image, and of captions of two images.

    embeddings: (T, d); owner: (T,), the image of each. Every pair of captions counts once.
    """
    unit = F.normalize(embeddings.double(), dim=1)
    cosines = (unit @ unit.T).numpy()
    same = owner[:, None] == owner[None, :]
    pairs = np.triu(np.ones_like(same), k=1)
    return float(cosines[same & pairs].mean()), float(cosines[~same & pairs].mean())


@cache
def caption_embeddings(source: Path | RunConfig, name: str, student: int) -> Tensor:
    """Embeddings (T, d) of all test captions by a student of a set, trained as for a record.

    source: the folder with the sets that ship, and the name of one of them (`SETS`); or a run whose
    set is made anew (and any name).
    """
    if isinstance(source, Path):
        config = preset("small", **SETS[name])
        pairs = SyntheticPairs.load(source / f"{name}.safetensors")
    else:
        config, pairs = source, _made(source)
    template = build_model(config.model)
    model = student_factory(template, config.seed)(student)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(student)
        train_student(
            SetBatches(pairs, _CPU), model, config.protocol, config.evaluation, student, device=_CPU
        )
    table = TextTable(_dataset(), "test", template, config.protocol, _CPU)
    parts = []
    with inference(model):
        for rows in torch.arange(len(table.texts)).split(_BATCH):
            mask = None if table.mask is None else table.mask[rows]
            parts.append(model.embed_texts(table.texts[rows], mask))
    return torch.cat(parts)


def caption_clustering(source: Path | RunConfig, name: str) -> list[float]:
    """How much closer two captions of one image are than captions of two, by student of a set.

    The difference of the two cosines of `clustering` over all captions of the test split. source,
    name: see `caption_embeddings`. Source: CovMatch, presentation ("text embeddings corresponding
    to the same image": scattered after LoRS, clustered after CovMatch).
    """
    owner = _dataset().caption_table("test")[1]
    found = [clustering(caption_embeddings(source, name, s), owner) for s in STUDENTS]
    return [within - between for within, between in found]


def clustering_deviation() -> float:
    """Pooled standard deviation over three seeds of a set's mean `caption_clustering`.

    Of random pairs and of sets of `moments`, fifty pairs, under two protocols: sets that are made
    in seconds. It stands for that of the sets that ship, of which there is one seed each.
    """
    variances = []
    for method, protocol in _CHEAP:
        means = [np.mean(caption_clustering(c, "")) for c in _cheap(method, protocol)]
        variances.append(np.var(means, ddof=1))
    return float(np.sqrt(np.mean(variances)))


def caption_map(source: Path | RunConfig, name: str) -> list[list[float]]:
    """Places (x, y) of the captions of the first `MAPPED` test images by t-SNE, student 0."""
    shown = _dataset().caption_table("test")[1] < MAPPED
    rows = torch.from_numpy(np.flatnonzero(shown))
    unit = F.normalize(caption_embeddings(source, name, STUDENTS[0])[rows], dim=1)
    places = TSNE(metric="cosine", init="pca", perplexity=10, random_state=0).fit_transform(
        unit.numpy()
    )
    return [[round(float(v), 1) + 0.0 for v in place] for place in places]  # no -0.0


def cosines_of(source: Path | RunConfig, name: str) -> list[list[float]]:
    """`clustering` of the test captions: within, between, by student of a set."""
    owner = _dataset().caption_table("test")[1]
    found = [clustering(caption_embeddings(source, name, s), owner) for s in STUDENTS]
    return [[round(within, 4), round(between, 4)] for within, between in found]


def random_pairs() -> RunConfig:
    """The random pairs that the sets that ship began with, as a run of its own."""
    return _cheap("random", "image+text_head")[0]


def configurations() -> list[RunConfig]:
    """Every run that a measure goes by: its settings and its code decide what is measured."""
    shown = [preset("small", **wishes) for wishes in SETS.values()]
    cheap = [config for kind in _CHEAP for config in _cheap(*kind)]
    return [_covmatch("heads"), _covmatch("both"), *shown, *cheap]


@cache
def _cheap(method: str, protocol: str) -> tuple[RunConfig, ...]:
    return tuple(
        preset("small", method=method, pairs=50, protocol=protocol, seed=seed) for seed in SEEDS
    )


@cache
def _made(config: RunConfig) -> SyntheticPairs:
    model = build_model(config.model)
    start = initial_pairs(config, _dataset(), model)
    if config.method not in METHODS:
        return start
    quiet = config.model_copy(
        update={"runtime": config.runtime.model_copy(update={"progress": False})}
    )
    return distill_run(quiet, _dataset(), model, _CPU, start)[0]


@cache
def _covmatch(protocol: str) -> RunConfig:
    return preset("small", method="covmatch", pairs=20, protocol=protocol)


@cache
def _dataset() -> PairDataset:
    config = _covmatch("both")
    return open_dataset(config.dataset, config.runtime)


def _context(config: RunConfig, dataset: PairDataset, model: DualEncoder, seed: int) -> Context:
    config = config.model_copy(update={"seed": seed})
    start = initial_pairs(config, dataset, model)
    own = build_model(config.model)
    return make_context(config, dataset, own, _CPU, start)


def _features(model: DualEncoder, batch: Batch) -> tuple[Tensor, Tensor]:
    """Image and text features of a batch, (m, d_v) and (m, d_l), before the projections."""
    with inference(model):
        texts = batch.texts if batch.mask is None else model.text_features(batch.texts, batch.mask)
        return model.image_features(batch.images), texts


# By name, from the folder of the sets that ship. Those of `CLUSTERED` have a number a student of
# one set, the others a number a seed.
MEASURES: dict[str, Callable[[Path], list[float]]] = {
    "covariance rank (% of the dimension)": lambda shown: covariance_rank(),
    "cosine of image features": lambda shown: feature_stability("image"),
    "cosine of text features": lambda shown: feature_stability("text"),
} | {
    measure: (lambda shown, name=name: caption_clustering(shown, name))
    for measure, name in CLUSTERED.items()
}
