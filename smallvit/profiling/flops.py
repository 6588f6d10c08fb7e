"""Count parameters, multiply-accumulates, one-bit operations and bytes of a model.

The cost of attention is also computed by the published formulas, in multiply-accumulates for h · w tokens of width C
and windows of M × M tokens:

    global      4 h w C² + 2 (h w)² C         Ω(MSA), Liu et al. 2021, arXiv:2103.14030, eq. 1
    windowed    4 h w C² + 2 M² h w C         Ω(W-MSA), eq. 2

They are applied to each layer, with prefix tokens counted as tokens and maps padded to whole windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Attention
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from smallvit.utils.errors import InputError, first_line
from smallvit.utils.sizes import ImageSize, height_width


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Return the FLOPs of fused attention, q kᵀ and its product with v, from shapes (b, heads, tokens, dim)."""
    return 2 * query[:-1].numel() * key[-2] * (query[-1] + value[-1])


FUSED_ATTENTION = {
    getattr(torch.ops.aten, name): _attention_flops
    for name in ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math_for_mps")
}
"""Kernels that the FLOP counters of some torch releases count as 0."""


def count_parameters(model: nn.Module) -> int:
    """Count the trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_macs(model: nn.Module, in_chans: int, img_size: ImageSize) -> int:
    """Count the multiply-accumulates of one image's forward pass with torch's FLOP counter (two FLOPs each).

    Matrix products, convolutions and attention are counted, not norms or activations.

    Raises:
        InputError: The model cannot take these images.
    """
    return count_macs_by_layer(model, in_chans, img_size)[""]


@torch.no_grad()
def count_macs_by_layer(model: nn.Module, in_chans: int, img_size: ImageSize) -> dict[str, int]:
    """Count the multiply-accumulates of each layer by its name; '' is the whole model.

    Raises:
        InputError: The model cannot take these images.
    """
    weight = next(model.parameters())
    image = torch.zeros(1, in_chans, *height_width(img_size), device=weight.device, dtype=weight.dtype)
    training, trainable = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)  # the counter's hooks fail on views of parameters
    try:
        with FlopCounterMode(display=False, custom_mapping=FUSED_ATTENTION) as counter:
            model(image)
    except Exception as error:  # models raise anything for unsupported sizes
        reason = first_line(error)
        raise InputError(f"{type(model).__name__} cannot take {img_size}-pixel images: {reason}") from error
    finally:
        model.train(training)
        for parameter in trainable:
            parameter.requires_grad_(True)
    root = type(model).__name__ + "."
    layers = {name.removeprefix(root): sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    return layers | {"": counter.get_total_flops() // 2}


WORD_BITS = 64
"""One-bit multiply-accumulates that count as one operation."""
SCALE_BYTES = FLOAT_BYTES = 4
"""Bytes of the scale of each output of a one-bit layer, and of a float."""


@dataclass(frozen=True, kw_only=True)
class OperationCounts:
    """Multiply-accumulates of one image's forward pass."""

    bops: int
    """Those with two one-bit factors."""
    flops: int
    """All others."""

    @property
    def macs(self) -> int:
        """All multiply-accumulates."""
        return self.bops + self.flops

    @property
    def ops(self) -> float:
        """Operations: 64 one-bit multiply-accumulates count as one."""
        return self.bops / WORD_BITS + self.flops


def count_operations(model: nn.Module, macs: Mapping[str, int]) -> OperationCounts:
    """Count one-bit and other operations from the result of `count_macs_by_layer`."""
    layers = [(name, layer) for name, layer in model.named_modules() if getattr(layer, "multiplies_bits", False)]
    bops = sum(_own_macs(name, layer, macs) for name, layer in layers)
    return OperationCounts(bops=bops, flops=macs[""] - bops)


def count_packed_bytes(model: nn.Module) -> int:
    """Count the bytes of a model's tensors with one-bit weights stored as bits, without a file's header.

    Each output's weights are padded to whole bytes and have a scale of four bytes.
    """
    bits = {_join(name, "weight") for name, layer in model.named_modules() if getattr(layer, "has_bits", False)}
    state = model.state_dict()
    return sum(_packed_bytes(value) if name in bits else _float_bytes(value) for name, value in state.items())


def count_float_bytes(model: nn.Module) -> int:
    """Count the bytes of a model's tensors in full precision: four per float, eight per integer."""
    return sum(map(_float_bytes, model.state_dict().values()))


def _own_macs(name: str, layer: nn.Module, macs: Mapping[str, int]) -> int:
    """Return the multiply-accumulates of a layer without those of its sublayers."""
    return macs.get(name, 0) - sum(macs.get(_join(name, child), 0) for child, _ in layer.named_children())


def _join(layer: str, name: str) -> str:
    """Return the qualified name of a layer's attribute; the model's own name is ''."""
    return f"{layer}.{name}" if layer else name


def _packed_bytes(weight: Tensor) -> int:
    return len(weight) * (-(-weight[0].numel() // 8) + SCALE_BYTES)


def _float_bytes(value: Tensor) -> int:
    return value.numel() * (FLOAT_BYTES if value.is_floating_point() else value.element_size())


# Attention


def find_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost attention layers that plugins can patch, by name."""
    from smallvit.plugins.binary_timm import is_attention

    blocks = (ParallelScalingBlock, DiffParallelScalingBlock)  # layers that contain the MLP too
    layers = {n: each for n, each in model.named_modules() if is_attention(each) and not isinstance(each, blocks)}
    return {name: layer for name, layer in layers.items() if not any(name.startswith(f"{other}.") for other in layers)}


def count_attention_macs(model: nn.Module, macs: Mapping[str, int]) -> int | None:
    """Sum the multiply-accumulates of attention layers in `count_macs_by_layer`'s result; None without attention."""
    layers = find_attention(model)
    return sum(macs.get(name, 0) for name in layers) if layers else None


def compute_attention_formula(model: nn.Module) -> int | None:
    """Compute the multiply-accumulates of all attention by the formulas; None except for timm's ViTs and Swins."""
    if isinstance(model, SwinTransformer):
        total, side = 0, model.patch_embed.grid_size[0]
        for stage in model.layers:
            for block in stage.blocks:
                window = block.window_size[0]
                total += (-(-side // window)) ** 2 * _apply_formula(block.attn, window**2)
            side = -(-side // 2)
        return total
    if isinstance(model, VisionTransformer):
        layers = [getattr(block, "attn", None) for block in model.blocks]
        if all(isinstance(layer, Attention) and getattr(layer, "gate", None) is None for layer in layers):
            return sum(
                _apply_formula(layer, model.patch_embed.num_patches + model.num_prefix_tokens) for layer in layers
            )
    return None


def _apply_formula(layer: nn.Module, tokens: int) -> int:
    """Return the multiply-accumulates of global attention among some tokens."""
    return tokens * (layer.qkv.weight.numel() + layer.proj.weight.numel()) + 2 * tokens**2 * layer.proj.in_features
