"""Interpolation of weights against a recomputation layer by layer, in plain numpy."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmdd import interpolation
from mmdd.errors import ConfigError
from mmdd.interpolation import interpolate, layer_ratios

SIZES = [6, 1, 20, 3]


def moves(k: int, seed: int, common: float = 1.0) -> np.ndarray:
    """What k experts moved: a common part, so that they agree to some extent, and their own."""
    rng = np.random.default_rng(seed)
    return common * rng.normal(size=sum(SIZES)) + rng.normal(size=(k, sum(SIZES)))


def naive(start: np.ndarray, moved: np.ndarray, alpha: float) -> np.ndarray:
    """One entry at a time; for two experts by the paper's formula."""
    result = np.empty_like(start)
    begin = 0
    for size in SIZES:
        entries = range(begin, begin + size)

        def inner(i: int, j: int, entries: range = entries) -> float:
            return math.fsum(moved[i, e] * moved[j, e] for e in entries)

        k = len(moved)
        norms = [math.sqrt(inner(i, i)) for i in range(k)]
        if k == 2:
            below = norms[0] * norms[1] + inner(0, 1)
            t = 2 * inner(0, 1) / below if inner(0, 1) > 0 else 0.0
        else:
            pairs = list(itertools.combinations(range(k), 2))
            cosines = [inner(i, j) / (norms[i] * norms[j]) for i, j in pairs]
            c = max(0.0, sum(cosines) / len(cosines))
            t = k * c / (1 + (k - 1) * c)
        for e in entries:
            result[e] = start[e] + alpha * t * sum(moved[i, e] for i in range(k)) / k
        begin += size
    return result


def double(array: np.ndarray) -> Tensor:
    return torch.tensor(array, dtype=torch.float64)


def between(start: Tensor, moved: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """`interpolate` of experts with a common start; zeros make an end what was moved, exactly."""
    zeros = torch.zeros_like(start)
    found, ratios = interpolate([zeros] * len(moved), list(moved), SIZES, alpha)
    return start + found, ratios


@given(k=st.integers(2, 6), seed=st.integers(0, 999), alpha=st.floats(0, 1.5))
@settings(deadline=None, max_examples=60)
def test_layer_by_layer(k: int, seed: int, alpha: float) -> None:
    start = np.random.default_rng(seed + 1_000).normal(size=sum(SIZES))
    moved = moves(k, seed)
    found, ratios = between(double(start), double(moved), alpha)
    np.testing.assert_allclose(found, naive(start, moved, alpha), rtol=1e-10, atol=1e-12)
    assert ratios.shape == (len(SIZES),)
    assert ((ratios >= 0) & (ratios <= 1)).all()
    single, _ = between(double(start).float(), double(moved).float(), alpha)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [2, 3, 7])
def test_no_alpha_is_the_start_and_agreeing_experts_are_reached(k: int) -> None:
    start, moved = double(moves(1, 0)[0]), double(moves(1, 1)).repeat(k, 1)
    assert torch.equal(between(start, double(moves(k, 2)), 0.0)[0], start)
    found, ratios = between(start, moved, 1.0)
    torch.testing.assert_close(found, start + moved[0])
    torch.testing.assert_close(ratios, torch.ones(len(SIZES), dtype=torch.float64))
    # Only the direction counts for t: twice as far is agreement too.
    moved = torch.stack([moved[0], 2 * moved[0]])
    torch.testing.assert_close(between(start, moved, 1.0)[0], start + 1.5 * moved[0])


@pytest.mark.parametrize("angle", [0.0, 30.0, 60.0, 89.0, 90.0, 120.0, 179.999, 180.0])
def test_ratio_by_angle(angle: float) -> None:
    """2cos/(1+cos) up to a right angle; 0 beyond, where the formula turns away and diverges."""
    radians = math.radians(angle)
    moved = double(np.array([[1.0, 0.0], [3 * math.cos(radians), 3 * math.sin(radians)]]))
    (ratio,) = layer_ratios(moved, [2]).tolist()
    expected = 2 * math.cos(radians) / (1 + math.cos(radians)) if angle < 90 else 0.0
    assert ratio == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_layers_stay_at_the_start(dtype: torch.dtype) -> None:
    start = double(moves(1, 3)[0]).to(dtype)
    moved = double(moves(2, 4)).to(dtype)
    moved[1, :6] = -moved[0, :6]  # opposite experts
    moved[0, 6] = 0  # one that did not move
    moved[:, 7:27] = 0  # none that moved
    found, ratios = between(start, moved, 1.0)
    assert torch.equal(found[:27], start[:27])
    assert ratios[:3].tolist() == [0, 0, 0]
    assert torch.isfinite(found).all()
    tiny = between(start, 1e-30 * double(moves(2, 5)).to(dtype), 1.0)
    assert torch.isfinite(tiny[0]).all()


def test_layers_do_not_see_each_other() -> None:
    moved = double(moves(2, 6))
    whole = layer_ratios(moved, SIZES)
    begin = 0
    for i, size in enumerate(SIZES):
        alone = layer_ratios(moved[:, begin : begin + size], [size])
        torch.testing.assert_close(alone[0], whole[i])
        begin += size
    assert not torch.allclose(layer_ratios(moved, [sum(SIZES)]), whole)


def test_what_is_refused() -> None:
    for moved, sizes in (
        (torch.ones(1, 4), [4]),
        (torch.ones(4), [4]),
        (torch.ones(2, 4), [3]),
        (torch.ones(2, 4), [4, 1]),
    ):
        with pytest.raises(ConfigError, match="at least two experts moved"):
            layer_ratios(moved, sizes)
        if moved.ndim == 2:
            with pytest.raises(ConfigError, match="at least two experts moved"):
                interpolate([torch.zeros(4)] * len(moved), list(moved), sizes, 0.5)
    with pytest.raises(ConfigError, match="1 starts"):
        interpolate([torch.zeros(4)], list(torch.ones(2, 4)), [4], 0.5)


def at_once(
    starts: list[Tensor], ends: list[Tensor], sizes: list[int], alpha: float
) -> tuple[Tensor, Tensor]:
    """All that moved in memory at once, then layer after layer: how this was computed before."""
    moved = torch.stack(ends)
    for row, start in zip(moved, starts, strict=True):
        row -= start
    ratios = layer_ratios(moved, sizes)
    layers = zip(ratios, moved.split(sizes, dim=1), starts[0].split(sizes), strict=True)
    return torch.cat(
        [layer.mean(dim=0) * t * alpha + origin for t, layer, origin in layers]
    ), ratios


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("common", [True, False])
def test_blocks_change_no_bit(k: int, common: bool) -> None:
    """Sizes below, at and above a block, so that layers share one or have one alone."""
    block = interpolation._BLOCK
    sizes = [7, block - 7, 1, block + 3, 64, 27, block // 2, block // 2, 300]
    generator = torch.Generator().manual_seed(k)
    starts = [torch.randn(sum(sizes), generator=generator) for _ in range(1 if common else k)]
    starts = starts * k if common else starts
    way = torch.randn(sum(sizes), generator=generator)
    ends = [s + 0.1 * way + 0.1 * torch.randn(way.shape, generator=generator) for s in starts]
    kept = [t.clone() for t in (*starts, *ends)]
    wanted, ratios = at_once(starts, ends, sizes, 0.5)
    room = torch.full_like(way, torch.nan)
    for out in (None, room, room):
        found = interpolate(starts, ends, sizes, 0.5, out)
        assert torch.equal(found[0], wanted)
        assert torch.equal(found[1], ratios)
    assert all(torch.equal(a, b) for a, b in zip((*starts, *ends), kept, strict=True))
    assert len(interpolation._blocks(sizes)) == 5
