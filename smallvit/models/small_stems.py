"""Adapt the stems of timm's CNNs to small images by removing their first downsampling steps.

A CNN for 224-pixel images halves their side five times, which leaves a single position of a 32-pixel image. For a
model of stride s and images whose shorter side is n pixels, the first log₂ f halvings are removed:

    f = the smallest power of 2 with ⌈n · f / s⌉ ≥ 4,    s' = s / f

so that the last feature map is at least 4 wide, as at 32 pixels in the usual ResNets for CIFAR. A halving is all
strided convolutions and poolings whose inputs have the same side, in the main branch and in shortcuts. Without it, a
convolution has stride 1 and a pooling becomes the identity; a stem of patches gets smaller patches; and a first 7×7
convolution becomes 3×3, as is usual.

The layers are found by a forward pass on the meta device, so that no family of models needs an entry here. Models with
attention, with a fixed image size, or with another way to reduce resolution are left unchanged.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cache, partial
from math import gcd

import timm
import torch
from torch import nn

from smallvit.plugins.lsa_timm import has_attention
from smallvit.utils.sizes import ImageSize, height_width

MIN_SIDE = 4
"""Minimum side of the last feature map."""
PROBE_SIZE = 256
"""Image size of the forward pass that finds the strides: a multiple of all usual ones."""
STRIDED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)

LayerStrides = dict[str, int]


@dataclass(frozen=True)
class StemPlan:
    """Strides of a model whose first downsampling steps are removed."""

    timm_stride: int
    """Pixels per position of the last feature map in timm's model."""
    stride: int
    """Pixels per position in the adapted model."""
    layer_strides: LayerStrides
    """New stride of each layer to change, by name."""


@cache
def plan_stem(arch: str, img_size: ImageSize) -> StemPlan | None:
    """Plan how to adapt a timm model to images of this size; None if it needs no change or cannot be changed."""
    if timm.get_pretrained_cfg(arch).fixed_input_size:
        return None
    try:
        model = _create_on_meta(arch)
        with torch.no_grad(), torch.device("meta"):
            return None if has_attention(model) else _plan(model, img_size)
    except Exception:  # any of timm's models may raise anything at unforeseen sizes and strides
        return None


@torch.no_grad()
def adapt_stem(model: nn.Module, plan: StemPlan) -> None:
    """Change the strides of a freshly initialized model in place; smaller kernels are cut from larger ones."""
    scale_with_fan = _std_depends_on_fan(model)
    for name, stride in plan.layer_strides.items():
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Conv2d):
            if layer.kernel_size == layer.stride and not any(layer.padding):  # patches
                _shrink_kernel(layer, stride, scale_with_fan)
            elif layer.kernel_size == (7, 7) and stride == layer.groups == 1:
                _shrink_kernel(layer, 3, scale_with_fan)
                layer.padding = (1, 1)
            layer.stride = (stride, stride)
        elif stride == 1:
            model.set_submodule(name, nn.Identity())
        else:
            layer.stride = stride
    for info in model.feature_info:
        info["reduction"] = max(1, info["reduction"] * plan.stride // plan.timm_stride)


def _create_on_meta(arch: str) -> nn.Module:
    """Create a timm model without memory and without drawing random numbers."""
    try:
        with torch.device("meta"):
            return timm.create_model(arch, pretrained=False).eval()
    except NotImplementedError:  # the RegNets of timm 1.0.26 compute their widths with tensors
        with torch.random.fork_rng(devices=()):
            return timm.create_model(arch, pretrained=False).to("meta").eval()


def _plan(model: nn.Module, img_size: ImageSize) -> StemPlan | None:
    """Find a model's plan and check it by adapting the model."""
    halvings, side = _probe(model)
    timm_stride, factor = PROBE_SIZE // side, 1
    while -(-min(height_width(img_size)) * factor // timm_stride) < MIN_SIDE and factor < timm_stride:
        factor *= 2
    strides: LayerStrides = {}
    remaining = factor
    for layers in (halvings[side] for side in sorted(halvings, reverse=True)):
        removed = gcd(remaining, *layers.values())
        remaining //= removed
        if removed > 1:
            strides |= {name: stride // removed for name, stride in layers.items()}
        if remaining == 1:
            break
    if not strides:
        return None
    plan = StemPlan(timm_stride, timm_stride // factor, strides)
    adapt_stem(model, plan)
    model(torch.zeros(1, 3, *height_width(img_size)))
    return plan if timm_stride * side == plan.stride * _probe(model)[1] == PROBE_SIZE else None


def _probe(model: nn.Module) -> tuple[dict[int, LayerStrides], int]:
    """Return the strides above 1 by the side of the layer's input, and the side of the last feature map."""
    halvings: dict[int, LayerStrides] = defaultdict(dict)

    def record(name: str, layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        stride = layer.stride if isinstance(layer.stride, int) else layer.stride[0]
        if stride > 1:
            halvings[inputs[0].shape[-2]][name] = stride

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, STRIDED)]
    hooks = [layer.register_forward_pre_hook(partial(record, name)) for name, layer in layers]
    features = model.forward_features(torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE))
    for hook in hooks:
        hook.remove()
    return halvings, features.shape[-2]


def _shrink_kernel(layer: nn.Conv2d, size: int, scale_with_fan: bool) -> None:
    """Cut a smaller kernel out of a random one; scale it if its standard deviation depends on the fan."""
    scale = layer.kernel_size[0] / size
    layer.weight = nn.Parameter(layer.weight[..., :size, :size] * (scale if scale_with_fan else 1.0))
    layer.kernel_size = (size, size)
    if hasattr(layer, "scale"):  # timm's weight-standardized convolutions scale by the fan in
        layer.scale *= scale


def _std_depends_on_fan(model: nn.Module) -> bool:
    """Return whether the initial standard deviations of a model's convolutions differ."""
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    stds = [weight.std() for weight in weights if weight.numel() >= 1000 and not weight.is_meta]
    return bool(stds) and float(max(stds) / min(stds)) > 1.2
