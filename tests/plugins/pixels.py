"""Shifted patch tokenization's views, cut out one pixel at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DIAGONAL = [(-1, -1), (-1, 1), (1, -1), (1, 1)]  # left-up, right-up, left-down, right-down
CARDINAL = [(-1, 0), (0, -1), (0, 1), (1, 0)]
DIRECTIONS = {"diagonal": DIAGONAL, "cardinal": CARDINAL, "all": DIAGONAL + CARDINAL}


def shifts(patch: tuple[int, int], directions: str = "diagonal", share: float = 0.5) -> list[tuple[int, int]]:
    """Return the shifts of the views down and to the right, in pixels."""
    s, t = (max(1, math.floor(share * side)) for side in patch)
    return [(down * s, right * t) for down, right in DIRECTIONS[directions]]


def cut(
    x: Tensor,
    patch: tuple[int, int],
    views: list[tuple[int, int]],
    stride: tuple[int, int] | None = None,
    padding: tuple[int, int] = (0, 0),
    ceil: bool = False,
) -> Tensor:
    """(b, i, j, v, c, p, q): what each token sees in each view; zeros outside the image."""
    (h, w), (p, q) = x.shape[2:], patch
    s, t = stride or patch
    rounded = math.ceil if ceil else math.floor
    rows, columns = rounded((h + 2 * padding[0] - p) / s) + 1, rounded((w + 2 * padding[1] - q) / t) + 1

    def pixel(i: int, j: int, down: int, right: int, row: int, column: int) -> int:
        y, z = i * s - padding[0] + row + down, j * t - padding[1] + column + right
        return y * w + z if 0 <= y < h and 0 <= z < w else h * w

    index = [
        [[[[pixel(i, j, *view, r, c) for c in range(q)] for r in range(p)] for view in views] for j in range(columns)]
        for i in range(rows)
    ]
    with_zero = torch.cat([x.flatten(2), x.new_zeros(*x.shape[:2], 1)], dim=-1)
    return with_zero[:, :, torch.tensor(index)].movedim(1, 4)
