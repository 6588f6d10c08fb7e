"""Represent image sizes: one number for squares, as in timm, or a `Rectangle`."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from smallvit.utils.errors import InputError


class Rectangle(NamedTuple):
    """Height and width in pixels, which differ."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


ImageSize = int | Rectangle
"""Side of square images in pixels, or height and width."""


def height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return height and width in pixels."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def image_size(height: int, width: int) -> ImageSize:
    """Return the size of images of this height and width."""
    return int(height) if height == width else Rectangle(int(height), int(width))


def parse_size(value: Any) -> ImageSize:
    """Return the image size that an option or a record holds: 64, "64", "64x96", (64, 96) or [64, 96].

    Raises:
        InputError: it is no size.
    """
    sides = value if isinstance(value, list | tuple) else [value]
    if isinstance(value, str) and re.fullmatch(r"\d+(x\d+)?", value, re.ASCII):
        sides = [int(side) for side in value.split("x")]
    if not 1 <= len(sides) <= 2 or any(type(side) is not int or side < 1 for side in sides):
        raise InputError(f"--img-size {value}: expected pixels, e.g. 64, or height x width, e.g. 64x96")
    return image_size(sides[0], sides[-1])


def fit_sides(
    sides: tuple[int, int], size: int | tuple[int, int], crop_mode: str = "center", crop_pct: float = 1.0
) -> tuple[int, int]:
    """Return the height and width to which timm's transform for evaluation resizes an image before the crop.

    Args:
        sides: Height and width of the image.
        size: Image size after the crop.
        crop_mode: "center" covers `size`, "border" fits into it, both with the image's aspect ratio; "squash" has the
            aspect ratio of `size`.
        crop_pct: `size` divided by that before the crop.
    """
    target = tuple(int(side / crop_pct) for side in height_width(size))
    if crop_mode == "squash":
        return target
    if crop_mode == "center" and target[0] == target[1]:  # as torchvision, which rounds down
        height, width = (int(target[0] * side / min(sides)) for side in sides)
        return height, width
    ratio = (max if crop_mode == "border" else min)(side / goal for side, goal in zip(sides, target, strict=True))
    height, width = (max(1, round(side / ratio)) for side in sides)
    return height, width
