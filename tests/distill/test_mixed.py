"""The mixed second derivative: three engines against each other and against plain differences."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from mmdd.distill.mixed import Engine, mixed_derivative

EXACT: tuple[Engine, ...] = ("double-backward", "forward-over-reverse")


class StandardisedConv(nn.Conv2d):
    """A weight-standardised convolution through batch norm in training mode, as timm has it."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6)
        return self._conv_forward(x, weight.reshape_as(self.weight), self.bias)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(6, 18)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.project(tokens).chunk(3, dim=-1)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape_as(x)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "layer norm": lambda: nn.LayerNorm([6, 4, 4]),
    "standardised conv": lambda: StandardisedConv(6, 6, 3, padding=1),
    "attention": Attention,
    "pooling": lambda: nn.Sequential(nn.AvgPool2d(2), nn.Upsample(scale_factor=2)),
}


def problem(
    layer: str,
) -> tuple[Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor], list[Tensor], list[Tensor]]:
    """A small float64 loss of (θ, u) with the layer in its middle; u: images, soft labels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), LAYERS[layer](), nn.Flatten(), nn.Linear(96, 5)
    ).double()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    theta = [torch.cat([p.detach().reshape(-1) for p in model.parameters()])]
    inputs = [torch.rand(4, 3, 4, 4).double(), torch.rand(4, 5).double()]

    def loss(theta: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
        pieces = theta[0].split([shape.numel() for shape in shapes.values()])
        named = {n: p.view(s) for (n, s), p in zip(shapes.items(), pieces, strict=True)}
        out = functional_call(model, named, (inputs[0],))
        return -(inputs[1] * F.log_softmax(out, dim=1)).sum() / 4

    return loss, theta, inputs


@pytest.mark.parametrize("layer", LAYERS)
def test_the_engines_agree_with_a_difference_quotient(layer: str) -> None:
    """⟨∂_u⟨∇_θ ℓ, v⟩, w⟩ is a number that first derivatives and two steps along w give as well."""
    loss, theta, inputs = problem(layer)
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(theta[0].shape, generator=generator).double()]
    ways = [torch.randn(u.shape, generator=generator).double() for u in (*inputs, *theta)]

    def along(shift: float) -> float:
        moved = [(u + shift * w) for u, w in zip((*inputs, *theta), ways, strict=True)]
        at = moved[2].requires_grad_()
        (gradient,) = torch.autograd.grad(loss([at], moved[:2]), at)
        return float((gradient * direction[0]).sum())

    h = 1e-5
    expected = (along(h) - along(-h)) / (2 * h)
    for engine in EXACT:
        found = mixed_derivative(loss, theta, inputs, direction, engine, curvature=True)
        assert found.curvature is not None
        pairs = zip((*found.inputs, *found.curvature), ways, strict=True)
        value = float(sum((g * w).sum() for g, w in pairs))
        assert value == pytest.approx(expected, rel=1e-6), engine


@pytest.mark.parametrize("layer", LAYERS)
def test_the_exact_engines_are_one(layer: str) -> None:
    loss, theta, inputs = problem(layer)
    direction = [torch.randn(theta[0].shape, generator=torch.Generator().manual_seed(2)).double()]
    double, over = (
        mixed_derivative(loss, theta, inputs, direction, e, curvature=True) for e in EXACT
    )
    assert double.curvature is not None
    assert over.curvature is not None
    for a, b in zip(double.inputs + double.curvature, over.inputs + over.curvature, strict=True):
        assert a.norm() > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * float(a.norm()))
    without = mixed_derivative(loss, theta, inputs, direction, "forward-over-reverse")
    assert without.curvature is None
    for a, b in zip(without.inputs, over.inputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_gradients_come_along_where_they_are_computed_anyway() -> None:
    loss, theta, inputs = problem("gelu")
    direction = [torch.ones_like(theta[0])]
    at = theta[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss([at], inputs), at)
    double = mixed_derivative(loss, theta, inputs, direction, "double-backward")
    over = mixed_derivative(loss, theta, inputs, direction, "forward-over-reverse", curvature=True)
    for found in (double, over):
        assert found.gradient is not None
        torch.testing.assert_close(found.gradient[0], expected, rtol=1e-12, atol=1e-15)


def test_the_difference_is_of_second_order_in_its_step() -> None:
    loss, theta, inputs = problem("silu")
    direction = [torch.randn(theta[0].shape, generator=torch.Generator().manual_seed(3)).double()]
    exact = mixed_derivative(loss, theta, inputs, direction, "double-backward", curvature=True)
    errors = []
    for step in (1e-2, 1e-3):
        found = mixed_derivative(
            loss, theta, inputs, direction, "finite-difference", curvature=True, relative_step=step
        )
        assert found.curvature is not None
        assert exact.curvature is not None
        pairs = zip(found.inputs + found.curvature, exact.inputs + exact.curvature, strict=True)
        errors.append(float(sum((a - b).square().sum() for a, b in pairs)) ** 0.5)
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.1)


def test_no_direction_no_derivative() -> None:
    loss, theta, inputs = problem("silu")
    for engine in (*EXACT, "finite-difference"):
        found = mixed_derivative(
            loss, theta, inputs, [torch.zeros_like(theta[0])], engine, curvature=True
        )
        assert found.curvature is not None
        for tensor in (*found.inputs, *found.curvature):
            assert tensor.abs().max() == 0


def test_nothing_is_left_behind() -> None:
    """No gradient on the caller's tensors, and no requires_grad switched on."""
    loss, theta, inputs = problem("silu")
    for engine in (*EXACT, "finite-difference"):
        mixed_derivative(loss, theta, inputs, [torch.ones_like(theta[0])], engine, curvature=True)
        for tensor in (*theta, *inputs):
            assert tensor.grad is None
            assert not tensor.requires_grad


def test_the_difference_is_that_of_a_step_counted_by_the_host() -> None:
    loss, theta, inputs = problem("silu")
    direction = [torch.randn(theta[0].shape, generator=torch.Generator().manual_seed(3)).double()]

    def norm(parts: list[Tensor]) -> float:
        return float(torch.stack([p.double().square().sum() for p in parts]).sum().sqrt())

    step = 1e-4 * norm(theta) / norm(direction)
    sides = []
    for sign in (1.0, -1.0):
        moved = [t + sign * step * v for t, v in zip(theta, direction, strict=True)]
        leaves = [u.detach().requires_grad_() for u in inputs]
        sides.append(torch.autograd.grad(loss(moved, leaves), leaves))
    wanted = [(a - b) / (2 * step) for a, b in zip(*sides, strict=True)]
    found = mixed_derivative(loss, theta, inputs, direction, "finite-difference").inputs
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
