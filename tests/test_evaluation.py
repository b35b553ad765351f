"""The evaluation against a plain training loop, and what its scores may and may not be."""

from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mmdd import losses
from mmdd.batches import RealBatches, SetBatches, real_pairs
from mmdd.data.pairs import PairDataset
from mmdd.data.scenes import Scenes
from mmdd.encoders import DualEncoder, ModelConfig, build_model
from mmdd.errors import ConfigError, DataError, NonFiniteError
from mmdd.evaluation import (
    EvaluationConfig,
    SplitScorer,
    evaluate,
    train_student,
)
from mmdd.retrieval import recall_at_k
from mmdd.selection import select
from mmdd.similarity import FullSimilarity
from mmdd.synthetic import SyntheticPairs

CPU = torch.device("cpu")
PROTOCOLS = ("both", "image+text_head", "heads")
FAST: dict[str, Any] = {
    "students": 1,
    "epochs": 4,
    "batch_size": 4,
    "lr_image": 0.003,
    "lr_text": 0.002,
    "lr_heads": 0.05,
    "scores": 2,
}
MakeSet = Callable[..., SyntheticPairs]


def config(**changes: Any) -> EvaluationConfig:
    return EvaluationConfig(**{**FAST, **changes})


@pytest.fixture(scope="module")
def scenes() -> PairDataset:
    return Scenes.generate({"train": 60, "val": 20, "test": 20})


@pytest.fixture(scope="module")
def template() -> DualEncoder:
    return build_model(ModelConfig(dim=12))


@pytest.fixture(scope="module")
def mlp_template() -> DualEncoder:
    return build_model(ModelConfig(dim=128, image_head="none", text_head="mlp"))


@pytest.fixture
def make_model(template: DualEncoder) -> Callable[[int], DualEncoder]:
    def make(seed: int) -> DualEncoder:
        model = deepcopy(template)
        model.reset_heads(seed)
        return model

    return make


@pytest.fixture
def make_set(scenes: PairDataset, template: DualEncoder) -> MakeSet:
    def make(protocol: str = "both", pairs: int = 7, **parts: Any) -> SyntheticPairs:
        images, choice = select("random", scenes, pairs, 3)
        real = real_pairs(scenes, images, choice, template, protocol)
        return SyntheticPairs(real.images, real.texts, text_mask=real.text_mask, **parts)

    return make


# -- training, plainly -----------------------------------------------------------------------------


def plain_loss(name: str, z_image: Tensor, z_text: Tensor, tau: float, target: Tensor) -> Tensor:
    scores = z_image @ z_text.T
    rows, columns = torch.softmax(scores / tau, 1), torch.softmax(scores / tau, 0)
    m = len(scores)
    if name in ("info_nce", "ence"):
        wanted = torch.eye(m) if name == "info_nce" else target
        return -(wanted * (rows.log() + columns.log())).sum() / (2 * m)
    p = torch.sigmoid(scores.double() / tau)
    terms = -target * p.log() - (1 - target) * (1 - p).log()
    if name == "bce":
        return terms.mean()
    positive = target > 0.5
    return (terms[positive].mean() + terms[~positive].mean()) / 2


def plain_training(
    model: DualEncoder,
    batches: list[list[tuple[Tensor, Tensor, Tensor | None, Tensor]]],
    rates: dict[str, float],
    frozen: tuple[str, ...],
    cfg: EvaluationConfig,
) -> DualEncoder:
    """SGD with momentum written out; batches: per epoch (images, texts, mask, target) each."""
    model = deepcopy(model).train()
    velocity: dict[str, Tensor] = {}
    for epoch, batch_list in enumerate(batches):
        for images, texts, mask, target in batch_list:
            model.zero_grad()
            z_image = model.image_head(model.image_encoder(images))
            if texts.ndim == 3:
                texts = model.text_encoder.encode(texts, mask)
            z_text = model.text_head(texts)
            z_image = z_image / z_image.norm(dim=1, keepdim=True)
            z_text = z_text / z_text.norm(dim=1, keepdim=True)
            plain_loss(cfg.loss, z_image, z_text, cfg.temperature, target).backward()
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if name.startswith(frozen) or p.grad is None:
                        continue
                    g = p.grad + cfg.weight_decay * p
                    velocity[name] = cfg.momentum * velocity.get(name, torch.zeros_like(p)) + g
                    lr = rates[name.split(".")[0]] * (0.1 if epoch >= cfg.epochs // 2 else 1)
                    p -= lr * velocity[name]
    return model


FROZEN = {
    "both": ("text_encoder.bert.embeddings",),
    "image+text_head": ("text_encoder",),
    "heads": ("text_encoder", "image_encoder"),
}


def rates_of(cfg: EvaluationConfig) -> dict[str, float]:
    return {
        "image_encoder": cfg.lr_image,
        "text_encoder": cfg.lr_text,
        "image_head": cfg.lr_heads,
        "text_head": cfg.lr_heads,
    }


def assert_same_parameters(a: DualEncoder, b: DualEncoder, atol: float = 2e-6) -> None:
    others = dict(b.named_parameters())
    for name, p in a.named_parameters():
        torch.testing.assert_close(p, others[name], rtol=1e-4, atol=atol, msg=name)


def set_batches(pairs: SyntheticPairs, cfg: EvaluationConfig, seed: int) -> list[list[Any]]:
    full = torch.eye(len(pairs)) if pairs.similarity is None else pairs.similarity.matrix().detach()
    epochs = []
    for epoch in range(cfg.epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(pairs)).tolist()
        parts = [order[i : i + cfg.batch_size] for i in range(0, len(order), cfg.batch_size)]
        epochs.append(
            [
                (
                    pairs.images[part],
                    pairs.texts[part],
                    None if pairs.text_mask is None else pairs.text_mask[part],
                    torch.stack([torch.stack([full[i, j] for j in part]) for i in part]),
                )
                for part in parts
                if len(part) > 1
            ]
        )
    return epochs


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_training_on_a_set(
    make_set: MakeSet, make_model: Callable[[int], DualEncoder], protocol: str
) -> None:
    cfg, pairs = config(), make_set(protocol)
    expected = plain_training(
        make_model(5), set_batches(pairs, cfg, 5), rates_of(cfg), FROZEN[protocol], cfg
    )
    student = train_student(SetBatches(pairs, CPU), make_model(5), protocol, cfg, 5, device=CPU)
    assert_same_parameters(student, expected)
    assert not torch.equal(student.text_head.weight, make_model(5).text_head.weight)


@pytest.mark.parametrize("loss", ["info_nce", "ence", "bce", "wbce"])
def test_similarity_is_restricted_to_the_batch(
    make_set: MakeSet, make_model: Callable[[int], DualEncoder], loss: str
) -> None:
    similarity = FullSimilarity(7)
    with torch.no_grad():
        noise = torch.rand(7, 7, generator=torch.Generator().manual_seed(0))
        similarity.values.copy_(0.6 * torch.eye(7) + 0.4 * noise)
    cfg = config(loss=loss, batch_size=3, epochs=2)
    pairs = make_set("image+text_head", similarity=similarity)
    expected = plain_training(
        make_model(1), set_batches(pairs, cfg, 1), rates_of(cfg), FROZEN["image+text_head"], cfg
    )
    source = SetBatches(pairs, CPU)
    student = train_student(source, make_model(1), "image+text_head", cfg, 1, device=CPU)
    assert_same_parameters(student, expected)
    assert similarity.values.grad is None
    without = train_student(
        SetBatches(make_set("image+text_head"), CPU),
        make_model(1), "image+text_head", cfg, 1, device=CPU,
    )  # fmt: skip
    same = torch.equal(without.text_head.weight, student.text_head.weight)
    assert same == (loss == "info_nce")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_training_on_real_data(
    scenes: PairDataset, make_model: Callable[[int], DualEncoder], protocol: str
) -> None:
    cfg = config(batch_size=16, epochs=2)
    epochs = []
    for epoch in range(2):
        random = np.random.default_rng([9, epoch])
        order, choice = scenes.draw("train", 60, random)
        batches = []
        for start in range(0, 60, 16):
            rows = list(zip(order, choice, strict=True))[start : start + 16]
            images = torch.tensor(np.stack([scenes.images[i] for i, _ in rows])).float() / 255
            model = make_model(9)
            ids, mask = model.text_encoder.tokenize([scenes.captions[i][c] for i, c in rows])
            texts = model.text_encoder.embed(ids).detach()
            if protocol != "both":
                texts = model.text_encoder.encode(texts, mask).detach()
            batches.append((images.permute(0, 3, 1, 2), texts, mask, torch.eye(len(rows))))
        epochs.append(batches)
    expected = plain_training(make_model(9), epochs, rates_of(cfg), FROZEN[protocol], cfg)
    source = RealBatches(scenes, "train", make_model(9), protocol, CPU)
    student = train_student(source, make_model(9), protocol, cfg, 9, device=CPU)
    assert_same_parameters(student, expected)


def test_heads_from_stored_features_equal_the_long_way(
    scenes: PairDataset, make_model: Callable[[int], DualEncoder], make_set: MakeSet
) -> None:
    cfg = config(lr_image=0.0, epochs=3)
    for source in (
        SetBatches(make_set("heads"), CPU),
        RealBatches(scenes, "train", make_model(0), "heads", CPU),
    ):
        fast = train_student(source, make_model(0), "heads", cfg, 0, device=CPU)
        # Under this protocol features are computed anew in every step; with a rate of 0 the
        # encoder stays where it is.
        slow = make_model(0)
        train_student(
            source,
            slow,
            "image+text_head",
            cfg.model_copy(update={"weight_decay": 0.0}),
            0,
            device=CPU,
        )
        plain = train_student(
            source, make_model(0), "heads", cfg.model_copy(update={"weight_decay": 0.0}), 0,
            device=CPU,
        )  # fmt: skip
        assert_same_parameters(plain, slow, atol=1e-5)
        assert not torch.equal(fast.text_head.weight, plain.text_head.weight)  # weight decay
        scorer = SplitScorer(scenes, "test", make_model(0), "heads", CPU)
        long_way = SplitScorer(scenes, "test", make_model(0), "image+text_head", CPU)
        assert scorer.score(plain) == long_way.score(plain)


def test_learned_rates_are_used(
    make_set: MakeSet, make_model: Callable[[int], DualEncoder]
) -> None:
    pairs = make_set("image+text_head", learning_rates={"image": 0.004, "text": 0.07})

    def student(learned: SyntheticPairs, **changes: Any) -> DualEncoder:
        source = SetBatches(learned, CPU)
        return train_student(
            source, make_model(0), "image+text_head", config(**changes), 0, device=CPU
        )

    plain = make_set("image+text_head")
    by_part = {"image_encoder": 0.004, "image_head": 0.004, "text_head": 0.07}
    learned = make_set("image+text_head", learning_rates=by_part)
    assert_same_parameters(student(pairs), student(learned), atol=0)
    assert_same_parameters(student(pairs, use_learned_rates=False), student(plain), atol=0)
    half = make_set("image+text_head", learning_rates={"image_encoder": 0.004})
    assert_same_parameters(student(half), student(plain, lr_image=0.004), atol=0)
    half = make_set("image+text_head", learning_rates={"image_head": 0.07, "text_head": 0.07})
    assert_same_parameters(student(half), student(plain, lr_heads=0.07), atol=0)


def test_the_rate_falls_once_after_half(
    make_set: MakeSet, make_model: Callable[[int], DualEncoder]
) -> None:
    # With one pair batch per epoch and no momentum, each step's length shows the rate.
    cfg = config(epochs=5, batch_size=8, momentum=0.0, weight_decay=0.0, lr_image=0.0)
    lengths, weights = [], []

    def note(_: int) -> None:
        weights.append(model.image_head.weight.detach().clone())

    model = make_model(0)
    weights.append(model.image_head.weight.detach().clone())
    source = SetBatches(make_set("heads"), CPU)
    train_student(source, model, "heads", cfg, 0, device=CPU, after_epoch=note)
    for before, after in pairwise(weights):
        lengths.append((after - before).norm().item())
    assert len(lengths) == 5
    assert min(lengths[:2]) > 5 * max(lengths[2:])
    assert min(lengths[2:]) > 0


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_divergence_is_an_error(
    make_set: MakeSet, make_model: Callable[[int], DualEncoder], protocol: str
) -> None:
    cfg = config(lr_image=1e30, lr_text=1e30, lr_heads=1e38, epochs=20)
    source = SetBatches(make_set(protocol), CPU)
    with pytest.raises(NonFiniteError, match=r"student 4.*epoch \d+.*lower the learning rates"):
        train_student(source, make_model(4), protocol, cfg, 4, device=CPU)


def test_a_lone_pair_is_left_out(
    make_set: MakeSet, make_model: Callable[[int], DualEncoder]
) -> None:
    # 7 pairs in batches of 3: the last batch is one pair, which has no negative.
    cfg = config(batch_size=3, epochs=2)
    pairs = make_set("both")
    expected = plain_training(
        make_model(2), set_batches(pairs, cfg, 2), rates_of(cfg), FROZEN["both"], cfg
    )
    student = train_student(SetBatches(pairs, CPU), make_model(2), "both", cfg, 2, device=CPU)
    assert_same_parameters(student, expected)
    assert all(torch.isfinite(p).all() for p in student.parameters())


# -- scores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_scores_of_a_split(
    scenes: PairDataset, make_model: Callable[[int], DualEncoder], protocol: str
) -> None:
    model = make_model(3)
    images = torch.tensor(scenes.images[scenes.indices("test")]).permute(0, 3, 1, 2) / 255
    texts, owner = [], []
    for position, index in enumerate(scenes.indices("test")):
        texts += scenes.captions[index]
        owner += [position] * len(scenes.captions[index])
    with torch.no_grad():
        ids, mask = model.text_encoder.tokenize(texts)
        z_image, z_text = model.embed_images(images), model.embed_texts(ids, mask)
    expected = recall_at_k(z_image, z_text, torch.tensor(owner))
    for block in (3, 500):
        scorer = SplitScorer(scenes, "test", model, protocol, CPU, block=block)
        assert scorer.score(model) == expected
    assert expected["mean"] > 0
    assert model.training  # scoring leaves the mode as it was
    chance = scorer.chance()
    assert chance["IR@1"] == pytest.approx(5.0)
    assert chance["TR@1"] == pytest.approx(5.0)


def test_the_reported_score_is_the_last(
    scenes: PairDataset, make_set: MakeSet, make_model: Callable[[int], DualEncoder]
) -> None:
    # Rates so large that scores go up and down.
    cfg = config(epochs=12, scores=12, lr_image=0.05, lr_text=0.05, lr_heads=0.5, students=3)
    pairs = make_set("image+text_head", pairs=20)
    results = evaluate(pairs, scenes, make_model, "image+text_head", cfg, progress=False)
    assert [r["student_seed"] for r in results] == [0, 1, 2]
    for result in results:
        curve = dict(result["curve"])
        assert list(curve) == list(range(1, 13))
        assert result["test"]["mean"] == pytest.approx(curve[12], abs=1e-4)
        assert result["best_on_test"]["mean"] == pytest.approx(max(curve.values()), abs=1e-4)
        assert curve[result["best_epoch"]] == max(curve.values())
        assert result["best_on_test"]["mean"] >= result["test"]["mean"]
        # The same student, trained without anybody looking.
        student = make_model(result["student_seed"])
        source = SetBatches(pairs, CPU)
        train_student(source, student, "image+text_head", cfg, result["student_seed"], device=CPU)
        for split, name in (("test", "test"), ("val", "validation")):
            scorer = SplitScorer(scenes, split, student, "image+text_head", CPU)
            assert scorer.score(student) == result[name]
    assert any(r["best_on_test"]["mean"] > r["test"]["mean"] for r in results)


@pytest.mark.parametrize("real", [False, True])
def test_students_of_heads_share_what_the_encoders_say(
    scenes: PairDataset,
    make_set: MakeSet,
    make_model: Callable[[int], DualEncoder],
    monkeypatch: pytest.MonkeyPatch,
    real: bool,
) -> None:
    passes: list[int] = []
    image_features = DualEncoder.image_features

    def counted(model: DualEncoder, images: Tensor) -> Tensor:
        passes.append(len(images))
        return image_features(model, images)

    monkeypatch.setattr(DualEncoder, "image_features", counted)
    pairs = make_set("heads", pairs=20)
    train_on = scenes if real else pairs
    results = evaluate(train_on, scenes, make_model, "heads", config(students=3), progress=False)
    assert sum(passes) == 20 + 20 + (60 if real else 20)  # val, test, and the set, once each
    for result in results:  # the same students, each by itself
        seed = result["student_seed"]
        model = make_model(seed)
        source = (
            RealBatches(scenes, "train", model, "heads", CPU) if real else SetBatches(pairs, CPU)
        )
        student = train_student(source, model, "heads", config(students=3), seed, device=CPU)
        for split, name in (("test", "test"), ("val", "validation")):
            scorer = SplitScorer(scenes, split, make_model(0), "heads", CPU)
            assert scorer.score(student) == result[name]


def test_the_number_of_looks_changes_no_score(
    scenes: PairDataset, make_set: MakeSet, make_model: Callable[[int], DualEncoder]
) -> None:
    pairs = make_set("both")
    first, second, third = (
        evaluate(pairs, scenes, make_model, "both", config(scores=n), progress=False)[0]
        for n in (1, 3, 10)
    )
    assert first["test"] == second["test"] == third["test"] == first["best_on_test"]
    assert [epoch for epoch, _ in first["curve"]] == [4]
    assert [epoch for epoch, _ in third["curve"]] == [1, 2, 3, 4]
    assert second["curve"][-1][0] == 4


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_same_seeds_give_the_same_numbers(
    scenes: PairDataset, make_set: MakeSet, make_model: Callable[[int], DualEncoder], protocol: str
) -> None:
    def run(noise: int, **arguments: Any) -> list[dict[str, Any]]:
        torch.manual_seed(noise)
        results = evaluate(
            make_set(protocol), scenes, make_model, protocol, config(students=2), progress=False,
            **arguments,
        )  # fmt: skip
        return [{k: v for k, v in r.items() if k != "seconds"} for r in results]

    first = run(1)
    assert first == run(2)
    assert run(3, seeds=[1, 0]) == first[::-1]
    assert first[0]["test"] != first[1]["test"]


def test_the_global_generator_is_left_alone(
    scenes: PairDataset, make_set: MakeSet, make_model: Callable[[int], DualEncoder]
) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    evaluate(make_set(), scenes, make_model, "both", config(epochs=1), progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_of_a_head_is_seeded(
    scenes: PairDataset, make_set: MakeSet, mlp_template: DualEncoder
) -> None:
    def make(seed: int) -> DualEncoder:
        model = deepcopy(mlp_template)
        model.reset_heads(seed)
        return model

    pairs = make_set("image+text_head")
    scores = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        result = evaluate(pairs, scenes, make, "image+text_head", config(), progress=False)
        scores.append(result[0]["test"])
    assert scores[0] == scores[1]


def test_full_data(scenes: PairDataset, make_model: Callable[[int], DualEncoder]) -> None:
    heard: list[dict] = []
    cfg = config(epochs=2, batch_size=16)
    results = evaluate(
        scenes, scenes, make_model, "both", cfg, progress=False, on_score=heard.append
    )
    assert heard == results
    assert results[0]["steps"] == 2 * 4
    student = make_model(0)
    source = RealBatches(scenes, "train", student, "both", CPU)
    train_student(source, student, "both", cfg, 0, device=CPU)
    scorer = SplitScorer(scenes, "test", student, "both", CPU)
    assert scorer.score(student) == results[0]["test"]


def test_training_teaches_something(
    scenes: PairDataset, make_model: Callable[[int], DualEncoder]
) -> None:
    cfg = config(epochs=15, batch_size=30, lr_image=0.001, lr_text=0.001, lr_heads=0.1)
    train = PairDataset(
        scenes.images,
        scenes.captions,
        {"train": scenes.indices("train"), "val": [], "test": []},
        name="train",
    )
    student = train_student(
        RealBatches(train, "train", make_model(0), "both", CPU),
        make_model(0), "both", cfg, 0, device=CPU,
    )  # fmt: skip
    scorer = SplitScorer(scenes, "train", student, "both", CPU)
    assert scorer.score(student)["mean"] > 3 * scorer.chance()["mean"]


# -- refusals --------------------------------------------------------------------------------------


def test_refusals(
    scenes: PairDataset, make_set: MakeSet, make_model: Callable[[int], DualEncoder]
) -> None:
    z = torch.eye(3)
    with pytest.raises(ConfigError, match="unknown loss 'mse'; known: info_nce"):
        losses.contrastive_loss("mse", z, z, 0.07, None)  # type: ignore[arg-type]
    vectors = make_set("image+text_head")
    with pytest.raises(ConfigError, match="'both' trains the text encoder"):
        evaluate(vectors, scenes, make_model, "both", config(), progress=False)
    only_train = PairDataset(scenes.images, scenes.captions, {"train": range(80)}, name="half")
    with pytest.raises(DataError, match="no split 'val'"):
        evaluate(make_set(), only_train, make_model, "both", config(), progress=False)
    foreign = SyntheticPairs(torch.rand(4, 3, 32, 32), torch.rand(4, 5, 99))
    with pytest.raises(ConfigError, match="99 entries"):
        evaluate(foreign, scenes, make_model, "both", config(), progress=False)
    for wrong in ({"epochs": 0}, {"students": 0}, {"batch_size": 1}, {"loss": "mse"}, {"lr": 1}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            config(**wrong)


def test_progress_can_be_silent(
    scenes: PairDataset,
    make_set: MakeSet,
    make_model: Callable[[int], DualEncoder],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pairs = make_set("heads")
    evaluate(pairs, scenes, make_model, "heads", config(epochs=1), progress=False)
    assert capsys.readouterr().err == ""
    evaluate(pairs, scenes, make_model, "heads", config(epochs=1))
    assert "students: 100%" in capsys.readouterr().err
