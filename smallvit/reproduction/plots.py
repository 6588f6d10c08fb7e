"""Pictures of an experiment: what plugins bring, accuracy against speed and against images seen. Imports no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from smallvit.comparison.scatter import plot_comparison
from smallvit.files import replacing
from smallvit.reproduction.outcomes import Outcome, curve

DPI = 110
METADATA = {"Software": None}
"""Nothing of the program's version, so that the same records give the same file."""


def plot_speed(shown: Sequence[Outcome], path: Path, title: str) -> bool:
    """Accuracy against the speed of training; returns whether there is anything to draw."""
    records = [
        {
            "model": outcome.trial.label,
            "test_top1": outcome.top1.mean,
            "test_top1_std": outcome.top1.deviation,
            "parameters": outcome.first("parameters"),
            "train_images_per_second": outcome.rate.mean,
            "inference_images_per_second": None,
        }
        for outcome in shown
        if outcome.runs
    ]
    return bool(records) and plot_comparison(records, path, title)


def plot_learning(shown: Sequence[Outcome], path: Path, title: str) -> bool:
    """Accuracy against images seen, and what is gained over other models; returns whether there is anything to draw."""
    curves = {outcome: curve(outcome.runs) for outcome in shown}
    drawn = [outcome for outcome in shown if len(curves[outcome]) > 1]
    gained = [outcome for outcome in shown if outcome.gain is not None]
    if not drawn:
        return False
    figure = Figure(figsize=(12 if gained else 7, 4.6), layout="constrained", dpi=DPI)
    left, *right = figure.subplots(1, 2 if gained else 1, squeeze=False)[0]
    _draw_curves(left, drawn, [curves[outcome] for outcome in drawn])
    for axes in right:
        _draw_gains(axes, gained)
    figure.suptitle(title, fontsize=10)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=DPI, metadata=METADATA)
    return True


def _draw_curves(axes: Axes, shown: Sequence[Outcome], curves: Sequence[Sequence[float]]) -> None:
    """A model with plugins and the one without have one colour, where there are pairs alone; the latter is dashed."""
    members = Counter(outcome.trial.label.partition("+")[0] for outcome in shown)
    families, paired = list(members), max(members.values()) == 2 < len(shown)
    colours = colormaps["tab10" if len(shown) <= 10 else "tab20"].colors
    for number, (outcome, values) in enumerate(zip(shown, curves, strict=True)):
        label = outcome.trial.label
        colour = colours[(families.index(label.partition("+")[0]) if paired else number) % len(colours)]
        plain = paired and any(other.trial.against == label for other in shown)
        seen = [outcome.first("images_seen") * step / len(values) / 1000 for step in range(1, len(values) + 1)]
        axes.plot(seen, values, "--" if plain else "-", color=colour, label=label, linewidth=1.3)
    axes.set(xlabel="images seen (thousands)", ylabel="validation top-1 (%), mean over seeds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2 if len(shown) > 8 else 1)


def _draw_gains(axes: Axes, shown: Sequence[Outcome]) -> None:
    ordered = sorted(shown, key=lambda outcome: outcome.gain.mean)
    names = [outcome.trial.label for outcome in ordered]
    gains = [outcome.gain.mean for outcome in ordered]
    bars = [math.nan if outcome.gain.deviation is None else outcome.gain.deviation for outcome in ordered]
    colours = ["C2" if gain > 0 else "C3" for gain in gains]
    axes.barh(names, gains, xerr=bars, color=colours, alpha=0.6, error_kw={"linewidth": 1, "capsize": 3})
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set(xlabel="gain in test top-1 (points); bars are standard deviations over seeds")
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(alpha=0.3, axis="x")
