"""Stems of timm's CNNs, made fit for small images: their first halvings of resolution are undone.

A CNN made for 224 pixels halves their side five times, which leaves a single place of 32 pixels. Of a model whose
stride is s, and of images of n pixels, the first log₂ f halvings are undone:

    f = the least power of 2 with ⌈n · f / s⌉ ≥ 4,    s' = s / f

so that its last map is at least 4 places wide, as at 32 pixels in the usual ResNets for CIFAR. A halving is all the
convolutions and poolings with a stride that take maps of one side, in the main branch and in shortcuts. Without it a
convolution has stride 1, and a pooling nothing to do; where a stem cuts patches, they become smaller; and a first
convolution of 7×7 becomes one of 3×3, as is usual.

The layers are found by sending an image through the model on no device; families need no entry. Models that attend,
that are made for one image size, or whose resolution falls in another way stay as timm has them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cache, partial
from math import gcd

import timm
import torch
from torch import nn

from smallvit.plugins.patching import sites

LEAST_SIDE = 4
"""Places along the side of the last map, at least."""
PROBE = 256
"""Side in pixels of the image that is sent through a model: a multiple of all usual strides."""
FIRST_KERNEL, SMALL_KERNEL = 7, 3
STRIDED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


@dataclass(frozen=True)
class Fit:
    """What of a model's downsampling is undone."""

    own: int
    """Pixels of the image for a place of timm's last map, along the side."""
    stride: int
    """The same, of the fitted model's."""
    strides: dict[str, int]
    """The new stride of each layer that has another."""


@cache
def fit_for(arch: str, img_size: int) -> Fit | None:
    """How a model of timm's becomes fit for images of this size; None where it is already, or cannot."""
    if timm.get_pretrained_cfg(arch).fixed_input_size:
        return None
    try:
        model = _empty(arch)
        with torch.no_grad(), torch.device("meta"):
            return None if any(site.plugin == "lsa" for site in sites(model)) else _checked_fit(model, img_size)
    except Exception:  # whatever one of a thousand models raises at sizes and strides not foreseen
        return None


@torch.no_grad()
def apply(model: nn.Module, fit: Fit) -> None:
    """Undo the halvings in a freshly initialised model; smaller kernels are parts of those drawn for larger ones."""
    by_fan = _spread_follows_fan(model)
    for name, stride in fit.strides.items():
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Conv2d):
            _set_stride(layer, stride, by_fan)
        elif stride == 1:
            model.set_submodule(name, nn.Identity())
        else:
            layer.stride = stride
    for info in model.feature_info:
        info["reduction"] = max(1, info["reduction"] * fit.stride // fit.own)


def _empty(arch: str) -> nn.Module:
    """A model of timm's without memory, made without drawing a random number."""
    try:
        with torch.device("meta"):
            return timm.create_model(arch, pretrained=False).eval()
    except NotImplementedError:  # the RegNets of timm 1.0.26 compute their widths by tensors
        with torch.random.fork_rng(devices=()):
            return timm.create_model(arch, pretrained=False).to("meta").eval()


def _checked_fit(model: nn.Module, img_size: int) -> Fit | None:
    """Find a model's fit and try it on the model."""
    halvings, last = _probe(model)
    own, factor = PROBE // last, 1
    while -(-img_size * factor // own) < LEAST_SIDE and factor < own:
        factor *= 2
    stride, strides, left = own // factor, {}, factor
    for layers in (halvings[side] for side in sorted(halvings, reverse=True)):
        undone = gcd(left, *layers.values())
        left //= undone
        if undone > 1:
            strides |= {name: step // undone for name, step in layers.items()}
        if left == 1:
            break
    if not strides:
        return None
    fit = Fit(own, stride, strides)
    apply(model, fit)
    model(torch.zeros(1, 3, img_size, img_size))
    meant = own * last == stride * _probe(model)[1] == PROBE
    return fit if meant else None


def _probe(model: nn.Module) -> tuple[dict[int, dict[str, int]], int]:
    """The strides of layers that have one, by the side of the map that they take; and the side of the last map."""
    halvings: dict[int, dict[str, int]] = defaultdict(dict)

    def note(name: str, layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        stride = layer.stride if isinstance(layer.stride, int) else layer.stride[0]
        if stride > 1:
            halvings[inputs[0].shape[-2]][name] = stride

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, STRIDED)]
    hooks = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in layers]
    last = model.forward_features(torch.zeros(1, 3, PROBE, PROBE))
    for hook in hooks:
        hook.remove()
    return halvings, last.shape[-2]


def _set_stride(layer: nn.Conv2d, stride: int, by_fan: bool) -> None:
    """Give a convolution a smaller stride, and the kernel that goes with it."""
    if layer.kernel_size == layer.stride and not any(layer.padding):
        _shrink(layer, stride, by_fan)
    elif layer.kernel_size == (FIRST_KERNEL,) * 2 and stride == layer.groups == 1:
        _shrink(layer, SMALL_KERNEL, by_fan)
        layer.padding = (SMALL_KERNEL // 2,) * 2
    layer.stride = (stride, stride)


def _shrink(layer: nn.Conv2d, size: int, by_fan: bool) -> None:
    """Cut a kernel out of a larger one; a part of random values is as random, but of another spread, if it follows
    from how many there are."""
    scale = layer.kernel_size[0] / size
    layer.weight = nn.Parameter(layer.weight[..., :size, :size] * (scale if by_fan else 1.0))
    layer.kernel_size = (size, size)
    if hasattr(layer, "scale"):  # timm's convolutions that scale their weights by their number
        layer.scale *= scale


def _spread_follows_fan(model: nn.Module) -> bool:
    """Whether a model's convolutions begin with a spread that depends on their size; else all begin with the same."""
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    spreads = [weight.std() for weight in weights if weight.numel() >= 1000 and not weight.is_meta]
    return bool(spreads) and float(max(spreads) / min(spreads)) > 1.2
