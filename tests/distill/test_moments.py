"""Moment matching against its definition written out in float64, pair by pair."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmdd.batches import RealBatches
from mmdd.distill import Context, Moments, MomentsConfig, distill
from mmdd.errors import ConfigError
from mmdd.protocols import PROTOCOLS, Protocol

MakeContext = Callable[..., Context]
SETTINGS: dict[str, Any] = {"iterations": 6, "optimizer": "adam", "lr_image": 0.02, "lr_text": 0.02}


def in_double(context: Context) -> Context:
    """The same context with model and real texts in float64."""
    model = context.model.double()
    real = RealBatches(context.real.dataset, "train", model, context.protocol, torch.device("cpu"))
    return replace(context, model=model, real=real)


def joint(context: Context, images: Tensor, texts: Tensor, mask: Tensor | None) -> np.ndarray:
    """Joint features, row by row: (n, d_v + d_l)."""
    rows = []
    for i in range(len(images)):
        h_v = context.model.image_features(images[i : i + 1])[0]
        h_l = context.model.text_features(
            texts[i : i + 1], None if mask is None else mask[i : i + 1]
        )[0]
        rows.append(torch.cat([h_v / h_v.norm(), h_l / h_l.norm()]).detach().numpy())
    return np.array(rows)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_terms_are_those_of_the_definition(protocol: Protocol, make_context: MakeContext) -> None:
    """Every sum of the loss, from joint features that are computed one pair at a time."""
    context = make_context(protocol, pairs=6)
    method = Moments(MomentsConfig(**SETTINGS), context)
    terms = method.backward(0)
    double = in_double(context)
    batches = list(double.real.epoch(7, context.seed, 0))
    real = np.concatenate(
        [joint(double, b.images.double(), b.texts, b.mask) for b in batches if len(b.images)]
    )
    images, (texts, mask) = method.set.pixels().double(), method.set.text()
    texts = texts.double() if texts.is_floating_point() else texts
    own = joint(double, images, texts, mask)

    d = context.model.image_features(images[:1]).shape[1]
    wanted = np.cov(real.T)
    apart = np.cov(own.T) - wanted
    scale = (wanted**2).sum()
    expected = {
        "means": ((own.mean(axis=0) - real.mean(axis=0)) ** 2).sum(),
        "cross": ((apart[:d, d:] ** 2).sum() + (apart[d:, :d] ** 2).sum()) / scale,
        "within": ((apart[:d, :d] ** 2).sum() + (apart[d:, d:] ** 2).sum()) / scale,
    }
    expected["loss"] = sum(expected.values())
    for name, value in expected.items():
        assert float(terms[name].detach()) == pytest.approx(value, rel=2e-3), name


def test_weights_weigh_their_terms(make_context: MakeContext) -> None:
    context = make_context("image+text_head", pairs=6)
    weights = {"mean_weight": 0.5, "cross_weight": 2.0, "within_weight": 0.25}
    terms = Moments(MomentsConfig(**SETTINGS, **weights), context).backward(0)
    found = 0.5 * terms["means"] + 2.0 * terms["cross"] + 0.25 * terms["within"]
    assert terms["loss"].item() == pytest.approx(found.item(), rel=1e-6)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_gradients_are_those_of_finite_differences(
    protocol: Protocol, make_context: MakeContext
) -> None:
    """In float64, along random directions of the images and of the texts."""
    context = in_double(make_context(protocol, pairs=5))
    method = Moments(MomentsConfig(**SETTINGS), context)
    method.set.double()

    def loss() -> Tensor:
        return torch.stack(method.real.terms(method.set.pixels(), *method.set.text())).sum()

    for side in (method.set.images, method.set.texts):
        (gradient,) = torch.autograd.grad(loss(), side)
        assert float(gradient.norm()) > 0
        direction = torch.randn(
            side.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        step = 1e-5
        with torch.no_grad():
            side += step * direction
            above = loss().item()
            side -= 2 * step * direction
            below = loss().item()
            side += step * direction
        slope = float((gradient * direction).sum())
        assert slope == pytest.approx((above - below) / (2 * step), rel=1e-3)


def test_the_whole_split_matches_itself(make_context: MakeContext) -> None:
    """Real pairs in place of the set: every term is zero, and no smaller set has zero."""
    context = make_context("image+text_head", pairs=6)
    method = Moments(MomentsConfig(**SETTINGS), context)
    (batch,) = context.real.epoch(len(context.real), context.seed, 0)
    whole = method.real.terms(batch.images, batch.texts, batch.mask)
    part = method.real.terms(batch.images[:4], batch.texts[:4], None)
    for all_pairs, few in zip(whole, part, strict=True):
        assert 0 <= float(all_pairs) < 1e-6 < float(few)


def test_a_few_steps_lower_the_loss_and_leave_the_model_alone(make_context: MakeContext) -> None:
    context = make_context("image+text_head", pairs=6)
    before = {k: v.clone() for k, v in context.model.state_dict().items()}
    pairs, progress = distill(Moments(MomentsConfig(**SETTINGS), context), 6, progress=False)
    losses = progress.history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    assert pairs.metadata["method"] == "moments"
    for name, value in context.model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("changes", "pairs", "message"),
    [
        ({}, 1, "at least two"),
        ({"mean_weight": 0, "cross_weight": 0, "within_weight": 0}, 4, "no loss"),
        ({"learn_images": False, "learn_texts": False}, 4, "nothing to learn"),
    ],
)
def test_what_cannot_be_done_is_refused(
    changes: dict[str, Any], pairs: int, message: str, make_context: MakeContext
) -> None:
    with pytest.raises(ConfigError, match=message):
        Moments(MomentsConfig(**SETTINGS, **changes), make_context("heads", pairs=pairs))
