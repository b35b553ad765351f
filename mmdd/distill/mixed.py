"""The mixed second derivative that trajectory matching lives on, in three ways.

A student step moves θ along g = ∇_θ ℓ(θ, u), u being what is learned: images, texts, similarity.
How the step's outcome changes with u is ∂_u ⟨∇_θ ℓ(θ, u), v⟩ for one direction v, and, where the
path through θ counts as well, ∂_θ ⟨∇_θ ℓ, v⟩ = H v.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.autograd.forward_ad as forward
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Engine = Literal["double-backward", "forward-over-reverse", "finite-difference"]
StepLoss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Mixed:
    """inputs: ∂_u ⟨∇_θ ℓ, v⟩, one tensor per entry of u. curvature: H v per part of θ, if wanted.

    gradient: ∇_θ ℓ per part of θ, where the engine computes it anyway.
    """

    inputs: list[Tensor]
    curvature: list[Tensor] | None = None
    gradient: list[Tensor] | None = None


def mixed_derivative(
    loss: StepLoss,
    theta: Sequence[Tensor],
    inputs: Sequence[Tensor],
    direction: Sequence[Tensor],
    engine: Engine,
    *,
    curvature: bool = False,
    relative_step: float = 1e-4,
) -> Mixed:
    """Differentiate ⟨∇_θ ℓ(θ, u), v⟩ with respect to u, and to θ where `curvature` is asked for.

    loss(θ, u) → scalar; it must compute the same function each time it is called (dropout masks
    included). theta, direction: the parts of θ and v, flat. inputs: the parts of u.

    "double-backward" differentiates the gradient's graph. "forward-over-reverse" is as exact: it
    carries the tangent v of θ through one forward and one backward pass, keeps no second-order
    graph, and computes no gradient of the weights unless curvature is wanted. "finite-difference"
    takes the central difference of ∂_u ℓ at θ ± εv with ε = relative_step · ‖θ‖ / ‖v‖: an
    approximation, cheaper still.

    Book: notebooks/05_trajectory_matching.
    """
    theta = [t.detach() for t in theta]
    inputs = [u.detach().requires_grad_() for u in inputs]
    function = {
        "double-backward": _double_backward,
        "forward-over-reverse": _forward_over_reverse,
    }.get(engine)
    if function is not None:
        return function(loss, theta, inputs, direction, curvature)
    return _finite_difference(loss, theta, inputs, direction, curvature, relative_step)


def _double_backward(
    loss: StepLoss,
    theta: list[Tensor],
    inputs: list[Tensor],
    direction: Sequence[Tensor],
    curvature: bool,
) -> Mixed:
    theta = [t.requires_grad_() for t in theta]
    with DifferentiableSiLU():
        value = loss(theta, inputs)
    gradient = torch.autograd.grad(value, theta, create_graph=True)
    wanted = [*inputs, *theta] if curvature else inputs
    found = torch.autograd.grad(
        gradient, wanted, list(direction), allow_unused=True, materialize_grads=True
    )
    return Mixed(
        list(found[: len(inputs)]),
        list(found[len(inputs) :]) if curvature else None,
        [g.detach() for g in gradient],
    )


def _forward_over_reverse(
    loss: StepLoss,
    theta: list[Tensor],
    inputs: list[Tensor],
    direction: Sequence[Tensor],
    curvature: bool,
) -> Mixed:
    if curvature:
        theta = [t.requires_grad_() for t in theta]
    with forward.dual_level(), DifferentiableSiLU():
        dual = [forward.make_dual(t, v) for t, v in zip(theta, direction, strict=True)]
        wanted = [*inputs, *dual] if curvature else inputs
        first = torch.autograd.grad(
            loss(dual, inputs), wanted, allow_unused=True, materialize_grads=True
        )
        parts = [forward.unpack_dual(g) for g in first]
    tangents = [
        torch.zeros_like(part.primal) if part.tangent is None else part.tangent for part in parts
    ]
    count = len(inputs)
    if not curvature:
        return Mixed(tangents)
    return Mixed(tangents[:count], tangents[count:], [part.primal for part in parts[count:]])


class DifferentiableSiLU(TorchFunctionMode):
    """SiLU whose backward has derivatives of its own, forward and reverse, that keep little.

    torch's own lacks the forward one, and writes the reverse one out in many small steps.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.silu:
            return _SiLU.apply(args[0] if args else (kwargs or {})["input"])
        return func(*args, **(kwargs or {}))


class _SiLU(torch.autograd.Function):
    """s(x) = x σ(x); all derivatives are computed from x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _SiLUBackward.apply(gradients[0], *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        return _silu_backward(tangents[0], *ctx.saved_tensors)


class _SiLUBackward(torch.autograd.Function):
    """g s'(x)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(g, x)
        ctx.save_for_forward(g, x)
        return _silu_backward(g, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        g, x = ctx.saved_tensors
        return _silu_backward(gradients[0], x), _silu_curved(x, g, gradients[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        g, x = ctx.saved_tensors
        return _silu_curved(x, g, tangents[1]).add_(_silu_backward(tangents[0], x))


def _silu_backward(g: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(g, x)


def _silu_curved(x: Tensor, g: Tensor, h: Tensor) -> Tensor:
    """g h s''(x), where s'' = σ (1 - σ) (2 + x (1 - 2 σ))."""
    sigma = torch.sigmoid(x)
    slope = sigma.addcmul(sigma, sigma, value=-1)
    return sigma.mul_(-2).add_(1).mul_(x).add_(2).mul_(slope).mul_(g).mul_(h)


def _finite_difference(
    loss: StepLoss,
    theta: list[Tensor],
    inputs: list[Tensor],
    direction: Sequence[Tensor],
    curvature: bool,
    relative_step: float,
) -> Mixed:
    length = _norm(direction)
    # No direction: both sides are at θ, and their difference is 0 whatever it is divided by. All
    # of it stays on the device, as asking for a number would make the host wait.
    step = relative_step * _norm(theta) / torch.where(length > 0, length, 1.0)
    sides = []
    for sign in (1.0, -1.0):
        moved = [(t + sign * step * v) for t, v in zip(theta, direction, strict=True)]
        if curvature:
            moved = [t.requires_grad_() for t in moved]
        wanted = [*inputs, *moved] if curvature else inputs
        sides.append(
            torch.autograd.grad(
                loss(moved, inputs), wanted, allow_unused=True, materialize_grads=True
            )
        )
    found = [(a - b) / (2 * step) for a, b in zip(*sides, strict=True)]
    return Mixed(found[: len(inputs)], found[len(inputs) :] if curvature else None)


def _norm(parts: Sequence[Tensor]) -> Tensor:
    """The length of all parts together, a float64 scalar."""
    return torch.stack([p.detach().double().square().sum() for p in parts]).sum().sqrt()
