"""Draw random rectangles, one per image: to crop, to erase, to cut and paste.

Axes: b batch, h w pixels.
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
    """A rectangle per image in pixels, bottom and right exclusive; empty for images without one."""

    top: np.ndarray
    left: np.ndarray
    bottom: np.ndarray
    right: np.ndarray

    def part(self, chosen: slice | np.ndarray) -> Boxes:
        """Return the rectangles of some of the images."""
        return Boxes(self.top[chosen], self.left[chosen], self.bottom[chosen], self.right[chosen])

    def repeat(self, b: int) -> Boxes:
        """Return the first rectangle for b images."""
        return self.part(np.zeros(b, dtype=np.int64))

    def mask(self, h: int, w: int, device: torch.device) -> Bool[Tensor, "b 1 h w"]:
        """Return which pixels lie within each image's rectangle."""
        edges = np.stack([self.top, self.left, self.bottom, self.right])
        top, left, bottom, right = torch.from_numpy(edges).to(device, non_blocking=True)[..., None]
        y, x = torch.arange(h, device=device), torch.arange(w, device=device)
        rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
        return (rows[:, :, None] & columns[:, None, :])[:, None]


def erasing_boxes(rng: np.random.Generator, chosen: np.ndarray, h: int, w: int, area: tuple[float, float]) -> Boxes:
    """Draw rectangles as torchvision's RandomErasing: area uniform, ratio log-uniform, the first of 10 that fits."""
    height, width, fits = _draw_sides(rng, len(chosen), h, w, area, (0.3, 1 / 0.3), smaller=True)
    happens = chosen & fits
    return _draw_positions(rng, height * happens, width * happens, h, w)


def crop_boxes(rng: np.random.Generator, b: int, h: int, w: int, area: tuple[float, float]) -> Boxes:
    """Draw rectangles as torchvision's RandomResizedCrop: as for erasing, from 3:4 to 4:3, or else the whole image."""
    height, width, fits = _draw_sides(rng, b, h, w, area, (3 / 4, 4 / 3), smaller=False)
    return _draw_positions(rng, np.where(fits, height, h), np.where(fits, width, w), h, w)


def cutmix_boxes(rng: np.random.Generator, chosen: np.ndarray, kept: np.ndarray, h: int, w: int) -> Boxes:
    """Draw CutMix's rectangles: a share 1 − kept of the area, uniform center, clipped at the image's border."""
    side = np.sqrt(1 - kept)
    height, width = np.floor(h * side), np.floor(w * side)
    y, x = rng.integers(0, h, len(chosen)), rng.integers(0, w, len(chosen))
    top, bottom = np.clip(y - height // 2, 0, h), np.clip(y - height // 2 + height, 0, h)
    left, right = np.clip(x - width // 2, 0, w), np.clip(x - width // 2 + width, 0, w)
    return _integer_boxes(top, left, np.where(chosen, bottom, top), right)


def _draw_sides(
    rng: np.random.Generator,
    b: int,
    h: int,
    w: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
    smaller: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw heights and widths, and return whether they fit; `ratio` is symmetric in its logarithm."""
    pixels = rng.uniform(*area, (b, ATTEMPTS)) * h * w
    slant = np.exp(rng.uniform(*np.log(ratio), (b, ATTEMPTS)))
    height, width = np.round(np.sqrt(pixels * slant)), np.round(np.sqrt(pixels / slant))
    fits = (height < h) & (width < w) if smaller else (height <= h) & (width <= w) & (height > 0) & (width > 0)
    first = (np.arange(b), fits.argmax(axis=1))
    return height[first], width[first], fits.any(axis=1)


def _draw_positions(rng: np.random.Generator, height: np.ndarray, width: np.ndarray, h: int, w: int) -> Boxes:
    top = np.floor(rng.random(len(height)) * (h - height + 1))
    left = np.floor(rng.random(len(width)) * (w - width + 1))
    return _integer_boxes(top, left, top + height, left + width)


def _integer_boxes(*edges: np.ndarray) -> Boxes:
    return Boxes(*(edge.astype(np.int64) for edge in edges))
