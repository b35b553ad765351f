"""DC and DM against their algorithms written out again, in float64 and with plain loops."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mmdd.batches import RealBatches
from mmdd.data.pairs import PairDataset
from mmdd.distill import Context, Distiller, distill
from mmdd.distill.matching import (
    DistributionMatching,
    DistributionMatchingConfig,
    GradientMatching,
    GradientMatchingConfig,
    gradient_distance,
    mean_distance,
)
from mmdd.encoders import DualEncoder, ImageEncoderSpec, ModelConfig, build_model
from mmdd.errors import ConfigError

MakeContext = Callable[..., Context]
# Steps large enough for the set and the model to move, small enough to stay far from overflow.
DC: dict[str, Any] = {
    "iterations": 4,
    "real_batch": 12,
    "lr_image": 0.05,
    "lr_text": 0.002,
    "model_steps": 2,
    "reset_every": 3,
    "model_lr_image": 0.002,
    "model_lr_text": 0.003,
    "model_lr_heads": 0.02,
    "model_weight_decay": 1e-3,
}
DM: dict[str, Any] = {"iterations": 4, "real_batch": 12, "lr_image": 0.3, "lr_text": 0.2}


def dc(context: Context, **changes: Any) -> GradientMatching:
    return GradientMatching(GradientMatchingConfig(**{**DC, **changes}), context)


def dm(context: Context, **changes: Any) -> DistributionMatching:
    return DistributionMatching(DistributionMatchingConfig(**{**DM, **changes}), context)


METHODS = [pytest.param(dc, id="dc"), pytest.param(dm, id="dm")]
Method = Callable[..., Distiller]


def in_float64(context: Context, dataset: PairDataset) -> Context:
    """The context with a model in float64, and the text vectors that this model gives."""
    model = context.model.double()
    device = torch.device("cpu")
    return replace(context, real=RealBatches(dataset, "train", model, context.protocol, device))


# -- the algorithms, plainly -----------------------------------------------------------------------


def plain_info_nce(p_image: Tensor, p_text: Tensor, temperature: float) -> Tensor:
    z_image = p_image / p_image.norm(dim=1, keepdim=True)
    z_text = p_text / p_text.norm(dim=1, keepdim=True)
    logits = z_image @ z_text.T / temperature
    total = torch.zeros((), dtype=logits.dtype)
    for i in range(len(logits)):
        total = total + torch.logsumexp(logits[i], 0) - logits[i, i]
        total = total + torch.logsumexp(logits[:, i], 0) - logits[i, i]
    return total / (2 * len(logits))


def plain_distance(real: list[Tensor], synthetic: list[Tensor], vectors: bool) -> Tensor:
    """1 - cosine, one output row at a time; single entries per output are one vector."""
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(real, synthetic, strict=True):
        if a.numel() == 1:
            continue
        if a.ndim == 1 or all(size == 1 for size in a.shape[1:]):
            pairs = [(a.flatten(), b.flatten())] if vectors else []
        else:
            pairs = [(a[i].flatten(), b[i].flatten()) for i in range(a.shape[0])]
        for u, v in pairs:
            dot = (u * v).sum()
            # autograd's norm has slope 0 at 0; the square root of the sum of squares has none.
            total = total + 1 - dot / (torch.norm(u) * torch.norm(v) + 1e-6)
    return total


def trained_names(model: DualEncoder, protocol: str) -> list[str]:
    word_layer = {id(p) for p in model.text_encoder.input_embedding_parameters()}
    names = []
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        if part.endswith("_encoder") and protocol == "heads":
            continue
        if part == "text_encoder" and (protocol != "both" or id(parameter) in word_layer):
            continue
        names.append(name)
    return names


class Reference:
    """The set, the data and the model of a reference run, in the type of the context's model."""

    def __init__(self, config: Any, context: Context, dataset: PairDataset) -> None:
        self.config, self.context, self.dataset = config, context, dataset
        self.fresh = deepcopy(context.model).eval()
        self.model = self.fresh
        self.mean, self.std = (
            getattr(self.fresh.image_encoder, n)[:, None, None] for n in ("mean", "std")
        )
        dtype = self.mean.dtype
        start = context.start
        self.images = (start.images.to(dtype) - self.mean) / self.std
        self.images.requires_grad_(config.learn_images)
        self.texts = start.texts.to(dtype, copy=True).requires_grad_(config.learn_texts)
        groups = [
            {"params": [tensor], "lr": lr}
            for tensor, lr in ((self.images, config.lr_image), (self.texts, config.lr_text))
            if tensor.requires_grad
        ]
        self.learned = [group["params"][0] for group in groups]
        self.optimiser: torch.optim.Optimizer = (
            torch.optim.Adam(groups)
            if config.optimizer == "adam"
            else torch.optim.SGD(groups, momentum=config.momentum)
        )

    def start_again(self, period: int) -> None:
        self.model = deepcopy(self.fresh).requires_grad_(True)
        self.model.reset_heads((self.context.seed + 1) * 1_000_003 + period)

    def rng(self, stream: int, iteration: int) -> np.random.Generator:
        return np.random.default_rng([self.context.seed, stream, iteration])

    def real(self, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Projected features of real pairs. A frozen text encoder is the one of the start."""
        model, dataset = self.model, self.dataset
        rows, choice = dataset.draw("train", self.config.real_batch, random)
        pixels = torch.tensor(dataset.images[rows].transpose(0, 3, 1, 2)).float() / 255
        captions = [dataset.captions[i][c] for i, c in zip(rows, choice, strict=True)]
        ids, mask = model.text_encoder.tokenize(captions)
        features = model.text_encoder.encode(model.text_encoder.embed(ids), mask)
        if self.context.protocol != "both":
            features = features.detach()
        return model.image_head(model.image_encoder(pixels)), model.text_head(features)

    def synthetic(self, random: np.random.Generator, detach: bool = False) -> tuple[Tensor, Tensor]:
        model, mask = self.model, self.context.start.text_mask
        part = torch.arange(len(self.images))
        if self.config.synthetic_batch < len(part):
            part = torch.tensor(random.permutation(len(part))[: self.config.synthetic_batch])
        images, texts = self.images[part] * self.std + self.mean, self.texts[part]
        if detach:
            images, texts = images.detach(), texts.detach()
        if texts.ndim == 3:
            texts = model.text_encoder.encode(texts, mask[part])
        return model.image_head(model.image_encoder(images)), model.text_head(texts)

    def step(self, loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, self.learned)
        for tensor, gradient in zip(self.learned, gradients, strict=True):
            tensor.grad = gradient
        self.optimiser.step()


def reference_dc(
    config: GradientMatchingConfig, context: Context, dataset: PairDataset
) -> tuple[Reference, list[float]]:
    run, found = Reference(config, context, dataset), []
    for iteration in range(config.iterations):
        if iteration % config.reset_every == 0:
            run.start_again(iteration // config.reset_every)
            named = dict(run.model.named_parameters())
            names = trained_names(run.model, context.protocol)
            rates = {
                "image_encoder": config.model_lr_image,
                "text_encoder": config.model_lr_text,
                "image_head": config.model_lr_heads,
                "text_head": config.model_lr_heads,
            }
            model_optimiser = torch.optim.SGD(
                [{"params": [named[n]], "lr": rates[n.split(".")[0]]} for n in names],
                momentum=config.model_momentum,
                weight_decay=config.model_weight_decay,
            )
            parameters = [named[n] for n in names]
        real = plain_info_nce(*run.real(run.rng(1, iteration)), config.temperature)
        target = torch.autograd.grad(real, parameters)
        loss = plain_info_nce(*run.synthetic(run.rng(2, iteration)), config.temperature)
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        distance = plain_distance([g.detach() for g in target], list(gradient), config.vectors)
        found.append(distance.item())
        run.step(distance)
        random = run.rng(3, iteration)
        for _ in range(config.model_steps if config.update != "none" else 0):
            batch = (
                run.real(random) if config.update == "real" else run.synthetic(random, detach=True)
            )
            model_optimiser.zero_grad()
            plain_info_nce(*batch, config.temperature).backward()
            model_optimiser.step()
    return run, found


def reference_dm(
    config: DistributionMatchingConfig, context: Context, dataset: PairDataset
) -> tuple[Reference, list[float]]:
    run, found = Reference(config, context, dataset), []
    for iteration in range(config.iterations):
        if iteration % config.reset_every == 0:
            run.start_again(iteration // config.reset_every)
        loss = torch.zeros((), dtype=run.mean.dtype)
        batches = run.real(run.rng(1, iteration)), run.synthetic(run.rng(2, iteration))
        for real, synthetic in zip(*batches, strict=True):
            means = []
            for features in (real.detach(), synthetic):
                total = torch.zeros_like(features[0])
                for row in features:
                    total = total + (row / torch.norm(row) if config.normalize else row)
                means.append(total / len(features))
            for u, v in zip(*means, strict=True):
                loss = loss + (u - v) ** 2
        found.append(loss.item())
        run.step(loss)
    return run, found


REFERENCES = {dc: reference_dc, dm: reference_dm}


def assert_matches(make: Any, context: Context, dataset: PairDataset, **changes: Any) -> None:
    """Losses, set and model after some iterations agree to 1e-6, both in float64."""
    context = in_float64(context, dataset)
    reference = REFERENCES[make]
    expected, losses = reference(make(context, **changes).config, deepcopy(context), dataset)
    method = make(context, **changes)
    method.set.double()  # sets come in float32
    before = method.set.images.detach().clone(), method.set.texts.detach().clone()
    _, progress = distill(method, method.config.iterations, progress=False)
    np.testing.assert_allclose(progress.history["loss"], losses, rtol=1e-6)
    for mine, theirs, start in zip(
        (method.set.images, method.set.texts),
        (expected.images, expected.texts),
        before,
        strict=True,
    ):
        assert mine.dtype == torch.float64
        moved = (theirs - start).norm()
        assert (mine - theirs).norm() <= 1e-6 * moved
        assert moved > 0 or not theirs.requires_grad
    theirs = dict(expected.model.named_parameters())
    for name, parameter in context.model.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("make", METHODS)
@pytest.mark.parametrize("model", ["scenes-tiny", "resnet-bert"])
@pytest.mark.parametrize("protocol", ["both", "image+text_head"])
def test_algorithm(
    make_context: MakeContext, scenes: PairDataset, make: Method, protocol: str, model: str
) -> None:
    # A thousand rows of ResNet-20, one at a time, take seconds an iteration.
    iterations = 4 if model == "scenes-tiny" else 2
    context = make_context(protocol, model=model)
    assert_matches(make, context, scenes, iterations=iterations)


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (dc, {"vectors": True}),
        (dc, {"update": "real"}),
        (dc, {"update": "none"}),
        (dc, {"synthetic_batch": 4}),
        (dc, {"reset_every": 1, "temperature": 0.2}),
        (dc, {"model_momentum": 0.0, "model_weight_decay": 0.0, "momentum": 0.0}),
        (dc, {"optimizer": "adam", "lr_image": 0.01, "lr_text": 0.002}),
        (dm, {"normalize": True}),
        (dm, {"reset_every": 3}),
        (dm, {"synthetic_batch": 4, "real_batch": 500}),
        (dm, {"optimizer": "adam", "lr_image": 0.01, "lr_text": 0.002}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value.__name__,
)
@pytest.mark.parametrize("protocol", ["image+text_head", "heads"])
def test_settings(
    make_context: MakeContext, scenes: PairDataset, make: Method, changes: dict, protocol: str
) -> None:
    # Without a text encoder to differentiate: all of it under `both` would take a minute.
    assert_matches(make, make_context(protocol), scenes, **changes)


# -- distances and gradients -----------------------------------------------------------------------


def test_distance_of_gradients_by_hand() -> None:
    real = [torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([1.0, 0.0]), torch.tensor(4.0)]
    same_way = [torch.tensor([[9.0, 0.0], [0.0, 0.5]]), torch.tensor([0.0, 5.0]), -real[2]]
    turned = [torch.tensor([[0.0, 1.0], [0.0, -1.0]]), torch.tensor([-1.0, 0.0]), real[2]]
    assert gradient_distance(real, same_way).item() == pytest.approx(0, abs=2e-6)
    assert gradient_distance(real, same_way, vectors=True).item() == pytest.approx(1, abs=2e-6)
    assert gradient_distance(real, turned).item() == pytest.approx(1 + 2, abs=2e-6)
    assert gradient_distance(real, turned, vectors=True).item() == pytest.approx(5, abs=4e-6)
    # The released code's addend in the denominator: two rows of norm 1e-3 are as long as it.
    assert gradient_distance([torch.eye(2) * 1e-3], [torch.eye(2) * 1e-3]).item() == 1
    with pytest.raises(ConfigError, match="no weight matrix"):
        gradient_distance(real[1:], turned[1:])


@pytest.mark.parametrize("vectors", [False, True])
def test_distance_of_gradients_and_its_slope(vectors: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (4, 2, 3, 3), (6,), (7, 1, 1, 1), (), (1, 5), (3, 4, 2)]
    real, synthetic = (
        [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes] for _ in "ab"
    )
    leaves = [s.clone().requires_grad_() for s in synthetic]
    others = [s.clone().requires_grad_() for s in synthetic]
    mine, theirs = gradient_distance(real, leaves, vectors), plain_distance(real, others, vectors)
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-12)
    mine.backward()
    theirs.backward()
    for leaf, other in zip(leaves, others, strict=True):
        assert (leaf.grad is None) == (other.grad is None)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_rows_without_a_gradient_count_one() -> None:
    real, synthetic = torch.ones(3, 2), torch.ones(3, 2)
    real[0], synthetic[1] = 0, 0
    synthetic.requires_grad_()
    loss = gradient_distance([real], [synthetic])
    assert loss.item() == pytest.approx(2, abs=2e-6)
    loss.backward()
    assert torch.isfinite(synthetic.grad).all()
    assert (synthetic.grad[0] == 0).all()


def test_distance_of_means_by_hand() -> None:
    real, synthetic = torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([[0.0, 1.0]])
    assert mean_distance(real, synthetic).item() == 2**2 + 3**2


def vision_transformer(context: Context, dataset: PairDataset) -> Context:
    """timm's fused attention in front of the text vectors of scenes-tiny."""
    image = ImageEncoderSpec(kind="timm", name="vit_tiny_patch16_224", image_size=32)
    return replace(context, model=build_model(ModelConfig(image=image, dim=12)))


@pytest.mark.parametrize("make", METHODS)
@pytest.mark.parametrize("model", ["scenes-tiny", "resnet-bert", "vit"])
@pytest.mark.parametrize("protocol", ["both", "image+text_head"])
def test_gradient_against_differences(
    make_context: MakeContext, scenes: PairDataset, make: Method, protocol: str, model: str
) -> None:
    context = make_context(protocol, model="scenes-tiny" if model == "vit" else model)
    if model == "vit":
        context = vision_transformer(context, scenes)
    method: Any = make(in_float64(context, scenes))
    method.set.double()
    generator = torch.Generator().manual_seed(0)
    method.backward(0)
    gradients = {name: t.grad.clone() for name, t in method.learnables().items()}
    assert set(gradients) == {"images", "texts"}
    for name, tensor in method.learnables().items():
        # Half along the gradient, so that the difference is far above its rounding error.
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        direction = noise / noise.norm() + gradients[name] / gradients[name].norm()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor += sign * 1e-5 * direction
            values.append(method.backward(0)["loss"].item())
            with torch.no_grad():
                tensor -= sign * 1e-5 * direction
        expected = (gradients[name] * direction).sum().item()
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(expected, rel=1e-5)


# -- what the methods promise ----------------------------------------------------------------------


@pytest.mark.parametrize("make", METHODS)
@pytest.mark.parametrize("protocol", ["both", "image+text_head", "heads"])
def test_matching_leaves_the_model_alone(
    make_context: MakeContext, make: Method, protocol: str
) -> None:
    context = make_context(protocol)
    method = make(context)
    before = {n: p.detach().clone() for n, p in context.model.named_parameters()}
    method.backward(0)
    assert all(p.grad is None for p in context.model.parameters())
    assert all(torch.equal(before[n], p) for n, p in context.model.named_parameters())
    gradients = {n: t.grad.clone() for n, t in method.learnables().items()}
    assert all(g.abs().max() > 0 for g in gradients.values())
    # Stale gradients on the model change nothing either.
    other = make(make_context(protocol))
    for parameter in other.context.model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    other.backward(0)
    for name, tensor in other.learnables().items():
        assert torch.equal(tensor.grad, gradients[name])


@pytest.mark.parametrize("make", METHODS)
@pytest.mark.parametrize("frozen", ["images", "texts"])
def test_a_side_that_is_not_learned_stays(
    make_context: MakeContext, make: Method, frozen: str
) -> None:
    context = make_context("both")
    method: Any = make(context, **{f"learn_{frozen}": False})
    before = {name: p.detach().clone() for name, p in method.set.named_parameters()}
    distill(method, 3, progress=False)
    moved = [n for n, p in method.set.named_parameters() if not torch.equal(before[n], p)]
    assert moved == list(method.learnables()) == [n for n in ("images", "texts") if n != frozen]


def test_dc_moves_what_the_protocol_trains_and_dm_the_projections_alone(
    make_context: MakeContext,
) -> None:
    for protocol in ("both", "image+text_head", "heads"):
        for make in (dc, dm):
            context = make_context(protocol)
            method = make(context)
            before = {n: p.detach().clone() for n, p in context.model.named_parameters()}
            distill(method, 2, progress=False)
            named = context.model.named_parameters()
            moved = [n for n, p in named if not torch.equal(before[n], p)]
            asked = [n for n, p in context.model.named_parameters() if p.requires_grad]
            if make is dc:
                assert moved == asked == trained_names(context.model, protocol)
            else:
                assert moved == ["image_head.weight", "text_head.weight"]
                assert asked == []


def test_projections_are_drawn_anew(make_context: MakeContext) -> None:
    for every in (1, 3):
        for make, others in ((dc, {"update": "none"}), (dm, {})):
            context = make_context("heads")
            method = make(context, reset_every=every, **others)
            heads = []
            for iteration in range(7):
                method.backward(iteration)
                heads.append(context.model.image_head.weight.detach().clone())
            for i in range(6):
                assert torch.equal(heads[i], heads[i + 1]) == ((i + 1) % every != 0)
            assert not torch.equal(heads[0], heads[6])


def test_dc_goes_back_to_the_pretrained_encoders(make_context: MakeContext) -> None:
    context = make_context("both")
    pretrained = {
        n: p.detach().clone() for n, p in context.model.named_parameters() if "_head" not in n
    }
    method = dc(context, reset_every=2)
    for iteration in range(2):
        method.backward(iteration)
        method.after_step(iteration)
    named = dict(context.model.named_parameters())
    assert not any(torch.equal(named[n], v) for n, v in pretrained.items() if "linear" in n)
    method.backward(2)
    assert all(torch.equal(named[n], v) for n, v in pretrained.items())


def test_gradients_get_closer(make_context: MakeContext) -> None:
    for protocol in ("both", "image+text_head"):
        changes = {"optimizer": "adam", "update": "none", "reset_every": 1000, "real_batch": 500}
        method = dc(make_context(protocol), **changes, lr_image=0.03, lr_text=0.01)
        _, progress = distill(method, 20, progress=False)
        losses = progress.history["loss"]
        # Several hundred rows can turn only so far towards 40 pairs with six.
        assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])


def test_means_get_closer(make_context: MakeContext) -> None:
    for protocol in ("both", "image+text_head"):
        method = dm(make_context(protocol), optimizer="adam", lr_image=0.03, lr_text=0.01)
        _, progress = distill(method, 20, progress=False)
        history = {name: np.array(values) for name, values in progress.history.items()}
        np.testing.assert_allclose(history["loss"], history["image"] + history["text"], rtol=1e-5)
        for values in history.values():
            assert values[-3:].mean() < 0.7 * values[:3].mean()


@pytest.mark.parametrize("make", METHODS)
@pytest.mark.parametrize("protocol", ["both", "image+text_head"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_interrupted_equals_uninterrupted(
    make_context: MakeContext, make: Method, protocol: str, optimizer: str, tmp_path: Path
) -> None:
    # Stopped in the middle of two periods, with momentum in both optimisers and a part of the set.
    changes = {"optimizer": optimizer, "reset_every": 4, "synthetic_batch": 4, "lr_image": 0.01}
    whole, expected = distill(make(make_context(protocol), **changes), 7, progress=False)
    path = tmp_path / "checkpoint.safetensors"
    for end in (2, 5, 7):
        method = make(make_context(protocol), **changes)
        result, progress = distill(method, end, checkpoint=path, progress=False)
    assert torch.equal(result.images, whole.images)
    assert torch.equal(result.texts, whole.texts)
    assert progress.history == expected.history
    assert len(progress.history["loss"]) == 7


@pytest.mark.parametrize("make", METHODS)
def test_seeds_decide_and_global_generators_do_not(make_context: MakeContext, make: Method) -> None:
    def once(seed: int, noise: int) -> Any:
        torch.manual_seed(noise)
        np.random.seed(noise)  # noqa: NPY002
        before = torch.get_rng_state()
        # A text encoder with dropout: it must be off.
        context = make_context(model="resnet-bert", seed=seed)
        result, _ = distill(make(context, synthetic_batch=4), 2, progress=False)
        assert torch.equal(torch.get_rng_state(), before)
        return result

    first, again, other = once(0, 1), once(0, 2), once(1, 1)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.texts, again.texts)
    assert not torch.equal(first.images, other.images)


@pytest.mark.parametrize("make", METHODS)
def test_lower_precision(make_context: MakeContext, make: Method) -> None:
    exact: Any = make(make_context("both"))
    rough: Any = make(replace(make_context("both"), precision="bfloat16"))
    a, b = (m.backward(0)["loss"].item() for m in (exact, rough))
    assert a != b
    assert b == pytest.approx(a, rel=0.05)
    for mine, theirs in zip(rough.learnables().values(), exact.learnables().values(), strict=True):
        assert mine.dtype == mine.grad.dtype == torch.float32
        # Eight bits of mantissa, through two derivatives: the direction is what stays.
        cosine = torch.cosine_similarity(mine.grad.flatten(), theirs.grad.flatten(), dim=0)
        assert cosine > 0.9


@pytest.mark.parametrize("make", METHODS)
def test_the_exported_set(make_context: MakeContext, make: Method) -> None:
    context = make_context("both")
    method = make(context)
    result, _ = distill(method, 1, progress=False)
    assert result.metadata["method"] == method.name == make.__name__
    assert result.metadata["settings"] == method.config.model_dump()
    assert result.metadata["source_images"] == context.start.metadata["source_images"]
    # Padding has no effect on the loss, so it stays where it was.
    padding = ~context.start.text_mask
    assert torch.equal(result.texts[padding], context.start.texts[padding])
    vectors, _ = distill(make(make_context("heads")), 1, progress=False)
    assert vectors.texts.shape == (6, 64)
    assert vectors.text_mask is None


def test_what_is_refused(make_context: MakeContext) -> None:
    with pytest.raises(ConfigError, match="at least two synthetic"):
        dc(make_context(pairs=1))
    assert dm(make_context(pairs=1)).backward(0)["loss"] > 0  # a mean of one is a mean
    for make in (dc, dm):
        with pytest.raises(ConfigError, match=f"{make.__name__} has nothing to learn"):
            make(make_context(), learn_images=False, learn_texts=False)
        for wrong in (
            {"real_batch": 1},
            {"synthetic_batch": 1},
            {"reset_every": 0},
            {"optimizer": "lbfgs"},
            {"momentum": 1.0},
            {"lr_imag": 1.0},
        ):
            with pytest.raises(ValidationError, match=next(iter(wrong))):
                make(make_context(), **wrong)
    for changes in ({"update": "both"}, {"model_steps": 0}, {"temperature": 0.0}):
        with pytest.raises(ValidationError, match=next(iter(changes))):
            dc(make_context(), **changes)
