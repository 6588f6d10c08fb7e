"""Random rectangles, one per image: to crop, to erase, to cut and paste.

Axes: b batch, h w pixels, t attempts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

ATTEMPTS = 10


@dataclass(frozen=True)
class Boxes:
    """A rectangle per image in pixels, bottom and right exclusive; empty where nothing is to happen."""

    top: np.ndarray
    left: np.ndarray
    bottom: np.ndarray
    right: np.ndarray

    def part(self, chosen: slice | np.ndarray) -> Boxes:
        """The rectangles of a part of the images."""
        return Boxes(self.top[chosen], self.left[chosen], self.bottom[chosen], self.right[chosen])

    def repeat(self, b: int) -> Boxes:
        """The first rectangle, for b images."""
        return self.part(np.zeros(b, dtype=np.int64))

    def inside(self, h: int, w: int, device: torch.device) -> Bool[Tensor, "b 1 h w"]:
        """The pixels within each image's rectangle."""
        edges = np.stack([self.top, self.left, self.bottom, self.right])
        top, left, bottom, right = torch.from_numpy(edges).to(device, non_blocking=True)[..., None]
        y, x = torch.arange(h, device=device), torch.arange(w, device=device)
        rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
        return (rows[:, :, None] & columns[:, None, :])[:, None]


def erasing_boxes(rng: np.random.Generator, chosen: np.ndarray, h: int, w: int, area: tuple[float, float]) -> Boxes:
    """Rectangles after torchvision's RandomErasing: area uniform, ratio log-uniform, the first of 10 that fits."""
    height, width, fits = _shapes(rng, len(chosen), h, w, area, (0.3, 1 / 0.3), smaller=True)
    happens = chosen & fits
    return _place(rng, height * happens, width * happens, h, w)


def crop_boxes(rng: np.random.Generator, b: int, h: int, w: int, area: tuple[float, float]) -> Boxes:
    """Rectangles after torchvision's RandomResizedCrop: as for erasing, of 3:4 to 4:3; else the whole image."""
    height, width, fits = _shapes(rng, b, h, w, area, (3 / 4, 4 / 3), smaller=False)
    return _place(rng, np.where(fits, height, h), np.where(fits, width, w), h, w)


def cutmix_boxes(rng: np.random.Generator, chosen: np.ndarray, kept: np.ndarray, h: int, w: int) -> Boxes:
    """CutMix's rectangles: share 1 − kept of the area, centre uniform, cut off at the image's border."""
    side = np.sqrt(1 - kept)
    height, width = np.floor(h * side), np.floor(w * side)
    y, x = rng.integers(0, h, len(chosen)), rng.integers(0, w, len(chosen))
    top, bottom = np.clip(y - height // 2, 0, h), np.clip(y - height // 2 + height, 0, h)
    left, right = np.clip(x - width // 2, 0, w), np.clip(x - width // 2 + width, 0, w)
    return _whole(top, left, np.where(chosen, bottom, top), right)


def _shapes(
    rng: np.random.Generator,
    b: int,
    h: int,
    w: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
    smaller: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Heights, widths, and whether they fit; `ratio` is height to width or its inverse, symmetric in logarithm."""
    pixels = rng.uniform(*area, (b, ATTEMPTS)) * h * w
    slant = np.exp(rng.uniform(*np.log(ratio), (b, ATTEMPTS)))
    height, width = np.round(np.sqrt(pixels * slant)), np.round(np.sqrt(pixels / slant))
    fits = (height < h) & (width < w) if smaller else (height <= h) & (width <= w) & (height > 0) & (width > 0)
    first = (np.arange(b), fits.argmax(axis=1))
    return height[first], width[first], fits.any(axis=1)


def _place(rng: np.random.Generator, height: np.ndarray, width: np.ndarray, h: int, w: int) -> Boxes:
    top = np.floor(rng.random(len(height)) * (h - height + 1))
    left = np.floor(rng.random(len(width)) * (w - width + 1))
    return _whole(top, left, top + height, left + width)


def _whole(*edges: np.ndarray) -> Boxes:
    return Boxes(*(edge.astype(np.int64) for edge in edges))
