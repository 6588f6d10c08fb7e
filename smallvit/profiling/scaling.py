"""Compare how the cost of attention grows with the image: counted, and by the published formulas.

    global      4 h w C² + 2 (h w)² C         Ω(MSA), Liu et al. 2021, arXiv:2103.14030, eq. 1
    windowed    4 h w C² + 2 M² h w C         Ω(W-MSA), eq. 2

These are multiply-accumulates for h · w tokens of width C and windows of M × M tokens. They are applied to each layer,
with prefix tokens counted as tokens and maps padded to whole windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from timm.layers import Attention
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock, VisionTransformer
from torch import nn

from smallvit.plugins.binary_timm import is_attention
from smallvit.utils.files import atomic_write

PANELS = {
    "attention_macs": ("attention: MACs (M)", 1e6),
    "macs": ("model: MACs (M)", 1e6),
    "ms_per_image": ("inference: milliseconds per image", 1.0),
    "activation_bytes_per_image": ("activations kept for backward: MB per image", 1e6),
}
"""Titles and units of the figure's panels."""


def find_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost attention layers that plugins can patch, by name."""
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


def plot_growth(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Plot costs over the image size as a PNG, one panel per value; dashed lines are the formulas.

    Args:
        records: The `growth` records of `run_profile`.
        path: Output file.
        title: Title of the figure.
    """
    panels = {name: panel for name, panel in PANELS.items() if any(record[name] is not None for record in records)}
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    sizes = sorted({record["img_size"] for record in records})
    for number, (name, (words, unit)) in enumerate(panels.items()):
        axes = figure.add_subplot(2, 2, number + 1)
        axes.set(xscale="log", yscale="log", xlabel="image size (px)", title=words, xticks=sizes, xticklabels=sizes)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
        for color, label in enumerate(dict.fromkeys(record["model"] for record in records)):
            for key, style in ((name, "o-"), (f"{name}_formula", "x--")):
                points = [r for r in records if r["model"] == label and r.get(key) is not None]
                x, y = [r["img_size"] for r in points], [r[key] / unit for r in points]
                axes.plot(x, y, style, color=f"C{color}", label=label if key == name else None)
    figure.suptitle(title)
    figure.legend(*figure.axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
