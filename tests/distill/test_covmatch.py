"""CovMatch against its algorithm written out again, with a forward pass for each purpose."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mmdd.data.pairs import PairDataset
from mmdd.distill import Context, CovMatch, CovMatchConfig, distill
from mmdd.encoders import DualEncoder
from mmdd.errors import ConfigError

MakeContext = Callable[..., Context]
# Small steps: these tests compare numbers after a few iterations, they need no good set.
SETTINGS: dict[str, Any] = {
    "iterations": 4,
    "rho": 1.5,
    "lambda_": 0.3,
    "lr_image": 0.05,
    "lr_text": 0.02,
    "real_batch": 16,
    "reset_every": 3,
    "model_lr_image": 0.002,
    "model_lr_text": 0.003,
    "model_lr_heads": 0.02,
}


def settings(**changes: Any) -> CovMatchConfig:
    return CovMatchConfig(**{**SETTINGS, **changes})


# -- the algorithm, plainly ------------------------------------------------------------------------


def project(model: DualEncoder, images: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    return model.image_head(model.image_encoder(images)), model.text_head(features)


def text_features(model: DualEncoder, texts: Tensor, mask: Tensor | None) -> Tensor:
    if texts.ndim == 2:
        return texts
    return model.text_encoder.encode(texts, mask)


def covariance(a: Tensor, b: Tensor) -> Tensor:
    """Sum of outer products of deviations over m - 1, in float64, one pair at a time."""
    a, b = a.double(), b.double()
    mean_a, mean_b = a.sum(0) / len(a), b.sum(0) / len(b)
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64)
    for u, v in zip(a, b, strict=True):
        total = total + torch.outer(u - mean_a, v - mean_b)
    return total / (len(a) - 1)


def plain_info_nce(p_image: Tensor, p_text: Tensor, temperature: float) -> Tensor:
    z_image = p_image / p_image.norm(dim=1, keepdim=True)
    z_text = p_text / p_text.norm(dim=1, keepdim=True)
    logits = z_image @ z_text.T / temperature
    total = torch.zeros(())
    for i in range(len(logits)):
        total = total + torch.logsumexp(logits[i], 0) - logits[i, i]
        total = total + torch.logsumexp(logits[:, i], 0) - logits[i, i]
    return total / (2 * len(logits))


def trained_names(model: DualEncoder, protocol: str, freeze: str) -> list[str]:
    word_layer = {id(p) for p in model.text_encoder.input_embedding_parameters()}
    names = []
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        if part.endswith("_encoder") and protocol == "heads":
            continue
        if part == "text_encoder" and (protocol != "both" or id(parameter) in word_layer):
            continue
        if part == f"{freeze}_encoder":
            continue
        names.append(name)
    return names


def reference(
    config: CovMatchConfig, context: Context, dataset: PairDataset
) -> tuple[Tensor, Tensor, list[float], DualEncoder]:
    """(pixels, texts, losses, model) after config.iterations iterations."""
    fresh = deepcopy(context.model).eval()
    model, model_optimiser = fresh, None
    mean, std = (getattr(fresh.image_encoder, n)[:, None, None] for n in ("mean", "std"))
    images = ((context.start.images - mean) / std).requires_grad_(config.learn_images)
    texts = context.start.texts.clone().requires_grad_(config.learn_texts)
    syn_mask = context.start.text_mask
    learned = [
        {"params": [tensor], "lr": lr}
        for tensor, lr in ((images, config.lr_image), (texts, config.lr_text))
        if tensor.requires_grad
    ]
    optimiser: torch.optim.Optimizer = (
        torch.optim.Adam(learned)
        if config.optimizer == "adam"
        else torch.optim.SGD(learned, momentum=config.momentum)
    )
    found = []
    for iteration in range(config.iterations):
        if iteration % config.reset_every == 0:
            model = deepcopy(fresh)
            model.reset_heads((context.seed + 1) * 1_000_003 + iteration // config.reset_every)
            names = trained_names(model, context.protocol, config.freeze)
            parameters = dict(model.named_parameters())
            rates = {
                "image_encoder": config.model_lr_image,
                "text_encoder": config.model_lr_text,
                "image_head": config.model_lr_heads,
                "text_head": config.model_lr_heads,
            }
            model_optimiser = torch.optim.SGD(
                [{"params": [parameters[n]], "lr": rates[n.split(".")[0]]} for n in names],
                lr=1.0,
                momentum=config.model_momentum,
                weight_decay=config.model_weight_decay,
            )
        assert model_optimiser is not None
        random = np.random.default_rng([context.seed, 1, iteration])
        rows, choice = dataset.draw("train", config.real_batch, random)
        real_pixels = torch.tensor(dataset.images[rows].transpose(0, 3, 1, 2) / 255.0).float()
        captions = [dataset.captions[i][c] for i, c in zip(rows, choice, strict=True)]
        ids, mask = model.text_encoder.tokenize(captions)
        part = torch.arange(len(images))
        if config.synthetic_batch < len(images):
            order = np.random.default_rng([context.seed, 2, iteration]).permutation(len(images))
            part = torch.tensor(order[: config.synthetic_batch])

        def synthetic(detach: bool, part: Tensor = part, model: DualEncoder = model) -> Any:
            x, t = images[part] * std + mean, texts[part]
            if detach:
                x, t = x.detach(), t.detach()
            part_mask = None if syn_mask is None else syn_mask[part]
            return project(model, x, text_features(model, t, part_mask))

        def real(model: DualEncoder = model, ids: Tensor = ids, mask: Tensor = mask) -> Any:
            features = model.text_encoder.encode(model.text_encoder.embed(ids), mask)
            if context.protocol != "both":
                features = features.detach()
            return project(model, real_pixels, features)  # noqa: B023

        with torch.no_grad():
            a, b = real()
        c, d = synthetic(detach=False)
        if config.normalize:
            a, b, c, d = (v / v.norm(dim=1, keepdim=True) for v in (a, b, c, d))
        first = (config.rho * covariance(a, b) - covariance(c, d)).square().sum()
        second = ((a.mean(0) - c.mean(0)) ** 2).sum() + ((b.mean(0) - d.mean(0)) ** 2).sum()
        loss = first + config.lambda_ * second
        found.append(loss.item())
        tensors = [group["params"][0] for group in learned]
        for tensor, gradient in zip(tensors, torch.autograd.grad(loss, tensors), strict=True):
            tensor.grad = gradient
        optimiser.step()

        if config.update != "none":
            model_optimiser.zero_grad()
            p_image, p_text = real() if config.update == "real" else synthetic(detach=True)
            plain_info_nce(p_image, p_text, config.temperature).backward()
            model_optimiser.step()
    return (images * std + mean).detach(), texts.detach(), found, model


def assert_matches(
    config: CovMatchConfig, context: Context, dataset: PairDataset, relu: bool = False
) -> None:
    images, texts, losses, model = reference(config, context, dataset)
    start = context.start
    method = CovMatch(config, context)
    result, progress = distill(method, config.iterations, progress=False)
    np.testing.assert_allclose(progress.history["loss"], losses, rtol=2e-4)
    for mine, theirs, before in (
        (result.images, images, start.images),
        (result.texts, texts, start.texts),
    ):
        errors = (mine - theirs).flatten(1).norm(dim=1).sort().values
        moved = (theirs - before).norm()
        # A rounding error can flip a ReLU of the residual network: one image may be further off.
        assert errors[:-1].max() < 1e-4 * moved + 1e-6
        assert errors[-1] < (2e-2 if relu else 1e-4) * moved + 1e-6
    ours, others = dict(context.model.named_parameters()), dict(model.named_parameters())
    for name, value in others.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("model", ["scenes-tiny", "resnet-bert"])
@pytest.mark.parametrize("protocol", ["both", "image+text_head", "heads"])
def test_one_forward_pass_equals_two(
    make_context: MakeContext, scenes: PairDataset, protocol: str, model: str
) -> None:
    context = make_context(protocol, model=model)
    assert_matches(settings(), context, scenes, relu=model == "resnet-bert")


@pytest.mark.parametrize(
    "changes",
    [
        {"rho": 3.0, "lambda_": 0.0},
        {"normalize": True, "optimizer": "adam", "lr_image": 0.01, "lr_text": 0.002},
        {"update": "none"},
        {"update": "synthetic"},
        {"freeze": "image"},
        {"freeze": "text"},
        {"learn_images": False},
        {"learn_texts": False},
        {"synthetic_batch": 4},
        {"synthetic_batch": 4, "update": "synthetic"},
        {"real_batch": 500},
        {"reset_every": 1},
        {"momentum": 0.0, "model_momentum": 0.0, "model_weight_decay": 0.0, "temperature": 0.2},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
@pytest.mark.parametrize("protocol", ["both", "image+text_head"])
def test_settings(
    make_context: MakeContext, scenes: PairDataset, changes: dict, protocol: str
) -> None:
    assert_matches(settings(**changes), make_context(protocol), scenes)


# -- what the algorithm promises -------------------------------------------------------------------


def test_the_real_batch_passes_the_model_once(make_context: MakeContext) -> None:
    context = make_context()
    method = CovMatch(settings(), context)
    batches = []
    context.model.image_encoder.register_forward_hook(
        lambda module, inputs, output: batches.append(len(inputs[0]))
    )
    distill(method, 2, progress=False)
    assert batches == [16, 6, 16, 6]


@pytest.mark.parametrize("protocol", ["both", "image+text_head", "heads"])
def test_matching_leaves_the_model_alone(make_context: MakeContext, protocol: str) -> None:
    context = make_context(protocol)
    method = CovMatch(settings(), context)
    before = {n: p.detach().clone() for n, p in context.model.named_parameters()}
    method.backward(0)
    assert all(p.grad is None for p in context.model.parameters())
    assert all(torch.equal(before[n], p) for n, p in context.model.named_parameters())
    gradients = {n: t.grad.clone() for n, t in method.learnables().items()}
    assert set(gradients) == {"images", "texts"}
    assert all(g.abs().max() > 0 for g in gradients.values())
    # Stale gradients on the model change nothing either.
    other = CovMatch(settings(), make_context(protocol))
    for parameter in other.model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    other.backward(0)
    for name, tensor in other.learnables().items():
        assert torch.equal(tensor.grad, gradients[name])


def test_the_input_embeddings_and_frozen_parts_never_move(make_context: MakeContext) -> None:
    for protocol, freeze in (("both", "none"), ("both", "image"), ("image+text_head", "none")):
        context = make_context(protocol)
        expected = trained_names(context.model, protocol, freeze)
        before = {n: p.detach().clone() for n, p in context.model.named_parameters()}
        distill(CovMatch(settings(freeze=freeze), context), 3, progress=False)
        moved = [n for n, p in context.model.named_parameters() if not torch.equal(before[n], p)]
        assert moved == expected


def test_reset_brings_back_encoders_with_new_projections(make_context: MakeContext) -> None:
    context = make_context()
    encoders = {
        n: p.detach().clone() for n, p in context.model.named_parameters() if "_head" not in n
    }
    method = CovMatch(settings(update="none"), context)
    heads = []
    for iteration in range(7):
        method.backward(iteration)
        heads.append(context.model.image_head.weight.detach().clone())
    assert [torch.equal(heads[i], heads[i + 1]) for i in range(6)] == [
        True, True, False, True, True, False,
    ]  # fmt: skip
    assert not torch.equal(heads[0], heads[6])
    distill(CovMatch(settings(reset_every=2), context), 3, progress=False)
    fresh = CovMatch(settings(), context)
    for name, value in encoders.items():
        trained = dict(context.model.named_parameters())[name]
        if name in fresh.trained:
            assert not torch.equal(trained, value), name


def test_same_seed_same_bits_other_seed_other_bits(make_context: MakeContext) -> None:
    def once(seed: int, noise: int) -> Any:
        torch.manual_seed(noise)  # global generators have no say
        np.random.seed(noise)  # noqa: NPY002
        return distill(CovMatch(settings(), make_context(seed=seed)), 4, progress=False)

    first, progress = once(0, 1)
    again, progress_again = once(0, 2)
    other, _ = once(1, 1)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.texts, again.texts)
    assert progress.history == progress_again.history
    assert not torch.equal(first.images, other.images)


def test_global_generators_are_not_used(make_context: MakeContext) -> None:
    context = make_context(model="resnet-bert")  # its text encoder has dropout: off throughout
    before = torch.get_rng_state()
    distill(CovMatch(settings(), context), 3, progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_norm_statistics_stay(make_context: MakeContext) -> None:
    context = make_context(model="resnet-bert")
    before = {n: b.clone() for n, b in context.model.named_buffers()}
    assert any("running_mean" in name for name in before)
    distill(CovMatch(settings(), context), 3, progress=False)
    for name, value in context.model.named_buffers():
        assert torch.equal(before[name], value), name


def test_matching_gets_better(make_context: MakeContext) -> None:
    changes = {"update": "none", "real_batch": 500, "reset_every": 1000, "normalize": True}
    config = settings(**changes, optimizer="adam", lr_image=0.05, lr_text=0.01)
    _, progress = distill(CovMatch(config, make_context(pairs=10)), 30, progress=False)
    losses = progress.history["loss"]
    assert losses[-1] < 0.5 * losses[0]
    sums = np.add(progress.history["covariance"], 0.3 * np.asarray(progress.history["means"]))
    np.testing.assert_allclose(losses, sums, rtol=1e-5)


def test_the_exported_set(make_context: MakeContext) -> None:
    context = make_context("both")
    result, _ = distill(CovMatch(settings(), context), 1, progress=False)
    assert result.texts.ndim == 3
    assert torch.equal(result.text_mask, context.start.text_mask)
    assert result.metadata["method"] == "covmatch"
    assert result.metadata["settings"] == settings().model_dump()
    assert result.metadata["source_images"] == context.start.metadata["source_images"]
    # Padding has no effect on the loss, so it stays where it was.
    padding = ~context.start.text_mask
    assert torch.equal(result.texts[padding], context.start.texts[padding])
    vectors, _ = distill(CovMatch(settings(), make_context("heads")), 1, progress=False)
    assert vectors.texts.shape == (6, 64)
    assert vectors.text_mask is None


def test_what_is_refused(make_context: MakeContext) -> None:
    with pytest.raises(ConfigError, match="at least two synthetic"):
        CovMatch(settings(), make_context(pairs=1))
    with pytest.raises(ConfigError, match="nothing to learn"):
        CovMatch(settings(learn_images=False, learn_texts=False), make_context())
    for wrong in (
        {"rho": -1.0},
        {"real_batch": 1},
        {"reset_every": 0},
        {"optimizer": "lbfgs"},
        {"update": "both"},
        {"rhoo": 1.0},
    ):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            settings(**wrong)
