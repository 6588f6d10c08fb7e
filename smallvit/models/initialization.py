"""Initialize the attention of a transformer with the structure of trained or of convolutional layers.

`mimetic` (Trockman, Kolter 2023, arXiv:2305.09828): queries and keys attend to similar tokens, and the values'
projections subtract a part of the token. Per head, with Z of variance 1/D:

    0.7 Z + 0.7 I = U S Vᵀ,   W_q = U_d √S_d,  W_k = V_d √S_d
    0.4 Z − 0.4 I = U S Vᵀ,   W_v = U √S,  W_proj = √S Vᵀ

`impulse` (arXiv:2505.19985): each head attends to one neighbor of a 3x3 window, as a filter of a convolution with one
tap does. With the layer-normalized position embeddings P of the patches, truncated to the head's d largest singular
values, and the matrix H of a shift on the grid:

    P⁺ (1000 H + N) P⁺ᵀ = U S Vᵀ,   W_q = 7 U_d √S_d / ‖·‖,  W_k = 7 V_d √S_d / ‖·‖,   N off the shift: 3 · N(0, 0.6²)

Values and projections are as in mimetic. Mimetic sets learned position embeddings to 2D sines and cosines; impulse
scales them to a standard deviation of 0.36.

LSA forbids a token to attend to itself. In layers with its mask, mimetic leaves queries and keys unchanged, and impulse
leaves out the center of the window. There is no published result for either.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import build_sincos2d_pos_embed
from timm.models.cait import Cait
from timm.models.pit import PoolingVisionTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smallvit.plugins.lsa_layer import Locality

WeightInit = Literal["default", "mimetic", "impulse"]

TAPS = [4, 1, 5, 3, 7, 0, 2, 6, 8]
"""Offsets of the 3x3 window, by row, in the order of the heads; 4 is the center."""
POSITION_STD = 0.36


@torch.no_grad()
def initialize(model: nn.Module, weight_init: WeightInit, generator: torch.Generator | None = None) -> nn.Module:
    """Initialize the self-attention layers of a model, in place, and return it; "default" changes nothing.

    Args:
        model: A ViT, DeiT, CaiT or PiT with position embeddings. In PiT, queries and keys are initialized in the first
            stage, whose tokens have position embeddings.

    Raises:
        ValueError: an unknown initialization.
        TypeError: the model is none of these.
    """
    if weight_init == "default":
        return model
    if weight_init not in ("mimetic", "impulse"):
        raise ValueError(f"weight_init {weight_init!r}: expected default, mimetic or impulse")
    positions = _positions(model, weight_init)
    grid = tuple(model.patch_embed.grid_size)
    for layer, has_positions in _attention_layers(model):
        masked = isinstance(layer, Locality) and layer.masked
        if has_positions and weight_init == "impulse":
            q, k = impulse_qk(positions, grid, layer.num_heads, _width(layer), masked, generator)
            _set_qk(layer, q, k)
        elif has_positions and not masked:
            _set_qk(layer, *mimetic_qk(layer.qkv.in_features, layer.num_heads, _width(layer), generator))
        _set_values(layer, generator)
    return model


def mimetic_qk(
    dim: int, heads: int, width: int, generator: torch.Generator | None = None
) -> tuple[Float[Tensor, "h c d"], Float[Tensor, "h c d"]]:
    """Return projections of tokens (…, c) to queries and keys (…, d) per head."""
    identity = torch.eye(dim)
    pairs = [_factor(0.7 * _noise(dim, generator) + 0.7 * identity, width) for _ in range(heads)]
    return torch.stack([q for q, _ in pairs]), torch.stack([k for _, k in pairs])


def impulse_qk(
    positions: Float[Tensor, "n c"],
    grid: tuple[int, int],
    heads: int,
    width: int,
    without_center: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "h c d"], Float[Tensor, "h c d"]]:
    """Return projections of tokens (…, c) to queries and keys (…, d) per head."""
    inverse = truncated_pinv(F.layer_norm(positions, positions.shape[-1:]), width)
    taps = TAPS[1:] if without_center else TAPS
    pairs = []
    for head in range(heads):
        tap = taps[head % len(taps)]
        shift = shift_matrix(grid, tap // 3 - 1, tap % 3 - 1)
        noise = nn.init.trunc_normal_(torch.empty(shift.shape), std=0.6, a=-1.2, b=1.2, generator=generator)
        target = torch.where(shift > 0, 1000.0, 3 * noise)
        pairs.append([7 * each / each.norm() for each in _factor(inverse @ target @ inverse.T, width)])
    return torch.stack([q for q, _ in pairs]), torch.stack([k for _, k in pairs])


def shift_matrix(grid: tuple[int, int], down: int, right: int) -> Float[Tensor, "n n"]:
    """Return the matrix that is 1 where the second patch is `down` rows and `right` columns from the first."""
    rows, columns = grid
    row, column = (axis.flatten() for axis in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    return ((row[None] - row[:, None] == down) & (column[None] - column[:, None] == right)).float()


def truncated_pinv(matrix: Float[Tensor, "n c"], rank: int) -> Float[Tensor, "c n"]:
    """Return the pseudo-inverse of a matrix without all but its largest singular values."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    rank = min(rank, int((s > s[0] * 1e-6).sum()))
    return vt[:rank].T / s[:rank] @ u[:, :rank].T


def _factor(matrix: Float[Tensor, "c c"], width: int) -> tuple[Float[Tensor, "c d"], Float[Tensor, "c d"]]:
    """Return two matrices whose product q kᵀ is the best approximation of a matrix of rank `width`."""
    u, s, vt = torch.linalg.svd(matrix)
    root = s[:width].sqrt()
    return u[:, :width] * root, vt[:width].T * root


def _noise(dim: int, generator: torch.Generator | None) -> Float[Tensor, "c c"]:
    return torch.randn(dim, dim, generator=generator) / dim**0.5


def _positions(model: nn.Module, weight_init: WeightInit) -> Float[Tensor, "n c"]:
    """Return the position embeddings of the patches, after changing those that are learned.

    Raises:
        TypeError: the model has none that this module knows.
    """
    kinds = (VisionTransformer, Cait, PoolingVisionTransformer)
    if not isinstance(model, kinds) or getattr(model, "pos_embed", None) is None:
        raise TypeError(
            f"{type(model).__name__}: --weight-init mimetic and impulse need a ViT, DeiT, CaiT or PiT with position "
            f"embeddings"
        )
    rows, columns = model.patch_embed.grid_size
    embedding = model.pos_embed
    if isinstance(model, PoolingVisionTransformer):
        patches = embedding.flatten(2)[0].T  # (n, c), a view
    else:
        patches = embedding[0, embedding.shape[1] - rows * columns :]
    if embedding.requires_grad and weight_init == "mimetic":
        patches.copy_(build_sincos2d_pos_embed((rows, columns), patches.shape[1]))
    elif embedding.requires_grad:
        patches.mul_(POSITION_STD / patches.std())
    return patches.float().cpu()


def _attention_layers(model: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """Yield the self-attention layers, and whether their tokens are those with position embeddings."""
    if isinstance(model, PoolingVisionTransformer):
        for index, stage in enumerate(model.transformers):
            yield from ((block.attn, index == 0) for block in stage.blocks)
    else:
        yield from ((block.attn, True) for block in model.blocks)


def _width(layer: nn.Module) -> int:
    """Return the width of a head."""
    return layer.qkv.out_features // 3 // layer.num_heads


def _set_qk(layer: nn.Module, q: Float[Tensor, "h c d"], k: Float[Tensor, "h c d"]) -> None:
    rows = torch.cat([q, k]).transpose(1, 2).flatten(0, 1)
    layer.qkv.weight[: len(rows)] = rows.to(layer.qkv.weight)


def _set_values(layer: nn.Module, generator: torch.Generator | None) -> None:
    """Initialize values and projection; the heads together may be wider or narrower than the tokens."""
    dim, width = layer.qkv.in_features, layer.qkv.out_features // 3
    v, proj = _factor(0.4 * _noise(dim, generator) - 0.4 * torch.eye(dim), min(width, dim))
    layer.qkv.weight[2 * width :] = 0
    layer.qkv.weight[2 * width : 2 * width + v.shape[1]] = v.T.to(layer.qkv.weight)
    layer.proj.weight.zero_()
    layer.proj.weight[:, : proj.shape[1]] = proj.to(layer.proj.weight)
