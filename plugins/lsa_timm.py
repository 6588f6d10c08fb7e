"""Which attention layers of timm become locality self-attention, and how each differs from the common form.

A layer is adapted by a class of two bases: `Locality`, then timm's own. The instance keeps its identity, weights,
buffers and hooks; only its class changes, and changes back. Defining such a class is all it takes: `Locality.adapters`
finds it by the class object, as several of timm's families call theirs `Attention`.
"""

from __future__ import annotations

from importlib import import_module

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from timm import layers
from timm.layers import bottleneck_attn, diff_attention, halo_attn
from timm.models import (
    beit,
    cait,
    coat,
    convit,
    crossvit,
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
    xcit,
)
from torch import Tensor, nn

from smallvit.plugins.attend import attend, attend_talking
from smallvit.plugins.locality import Locality
from smallvit.plugins.lsa import keep_alone

CLASS_ATTENTION = "it has one query, the class token"
FORBIDDEN = -100.0
"""What Swin adds to the scores of tokens that were not neighbours before the shift."""


# The common form: queries are the keys, heads in an axis of their own, `scale` a constant


class LocalRope(Locality, layers.AttentionRope):
    """EVA-02, DINOv3, PE and others with rotary positions."""


class LocalEva(Locality, eva.EvaAttention):
    """EVA, with separate biases for q and v."""


class LocalBeit(Locality, beit.Attention):
    """BEiT, with a table of relative positions, its own or shared."""


class LocalRelPos(Locality, vision_transformer_relpos.RelPosAttention):
    """ViT with relative positions."""


class LocalTalkingHeads(Locality, cait.TalkingHeadAttn):
    """CaiT: the diagonal is hidden after the heads are mixed, so the mix meets no infinity."""

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return talking_heads(self, x)


def talking_heads(layer: Locality, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
    """CaiT's attention, patched: the diagonal joins the mix of the heads."""
    q, k, v = layer.scaled_qkv(x)
    bias = layer.diagonal(x.shape[1], x.shape[1], q)
    dropout = layer.attn_drop.p if layer.training else 0.0
    y = attend_talking(q, k, v, layer.proj_l, layer.proj_w, bias, dropout)
    return layer.proj_drop(layer.proj(rearrange(y, "b h n d -> b n (h d)")))


class LocalConViT(Locality, convit.MHSA):
    """ConViT's upper blocks."""


class LocalGatedPositional(Locality, convit.GPSA):
    """ConViT's lower blocks: hidden in the content's softmax and in the position's."""


class LocalDaViT(Locality, davit.WindowAttention):
    """DaViT's windows; its channel attention has no tokens to hide."""


class LocalEfficientFormer(Locality, efficientformer.Attention):
    """EfficientFormer's last stage."""


class LocalEfficientFormerV2(Locality, efficientformer_v2.Attention2d):
    """EfficientFormer V2, hidden after its heads are mixed."""


class LocalFastViT(Locality, fastvit.Attention):
    """FastViT's last stage."""


class LocalLeViT(Locality, levit.Attention):
    """LeViT."""


class LocalMaxViT(Locality, maxxvit.AttentionCl):
    """MaxViT and CoAtNet, channels last: windows and grids."""


class LocalMaxViT2d(Locality, maxxvit.Attention2d):
    """MaxViT and CoAtNet, channels first."""


class LocalMetaFormer(Locality, metaformer.Attention):
    """CAFormer's upper stages."""


class LocalTinyViT(Locality, tiny_vit.Attention):
    """TinyViT's windows."""


class LocalTnT(Locality, tnt.Attention):
    """TNT, among pixels and among patches."""


class LocalTwins(Locality, twins.LocallyGroupedAttn):
    """Twins-SVT's windows."""


class LocalVisformer(Locality, visformer.Attention):
    """Visformer."""


class LocalVolo(Locality, volo.Attention):
    """VOLO's upper stages; its outlook attention computes no scores of tokens."""


class LocalParallelBlock(Locality, vision_transformer.ParallelScalingBlock):
    """ViT-22B's block, whose attention is computed within."""


# One axis more or less


class LocalNesT(Locality, nest.Attention):
    """NesT, whose blocks of the image stand behind the heads."""

    axes_after_heads = 3


class LocalDifferential(Locality, diff_attention.DiffAttention):
    """Differential attention: two maps a head, hidden in both."""

    fusable = False

    @property
    def score_heads(self) -> int:
        return 2 * self.num_heads


class LocalDifferentialBlock(Locality, vision_transformer.DiffParallelScalingBlock):
    """ViT-22B's block with differential attention."""

    fusable = False

    @property
    def score_heads(self) -> int:
        return 2 * self.num_heads


class LocalSam(Locality, vision_transformer_sam.Attention):
    """SAM's image encoder: heads and images share an axis, so one temperature serves the layer."""

    temperature_per_head = False


class LocalBottleneck(Locality, bottleneck_attn.BottleneckAttn):
    """BoTNet: heads and images share an axis, so one temperature serves the layer."""

    temperature_per_head = False


class LocalCascaded(Locality, efficientvit_msra.CascadedGroupAttention):
    """EfficientViT (MSRA): heads one after the other, so one temperature serves the layer."""

    temperature_per_head = False


class LocalSingleHead(Locality, shvit.SHSA):
    """SHViT."""

    temperature_per_head = False


# Only where the queries are the keys


class LocalHiera(Locality, hiera.MaskUnitAttention):
    """Hiera, within mask units and globally."""

    @property
    def axes_after_heads(self) -> int:
        return 3 if self.use_mask_unit_attn else 2

    @property
    def score_heads(self) -> int:
        return self.heads

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        return "its queries are pooled" if layer.q_stride > 1 else None


class LocalHieraDet(Locality, hieradet_sam2.MultiScaleAttention):
    """SAM 2's image encoder."""

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        return "its queries are pooled" if layer.q_pool is not None else None


class LocalMViT(Locality, mvitv2.MultiScaleAttention):
    """MViT V2, where queries and keys are pooled alike."""

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        q, k = (getattr(pool, "stride", 1) for pool in (layer.pool_q, layer.pool_k))
        alike = nn.modules.utils._pair(q) == nn.modules.utils._pair(k)
        return None if alike else "its keys are pooled more than its queries"


class LocalNextViT(Locality, nextvit.EfficientAttention):
    """NextViT's last stage."""

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        return "its keys are pooled" if layer.sr is not None else None


class LocalPvt(Locality, pvt_v2.Attention):
    """PVT V2's last stage."""

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        return "its keys are pooled" if layer.sr is not None or layer.pool is not None else None


class LocalTwinsGlobal(Locality, twins.GlobalSubSampleAttn):
    """Twins' last stage."""

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        return "its keys are pooled" if layer.sr is not None else None


class LocalGCViT(Locality, gcvit.WindowAttentionGlobal):
    """GCViT's local windows."""

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        return "its queries are the image's, not the tokens'" if layer.use_global else None


# Class attention: a learnt temperature, no diagonal (the official code's SL-CaiT has these too)


class LocalClassAttention(Locality, cait.ClassAttn):
    """CaiT's class blocks."""

    has_diagonal = False


# Windows that were shifted: tokens that were no neighbours before are forbidden to each other


class LocalSwin(Locality, swin_transformer.WindowAttention):
    """Swin: the diagonal joins relative positions and the shift's mask in one bias of an image's windows."""

    def forward(self, x: Float[Tensor, "b n c"], mask: Float[Tensor, "w n n"] | None = None) -> Float[Tensor, "b n c"]:
        q, k, v = self.scaled_qkv(x)
        n, bias = x.shape[1], self._get_rel_pos_bias()
        if mask is not None:
            bias = bias + mask[:, None]
        if (hidden := keep_alone(self.diagonal(n, n, q), without_neighbours(mask))) is not None:
            bias = bias + hidden
        y = attend(q, k, v, bias, self.attn_drop.p if self.training else 0.0)
        return self.proj_drop(self.proj(rearrange(y, "b h n d -> b n (h d)")))


class LocalSwinV2(Locality, swin_transformer_v2.WindowAttention):
    """Swin V2, whose cosine attention has a learnt scale already."""

    learns_its_scale = True

    def forward(self, x: Float[Tensor, "b n c"], mask: Float[Tensor, "w n n"] | None = None) -> Float[Tensor, "b n c"]:
        return self.hide(without_neighbours(mask), x, mask)


class LocalSwinV2Cr(Locality, swin_transformer_v2_cr.WindowMultiHeadAttention):
    """Swin V2 in timm's second implementation."""

    learns_its_scale = True

    def forward(self, x: Float[Tensor, "b n c"], mask: Float[Tensor, "w n n"] | None = None) -> Float[Tensor, "b n c"]:
        return self.hide(without_neighbours(mask), x, mask)


def without_neighbours(mask: Float[Tensor, "w n n"] | None) -> Bool[Tensor, "w n"] | None:
    """Tokens that a window's mask forbids to attend to any but themselves."""
    if mask is None:
        return None
    itself = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    return ((mask <= FORBIDDEN) | itself).all(dim=-1)


# Convolutional mixers that later versions of timm added


def _later(module: str, name: str) -> type[nn.Module] | None:
    """A class of timm's that older versions lack."""
    try:
        return getattr(import_module(f"timm.models.{module}"), name)
    except (ImportError, AttributeError):
        return None


if (_lowformer := _later("lowformer", "ConvAttention")) is not None:

    class LocalLowFormer(Locality, _lowformer):
        """LowFormer."""


if (_cpubone := _later("cpubone", "ConvAttention")) is not None:

    class LocalCpuBone(Locality, _cpubone):
        """CPUBone."""


if (_gemma4 := _later("gemma4_vit", "Gemma4Attention")) is not None:

    class LocalGemma4(Locality, _gemma4):
        """Gemma 4's image encoder, whose scores have no constant scale: the temperature starts at 1."""


REASONS: dict[type[nn.Module], str] = {
    coat.FactorAttnConvRelPosEnc: "its softmax is over positions for each channel, not between tokens",
    crossvit.CrossAttention: CLASS_ATTENTION,
    layers.AttentionPool2d: "it pools all tokens into one",
    halo_attn.HaloAttn: "its keys are those of a wider window than its queries",
    layers.MultiQueryAttention2d: "all its heads share their keys",
    layers.RotAttentionPool2d: "it pools all tokens into one",
    layers.AttentionPoolLatent: "its queries are learnt, not tokens",
    volo.ClassAttention: CLASS_ATTENTION,
    volo.OutlookAttention: "it computes weights from the token alone, not scores between tokens",
    xcit.XCA: "it attends among channels, not tokens",
    davit.ChannelAttention: "it attends among channels, not tokens",
    davit.ChannelAttentionV2: "it attends among channels, not tokens",
    levit.AttentionDownsample: "its queries are pooled",
    efficientformer_v2.Attention2dDownsample: "its queries are pooled",
    mvitv2.MultiScaleAttentionPoolFirst: "it pools before it projects",
}
"""Why other attention classes of timm's cannot be adapted."""
