"""Change the image size of a model, interpolating its position embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, to_2tuple
from timm.models.cait import Cait
from timm.models.pit import ConvEmbedding, PoolingVisionTransformer
from torch import nn


@torch.no_grad()
def set_input_size(model: nn.Module, img_size: int | tuple[int, int]) -> nn.Module:
    """Change the image size of a model, patched or not, in place, and return it.

    Models with a `set_input_size` of timm use it. For CaiT and PiT, position embeddings are interpolated bicubically.

    Raises:
        TypeError: the model is of a class that cannot change its image size.
        ValueError: CaiT's size is no multiple of its patch size, or PiT's is smaller than a patch.
    """
    size = to_2tuple(img_size)
    if isinstance(model, Cait):
        patch = model.patch_embed.patch_size
        if size[0] % patch[0] or size[1] % patch[1]:
            raise ValueError(f"img_size {size} is not a multiple of the patch size {patch}")
        before = model.patch_embed.grid_size
        model.patch_embed.set_input_size(img_size=size)
        positions = resample_abs_pos_embed(model.pos_embed, model.patch_embed.grid_size, before, num_prefix_tokens=0)
        model.pos_embed = nn.Parameter(positions, model.pos_embed.requires_grad)
    elif isinstance(model, PoolingVisionTransformer):
        grid = _resize_embedding(model.patch_embed, size)
        positions = F.interpolate(model.pos_embed, grid, mode="bicubic", antialias=True, align_corners=False)
        model.pos_embed = nn.Parameter(positions, model.pos_embed.requires_grad)
    elif hasattr(model, "set_input_size"):
        model.set_input_size(img_size=size)
    else:
        raise TypeError(f"{type(model).__name__} cannot change its image size; create it with img_size={size}")
    return model


def _resize_embedding(embedding: ConvEmbedding, size: tuple[int, int]) -> tuple[int, int]:
    """Set the image size of PiT's embedding and return the grid of its tokens."""
    (p, q), (s, t), (y, z) = embedding.patch_size, embedding.conv.stride, to_2tuple(embedding.conv.padding)
    grid = (size[0] + 2 * y - p) // s + 1, (size[1] + 2 * z - q) // t + 1
    if min(grid) < 1:
        raise ValueError(f"img_size {size} is smaller than the patch {(p, q)}")
    embedding.img_size, embedding.grid_size = size, grid
    embedding.height, embedding.width = grid
    return grid
