"""Every attention layer of timm's that has an adapter, written anew from its weights and LSA's equation.

Nothing here runs a layer's own `forward`: q, k and v come from its weights, the scores, their biases and the hidden
diagonal are written out. Axes as in `smallvit.plugins.lsa`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from timm import layers
from timm.layers import bottleneck_attn, diff_attention
from timm.models import (
    beit,
    cait,
    convit,
    davit,
    efficientformer,
    efficientformer_v2,
    efficientvit_msra,
    eva,
    fastvit,
    gcvit,
    hiera,
    hieradet_sam2,
    levit,
    maxxvit,
    metaformer,
    mvitv2,
    nest,
    nextvit,
    pvt_v2,
    shvit,
    swin_transformer,
    swin_transformer_v2,
    swin_transformer_v2_cr,
    tiny_vit,
    tnt,
    twins,
    visformer,
    vision_transformer,
    vision_transformer_relpos,
    vision_transformer_sam,
    volo,
)
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
    """One value per head, or one for all."""
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
    places = torch.stack([rows.flatten(), columns.flatten()], dim=-1)
    return places[:, None] - places[None]


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
    """Rotary positions: pairs (neighbours, or the two halves) turned by an angle."""
    sine, cosine = rope.chunk(2, dim=-1)
    if half:
        first, second = x.chunk(2, dim=-1)
        return x * cosine + torch.cat([-second, first], dim=-1) * sine
    pairs = rearrange(x, "... (d two) -> ... d two", two=2)
    return x * cosine + torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2) * sine


def rope(n: int, d: int) -> Tensor:
    angles = torch.linspace(0, 2, n * d // 2).reshape(n, d // 2).repeat_interleave(2, dim=-1)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


# One matrix for q, k and v, heads side by side


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
@case(
    "vit, norms",
    lambda: layers.Attention(12, 3, qk_norm=True, scale_norm=True, norm_layer=nn.LayerNorm),
    2,
    6,
    12,
)
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
@case(
    "eva",
    lambda: eva.EvaAttention(12, 3, norm_layer=nn.LayerNorm),
    2,
    7,
    12,
    rope=rope(6, 4),
)
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
    places = torch.stack([right, down, right**2 + down**2], dim=-1)
    positions = probabilities(linear(places, layer.pos_proj).permute(2, 0, 1), layer.masked)
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


# q, k and v of each head side by side


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


# Feature maps


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
    towards = layer.pos_embed.height_rel.flip(0), layer.pos_embed.width_rel.flip(0)  # key's place minus the query's
    return rearrange(naive(layer, q, k, v, decomposed(q, *towards, 2, 3)), "b h (i j) d -> b (h d) i j", i=2)


@case("shvit", lambda: shvit.SHSA(12, 4, 6), 2, 12, 2, 3)
def single_head(layer: nn.Module, x: Tensor) -> Tensor:
    qkv = rearrange(layer.qkv(layer.pre_norm(x[:, :6])), "b c i j -> b 1 (i j) c")
    y = naive(layer, qkv[..., :4], qkv[..., 4:8], qkv[..., 8:])
    return layer.proj(torch.cat([rearrange(y, "b 1 (i j) c -> b c i j", i=2), x[:, 6:]], dim=1))


@case(
    "efficientvit msra",
    lambda: efficientvit_msra.CascadedGroupAttention(12, 4, 3, 1, 3, (3, 3, 3)),
    2,
    12,
    3,
    3,
)
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


# Windows


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


@case(
    "mvit v2",
    lambda: mvitv2.MultiScaleAttention(12, 12, (2, 2), 3, has_cls_token=False),
    2,
    4,
    12,
    feat_size=(2, 2),
)
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


# Blocks that attend within, and differential attention


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


# Swin: windows that were shifted


def shift_mask(size: int, window: int, shift: int) -> Tensor:
    """−100 between tokens of a window that were not neighbours before the shift, (w, n, n)."""
    place = torch.arange(size)
    band = (place >= size - window).long() + (place >= size - shift).long()
    regions = rearrange(3 * band[:, None] + band, "(i y) (j z) -> (i j) (y z)", y=window, z=window)
    return torch.where(regions[:, :, None] == regions[:, None], 0.0, -100.0)


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
    "swin v2, shifted",
    lambda: swin_transformer_v2.WindowAttention(12, (2, 2), 3),
    8,
    4,
    12,
    mask=shift_mask(4, 2, 1),
)
def swin_v2(layer: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = split(x @ layer.qkv.weight.T + torch.cat([layer.q_bias, 0 * layer.q_bias, layer.v_bias]), 3)
    height, width = layer.window_size
    places = 8 * offsets(height, width) / torch.tensor([height - 1, width - 1])
    places = places.sign() * (places.abs() + 1).log2() / 3
    bias = 16 * layer.cpb_mlp(places).permute(2, 0, 1).sigmoid()
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
    places = offsets(*layer.window_size).float()
    bias = layer.meta_mlp(places.sign() * (1 + places.abs()).log()).permute(2, 0, 1)
    t = layer.logit_scale.clamp(max=torch.tensor(100.0).log()).exp().view(-1, 1, 1)
    return windowed(layer, F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, t, bias, mask)
