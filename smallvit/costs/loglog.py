"""A picture of how models grow with the image: attention, operations, time, memory. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from smallvit.files import replacing

PANELS = {
    "attention_macs": ("attention alone: MACs (M)", 1e6),
    "macs": ("whole model: MACs (M)", 1e6),
    "ms_per_image": ("inference: milliseconds per image", 1.0),
    "activation_bytes_per_image": ("activations kept for backward: MB per image", 1e6),
}
"""What is drawn over the image size: titles, and what a unit is."""
FORMULA = "attention_macs_formula"
MARKERS = "osD^vPX*"
DASHES = ("-", (0, (5, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)))
LARGEST, SMALLEST = 9.0, 5.0
"""Diameters of markers: the first row's are the largest, so that rows with the same figures show within each other."""
LEAST_RATIO = 1.22
"""Between two sizes that are both written below the axis."""
CHARACTERS = 120
"""Of labels that stand abreast below the panels."""
NARROW = 50
"""Ratio of a scale's ends up to which numbers between powers of ten are written too."""
DPI = 120


def plot_growth(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw a panel for every figure that some row has, as a PNG; attention's formulas are lines, what is measured dots.

    `records` are those of `growth` in what `profiling.measure` gives.
    """
    panels = [name for name in PANELS if any(record[name] is not None for record in records)]
    labels = list(dict.fromkeys(record["model"] for record in records))
    columns, abreast = 2 if len(panels) > 1 else 1, max(1, min(3, CHARACTERS // max(map(len, labels))))
    lines = -(-len(panels) // columns)
    high = 3.9 * lines + 0.25 * -(-len(labels) // abreast) + 0.3
    figure = Figure(figsize=(5.4 * columns, high), layout="constrained")
    for axes, name in zip(figure.subplots(lines, columns, squeeze=False).flat, [*panels, None, None], strict=False):
        if name is None:
            axes.remove()
            continue
        _panel(axes, name, records, labels)
    figure.suptitle(title, fontsize=10)
    handles, names = figure.axes[-1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=abreast, fontsize=9, frameon=False)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=DPI)


def _panel(axes: Axes, name: str, records: Sequence[dict[str, Any]], labels: Sequence[str]) -> None:
    words, unit = PANELS[name]
    for number, label in enumerate(labels):
        points = [record for record in records if record["model"] == label and record[name] is not None]
        sizes = [record["img_size"] for record in points]
        style = {"color": f"C{number % 10}", "linestyle": DASHES[number % len(DASHES)], "linewidth": 1.3}
        wide = LARGEST - (LARGEST - SMALLEST) * number / max(1, len(labels) - 1)
        style |= {"marker": MARKERS[number % len(MARKERS)], "markersize": wide, "markerfacecolor": "none"}
        line = [record[name] / unit for record in points]
        if name == "attention_macs":
            known = [record for record in points if record[FORMULA] is not None]
            drawn = style | {"marker": "", "label": f"{label}: formula"}
            axes.plot([r["img_size"] for r in known], [r[FORMULA] / unit for r in known], **drawn)
            style["linestyle"] = ""
        axes.plot(sizes, line, label=label, **style)
    axes.set(xscale="log", yscale="log", xlabel="image size (px)")
    axes.set_title(words + ("; lines: formula, dots: measured" if name == "attention_macs" else ""), fontsize=10)
    _scale(axes, sorted({record["img_size"] for record in records}))


def _scale(axes: Axes, sizes: Sequence[int]) -> None:
    """Write the image sizes, as many as there is room for, and plain numbers."""
    written = [sizes[0]]
    for size in sizes[1:]:
        if size >= LEAST_RATIO * written[-1]:
            written.append(size)
    axes.xaxis.set_major_locator(FixedLocator(written))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > NARROW * low else (1.0, 2.0, 5.0), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
