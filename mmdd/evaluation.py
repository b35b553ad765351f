"""The one honest evaluation: fresh students trained on a set under a named protocol, then scored.

A student's score is the one after its last epoch. Nothing is chosen on test data; the best of the
scores seen on the way is recorded beside it, only to show how much that would inflate it.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from tqdm.auto import tqdm

from mmdd import losses
from mmdd.batches import (
    RealBatches,
    SetBatches,
    TextTable,
    inference,
    pixels,
    steps_per_epoch,
)
from mmdd.data.pairs import PairDataset
from mmdd.encoders.dual import DualEncoder
from mmdd.errors import ConfigError, NonFiniteError
from mmdd.protocols import (
    Component,
    Protocol,
    by_component,
    component_rates,
    freeze_all_but,
    parameter_groups,
    text_is_tokens,
)
from mmdd.retrieval import chance_recall, recall_at_k
from mmdd.synthetic import SyntheticPairs


class EvaluationConfig(BaseModel):
    """How students are trained and how often they are looked at.

    SGD with momentum; the learning rates fall to a tenth after half of the epochs. lr_image and
    lr_text are those of the encoders, lr_heads that of the projections; `scores` is the number of
    evenly spaced looks at the test split that best-on-test is taken from, the last epoch included.
    Book: notebooks/02_encoders_and_evaluation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    students: int = Field(default=5, ge=1)
    epochs: int = Field(default=100, ge=1)
    batch_size: int = Field(default=128, ge=2)
    lr_image: float = Field(default=0.01, ge=0)
    lr_text: float = Field(default=0.01, ge=0)
    lr_heads: float = Field(default=0.1, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    loss: losses.LossName = "info_nce"
    temperature: float = Field(default=0.07, gt=0)
    use_learned_rates: bool = True
    scores: int = Field(default=10, ge=1)


class SplitScorer:
    """Scores models on one split; whatever does not depend on the student is computed once.

    block: images or texts that go through an encoder at a time; it changes no score.
    Book: notebooks/02_encoders_and_evaluation.
    """

    def __init__(
        self,
        dataset: PairDataset,
        split: str,
        model: DualEncoder,
        protocol: Protocol,
        device: torch.device,
        block: int | None = None,
    ) -> None:
        if block is None:  # on a CPU the activations of a block should stay in its cache
            block = 125 if device.type == "cpu" else 500
        self.table = TextTable(dataset, split, model, protocol, device, block)
        self.images = dataset.images[dataset.indices(split)]
        self.device, self.block = device, block
        self._image_features: list[Tensor] | None = None
        if protocol == "heads":  # frozen image features need one pass only
            with torch.no_grad():
                self._image_features = [
                    model.image_features(pixels(part, device)) for part in self._image_blocks()
                ]

    def _image_blocks(self) -> list[np.ndarray]:
        return [self.images[i : i + self.block] for i in range(0, len(self.images), self.block)]

    def score(self, model: DualEncoder) -> dict[str, float]:
        """Recall@1/5/10 in both directions and their mean, in percent."""
        with inference(model):
            if self._image_features is not None:
                z_image = [F.normalize(model.image_head(h), dim=-1) for h in self._image_features]
            else:
                z_image = [
                    model.embed_images(pixels(part, self.device)) for part in self._image_blocks()
                ]
            z_text = []
            for start in range(0, len(self.table.texts), self.block):
                rows = slice(start, start + self.block)
                mask = None if self.table.mask is None else self.table.mask[rows]
                z_text.append(model.embed_texts(self.table.texts[rows], mask))
        return recall_at_k(
            torch.cat(z_image).float(), torch.cat(z_text).float(), self.table.image_of_text
        )

    def chance(self) -> dict[str, float]:
        """The expected scores of a random ranking."""
        return chance_recall(self.table.image_of_text)


def train_student(
    source: RealBatches | SetBatches,
    model: DualEncoder,
    protocol: Protocol,
    config: EvaluationConfig,
    seed: int,
    *,
    device: torch.device,
    after_epoch: Callable[[int], None] | None = None,
    features: "FrozenFeatures | None" = None,
) -> DualEncoder:
    """Train `model` in place on real or distilled pairs; returns it.

    seed: order of the batches (the projections must already be drawn). after_epoch is called with
    the number of finished epochs. features: under `heads`, those that students share; computed
    here if not given. Batch-norm layers keep their running statistics. Raises `NonFiniteError`
    when the loss stops being finite. Book: notebooks/02_encoders_and_evaluation.
    """
    rates = _rates(source, config)
    trained = freeze_all_but(model, protocol)
    optimiser, schedule = _optimiser(trained, rates, config)
    model.train()
    if protocol != "heads":
        features = None
    elif features is None:
        features = FrozenFeatures(source, model, device)
    for epoch in range(config.epochs):
        seen = []
        for z_image, z_text, index in _embedded(source, model, features, config, seed, epoch):
            loss = losses.contrastive_loss(
                config.loss, z_image, z_text, config.temperature, _similarity(source, index)
            )
            seen.append(loss.detach())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        # Once an epoch, as the host waits for a GPU to read these.
        _require_finite(seen, seed, epoch, rates, trained)
        schedule.step()
        if after_epoch is not None:
            after_epoch(epoch + 1)
    return model


def _rates(source: RealBatches | SetBatches, config: EvaluationConfig) -> dict[Component, float]:
    learned: Mapping[str, float] = {}
    if isinstance(source, SetBatches) and config.use_learned_rates:
        learned = source.pairs.learning_rates
    return component_rates(config.lr_image, config.lr_text, config.lr_heads, learned)


def _optimiser(
    trained: dict[str, nn.Parameter], rates: Mapping[Component, float], config: EvaluationConfig
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.MultiStepLR]:
    optimiser = torch.optim.SGD(
        parameter_groups(trained, rates),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(
        optimiser, milestones=[max(1, config.epochs // 2)], gamma=0.1
    )
    return optimiser, schedule


def _similarity(source: RealBatches | SetBatches, index: Tensor) -> Tensor | None:
    """The distilled targets of a batch; None where a pair is like itself alone."""
    if isinstance(source, RealBatches) or source.pairs.similarity is None:
        return None
    return source.pairs.similarity.matrix(index).detach()


def _require_finite(
    seen: list[Tensor],
    seed: int,
    epoch: int,
    rates: Mapping[Component, float],
    trained: dict[str, nn.Parameter],
) -> None:
    """Raise for a loss of an epoch that is not finite, or for parameters that ended so."""
    ends = [torch.isfinite(p).all() for p in trained.values()]
    *found, good = torch.stack([*(t.double() for t in seen), torch.stack(ends).all()]).tolist()
    bad = [loss for loss in found if not math.isfinite(loss)]
    if bad:
        raise NonFiniteError(
            f"student {seed}: the loss is {bad[0]} in epoch {epoch + 1}: "
            f"lower the learning rates ({_listed(rates, trained)})."
        )
    if not good:  # by a gradient that is not finite, maybe after the last loss
        broken = [name for name, end in zip(trained, ends, strict=True) if not end]
        raise NonFiniteError(
            f"student {seed}: {broken[0]} is not finite after epoch {epoch + 1}: lower the "
            f"learning rates ({_listed(rates, trained)})."
        )


def _listed(rates: Mapping[Component, float], trained: dict[str, nn.Parameter]) -> str:
    return ", ".join(f"{part} {rates[part]:.3g}" for part in by_component(trained))


def _embedded(
    source: RealBatches | SetBatches,
    model: DualEncoder,
    features: "FrozenFeatures | None",
    config: EvaluationConfig,
    seed: int,
    epoch: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """An epoch's batches as the model sees them now: (m, d) of images, of texts, and the rows."""
    if features is not None:
        for h_image, h_text, index in features.batches(config.batch_size, seed, epoch):
            z_image = F.normalize(model.image_head(h_image), dim=-1)
            yield z_image, F.normalize(model.text_head(h_text), dim=-1), index
        return
    for batch in source.epoch(config.batch_size, seed, epoch):
        if len(batch.images) > 1:  # one pair alone has nothing to be told from
            z_image, z_text = model(batch.images, batch.texts, batch.mask)
            yield z_image, z_text, batch.index


class FrozenFeatures:
    """Under `heads` no encoder changes: features are computed once, and batches hold no image.

    Students with the same encoders may share them. Book: notebooks/02_encoders_and_evaluation.
    """

    def __init__(
        self, source: RealBatches | SetBatches, model: DualEncoder, device: torch.device
    ) -> None:
        self.model, self.source = model, source
        with torch.no_grad():
            if isinstance(source, SetBatches):
                self.image = model.image_features(source.pairs.images)
                return
            members = source.dataset.indices(source.split)
            self._row = torch.full((len(source.dataset),), -1, dtype=torch.int64)
            self._row[torch.from_numpy(members)] = torch.arange(len(members))
            self.image = torch.cat(
                [
                    model.image_features(pixels(source.dataset.images[part], device))
                    for part in np.array_split(members, max(1, len(members) // 500))
                ]
            )

    def batches(
        self, batch_size: int, seed: int, epoch: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The batches of `source.epoch` as features (m, d_v) and (m, d_l), and their index (m,)."""
        source = self.source
        if isinstance(source, SetBatches):
            for index in source.rows(batch_size, seed, epoch):
                if len(index) > 1:
                    mask = source.pairs.text_mask
                    mask = None if mask is None else mask[index]
                    with torch.no_grad():
                        h_text = self.model.text_features(source.pairs.texts[index], mask)
                    yield self.image[index], h_text, index
            return
        for images, choice in source.dataset.batches(source.split, batch_size, seed, epoch):
            if len(images) > 1:
                index = torch.from_numpy(images)
                rows = torch.from_numpy(source.table.rows(images, choice))
                place = self._row[index].to(self.image.device)
                yield self.image[place], source.table.texts[rows.to(self.image.device)], index


def evaluate(
    train_on: SyntheticPairs | PairDataset,
    dataset: PairDataset,
    make_model: Callable[[int], DualEncoder],
    protocol: Protocol,
    config: EvaluationConfig | None = None,
    *,
    seeds: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
    on_score: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Train one student per seed and score each on validation and test.

    train_on: a distilled set, or a dataset, whose whole train split is then used (the full-data
    reference). make_model(seed) builds a student with fresh projections. seeds: by default
    0 … students - 1. on_score is called with each finished student.

    Returns one dict per student: student_seed, test (scores after the last epoch), validation
    (likewise), best_on_test (scores at the best of `config.scores` looks, by mean), best_epoch,
    curve ([epoch, test mean] of every look), seconds (training only), steps.
    Book: notebooks/02_encoders_and_evaluation.
    """
    config = config or EvaluationConfig()
    device = torch.device(device)
    if (
        isinstance(train_on, SyntheticPairs)
        and text_is_tokens(protocol)
        and train_on.texts.ndim == 2
    ):
        raise ConfigError(
            f"protocol {protocol!r} trains the text encoder, but the texts of this set are vectors "
            "that enter past it: evaluate it under image+text_head, or distil token embeddings."
        )
    seeds = range(config.students) if seeds is None else seeds
    looks = {round(config.epochs * (i + 1) / config.scores) for i in range(config.scores)}
    reference = make_model(0).to(device)
    scorers = {
        split: SplitScorer(dataset, split, reference, protocol, device) for split in ("val", "test")
    }
    source: RealBatches | SetBatches = (
        SetBatches(train_on, device)
        if isinstance(train_on, SyntheticPairs)
        else RealBatches(train_on, "train", reference, protocol, device)
    )
    if len(source) < 2:
        raise ConfigError("one pair alone teaches nothing by contrast: evaluate at least two.")
    results: list[dict[str, Any]] = []
    bar = tqdm(
        total=len(seeds) * config.epochs, desc="students", unit="epoch", disable=not progress
    )
    # No student changes an encoder under `heads`: they share what those say of the set.
    reference.train()  # as they are when they are trained
    features = FrozenFeatures(source, reference, device) if protocol == "heads" else None
    for seed in seeds:
        model = make_model(seed).to(device)
        curve: list[tuple[int, dict[str, float]]] = []
        scoring = 0.0

        def look(epoch: int) -> None:
            nonlocal scoring
            bar.update()
            if epoch in looks:
                begin = time.perf_counter()
                curve.append((epoch, scorers["test"].score(model)))  # noqa: B023
                bar.set_postfix(student=seed, mean=f"{curve[-1][1]['mean']:.1f}")  # noqa: B023
                scoring += time.perf_counter() - begin

        begin = time.perf_counter()
        # Dropout, where a model has it, draws from the global generator.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            train_student(
                source,
                model,
                protocol,
                config,
                seed,
                device=device,
                after_epoch=look,
                features=features,
            )
        seconds = time.perf_counter() - begin - scoring
        best_epoch, best = max(curve, key=lambda point: point[1]["mean"])
        result = {
            "student_seed": int(seed),
            "test": curve[-1][1],
            "validation": scorers["val"].score(model),
            "best_on_test": best,
            "best_epoch": best_epoch,
            "curve": [[epoch, round(scores["mean"], 4)] for epoch, scores in curve],
            "seconds": round(seconds, 3),
            "steps": config.epochs * steps_per_epoch(len(source), config.batch_size),
        }
        results.append(result)
        if on_score is not None:
            on_score(result)
    bar.close()
    return results
