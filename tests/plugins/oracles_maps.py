"""Oracles of attention layers that take feature maps, or tables of positions as LeViT's."""

from __future__ import annotations

from functools import partial
from importlib import import_module

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from timm import layers
from timm.layers import bottleneck_attn
from timm.models import (
    efficientformer,
    efficientformer_v2,
    efficientvit_msra,
    fastvit,
    hieradet_sam2,
    levit,
    maxxvit,
    shvit,
    tiny_vit,
    visformer,
    volo,
)
from torch import Tensor, nn

from .naive import case, decomposed, join, levit_table, linear, naive, pointwise, split, swin_table


@case("efficientformer", lambda: efficientformer.Attention(12, 4, 3, 2, (2, 3)), 2, 6, 12)
@case("levit", lambda: levit.Attention(12, 4, 3, 2.0, (2, 3)), 2, 6, 12)
@case("tiny vit", lambda: tiny_vit.Attention(12, 4, 3, 2, (2, 3)), 2, 6, 12)
def levit_like(layer: nn.Module, x: Tensor) -> Tensor:
    x = layer.norm(x) if hasattr(layer, "norm") else x
    qkv = rearrange(layer.qkv(x), "b n (h d) -> b h n d", h=3)
    q, k, v = qkv[..., :4], qkv[..., 4:8], qkv[..., 8:]
    return layer.proj(join(naive(layer, q, k, v, levit_table(layer.attention_biases, 2, 3))))


@case("levit conv", lambda: levit.Attention(12, 4, 3, 2.0, (2, 3), use_conv=True), 2, 12, 2, 3)
def levit_conv(layer: nn.Module, x: Tensor) -> Tensor:
    qkv = rearrange(layer.qkv(x), "b (h d) i j -> b h (i j) d", h=3)
    q, k, v = qkv[..., :4], qkv[..., 4:8], qkv[..., 8:]
    y = naive(layer, q, k, v, levit_table(layer.attention_biases, 2, 3))
    return layer.proj(rearrange(y, "b h (i j) d -> b (h d) i j", i=2))


@case("fastvit", lambda: fastvit.Attention(12, 4), 2, 12, 2, 3)
def fastvit_map(layer: nn.Module, x: Tensor) -> Tensor:
    q, k, v = split(linear(rearrange(x, "b c i j -> b (i j) c"), layer.qkv), 3)
    return rearrange(linear(join(naive(layer, q, k, v)), layer.proj), "b (i j) c -> b c i j", i=2)


@case("visformer", lambda: visformer.Attention(12, 3, head_dim_ratio=0.5), 2, 12, 2, 3)
def visformer_map(layer: nn.Module, x: Tensor) -> Tensor:
    q, k, v = rearrange(pointwise(x, layer.qkv), "b (p h d) i j -> p b h (i j) d", p=3, h=3)
    return pointwise(rearrange(naive(layer, q, k, v), "b h (i j) d -> b (h d) i j", i=2), layer.proj)


@case("volo", lambda: volo.Attention(12, 3), 2, 2, 3, 12)
@case("hiera det", lambda: hieradet_sam2.MultiScaleAttention(12, 12, 3), 2, 2, 3, 12)
def channels_last(layer: nn.Module, x: Tensor) -> Tensor:
    q, k, v = split(linear(x.flatten(1, 2), layer.qkv), 3)
    return linear(join(naive(layer, q, k, v)), layer.proj).unflatten(1, (2, 3))


@case(
    "maxvit",
    lambda: maxxvit.AttentionCl(12, dim_head=4, rel_pos_cls=partial(layers.RelPosBias, window_size=(2, 3))),
    4,
    2,
    3,
    12,
)
@case(
    "maxvit, heads inside",
    lambda: maxxvit.AttentionCl(12, dim_head=4, head_first=False),
    4,
    2,
    3,
    12,
    shared_rel_pos=torch.linspace(-1, 1, 108).reshape(1, 3, 6, 6),
)
def maxvit(layer: nn.Module, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
    form = "b n (h p d) -> p b h n d" if layer.head_first else "b n (p h d) -> p b h n d"
    q, k, v = rearrange(linear(x.flatten(1, 2), layer.qkv), form, p=3, h=3)
    bias = shared_rel_pos
    if bias is None:
        bias = swin_table(layer.rel_pos.relative_position_bias_table, 2, 3)
    return linear(join(naive(layer, q, k, v, bias)), layer.proj).unflatten(1, (2, 3))


@case(
    "maxvit 2d",
    lambda: maxxvit.Attention2d(12, dim_head=4, rel_pos_cls=partial(layers.RelPosBias, window_size=(2, 3))),
    2,
    12,
    2,
    3,
)
@case("maxvit 2d, heads inside", lambda: maxxvit.Attention2d(12, dim_head=4, head_first=False), 2, 12, 2, 3)
def maxvit_map(layer: nn.Module, x: Tensor) -> Tensor:
    form = "b (h p d) i j -> p b h (i j) d" if layer.head_first else "b (p h d) i j -> p b h (i j) d"
    q, k, v = rearrange(pointwise(x, layer.qkv), form, p=3, h=3)
    bias = 0.0 if layer.rel_pos is None else swin_table(layer.rel_pos.relative_position_bias_table, 2, 3)
    return pointwise(rearrange(naive(layer, q, k, v, bias), "b h (i j) d -> b (h d) i j", i=2), layer.proj)


@case("efficientformer v2", lambda: efficientformer_v2.Attention2d(12, 4, 3, 2, (2, 3)), 2, 12, 2, 3)
@case("efficientformer v2, stride", lambda: efficientformer_v2.Attention2d(12, 4, 3, 2, (4, 6), stride=2), 2, 12, 4, 6)
def talking_map(layer: nn.Module, x: Tensor) -> Tensor:
    x = x if layer.stride_conv is None else layer.stride_conv(x)
    q, k, v = (rearrange(part(x), "b (h d) i j -> b h (i j) d", h=3) for part in (layer.q, layer.k, layer.v))
    bias = levit_table(layer.attention_biases, 2, 3)
    before, after = (partial(pointwise, conv=conv) for conv in (layer.talking_head1, layer.talking_head2))
    y = rearrange(naive(layer, q, k, v, bias, before, after), "b h (i j) d -> b (h d) i j", i=2)
    y = y + layer.v_local(layer.v(x))
    return layer.proj(layer.act(y if layer.upsample is None else layer.upsample(y)))


@case("botnet", lambda: bottleneck_attn.BottleneckAttn(12, feat_size=(2, 3), num_heads=3, qk_ratio=2.0), 2, 12, 2, 3)
def bottleneck(layer: nn.Module, x: Tensor) -> Tensor:
    widths = layer.dim_out_qk, layer.dim_out_qk, layer.dim_out_v
    q, k, v = (
        rearrange(part, "b (h d) i j -> b h (i j) d", h=3) for part in pointwise(x, layer.qkv).split(widths, dim=1)
    )
    toward = layer.pos_embed.height_rel.flip(0), layer.pos_embed.width_rel.flip(0)  # key's site minus the query's
    return rearrange(naive(layer, q, k, v, decomposed(q, *toward, 2, 3)), "b h (i j) d -> b (h d) i j", i=2)


@case("shvit", lambda: shvit.SHSA(12, 4, 6), 2, 12, 2, 3)
def single_head(layer: nn.Module, x: Tensor) -> Tensor:
    qkv = rearrange(layer.qkv(layer.pre_norm(x[:, :6])), "b c i j -> b 1 (i j) c")
    y = naive(layer, qkv[..., :4], qkv[..., 4:8], qkv[..., 8:])
    return layer.proj(torch.cat([rearrange(y, "b 1 (i j) c -> b c i j", i=2), x[:, 6:]], dim=1))


@case("efficientvit msra", lambda: efficientvit_msra.CascadedGroupAttention(12, 4, 3, 1, 3, (3, 3, 3)), 2, 12, 3, 3)
def cascaded(layer: nn.Module, x: Tensor) -> Tensor:
    bias, outputs, y = levit_table(layer.attention_biases, 3, 3), [], 0.0
    for head, part in enumerate(x.chunk(3, dim=1)):
        q, k, v = layer.qkvs[head](part + y).chunk(3, dim=1)
        q, k, v = (rearrange(value, "b d i j -> b 1 (i j) d") for value in (layer.dws[head](q), k, v))
        y = rearrange(naive(layer, q, k, v, bias[head]), "b 1 (i j) d -> b d i j", i=3)
        outputs.append(y)
    return layer.proj(torch.cat(outputs, dim=1))


def _conv_attention(layer: nn.Module, x: Tensor) -> Tensor:
    if getattr(layer, "small_kernels", False):
        x = F.pad(x, (0, -x.shape[3] % layer.att_stride, 0, -x.shape[2] % layer.att_stride))
    y = layer.conv_proj(x)
    q, k, v = rearrange(pointwise(y, layer.pwise), "b (h p d) i j -> p b h (i j) d", p=3, h=layer.num_heads)
    y = rearrange(naive(layer, q, k, v), "b h (i j) d -> b (h d) i j", i=y.shape[2])
    return layer.upsampling(layer.o_proj(y))


if timm.is_model("lowformer_b0"):
    _lowformer = import_module("timm.models.lowformer").ConvAttention
    case("lowformer", lambda: _lowformer(64, head_dim_mul=1.0, att_stride=2), 2, 64, 4, 6)(_conv_attention)

if timm.is_model("cpubone_nano"):
    _cpubone = import_module("timm.models.cpubone").ConvAttention
    case("cpubone", lambda: _cpubone(64, att_stride=2), 2, 64, 4, 6)(_conv_attention)
    case("cpubone, small kernels", lambda: _cpubone(64, att_stride=2, small_kernels=True), 2, 64, 4, 6)(_conv_attention)
