"""What BinaryViT is made of (Le, Li 2023, arXiv:2306.16678): attention and MLPs with shortcuts, poolings, stages.

`binaryvit` says what they are for. Here they are in full precision; `BinaryShortcutAttention` is what
`patch(model, binary=True)` makes of the attention.

Axes: b batch, h heads, n queries, m keys, p prefix, c token width, i j token grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from smallvit.plugins.attend import attend
from smallvit.plugins.binary import BinaryAttending, RPReLU, ShortcutConv2d, ShortcutLinear, over_channels

KERNELS = ((1, 3), (3, 1), (1, 5), (5, 1))
"""Rows and columns of the poolings beside MLPs."""
AFFINE = 0.1
"""What weights before residual additions begin at."""

Grid = tuple[int, int]


class ShortcutAttention(nn.Module):
    """Attention whose queries, keys and values are added to what it gives; tokens (b, n, c) to (b, n, c)."""

    def __init__(self, dim: int, num_heads: int, reduction: int) -> None:
        super().__init__()
        self.num_heads, self.reduction = num_heads, reduction
        self.scale = (dim // num_heads) ** -0.5
        self.q, self.k, self.v, self.proj = (ShortcutLinear(dim, dim) for _ in range(4))
        self.reduce = ShortcutLinear(dim, dim) if reduction > 1 else nn.Identity()
        self.mix_norm, self.mix_act = nn.BatchNorm1d(dim), RPReLU(dim)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        fewer = self.reduce(averaged(x, grid, self.reduction))
        q, k, v = self.q(x), self.k(fewer), self.v(fewer)
        parts = (rearrange(each, "b n (h d) -> b h n d", h=self.num_heads) for each in (q, k, v))
        y = rearrange(self.products(*parts, self.scale), "b h n d -> b n (h d)")
        beside = q + spread(k + v, grid, self.reduction)
        return self.proj(over_channels(self.mix_act, over_channels(self.mix_norm, y) + beside))

    def products(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """softmax(scale · q kᵀ) v"""
        return attend(q * scale, k, v)


class BinaryShortcutAttention(BinaryAttending, ShortcutAttention):
    """The same with one bit."""

    @property
    def inner_width(self) -> int:
        return self.q.out_features


def averaged(x: Float[Tensor, "b p+n c"], grid: Grid, factor: int) -> Float[Tensor, "b p+m c"]:
    """The means over factor × factor places of the grid; tokens before the grid's stay."""
    return over_grid(partial(F.avg_pool2d, kernel_size=factor), x, grid) if factor > 1 else x


def spread(x: Float[Tensor, "b p+m c"], grid: Grid, factor: int) -> Float[Tensor, "b p+n c"]:
    """Each of factor × factor places the one that `averaged` made of them."""
    if factor == 1:
        return x
    fewer = grid[0] // factor, grid[1] // factor
    return over_grid(partial(F.interpolate, size=grid, mode="nearest"), x, fewer)


def over_grid(function: Any, x: Float[Tensor, "b p+n c"], grid: Grid) -> Float[Tensor, "b p+m c"]:
    """A function of maps (b, c, i, j) over the tokens of a grid, which come last; those before them stay."""
    prefix = x.shape[1] - grid[0] * grid[1]
    maps = rearrange(x[:, prefix:], "b (i j) c -> b c i j", i=grid[0])
    tokens = rearrange(function(maps), "b c i j -> b (i j) c")
    return torch.cat([x[:, :prefix], tokens], dim=1) if prefix else tokens


class Affine(nn.Module):
    """x · weight + bias per channel of tokens (*b, c)."""

    def __init__(self, dim: int, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), weight))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        return x * self.weight + self.bias


class PoolBranches(nn.Module):
    """The sum of means over places beside one another, each weighted per channel; tokens before the grid's give 0."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.affine = nn.ModuleList(Affine(dim, 0.0) for _ in KERNELS)

    def forward(self, x: Float[Tensor, "b p+n c"], grid: Grid) -> Float[Tensor, "b p+n c"]:
        prefix = x.shape[1] - grid[0] * grid[1]
        places = x[:, prefix:]
        total = sum(
            affine(
                over_grid(partial(F.avg_pool2d, kernel_size=k, stride=1, padding=(k[0] // 2, k[1] // 2)), places, grid)
            )
            for k, affine in zip(KERNELS, self.affine, strict=True)
        )
        return F.pad(total, (0, 0, prefix, 0))


class Mlp(nn.Module):
    """Two linear layers with shortcuts."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = ShortcutLinear(dim, hidden), ShortcutLinear(hidden, dim)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return self.fc2(self.fc1(x))


class Block(nn.Module):
    """Attention, then an MLP with its branches."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: int,
        reduction: int,
        *,
        branches: bool,
        affine: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm1d(dim), nn.BatchNorm1d(dim)
        self.attn = ShortcutAttention(dim, num_heads, reduction)
        self.mlp = Mlp(dim, mlp_ratio * dim)
        self.scale1, self.scale2 = (Affine(dim, AFFINE) if affine else nn.Identity() for _ in range(2))
        self.branches = PoolBranches(dim) if branches else None
        self.drop_path1, self.drop_path2 = DropPath(drop_path), DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        x = x + self.drop_path1(self.scale1(self.attn(over_channels(self.norm1, x), grid)))
        y = over_channels(self.norm2, x)
        x = x + self.drop_path2(self.scale2(self.mlp(y)))
        return x if self.branches is None else x + self.branches(y, grid)


class Merging(nn.Module):
    """Maps of half the side, `dim` wide."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_dim)
        self.conv = ShortcutConv2d(in_dim, dim, kernel_size=2, stride=2)

    def forward(self, x: Float[Tensor, "b c i j"]) -> Float[Tensor, "b e k l"]:
        return self.conv(self.norm(x))


class Stage(nn.Module):
    """Blocks of tokens of one width, at learnt positions; maps (b, c, i, j) to tokens (b, n, e), a prefix first."""

    def __init__(self, downsample: nn.Module, dim: int, grid: Grid, blocks: list[Block]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, grid[0] * grid[1], dim), std=0.02))
        self.blocks = nn.ModuleList(blocks)

    def forward(
        self, x: Float[Tensor, "b c i j"], prefix: Float[Tensor, "1 p e"] | None = None
    ) -> Float[Tensor, "b p+n e"]:
        x = self.downsample(x)
        grid = (x.shape[2], x.shape[3])
        x = rearrange(x, "b c i j -> b (i j) c") + self.pos_embed
        if prefix is not None:
            x = torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)
        again = self.grad_checkpointing and self.training
        for block in self.blocks:
            x = recomputed(block, x, grid) if again else block(x, grid)
        return x


def recomputed(block: nn.Module, *args: Any) -> Tensor:
    """A block's result, computed again in the backward pass; its batch norms count what they see once."""
    return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), still(block)))


@contextmanager
def still(block: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norms as they are."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
