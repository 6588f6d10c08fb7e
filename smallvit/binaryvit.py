"""BinaryViT (Le, Li 2023, arXiv:2306.16678): a ViT with what one-bit layers need of a CNN, and the DeiT it comes from.

Four changes, each a switch, turn the DeiT into BinaryViT:

gap_head         the head reads the mean of all tokens, and there is no class token
pool_branches    beside each MLP, the means over 1×3, 3×1, 1×5 and 5×1 places of what it is given, each with a learnt
                 weight and offset per channel, which begin at 0
residual_affine  a learnt weight and offset per channel before each residual addition, which begin at 0.1 and 0
pyramid          four stages, each of a quarter of the tokens and twice as wide as the one before, where keys and
                 values are those of fewer places; without it there is one stage, of the third one's tokens

All norms are batch norms. Here the model is in full precision, a twin of the binary one: `patch(model, binary=True)`
makes the products of its blocks and mergings one-bit. Embedding, head and positions always stay.

Keys and values are made of the means over r × r places, through one linear layer more.

Differs from the official code: linear layers have no bias, as a batch norm follows; where there is a class token it
joins at the last stage; sizes for small images, and r so that at least 4 × 4 places are left.

Axes: b batch, n tokens, p prefix, c e token widths, i j token grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from timm.layers import PatchEmbed, resample_abs_pos_embed, to_2tuple
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from smallvit.binaryvit_blocks import Block, Grid, Merging, Stage
from smallvit.errors import InputError
from smallvit.options import flag
from smallvit.plugins.binary import over_channels

FLAT = 4
"""Patches without the pyramid are so many times larger than with it: as large as a token of the third stage."""
LEAST_KEYS = 4
"""Rows and columns of keys at least."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Stages of a model, a number for each."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    mlp_ratios: tuple[int, ...]
    reductions: tuple[int, ...]
    """Rows of queries for a row of keys, at most."""


PYRAMIDS = {
    "binaryvit": Size(
        widths=(64, 128, 256, 512),
        depths=(3, 4, 8, 4),
        heads=(1, 2, 4, 8),
        mlp_ratios=(8, 8, 4, 4),
        reductions=(8, 4, 1, 1),
    ),
    "binaryvit_tiny": Size(
        widths=(32, 64, 128, 256),
        depths=(2, 2, 4, 2),
        heads=(1, 2, 4, 8),
        mlp_ratios=(8, 8, 4, 4),
        reductions=(8, 4, 1, 1),
    ),
}
"""The published size, and one for small images."""
COLUMNS = {
    "binaryvit": Size(widths=(384,), depths=(12,), heads=(6,), mlp_ratios=(4,), reductions=(1,)),
    "binaryvit_tiny": Size(widths=(192,), depths=(6,), heads=(3,), mlp_ratios=(4,), reductions=(1,)),
}
"""What they are without the pyramid, with about as many parameters: DeiT-S, and one for small images."""


class BinaryViT(nn.Module):
    """BinaryViT in full precision, with the attributes and methods of timm's models.

    `img_size` and `patch_size` are in pixels; images of other sizes are taken after `set_input_size`.
    """

    def __init__(
        self,
        img_size: int | Grid,
        patch_size: int,
        size: Size,
        in_chans: int = 3,
        num_classes: int = 1000,
        *,
        gap_head: bool = True,
        pool_branches: bool = True,
        residual_affine: bool = True,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = size.widths[-1]
        self.num_prefix_tokens = 0 if gap_head else 1
        self.global_pool = "avg" if gap_head else "token"
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, size.widths[0])
        self.norm_embed = nn.BatchNorm1d(size.widths[0])
        self.stages = nn.ModuleList()
        rows, columns = self.patch_embed.grid_size
        for stage, dim in enumerate(size.widths):
            grid = (rows >> stage, columns >> stage)
            blocks = [
                Block(
                    dim,
                    size.heads[stage],
                    size.mlp_ratios[stage],
                    reduction(grid, size.reductions[stage]),
                    branches=pool_branches,
                    affine=residual_affine,
                    drop_path=drop_path_rate,
                )
                for _ in range(size.depths[stage])
            ]
            downsample = Merging(size.widths[stage - 1], dim) if stage else nn.Identity()
            self.stages.append(Stage(downsample, dim, grid, blocks))
        self.cls_token = None if gap_head else nn.Parameter(torch.zeros(1, 1, self.num_features))
        self.norm = nn.BatchNorm1d(self.num_features)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        strides = [patch_size * 2**stage for stage in range(len(self.stages))]
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": f"stages.{stage}"}
            for stage, (dim, stride) in enumerate(zip(size.widths, strides, strict=True))
        ]
        self.init_weights()

    def init_weights(self) -> None:
        """Linear weights and the class token from a normal of 0.02, cut at ±2; biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    @property
    def grids(self) -> list[Grid]:
        """Rows and columns of each stage's tokens."""
        rows, columns = self.patch_embed.grid_size
        return [(rows >> stage, columns >> stage) for stage in range(len(self.stages))]

    def set_input_size(self, img_size: int | Grid) -> None:
        """Take images of another size; positions are interpolated bicubically."""
        least = 2 ** (len(self.stages) - 1)
        if any(
            side // patch < least for side, patch in zip(to_2tuple(img_size), self.patch_embed.patch_size, strict=True)
        ):
            raise ValueError(f"img_size {img_size}: {len(self.stages)} stages need {least} patches a side at least")
        before = self.grids
        self.patch_embed.set_input_size(img_size=to_2tuple(img_size))
        for stage, old, new in zip(self.stages, before, self.grids, strict=True):
            positions = resample_abs_pos_embed(stage.pos_embed.detach(), list(new), list(old), num_prefix_tokens=0)
            stage.pos_embed = nn.Parameter(positions, stage.pos_embed.requires_grad)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that no weight decay should act on."""
        positions = {f"stages.{index}.pos_embed" for index in range(len(self.stages))}
        return positions if self.cls_token is None else positions | {"cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the parameters' names, from the stem to the head."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)"
        merging = [(r"^stages\.(\d+)\.(?:downsample|pos_embed)", (0,))]
        return {
            "stem": r"^cls_token|^patch_embed|^norm_embed",
            "blocks": [(blocks, None), *merging, (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether activations are computed again in the backward pass instead of kept."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh last layer for `num_classes`; 0 for none."""
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        like = self.norm.weight
        self.head = head.to(like.device, like.dtype).train(self.training)

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n e"]:
        """Tokens of the last stage after the last norm, the class token first."""
        *_, tokens = self._stages(x)
        return over_channels(self.norm, tokens)

    def _stages(self, x: Float[Tensor, "b c h w"]) -> Iterator[Float[Tensor, "b n e"]]:
        """Tokens of one stage after the other; those of the last may have the class token first."""
        rows = self.patch_embed.grid_size[0]
        tokens = over_channels(self.norm_embed, self.patch_embed(x))
        for index, stage in enumerate(self.stages):
            maps = rearrange(tokens, "b (i j) c -> b c i j", i=rows >> max(0, index - 1))
            tokens = stage(maps, self.cls_token if stage is self.stages[-1] else None)
            yield tokens

    def forward_intermediates(
        self,
        x: Float[Tensor, "b c h w"],
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The final tokens and the maps (b, e, i, j) of chosen stages, as timm's models of stages give them.

        `indices` are the stages (the last n where an int, all where None); with `norm` the last one's are normalised.
        All stages are computed, whether `stop_early` or not.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r}: expected NCHW")
        taken, _ = feature_take_indices(len(self.stages), indices)
        tokens = [*self._stages(x)]
        final = over_channels(self.norm, tokens[-1])
        if norm:
            tokens[-1] = final
        features = []
        for index in taken:
            rows, columns = self.grids[index]
            features.append(rearrange(tokens[index][:, -rows * columns :], "b (i j) e -> b e i j", i=rows))
        return features if intermediates_only else (final, features)

    def forward_head(self, x: Float[Tensor, "b n e"], pre_logits: bool = False) -> Tensor:
        """Logits (b, num_classes) of tokens, or with `pre_logits` the class token or the mean of all (b, e)."""
        x = x[:, 0] if self.global_pool == "token" else x[:, self.num_prefix_tokens :].mean(dim=1)
        return x if pre_logits else self.head(x)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        return self.forward_head(self.forward_features(x))


def reduction(grid: Grid, most: int) -> int:
    """Rows of queries for a row of keys: a power of 2, at most `most`, that leaves `LEAST_KEYS` rows where it can, and
    none over."""
    factor = most
    while factor > 1 and any(side // factor < LEAST_KEYS or side % factor for side in grid):
        factor //= 2
    return factor


def binaryvit(
    img_size: int,
    patch_size: int,
    num_classes: int,
    in_chans: int,
    drop_path: float,
    *,
    arch: str,
    pyramid: bool = True,
    **parts: bool,
) -> BinaryViT:
    """The model of a size; `patch_size` is that of the pyramid, without which patches are `FLAT` times larger.

    Raises:
        InputError: the image is too small, or no multiple of the patches.
    """
    size = PYRAMIDS[arch] if pyramid else COLUMNS[arch]
    patch = patch_size if pyramid else FLAT * patch_size
    least = patch * 2 ** (len(size.widths) - 1)
    if img_size < least or img_size % patch:
        what = "four stages halve it three times" if img_size < least else f"no multiple of the patch size {patch}"
        what = what if pyramid else f"{flag('no_pyramid')} cuts patches of {patch} px"
        use = max(least, img_size // patch * patch)
        raise InputError(
            f"--img-size {img_size}: {what}; give at least {least}, such as {use}, or another --patch-size"
        )
    return BinaryViT(img_size, patch, size, in_chans, num_classes, drop_path_rate=drop_path, **parts)


BINARYVITS = {arch: partial(binaryvit, arch=arch) for arch in PYRAMIDS}
"""The sizes by name, each of (img_size, patch_size, num_classes, in_chans, drop_path), and of `BINARYVIT_PARTS`."""


def parts_of(arch: str, parts: Mapping[str, bool]) -> dict[str, bool]:
    """What `BINARYVITS` takes of `BINARYVIT_PARTS`: nothing for other architectures.

    Raises:
        InputError: one of them is switched off where there is none.
    """
    off = [name for name, on in parts.items() if not on]
    if off and arch not in BINARYVITS:
        raise InputError(f"{flag(f'no_{off[0]}')}: --arch {arch} is no BinaryViT; leave it out")
    return dict(parts) if arch in BINARYVITS else {}
