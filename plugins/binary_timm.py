"""Which layers of timm's models become binary ones: those of the blocks, and mergings of tokens.

Embeddings, heads, norms and positions stay in full precision.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from jaxtyping import Float
from timm.layers import Attention
from timm.models.swin_transformer import PatchMerging
from timm.models.swin_transformer_v2 import PatchMerging as PatchMergingV2
from torch import Tensor, nn

from smallvit.plugins.binary import Binary, BinaryAttending, BinaryConfig, ShortcutConv2d, ShortcutLinear, over_channels
from smallvit.plugins.locality import Locality, LocalitySelfAttention
from smallvit.plugins.lsa import merge_masks

LINEARS = ("qkv", "q", "k", "v", "reduce", "proj", "fc1", "fc2")
"""Names of linear layers in timm's blocks that multiply tokens."""
MERGINGS = (PatchMerging, PatchMergingV2)


class BinaryAttention(BinaryAttending, Attention):
    """timm's."""

    @property
    def inner_width(self) -> int:
        return self.qkv.out_features // 3

    def forward(
        self, x: Float[Tensor, "b n c"], attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Float[Tensor, "b n c"]:
        n = x.shape[1]
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        bias = self.diagonal(n, n, q) if isinstance(self, Locality) else None
        if is_causal:
            attn_mask = torch.ones(n, n, dtype=torch.bool, device=x.device).tril_()
        if attn_mask is not None:
            bias = merge_masks(bias, attn_mask)
        y = self.products(q, k, v, self.scale, bias, self.attn_drop.p if self.training else 0.0)
        y, beside = (rearrange(each, "b h n d -> b n (h d)") for each in (y, q + k + v))
        if self.dressed:
            y = over_channels(self.mix_act, over_channels(self.mix_norm, y) + beside)
        y = self.norm(y)
        if (gate := getattr(self, "gate", None)) is not None:  # older versions of timm have none
            y = y * gate(x).sigmoid()
        return self.proj_drop(self.proj(y))


class BinaryLocalitySelfAttention(BinaryAttending, LocalitySelfAttention):
    """The same with LSA's temperature and without the diagonal."""

    inner_width = BinaryAttention.inner_width
    forward = BinaryAttention.forward


def places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Name, layer and why it cannot be taken, if it cannot, of every layer that could have one bit and has not."""
    modules = dict(model.named_modules())
    attention = {name: layer for name, layer in modules.items() if is_attention(layer)}
    blocks = tuple(name.rpartition(".")[0] for name in attention)
    for name, layer in modules.items():
        parent, _, own = name.rpartition(".")
        if isinstance(layer, Binary):
            continue
        if name in attention:
            yield name, layer, None if type(layer) in Binary.adapters else "its maps have no binary form"
        elif own in LINEARS and type(layer) in (nn.Linear, ShortcutLinear) and not _read_by(modules[parent], own):
            if any(name.startswith(f"{block}.") or not block for block in blocks):
                yield name, layer, None
        elif is_merging(layer) or (own == "reduction" and isinstance(modules[parent], MERGINGS)):
            yield name, layer, None if type(layer) in Binary.adapters else "not a plain layer"


def _read_by(attention: nn.Module, own: str) -> bool:
    """Whether attention takes the weights of a layer instead of calling it, as BEiT's, EVA's and Swin V2's do."""
    separate = getattr(attention, "qkv_bias_separate", True)
    return own == "qkv" and getattr(attention, "q_bias", None) is not None and not separate


def is_attention(layer: nn.Module) -> bool:
    """Whether a layer attends by a softmax over tokens."""
    kinds = tuple(kind for kind, adapter in Binary.adapters.items() if issubclass(adapter, BinaryAttending))
    return isinstance(layer, (Locality, *Locality.adapters, *kinds))


def is_merging(layer: nn.Module) -> bool:
    """Whether a layer merges tokens by a convolution."""
    return isinstance(layer, ShortcutConv2d)


def wanted(name: str, layer: nn.Module, config: BinaryConfig) -> bool:
    """Whether a layer is one of those that a configuration means."""
    if is_attention(layer):
        return config.attention
    merges = is_merging(layer) or name.endswith("reduction")
    return (config.weights or config.activations) and (config.downsampling or not merges)


def binarise(layer: nn.Module, config: BinaryConfig) -> None:
    """Make a layer a binary one, in place."""
    dressed = config.shortcut and type(layer) in (nn.Linear, Attention, LocalitySelfAttention)
    if dressed and type(layer) is nn.Linear:
        layer.__class__ = ShortcutLinear
        layer.dress()
    Binary.adapters[type(layer)].adopt(layer, config, dressed=dressed)
