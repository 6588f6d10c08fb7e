"""Charts as inline SVG that takes its colours and letters from the page around it. Imports no torch.

matplotlib draws with colours that stand for the page's CSS variables, which then take their place; so a chart follows
the page into the dark, and two charts of one page share no id.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from types import MappingProxyType
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK, SOFT, LINE, GROUND = "#01fe01", "#01fe02", "#01fe03", "#01fe04"
SERIES = tuple(f"#02fe{number:02x}" for number in range(8))
VARIABLES = {INK: "--ink", SOFT: "--soft", LINE: "--line", GROUND: "--surface"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES, 1)
}
"""Colours that are drawn with, and the CSS variables that they become."""
RIGHT, WRONG = (66, 117, 226), (210, 98, 30)
"""Red, green, blue of a confusion matrix's diagonal and its rest, laid over the page as thick as the share."""
THICKEST = 190
"""Of 255; letters are read through it, in light and dark."""
TAG, ID = re.compile(r"<[^>]+>"), re.compile(r' id="([^"]+)"')
DASHES = ("-", "--", ":", "-.")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "smallvit",
    "text.parse_math": False,
    "font.size": 11,
    "text.color": SOFT,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
WIDE, HIGH = 5.2, 3.2
"""Inches of a chart; its letters are as large on a phone as beside it."""
SMALL = 0.1
"""Values below have as many decimals as each needs."""
NAMED, NUMBERED, LONG = 40, 12, 18
"""Most classes of a confusion matrix that are named, whose cells are numbered; most letters of a name there."""


@dataclass(frozen=True)
class Curve:
    """A line of a chart."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    """Which of the page's series."""
    dash: str = "-"
    alpha: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A picture of the page, with its words."""

    title: str
    svg: str
    legend: tuple[Curve, ...] = field(default=())
    """Curves that need telling apart."""


def lines(key: str, title: str, ylabel: str, curves: Sequence[Curve], told: str, **marked: Any) -> Chart:
    """Curves over the epochs, finite points only; `told` says in words what is seen, `key` is the chart's own.

    `marked` is the epoch and the value of a point that is named: `point=(epoch, value)`, `name="best"`.
    """

    def draw(axes: Axes) -> None:
        for curve in curves:
            points = [point for point in curve.points if math.isfinite(point[1])]
            style = {"marker": "o", "markersize": 3} if len(points) < 15 else {}
            colour = SERIES[curve.colour % len(SERIES)]
            axes.plot(*zip(*points, strict=True), curve.dash, color=colour, alpha=curve.alpha, **style)
        if marked:
            axes.plot(*marked["point"], "o", color=GROUND, markeredgecolor=INK, markersize=7, markeredgewidth=1.6)
            near = {"textcoords": "offset points", "ha": "center", "color": INK}
            axes.annotate(marked["name"], marked["point"], (0, 9), **near)
            axes.margins(y=0.14)
        axes.set(xlabel="epoch", ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.ticklabel_format(style="plain", useOffset=False)
        if axes.get_ylim()[1] < SMALL:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

    curves = [curve for curve in curves if any(math.isfinite(value) for _, value in curve.points)]
    return Chart(title=title, svg=_svg(key, title, told, draw), legend=tuple(curves) if len(curves) > 1 else ())


def reliability(key: str, bins: Sequence[dict[str, Any]], told: str) -> Chart:
    """Accuracy of the images in each range of confidence, and how many they are; `bins` are those of metrics.json."""
    filled = [each for each in bins if each["images"]]
    total = sum(each["images"] for each in filled) or 1

    def draw(axes: Axes) -> None:
        axes.plot([0, 100], [0, 100], "--", color=SOFT, linewidth=1)
        for each in filled:
            low, high = 100 * each["low"], 100 * each["high"]
            at, wide = (low + high) / 2, 0.86 * (high - low)
            axes.bar(at, each["accuracy"], wide, color=SERIES[0], alpha=0.3 + 0.7 * each["images"] / total)
            axes.plot([at - wide / 2, at + wide / 2], [each["accuracy"]] * 2, color=SERIES[0])
        axes.set(xlim=(0, 100), ylim=(0, 102), xlabel="confidence (%)", ylabel="accuracy (%)")

    return Chart(title="Reliability", svg=_svg(key, "Reliability", told, draw))


def confusion(key: str, names: Sequence[str], counts: Sequence[Sequence[int]], told: str) -> Chart:
    """Which class's images were taken for which: rows are true, columns predicted, thickness the share of a row."""
    table = np.array(counts, dtype=float)
    shares = table / table.sum(axis=1, keepdims=True).clip(min=1)
    cells = np.zeros((*table.shape, 4), dtype=np.uint8)
    cells[..., :3] = np.where(np.eye(len(table), dtype=bool)[..., None], RIGHT, WRONG)
    cells[..., 3] = np.round(THICKEST * shares**0.5)

    short = [name if len(name) <= LONG else name[: LONG - 1] + "…" for name in names]
    whole = {f"class-{number}": name for number, name in enumerate(names) if len(name) > LONG}

    def draw(axes: Axes) -> None:
        axes.imshow(cells, interpolation="none")
        axes.grid(visible=False)
        axes.spines[["top", "right", "left"]].set_visible(True)
        axes.set(xlabel="predicted", ylabel="true", xticks=[], yticks=[])
        if len(names) <= NAMED:
            small = 11 if len(names) <= 20 else 8
            turned = {"rotation": 90, "rotation_mode": "anchor", "ha": "right", "va": "center"}
            axes.set_xticks(range(len(names)), short, fontsize=small, **turned)
            axes.set_yticks(range(len(names)), short, fontsize=small)
            axes.tick_params(length=0)
            for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
                for number, label in enumerate(labels):
                    label.set_gid(f"class-{number}")
        if len(names) <= NUMBERED:
            for row, column in zip(*np.nonzero(table), strict=True):
                axes.text(column, row, f"{table[row, column]:.0f}", ha="center", va="center", color=INK)

    svg = _svg(key, "Confusion matrix", told, draw, size=(7.4, 7.0), whole=whole)
    return Chart(title="Confusion matrix", svg=svg)


def robustness(key: str, clean: float, found: dict[str, dict[str, float]], told: str) -> Chart:
    """Accuracy in per cent against how badly images are spoilt, in each way; 0 is as they are."""
    curves = [
        Curve(name, [(0, clean), *((int(level), top1) for level, top1 in levels.items())], number, DASHES[number % 4])
        for number, (name, levels) in enumerate(found.items())
    ]

    def draw(axes: Axes) -> None:
        for curve in curves:
            axes.plot(*zip(*curve.points, strict=True), curve.dash, color=SERIES[curve.colour], marker="o")
        axes.set(xlabel="severity (0: as they are)", ylabel="top-1 (%)", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return Chart(title="Robustness", svg=_svg(key, "Robustness", told, draw), legend=tuple(curves))


def _svg(
    key: str,
    title: str,
    told: str,
    draw: Callable[[Axes], None],
    *,
    size: tuple[float, float] = (WIDE, HIGH),
    whole: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """What `draw` draws, as SVG for the middle of a page; `whole` are the words that are cut, by their letters' id."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the browser has others
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _of_the_page(file.getvalue(), key, title, told, whole)


def _of_the_page(text: str, key: str, title: str, told: str, whole: Mapping[str, str]) -> str:
    """An SVG file's text without what belongs to a file, with ids of its own and the page's colours and letters."""
    box = re.search(r'viewBox="([^"]+)"', text)[1]
    inner = text[text.index(">", text.index("<svg")) + 1 :]
    inner = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", inner, flags=re.DOTALL)
    used = {name for tag in TAG.findall(inner) for name in re.findall(r'(?:url\(|href=")#([^)"]+)', tag)}
    inner = TAG.sub(lambda tag: _tag_of_the_page(tag[0], key, used, whole), inner)
    inner = re.sub(r"\s*\n\s*", "\n", inner)
    opening = f'<svg class="chart" viewBox="{box}" role="img" aria-label="{escape(f"{title}. {told}")}">'
    return f"{opening}<title>{escape(title)}</title><desc>{escape(told)}</desc>{inner.strip()}"


def _tag_of_the_page(tag: str, key: str, used: Collection[str], whole: Mapping[str, str]) -> str:
    """A tag, never the letters between two, with the page's ids, colours and letters."""
    name = found[1] if (found := ID.search(tag)) else ""
    tag = ID.sub(f' id="{key}-{name}"' if name in used else "", tag).replace("xlink:href", "href")
    tag = re.sub(r'(url\(|href=")#', rf"\g<1>#{key}-", tag)
    tag = re.sub(r" ?font-family: [^;\"]*;", "", tag)
    tag = re.sub(r"font: [^;\"]*?([\d.]+px)[^;\"]*", r"font-size: \1", tag)
    for colour, variable in VARIABLES.items():
        tag = tag.replace(colour, f"var({variable})")
    return tag + (f"<title>{escape(whole[name])}</title>" if name in whole else "")
