"""Compute one-bit layers: binary weights, activations and attention maps, with gradient estimators.

BinaryViT (Le, Li 2023, arXiv:2306.16678), with the estimators that it takes from Bi-Real Net (arXiv:1808.00278),
ReActNet (arXiv:2003.03488), BiT (arXiv:2205.13016) and LSQ (arXiv:1902.08153). With sign(0) = +1:

    activations    sign(x + m), m learned per channel         d sign/dx := max(0, 2 - 2 |x|)
    linear         mean|W| · sign(W - mean W), row by row     dL/dW := G - mean G, row by row, with
                                                              G := dL/dW_b where |W - mean W| <= 1, else 0
    convolution    mean|W| · sign(W), per output channel      dL/dW := dL/dW_b where |W| <= 1, else 0
    attention      α · clamp(round(p / α), 0, 1)              dL/dp := dL/dP where 0 <= p/α <= 1, else 0
                                                              dP/dα := round(p/α) - p/α there, 1 above
    RPReLU         PReLU(x - a) + b, all per channel

where round takes halves to even numbers, and the scales mean|W| get no gradient. Each gradient is that of the official
code, which differentiates clamp(W - mean W, -1, 1), so that the rows of dL/dW sum to 0. A layer's result is
RPReLU(BatchNorm(product) + shortcut): the shortcut is the input, tiled for wider outputs, and the means of neighbouring
channels for narrower ones.

Differs from the official code: sign(0) is +1, there 0, which one bit cannot hold; the learned parameter is the
logarithm of α, as α itself soon falls below 0 at high learning rates, and its layer attends to nothing from then on.

Axes: b batch, h heads, n queries, m keys, d head width, c = h·d, i j token grid, r rows.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from smallvit.plugins.binary import BinaryConfig
from smallvit.plugins.leaf import Adapter
from smallvit.plugins.sdpa import add_bias, softmax


class RPReLU(nn.Module):
    """PReLU(x - before) + after, of channels on axis 1: rows (r, c) or maps (b, c, i, j)."""

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        like = {"device": device, "dtype": dtype}
        self.before = nn.Parameter(torch.zeros(dim, **like))
        self.slope = nn.Parameter(torch.full((dim,), 0.25, **like))
        self.after = nn.Parameter(torch.zeros(dim, **like))

    def forward(self, x: Tensor) -> Tensor:
        before, slope, after = (each.to(x.dtype) for each in (self.before, self.slope, self.after))
        shape = (-1, *[1] * (x.ndim - 2))
        return FastPReLU.apply(x - before.view(shape), slope) + after.view(shape)


def over_channels(layer: nn.Module, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
    """Apply a layer of rows (r, c), such as batch norm, to tokens."""
    return layer(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def shortcut(x: Float[Tensor, "*b c"], dim: int) -> Float[Tensor, "*b dim"] | None:
    """Return tokens of width `dim`: tiled, or means of adjacent channels; None if one width is no multiple."""
    width = x.shape[-1]
    if dim % width == 0:
        return x.repeat(*[1] * (x.ndim - 1), dim // width)
    return x.unflatten(-1, (dim, width // dim)).mean(dim=-1) if width % dim == 0 else None


class ShortcutLinear(nn.Linear):
    """RPReLU(BatchNorm(x Wᵀ) + shortcut); tokens (*b, in_features) to (*b, out_features)."""

    plain: ClassVar[type[nn.Module]] = nn.Linear
    dressing: ClassVar[tuple[str, ...]] = ("norm", "act")

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.dress()

    def dress(self) -> None:
        """Add the norm and activation that a linear layer does not have."""
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.norm = nn.BatchNorm1d(self.out_features, **like)
        self.act = RPReLU(self.out_features, **like)

    def product(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b e"]:
        """Return x Wᵀ, the layer's product alone."""
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b e"]:
        y = over_channels(self.norm, self.product(x))
        residual = shortcut(x, self.out_features)
        return over_channels(self.act, y if residual is None else y + residual)


class NormConv2d(nn.Conv2d):
    """BatchNorm(conv(x)) of maps (b, c, i, j), without padding or bias."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def product(self, x: Float[Tensor, "b c i j"]) -> Float[Tensor, "b e k l"]:
        """Return the convolution alone."""
        return self._conv_forward(x, self.weight, self.bias)

    def forward(self, x: Float[Tensor, "b c i j"]) -> Float[Tensor, "b e k l"]:
        return self.norm(self.product(x))


class ShortcutConv2d(NormConv2d):
    """RPReLU(BatchNorm(conv(x)) + shortcut); the shortcut is the mean of each patch the convolution reads.

    `out_channels` must be a multiple of `in_channels`.
    """

    plain: ClassVar[type[nn.Module]] = NormConv2d
    dressing: ClassVar[tuple[str, ...]] = ("act",)

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride)
        self.dress()

    def dress(self) -> None:
        """Add the activation, which the plain layer does not have."""
        self.act = RPReLU(self.out_channels, device=self.weight.device, dtype=self.weight.dtype)

    def forward(self, x: Float[Tensor, "b c i j"]) -> Float[Tensor, "b e k l"]:
        residual = F.avg_pool2d(x, self.kernel_size, self.stride).repeat(1, self.out_channels // self.in_channels, 1, 1)
        return self.act(self.norm(self.product(x)) + residual)


class Binary(Adapter):
    """Mixin that makes a layer a one-bit layer."""

    adapters: ClassVar[dict[type[nn.Module], type[Binary]]] = {}
    config: BinaryConfig
    dressed: bool
    """Whether norm, shortcut and RPReLU were added together with the bits."""
    has_bits: bool = False
    """Whether the layer's weights have one bit."""
    multiplies_bits: bool = False
    """Whether both factors of the layer's own products have one bit."""

    @classmethod
    def adopt(cls, layer: nn.Module, config: BinaryConfig, *, dressed: bool = False) -> None:
        """Turn a layer of the adapted class into this one, in place; its weights and hooks stay."""
        layer.__class__ = cls
        layer.config, layer.dressed = config, dressed
        layer.begin()  # adds the parameters
        layer.train(layer.training)  # new submodules too


class BinaryProduct(Binary):
    """A product of binary activations and binary weights."""

    centered: ClassVar[bool]
    """Whether signs are taken of the weights minus their mean."""
    axes_after_channels: ClassVar[int]
    move: nn.Parameter | None
    """Offset of each channel before its sign is taken."""

    def begin(self) -> None:
        channels = self.in_channels if isinstance(self, nn.Conv2d) else self.in_features
        moved = torch.zeros(channels, device=self.weight.device, dtype=self.weight.dtype)
        self.register_parameter("move", nn.Parameter(moved) if self.config.activations else None)

    @property
    def has_bits(self) -> bool:
        return self.config.weights

    @property
    def multiplies_bits(self) -> bool:
        return self.config.weights and self.config.activations

    @property
    def before(self) -> type[nn.Module]:
        return self.adapted.plain if self.dressed else self.adapted

    @property
    def added(self) -> tuple[str, ...]:
        return ("move", *(self.adapted.dressing if self.dressed else ()), "config", "dressed")

    def signed(self, x: Tensor) -> Tensor:
        """Return the signs of the input, or x in full precision."""
        if self.move is None:
            return x
        return binary_sign(x + self.move.to(x.dtype).view(-1, *[1] * self.axes_after_channels))

    def scaled_signs(self) -> Tensor:
        """Return the signs of the weights times their scales, or the weights in full precision."""
        return binary_weight(self.weight, centered=self.centered) if self.config.weights else self.weight


class BinaryMatrix(BinaryProduct):
    """One-bit product of a linear layer: (*b, in_features) to (*b, out_features)."""

    centered = True
    axes_after_channels = 0

    def product(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b e"]:
        """Return the layer's product alone, without norm, shortcut and activation."""
        return F.linear(self.signed(x), self.scaled_signs(), self.bias)


class BinaryKernel(BinaryProduct):
    """One-bit product of a convolution of maps (b, c, i, j)."""

    centered = False
    axes_after_channels = 2

    def product(self, x: Float[Tensor, "b c i j"]) -> Float[Tensor, "b e k l"]:
        """Return the layer's product alone, without norm, shortcut and activation."""
        return self._conv_forward(self.signed(x), self.scaled_signs(), self.bias)


class BinaryLinear(BinaryMatrix, nn.Linear):
    """A linear layer without a shortcut."""

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b e"]:
        return self.product(x)


class BinaryShortcutLinear(BinaryMatrix, ShortcutLinear):
    """One with a shortcut."""


class BinaryConv2d(BinaryKernel, nn.Conv2d):
    """A convolution without a shortcut."""

    def forward(self, x: Float[Tensor, "b c i j"]) -> Float[Tensor, "b e k l"]:
        return self.product(x)


class BinaryNormConv2d(BinaryKernel, NormConv2d):
    """A convolution followed by a batch norm, without a shortcut."""


class BinaryShortcutConv2d(BinaryKernel, ShortcutConv2d):
    """One with a shortcut."""


class BinaryAttending(Binary):
    """Attention with binary queries, keys, values and maps."""

    inner_width: int
    """Width of all heads together."""
    multiplies_bits = True
    moves: nn.Parameter
    """Offsets of the channels of queries, keys and values before their signs are taken: (3c,)."""
    log_step: nn.Parameter
    """The logarithm of α."""

    def fuse(self) -> None:
        """Stay unchanged: a temperature cannot be folded into signs."""

    def begin(self) -> None:
        like = next(self.parameters())
        kind = {"device": like.device, "dtype": like.dtype}
        self.moves = nn.Parameter(torch.zeros(3 * self.inner_width, **kind))
        self.log_step = nn.Parameter(torch.full((), math.log(self.config.step), **kind))
        if self.dressed:
            self.mix_norm, self.mix_act = nn.BatchNorm1d(self.inner_width, **kind), RPReLU(self.inner_width, **kind)

    @property
    def added(self) -> tuple[str, ...]:
        return ("moves", "log_step", *(("mix_norm", "mix_act") if self.dressed else ()), "config", "dressed")

    def products(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m d"],
        scale: Tensor | float,
        bias: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Float[Tensor, "b h n d"]:
        """Return P v of the signs of q, k and v, where P is the one-bit softmax(scale · q kᵀ + bias)."""
        moves = self.moves.view(3, 1, q.shape[1], 1, -1).to(q.dtype)
        q, k, v = (binary_sign(each + move) for each, move in zip((q, k, v), moves, strict=True))
        scores = add_bias((q @ k.transpose(-2, -1)) * scale, bias)
        maps = binary_probabilities(softmax(scores), self.log_step.to(torch.float32).exp())
        return F.dropout(maps.to(v.dtype), dropout) @ v


def binary_sign(x: Tensor) -> Tensor:
    """Return +1 where x >= 0, else -1; the gradient estimator is max(0, 2 - 2|x|)."""
    return _Sign.apply(x)


def binary_weight(weight: Float[Tensor, "o i *kernel"], *, centered: bool) -> Float[Tensor, "o i *kernel"]:
    """Return mean|W| · sign(W) of each output; `centered` takes the sign of W minus the output's mean.

    The gradient is that of clamp(W, -1, 1), or of clamp(W - mean W, -1, 1): it passes through the mean too, so that
    for centered weights it sums to 0 over each output. The scale mean|W| gets none.
    """
    return _Weight.apply(weight, centered)


def binary_probabilities(p: Float[Tensor, "b h n m"], step: Float[Tensor, ""]) -> Float[Tensor, "b h n m"]:
    """Return α · clamp(round(p / α), 0, 1) of attention maps p, with the learned step α."""
    return _Probabilities.apply(p, step)


def signs(weight: Float[Tensor, "o i *kernel"], *, centered: bool) -> tuple[Tensor, Tensor]:
    """Return the sign (+1 or -1) of every weight, and the scale (o, 1, ...) of each output."""
    return plus_minus(from_mean(weight, centered=centered)), weight.abs().mean(_inner(weight), keepdim=True)


def from_mean(weight: Float[Tensor, "o i *kernel"], *, centered: bool) -> Float[Tensor, "o i *kernel"]:
    """Return the weights, minus the mean of each output if `centered`."""
    return weight - weight.mean(_inner(weight), keepdim=True) if centered else weight


def _inner(weight: Tensor) -> tuple[int, ...]:
    """Return the axes that are reduced for each output."""
    return tuple(range(1, weight.ndim))


def plus_minus(x: Tensor) -> Tensor:
    """Return +1 where x >= 0, else -1."""
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
    def forward(ctx: Any, weight: Tensor, centered: bool) -> Tensor:
        ctx.save_for_backward(from_mean(weight, centered=centered).abs() <= 1)
        ctx.centered = centered
        sign, scale = signs(weight, centered=centered)
        return sign * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return from_mean(gradient * inside, centered=ctx.centered), None


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
        return gradient * inside, (gradient * slope).sum().to(step.dtype)


class FastPReLU(torch.autograd.Function):
    """torch's PReLU with a gradient that is several times faster on CPUs."""

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
