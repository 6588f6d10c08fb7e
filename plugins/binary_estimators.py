"""What one-bit layers compute, and the gradients that stand in for those that they have not.

`binary` has the equations and their sources.

Axes: b batch, h heads, n queries, m keys, o outputs, i inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def binary_sign(x: Tensor) -> Tensor:
    """+1 where x >= 0, else -1; its derivative is taken to be max(0, 2 - 2|x|)."""
    return _Sign.apply(x)


def binary_weight(weight: Float[Tensor, "o i *kernel"], *, centred: bool) -> Float[Tensor, "o i *kernel"]:
    """mean|W| · sign(W), of each output; `centred` takes the sign of W minus the output's mean."""
    return _Weight.apply(weight, centred)


def binary_probabilities(p: Float[Tensor, "b h n m"], step: Float[Tensor, ""]) -> Float[Tensor, "b h n m"]:
    """α · clamp(round(p / α), 0, 1) of attention maps p, with α the learnt step."""
    return _Probabilities.apply(p, step)


def signs(weight: Float[Tensor, "o i *kernel"], *, centred: bool) -> tuple[Tensor, Tensor]:
    """The sign (+1 or -1) of every weight, and the scale (o, 1, ...) of each output."""
    return plus_minus(from_mean(weight, centred=centred)), weight.abs().mean(_inner(weight), keepdim=True)


def from_mean(weight: Float[Tensor, "o i *kernel"], *, centred: bool) -> Float[Tensor, "o i *kernel"]:
    """The weights minus the mean of their output's, or as they are."""
    return weight - weight.mean(_inner(weight), keepdim=True) if centred else weight


def _inner(weight: Tensor) -> tuple[int, ...]:
    """Axes of what is summed up for an output."""
    return tuple(range(1, weight.ndim))


def plus_minus(x: Tensor) -> Tensor:
    """+1 where x >= 0, else -1."""
    return (x.sign() + 0.5).sign()  # several times faster than a choice, on CPUs


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return plus_minus(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (2 - 2 * x.abs()).clamp_(min=0).mul_(gradient)


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, centred: bool) -> Tensor:
        ctx.save_for_backward(from_mean(weight, centred=centred).abs() <= 1)
        sign, scale = signs(weight, centred=centred)
        return sign * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None


class _Probabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, step: Tensor) -> Tensor:
        ctx.save_for_backward(p, step)
        return (p / step).round().clamp(0, 1) * step

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        p, step = ctx.saved_tensors
        q = p / step
        inside = (q >= 0) & (q <= 1)
        slope = q.round().clamp(0, 1) - q * inside
        return gradient * inside, (gradient * slope).sum().to(step.dtype) * p[0].numel() ** -0.5


class FastPReLU(torch.autograd.Function):
    """torch's, with a gradient that is several times faster on CPUs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        return F.prelu(x, slope)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, slope = ctx.saved_tensors
        above = torch.ops.aten.threshold_backward(gradient, x, 0)
        below = gradient - above
        others = [axis for axis in range(x.ndim) if axis != 1]
        return torch.addcmul(above, below, slope.view(-1, *[1] * (x.ndim - 2))), (below * x).sum(others)
