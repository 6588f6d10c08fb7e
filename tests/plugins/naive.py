"""LSA's equation and what oracles of timm's attention layers have in common: nothing runs a layer's own `forward`.

Oracles register themselves (`oracles_tokens`, `oracles_maps`, `oracles_windows`): q, k and v come from the layer's
weights; scores, their biases and the hidden diagonal are written out. Axes as in `smallvit.plugins.lsa`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

Oracle = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """A layer, what it takes, and what it must give."""

    layer: Callable[[], nn.Module]
    oracle: Oracle
    shape: tuple[int, ...]
    more: dict[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {}


def case(name: str, layer: Callable[[], nn.Module], *shape: int, **more: Any) -> Callable[[Oracle], Oracle]:
    """Register an oracle for a layer: its input's shape and its other arguments."""

    def register(oracle: Oracle) -> Oracle:
        CASES[name] = Case(layer, oracle, shape, more)
        return oracle

    return register


# The equation


def temperature(layer: nn.Module) -> Tensor:
    """Return one value per head, or one for all."""
    t = layer.temperature if layer.temperature is not None else torch.tensor(vars(layer).get("scale", 1.0))
    return t.reshape(-1, 1, 1)


def probabilities(scores: Tensor, hidden: bool, alone: Tensor | None = None) -> Tensor:
    """Softmax without the diagonal; tokens `alone` in their window attend to themselves."""
    n = scores.shape[-1]
    if hidden and n > 1:
        mine = torch.eye(n, dtype=torch.bool)
        if alone is not None:
            mine = mine & ~alone[..., :, None]
        scores = torch.where(mine, -torch.inf, scores)
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    return weights / weights.sum(dim=-1, keepdim=True)


def naive(
    layer: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | float = 0.0,
    before: Callable[[Tensor], Tensor] = lambda scores: scores,
    after: Callable[[Tensor], Tensor] = lambda weights: weights,
) -> Tensor:
    """after(softmax(M(before(q kᵀ t + bias)))) v for (..., h, n, d)."""
    scores = before(torch.einsum("...id,...jd->...ij", q, k) * temperature(layer) + bias)
    return torch.einsum("...ij,...je->...ie", after(probabilities(scores, layer.masked)), v)


# Its parts


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def pointwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
    y = torch.einsum("bchw,ec->behw", x, conv.weight[:, :, 0, 0])
    return y if conv.bias is None else y + conv.bias[:, None, None]


def split(x: Tensor, heads: int, parts: int = 3) -> Tensor:
    return rearrange(x, "... n (p h d) -> p ... h n d", p=parts, h=heads)


def join(x: Tensor) -> Tensor:
    return rearrange(x, "... h n d -> ... n (h d)")


def offsets(height: int, width: int) -> Tensor:
    """(rows, columns) from each token to each, (n, n, 2): the query's place minus the key's."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    sites = torch.stack([rows.flatten(), columns.flatten()], dim=-1)
    return sites[:, None] - sites[None]


def swin_table(table: Tensor, height: int, width: int) -> Tensor:
    """Swin's relative positions, (h, n, n)."""
    rows, columns = offsets(height, width).unbind(-1)
    return table[(rows + height - 1) * (2 * width - 1) + columns + width - 1].permute(2, 0, 1)


def levit_table(table: Tensor, height: int, width: int) -> Tensor:
    """LeViT's relative positions, without direction, (h, n, n)."""
    rows, columns = offsets(height, width).abs().unbind(-1)
    return table[:, rows * width + columns]


def decomposed(q: Tensor, rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    """Relative positions that the query weighs, by rows and by columns."""
    down, right = offsets(height, width).unbind(-1)
    return torch.einsum("...id,ijd->...ij", q, rows[down + height - 1] + columns[right + width - 1])


def rotated(x: Tensor, rope: Tensor, half: bool = False) -> Tensor:
    """Rotary positions: pairs (neighbors, or the two halves) turned by an angle."""
    sine, cosine = rope.chunk(2, dim=-1)
    if half:
        first, second = x.chunk(2, dim=-1)
        return x * cosine + torch.cat([-second, first], dim=-1) * sine
    pairs = rearrange(x, "... (d two) -> ... d two", two=2)
    return x * cosine + torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2) * sine


def rope(n: int, d: int) -> Tensor:
    angles = torch.linspace(0, 2, n * d // 2).reshape(n, d // 2).repeat_interleave(2, dim=-1)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def shift_mask(size: int, window: int, shift: int) -> Tensor:
    """−100 between tokens of a window that were not neighbors before the shift, (w, n, n)."""
    site = torch.arange(size)
    band = (site >= size - window).long() + (site >= size - shift).long()
    regions = rearrange(3 * band[:, None] + band, "(i y) (j z) -> (i j) (y z)", y=window, z=window)
    return torch.where(regions[:, :, None] == regions[:, None], 0.0, -100.0)
