"""Plot a run's curves, and embed the pictures of its folder in its page. Imports no torch.

Each has a description for screen readers.
"""

from __future__ import annotations

import base64
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from smallvit.runs.curves import finite_points
from smallvit.runs.run import ATTENTION, METRICS, NEIGHBORS, TITLES, primary_metric
from smallvit.utils.errors import first_line

STYLE = {
    "svg.hashsalt": "smallvit",
    "text.parse_math": False,  # names of runs are not formulas
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.4,
}
SIZE = (5.2, 3.2)
"""Width and height of charts in inches."""
QUALITY = 88
"""Of WebP: a tenth of the PNG's bytes without visible differences."""
MAX_SIDE = 16_383
"""Largest side of a WebP image in pixels."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image of the page."""

    title: str
    caption: str
    alt: str
    source: str
    """The image as a data URL."""
    width: int
    height: int
    folded: bool = False
    """Whether it is collapsed at first."""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """The pictures from a run's folder."""

    test: dict[str, Picture | None]
    """Those of `smallvit eval` by name; None if a file is missing."""
    attention: tuple[Picture, ...]
    neighbors: Picture | None
    notes: tuple[str, ...]
    """Damaged files, one line each."""


# Charts


def plot_training(history: list[dict[str, Any]], best: dict[str, Any] | None) -> list[Picture]:
    """Plot loss, accuracy, learning rate and LSA temperatures over the epochs, as far as they were recorded.

    Args:
        best: Metrics of the best epoch, which is marked.
    """
    metric = primary_metric(history)
    names = ("train_loss", "val_loss", f"val_{metric}", "lr")
    training, validation, top1, rates = (finite_points(history, name) for name in names)
    charts: list[tuple[str, str, dict[str, Points]]] = [
        ("Loss", "loss", {"training (augmented)": training, "validation": validation}),
        ("Validation accuracy", f"{TITLES[metric]} (%)", {"validation": top1}),
        ("Rank of the features", "dimensions", {"rank": finite_points(history, "rank")}),
        ("Learning rate", "learning rate", {"learning rate": rates}),
        ("Learned temperatures (LSA)", "factor of the scores", _mean_temperatures(history)),
    ]
    score = best and best.get(f"val_{metric}")
    marked = {} if score is None else {"Validation accuracy": (best["epoch"], score)}
    return [plot_lines(*chart, marked.get(chart[0])) for chart in charts if any(chart[2].values())]


def plot_overlay(histories: dict[str, list[dict[str, Any]]]) -> list[Picture]:
    """Plot validation accuracy and losses of several runs, by their names."""
    charts = []
    for name, title, ylabel in (
        ("val_map", "Validation mAP", "mAP (%)"),
        ("val_top1", "Validation accuracy", "top-1 (%)"),
        ("val_knn_top1", "Validation accuracy of nearest neighbors", "k-NN top-1 (%)"),
        ("rank", "Rank of the features", "dimensions"),
        ("val_loss", "Validation loss", "loss"),
        ("train_loss", "Training loss", "loss"),
    ):
        curves = {run: points for run, history in histories.items() if (points := finite_points(history, name))}
        if curves:
            charts.append(plot_lines(title, ylabel, curves))
    return charts


def plot_lines(title: str, ylabel: str, curves: dict[str, Points], marked: tuple[int, float] | None = None) -> Picture:
    """Plot curves over the epochs as an SVG image, with an optional marked point."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        for label, points in curves.items():
            style = {"marker": "o", "markersize": 3} if len(points) < 15 else {}
            axes.plot([epoch for epoch, _ in points], [value for _, value in points], label=label, **style)
        if marked:
            axes.plot(*marked, "o", color="white", markeredgecolor="black", markersize=7)
            axes.annotate(f"{marked[1]:.2f} %", marked, (0, 9), textcoords="offset points", ha="center")
            axes.margins(y=0.14)
        axes.set(xlabel="epoch", ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        if len(curves) > 1:
            axes.legend(fontsize=8, ncols=1 + (len(curves) > 8))
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    described = [f"{label}: {_describe(points)}." for label, points in curves.items()]
    described += [f"Marked: {marked[1]:.2f} in epoch {marked[0]}."] if marked else []
    alt = f"{title}, {ylabel}. {' '.join(described)}"
    width, height = (round(72 * side) for side in SIZE)
    return Picture(title=title, caption="", alt=alt, source=_data_url(file, "svg+xml"), width=width, height=height)


def _mean_temperatures(history: list[dict[str, Any]]) -> dict[str, Points]:
    """Return the mean temperature over each layer's heads, by epoch."""
    layers: dict[str, list[tuple[float, float]]] = {}
    for line in history:
        for layer, heads in (line.get("temperatures") or {}).items():
            if math.isfinite(mean := statistics.fmean(heads)):
                layers.setdefault(layer.removesuffix(".attn"), []).append((line["epoch"], mean))
    return layers


def _describe(points: Points) -> str:
    """Describe the first and the last value of a curve."""
    if not points:
        return "no finite value"
    (first, start), (last, end) = points[0], points[-1]
    return f"from {start:.3g} in epoch {first} to {end:.3g} in epoch {last}"


def _data_url(file: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def embed(image: Image.Image) -> str:
    """Return an image as a data URL; shrink it if it is too large for WebP."""
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=QUALITY)
    return _data_url(file, "webp")


# Files


def read_gallery(
    folder: Path, metrics: dict[str, Any] | None, attention: dict[str, Any] | None, neighbors: dict[str, Any] | None
) -> Gallery:
    """Read the pictures that belong to the test results, attention maps and nearest neighbors of a run."""
    notes: list[str] = []
    test = {} if metrics is None else _read_test(folder / Path(METRICS).parent, metrics, notes)
    maps = [] if attention is None else _read_attention(folder / Path(ATTENTION).parent, attention, notes)
    near = None if neighbors is None else _read_neighbors(folder / Path(NEIGHBORS).parent, neighbors, notes)
    return Gallery(test=test, attention=tuple(filter(None, maps)), neighbors=near, notes=tuple(notes))


def _read_picture(
    path: Path, notes: list[str], title: str, caption: str, alt: str, *, folded: bool = False
) -> Picture | None:
    """Read an image file; None if it is missing, or damaged, which is noted."""
    try:
        with Image.open(path) as file:
            image = Image.new("RGB", file.size, "white")
            image.paste(file, mask=file.getchannel("A") if "A" in file.getbands() else None)
    except FileNotFoundError:
        return None
    except Exception as error:  # damaged files raise many kinds
        notes.append(f"{path} is not shown, since it is damaged ({first_line(error)})")
        return None
    source, (width, height) = embed(image), image.size
    return Picture(title=title, caption=caption, alt=alt, source=source, width=width, height=height, folded=folded)


def _read_test(folder: Path, metrics: dict[str, Any], notes: list[str]) -> dict[str, Picture | None]:
    """Read confusion matrix, reliability and mistakes."""
    if "confusion" not in metrics:
        return {}
    images, right = metrics["images"], sum(row[number] for number, row in enumerate(metrics["confusion"]))
    listed = "; ".join(
        f"{100 * each['low']:.0f} to {100 * each['high']:.0f} %: {each['accuracy']:.0f} % of {each['images']:,} images"
        for each in metrics["reliability"]
        if each["images"]
    )
    texts = {
        "confusion": (
            "Confusion matrix",
            "Rows are true classes, columns predicted; the darker, the larger the share of the row.",
            f"{right:,} of {images:,} images lie on the diagonal.",
        ),
        "reliability": (
            "Reliability",
            "Accuracy by confidence; on the dashed line the model is calibrated.",
            f"Accuracy by confidence. {listed}. Calibration error {metrics['ece']:.2f} %.",
        ),
        "mistakes": (
            "Most confident mistakes",
            "Test images, the most confident mistakes first, with true class, predicted class and confidence.",
            f"Misclassified test images; {images - right:,} of {images:,} were misclassified.",
        ),
    }
    return {name: _read_picture(folder / f"{name}.png", notes, *each) for name, each in texts.items()}


def read_confusion(folder: Path, metrics: dict[str, Any]) -> Picture | None:
    """Read the confusion matrix in a folder; None if it is missing or damaged."""
    right, images = sum(row[n] for n, row in enumerate(metrics["confusion"])), sum(map(sum, metrics["confusion"]))
    caption = "Rows are true classes, columns predicted; the darker, the larger the share of the row."
    alt = f"{right:,} of {images:,} images lie on the diagonal."
    return _read_picture(folder / "confusion.png", [], "Confusion matrix", caption, alt)


def _read_attention(folder: Path, result: dict[str, Any], notes: list[str]) -> list[Picture | None]:
    """Read overview, heads, temperatures, and all layers of each image."""
    images, layers = result["images"], result["layers"]
    described = [_describe_prediction(image) for image in images]
    kind = f"of {result['data']}, {result['split']}" if result.get("data") else "chosen as files"
    entropy, distance, temperature = (_by_layer(layers, name) for name in ("entropy", "distance", "temperature"))
    pictures = [
        _read_picture(
            folder / "overview.png",
            notes,
            "Attention",
            f"{len(images)} images {kind}. Attention of the last layer, rollout through all layers, class relevance.",
            f"{len(images)} images with heat maps: {'; '.join(described)}.",
        ),
        _read_picture(
            folder / "heads.png",
            notes,
            "Heads",
            "Entropy and mean distance of each head's attention, by layer.",
            f"Mean over heads, from the first layer to the last: entropy {entropy} nats, distance {distance} pixels.",
        ),
    ]
    if temperature:
        alt = f"Factor of the attention scores, mean over heads, by layer: {temperature}."
        caption = "Learned temperature of each head (LSA)."
        pictures.append(_read_picture(folder / "temperatures.png", notes, "Temperatures", caption, alt))
    for number, text in enumerate(described, 1):
        file, caption = folder / f"layers-{number}.png", f"{text}, in all layers and heads."
        alt = f"Attention of {len(layers)} layers over one image: {text}."
        pictures.append(_read_picture(file, notes, f"Layers, image {number}", caption, alt, folded=True))
    return pictures


def _read_neighbors(folder: Path, result: dict[str, Any], notes: list[str]) -> Picture | None:
    """Read images with their nearest neighbors."""
    kind = "Validation images" if result["split"] == "val" else "Training images"
    caption = (
        f"{kind} on the left; right of each the most similar of {result['images']:,} training images, with the cosine "
        "similarity of their features, and the classes that are known."
    )
    rows = [
        f"{query['label'] or 'image'}: " + ", ".join(_describe_neighbor(each) for each in query["neighbors"])
        for query in result["queries"]
    ]
    alt = f"{kind} with their neighbors. {'; '.join(rows)}."
    return _read_picture(folder / "neighbors.png", notes, "Nearest neighbors", caption, alt)


def _describe_neighbor(neighbor: dict[str, Any]) -> str:
    return f"{neighbor['label'] or 'image'} ({neighbor['similarity']:.2f})"


def _describe_prediction(image: dict[str, Any]) -> str:
    confidence = f"{100 * image['probability']:.0f} %"
    if image.get("label") in (None, image["predicted"]):
        return f"{image['predicted']} ({confidence})"
    return f"{image['label']}, classified as {image['predicted']} ({confidence})"


def _by_layer(layers: Sequence[dict[str, Any]], name: str) -> str:
    """Return the mean over heads in each layer that has a value."""
    return ", ".join(f"{statistics.fmean(layer[name]):.3g}" for layer in layers if layer.get(name))
