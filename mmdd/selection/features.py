"""What selections see of the data: features after a short warm-up, kept on the disk."""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmdd.batches import RealBatches, inference, pixels
from mmdd.disk import locked
from mmdd.encoders.dual import DualEncoder, code_behind
from mmdd.errors import ArtefactError, ConfigError, NonFiniteError
from mmdd.evaluation import EvaluationConfig, train_student
from mmdd.files import load_checked, save_checked
from mmdd.paths import cache_dir
from mmdd.protocols import Protocol
from mmdd.provenance import source_hash
from mmdd.selection.base import Candidates, Selection

log = logging.getLogger(__name__)

# Selections see images and texts in one way, whatever the protocol that the run is evaluated under.
PROTOCOL: Protocol = "image+text_head"
_SEEDS = 500_000  # the warm-up draws its batches and projections from seeds that no student has
_BLOCK = 500


@dataclass(frozen=True)
class Features:
    """Projected, L2-normalised features of all candidates, in their order.

    image, text: (n, d) float32; a feature that is zero stays zero.
    Book: notebooks/03_coresets.
    """

    image: np.ndarray
    text: np.ndarray

    @property
    def joint(self) -> np.ndarray:
        """Image and text side by side, (n, 2d); every row has norm √2.

        Source: MDM (CVPR 2026), supplement. Book: notebooks/03_coresets.
        """
        return np.concatenate([self.image, self.text], axis=1)


def features(candidates: Candidates) -> Features:
    """The features of all candidates under the warmed-up model; from the disk if they are there.

    Raises `ConfigError` where the candidates come without a model, `NonFiniteError` when the
    warm-up diverges. Source: MDM (CVPR 2026), supplement. Book: notebooks/03_coresets.
    """
    found = kept(candidates, __name__, lambda: _compute(candidates))
    return Features(found["image"].numpy(), found["text"].numpy())


def warm_up(
    candidates: Candidates,
    epochs: int,
    real: RealBatches | None = None,
    watch: Callable[..., None] | None = None,
) -> DualEncoder:
    """A copy of the candidates' model with fresh projections, trained on the train split.

    real: the batches to train on, by default of the dataset with random captions. watch: a forward
    hook while it trains. No epochs give the pretrained encoders with random projections. The
    candidates' own model stays as it is. Raises `NonFiniteError` when the loss stops being finite.
    Book: notebooks/03_coresets.
    """
    own, device = candidates.trainable()
    config, seed = candidates.config, _SEEDS + candidates.seed
    model = deepcopy(own)
    model.reset_heads(seed)
    if epochs == 0:
        return model.eval()
    if real is None:
        real = RealBatches(candidates.dataset, "train", model, PROTOCOL, device)
    students = EvaluationConfig(
        epochs=epochs,
        batch_size=config.batch_size,
        lr_image=config.lr_image,
        lr_heads=config.lr_heads,
        momentum=0.0,  # "SGD", says the source, and nothing of momentum or decay
        weight_decay=0.0,
        temperature=config.temperature,
    )
    watching = None if watch is None else model.register_forward_hook(watch)
    # Dropout, where a model has it, draws from the global generator.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            train_student(real, model, PROTOCOL, students, seed, device=device)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"the warm-up of a selection diverged: lower selection.lr_image "
                f"({config.lr_image}) or selection.lr_heads ({config.lr_heads}). {error}"
            ) from error
    if watching is not None:
        watching.remove()
    return model.eval()


def _compute(candidates: Candidates) -> dict[str, Tensor]:
    """The features of all candidates, by a warm-up of their own."""
    own, device = candidates.trainable()
    dataset = candidates.dataset
    images, choice = candidates.pairs
    # One pass of the text encoder for both: the warm-up does not train it.
    real = RealBatches(dataset, "train", own, PROTOCOL, device)
    model = warm_up(candidates, candidates.config.warm_up_epochs, real)
    rows = torch.from_numpy(real.table.rows(images, choice)).to(device)
    z_image, z_text = [], []
    with inference(model):
        for start in range(0, len(images), _BLOCK):
            part = slice(start, start + _BLOCK)
            z_image.append(model.embed_images(pixels(dataset.images[images[part]], device)))
            z_text.append(model.embed_texts(real.table.texts[rows[part]]))
    found = {"image": torch.cat(z_image).float().cpu(), "text": torch.cat(z_text).float().cpu()}
    if not all(torch.isfinite(values).all() for values in found.values()):
        raise NonFiniteError(
            "the features that a selection goes by are not finite: lower selection.lr_image "
            f"({candidates.config.lr_image}) or selection.lr_heads ({candidates.config.lr_heads})."
        )
    return found


def kept(
    candidates: Candidates, module: str, make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What `make` returns, or what it returned for the same candidates before, from the cache.

    module: whose code makes it. The seconds that the cache saves are added to the candidates'
    `saved_seconds`, so that a run's cost does not depend on who ran before. A damaged file is made
    again. Candidates that do not say what their model was built from are not cached.
    """
    if not candidates.model_config:
        return make()
    path = cache_dir() / "features" / f"{_key(candidates, module)}.safetensors"
    begin = time.perf_counter()
    with locked(Path(f"{path}.lock")):  # two runs of a sweep do not compute the same thing at once
        candidates.saved_seconds -= time.perf_counter() - begin  # waiting is no cost of the run
        try:
            found, header = load_checked(path)
            candidates.saved_seconds += header["seconds"]
            return found
        except ArtefactError as error:
            if path.exists():
                log.warning("%s It is made again.", error)
        begin = time.perf_counter()
        found = make()
        save_checked(path, found, {"seconds": time.perf_counter() - begin})
    return found


def pairs_of(candidates: Candidates, rows: np.ndarray) -> Selection:
    """The candidates at rows (N,) of their features."""
    images, choice = candidates.pairs
    return images[rows], choice[rows]


def check(rows: np.ndarray, pairs: int) -> None:
    """Refuse what no selection can choose from. Raises `ConfigError`."""
    if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.floating):
        raise ConfigError(
            f"features must be an (n, d) float array, not {rows.dtype} of shape {rows.shape}."
        )
    if not 1 <= pairs <= len(rows):
        raise ConfigError(f"cannot choose {pairs} of {len(rows)} rows.")
    broken = ~np.isfinite(rows).all(axis=1)
    if broken.any():
        raise ConfigError(
            f"{int(broken.sum())} rows of the features hold NaN or infinity, first row "
            f"{int(broken.argmax())}: the model that made them diverged."
        )


def _key(candidates: Candidates, module: str) -> str:
    """16 hex digits of all that decides a selection's features."""
    modules, entry = code_behind(candidates.model_config)
    identity = {
        "dataset": candidates.dataset.fingerprint,
        "model": candidates.model_config,
        "selection": candidates.config.model_dump(mode="json"),
        "seed": candidates.seed,
        "source_hash": source_hash(module, *modules, entries=(entry,)),
        "module": module,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
