"""List the architectures of this package, and check names and sizes. Imports no torch."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from smallvit.utils.errors import InputError, suggest
from smallvit.utils.sizes import height_width, image_size

OURS = {
    "vit": "lee2021.vit",
    "cait": "lee2021.cait",
    "pit": "lee2021.pit",
    "swin": "lee2021.swin",
    "t2t": "t2t.T2TViT",
    "vit96": "lee2021.vit96",
    "binaryvit": "binaryvit.binaryvit",
    "binaryvit_tiny": "binaryvit.binaryvit_tiny",
}
"""Transformers of this package, and where they are built."""
LEE2021 = ("vit", "cait", "pit", "swin", "t2t")
"""Architectures of Lee et al. 2021."""
CIFAR_RESNETS = {"resnet20": 20, "resnet32": 32, "resnet44": 44, "resnet56": 56, "resnet110": 110}
"""ResNets for CIFAR, and their depths."""


def require_name(arch: str) -> None:
    """Check that an architecture exists, here or in timm.

    Raises:
        InputError: it does not; the closest name is given.
    """
    base = arch.partition(".")[0]  # without the tag of pretrained weights
    if base in OURS or base in CIFAR_RESNETS or base in timm_names():
        return
    names = [*OURS, *CIFAR_RESNETS, *sorted(timm_names())]
    raise InputError(f"--arch {arch}: no such architecture{suggest(base, names)}; see timm.list_models()")


@cache
def timm_names() -> frozenset[str]:
    """Return the names of timm's models, read from its source, since importing it takes seconds."""
    spec = find_spec("timm")
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = [file for folder in folders for file in Path(folder, "models").glob("*.py")]
    pattern = re.compile(r"^@register_model\s+def (\w+)|^ +'(\w+)': '\w+',?$", re.MULTILINE)
    return frozenset(name for file in files for match in pattern.findall(file.read_text("utf-8")) for name in match)


def require_multiple(img_size: int | tuple[int, int], patch_size: int) -> None:
    """Check that patches fill an image.

    Raises:
        InputError: they do not; the sizes next to it are given.
    """
    sides = height_width(img_size)
    if any(side % patch_size for side in sides):
        below = [side // patch_size * patch_size for side in sides]
        above = image_size(*(-(-side // patch_size) * patch_size for side in sides))
        use = f"{image_size(*below)} or {above}" if all(below) else f"{above}, or a smaller --patch-size"
        raise InputError(f"--img-size {image_size(*sides)} is not a multiple of the patch size {patch_size}; use {use}")
