"""One-bit layers: binary weights, activations and attention maps, and what makes them trainable.

BinaryViT (Le, Li 2023, arXiv:2306.16678), with the estimators that it takes from Bi-Real Net (arXiv:1808.00278),
ReActNet (arXiv:2003.03488), BiT (arXiv:2205.13016) and LSQ (arXiv:1902.08153). With sign(0) = +1:

    activations    sign(x + m), m learnt per channel          d sign/dx := max(0, 2 - 2 |x|)
    linear         mean|W| · sign(W - mean W), row by row     dL/dW := dL/dW_b where |W - mean W| <= 1, else 0
    convolution    mean|W| · sign(W), per output channel      dL/dW := dL/dW_b where |W| <= 1, else 0
    attention      α · clamp(round(p / α), 0, 1)              dL/dp := dL/dP where 0 <= p/α <= 1, else 0
                                                              dP/dα := g · (round(p/α) - p/α there, 1 above)
    RPReLU         PReLU(x - a) + b, all per channel

where round takes halves to even numbers, g = 1/√(values of an image's map), and the scales mean|W| get no gradient. A
layer's result is RPReLU(BatchNorm(product) + shortcut): the shortcut is the input, tiled for wider outputs, and the
means of neighbouring channels for narrower ones.

Differs from the official code: sign(0) is +1, there 0, which one bit cannot hold; g counts the values of one image, not
of the batch, so that it does not depend on how a batch is cut; the logarithm of α is what is learnt, as α itself soon
falls below 0 at high learning rates, and its layer attends to nothing from then on.

Axes: b batch, h heads, n queries, m keys, d head width, c = h·d, i j token grid, r rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smallvit.plugins.attend import add_bias, softmax
from smallvit.plugins.binary_estimators import FastPReLU, binary_probabilities, binary_sign, binary_weight


@dataclass(frozen=True, kw_only=True)
class BinaryConfig:
    """What of a model has one bit."""

    weights: bool = True
    """Of linear layers and convolutions."""
    activations: bool = True
    """What they are given."""
    attention: bool = True
    """Queries, keys, values and maps of attention."""
    downsampling: bool = True
    """Mergings of tokens too, which are in full precision otherwise."""
    shortcut: bool = True
    """Give layers that have none a batch norm, a shortcut and an RPReLU, without which they learn little."""
    step: float = 0.005
    """What α begins at."""

    def __post_init__(self) -> None:
        if not (self.weights or self.activations or self.attention):
            raise ValueError("BinaryConfig: weights, activations, attention: expected one of them at least")
        if not self.step > 0:
            raise ValueError(f"BinaryConfig: step {self.step}: expected a number above 0")


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
    """A layer of rows (r, c), such as batch norm, over tokens."""
    return layer(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def shortcut(x: Float[Tensor, "*b c"], dim: int) -> Float[Tensor, "*b dim"] | None:
    """Tokens `dim` wide: tiled, or the means of neighbouring channels; none where the widths do not divide."""
    width = x.shape[-1]
    if dim % width == 0:
        return x.repeat(*[1] * (x.ndim - 1), dim // width)
    return x.unflatten(-1, (dim, width // dim)).mean(dim=-1) if width % dim == 0 else None


class ShortcutLinear(nn.Linear):
    """RPReLU(BatchNorm(x Wᵀ) + shortcut); tokens (*b, in_features) to (*b, out_features)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.dress()

    def dress(self) -> None:
        """Get what a linear layer has not."""
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.norm = nn.BatchNorm1d(self.out_features, **like)
        self.act = RPReLU(self.out_features, **like)

    def product(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b e"]:
        """x Wᵀ"""
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b e"]:
        y = over_channels(self.norm, self.product(x))
        beside = shortcut(x, self.out_features)
        return over_channels(self.act, y if beside is None else y + beside)


class ShortcutConv2d(nn.Conv2d):
    """RPReLU(BatchNorm(conv(x)) + shortcut) of maps (b, c, i, j), not padded; the shortcut: means of what it sees.

    `out_channels` is a multiple of `in_channels`.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.act = RPReLU(out_channels)

    def product(self, x: Float[Tensor, "b c i j"]) -> Float[Tensor, "b e k l"]:
        """The convolution alone."""
        return self._conv_forward(x, self.weight, self.bias)

    def forward(self, x: Float[Tensor, "b c i j"]) -> Float[Tensor, "b e k l"]:
        beside = F.avg_pool2d(x, self.kernel_size, self.stride).repeat(1, self.out_channels // self.in_channels, 1, 1)
        return self.act(self.norm(self.product(x)) + beside)


class Binary:
    """What makes a layer a binary one; put before its class."""

    adapters: ClassVar[dict[type[nn.Module], type[Binary]]] = {}
    """The binary class of every class of layers that has one."""
    adapted: ClassVar[type[nn.Module]]

    config: BinaryConfig
    dressed: bool
    """Whether the layer got its norm, shortcut and RPReLU with its bits."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if len(cls.__bases__) > 1:
            cls.adapted = cls.__bases__[1]
            Binary.adapters[cls.adapted] = cls

    @classmethod
    def adopt(cls, layer: nn.Module, config: BinaryConfig, *, dressed: bool = False) -> None:
        """Turn a layer of the class adapted into this one, in place; its weights and hooks stay."""
        layer.__class__ = cls
        layer.config, layer.dressed = config, dressed
        layer.begin()
        layer.train(layer.training)  # what is new too

    def begin(self) -> None:
        """Get what the layer adapted has not."""
        raise NotImplementedError

    def release(self) -> None:
        """Turn back into what the layer was, in place."""
        before = self.before
        for name in (*self.brought, "config", "dressed"):
            delattr(self, name)
        self.__class__ = before

    @property
    def before(self) -> type[nn.Module]:
        """The layer's class before it was patched."""
        return self.adapted

    @property
    def brought(self) -> tuple[str, ...]:
        """Names of the parameters and layers in it that it had not before."""
        raise NotImplementedError

    @property
    def brought_parameters(self) -> int:
        """How many parameters these are."""
        return sum(value.numel() for name, value in self.named_parameters() if name.split(".")[0] in self.brought)


class BinaryProduct(Binary):
    """A product of binary activations and binary weights."""

    centred: ClassVar[bool]
    """Whether the sign is that of the weights minus their mean."""
    axes_after_channels: ClassVar[int]
    move: nn.Parameter | None
    """What is added to each channel before its sign is taken."""

    def begin(self) -> None:
        moved = torch.zeros(self.channels, device=self.weight.device, dtype=self.weight.dtype)
        self.register_parameter("move", nn.Parameter(moved) if self.config.activations else None)

    @property
    def before(self) -> type[nn.Module]:
        return nn.Linear if self.dressed else self.adapted

    @property
    def brought(self) -> tuple[str, ...]:
        return ("move", "norm", "act") if self.dressed else ("move",)

    @property
    def channels(self) -> int:
        """How many are signed."""
        raise NotImplementedError

    def signed(self, x: Tensor) -> Tensor:
        """What is multiplied by the weights: signs, or x itself."""
        if self.move is None:
            return x
        return binary_sign(x + self.move.to(x.dtype).view(-1, *[1] * self.axes_after_channels))

    def scaled_signs(self) -> Tensor:
        """What it is multiplied by: the signs of the weights times their scales, or the weights."""
        return binary_weight(self.weight, centred=self.centred) if self.config.weights else self.weight


class BinaryMatrix(BinaryProduct):
    """That of a linear layer: (*b, in_features) to (*b, out_features)."""

    centred = True
    axes_after_channels = 0

    @property
    def channels(self) -> int:
        return self.in_features

    def product(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b e"]:
        """What it multiplies by what."""
        return F.linear(self.signed(x), self.scaled_signs(), self.bias)


class BinaryKernel(BinaryProduct):
    """That of a convolution, of maps (b, c, i, j)."""

    centred = False
    axes_after_channels = 2

    @property
    def channels(self) -> int:
        return self.in_channels

    def product(self, x: Float[Tensor, "b c i j"]) -> Float[Tensor, "b e k l"]:
        """What it multiplies by what."""
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


class BinaryShortcutConv2d(BinaryKernel, ShortcutConv2d):
    """One with a shortcut."""


class BinaryAttending(Binary):
    """Attention with binary queries, keys, values and maps."""

    moves: nn.Parameter
    """What is added to the channels of queries, keys and values before their signs are taken: (3c,)."""
    log_step: nn.Parameter
    """The logarithm of α."""

    def begin(self) -> None:
        like = next(self.parameters())
        kind = {"device": like.device, "dtype": like.dtype}
        self.moves = nn.Parameter(torch.zeros(3 * self.inner_width, **kind))
        self.log_step = nn.Parameter(torch.full((), math.log(self.config.step), **kind))
        if self.dressed:
            self.mix_norm, self.mix_act = nn.BatchNorm1d(self.inner_width, **kind), RPReLU(self.inner_width, **kind)

    @property
    def brought(self) -> tuple[str, ...]:
        return ("moves", "log_step", *(("mix_norm", "mix_act") if self.dressed else ()))

    @property
    def inner_width(self) -> int:
        """Width of all heads together."""
        raise NotImplementedError

    def products(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m d"],
        scale: Tensor | float,
        bias: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Float[Tensor, "b h n d"]:
        """P v, of the signs of q, k and v, where P is the binary softmax(scale · q kᵀ + bias)."""
        moves = self.moves.view(3, 1, q.shape[1], 1, -1).to(q.dtype)
        q, k, v = (binary_sign(each + move) for each, move in zip((q, k, v), moves, strict=True))
        scores = add_bias((q @ k.transpose(-2, -1)) * scale, bias)
        maps = binary_probabilities(softmax(scores), self.log_step.to(torch.float32).exp())
        return F.dropout(maps.to(v.dtype), dropout) @ v
