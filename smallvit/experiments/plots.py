"""Plot accuracy against speed, with one labeled point per model. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from smallvit.utils.files import atomic_write
from smallvit.utils.plots import fit_fonts

PANELS = {"inference_images_per_second": "inference images/s", "train_images_per_second": "training images/s"}
"""Speeds that accuracy is plotted against."""
MIN_SIZE, MAX_SIZE = 6.0, 15.0
"""Diameters of points; areas in between are proportional to the number of parameters."""
DIRECTIONS = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
DISTANCES = (10, 22, 35, 50)
"""Positions of a label relative to its point, in points."""
MAX_LINE = 24
"""Longer labels are broken at commas."""
DPI = 120


def plot_comparison(records: list[dict[str, Any]], path: Path, title: str) -> bool:
    """Plot one panel per known speed as a PNG, with standard deviations as bars; return False if no speed is known.

    Args:
        records: Records of `AggregatedRun.record`.
        path: The PNG file.
        title: Title of the figure.
    """
    panels = {name: [(i, r) for i, r in enumerate(records) if r[name] is not None] for name in PANELS}
    panels = {name: numbered for name, numbered in panels.items() if numbered}
    if not panels:
        return False
    figure = Figure(figsize=(6.4 * len(panels), 4.8), layout="constrained", dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    separator = ": " if len(panels) > 1 else "\n"
    figure.suptitle(f"{title}{separator}bars: standard deviation over seeds; areas: parameters", fontsize=10)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, numbered) in zip(all_axes, panels.items(), strict=True):
        _plot_points(axes, numbered, name)
    fit_fonts(figure)
    canvas.draw()  # fixes the layout
    for axes, (name, numbered) in zip(all_axes, panels.items(), strict=True):
        _label_points(axes, [record for _, record in numbered], name, canvas)
    fit_fonts(figure)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=DPI)
    return True


def _plot_points(axes: Axes, numbered: Sequence[tuple[int, dict[str, Any]]], name: str) -> None:
    largest = max(record["parameters"] for _, record in numbered)
    for number, record in numbered:
        xy = record[name], record["test_top1"]
        size = math.sqrt(MIN_SIZE**2 + (MAX_SIZE**2 - MIN_SIZE**2) * record["parameters"] / largest)
        axes.plot(*xy, "o", color=f"C{number % 10}", markersize=size, markeredgewidth=0, alpha=0.6)
        axes.errorbar(*xy, yerr=record["test_top1_std"], color="0.2", capsize=3, linewidth=1, zorder=3)
    axes.set(xscale="log", xlabel=f"{PANELS[name]} (log scale)", ylabel="test top-1 (%)")
    axes.margins(0.2)
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, -0.5), min(top, 100.5))
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 8 * low else MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def _label_points(axes: Axes, records: Sequence[dict[str, Any]], name: str, canvas: FigureCanvasAgg) -> None:
    """Write each model's label where it overlaps least with points, other labels and the panel's border."""
    points = [(record[name], record["test_top1"]) for record in records]
    radius = MAX_SIZE / 2 * DPI / 72
    covered = [
        Bbox.from_bounds(x - radius, y - radius, 2 * radius, 2 * radius) for x, y in axes.transData.transform(points)
    ]
    panel = axes.bbox.padded(-5)

    def cost(label: Annotation, distance: float, direction: tuple[int, int]) -> float:
        box = _move_label(label, distance, direction, canvas)
        outside = box.width * box.height - _overlap(box, panel)
        return sum(_overlap(box, other) for other in covered) + 3 * outside + distance

    for record, xy in zip(records, points, strict=True):
        model = record["model"].replace(",", ",\n") if len(record["model"]) > MAX_LINE else record["model"]
        label = axes.annotate(
            f"{model}\n{record['parameters'] / 1e6:,.2f} M",
            xy,
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "0.5", "shrinkA": 0},
        )
        label.set_in_layout(False)
        position = min(product(DISTANCES, DIRECTIONS), key=lambda position, label=label: cost(label, *position))
        covered.append(_move_label(label, *position, canvas))


def _move_label(label: Annotation, distance: float, direction: tuple[int, int], canvas: FigureCanvasAgg) -> Bbox:
    """Move a label, and return the pixels that it covers."""
    dx, dy = (side * distance / math.hypot(*direction) for side in direction)
    label.set_position((dx, dy))
    label.set(ha={1: "left", 0: "center", -1: "right"}[direction[0]])
    label.set(va={1: "bottom", 0: "center", -1: "top"}[direction[1]])
    label.update_positions(canvas.get_renderer())
    return Text.get_window_extent(label)


def _overlap(one: Bbox, other: Bbox) -> float:
    both = Bbox.intersection(one, other)
    return 0.0 if both is None else both.width * both.height
