"""Oracles of attention in windows, with pooled tokens, and of Swin's windows that were shifted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models import (
    hiera,
    mvitv2,
    swin_transformer,
    swin_transformer_v2,
    swin_transformer_v2_cr,
    twins,
    vision_transformer_sam,
)
from torch import Tensor, nn

from .naive import (
    case,
    decomposed,
    join,
    linear,
    naive,
    offsets,
    probabilities,
    shift_mask,
    split,
    swin_table,
    temperature,
)


@case("twins, local", lambda: twins.LocallyGroupedAttn(12, 3, ws=2), 2, 12, 12, size=(3, 4))
def padded_windows(layer: nn.Module, x: Tensor, size: tuple[int, int]) -> Tensor:
    grid = F.pad(x.unflatten(1, size), (0, 0, 0, 0, 0, 1))
    windows = rearrange(grid, "b (i y) (j z) c -> (b i j) (y z) c", y=2, z=2)
    q, k, v = split(linear(windows, layer.qkv), 3)
    y = rearrange(join(naive(layer, q, k, v)), "(b i j) (y z) c -> b (i y) (j z) c", i=2, j=2, y=2)
    return linear(y[:, :3].flatten(1, 2), layer.proj)


@case("hiera, global", lambda: hiera.MaskUnitAttention(12, 12, 3), 2, 6, 12)
@case("hiera", lambda: hiera.MaskUnitAttention(12, 12, 3, window_size=3, use_mask_unit_attn=True), 2, 6, 12)
def mask_units(layer: nn.Module, x: Tensor) -> Tensor:
    units = 2 if layer.use_mask_unit_attn else 1
    q, k, v = split(linear(rearrange(x, "b (n u) c -> (b u) n c", u=units), layer.qkv), 3)
    y = rearrange(join(naive(layer, q, k, v)), "(b u) n c -> b (n u) c", u=units)
    return linear(y, layer.proj)


@case(
    "sam",
    lambda: vision_transformer_sam.Attention(12, 3, qk_norm=True, use_rel_pos=True, input_size=(2, 3)),
    4,
    2,
    3,
    12,
)
@case("sam, no positions", lambda: vision_transformer_sam.Attention(12, 3), 4, 2, 3, 12)
def segment_anything(layer: nn.Module, x: Tensor) -> Tensor:
    q, k, v = split(linear(x.flatten(1, 2), layer.qkv), 3)
    q, k = layer.q_norm(q), layer.k_norm(k)
    bias = decomposed(q, layer.rel_pos_h, layer.rel_pos_w, 2, 3) if layer.use_rel_pos else 0.0
    return linear(join(naive(layer, q, k, v, bias)), layer.proj).unflatten(1, (2, 3))


@case("mvit v2", lambda: mvitv2.MultiScaleAttention(12, 12, (2, 2), 3, has_cls_token=False), 2, 4, 12, feat_size=(2, 2))
@case(
    "mvit v2, all pooled alike, class token",
    lambda: mvitv2.MultiScaleAttention(
        12, 12, (4, 4), 3, kernel_q=(3, 3), kernel_kv=(3, 3), stride_q=(2, 2), stride_kv=(2, 2)
    ),
    2,
    17,
    12,
    feat_size=(4, 4),
)
def multi_scale(layer: nn.Module, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
    prefix = int(layer.has_cls_token)

    def pooled(part: Tensor, pool: nn.Module | None, norm: nn.Module | None) -> Tensor:
        if pool is None:
            return part
        grid = rearrange(part[..., prefix:, :], "b h (i j) d -> (b h) d i j", i=feat_size[0])
        tokens = rearrange(pool(grid), "(b h) d i j -> b h (i j) d", h=3)
        return norm(torch.cat([part[..., :prefix, :], tokens], dim=-2))

    q, k, v = split(linear(x, layer.qkv), 3)
    q = pooled(q, layer.pool_q, layer.norm_q)
    k = pooled(k, layer.pool_k, layer.norm_k)
    v = pooled(v, layer.pool_v, layer.norm_v)
    bias = F.pad(decomposed(q[..., prefix:, :], layer.rel_pos_h, layer.rel_pos_w, 2, 2), (prefix, 0, prefix, 0))
    return linear(join(naive(layer, q, k, v, bias) + q), layer.proj)


def windowed(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, t: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """LSA among the windows' tokens; those whom the mask leaves nobody attend to themselves."""
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * t + bias
    alone = None
    if mask is not None:
        repeated = mask.repeat(len(q) // len(mask), 1, 1)[:, None]
        scores = scores + repeated
        others = ~torch.eye(mask.shape[-1], dtype=torch.bool)
        alone = ((repeated < 0) | ~others).all(dim=-1)
    return linear(join(probabilities(scores, layer.masked, alone) @ v), layer.proj)


@case("swin", lambda: swin_transformer.WindowAttention(12, 3, window_size=(2, 3)), 4, 6, 12)
@case(
    "swin, shifted", lambda: swin_transformer.WindowAttention(12, 3, window_size=2), 8, 4, 12, mask=shift_mask(4, 2, 1)
)
@case(
    "swin, shifted by 1 of 3",
    lambda: swin_transformer.WindowAttention(12, 3, window_size=3),
    8,
    9,
    12,
    mask=shift_mask(6, 3, 1),
)
def swin(layer: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = split(linear(x, layer.qkv), 3)
    bias = swin_table(layer.relative_position_bias_table, *layer.window_size)
    return windowed(layer, q, k, v, temperature(layer), bias, mask)


@case("swin v2", lambda: swin_transformer_v2.WindowAttention(12, (2, 3), 3), 4, 6, 12)
@case(
    "swin v2, shifted", lambda: swin_transformer_v2.WindowAttention(12, (2, 2), 3), 8, 4, 12, mask=shift_mask(4, 2, 1)
)
def swin_v2(layer: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = split(x @ layer.qkv.weight.T + torch.cat([layer.q_bias, 0 * layer.q_bias, layer.v_bias]), 3)
    height, width = layer.window_size
    sites = 8 * offsets(height, width) / torch.tensor([height - 1, width - 1])
    sites = sites.sign() * (sites.abs() + 1).log2() / 3
    bias = 16 * layer.cpb_mlp(sites).permute(2, 0, 1).sigmoid()
    t = layer.logit_scale.clamp(max=torch.tensor(100.0).log()).exp()
    return windowed(layer, F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, t, bias, mask)


@case("swin v2 cr", lambda: swin_transformer_v2_cr.WindowMultiHeadAttention(12, 3, (2, 3)), 4, 6, 12)
@case(
    "swin v2 cr, shifted",
    lambda: swin_transformer_v2_cr.WindowMultiHeadAttention(12, 3, (2, 2)),
    8,
    4,
    12,
    mask=shift_mask(4, 2, 1),
)
def swin_v2_cr(layer: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = split(linear(x, layer.qkv), 3)
    sites = offsets(*layer.window_size).float()
    bias = layer.meta_mlp(sites.sign() * (1 + sites.abs()).log()).permute(2, 0, 1)
    t = layer.logit_scale.clamp(max=torch.tensor(100.0).log()).exp().view(-1, 1, 1)
    return windowed(layer, F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, t, bias, mask)
