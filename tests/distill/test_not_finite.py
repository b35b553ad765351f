"""Every method with numbers that overflow, features of no length, one pair, and large batches."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdd.data.pairs import PairDataset
from mmdd.distill import METHODS, Context, Distiller, distill
from mmdd.encoders import DualEncoder
from mmdd.errors import ConfigError, NonFiniteError
from mmdd.evaluation import EvaluationConfig, evaluate
from mmdd.experts import ExpertConfig, prepare_experts
from mmdd.synthetic import SyntheticPairs

MakeContext = Callable[..., Context]
EXPERTS = {"count": 2, "epochs": 2, "batch_size": 20}
SETTINGS: dict[str, Any] = {
    "iterations": 6,
    "real_batch": 8,
    "synthetic_batch": 4,
    "syn_steps": 2,
    "max_start_epoch": 1,
    "max_start_text": 1,
    "model_steps": 1,
    "experts": EXPERTS,
}


@pytest.fixture(scope="module")
def buffers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


def build(name: str, context: Context, buffers: Path, **changes: Any) -> Distiller:
    """A method on the smallest settings that it has."""
    entry = METHODS[name]
    fields = entry.config.model_fields
    values = {k: v for k, v in (SETTINGS | changes).items() if k in fields}
    settings = entry.config(**values)
    context = replace(context, model_config={"pair": "scenes-tiny"})
    prepared, _ = entry.distiller.prepare(settings, context, buffers, progress=False)
    return entry.distiller(settings, replace(context, prepared=prepared))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_stops_where_it_overflows(
    name: str, make_context: MakeContext, buffers: Path, tmp_path: Path
) -> None:
    huge = {"optimizer": "adam", "lr_image": 1e37, "lr_text": 1e37, "normalize": False}
    method = build(name, make_context("heads"), buffers, **huge)
    path = tmp_path / "c.safetensors"
    with pytest.raises(NonFiniteError, match=rf"^{method.name}, iteration \d+: not finite") as told:
        distill(method, 6, checkpoint=path, checkpoint_every=1, progress=False)
    assert "Likely cure: " in str(told.value)
    good = SyntheticPairs.load(tmp_path / "c.last_good.safetensors")
    assert torch.isfinite(good.images).all()
    assert torch.isfinite(good.texts).all()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_stops_at_a_gradient_that_is_not_finite(
    name: str, make_context: MakeContext, buffers: Path, tmp_path: Path
) -> None:
    """The real method, but for one number of one gradient in the third iteration."""
    method = build(name, make_context("heads"), buffers, lr_image=1e-3, lr_text=1e-3)
    after: dict[int, SyntheticPairs] = {}
    honest = method.backward

    def backward(iteration: int) -> dict[str, float]:
        terms = honest(iteration)
        if iteration == 2:
            grad = next(t.grad for t in method.learnables().values() if t.grad is not None)
            grad[(0,) * grad.ndim] = torch.inf
        return terms

    method.backward = backward  # type: ignore[method-assign]
    path = tmp_path / "c.safetensors"
    with pytest.raises(NonFiniteError, match="iteration 2: not finite: gradient of"):
        distill(
            method,
            6,
            checkpoint=path,
            checkpoint_every=1,
            callback=after.__setitem__,
            callback_every=1,
            progress=False,
        )
    good = SyntheticPairs.load(tmp_path / "c.last_good.safetensors")
    assert torch.equal(good.images, after[2].images), "the set of the last good iteration"
    assert torch.equal(good.texts, after[2].texts)
    again = build(name, make_context("heads"), buffers, lr_image=1e-3, lr_text=1e-3)
    going_on, progress = distill(again, 3, checkpoint=path, progress=False)
    assert progress.iterations == 3
    assert torch.isfinite(going_on.images).all()


@pytest.mark.parametrize("name", METHODS)
def test_no_method_starts_from_numbers_that_are_not_finite(
    name: str, make_context: MakeContext, buffers: Path, tmp_path: Path
) -> None:
    context = make_context("heads")
    context.start.images[0, 0, 0, 0] = torch.nan
    with pytest.raises((NonFiniteError, ConfigError), match=r"finite|NaN"):
        distill(build(name, context, buffers), 2, checkpoint=tmp_path / "c", progress=False)
    assert list(tmp_path.iterdir()) == [], "no set is called good that never was"


@pytest.mark.parametrize("name", METHODS)
def test_texts_of_no_length(name: str, make_context: MakeContext, buffers: Path) -> None:
    """Black images, and a vector of zeros, which a linear head leaves without a direction.

    The direction's first derivative is taken as finite there. Its second derivative, which the
    methods need that differentiate through steps or gradients of a model, is not: they say so.
    """
    context = make_context("heads")
    context.start.images.zero_()
    context.start.texts[0].zero_()
    method = build(name, context, buffers, lr_image=0.0, lr_text=0.0)
    # repblend's students see blends of two texts, which have a length.
    if name in ("dm", "covmatch", "mdm", "repblend", "moments", "cov-similarity", "cov-blend"):
        found, _ = distill(method, 2, progress=False)
        assert torch.isfinite(found.images).all()
        assert torch.isfinite(found.texts).all()
    else:
        told = r"iteration 0: not finite: .*gradient of texts.*another text for pair 0 \(counted"
        with pytest.raises(NonFiniteError, match=told):
            distill(method, 2, progress=False)
        kept = build(name, context, buffers, lr_image=0.0, learn_texts=False)
        found, _ = distill(kept, 2, progress=False)
        assert torch.isfinite(found.images).all(), "the way out that the message names"


@pytest.mark.parametrize("name", METHODS)
def test_batches_larger_than_the_data_are_the_data(
    name: str, make_context: MakeContext, buffers: Path
) -> None:
    large = {"real_batch": 10_000, "synthetic_batch": 10_000}
    fitting = {"real_batch": 40, "synthetic_batch": 6}
    sets = [
        distill(
            build(name, make_context("heads"), buffers, lr_image=0.1, lr_text=0.1, **sizes),
            2,
            progress=False,
        )[0]
        for sizes in (large, fitting)
    ]
    assert torch.equal(sets[0].images, sets[1].images)
    assert torch.equal(sets[0].texts, sets[1].texts)


@pytest.mark.parametrize("name", METHODS)
def test_one_pair(name: str, make_context: MakeContext, buffers: Path) -> None:
    """A contrast needs two pairs; a mean needs one."""
    context = make_context("heads", pairs=1)
    if name == "dm":
        found, _ = distill(build(name, context, buffers, real_batch=2), 2, progress=False)
        assert len(found) == 1
        assert torch.isfinite(found.images).all()
    else:
        with pytest.raises(ConfigError, match="at least two"):
            build(name, context, buffers)


# -- experts and students --------------------------------------------------------------------------


def poison(model: DualEncoder, call: int) -> None:
    """Make one number of a gradient infinite in the given backward pass of the image head."""
    calls = 0

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        grad = grad.clone()
        if calls == call:
            grad.view(-1)[0] = torch.inf
        return grad

    next(model.image_head.parameters()).register_hook(spoil)


def test_an_expert_keeps_no_snapshot_that_is_not_finite(
    make_context: MakeContext, tmp_path: Path
) -> None:
    """The last step of an epoch has a finite loss and spoils the parameters all the same."""
    context = make_context("heads")
    config = ExpertConfig(count=1, epochs=2, batch_size=20, lr_heads=3e38, lr_image=0.0)
    with pytest.raises(NonFiniteError, match=r"expert with seed \d+.*step \d.*learning rates"):
        prepare_experts(config, context, tmp_path, progress=False)
    from mmdd.files import load_tensors

    kept = sorted(tmp_path.rglob("snapshot-*.safetensors"))
    assert kept, "the start is kept"
    for path in kept:
        for tensor in load_tensors(path)[0].values():
            assert torch.isfinite(tensor).all(), path.name


def test_a_student_spoilt_by_its_last_step_is_no_result(
    make_context: MakeContext, scenes: PairDataset
) -> None:
    context = make_context("heads")

    def spoilt(seed: int) -> DualEncoder:
        model = make_context("heads").model
        model.reset_heads(seed)
        poison(model, call=2)
        return model

    config = EvaluationConfig(students=1, epochs=2, batch_size=10)
    with pytest.raises(NonFiniteError, match=r"student 0: image_head.* after epoch 2: lower"):
        evaluate(context.start, scenes, spoilt, "heads", config, progress=False)


def test_a_student_of_one_pair_is_refused(make_context: MakeContext, scenes: PairDataset) -> None:
    context = make_context("heads", pairs=1)
    with pytest.raises(ConfigError, match="at least two"):
        evaluate(context.start, scenes, lambda _: context.model, "heads", progress=False)
