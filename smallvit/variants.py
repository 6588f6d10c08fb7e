"""What a plain ViT may have otherwise than the paper: how it ends, where its tokens are, how its residuals begin.

average_pool      the head reads the mean of the patches' tokens, and there is no class token
sincos            fixed positions, sines and cosines of both coordinates; the class token's is 0
layer_scale       a learnt factor for each channel of every residual branch, which begins at this value
rising_drop_path  stochastic depth grows from 0 in the first block to its rate in the last, as timm's own ViTs have it

The first two are those of Beyer, Zhai, Kolesnikov 2022 (arXiv:2205.01580), LayerScale is CaiT's (Touvron et al. 2021,
arXiv:2103.17239), stochastic depth that grows is that of Huang et al. 2016 (arXiv:1603.09382). timm computes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import DropPath, build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from smallvit.errors import InputError
from smallvit.options import flag

VARIANTS = ("average_pool", "sincos", "layer_scale", "rising_drop_path")
"""Arguments of `create_model`."""


def chosen(**asked: Any) -> dict[str, Any]:
    """The variants that are asked for, of all."""
    return {name: value for name, value in asked.items() if value}


def require_plain(arch: str, wanted: Mapping[str, Any], *, plain: bool) -> None:
    """Check that variants are asked of an architecture that can have them.

    Raises:
        InputError: it cannot.
    """
    if wanted and not plain:
        name = flag(next(iter(wanted)))
        raise InputError(f"{name}: --arch {arch} is no plain ViT; give vit or one of timm's vit_..., or leave it out")


def arguments(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What timm's `VisionTransformer` is given for them."""
    pooled = {"class_token": False, "global_pool": "avg"} if "average_pool" in wanted else {}
    return pooled | ({"init_values": wanted["layer_scale"]} if "layer_scale" in wanted else {})


def finish(model: VisionTransformer, wanted: Mapping[str, Any], drop_path: float) -> None:
    """Change in a model what timm has no argument for, in place.

    Raises:
        InputError: it cannot have a variant.
    """
    if "layer_scale" in wanted and not all(hasattr(block, "ls1") for block in model.blocks):
        raise InputError("--layer-scale: the blocks of this model have no place for it; leave it out")
    if "sincos" in wanted:
        fix_positions(model)
    if "rising_drop_path" in wanted:
        rates = torch.linspace(0, drop_path, len(model.blocks), device="cpu").tolist()
        for block, rate in zip(model.blocks, rates, strict=True):
            block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)


def fix_positions(model: VisionTransformer) -> None:
    """Sines and cosines in place of learnt positions.

    Raises:
        InputError: the model has no positions of this kind, or its width is no multiple of 4.
    """
    learnt = model.pos_embed
    if learnt is None or model.embed_dim % 4:
        raise InputError("--sincos: this model has no position embedding, or a width that 4 does not divide")
    patches = build_sincos2d_pos_embed(model.patch_embed.grid_size, model.embed_dim, device=learnt.device)
    prefix = patches.new_zeros(learnt.shape[1] - len(patches), model.embed_dim)
    model.pos_embed = nn.Parameter(torch.cat([prefix, patches])[None].to(learnt.dtype), requires_grad=False)
