"""Oracles of attention layers that take tokens, each in the form that timm gives its q, k and v."""

from __future__ import annotations

from functools import partial
from importlib import import_module

import timm
import torch
from einops import rearrange
from timm import layers
from timm.layers import diff_attention
from timm.models import (
    beit,
    cait,
    convit,
    davit,
    eva,
    gcvit,
    metaformer,
    nest,
    nextvit,
    pvt_v2,
    tnt,
    twins,
    vision_transformer,
    vision_transformer_relpos,
)
from torch import Tensor, nn

from .naive import case, join, linear, naive, offsets, probabilities, rope, rotated, split, swin_table, temperature


@case("davit", lambda: davit.WindowAttention(12, (2, 3), 3), 4, 6, 12)
@case("convit, upper", lambda: convit.MHSA(12, 3, qkv_bias=True), 2, 6, 12)
@case("metaformer", lambda: metaformer.Attention(12, head_dim=4), 2, 6, 12)
def common(layer: nn.Module, x: Tensor) -> Tensor:
    return linear(join(naive(layer, *split(linear(x, layer.qkv), 3))), layer.proj)


@case("nest", lambda: nest.Attention(12, 3, qkv_bias=True), 2, 4, 6, 12)
def heads_inside(layer: nn.Module, x: Tensor) -> Tensor:
    y = naive(layer, *split(linear(x, layer.qkv), 3))
    return linear(rearrange(y, "b w h n d -> b w n (d h)"), layer.proj)


@case("vit", lambda: layers.Attention(12, 3, qkv_bias=True), 2, 6, 12)
@case("vit, norms", lambda: layers.Attention(12, 3, qk_norm=True, scale_norm=True, norm_layer=nn.LayerNorm), 2, 6, 12)
def vit(layer: nn.Module, x: Tensor) -> Tensor:
    q, k, v = split(linear(x, layer.qkv), 3)
    return linear(layer.norm(join(naive(layer, layer.q_norm(q), layer.k_norm(k), v))), layer.proj)


@case("rope", lambda: layers.AttentionRope(12, 3), 2, 7, 12, rope=rope(6, 4))
@case(
    "rope, by halves, three matrices",
    lambda: layers.AttentionRope(
        12, 3, qkv_fused=False, rotate_half=True, qk_norm=True, norm_layer=nn.LayerNorm, num_prefix_tokens=2
    ),
    2,
    8,
    12,
    rope=rope(6, 4),
)
@case("eva", lambda: eva.EvaAttention(12, 3, norm_layer=nn.LayerNorm), 2, 7, 12, rope=rope(6, 4))
def rotary(layer: nn.Module, x: Tensor, rope: Tensor) -> Tensor:
    if layer.qkv is None:
        q, k, v = (split(linear(x, part), 3, 1)[0] for part in (layer.q_proj, layer.k_proj, layer.v_proj))
    elif (q_bias := getattr(layer, "q_bias", None)) is not None:
        q, k, v = split(x @ layer.qkv.weight.T + torch.cat([q_bias, 0 * q_bias, layer.v_bias]), 3)
    else:
        q, k, v = split(linear(x, layer.qkv), 3)
    prefix, half = layer.num_prefix_tokens, layer.rotate_half
    q, k = (
        torch.cat([part[..., :prefix, :], rotated(part[..., prefix:, :], rope, half)], dim=-2)
        for part in (layer.q_norm(q), layer.k_norm(k))
    )
    return linear(layer.norm(join(naive(layer, q, k, v))), layer.proj)


@case("beit", lambda: beit.Attention(12, 3, qkv_bias=True, window_size=(2, 3)), 2, 7, 12)
@case(
    "beit, shared positions",
    lambda: beit.Attention(12, 3, qkv_bias=True),
    2,
    7,
    12,
    shared_rel_pos_bias=torch.linspace(-1, 1, 147).reshape(3, 7, 7),
)
def beit_attention(layer: nn.Module, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
    q, k, v = split(x @ layer.qkv.weight.T + torch.cat([layer.q_bias, 0 * layer.q_bias, layer.v_bias]), 3)
    bias = shared_rel_pos_bias
    if bias is None:
        table = layer.relative_position_bias_table
        to_token, to_patch, to_itself = (row.view(3, 1, 1) for row in table[-3:])
        patches = swin_table(table, 2, 3)
        bias = torch.cat([to_patch.expand(3, 6, 1), patches], dim=2)
        bias = torch.cat([torch.cat([to_itself, to_token.expand(3, 1, 6)], dim=2), bias], dim=1)
    return linear(join(naive(layer, q, k, v, bias)), layer.proj)


@case(
    "relpos",
    lambda: vision_transformer_relpos.RelPosAttention(
        12, 3, qk_norm=True, rel_pos_cls=partial(layers.RelPosBias, window_size=(2, 3))
    ),
    2,
    6,
    12,
)
@case(
    "relpos, shared",
    lambda: vision_transformer_relpos.RelPosAttention(12, 3, qkv_bias=True),
    2,
    6,
    12,
    shared_rel_pos=torch.linspace(-1, 1, 108).reshape(1, 3, 6, 6),
)
def relpos(layer: nn.Module, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
    q, k, v = split(linear(x, layer.qkv), 3)
    bias = shared_rel_pos
    if bias is None:
        bias = swin_table(layer.rel_pos.relative_position_bias_table, 2, 3)
    return linear(join(naive(layer, layer.q_norm(q), layer.k_norm(k), v, bias)), layer.proj)


@case("gcvit, local", lambda: gcvit.WindowAttentionGlobal(12, 3, (2, 3), use_global=False), 4, 6, 12)
def local_window(layer: nn.Module, x: Tensor) -> Tensor:
    q, k, v = split(linear(x, layer.qkv), 3)
    return linear(join(naive(layer, q, k, v, swin_table(layer.rel_pos.relative_position_bias_table, 2, 3))), layer.proj)


@case("cait", lambda: cait.TalkingHeadAttn(12, 3, qkv_bias=True), 2, 6, 12)
def talking(layer: nn.Module, x: Tensor) -> Tensor:
    def mixed(maps: Tensor, mix: nn.Linear) -> Tensor:
        return torch.einsum("bhij,gh->bgij", maps, mix.weight) + mix.bias[:, None, None]

    q, k, v = split(linear(x, layer.qkv), 3)
    y = naive(layer, q, k, v, before=partial(mixed, mix=layer.proj_l), after=partial(mixed, mix=layer.proj_w))
    return linear(join(y), layer.proj)


@case("convit, lower", lambda: convit.GPSA(12, 3, qkv_bias=True), 2, 9, 12)
def gated_positional(layer: nn.Module, x: Tensor) -> Tensor:
    q, k = split(linear(x, layer.qk), 3, 2)
    v = split(linear(x, layer.v), 3, 1)[0]
    down, right = -offsets(3, 3).float().permute(2, 0, 1)
    sites = torch.stack([right, down, right**2 + down**2], dim=-1)
    positions = probabilities(linear(sites, layer.pos_proj).permute(2, 0, 1), layer.masked)
    gate = layer.gating_param.sigmoid().view(-1, 1, 1)
    return linear(join(naive(layer, q, k, v, after=lambda w: (1 - gate) * w + gate * positions)), layer.proj)


@case("tnt", lambda: tnt.Attention(12, 6, 3, qkv_bias=True), 2, 6, 12)
def narrow_scores(layer: nn.Module, x: Tensor) -> Tensor:
    q, k = split(linear(x, layer.qk), 3, 2)
    return linear(join(naive(layer, q, k, split(linear(x, layer.v), 3, 1)[0])), layer.proj)


@case("pvt v2", lambda: pvt_v2.Attention(12, 3), 2, 6, 12, feat_size=(2, 3))
@case("twins, global", lambda: twins.GlobalSubSampleAttn(12, 3), 2, 6, 12, size=(2, 3))
def keys_and_values(layer: nn.Module, x: Tensor, **size: tuple[int, int]) -> Tensor:
    k, v = split(linear(x, layer.kv), 3, 2)
    return linear(join(naive(layer, split(linear(x, layer.q), 3, 1)[0], k, v)), layer.proj)


@case("nextvit", lambda: nextvit.EfficientAttention(12, head_dim=4), 2, 6, 12)
def three_matrices(layer: nn.Module, x: Tensor) -> Tensor:
    q, k, v = (split(linear(x, part), 3, 1)[0] for part in (layer.q, layer.k, layer.v))
    return linear(join(naive(layer, q, k, v)), layer.proj)


@case("cait, class token", lambda: cait.ClassAttn(12, 3), 2, 6, 12)
def class_attention(layer: nn.Module, x: Tensor) -> Tensor:
    q = split(linear(x[:, :1], layer.q), 3, 1)[0]
    k, v = (split(linear(x, part), 3, 1)[0] for part in (layer.k, layer.v))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * temperature(layer)
    return linear(join(scores.softmax(dim=-1) @ v), layer.proj)


if timm.is_model("gemma4_vit_167m"):
    _gemma4 = import_module("timm.models.gemma4_vit").Gemma4Attention
    _angles = torch.linspace(0, 2, 48).reshape(1, 6, 8)

    @case("gemma4", lambda: _gemma4(12, 2, 8), 2, 6, 12, rope_cos=_angles.cos(), rope_sin=_angles.sin())
    def gemma4(layer: nn.Module, x: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
        projections = (layer.q_proj, layer.k_proj, layer.v_proj)
        q, k, v = (split(linear(x, part.linear), 2, 1)[0] for part in projections)

        def turned(part: Tensor) -> Tensor:
            axes = zip(part.chunk(2, -1), rope_sin.chunk(2, -1), rope_cos.chunk(2, -1), strict=True)
            return torch.cat([rotated(x, torch.cat([s, c], dim=-1)[:, None], half=True) for x, s, c in axes], dim=-1)

        y = naive(layer, turned(layer.q_norm(q)), turned(layer.k_norm(k)), layer.v_norm(v))
        return linear(join(y), layer.o_proj.linear)


def _difference(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = (rearrange(part, "b n (g d) -> b g n d", d=layer.head_dim) for part in (q, k))
    v = rearrange(v, "b n (h d) -> b h n d", h=layer.num_heads)
    scores = torch.einsum("bgid,bgjd->bgij", layer.q_norm(q), layer.k_norm(k)) * temperature(layer)
    maps = rearrange(probabilities(scores, layer.masked), "b (h two) i j -> two b h i j", two=2)
    first = (layer.lambda_q1 * layer.lambda_k1).sum().exp()
    second = (layer.lambda_q2 * layer.lambda_k2).sum().exp()
    y = (maps[0] - (first - second + layer.lambda_init) * maps[1]) @ v
    return join(layer.sub_norm(y) * (1 - layer.lambda_init))


@case("differential", lambda: diff_attention.DiffAttention(24, 3, qkv_bias=True, qk_norm=True, depth=2), 2, 6, 24)
def differential(layer: nn.Module, x: Tensor) -> Tensor:
    return linear(_difference(layer, *linear(x, layer.qkv).chunk(3, dim=-1)), layer.proj)


@case("parallel block", lambda: vision_transformer.ParallelScalingBlock(24, 3, qk_norm=True, init_values=0.5), 2, 6, 24)
@case("differential block", lambda: vision_transformer.DiffParallelScalingBlock(24, 3, depth=1), 2, 6, 24)
def parallel(layer: nn.Module, x: Tensor) -> Tensor:
    inner, q, k, v = linear(layer.in_norm(x), layer.in_proj).split(layer.in_split, dim=-1)
    inner = layer.mlp_act(inner + layer.mlp_bias)
    if isinstance(layer, vision_transformer.DiffParallelScalingBlock):
        y = linear(torch.cat([_difference(layer, q, k, v), inner], dim=-1), layer.out_proj)
    else:
        q, k, v = (split(part, 3, 1)[0] for part in (q, k, v))
        y = linear(join(naive(layer, layer.q_norm(q), layer.k_norm(k), v)), layer.attn_out_proj)
        y = y + linear(inner, layer.mlp_out_proj)
    return x + layer.ls(y)
