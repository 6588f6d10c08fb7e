"""What a safetensors file says of its tensors, read without torch and without the tensors."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

LONGEST_HEADER = 10**8
"""Bytes; safetensors' own limit."""
PATCHES = ("patch_embed.proj.weight", "patch_embed.conv.weight")
POSITIONS = ("pos_embed", "patch_embed.pos_embed")
"""Names of the convolution that cuts patches, and of position embeddings."""


def header(path: Path) -> dict[str, Any]:
    """A safetensors file's header: for each tensor its type, shape and place, and the metadata.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, cut short, or of another format.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise ValueError("it has no header")
        found = json.loads(file.read(length))
    try:
        entries = [entry for name, entry in found.items() if name != "__metadata__"]
        end = max((entry["data_offsets"][1] for entry in entries), default=0)
        if not all(type(side) is int for entry in entries for side in entry["shape"]):
            raise TypeError
        complete = 8 + length + end == size
    except (AttributeError, KeyError, IndexError, TypeError):
        raise ValueError("its header is of another form") from None
    if not complete:
        raise ValueError(f"it has {size:,} bytes, {8 + length + end:,} are expected")
    return found


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a weights file's tensors.

    Raises:
        OSError, ValueError: as `header` does.
    """
    return {name: tuple(entry["shape"]) for name, entry in header(path).items() if name != "__metadata__"}


def sizes(path: Path, patch_size: int | None) -> dict[str, int]:
    """Channels, patch and image size in pixels, as far as a weights file's tensors tell.

    Position embeddings may be (1, n, c), with up to two tokens that are none of the image's, (1, i, j, c) or
    (1, c, i, j). `patch_size` is what they are multiplied by where the file does not say.

    Raises:
        OSError, ValueError: as `header` does.
    """
    found = shapes(path)
    kernel = next((found[name] for name in PATCHES if len(found.get(name, ())) == 4), None)
    known = {"in_chans": kernel[1], "patch_size": kernel[-1]} if kernel else {}
    patch = known.get("patch_size", patch_size)
    side = _side(next((found[name] for name in POSITIONS if name in found), ()))
    return known | ({"img_size": side * patch} if side and patch else {})


def _side(positions: tuple[int, ...]) -> int:
    """Tokens along an image's side; 0 where that cannot be told."""
    if len(positions) == 4:
        return positions[1] if positions[1] == positions[2] else positions[3]
    counts = range(positions[1], max(0, positions[1] - 3), -1) if len(positions) == 3 else ()
    return next((math.isqrt(count) for count in counts if math.isqrt(count) ** 2 == count), 0)
