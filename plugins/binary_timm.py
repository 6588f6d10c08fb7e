"""Apply one-bit layers to timm's models: to linear and attention layers in blocks, and to layers that merge tokens.

Embeddings, heads, norms and position embeddings stay in full precision. Apply the other plugins first.
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

from smallvit.plugins import lsa_timm  # noqa: F401, registers the adapters
from smallvit.plugins.base import Init, Site
from smallvit.plugins.binary import BinaryConfig
from smallvit.plugins.binary_layers import (
    Binary,
    BinaryAttending,
    NormConv2d,
    ShortcutConv2d,
    ShortcutLinear,
    over_channels,
)
from smallvit.plugins.lsa_layer import Locality, LocalitySelfAttention, merge_masks

ADAPTER = Binary
LINEARS = ("qkv", "q", "k", "v", "reduce", "proj", "fc1", "fc2")
"""Names of linear layers in timm's blocks that multiply tokens."""
MERGINGS = (PatchMerging, PatchMergingV2)
WITH_SHORTCUT: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: ShortcutLinear, NormConv2d: ShortcutConv2d}
"""Layers that get a shortcut and an RPReLU together with their bits, and their new classes."""


class BinaryAttention(BinaryAttending, Attention):
    """timm's attention with one-bit queries, keys, values and maps."""

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
        y, residual = (rearrange(each, "b h n d -> b n (h d)") for each in (y, q + k + v))
        if self.dressed:
            y = over_channels(self.mix_act, over_channels(self.mix_norm, y) + residual)
        y = self.norm(y)
        if (gate := getattr(self, "gate", None)) is not None:  # older versions of timm have none
            y = y * gate(x).sigmoid()
        return self.proj_drop(self.proj(y))


class BinaryLocalitySelfAttention(BinaryAttending, LocalitySelfAttention):
    """One-bit attention with LSA's temperature and mask."""

    inner_width = BinaryAttention.inner_width
    forward = BinaryAttention.forward


def sites(model: nn.Module, config: BinaryConfig, init: Init) -> Iterator[Site]:
    """Yield every layer that multiplies tokens, of the kinds that the configuration selects."""
    if not (config.weights or config.activations or config.attention):
        yield Site("", model, "one-bit weights, activations and attention are all switched off")
        return
    modules = dict(model.named_modules())
    blocks = tuple(name.rpartition(".")[0] for name, layer in modules.items() if is_attention(layer))
    for name, layer in modules.items():
        if isinstance(layer, Binary):
            continue
        parent, _, leaf = name.rpartition(".")
        if is_attention(layer):
            if config.attention:
                yield Site(name, layer, None if type(layer) in Binary.adapters else "its maps have no one-bit form")
        elif not (config.weights or config.activations):
            continue
        elif leaf in LINEARS and type(layer) in (nn.Linear, ShortcutLinear):
            if not _reads_weights(modules[parent], leaf) and any(name.startswith(f"{b}.") or not b for b in blocks):
                yield Site(name, layer)
        elif config.downsampling and (
            isinstance(layer, NormConv2d) or (leaf == "reduction" and isinstance(modules[parent], MERGINGS))
        ):
            yield Site(name, layer, None if type(layer) in Binary.adapters else "not a plain layer")


def apply(model: nn.Module, site: Site, config: BinaryConfig, init: Init) -> None:
    """Make a layer a one-bit layer."""
    layer = site.layer
    dressed = config.shortcut and type(layer) in (*WITH_SHORTCUT, Attention, LocalitySelfAttention)
    if dressed and type(layer) in WITH_SHORTCUT:
        layer.__class__ = WITH_SHORTCUT[type(layer)]
        layer.dress()
    Binary.adapters[type(layer)].adopt(layer, config, dressed=dressed)


def describe(layer: Binary) -> str:
    """Describe the parts of the layer that have one bit."""
    if isinstance(layer, BinaryAttending):
        return "one-bit queries, keys, values and attention maps"
    parts = [name for name in ("weights", "activations") if getattr(layer.config, name)]
    return f"one-bit {' and '.join(parts)} in linear layers and mergings"


def describe_loss(layer: Binary) -> str:
    """Return the bits, and the norms and activations that were added with them."""
    added = ", with the norms, shortcuts and activations that came with them" if layer.dressed else ""
    return f"{describe(layer)} (weights are in full precision again){added}"


def is_attention(layer: nn.Module) -> bool:
    """Return whether a layer attends by a softmax over tokens."""
    kinds = tuple(kind for kind, adapter in Binary.adapters.items() if issubclass(adapter, BinaryAttending))
    return isinstance(layer, (Locality, *Locality.adapters, *kinds))


def _reads_weights(attention: nn.Module, leaf: str) -> bool:
    """Return whether attention reads a layer's weights instead of calling it, as BEiT's, EVA's and Swin V2's do."""
    separate = getattr(attention, "qkv_bias_separate", True)
    return leaf == "qkv" and getattr(attention, "q_bias", None) is not None and not separate
