"""Apply shifted patch tokenization where timm's models cut images or feature maps into tokens.

`init="paper"`: the convolution of a patch embedding becomes a `ShiftedPatchTokenization`. The norm behind it is
dropped, since SPT normalizes before it projects. Swin's patch merging and PiT's pooling are replaced by SPT with
patches of 2; PiT's class token keeps its linear layer. `init="preserve"`: shifted views are added to the same layers
(`ShiftedViews`).

A module of another library takes part with `init="paper"` if its attribute `cuts_images` is true and its method
`shifted_leaves(config)` returns new modules by the names of the leaves that they replace.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from timm import layers, models
from timm.layers import to_2tuple
from torch import nn

from smallvit.plugins.base import Init, Site, original
from smallvit.plugins.leaf import replace_module, replacing_plugin, restore_original
from smallvit.plugins.spt import SPTConfig
from smallvit.plugins.spt_layer import (
    ShiftedConv2d,
    ShiftedPatchMerging,
    ShiftedPatchTokenization,
    ShiftedPooling2d,
    ShiftedSwinMerging,
    ShiftedSwinV2CrMerging,
    ShiftedSwinV2Merging,
    ShiftedViews,
    Views,
)

CONVOLUTIONS: dict[type[nn.Module], tuple[str, str | None]] = {
    layers.PatchEmbed: ("proj", "norm"),
    layers.HybridEmbed: ("proj", None),
    models.crossvit.PatchEmbed: ("proj", None),
    models.hiera.PatchEmbed: ("proj", None),
    models.hieradet_sam2.HieraPatchEmbed: ("proj", None),
    models.mvitv2.PatchEmbed: ("proj", None),
    models.pit.ConvEmbedding: ("conv", None),
    models.pit.Pooling: ("conv", "pointwise"),
    models.pvt_v2.OverlapPatchEmbed: ("proj", "norm"),
    models.swin_transformer_v2_cr.PatchEmbed: ("proj", "norm"),
    models.twins.PatchEmbed: ("proj", "norm"),
    models.volo.PatchEmbed: ("proj", None),
}
"""Modules with a convolution that cuts tokens: its attribute, and that of a layer behind it that SPT drops."""

MERGINGS: dict[type[nn.Module], type[ShiftedViews]] = {
    models.swin_transformer.PatchMerging: ShiftedSwinMerging,
    models.swin_transformer_v2.PatchMerging: ShiftedSwinV2Merging,
    models.swin_transformer_v2_cr.PatchMerging: ShiftedSwinV2CrMerging,
}
"""Modules that merge tokens, and their classes with shifted views added."""

REASONS: dict[type[nn.Module], str] = {
    models.naflexvit.NaFlexEmbeds: "its input is already cut into patches",
    models.tnt.PixelEmbed: "it cuts the output of a convolution into single pixels",
}
"""Why other embeddings of timm cannot be changed."""


class ShiftedSwinV2PatchMerging(ShiftedPatchMerging, models.swin_transformer_v2.PatchMerging):
    """Shifted patch merging that is an instance of Swin V2's, which its `set_input_size` checks."""


class Dropped(nn.Identity):
    """Replaces a layer behind the convolution of a patch embedding."""


def keep_patch_size(embedding: nn.Module) -> None:
    """Let the image size of a patched embedding change, but not its patch size."""
    if hasattr(embedding, "set_input_size"):
        object.__setattr__(embedding, "set_input_size", partial(_set_image_size, embedding))


def release_patch_size(model: nn.Module, layer: nn.Module) -> None:
    """Let the patch size of the embedding around a layer change again."""
    for parent in model.modules():
        if layer in parent.children():
            vars(parent).pop("set_input_size", None)


def _set_image_size(
    embedding: nn.Module, img_size: int | tuple[int, int] | None = None, patch_size: Any = None
) -> None:
    if patch_size is not None and to_2tuple(patch_size) != to_2tuple(embedding.patch_size):
        raise ValueError(
            f"patch_size {patch_size}: the new layers for patches of {embedding.patch_size} cannot be resampled; "
            "unpatch the model, change its patch size, patch it again"
        )
    type(embedding).set_input_size(embedding, img_size=img_size)


def sites(model: nn.Module, config: SPTConfig, init: Init) -> Iterator[Site]:
    """Yield every layer that cuts images or feature maps into tokens."""
    for name, module in model.named_modules():
        if type(module) in MERGINGS or getattr(module, "cuts_images", False):
            layer = module
        elif (attributes := _convolution(module)) is not None:
            layer = getattr(module, attributes[0])
            name = f"{name}.{attributes[0]}".lstrip(".")
        else:
            if (reason := REASONS.get(type(module))) is not None:
                yield Site(name, module, reason)
            continue
        if not isinstance(layer, ShiftedViews) and all(original(leaf) is None for leaf in module.modules()):
            yield Site(name, layer, _refusal(layer, layer is model, init), module)


def apply(model: nn.Module, site: Site, config: SPTConfig, init: Init) -> None:
    """Apply shifted patch tokenization to the layer of a site."""
    if init == "preserve":
        with_shifted_views(site.layer).adopt(site.layer, config)
    else:
        for name, new in _replacements(site.layer, site.parent, config).items():
            replace_module(model, site.parent.get_submodule(name), new, "spt")
            if hasattr(model, "initialize_linears"):  # a model with its own initialization
                model.initialize_linears(new)
    keep_patch_size(site.parent)


def remove(model: nn.Module, layer: nn.Module) -> None:
    """Turn a changed layer back into timm's."""
    if isinstance(layer, ShiftedViews):
        layer.release()
    else:
        layer = restore_original(model, layer)
    release_patch_size(model, layer)


def fuse(model: nn.Module, layer: nn.Module) -> None:
    """Fold norm and projection; layers with shifted views added have neither and stay unchanged."""
    if isinstance(layer, ShiftedPatchTokenization):
        layer.fuse()


def patched(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every layer with shifted views, and what replaced others."""
    for name, module in model.named_modules():
        if (isinstance(module, ShiftedViews) and module.config is not None) or replacing_plugin(module) == "spt":
            yield name, module


def describe(layer: nn.Module) -> str:
    """Describe the window of pixels that a token covers."""
    if isinstance(views := getattr(layer, "views", None), Views):
        (y, z), (p, q) = views.window, views.patch_size
        added = ", shifted views added" if isinstance(layer, ShiftedViews) else ""
        return f"a token sees {y}x{z} instead of {p}x{q}{added}"
    if isinstance(layer, Dropped):
        return f"{type(original(layer)).__name__} behind the patches is dropped"
    return f"{type(layer).__name__} for more channels"


def describe_loss(layer: nn.Module) -> str | None:
    """Return the trained weights of the shifted views, or all weights of a layer that replaced another."""
    if isinstance(layer, ShiftedViews):
        return "the trained weights of the shifted views" if layer.shifted.any() else None
    return "shifted patch tokenization with its weights (timm's layers return with the weights they had before)"


def with_shifted_views(layer: nn.Module) -> type[ShiftedViews] | None:
    """Return the class that adds shifted views to a layer; None if its norm takes all views together."""
    if type(layer) is nn.Conv2d:
        return ShiftedPooling2d if _is_pooling(layer) else ShiftedConv2d
    return MERGINGS.get(type(layer))


def _refusal(layer: nn.Module, is_model: bool, init: Init) -> str | None:
    """Return why a layer that cuts tokens cannot be changed, if it cannot."""
    if type(layer) in MERGINGS or getattr(layer, "cuts_images", False):
        if init == "preserve" and type(layer) not in MERGINGS:
            return "it normalizes all views together; use init='paper'"
        return "it would be replaced; patch the model that contains it" if is_model and init == "paper" else None
    if isinstance(layer, nn.Identity):
        return "it takes the features of its backbone unchanged"
    if type(layer) is not nn.Conv2d:
        return "it is more than one convolution" if isinstance(layer, nn.Sequential) else "it is no convolution"
    plain = layer.dilation == (1, 1) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if not plain or any(k < s for k, s in zip(layer.kernel_size, layer.stride, strict=True)):
        return f"its convolution skips pixels: {layer}"
    return None if layer.groups == 1 or _is_pooling(layer) else f"its convolution has groups: {layer}"


def _replacements(layer: nn.Module, parent: nn.Module, config: SPTConfig) -> dict[str, nn.Module]:
    """Return new modules by the names of the leaves of `parent` they replace, of the layer's device and dtype."""
    weight = next(layer.parameters())
    with torch.device(weight.device):
        if type(layer) in MERGINGS:
            v2 = type(layer) is models.swin_transformer_v2.PatchMerging
            merging = ShiftedSwinV2PatchMerging if v2 else ShiftedPatchMerging
            leaves = {"": merging(layer.reduction.in_features // 4, layer.reduction.out_features, config)}
        elif parent is layer:
            leaves = layer.shifted_leaves(config)
        else:
            attribute, behind = _convolution(parent)
            leaves = {attribute: _tokenization(layer, config)}
            if behind and type(getattr(parent, behind, None)) not in (type(None), nn.Identity, Dropped):
                leaves[behind] = Dropped()
    return {name: leaf.to(weight.dtype).train(layer.training) for name, leaf in leaves.items()}


def _tokenization(conv: nn.Conv2d, config: SPTConfig) -> ShiftedPatchTokenization:
    """Return SPT with the channels and patches of a convolution, or with patches of 2 if it pools."""
    channels = conv.in_channels, conv.out_channels
    if _is_pooling(conv):
        return ShiftedPatchTokenization(*channels, 2, ceil_mode=True, features=True, config=config)
    return ShiftedPatchTokenization(
        *channels, conv.kernel_size, stride=conv.stride, padding=conv.padding, config=config
    )


def _convolution(module: nn.Module) -> tuple[str, str | None] | None:
    """Return the attributes of an embedding's convolution and of the layer that SPT drops."""
    return next((attributes for kind, attributes in CONVOLUTIONS.items() if isinstance(module, kind)), None)


def _is_pooling(conv: nn.Conv2d) -> bool:
    """Return whether a convolution is PiT's pooling."""
    return conv.groups == conv.in_channels and conv.kernel_size == (3, 3) and conv.stride == (2, 2)
