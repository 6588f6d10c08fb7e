"""Draw attention maps over images, and plot entropy, distance and temperatures of heads.

Map values are drawn in multiples of uniform attention, which gives every token the same weight. The functions take
NumPy arrays and plain values; this module does not import torch.

Axes: h heads, i j rows and columns of tokens, c channels, y x pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from smallvit.utils.errors import collapse_whitespace, escape_undecodable
from smallvit.utils.files import atomic_write
from smallvit.utils.plots import draw_grid, save_figure, view_colors

COLORMAP, OPACITY = "inferno", 0.65
"""Colors of a map, and their opacity over the grayscale image."""
OVERVIEW_SIDE, LAYERS_SIDE = 192, 128
"""Maximum side in pixels of a drawn image."""
MAX_PANELS = 12
"""Maximum number of layers, and of heads, in the picture of one image."""

Pixels = UInt8[np.ndarray, "c y x"]
Layers = Sequence[Mapping[str, Any]]
"""Statistics of each attention layer, as in attention.json."""


@dataclass(frozen=True, kw_only=True)
class AttentionView:
    """The prediction of a model for an image, and its maps."""

    predicted: str
    probability: float
    maps: tuple[Float[np.ndarray, "i j"], ...]
    """Attention of the last layer, rollout and relevance."""


def draw_overview(images: Sequence[Pixels], labels: Sequence[str], views: Sequence[AttentionView], path: Path) -> None:
    """Draw a row for each image: the image, and attention of the last layer, rollout and relevance.

    Args:
        images: Images of one size.
        labels: Class or file name of each image.
        views: The view of each image.
        path: The PNG to write.
    """
    kinds = ("attention, last layer", "rollout", "relevance, predicted class")
    sides = _drawn_sides(images[0].shape[1:], OVERVIEW_SIDE)
    panels, captions = [], []
    for image, label, view in zip(images, labels, views, strict=True):
        panels.append(resize_image(image, sides))
        captions.append(f"{_one_line(label)}\n{_one_line(view.predicted)} {view.probability:.0%}")
        for kind, weights in zip(kinds, map(relative_to_uniform, view.maps), strict=True):
            panels.append(overlay_map(image, weights, weights.min(), weights.max(), sides, smooth=True))
            captions.append(f"{kind}\n{weights.min():.2g} – {weights.max():.2g}")
    title = (
        "Below each image: its label and prediction. Below each map: its minimum (darkest) and maximum "
        "(brightest), in multiples of uniform attention. Attention is the mean over heads."
    )
    _save_grid(panels, captions, 1 + len(kinds), title, path)


def draw_layers(image: Pixels, label: str, maps: Mapping[str, Float[np.ndarray, "h i j"]], path: Path) -> None:
    """Draw a row for each layer: the image, and the map of each head.

    Args:
        image: The image.
        label: Its class or file name.
        maps: Maps of each layer, by its name.
        path: The PNG to write.
    """
    of_layers, sides = list(maps.values()), _drawn_sides(image.shape[1:], LAYERS_SIDE)
    selected, columns = select_evenly(len(maps), MAX_PANELS), min(max(map(len, of_layers)), MAX_PANELS)
    blank = np.full((3, *sides), 255, dtype=np.uint8)
    panels, captions = [], []
    for index in selected:
        heads = select_evenly(len(of_layers[index]), columns)
        relative = [relative_to_uniform(of_layers[index][head]) for head in heads]
        missing = columns - len(heads)
        drawn = [overlay_map(image, weights, 0, weights.max(), sides) for weights in relative]
        panels += [resize_image(image, sides), *drawn, *[blank] * missing]
        captions += [f"layer {index}", *(f"head {h}: {w.max():.2g}" for h, w in zip(heads, relative, strict=True))]
        captions += [""] * missing
    title = (
        f"{_one_line(label)}\nAttention of the tokens that the classifier reads: the class token, or the mean over "
        "image tokens. Colors run from 0 to the maximum of each map, given below it in multiples of uniform attention. "
        f"Shows {len(selected)} of {len(maps)} layers, and at most {MAX_PANELS} heads."
    )
    _save_grid(panels, captions, 1 + columns, title, path)


def overlay_map(
    image: Pixels,
    weights: Float[np.ndarray, "i j"],
    low: float,
    high: float,
    sides: tuple[int, int],
    *,
    smooth: bool = False,
) -> UInt8[np.ndarray, "3 y x"]:
    """Blend a color-mapped attention map over the image in grayscale.

    Args:
        image: The image.
        weights: The map.
        low: Value with the darkest color.
        high: Value with the brightest color.
        sides: Height and width of the result in pixels.
        smooth: Interpolate between tokens (bilinear), instead of drawing squares.
    """
    scaled = ((weights - low) / max(high - low, 1e-12)).clip(0, 1).astype(np.float32)
    resample = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    values = np.asarray(Image.fromarray(scaled).resize(sides[::-1], resample))
    colors = colormaps[COLORMAP](values)[..., :3].transpose(2, 0, 1)
    gray = resize_image(image, sides).mean(axis=0) / 255
    return (255 * (OPACITY * colors + (1 - OPACITY) * gray)).round().astype(np.uint8)


def resize_image(image: Pixels, sides: tuple[int, int]) -> UInt8[np.ndarray, "3 y x"]:
    """Resize an image to a height and width in pixels; whole factors repeat pixels."""
    rgb = np.ascontiguousarray(view_colors(image).transpose(1, 2, 0))
    resample = Image.Resampling.BILINEAR if sides[0] % len(rgb) else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(rgb).resize(sides[::-1], resample)).transpose(2, 0, 1)


def relative_to_uniform(weights: Float[np.ndarray, "i j"]) -> Float[np.ndarray, "i j"]:
    """Return a map in multiples of uniform attention."""
    return weights / max(float(weights.mean()), 1e-12)


def select_evenly(number: int, maximum: int) -> list[int]:
    """Return at most `maximum` evenly spaced indices below `number`, including the first and the last."""
    return np.linspace(0, number - 1, min(number, maximum)).round().astype(int).tolist()


def draw_heads(layers: Layers, path: Path) -> None:
    """Plot the entropy and the mean distance of each head by layer."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    units = {"entropy": "entropy of attention (nats)", "distance": "mean distance of attention (pixels)"}
    for axes, (quantity, label) in zip(figure.subplots(1, 2), units.items(), strict=True):
        depth = [index for index, layer in enumerate(layers) if layer[quantity] is not None]
        heads = [layers[index][quantity] for index in depth]
        _plot_heads(axes, depth, heads, ["C0"] * len(heads))
        axes.plot(depth, [np.mean(values) for values in heads], color="C0", label="mean over heads")
        uniform = [layers[index][f"uniform_{quantity}"] for index in depth]
        axes.plot(depth, uniform, "--", color="0.3", linewidth=1, label="uniform attention")
        axes.set_ylim(0, 1.06 * axes.dataLim.y1)
        axes.set(ylabel=label)
        axes.legend(fontsize=8)
        _label_layers(axes)
    figure.suptitle("Each dot is a head (mean over images).", fontsize=9)
    save_figure(figure, path)


def draw_temperatures(layers: Layers, path: Path) -> None:
    """Plot the learned temperatures of each head by layer, if there are any."""
    learned = [layer for layer in layers if layer["temperature"]]
    if not learned:
        return
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes, depth = figure.subplots(), np.arange(len(learned))
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(learned)))
    _plot_heads(axes, depth, [layer["temperature"] for layer in learned], colors)
    initial = [layer["initial_temperature"] for layer in learned]
    style = {"colors": "k", "linestyles": "--", "linewidth": 1, "label": "initial: head_dim$^{-0.5}$"}
    axes.hlines(initial, depth - 0.5, depth + 0.5, **style)
    axes.set(ylabel="temperature of each head")
    axes.legend(fontsize=8)
    _label_layers(axes)
    save_figure(figure, path)


def _plot_heads(axes: Axes, depth: Sequence[int], heads: Sequence[Sequence[float]], colors: Sequence[Any]) -> None:
    for x, values, color in zip(depth, heads, colors, strict=True):
        axes.plot([x] * len(values), values, "o", color=color, markersize=4.5, alpha=0.55, markeredgewidth=0)


def _label_layers(axes: Axes) -> None:
    axes.locator_params(axis="x", integer=True)
    axes.set(xlabel="attention layer")
    axes.grid(alpha=0.3)


def _drawn_sides(sides: Sequence[int], maximum: int) -> tuple[int, int]:
    """Return height and width of a drawn image: the largest multiple up to `maximum`, or that on the longer side."""
    longest = max(sides)
    factor = maximum // longest if longest <= maximum else maximum / longest
    height, width = (max(1, round(factor * side)) for side in sides)
    return height, width


def _one_line(text: str) -> str:
    return collapse_whitespace(escape_undecodable(text))


def _save_grid(
    panels: Sequence[UInt8[np.ndarray, "3 y x"]], captions: Sequence[str], columns: int, title: str, path: Path
) -> None:
    sheet = draw_grid(panels, captions, columns, title=title)
    with atomic_write(path) as partial:
        sheet.save(partial, format="png")
