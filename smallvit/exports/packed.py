"""A trained model with one-bit weights as a weights file that packs them eight to a byte.

It says of itself what the run's weights file says, and that it is packed; `plugins.pack` tells how. Whatever asks a
model takes it in place of the run's: predict, eval, attend, profile, `smallvit.load`, --teacher.
"""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn

from smallvit.checkpoint import load, save_weights, snapshot
from smallvit.errors import InputError
from smallvit.exports.exported import own_metadata, require_same
from smallvit.files import replacing
from smallvit.plugins import pack, set_fused_attention
from smallvit.plugins.binary_packed import packed_layers
from smallvit.ready import Ready
from smallvit.trained import PACKED, card

SUFFIX = ".packed.safetensors"
"""Of the file in a run's folder."""


def write(model: Ready, path: Path) -> str:
    """Write the packed file, tried by loading it; returns how much smaller it is, in words.

    Raises:
        InputError: no weights have one bit, or the model answers otherwise when it is loaded again.
    """
    try:
        packed = pack(copy.deepcopy(model.model))
    except ValueError as error:
        raise model.card.error(f"{error}; give another --format") from None
    with replacing(path) as partial:
        save_weights(partial, snapshot(packed), own_metadata(model) | {PACKED: True})
        try:
            loaded = load(partial)
        except InputError:  # keys and values of fewer places, or of more
            told = f"it has other layers at {model.img_size} pixels than it learnt with; leave out --img-size"
            raise model.card.error(told) from None
        set_fused_attention(loaded, model.device.type, model.dtype)
        require_same(model, loaded, "smallvit", tolerance=0.0)
    return sizes(packed, path.stat().st_size)


def sizes(model: nn.Module, file: int) -> str:
    """How many bytes the weights of a packed model's layers take, and its `file`, against 32-bit floats."""
    layers = packed_layers(model)
    bits = sum(layer.bits.nbytes + layer.scale.nbytes for layer in layers)
    floats = sum(4 * layer.weight.numel() for layer in layers)
    parts = {f"weights of {len(layers)} one-bit layers": (bits, floats), "whole file": (file, file - bits + floats)}
    return "\n".join(
        f"{what}: {now:,} bytes instead of {before:,}, {before / now:.1f} times smaller"
        for what, (now, before) in parts.items()
    )


def require_packed(path: Path, shown: str) -> None:
    """Check that a file that is to be replaced is a packed one, not weights that are nowhere else.

    Raises:
        InputError: it is not.
    """
    try:
        former = card(str(path), shown)
    except InputError:
        former = None
    if former is None or not former.packed:
        raise InputError(f"{shown}: not a packed file; choose another name")
