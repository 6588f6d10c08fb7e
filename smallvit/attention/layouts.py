"""How the tokens lie that a layer attends to: those that stand before the image's, the image's grid, its windows.

What timm's classes say about it is read here and nowhere else: `num_prefix_tokens` (PiT's `num_tokens`), the shape of
what a block is given, and the grid that it is told (PVT, BinaryViT), Swin's `window_size` and `shift_size`; and what
the head reads, `global_pool` and `head_dist`. Where a class is silent, the grid is the one of so many tokens that is
most like the image, or of keys that are of fewer places than the queries, most like that of the queries.

Axes: b batch, w windows of an image, n queries, m keys, i j token grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from timm.layers import AttentionPoolLatent
from timm.models.cait import TalkingHeadAttn
from timm.models.convit import GPSA
from torch import nn

from smallvit.t2t import TokenAttention

PATCHES_ALONE = (GPSA, TalkingHeadAttn, TokenAttention)
"""Layers that come before the class token."""
UNPOOLED = (None, "", "token", "prr")
"""Values of `global_pool` by which a class token is read, where there is one."""
LIKENESS = 2.0
"""How much longer or shorter a grid may be than the image, against its width."""

Sides = tuple[int, int]


@dataclass(frozen=True)
class Call:
    """A module at work."""

    name: str
    """Qualified, in the model."""
    module: nn.Module
    shape: tuple[int, ...]
    """Of the first tensor that it was given."""
    grid: Sides | None = None
    """The first pair of numbers that it was given beside: rows and columns of its tokens."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a layer's queries and keys lie in the image."""

    prefix: int
    """Tokens that stand before the image's among the keys."""
    query_prefix: int
    """The same among the queries."""
    grid: Sides
    """Rows and columns of the image's tokens among the keys."""
    query_grid: Sides | None = None
    """The same among the queries, where theirs is another; None also where a single token asks."""
    window: Sides | None = None
    """Rows and columns of windows, where attention is within such."""
    shift: Sides = (0, 0)
    """By how many rows and columns the image was rolled up and left before it was cut into windows."""
    reads: tuple[int, ...] | None = None
    """The queries of which the model's head reads the mean; None: those of the image."""
    probes: bool = False
    """Whether what asks is no token of the model, but the layer's own (attention pooling)."""


def layout(
    shape: Sequence[int],
    calls: Sequence[Call],
    model: nn.Module,
    images: Sequence[int],
    before: Sequence[Layout],
) -> Layout | None:
    """The layout of a map of `shape` (b·w, n, m), computed by the last of `calls`; None where it is not known.

    `calls` are the modules at work, outermost first, `images` the images' shape (b, c, h, w), and `before` the
    layouts of the maps before.
    """
    batch, n, m = shape
    for call in reversed(calls):
        if hasattr(call.module, "shift_size"):
            grid, window, shift = call.shape[1:3], tuple(call.module.window_size), tuple(call.module.shift_size)
            return Layout(prefix=0, query_prefix=0, grid=tuple(grid), window=window, shift=shift)
    if batch != images[0] or not _between_tokens(calls[-1].shape, n, m):
        return None
    grids = [each.query_grid or each.grid for each in before]
    if n == 1 < m and (grids := [grid for grid in grids if math.prod(grid) <= m]):
        grid = max(grids, key=math.prod)
        probes = isinstance(calls[-1].module, AttentionPoolLatent)
        reads = (0,) if probes else _reads(model, 1, 1)
        return Layout(prefix=m - math.prod(grid), query_prefix=1, grid=grid, reads=reads, probes=probes)
    last = grids[-1] if grids else None
    queries = _split(n, calls[-1], model, images[2:], last)
    keys = queries if n == m else _pooled(m, queries) if m < n else _split(m, calls[-1], model, images[2:], last)
    if keys is None or queries is None:
        return None
    other = queries[1] if queries[1] != keys[1] and n > 1 else None
    reads = _reads(model, queries[0], n)
    return Layout(prefix=keys[0], query_prefix=queries[0], grid=keys[1], query_grid=other, reads=reads)


def nearest_grid(count: int, sides: Sequence[int]) -> Sides:
    """The rows and columns of `count` tokens that are most like the image's sides."""
    grids = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    return min(grids, key=lambda grid: _unlikeness(grid, sides))


def _between_tokens(given: tuple[int, ...], n: int, m: int) -> bool:
    """Whether queries or keys are the tokens that the layer was given, not its channels; one query is a token more."""
    tokens = {math.prod(given[1:3]), math.prod(given[2:])} if len(given) == 4 else {*given[1:2]}
    return n == 1 or not tokens.isdisjoint({n, m, m - 1})


def _reads(model: nn.Module, prefix: int, queries: int) -> tuple[int, ...] | None:
    """What the model's head would read of so many tokens, `prefix` of them before the image's; None: the image's."""
    if getattr(model, "global_pool", None) in UNPOOLED and getattr(model, "has_class_token", True):
        two = prefix > 1 and getattr(model, "head_dist", None) is not None
        return ((0, 1) if two else (0,)) if prefix else None
    return tuple(range(queries)) if getattr(model, "pool_include_prefix", False) else None


def _split(
    count: int, call: Call, model: nn.Module, sides: Sequence[int], last: Sides | None
) -> tuple[int, Sides] | None:
    """The number of tokens before the image's, and the grid, of `count` tokens; `last` is the grid before."""
    if len(call.shape) == 4:
        for grid in (call.shape[1:3], call.shape[2:]):
            if math.prod(grid) == count:
                return 0, tuple(grid)
    told = getattr(model, "num_prefix_tokens", getattr(model, "num_tokens", None))
    if call.grid is not None and (rest := count - math.prod(call.grid)) in (0, told):
        return rest, call.grid
    if last is not None and (rest := count - math.prod(last)) in (0, told):
        return rest, last
    for prefixes in ((0,),) if isinstance(call.module, PATCHES_ALONE) else ((told,), (0, 1)):
        splits = [(prefix, nearest_grid(count - prefix, sides)) for prefix in prefixes if _holds(count, prefix)]
        best = min(splits, key=lambda split: _unlikeness(split[1], sides), default=None)
        if best is not None and _unlikeness(best[1], sides) <= math.log(LIKENESS):
            return best
    return None


def _pooled(count: int, queries: tuple[int, Sides] | None) -> tuple[int, Sides] | None:
    """The same of `count` keys that are the queries' tokens, of fewer places."""
    if queries is None or not _holds(count, queries[0]):
        return None
    prefix, sides = queries
    grid = nearest_grid(count - prefix, sides)
    return (prefix, grid) if _unlikeness(grid, sides) <= math.log(LIKENESS) else None


def _holds(count: int, prefix: int | None) -> bool:
    return prefix is not None and count > prefix


def _unlikeness(grid: Sides, sides: Sequence[int]) -> float:
    return abs(math.log(grid[0] * sides[1] / (grid[1] * sides[0])))
