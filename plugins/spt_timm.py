"""Where timm's models cut images or feature maps into tokens, and what takes each place.

Patch embeddings keep their module; its convolution becomes shifted patch tokenization. As published, the norm that
some have behind it is dropped (SPT normalises before it projects), and Swin's patch merging and PiT's pooling are
replaced by SPT with patches of 2; PiT's class token keeps its linear layer. With trained weights to keep, shifted
views are added to the same layers instead (`spt_exact`).

A module of one's own takes part as published if its attribute `cuts_images` is true, by a method
`shifted_leaves(config)` that gives the names of its leaves and what shall take their places.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from timm import layers
from timm.layers import to_2tuple
from timm.models import (
    crossvit,
    hiera,
    hieradet_sam2,
    mvitv2,
    naflexvit,
    pit,
    pvt_v2,
    swin_transformer,
    swin_transformer_v2,
    swin_transformer_v2_cr,
    tnt,
    twins,
    volo,
)
from torch import nn

from smallvit.plugins.spt import ShiftedPatchMerging, ShiftedPatchTokenization, SPTConfig
from smallvit.plugins.spt_exact import (
    ShiftedConv2d,
    ShiftedPooling2d,
    ShiftedSwinMerging,
    ShiftedSwinV2CrMerging,
    ShiftedSwinV2Merging,
    ShiftedViews,
)

CONVOLUTIONS: dict[type[nn.Module], tuple[str, str | None]] = {
    layers.PatchEmbed: ("proj", "norm"),
    layers.HybridEmbed: ("proj", None),
    crossvit.PatchEmbed: ("proj", None),
    hiera.PatchEmbed: ("proj", None),
    hieradet_sam2.HieraPatchEmbed: ("proj", None),
    mvitv2.PatchEmbed: ("proj", None),
    pit.ConvEmbedding: ("conv", None),
    pit.Pooling: ("conv", "pointwise"),
    pvt_v2.OverlapPatchEmbed: ("proj", "norm"),
    swin_transformer_v2_cr.PatchEmbed: ("proj", "norm"),
    twins.PatchEmbed: ("proj", "norm"),
    volo.PatchEmbed: ("proj", None),
}
"""Modules that cut tokens by a convolution: where it is, and the layer behind it that SPT does without."""

MERGINGS: dict[type[nn.Module], type[ShiftedViews]] = {
    swin_transformer.PatchMerging: ShiftedSwinMerging,
    swin_transformer_v2.PatchMerging: ShiftedSwinV2Merging,
    swin_transformer_v2_cr.PatchMerging: ShiftedSwinV2CrMerging,
}
"""Modules that merge tokens, and their form with shifted views added."""

REASONS: dict[type[nn.Module], str] = {
    naflexvit.NaFlexEmbeds: "it takes images that are cut into patches already",
    tnt.PixelEmbed: "it cuts patches of a convolution's output, pixel by pixel",
}
"""Why other embeddings of timm's cannot be replaced."""


class ShiftedSwinV2PatchMerging(ShiftedPatchMerging, swin_transformer_v2.PatchMerging):
    """As published, and one of timm's mergings, which Swin V2 asks for when its image size changes."""


class Dropped(nn.Identity):
    """In place of a layer behind a patch embedding's convolution, which SPT does without."""


class KeepPatchSize:
    """`set_input_size` of an embedding that SPT is in: other images, but no other patches."""

    def __init__(self, embedding: nn.Module) -> None:
        self.embedding = embedding

    def __call__(self, img_size: int | tuple[int, int] | None = None, patch_size: Any = None) -> None:
        if patch_size is not None and to_2tuple(patch_size) != to_2tuple(self.embedding.patch_size):
            raise ValueError(
                f"patch_size {patch_size}: shifted patch tokenization is in, whose patches of "
                f"{self.embedding.patch_size} cannot be resampled; unpatch the model, change them, patch it again"
            )
        type(self.embedding).set_input_size(self.embedding, img_size=img_size)


def places(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(name, layer, the module it is in) of every layer that cuts tokens."""
    for name, module in model.named_modules():
        if type(module) in MERGINGS or getattr(module, "cuts_images", False):
            yield name, module, module
        elif (convolution := _convolution(module)) is not None:
            attribute, _ = convolution
            yield f"{name}.{attribute}".lstrip("."), getattr(module, attribute), module


def refusal(layer: nn.Module) -> str | None:
    """Why a layer found by `places` cannot be replaced, if it cannot."""
    if type(layer) in MERGINGS or getattr(layer, "cuts_images", False):
        return None
    if isinstance(layer, nn.Identity):
        return "it takes the features of its backbone as they are"
    if type(layer) is not nn.Conv2d:
        return "it is more than one convolution" if isinstance(layer, nn.Sequential) else "it is no convolution"
    plain = layer.dilation == (1, 1) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if not plain or any(k < s for k, s in zip(layer.kernel_size, layer.stride, strict=True)):
        return f"its convolution leaves out pixels: {layer}"
    return None if layer.groups == 1 or _is_pooling(layer) else f"its convolution has groups: {layer}"


def published(layer: nn.Module, within: nn.Module, config: SPTConfig) -> dict[str, nn.Module]:
    """What takes the places of which leaves of `within`, freshly initialised, of the layer's device and dtype."""
    weight = next(layer.parameters())
    with torch.device(weight.device):
        if type(layer) in MERGINGS:
            v2 = type(layer) is swin_transformer_v2.PatchMerging
            merging = ShiftedSwinV2PatchMerging if v2 else ShiftedPatchMerging
            leaves = {"": merging(layer.reduction.in_features // 4, layer.reduction.out_features, config)}
        elif within is layer:
            leaves = within.shifted_leaves(config)
        else:
            attribute, behind = _convolution(within)
            leaves = {attribute: _tokenization(layer, config)}
            if behind and type(getattr(within, behind, None)) not in (type(None), nn.Identity, Dropped):
                leaves[behind] = Dropped()
    return {name: leaf.to(weight.dtype).train(layer.training) for name, leaf in leaves.items()}


def _convolution(module: nn.Module) -> tuple[str, str | None] | None:
    """The attributes of an embedding's convolution and of what SPT does without."""
    return next((where for kind, where in CONVOLUTIONS.items() if isinstance(module, kind)), None)


def _tokenization(conv: nn.Conv2d, config: SPTConfig) -> ShiftedPatchTokenization:
    """SPT of a convolution's channels and patches; of patches of 2 where it pools."""
    if _is_pooling(conv):
        return ShiftedPatchTokenization(
            conv.in_channels, conv.out_channels, 2, ceil_mode=True, features=True, config=config
        )
    return ShiftedPatchTokenization(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        config=config,
    )


def _is_pooling(conv: nn.Conv2d) -> bool:
    """Whether a convolution is PiT's pooling."""
    return conv.groups == conv.in_channels and conv.kernel_size == (3, 3) and conv.stride == (2, 2)


def with_shifted_views(layer: nn.Module) -> type[ShiftedViews] | None:
    """The class that adds shifted views to a layer; None where its norm takes all views together."""
    if type(layer) in MERGINGS:
        return MERGINGS[type(layer)]
    if type(layer) is not nn.Conv2d:
        return None
    return ShiftedPooling2d if _is_pooling(layer) else ShiftedConv2d
