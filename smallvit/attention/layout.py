"""Detect how the tokens that an attention layer sees lie in the image: prefix tokens, grid, windows.

The layout is needed to draw a map over the image, and timm's models describe it in different ways. This module is the
only one that knows them. For each attention map, the sources are tried in this order:

1. Windows: a module with `shift_size` (Swin) receives (batch, rows, columns, channels); `window_size` and `shift_size`
   give the rest.
2. A single query (class attention, attention pooling): the keys are the largest earlier grid that fits.
3. An attention layer that receives a feature map (4 dimensions): its rows and columns.
4. The number of prefix tokens (`num_prefix_tokens`, or `num_tokens` in PiT) with a grid: the one passed to the block
   (PVT, BinaryViT), that of `patch_embed`, that of the layer before, or one merged from it.
5. Otherwise the grid with this number of tokens whose aspect ratio is closest to that of the image. Pooled keys get
   the grid closest to that of the queries.

If none fits, as after dropping or merging single tokens, there is no layout. The tokens that the classifier reads
follow from `global_pool` and `head_dist`. All attributes are those of the Vision Transformer that contains the layer,
which may be a submodule of another model.

Axes: b batch, w windows of an image, n queries, m keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from timm.layers import AttentionPoolLatent
from timm.models.cait import TalkingHeadAttn
from timm.models.convit import GPSA
from torch import nn

from smallvit.models.t2t import TokenAttention

BEFORE_CLASS_TOKEN = (GPSA, TalkingHeadAttn, TokenAttention)
"""Layers that run before the class token is added."""
CLASS_TOKEN_POOLING = (None, "", "token", "prr")
"""Values of `global_pool` with which the classifier reads the class token."""
MAX_STRETCH = 2.0
"""Maximum ratio between the aspect ratios of a grid and of the image."""
MAX_STRETCH_GUESSED = 1.25
"""The same if the number of prefix tokens is not known either."""
TRANSFORMER_ATTRIBUTES = ("num_classes", "global_pool")
"""Attributes that identify a Vision Transformer within another model."""

Sides = tuple[int, int]


@dataclass(frozen=True)
class Call:
    """A running call of a module."""

    name: str
    """Qualified name in the model."""
    module: nn.Module
    shape: tuple[int, ...]
    """Shape of the first tensor argument."""
    grid: Sides | None = None
    """First argument that is a pair of integers: rows and columns of the tokens."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the queries and keys of a layer lie in the image."""

    prefix: int
    """Number of keys before the image tokens: class and distillation tokens, and registers."""
    query_prefix: int
    """Number of queries before the image tokens; 1 in class attention."""
    grid: Sides
    """Rows and columns of the image tokens among the keys."""
    query_grid: Sides | None = None
    """Rows and columns of the image tokens among the queries, if they differ; None also for a single query."""
    window: Sides | None = None
    """Rows and columns of a window, in tokens."""
    shift: Sides = (0, 0)
    """Rows and columns that the image is rolled up and left by before it is partitioned into windows."""
    readout: tuple[int, ...] | None = None
    """Indices of the tokens whose mean the classifier reads: (0,) is the class token, (0, 1) adds a distillation token.
    None is the mean over the image tokens."""
    latent_query: bool = False
    """Whether the query is a parameter of the layer and not a token of the model (attention pooling)."""


def find_transformer(model: nn.Module, calls: Sequence[Call], images: Sequence[int]) -> tuple[nn.Module, Sequence[int]]:
    """Return the Vision Transformer within `model` that contains the last of `calls`, and the shape of its images.

    Returns `model` itself and `images` if no submodule is a Vision Transformer.
    """
    path = calls[-1].name
    while path and not any(hasattr(model.get_submodule(path), name) for name in TRANSFORMER_ATTRIBUTES):
        path = path.rpartition(".")[0]
    for call in reversed(calls):
        if len(call.shape) == 4 and f"{path}.".startswith(f"{call.name}." if call.name else ""):
            return model.get_submodule(path), call.shape
    return model.get_submodule(path), images


def detect_layout(
    shape: Sequence[int], calls: Sequence[Call], model: nn.Module, images: Sequence[int], previous: Sequence[Layout]
) -> Layout | None:
    """Return the layout of an attention map, or None if it is not known.

    Args:
        shape: Shape (b·w, n, m) of the map, without heads.
        calls: Running calls, outermost first; the last computes the map.
        model: The Vision Transformer, as returned by `find_transformer`.
        images: Shape of its images.
        previous: Layouts of the maps before.
    """
    batch, n, m = shape
    for call in reversed(calls):
        if hasattr(call.module, "shift_size"):
            grid, window, shift = call.shape[1:3], tuple(call.module.window_size), tuple(call.module.shift_size)
            if batch != images[0] * math.prod(-(-side // step) for side, step in zip(grid, window, strict=True)):
                return None
            return Layout(prefix=0, query_prefix=0, grid=tuple(grid), window=window, shift=shift)
    if batch != images[0] or not _attends_to_tokens(calls[-1].shape, n, m):
        return None
    grids = [grid for each in previous if math.prod(grid := each.query_grid or each.grid) <= m]
    if n == 1 < m and grids:
        grid, latent = max(grids, key=math.prod), isinstance(calls[-1].module, AttentionPoolLatent)
        readout = (0,) if latent else _readout(model, 1, 1)
        return Layout(prefix=m - math.prod(grid), query_prefix=1, grid=grid, readout=readout, latent_query=latent)
    queries = _split_tokens(n, calls[-1], model, images[2:], previous)
    if m < n:
        keys = queries and _nearest_split(m, (queries[0],), queries[1], MAX_STRETCH)
    else:
        keys = queries if n == m else _split_tokens(m, calls[-1], model, images[2:], previous)
    if keys is None or queries is None:
        return None
    return Layout(
        prefix=keys[0],
        query_prefix=queries[0],
        grid=keys[1],
        query_grid=queries[1] if queries[1] != keys[1] and n > 1 else None,
        readout=_readout(model, queries[0], n),
    )


def nearest_grid(count: int, sides: Sequence[int]) -> Sides:
    """Return the rows and columns of `count` tokens whose aspect ratio is closest to that of `sides`."""
    grids = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    return min(grids, key=lambda grid: _log_stretch(grid, sides))


def _attends_to_tokens(given: tuple[int, ...], n: int, m: int) -> bool:
    """Return whether queries or keys are the tokens that the layer was given, and not its channels.

    A single query may have been added to the keys.
    """
    tokens = {math.prod(given[1:3]), math.prod(given[2:])} if len(given) == 4 else {*given[1:2]}
    return n == 1 or not tokens.isdisjoint({n, m, m - 1})


def _readout(model: nn.Module, prefix: int, queries: int) -> tuple[int, ...] | None:
    """Return the tokens whose mean the classifier would read from the output of a layer, as `Layout.readout`."""
    if getattr(model, "global_pool", None) in CLASS_TOKEN_POOLING and getattr(model, "has_class_token", True):
        distilled = prefix > 1 and getattr(model, "head_dist", None) is not None
        return ((0, 1) if distilled else (0,)) if prefix else None
    return tuple(range(queries)) if getattr(model, "pool_include_prefix", False) else None


def _split_tokens(
    count: int, call: Call, model: nn.Module, sides: Sequence[int], previous: Sequence[Layout]
) -> tuple[int, Sides] | None:
    """Return the number of prefix tokens and the grid of `count` tokens, or None if they are not known."""
    if len(call.shape) == 4:
        for grid in (call.shape[1:3], call.shape[2:]):
            if math.prod(grid) == count:
                return 0, tuple(grid)
    prefix = getattr(model, "num_prefix_tokens", getattr(model, "num_tokens", None))
    last = (previous[-1].query_grid or previous[-1].grid) if previous else None
    has_prefix = last is not None and previous[-1].prefix == prefix  # later layers keep the prefix tokens
    embed = getattr(model, "patch_embed", None)
    embedded = tuple(embed.dynamic_feat_size(tuple(sides))) if hasattr(embed, "dynamic_feat_size") else None
    merged = _merged_grids(last) if last and prefix is not None else []
    for grid in filter(None, (call.grid, embedded) if embedded else (call.grid, last, *merged)):
        rest = count - math.prod(grid)
        if rest == prefix or (rest == 0 and not has_prefix) or (rest == 1 and prefix is None and grid == embedded):
            return rest, grid
    if embedded or merged:
        return None
    if isinstance(call.module, BEFORE_CLASS_TOKEN):
        return _nearest_split(count, (0,), sides, MAX_STRETCH)
    if prefix is None:
        return _nearest_split(count, (0, 1), sides, MAX_STRETCH_GUESSED)
    return _nearest_split(count, (prefix,), sides, MAX_STRETCH) or _nearest_split(count, (0, 1), sides, MAX_STRETCH)


def _merged_grids(grid: Sides) -> list[Sides]:
    """Return the grids that merging k × k tokens of a grid gives, with sides rounded up or down."""
    rounded = [[{max(1, side // k), -(-side // k)} for side in grid] for k in range(2, max(grid) + 1)]
    return [split for rows, columns in rounded for split in product(rows, columns)]


def _nearest_split(
    count: int, prefixes: Sequence[int], sides: Sequence[int], max_stretch: float
) -> tuple[int, Sides] | None:
    """Return the number of prefix tokens, one of `prefixes`, and the grid closest to the aspect ratio of `sides`."""
    splits = [(prefix, nearest_grid(count - prefix, sides)) for prefix in prefixes if count > prefix]
    best = min(splits, key=lambda split: _log_stretch(split[1], sides), default=None)
    return best if best is not None and _log_stretch(best[1], sides) <= math.log(max_stretch) else None


def _log_stretch(grid: Sides, sides: Sequence[int]) -> float:
    return abs(math.log(grid[0] * sides[1] / (grid[1] * sides[0])))
