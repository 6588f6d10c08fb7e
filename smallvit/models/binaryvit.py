"""BinaryViT (Le, Li 2023, arXiv:2306.16678): a ViT with the properties of CNNs that one-bit layers need, and DeiT.

Four changes, each an option, turn DeiT into BinaryViT:

avg_pool_head    the head reads the mean of all tokens, and there is no class token
pool_branches    parallel to each MLP, average pooling of its input over 1×3, 3×1, 1×5 and 5×1 tokens, each with a
                 learned scale and bias per channel, initialized to 0
residual_affine  a learned scale and bias per channel before each residual addition, initialized to 0.1 and 0
pyramid          four stages, each with a quarter of the tokens and twice the width of the one before, with spatially
                 reduced keys and values; without it there is one stage with as many tokens as the third one

All norms are batch norms. The model here is in full precision; `patch(model, binary=True)` makes the products of its
blocks and patch merging layers one-bit. Patch embedding, head and position embeddings stay in full precision. Keys and
values are computed from average-pooled tokens through one more linear layer.

Initialization is torch's default, as the official `init_weights` never runs; position embeddings and the class token
are drawn from a truncated normal of std 0.02.

Differences from the official code: linear layers have no bias in full precision either, as a batch norm follows; a
class token joins at the last stage, without a position embedding; sizes for small images, and spatial reduction ratios
that leave at least 4×4 keys.

Axes: b batch, n tokens, p prefix tokens, m keys, c e token widths, i j token grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from timm.layers import DropPath, PatchEmbed, resample_abs_pos_embed, to_2tuple
from torch import Tensor, nn

from smallvit.plugins.binary import BINARY
from smallvit.plugins.binary_layers import BinaryAttending, NormConv2d, RPReLU, ShortcutLinear, over_channels
from smallvit.plugins.sdpa import attend
from smallvit.utils.errors import InputError
from smallvit.utils.sizes import ImageSize, height_width, image_size

STAGES = {"num_heads": (1, 2, 4, 8), "mlp_ratios": (8, 8, 4, 4), "sr_ratios": (8, 4, 1, 1)}
PYRAMIDS: dict[str, dict[str, tuple[int, ...]]] = {
    "binaryvit": {"embed_dims": (64, 128, 256, 512), "depths": (3, 4, 8, 4), **STAGES},
    "binaryvit_tiny": {"embed_dims": (32, 64, 128, 256), "depths": (2, 2, 4, 2), **STAGES},
}
"""The published size and one for small images, a value per stage."""
SINGLE_STAGE: dict[str, dict[str, tuple[int, ...]]] = {
    "binaryvit": {"embed_dims": (384,), "depths": (12,), "num_heads": (6,), "mlp_ratios": (4,), "sr_ratios": (1,)},
    "binaryvit_tiny": {"embed_dims": (192,), "depths": (6,), "num_heads": (3,), "mlp_ratios": (4,), "sr_ratios": (1,)},
}
"""The same without the pyramid, with about as many parameters: DeiT-S and one for small images."""
SINGLE_STAGE_PATCH = 4
"""Factor of the patch size without the pyramid, so that there are as many tokens as in its third stage."""
MIN_KEYS = 4
"""Minimum rows and columns of keys."""
KERNELS = ((1, 3), (3, 1), (1, 5), (5, 1))
"""Rows and columns of the average pooling parallel to MLPs."""
RESIDUAL_SCALE = 0.1
"""Initial scale before residual additions."""

Grid = tuple[int, int]


class BinaryViT(nn.Module):
    """BinaryViT in full precision, with the attributes and methods of timm's models.

    Args:
        img_size: Image size in pixels; call `set_input_size` for images of another size.
        embed_dims, depths, num_heads, mlp_ratios: One value per stage.
        sr_ratios: Maximum ratio of rows of queries to rows of keys, per stage.
    """

    def __init__(
        self,
        img_size: int | Grid,
        patch_size: int,
        in_chans: int = 3,
        num_classes: int = 1000,
        *,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratios: Sequence[int],
        sr_ratios: Sequence[int],
        avg_pool_head: bool = True,
        pool_branches: bool = True,
        residual_affine: bool = True,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dims[-1]
        self.num_prefix_tokens = 0 if avg_pool_head else 1
        self.global_pool = "avg" if avg_pool_head else "token"
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dims[0])
        self.norm_embed = nn.BatchNorm1d(embed_dims[0])
        self.stages = nn.ModuleList()
        rows, columns = self.patch_embed.grid_size
        for stage, dim in enumerate(embed_dims):
            grid = (rows >> stage, columns >> stage)
            blocks = [
                Block(
                    dim,
                    num_heads[stage],
                    mlp_ratios[stage],
                    fit_sr_ratio(grid, sr_ratios[stage]),
                    pool_branches=pool_branches,
                    residual_affine=residual_affine,
                    drop_path=drop_path_rate,
                )
                for _ in range(depths[stage])
            ]
            downsample = PatchMerging(embed_dims[stage - 1], dim) if stage else nn.Identity()
            self.stages.append(Stage(downsample, dim, grid, blocks))
        self.cls_token = None
        if not avg_pool_head:  # the official one is 0 plus a position embedding, which has this distribution
            self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, self.num_features), std=0.02))
        self.norm = nn.BatchNorm1d(self.num_features)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size * 2**stage, "module": f"stages.{stage}"}
            for stage, dim in enumerate(embed_dims)
        ]

    @property
    def grids(self) -> list[Grid]:
        """Rows and columns of each stage's tokens."""
        rows, columns = self.patch_embed.grid_size
        return [(rows >> stage, columns >> stage) for stage in range(len(self.stages))]

    def set_input_size(self, img_size: int | Grid) -> None:
        """Change the image size and resample the position embeddings bicubically."""
        img_size, least = to_2tuple(img_size), 2 ** (len(self.stages) - 1)
        if any(side // patch < least for side, patch in zip(img_size, self.patch_embed.patch_size, strict=True)):
            raise ValueError(f"img_size {img_size}: {len(self.stages)} stages need at least {least} patches per side")
        before = self.grids
        self.patch_embed.set_input_size(img_size=img_size)
        for stage, old, new in zip(self.stages, before, self.grids, strict=True):
            pos_embed = resample_abs_pos_embed(stage.pos_embed.detach(), list(new), list(old), num_prefix_tokens=0)
            stage.pos_embed = nn.Parameter(pos_embed, stage.pos_embed.requires_grad)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay."""
        names = {f"stages.{index}.pos_embed" for index in range(len(self.stages))}
        return names if self.cls_token is None else names | {"cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of the parameters' names, from the stem to the head."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)"
        merging = (r"^stages\.(\d+)\.(?:downsample|pos_embed)", (0,))
        stem = r"^cls_token|^patch_embed|^norm_embed"
        return {"stem": stem, "blocks": [(blocks, None), merging, (r"^norm", (99999,))]}

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one for `num_classes`, or remove it for 0."""
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head = head.to(self.norm.weight.device, self.norm.weight.dtype).train(self.training)

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n e"]:
        """Return the tokens of the last stage after the last norm, the class token first."""
        x = over_channels(self.norm_embed, self.patch_embed(x))
        rows = self.patch_embed.grid_size[0]
        for index, stage in enumerate(self.stages):
            x = rearrange(x, "b (i j) c -> b c i j", i=rows >> max(0, index - 1))
            x = stage(x, self.cls_token if stage is self.stages[-1] else None)
        return over_channels(self.norm, x)

    def forward_head(self, x: Float[Tensor, "b n e"], pre_logits: bool = False) -> Tensor:
        """Return the logits (b, num_classes) of tokens, or the pooled features (b, e) with `pre_logits`."""
        x = x[:, 0] if self.global_pool == "token" else x[:, self.num_prefix_tokens :].mean(dim=1)
        return x if pre_logits else self.head(x)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        return self.forward_head(self.forward_features(x))


class Stage(nn.Module):
    """Blocks of one width with position embeddings; maps (b, c, i, j) to tokens (b, p + n, e), prefix tokens first."""

    def __init__(self, downsample: nn.Module, dim: int, grid: Grid, blocks: list[Block]) -> None:
        super().__init__()
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
        for block in self.blocks:
            x = block(x, grid)
        return x


class PatchMerging(nn.Module):
    """Halve the sides of a feature map: batch norm, convolution, batch norm.

    `patch(model, binary=True)` adds a shortcut and an RPReLU to the convolution along with its bits, as one-bit layers
    need them; in full precision the official code has neither.
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_dim)
        self.conv = NormConv2d(in_dim, dim, kernel_size=2, stride=2)

    def forward(self, x: Float[Tensor, "b c i j"]) -> Float[Tensor, "b e k l"]:
        return self.conv(self.norm(x))


class Block(nn.Module):
    """Attention, then an MLP with its pooling branches; maps tokens (b, n, c) to (b, n, c)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: int,
        sr_ratio: int,
        *,
        pool_branches: bool,
        residual_affine: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm1d(dim), nn.BatchNorm1d(dim)
        self.attn = ShortcutAttention(dim, num_heads, sr_ratio)
        self.mlp = Mlp(dim, mlp_ratio * dim)
        self.scale1, self.scale2 = (Affine(dim, RESIDUAL_SCALE) if residual_affine else nn.Identity() for _ in range(2))
        self.branches = PoolBranches(dim) if pool_branches else None
        self.drop_path1, self.drop_path2 = DropPath(drop_path), DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        x = x + self.drop_path1(self.scale1(self.attn(over_channels(self.norm1, x), grid)))
        y = over_channels(self.norm2, x)
        x = x + self.drop_path2(self.scale2(self.mlp(y)))
        return x if self.branches is None else x + self.branches(y, grid)


class ShortcutAttention(nn.Module):
    """Attention with spatially reduced keys, plus its queries, keys and values; maps tokens (b, n, c) to (b, n, c)."""

    def __init__(self, dim: int, num_heads: int, sr_ratio: int) -> None:
        super().__init__()
        self.num_heads, self.sr_ratio = num_heads, sr_ratio
        self.scale = (dim // num_heads) ** -0.5
        self.q, self.k, self.v, self.proj = (ShortcutLinear(dim, dim) for _ in range(4))
        self.reduce = ShortcutLinear(dim, dim) if sr_ratio > 1 else nn.Identity()
        self.mix_norm, self.mix_act = nn.BatchNorm1d(dim), RPReLU(dim)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        pooled = self.reduce(avg_pool_tokens(x, grid, self.sr_ratio))
        q, k, v = self.q(x), self.k(pooled), self.v(pooled)
        query, key, value = (rearrange(tokens, "b n (h d) -> b h n d", h=self.num_heads) for tokens in (q, k, v))
        y = rearrange(self.products(query, key, value, self.scale), "b h n d -> b n (h d)")
        shortcut = q + upsample_tokens(k + v, grid, self.sr_ratio)
        return self.proj(over_channels(self.mix_act, over_channels(self.mix_norm, y) + shortcut))

    def products(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Return softmax(scale · q kᵀ) v of heads (b, h, n, d)."""
        return attend(q * scale, k, v)


class BinaryShortcutAttention(BinaryAttending, ShortcutAttention):
    """`ShortcutAttention` with binary queries, keys, values and attention maps."""

    @property
    def inner_width(self) -> int:
        return self.q.out_features


class Mlp(nn.Module):
    """Two linear layers with shortcuts; maps tokens (b, n, c) to (b, n, c)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = ShortcutLinear(dim, hidden_dim), ShortcutLinear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return self.fc2(self.fc1(x))


class PoolBranches(nn.Module):
    """Sum of average poolings of the token grid, each with an affine transform per channel; 0 for prefix tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.affine = nn.ModuleList(Affine(dim, 0.0) for _ in KERNELS)

    def forward(self, x: Float[Tensor, "b p+n c"], grid: Grid) -> Float[Tensor, "b p+n c"]:
        prefix = x.shape[1] - grid[0] * grid[1]
        maps = rearrange(x[:, prefix:], "b (i j) c -> b c i j", i=grid[0])
        total = sum(
            affine(rearrange(F.avg_pool2d(maps, k, stride=1, padding=(k[0] // 2, k[1] // 2)), "b c i j -> b (i j) c"))
            for k, affine in zip(KERNELS, self.affine, strict=True)
        )
        return F.pad(total, (0, 0, prefix, 0))


class Affine(nn.Module):
    """Scale and shift each channel: x · weight + bias, of tokens (*b, c)."""

    def __init__(self, dim: int, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), weight))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        return x * self.weight + self.bias


def avg_pool_tokens(x: Float[Tensor, "b p+n c"], grid: Grid, ratio: int) -> Float[Tensor, "b p+m c"]:
    """Average-pool the token grid over ratio × ratio tokens; prefix tokens are kept."""
    return over_grid(partial(F.avg_pool2d, kernel_size=ratio), x, grid) if ratio > 1 else x


def upsample_tokens(x: Float[Tensor, "b p+m c"], grid: Grid, ratio: int) -> Float[Tensor, "b p+n c"]:
    """Undo `avg_pool_tokens` by nearest-neighbor interpolation to `grid`."""
    if ratio == 1:
        return x
    return over_grid(partial(F.interpolate, size=grid, mode="nearest"), x, (grid[0] // ratio, grid[1] // ratio))


def over_grid(
    function: Callable[[Tensor], Tensor], x: Float[Tensor, "b p+n c"], grid: Grid
) -> Float[Tensor, "b p+m c"]:
    """Apply a function of feature maps (b, c, i, j) to the tokens of a grid; prefix tokens are kept."""
    prefix = x.shape[1] - grid[0] * grid[1]
    maps = rearrange(x[:, prefix:], "b (i j) c -> b c i j", i=grid[0])
    tokens = rearrange(function(maps), "b c i j -> b (i j) c")
    return torch.cat([x[:, :prefix], tokens], dim=1) if prefix else tokens


def fit_sr_ratio(grid: Grid, maximum: int) -> int:
    """Return the largest power of 2, at most `maximum`, that divides the grid into at least `MIN_KEYS` rows, or 1."""
    ratio = maximum
    while ratio > 1 and any(side // ratio < MIN_KEYS or side % ratio for side in grid):
        ratio //= 2
    return ratio


def create_binaryvit(arch: str, img_size: ImageSize, patch_size: int, pyramid: bool = True, **kwargs: Any) -> BinaryViT:
    """Build a BinaryViT of a named size. `patch_size` is that of the pyramid; without it, patches are 4 times larger.

    Raises:
        InputError: the image is too small, or not a multiple of the patch size.
    """
    size = PYRAMIDS[arch] if pyramid else SINGLE_STAGE[arch]
    patch = patch_size if pyramid else SINGLE_STAGE_PATCH * patch_size
    least = patch * 2 ** (len(size["depths"]) - 1)
    if any(side < least or side % patch for side in height_width(img_size)):
        use = image_size(*(max(least, side // patch * patch) for side in height_width(img_size)))
        raise InputError(
            f"--img-size {img_size}: patches of {patch} px need a multiple of {patch}, at least {least}; use {use}, "
            "or another --patch-size"
        )
    return BinaryViT(img_size, patch, **size, **kwargs)


binaryvit = partial(create_binaryvit, "binaryvit")
binaryvit_tiny = partial(create_binaryvit, "binaryvit_tiny")
CITATION = BINARY.citation
