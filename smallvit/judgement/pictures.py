"""Pictures of a judgement: which classes are taken for which, and how far confidence can be trusted.

Reads plain records, imports no torch.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from smallvit.files import replacing
from smallvit.words import one_line

DPI = 120
NUMBERED = 20
"""Most classes whose cells hold numbers."""
NAMED = 60
"""Most names along a side; of more classes every second, third, ... is named."""
LONGEST = 24
"""Characters of a name that are shown."""
AROUND, LETTERS = 2.2, 11
"""Inches that names take beside a matrix; letters of a title in an inch."""
LINE = 0.7
"""Height of letters, as a share of what each name along a side has."""
FAINT = 0.5
"""Power of a share that is its depth of colour: rare confusions are to be seen too."""


def plot_confusion(confusion: Int64[np.ndarray, "k k"], class_names: Sequence[str], path: Path, title: str) -> None:
    """A confusion matrix, rows true and columns predicted, as a PNG; classes that neither has are left out."""
    present = np.flatnonzero(confusion.sum(axis=0) + confusion.sum(axis=1))
    counts, names = confusion[np.ix_(present, present)], [shortened(class_names[number]) for number in present]
    k, side = len(counts), min(12.0, AROUND + max(3.2, 0.42 * len(counts)))
    figure = Figure(figsize=(side + 1.2, side), layout="constrained", dpi=DPI)
    axes = figure.subplots()
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(FAINT, 0, 100), interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[0, 2, 10, 25, 50, 100])
    bar.set_label("share of the true class (%)")
    shown = np.arange(0, k, -(-k // NAMED))
    size = min(9.0, LINE * 72 * (side - AROUND) / len(shown))
    axes.set_xticks(shown, [names[number] for number in shown], rotation=90, fontsize=size)
    axes.set_yticks(shown, [names[number] for number in shown], fontsize=size)
    axes.set(xlabel="predicted", ylabel="true")
    if k <= NUMBERED:
        _number(axes, counts, shares)
    _entitle(figure, title)
    _save(figure, path)


def _number(axes: Axes, counts: np.ndarray, shares: np.ndarray) -> None:
    for row, column in zip(*np.nonzero(counts), strict=True):
        colour = "white" if shares[row, column] > 35 else "black"
        axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=colour, fontsize=8)


def plot_reliability(bins: Sequence[dict[str, Any]], ece: float, path: Path, title: str) -> None:
    """Accuracy in each range of confidence, and how many images are there, as a PNG; see `metrics.reliability`."""
    figure = Figure(figsize=(5.6, 5.6), layout="constrained", dpi=DPI)
    accuracy, images = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    width = 100 / len(bins)
    middles = [50 * (each["low"] + each["high"]) for each in bins]
    filled = [(at, each) for at, each in zip(middles, bins, strict=True) if each["images"]]
    accuracy.plot([0, 100], [0, 100], "--", color="0.5", linewidth=1, label="calibrated")
    accuracy.bar(
        [at for at, _ in filled],
        [each["accuracy"] for _, each in filled],
        width,
        color="C0",
        edgecolor="white",
        label="accuracy",
    )
    confidence = [each["confidence"] for _, each in filled]
    accuracy.plot(
        [100 * each for each in confidence], [100 * each for each in confidence], "k.", label="mean confidence"
    )
    accuracy.set(ylabel="accuracy (%)", ylim=(0, 102), xlim=(0, 100))
    accuracy.legend(loc="upper left")
    total = sum(each["images"] for each in bins)
    images.bar(middles, [100 * each["images"] / total for each in bins], width, color="0.6", edgecolor="white")
    images.set(xlabel="confidence: probability of the predicted class (%)", ylabel="images (%)")
    for axes in (accuracy, images):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    _entitle(figure, title, f"expected calibration error {ece:.2f} %")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """As a PNG, whole or not at all; signs that no font has are boxes, about which nobody need be told."""
    with replacing(path) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(partial, format="png", dpi=DPI)


def _entitle(figure: Figure, *lines: str) -> None:
    """A title in lines that the picture is wide enough for."""
    letters = int(LETTERS * figure.get_figwidth())
    text = "\n".join(part for line in lines for part in textwrap.wrap(line, letters))
    figure.suptitle(text.replace("$", r"\$"), fontsize=11)


def shortened(name: str) -> str:
    """A name on one line, of a length that fits beside a picture."""
    line = one_line(name).replace("$", r"\$")
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
