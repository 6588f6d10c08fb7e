"""What one-bit layers save: how many of a model's operations have one bit, and the bytes of its weights.

    OPs = BOPs / 64 + FLOPs        Liu et al. 2018 and 2020, arXiv:1808.00278 and arXiv:2003.03488

BOPs are multiply-accumulates of two factors with one bit each: of a layer whose weights and activations both have one,
and the two products of binary attention, signs with signs and maps of 0 and 1 with signs. FLOPs are all others, one for
each multiply-accumulate: those of the embedding, the head, and layers where one factor is in full precision. As in
`profile`, only products count: no norms, activations, shortcuts, means over places or softmax.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from smallvit.plugins.binary import BinaryAttending, BinaryProduct

WORD = 64
"""One-bit multiply-accumulates that take as long as another."""
SCALE_BYTES = 4
"""Of the scale of each of a one-bit layer's outputs."""
FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Operations:
    """Multiply-accumulates of one image's forward pass."""

    bops: int
    """Of two factors with one bit each."""
    flops: int
    """All others."""

    @property
    def macs(self) -> int:
        """Both, whatever their bits."""
        return self.bops + self.flops

    @property
    def ops(self) -> float:
        """Both, one-bit ones for a part of the others."""
        return self.bops / WORD + self.flops


def operations(model: nn.Module, macs: Mapping[str, int]) -> Operations:
    """A model's operations; `macs` is what `profile.macs_by_layer` counted."""
    bops = sum(_own_macs(name, layer, macs) for name, layer in model.named_modules() if _multiplies_bits(layer))
    return Operations(bops=bops, flops=macs[""] - bops)


def packed_bytes(model: nn.Module) -> int:
    """Bytes of a model's tensors where one-bit weights are bits; of the tensors alone, without a file's header.

    Each output's weights are filled up to whole bytes and have a scale of four; other numbers are `float_bytes`.
    """
    bits = {_key(name, "weight") for name, layer in model.named_modules() if _has_bits(layer)}
    state = model.state_dict()
    return sum(_packed(value) if name in bits else _plain(value) for name, value in state.items())


def float_bytes(model: nn.Module) -> int:
    """Bytes of a model's tensors in full precision: four for each float, eight for each count of batch norms."""
    return sum(map(_plain, model.state_dict().values()))


def _multiplies_bits(layer: nn.Module) -> bool:
    """Whether both factors of a layer's own products have one bit."""
    return isinstance(layer, BinaryAttending) or (_has_bits(layer) and layer.config.activations)


def _has_bits(layer: nn.Module) -> bool:
    """Whether a layer's weights have one bit."""
    return isinstance(layer, BinaryProduct) and layer.config.weights


def _own_macs(name: str, layer: nn.Module, macs: Mapping[str, int]) -> int:
    """What a layer computes itself, without the layers in it."""
    return macs.get(name, 0) - sum(macs.get(_key(name, child), 0) for child, _ in layer.named_children())


def _key(layer: str, own: str) -> str:
    """The qualified name of what is in a layer; the model's own is ''."""
    return f"{layer}.{own}" if layer else own


def _packed(weight: Tensor) -> int:
    return len(weight) * (-(-weight[0].numel() // 8) + SCALE_BYTES)


def _plain(value: Tensor) -> int:
    return value.numel() * (FLOAT_BYTES if value.is_floating_point() else value.element_size())
