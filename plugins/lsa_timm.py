"""Adapt timm's attention layers to locality self-attention.

A layer is adapted by a class with two bases, `Locality` and timm's, in the table `Locality.adapters` by the class
object, since several families of timm call theirs `Attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from timm import layers, models
from torch import Tensor, nn

from smallvit.plugins.base import Init, Site
from smallvit.plugins.leaf import is_plain
from smallvit.plugins.lsa import LSAConfig
from smallvit.plugins.lsa_layer import Locality, keep_alone, temperatures
from smallvit.plugins.lsa_layer import set_lsa_strength as set_strength  # noqa: F401
from smallvit.plugins.sdpa import attend, attend_talking

ADAPTER = Locality
CLASS_ATTENTION = "it has one query, the class token"
POOLED_QUERIES, POOLED_KEYS = "its queries are pooled", "its keys are pooled"
FORBIDDEN = -100.0
"""Value that Swin adds to the scores of tokens that were not neighbors before the shift."""


def adapt(kind: type[nn.Module], refusal: Callable[[nn.Module], str | None] | None = None, **forms: Any) -> None:
    """Define an adapter as a class of this module, so that its instances pickle.

    Args:
        kind: the attention class.
        refusal: a function that returns why a layer cannot be adapted, if it cannot.
        forms: class attributes of `Locality` that differ from the common form.
    """
    name = f"Local_{kind.__module__.rpartition('.')[2]}_{kind.__name__}"
    if refusal is not None:
        forms["refusal"] = classmethod(lambda cls, layer: refusal(layer))
    globals()[name] = type(name, (Locality, kind), {"__module__": __name__, "__doc__": kind.__doc__, **forms})


# The common form: queries are the keys, heads have a separate axis, `scale` is a constant
for _kind in (
    layers.AttentionRope,
    models.eva.EvaAttention,
    models.beit.Attention,
    models.vision_transformer_relpos.RelPosAttention,
    models.vision_transformer.ParallelScalingBlock,
    models.convit.MHSA,
    models.convit.GPSA,
    models.davit.WindowAttention,
    models.efficientformer_v2.Attention2d,
    models.fastvit.Attention,
    models.metaformer.Attention,
    models.tnt.Attention,
    models.twins.LocallyGroupedAttn,
    models.visformer.Attention,
    models.volo.Attention,
):
    adapt(_kind)
for _module, _name in (("lowformer", "ConvAttention"), ("cpubone", "ConvAttention"), ("gemma4_vit", "Gemma4Attention")):
    if hasattr(models, _module):  # not in older versions of timm
        adapt(getattr(getattr(models, _module), _name))

# Heads are split before queries, keys and values
for _kind in (models.efficientformer.Attention, models.levit.Attention, models.tiny_vit.Attention):
    adapt(_kind, heads_first=True)
for _kind in (models.maxxvit.AttentionCl, models.maxxvit.Attention2d):
    adapt(_kind, heads_first=property(lambda self: self.head_first))

# Heads share an axis with images, or are computed one after the other: one temperature for the layer
for _kind in (
    models.vision_transformer_sam.Attention,
    layers.bottleneck_attn.BottleneckAttn,
    models.efficientvit_msra.CascadedGroupAttention,
    models.shvit.SHSA,
):
    adapt(_kind, temperature_per_head=False, foldable=False)

# Two maps per head
for _kind in (layers.diff_attention.DiffAttention, models.vision_transformer.DiffParallelScalingBlock):
    adapt(_kind, fusable=False, score_heads=property(lambda self: 2 * self.num_heads))

# Blocks of the image have an axis behind the heads
adapt(models.nest.Attention, axes_after_heads=3)

# Class attention: a learned temperature, no diagonal (the official code's SL-CaiT has these too)
adapt(models.cait.ClassAttn, has_diagonal=False)

# Only if queries are the keys
adapt(
    models.hiera.MaskUnitAttention,
    lambda layer: POOLED_QUERIES if layer.q_stride > 1 else None,
    axes_after_heads=property(lambda self: 3 if self.use_mask_unit_attn else 2),
    score_heads=property(lambda self: self.heads),
)
adapt(models.hieradet_sam2.MultiScaleAttention, lambda layer: POOLED_QUERIES if layer.q_pool is not None else None)
adapt(models.nextvit.EfficientAttention, lambda layer: POOLED_KEYS if layer.sr is not None else None)
adapt(models.pvt_v2.Attention, lambda layer: POOLED_KEYS if layer.sr is not None or layer.pool is not None else None)
adapt(models.twins.GlobalSubSampleAttn, lambda layer: POOLED_KEYS if layer.sr is not None else None)
adapt(
    models.gcvit.WindowAttentionGlobal,
    lambda layer: "its queries are the image's, not the tokens'" if layer.use_global else None,
)


def refuse_pooled_keys(layer: models.mvitv2.MultiScaleAttention) -> str | None:
    """Return a reason if keys are pooled by another stride than queries."""
    q, k = (nn.modules.utils._pair(getattr(pool, "stride", 1)) for pool in (layer.pool_q, layer.pool_k))
    return None if q == k else "its keys are pooled more than its queries"


adapt(models.mvitv2.MultiScaleAttention, refuse_pooled_keys, foldable=False)


# The diagonal is masked after the heads are mixed, so that no infinity is mixed


class LocalTalkingHeads(Locality, models.cait.TalkingHeadAttn):
    """CaiT: the diagonal is hidden after the heads are mixed, so the mix meets no infinity."""

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return talking_heads(self, x)


def talking_heads(layer: Locality, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
    """Compute CaiT's attention with the diagonal masked after the heads are mixed."""
    q, k, v, scale = layer.qkv_and_scale(x)
    bias = layer.diagonal(x.shape[1], x.shape[1], q)
    y = attend_talking(q if scale == 1 else q * scale, k, v, layer.proj_l, layer.proj_w, layer.attn_drop, bias)
    return layer.proj_drop(layer.proj(rearrange(y, "b h n d -> b n (h d)")))


# Shifted windows: tokens that were not neighbors before the shift are masked


class LocalSwin(Locality, models.swin_transformer.WindowAttention):
    """Swin: the diagonal joins relative positions and the shift's mask in one bias of an image's windows."""

    def forward(self, x: Float[Tensor, "b n c"], mask: Float[Tensor, "w n n"] | None = None) -> Float[Tensor, "b n c"]:
        if not is_plain(self.attn_drop, nn.Dropout):
            return self.hide(isolated_tokens(mask), x, mask)
        q, k, v, scale = self.qkv_and_scale(x)
        n, bias = x.shape[1], self._get_rel_pos_bias()
        hidden = keep_alone(self.diagonal(n, n, q), isolated_tokens(mask))
        if mask is not None:  # both masks first, without the axis of the heads
            hidden = mask[:, None] if hidden is None else mask[:, None] + hidden
        if hidden is not None:
            bias = bias + hidden
        y = attend(q, k, v, bias, self.attn_drop.p if self.training else 0.0, scale)
        return self.proj_drop(self.proj(rearrange(y, "b h n d -> b n (h d)")))


class CosineLocality(Locality):
    """Windowed cosine attention, which has a learned scale already."""

    learns_its_scale = True

    def forward(self, x: Float[Tensor, "b n c"], mask: Float[Tensor, "w n n"] | None = None) -> Float[Tensor, "b n c"]:
        return self.hide(isolated_tokens(mask), x, mask)


class LocalSwinV2(CosineLocality, models.swin_transformer_v2.WindowAttention):
    """Swin V2."""


class LocalSwinV2Cr(CosineLocality, models.swin_transformer_v2_cr.WindowMultiHeadAttention):
    """Swin V2 in timm's second implementation."""


def isolated_tokens(mask: Float[Tensor, "w n n"] | None) -> Bool[Tensor, "w n"] | None:
    """Return the tokens that a window's mask allows to attend to themselves only."""
    if mask is None:
        return None
    itself = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    return ((mask <= FORBIDDEN) | itself).all(dim=-1)


REASONS: dict[type[nn.Module], str] = {
    models.coat.FactorAttnConvRelPosEnc: "its softmax is over positions for each channel, not between tokens",
    models.crossvit.CrossAttention: CLASS_ATTENTION,
    layers.AttentionPool2d: "it pools all tokens into one",
    layers.halo_attn.HaloAttn: "its keys are those of a wider window than its queries",
    layers.MultiQueryAttention2d: "all its heads share their keys",
    layers.RotAttentionPool2d: "it pools all tokens into one",
    layers.AttentionPoolLatent: "its queries are learned, not tokens",
    models.volo.ClassAttention: CLASS_ATTENTION,
    models.volo.OutlookAttention: "it computes weights from the token alone, not scores between tokens",
    models.xcit.XCA: "it attends among channels, not tokens",
    models.davit.ChannelAttention: "it attends among channels, not tokens",
    models.davit.ChannelAttentionV2: "it attends among channels, not tokens",
    models.levit.AttentionDownsample: POOLED_QUERIES,
    models.efficientformer_v2.Attention2dDownsample: POOLED_QUERIES,
    models.mvitv2.MultiScaleAttentionPoolFirst: "it pools before it projects",
}
"""Why other attention classes of timm cannot be adapted."""


def sites(model: nn.Module, config: LSAConfig, init: Init) -> Iterator[Site]:
    """Yield every attention layer; class attention, which only gets temperatures, is a minor site."""
    for name, module in model.named_modules():
        adapter = Locality.adapters.get(type(module))
        if adapter is not None:
            unchanged = None if adapter.changes(config) else f"{config} changes nothing in it"
            yield Site(name, module, adapter.refusal(module) or unchanged, minor=not adapter.has_diagonal)
        elif (reason := REASONS.get(type(module))) is not None:
            yield Site(name, module, reason)


def has_attention(model: nn.Module) -> bool:
    """Return whether a model has attention layers of any kind."""
    return any(True for _ in sites(model, LSAConfig(), "paper"))


def apply(model: nn.Module, site: Site, config: LSAConfig, init: Init) -> None:
    """Turn an attention layer into locality self-attention."""
    Locality.adapters[type(site.layer)].adopt(site.layer, config, gradual=init == "preserve")


def metrics(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return the learned temperatures."""
    learned = temperatures(model)
    return {"temperatures": learned} if learned else {}


@torch.no_grad()
def remove(model: nn.Module, layer: Locality) -> None:
    """Turn a layer back into timm's, with queries multiplied by what the temperatures learned if that is exact."""
    for rows, factor in layer.folds() or ():
        rows.mul_(factor)
    layer.release()


def fuse(model: nn.Module, layer: Locality) -> None:
    """Fold the temperatures."""
    layer.fuse()


def describe_loss(layer: Locality) -> str | None:
    """Return the mask, unless its strength is 0, and temperatures that the queries cannot take."""
    lost = []
    if layer.masked and (layer.diagonal_weight is None or layer.diagonal_weight != 1):
        lost.append("the mask of the diagonal (tokens attend to themselves again)")
    if layer.folds() is None:
        lost.append("the learned temperatures")
    return " and ".join(lost) or None


def describe(layer: Locality) -> str:
    """Return the layer's temperatures and mask."""
    count = 0 if layer.temperature is None else layer.temperature.numel()
    temperature = f"{count} temperature{'s' if count > 1 else ''}" if count else "timm's scale"
    if layer.diagonal_weight is not None:
        return f"{temperature}, attention of tokens to themselves can be masked gradually (set_lsa_strength)"
    return f"{temperature}, {'no token attends to itself' if layer.masked else 'no mask'}"


def new_keys(layer: Locality) -> set[str]:
    """Return the keys of the temperature and of the mask's strength; one-bit layers have more."""
    return {"temperature", "diagonal_weight"} & layer.state_dict().keys()
