"""Pack one-bit weights eight to a byte, for storage and inference.

A one-bit layer multiplies by the signs of its weights W times their scales; only training needs W itself.
A packed layer stores instead

    bits    uint8 (outputs, ceil(inputs / 8)), inputs = channels · kernel in the order of W's axes, the first in the
            highest bit, 1 for +1; what is left of a row's last byte is 0
    scale   (outputs,), mean|W| of each

and returns bit-equal outputs on the device and in the precision of packing. Elsewhere sums are rounded differently, and
a weight close to the mean may have the other sign.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from smallvit.plugins.binary_layers import (
    BinaryConv2d,
    BinaryLinear,
    BinaryNormConv2d,
    BinaryProduct,
    BinaryShortcutConv2d,
    BinaryShortcutLinear,
    signs,
)


def pack(model: nn.Module) -> nn.Module:
    """Replace the weights of a model's one-bit layers by signs and scales, in place, and return the model.

    Its outputs do not change. Packing cannot be undone: packed layers cannot be unpatched, and their weights get no
    gradients. Layers that are packed already stay unchanged.

    Raises:
        ValueError: no layer has one-bit weights.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, BinaryProduct) and layer.has_bits]
    if not layers:
        raise ValueError(f"this {type(model).__name__} has no layers with one-bit weights, so there is nothing to pack")
    for layer in layers:
        if not isinstance(layer, Packed):
            FORMS[type(layer)].take(layer)
    return model


def packed_layers(model: nn.Module) -> list[Packed]:
    """Return the packed layers of a model."""
    return [layer for layer in model.modules() if isinstance(layer, Packed)]


def pack_signs(sign: Float[Tensor, "o i *kernel"]) -> UInt8[Tensor, "o n"]:
    """Pack signs eight to a byte, row by row."""
    ones = F.pad((sign.flatten(1) > 0).to(torch.uint8), (0, -sign[0].numel() % 8))
    return (ones.unflatten(1, (-1, 8)) * _masks(sign.device)).sum(-1, dtype=torch.uint8)


def unpack_signs(bits: UInt8[Tensor, "o n"], inputs: int, dtype: torch.dtype) -> Float[Tensor, "o i"]:
    """Return the first `inputs` signs of each row, +1 or -1."""
    ones = bits[..., None].bitwise_and(_masks(bits.device)).bool()
    return ones.flatten(1)[:, :inputs].to(dtype) * 2 - 1


def _masks(device: torch.device) -> UInt8[Tensor, " 8"]:
    """Return 128, 64, ... 1, created on the device to avoid a transfer."""
    return (2 ** torch.arange(7, -1, -1, device=device)).to(torch.uint8)


class Packed:
    """Mixin that makes a one-bit layer a packed one; the first base, before the layer's class."""

    irreversible: ClassVar[str] = "its weights were packed to bits"
    """Why the layer cannot be unpatched."""
    bits: UInt8[Tensor, "o n"]
    scale: Float[Tensor, " o"]

    @classmethod
    def take(cls, layer: BinaryProduct) -> None:
        """Turn a layer of the one-bit class into this one, in place."""
        sign, scale = signs(layer.weight.detach(), centered=layer.centered)
        del layer.weight
        layer.__class__ = cls
        layer.register_buffer("bits", pack_signs(sign))
        layer.register_buffer("scale", scale.flatten())

    @property
    def weight(self) -> Tensor:
        """Unpacked weights, a new tensor each time."""
        return self.scaled_signs()

    def scaled_signs(self) -> Tensor:
        """Return the signs of the weights times their scales."""
        inner = (
            (self.in_channels // self.groups, *self.kernel_size) if isinstance(self, nn.Conv2d) else (self.in_features,)
        )
        sign = unpack_signs(self.bits, math.prod(inner), self.scale.dtype).unflatten(1, inner)
        return sign * self.scale.view(-1, *[1] * len(inner))


FORMS: dict[type[BinaryProduct], type[Packed]] = {
    kind: type(kind.__name__.replace("Binary", "Packed"), (Packed, kind), {"__module__": __name__})
    for kind in (BinaryLinear, BinaryShortcutLinear, BinaryConv2d, BinaryNormConv2d, BinaryShortcutConv2d)
}
"""Packed class by one-bit class."""
globals().update({form.__name__: form for form in FORMS.values()})  # so that instances pickle
