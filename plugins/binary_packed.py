"""One-bit weights packed eight to a byte: the form in which a trained model is stored and asked.

A layer of `binary` multiplies by the signs of its weights W times their scales; W itself is needed for training alone.
Packed it has in its place

    bits    uint8 (outputs, ceil(inputs / 8)), inputs = channels · kernel in the order of W's axes, the first in the
            highest bit, 1 for +1; what is left of a row's last byte is 0
    scale   (outputs,), mean|W| of each

and gives what it gave before, to the last bit, on the device and in the precision where it was packed: elsewhere sums
are rounded otherwise, and a W that lies that close to the mean may have the other sign there.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from smallvit.plugins.binary import (
    BinaryConv2d,
    BinaryLinear,
    BinaryProduct,
    BinaryShortcutConv2d,
    BinaryShortcutLinear,
)
from smallvit.plugins.binary_estimators import signs


def pack(model: nn.Module) -> nn.Module:
    """Keep of the weights of a model's one-bit layers their signs and scales, in place, and return the model.

    Its answers stay what they were. There is no way back: what is packed cannot be unpatched, and its weights get no
    gradients. A layer that is packed already stays as it is.

    Raises:
        ValueError: no layer has one-bit weights.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, BinaryProduct) and layer.config.weights]
    if not layers:
        raise ValueError(f"this {type(model).__name__} has no layers with one-bit weights, so there is nothing to pack")
    for layer in layers:
        if not isinstance(layer, Packed):
            Packed.forms[type(layer)].take(layer)
    return model


def packed_layers(model: nn.Module) -> list[Packed]:
    """The layers of a model that are packed."""
    return [layer for layer in model.modules() if isinstance(layer, Packed)]


def pack_signs(sign: Float[Tensor, "o i *kernel"]) -> UInt8[Tensor, "o n"]:
    """Signs eight to a byte, row by row."""
    ones = F.pad((sign.flatten(1) > 0).to(torch.uint8), (0, -sign[0].numel() % 8))
    return (ones.unflatten(1, (-1, 8)) * _masks(sign.device)).sum(-1, dtype=torch.uint8)


def unpack_signs(bits: UInt8[Tensor, "o n"], inputs: int, dtype: torch.dtype) -> Float[Tensor, "o i"]:
    """The first `inputs` signs of each row, +1 or -1."""
    ones = bits[..., None].bitwise_and(_masks(bits.device)).bool()
    return ones.flatten(1)[:, :inputs].to(dtype) * 2 - 1


def _masks(device: torch.device) -> UInt8[Tensor, " 8"]:
    """128, 64, ... 1; made on the device, so that nothing waits for it."""
    return (2 ** torch.arange(7, -1, -1, device=device)).to(torch.uint8)


class Packed:
    """What makes a binary layer a packed one; put before its class."""

    forms: ClassVar[dict[type[BinaryProduct], type[Packed]]] = {}
    """The packed class of every class of layers that has one."""

    bits: UInt8[Tensor, "o n"]
    scale: Float[Tensor, " o"]

    def __init_subclass__(cls) -> None:  # not that of `Binary`: what the layer was made of stays what it is
        Packed.forms[cls.__bases__[1]] = cls

    @classmethod
    def take(cls, layer: BinaryProduct) -> None:
        """Turn a layer of the binary class into this one, in place."""
        sign, scale = signs(layer.weight.detach(), centred=layer.centred)
        del layer.weight
        layer.__class__ = cls
        layer.register_buffer("bits", pack_signs(sign))
        layer.register_buffer("scale", scale.flatten())

    @property
    def weight(self) -> Tensor:
        """What it multiplies by; a new tensor each time."""
        return self.scaled_signs()

    def scaled_signs(self) -> Tensor:
        """The signs of the weights times their scales."""
        inner = (
            (self.in_channels // self.groups, *self.kernel_size) if isinstance(self, nn.Conv2d) else (self.in_features,)
        )
        sign = unpack_signs(self.bits, math.prod(inner), self.scale.dtype).unflatten(1, inner)
        return sign * self.scale.view(-1, *[1] * len(inner))

    def release(self) -> None:
        """There is no way back.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"this {type(self).__name__} has no float weights to go back to: they were packed to bits")


class PackedLinear(Packed, BinaryLinear):
    """Of a linear layer without a shortcut."""


class PackedShortcutLinear(Packed, BinaryShortcutLinear):
    """Of one with a shortcut."""


class PackedConv2d(Packed, BinaryConv2d):
    """Of a convolution without a shortcut."""


class PackedShortcutConv2d(Packed, BinaryShortcutConv2d):
    """Of one with a shortcut."""
