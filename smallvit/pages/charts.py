"""A run's charts for its page, each with what is seen there in words. Imports no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from smallvit.pages import drawings
from smallvit.pages.dossier import Dossier
from smallvit.pages.drawings import DASHES, SERIES, Chart, Curve

MOST = 8
"""Pairs of classes that are named as the most frequent confusions."""


def curves(run: Dossier, key: str) -> list[Chart]:
    """Loss, accuracy, learning rate and temperatures over the epochs, as far as they were recorded."""
    history = run.view.history
    if not history:
        return []
    charts = [_loss(history, key)]
    if run.best is not None:
        charts.append(_accuracy(run, key))
    if rates := _points(history, "lr"):
        told = f"It peaks at {max(value for _, value in rates):.3g} and is {rates[-1][1]:.3g} in epoch {rates[-1][0]}."
        drawn = [Curve("learning rate", rates, 2)]
        charts.append(drawings.lines(f"{key}-lr", "Learning rate", "learning rate", drawn, told))
    return [*charts, *_temperatures(history, key)]


def together(runs: Sequence[tuple[str, Dossier]]) -> list[Chart]:
    """Validation accuracy and loss of several runs, by their names."""
    charts = []
    for name, title, ylabel in (
        ("val_top1", "Validation accuracy", "top-1 (%)"),
        ("val_loss", "Validation loss", "cross-entropy"),
        ("train_loss", "Training loss", "cross-entropy"),
    ):
        drawn = []
        for number, (label, run) in enumerate(runs):
            dash = DASHES[number // len(SERIES) % len(DASHES)]
            if points := _points(run.view.history, name):
                drawn.append(Curve(label, points, number % len(SERIES), dash))
        if drawn:
            told = " ".join(f"{each.label} ends at {each.points[-1][1]:.2f}." for each in drawn)
            charts.append(drawings.lines(f"all-{name}", title, ylabel, drawn, told))
    return charts


def judged(metrics: dict[str, Any], key: str) -> dict[str, Chart]:
    """Confusion, reliability and, where it was measured, robustness."""
    names = [each["name"] for each in metrics["classes"]]
    pairs = confusions(metrics)
    told = f"{metrics['top1']:.2f} % of {metrics['images']:,} images lie on the diagonal."
    if pairs:
        first = pairs[0]
        told += f" Most often {first['true']} was taken for {first['predicted']} ({first['images']} images)."
    charts = {"confusion": drawings.confusion(f"{key}-confusion", names, metrics["confusion"], told)}
    bins = [each for each in metrics["reliability"] if each["images"]]
    ranges = [
        f"{100 * each['low']:.0f} to {100 * each['high']:.0f} %: {each['accuracy']:.0f} % of {each['images']:,} images"
        for each in bins
    ]
    told = f"Accuracy by confidence. {'; '.join(ranges)}. Expected calibration error {metrics['ece']:.2f} %."
    charts["reliability"] = drawings.reliability(f"{key}-reliability", metrics["reliability"], told)
    if metrics.get("robustness"):
        told = "; ".join(
            f"{name}: " + ", ".join(f"{top1:.1f} % at {level}" for level, top1 in levels.items())
            for name, levels in metrics["robustness"].items()
        )
        told = f"Top-1 by severity; {metrics['top1']:.1f} % as they are. {told}."
        charts["robustness"] = drawings.robustness(f"{key}-robustness", metrics["top1"], metrics["robustness"], told)
    return charts


def confusions(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The classes that were most often taken for each other: true, predicted, images, share of the true in per cent."""
    names = [each["name"] for each in metrics["classes"]]
    pairs = [
        {"true": names[i], "predicted": names[j], "images": count, "share": 100 * count / sum(row)}
        for i, row in enumerate(metrics["confusion"])
        for j, count in enumerate(row)
        if i != j and count
    ]
    return sorted(pairs, key=lambda pair: -pair["images"])[:MOST]


def _loss(history: list[dict[str, Any]], key: str) -> Chart:
    training, validation = _points(history, "train_loss"), _points(history, "val_loss")
    told = f"Training: {_course(training)}."
    drawn = [Curve("training (augmented)", training)]
    if validation:
        least = min(validation, key=lambda point: point[1])
        told += f" Validation: {_course(validation)}; least {least[1]:.2f} in epoch {least[0]:.0f}."
        drawn.append(Curve("validation", validation, 1))
    return drawings.lines(f"{key}-loss", "Loss", "cross-entropy", drawn, told)


def _accuracy(run: Dossier, key: str) -> Chart:
    points = _points(run.view.history, "val_top1")
    best = (run.best["epoch"], run.best["val_top1"])
    told = f"{_course(points).capitalize()} %; best {best[1]:.2f} % in epoch {best[0]}."
    named = {"point": best, "name": f"{best[1]:.2f} %"}
    return drawings.lines(
        f"{key}-accuracy", "Validation accuracy", "top-1 (%)", [Curve("validation", points, 1)], told, **named
    )


def _temperatures(history: list[dict[str, Any]], key: str) -> list[Chart]:
    """The mean over each layer's heads, the first layers faint; nothing without LSA."""
    recorded = [line for line in history if line.get("temperatures")]
    layers = list(dict.fromkeys(name for line in recorded for name, heads in line["temperatures"].items() if heads))
    drawn: list[Curve] = []
    for number, layer in enumerate(layers):
        known = [(line["epoch"], line["temperatures"].get(layer)) for line in recorded]
        points = [(epoch, statistics.fmean(heads)) for epoch, heads in known if heads]
        drawn.append(Curve(layer.removesuffix(".attn"), points, 4, alpha=0.35 + 0.65 * (number + 1) / len(layers)))
    if not drawn:
        return []
    ends = ", ".join(f"{curve.label} {curve.points[-1][1]:.3f}" for curve in drawn)
    told = f"What attention's scores are multiplied by, in the mean over heads. At the end: {ends}."
    chart = drawings.lines(f"{key}-temperatures", "Learnt temperatures (LSA)", "factor of the scores", drawn, told)
    return [chart]


def _points(history: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """The finite values of a figure, by epoch."""
    points = [(line["epoch"], line[name]) for line in history if line[name] is not None]
    return [point for point in points if math.isfinite(point[1])]


def _course(points: Sequence[tuple[float, float]]) -> str:
    """Where a curve begins and ends."""
    if not points:
        return "no finite value"
    (first, low), (last, high) = points[0], points[-1]
    return f"from {low:.2f} in epoch {first} to {high:.2f} in epoch {last}"
