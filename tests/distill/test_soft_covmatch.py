"""CovMatch with pairs that are not one to one, against sums over pairs in float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmdd import losses
from mmdd.batches import RealBatches
from mmdd.distill import (
    Context,
    CovBlend,
    CovBlendConfig,
    CovMatch,
    CovMatchConfig,
    CovSimilarity,
    CovSimilarityConfig,
    distill,
)
from mmdd.distill.soft_covmatch import soft_covariance
from mmdd.errors import ConfigError
from mmdd.presets import preset
from mmdd.protocols import PROTOCOLS, Protocol

MakeContext = Callable[..., Context]
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


def doubles(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -- the covariance --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["identity", "positive", "signed"])
def test_it_is_where_ence_pulls_an_untrained_model(kind: str) -> None:
    """For logits V W Lᵀ, the gradient of eNCE at W = 0, which knows nothing of our formula."""
    n = 7
    image, text = doubles(n, 4, seed=1), doubles(n, 3, seed=2)
    similarity = {
        "identity": torch.eye(n, dtype=torch.float64),
        "positive": doubles(n, n, seed=3).abs(),
        "signed": doubles(n, n, seed=3),
    }[kind]
    weight = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    losses.extended_info_nce(image @ weight @ text.T, similarity).backward()
    assert weight.grad is not None
    found = soft_covariance(image, text, similarity)
    torch.testing.assert_close(-n / (n - 1) * weight.grad, found)
    if kind == "identity":
        torch.testing.assert_close(found, losses.cross_covariance(image, text))


def test_blending_is_a_similarity() -> None:
    """Features blended row by row have the soft covariance of BᵀB, and keep their means."""
    n, weight = 6, 0.3
    image, text = doubles(n, 4, seed=1), doubles(n, 3, seed=2)
    partner = [3, 1, 0, 5, 2, 4]
    blended = [
        torch.stack([(1 - weight) * p[m] + weight * p[partner[m]] for m in range(n)])
        for p in (image, text)
    ]
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for m in range(n):
        matrix[m, m] += 1 - weight
        matrix[m, partner[m]] += weight
    found = soft_covariance(image, text, matrix.T @ matrix)
    torch.testing.assert_close(found, losses.cross_covariance(*blended))
    torch.testing.assert_close(blended[0].mean(dim=0), image.mean(dim=0))


@pytest.mark.parametrize(
    ("sizes", "similarity"), [((1, 1), 1), ((3, 4), 3), ((3, 3), 4)], ids=["one", "rows", "size"]
)
def test_what_it_refuses(sizes: tuple[int, int], similarity: int) -> None:
    with pytest.raises(ConfigError, match="same number of rows, at least two, in both sets, and"):
        soft_covariance(doubles(sizes[0], 2), doubles(sizes[1], 2), doubles(similarity, similarity))


# -- the methods -----------------------------------------------------------------------------------


def in_double(context: Context) -> Context:
    model = context.model.double()
    real = RealBatches(context.real.dataset, "train", model, context.protocol, torch.device("cpu"))
    start = context.start
    return replace(context, model=model, real=real, start=start)


def as_double(method: Any) -> Any:
    """The method with everything that it learns in float64."""
    for _, parameter, _ in method.learned():
        parameter.data = parameter.data.double()
    method.set.mean, method.set.std = method.set.mean.double(), method.set.std.double()
    return method


def plain_loss(method: Any, context: Context, iteration: int, similarity: Tensor) -> Tensor:
    """The loss as sums over pairs of pairs: no matrix product, no centring."""
    config, model = method.config, context.model
    batch = context.real.draw(
        config.real_batch, np.random.default_rng([context.seed, 1, iteration])
    )
    sides = []
    for images, texts, mask in (
        (batch.images.double(), batch.texts, batch.mask),
        (method.set.pixels(), *method.set.text()),
    ):
        pair = model(images, texts, mask, normalize=False)
        sides.append([p / p.norm(dim=1, keepdim=True) if config.normalize else p for p in pair])
    (a, b), (c, d) = sides
    a, b = a.detach(), b.detach()
    m, n = len(a), len(c)
    real = sum(torch.outer(a[i] - a.mean(0), b[i] - b.mean(0)) for i in range(m)) / (m - 1)
    rows, columns = similarity.sum(1), similarity.sum(0)
    own = sum(
        (similarity[i, j] - (rows[i] + columns[j]) / (2 * n)) * torch.outer(c[i], d[j])
        for i in range(n)
        for j in range(n)
    ) / (n - 1)
    means = ((a.mean(0) - c.mean(0)) ** 2).sum() + ((b.mean(0) - d.mean(0)) ** 2).sum()
    return ((config.rho * real - own) ** 2).sum() + config.lambda_ * means


def gradients_match(method: Any, loss: Tensor) -> None:
    learned = method.learnables()
    expected = torch.autograd.grad(loss, list(learned.values()))
    for (name, tensor), gradient in zip(learned.items(), expected, strict=True):
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_gradient_of_a_learned_similarity(
    protocol: Protocol, normalize: bool, make_context: MakeContext
) -> None:
    context = in_double(make_context(protocol))
    config = CovSimilarityConfig(**SETTINGS, normalize=normalize, rank=2, alpha=1.5)
    method = as_double(CovSimilarity(config, context))
    similarity = method.similarity
    with torch.no_grad():  # away from its start, where half of the gradients are zero
        similarity.right += doubles(6, 2, seed=4)
        similarity.omega += 0.3 * doubles(6, seed=5)
    terms = method.backward(0)
    matrix = torch.diag(similarity.omega) + 1.5 / 2 * similarity.left @ similarity.right.T
    loss = plain_loss(method, context, 0, matrix)
    assert terms["loss"].item() == pytest.approx(loss.item(), rel=1e-10)
    gradients_match(method, loss)
    assert {"images", "texts", "similarity.omega", "similarity.left", "similarity.right"} == set(
        method.learnables()
    )


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_gradient_of_blended_pairs(protocol: Protocol, make_context: MakeContext) -> None:
    context = in_double(make_context(protocol))
    method = as_double(CovBlend(CovBlendConfig(**SETTINGS, blend_beta=0.7), context))
    for iteration in (0, 1):
        terms = method.backward(iteration)
        rng = np.random.default_rng([context.seed, 3, iteration])
        partner, weight = rng.permutation(6), rng.beta(0.7, 0.7)
        blend = torch.zeros(6, 6, dtype=torch.float64)
        for m in range(6):
            blend[m, m] += 1 - weight
            blend[m, partner[m]] += weight
        loss = plain_loss(method, context, iteration, blend.T @ blend)
        assert terms["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
        learned = list(method.learnables().values())
        for tensor, gradient in zip(learned, torch.autograd.grad(loss, learned), strict=True):
            torch.testing.assert_close(tensor.grad, gradient, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("update", ["real", "synthetic", "none"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_similarity_that_stays_is_covmatch(
    protocol: Protocol, update: Any, make_context: MakeContext
) -> None:
    """With its rate at zero: the same set and the same model, resets and part of the set too."""
    settings = SETTINGS | {"update": update, "synthetic_batch": 4}
    contexts = make_context(protocol), make_context(protocol)
    plain, plain_progress = distill(
        CovMatch(CovMatchConfig(**settings), contexts[0]), 4, progress=False
    )
    kept, progress = distill(
        CovSimilarity(CovSimilarityConfig(**settings, lr_similarity=0.0), contexts[1]),
        4,
        progress=False,
    )
    np.testing.assert_allclose(progress.history["loss"], plain_progress.history["loss"], rtol=1e-4)
    torch.testing.assert_close(kept.images, plain.images, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kept.texts, plain.texts, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(
        contexts[1].model.parameters(), contexts[0].model.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_the_similarity_is_learned_and_leaves_with_the_set(make_context: MakeContext) -> None:
    method = CovSimilarity(CovSimilarityConfig(**SETTINGS, rank=2), make_context("heads"))
    assert "lr_similarity (0.003)" in method.hint()
    torch.testing.assert_close(method.similarity.matrix(), torch.eye(6))
    found, _ = distill(method, 4, progress=False)
    assert found.similarity is not None
    assert (found.similarity.matrix() - torch.eye(6)).abs().max() > 1e-4
    assert torch.equal(found.similarity.matrix(), method.similarity.matrix())
    assert (
        found.num_bytes()
        > CovMatch(CovMatchConfig(**SETTINGS), make_context("heads")).export().num_bytes()
    )
    method.similarity.omega.data.zero_()
    assert found.similarity.omega.abs().max() > 0, "the set's own, not the method's"


def test_students_use_the_similarity() -> None:
    config = preset("tiny", method="cov-similarity", pairs=9)
    assert config.evaluation.loss == "ence"
    assert preset("tiny", method="cov-blend", pairs=9).evaluation.loss == "info_nce"


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_draws_the_similarity(seed: int, make_context: MakeContext) -> None:
    found = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        method = CovSimilarity(CovSimilarityConfig(**SETTINGS), make_context("heads", seed=seed))
        found.append(method.similarity.left)
        assert torch.initial_seed() == noise
    assert torch.equal(*found)
    other = CovSimilarity(CovSimilarityConfig(**SETTINGS), make_context("heads", seed=seed + 5))
    assert not torch.equal(other.similarity.left, found[0])
