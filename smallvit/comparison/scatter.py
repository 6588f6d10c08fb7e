"""A picture of a comparison: accuracy against speed, a point for each row. Reads plain records, imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from smallvit.files import replacing

PANELS = {"inference_images_per_second": "inference images/s", "train_images_per_second": "training images/s"}
"""What accuracy is drawn against."""
SMALLEST, LARGEST = 6.0, 15.0
"""Diameters of points; areas in between grow in proportion to the parameters."""
SIDES = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
REACHES = (1.0, 2.5, 4.0, 6.0)
"""Where a name may stand: to that side of its point, that many times as far as its edge."""
LONG = 24
"""Characters of a name that is written in several lines."""
DPI = 120


def plot_comparison(records: list[dict[str, Any]], path: Path, title: str) -> bool:
    """Draw a panel for each speed that is known, as a PNG; returns whether there is any.

    Bars are standard deviations. The records are those of `Standing.record`.
    """
    known = {name: [(f"C{i % 10}", r) for i, r in enumerate(records) if r[name] is not None] for name in PANELS}
    panels = {name: points for name, points in known.items() if points}
    if not panels:
        return False
    figure = Figure(figsize=(6.4 * len(panels), 4.8), layout="constrained", dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    apart = ": " if len(panels) > 1 else "\n"
    figure.suptitle(f"{title}{apart}bars are standard deviations over seeds, areas grow with parameters", fontsize=10)
    placed = []
    for axes, (name, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        placed.append((axes, _draw(axes, points, name)))
    canvas.draw()  # the layout is known only now
    for axes, drawn in placed:
        _name(axes, drawn, canvas)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=DPI)
    return True


def _draw(axes: Axes, points: list[tuple[str, dict[str, Any]]], name: str) -> list[tuple[dict[str, Any], Any, float]]:
    """Points and bars; returns each record with where it is and its diameter."""
    most, drawn = max(record["parameters"] for _, record in points), []
    for colour, record in points:
        at, deviation = (record[name], record["test_top1"]), record["test_top1_std"]
        wide = math.sqrt(SMALLEST**2 + (LARGEST**2 - SMALLEST**2) * record["parameters"] / most)
        axes.plot(*at, "o", color=colour, markersize=wide, markeredgewidth=0, alpha=0.6)
        axes.errorbar(*at, yerr=deviation, color="0.2", capsize=3, linewidth=1, zorder=3)
        drawn.append((record, at, wide))
    axes.set(xscale="log", xlabel=f"{PANELS[name]} (log scale)", ylabel="test top-1 (%)")
    axes.margins(0.2)
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, -0.5), min(top, 100.5))  # of what an accuracy can be
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 8 * low else MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    return drawn


def _name(axes: Axes, drawn: list[tuple[dict[str, Any], Any, float]], canvas: FigureCanvasAgg) -> None:
    """Write each point's name where it covers least."""
    scale, covered = DPI / 72, []
    for record, at, wide in drawn:
        x, y = axes.transData.transform(at)
        covered.append(Bbox.from_extents(*(c + s * wide * scale / 2 for s in (-1, 1) for c in (x, y))))
        spread = record["test_top1_std"] or 0
        low, high = (axes.transData.transform((at[0], at[1] + side * spread))[1] for side in (-1, 1))
        covered.append(Bbox.from_extents(x - 3 * scale, low, x + 3 * scale, high))
    for record, at, wide in drawn:
        name = record["model"]
        text = f"{name.replace(',', ',' + chr(10)) if len(name) > LONG else name}\n{record['parameters'] / 1e6:,.2f} M"
        note = axes.annotate(
            text,
            at,
            (0, 0),
            textcoords="offset points",
            fontsize=8,
            linespacing=0.95,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "0.5", "shrinkA": 0, "shrinkB": wide / 2},
        )
        note.set_in_layout(False)
        places = [(side, reach) for reach in REACHES for side in SIDES]
        costs = [_cost(note, *place, wide, axes.bbox.padded(-5), covered, canvas) + n for n, place in enumerate(places)]
        covered.append(_put(note, *places[costs.index(min(costs))], wide, canvas))


def _put(note: Annotation, side: tuple[int, int], reach: float, wide: float, canvas: FigureCanvasAgg) -> Bbox:
    """Move a name; returns the pixels that it covers."""
    far = reach * (wide / 2 + 3) / math.hypot(*side)
    note.set_position((side[0] * far, side[1] * far))
    note.set(ha={1: "left", 0: "center", -1: "right"}[side[0]], va={1: "bottom", 0: "center", -1: "top"}[side[1]])
    note.update_positions(canvas.get_renderer())
    return Text.get_window_extent(note)


def _cost(
    note: Annotation,
    side: tuple[int, int],
    reach: float,
    wide: float,
    page: Bbox,
    covered: Iterable[Bbox],
    canvas: FigureCanvasAgg,
) -> float:
    """Pixels that a name would cover, those outside the panel counted thrice."""
    box = _put(note, side, reach, wide, canvas)
    return sum(_overlap(box, other) for other in covered) + 3 * (box.width * box.height - _overlap(box, page))


def _overlap(one: Bbox, other: Bbox) -> float:
    both = Bbox.intersection(one, other)
    return 0.0 if both is None else both.width * both.height
