"""Replace the patch embedding of timm's models by strided 3x3 convolutions.

Patches of 2ᵏ pixels take k convolutions of stride 2 with D/2ᵏ⁻¹, ..., D/2, D channels, each followed by batch norm, and
by GELU but for the last. Source: the sequential overlapping patch embedding of DHVT (arXiv:2210.05958, §3.2), without
its affine layers. CCT (arXiv:2104.05704) pools instead of striding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from timm import layers
from timm.models import pit, swin_transformer_v2_cr
from torch import nn

from smallvit.plugins.base import Init, Site
from smallvit.plugins.leaf import replace_module, replacing_plugin, restore_original
from smallvit.plugins.spt_timm import keep_patch_size, release_patch_size
from smallvit.plugins.stem import StemConfig

EMBEDDINGS: dict[type[nn.Module], str] = {
    layers.PatchEmbed: "proj",
    pit.ConvEmbedding: "conv",
    swin_transformer_v2_cr.PatchEmbed: "proj",
}
"""Modules that cut an image into patches, and their convolution."""


class ConvStem(nn.Sequential):
    """Images (b, c, h, w) to tokens (b, d, ⌈h/p⌉, ⌈w/p⌉), for a patch size p that is a power of 2."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, config: StemConfig | None = None) -> None:
        config = config or StemConfig()
        count = patch_size.bit_length() - 1
        parts: list[nn.Module] = []
        for index in range(count):
            channels = max(dim >> (count - 1 - index), 1)
            parts.append(nn.Conv2d(in_chans, channels, 3, stride=2, padding=1, bias=not config.norm))
            parts += [nn.BatchNorm2d(channels)] * config.norm + [nn.GELU()] * (index < count - 1)
            in_chans = channels
        super().__init__(*parts)


def sites(model: nn.Module, config: StemConfig, init: Init) -> Iterator[Site]:
    """Yield the convolution that cuts the image into patches."""
    for name, module in model.named_modules():
        attribute = next((leaf for kind, leaf in EMBEDDINGS.items() if isinstance(module, kind)), None)
        if attribute is None:
            continue
        conv = getattr(module, attribute)
        if replacing_plugin(conv) is None:
            yield Site(f"{name}.{attribute}".lstrip("."), conv, _refusal(conv, init), module)


def apply(model: nn.Module, site: Site, config: StemConfig, init: Init) -> None:
    """Replace the convolution of a patch embedding."""
    conv = site.layer
    with torch.device(conv.weight.device):
        new = ConvStem(conv.in_channels, conv.out_channels, conv.stride[0], config)
    replace_module(model, conv, new.to(conv.weight.dtype).train(conv.training), "stem")
    keep_patch_size(site.parent)


def remove(model: nn.Module, layer: nn.Module) -> None:
    """Turn a stem back into timm's convolution."""
    release_patch_size(model, restore_original(model, layer))


def patched(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every convolutional stem."""
    yield from ((name, module) for name, module in model.named_modules() if replacing_plugin(module) == "stem")


def describe(layer: ConvStem) -> str:
    """Describe the convolutions of a stem."""
    channels = [each.out_channels for each in layer if isinstance(each, nn.Conv2d)]
    return (
        f"{len(channels)} convolution{'s' * (len(channels) > 1)} of stride 2, channels {', '.join(map(str, channels))}"
    )


def describe_loss(layer: ConvStem) -> str:
    """Return the whole stem."""
    return "the convolutional stem with its weights (timm's patch embedding returns with the weights it had before)"


def _refusal(conv: nn.Module, init: Init) -> str | None:
    """Return why a convolution cannot be replaced, if it cannot."""
    if not isinstance(conv, nn.Conv2d):
        return "it is no convolution"
    if init == "preserve":
        return "a new stem changes the outputs; use init='paper'"
    size = conv.stride[0]
    if conv.stride[0] != conv.stride[1] or size < 2 or size & (size - 1):
        return f"its patches of {conv.stride[0]}x{conv.stride[1]} pixels are not square with sides of 2, 4, 8 or 16"
    if conv.kernel_size != conv.stride or conv.padding != (0, 0):
        return "its patches overlap"
    return None
