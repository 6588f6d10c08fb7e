"""Read a run's progress from its folder and plot its curves, in the terminal or as a PNG. Imports no torch."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import plotext
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from smallvit.config.config import Config
from smallvit.config.model import ARCH, added_plugins
from smallvit.plugins import PLUGINS
from smallvit.runs.run import PRIMARY, TITLES, Run, best_epoch, primary_metric, read_config
from smallvit.utils.errors import InputError, format_duration

POLL_SECONDS = 1.0
MIN_WIDTH, MIN_HEIGHT, MAX_HEIGHT = 38, 7, 16
"""Columns and rows of a plot in the terminal; narrower plots are stacked."""
REQUIRED = ("epoch", "train_loss", "lr", "images_per_second", "seconds")
VALIDATION = ("val_loss", "val_top1")
"""Numbers in a line of metrics.jsonl: those that are always there, and those that may be None."""
PLOTS: dict[str, dict[str, tuple[str, str, str]]] = {
    "loss": {"train_loss": ("training", "braille", "cyan"), "val_loss": ("validation", "•", "orange")},
    "validation accuracy (%)": {
        "val_top1": ("", "braille", "orange"),
        "val_map": ("mAP", "braille", "orange"),
        "val_knn_top1": ("k-NN", "braille", "orange"),
    },
    "learning rate": {"lr": ("", "braille", "green")},
}
"""Curves of each plot by title: metric, label, marker and color."""


@dataclass(frozen=True)
class RunView:
    """Contents of a run's folder at one moment."""

    folder: Path
    config: Config
    history: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    summary: dict[str, Any] | None
    """Final results; None for an unfinished run."""

    @property
    def data_name(self) -> str:
        """Names of the data sets, without their folders."""
        names = (self.config.data.data, *self.config.pretrain.more_data)
        return " + ".join(os.path.basename(name) if os.path.isabs(name) else name for name in names)


def read_run(folder: Path) -> RunView:
    """Read a run's configuration, metrics and summary.

    Raises:
        InputError: The folder holds no run, or one of its files is damaged.
    """
    config = read_config(folder)
    metrics, summary = folder / Run.METRICS, folder / Run.SUMMARY
    lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines() if metrics.exists() else []
    history = [_parse(line, REQUIRED, f"{metrics}: line {number} is") for number, line in enumerate(lines, 1)]
    text = summary.read_text(encoding="utf-8", errors="replace") if summary.exists() else None
    return RunView(
        folder,
        config,
        history,
        None if text is None else _parse(text, (), f"{summary}:", [f"test_{metric}" for metric in PRIMARY]),
    )


def _parse(text: str, required: tuple[str, ...], where: str, one_of: Collection[str] = ()) -> dict[str, Any]:
    """Return a JSON object after checking that it holds the required numbers, and one of some others."""
    with suppress(ValueError):
        record = json.loads(text)
        if isinstance(record, dict):
            record = dict.fromkeys(VALIDATION) | record
            required += tuple(name for name in one_of if record.get(name) is not None)
            complete = not one_of or any(name in record for name in one_of)
            numbers = all(isinstance(record.get(name), (int, float)) for name in required)
            if complete and numbers and all(isinstance(record[name], (int, float, NoneType)) for name in VALIDATION):
                return record
    raise InputError(f"{where} damaged; this does not affect the training")


def finite_points(history: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Return the finite values of a metric as (epoch, value)."""
    points = [(line["epoch"], line[name]) for line in history if line.get(name) is not None]
    return [point for point in points if math.isfinite(point[1])]


# PNG


def plot_curves(history: list[dict[str, Any]], path: Path, title: str, select_by: str = "top1") -> None:
    """Plot loss, accuracy and learning rate per epoch as a PNG."""
    from matplotlib.figure import Figure

    from smallvit.utils.plots import save_figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    best, primary = best_epoch(history, select_by), f"val_{primary_metric(history)}"
    for axes, (ylabel, metrics) in zip(figure.subplots(1, len(PLOTS)), PLOTS.items(), strict=True):
        for name, (label, _, color) in metrics.items():
            points = finite_points(history, name)
            style = {"marker": "o", "markersize": 3} if len(points) < 30 else {}
            epochs, values = [epoch for epoch, _ in points], [value for _, value in points]
            if points:
                axes.plot(epochs, values, label=label, color=f"tab:{color}", **style)
        if best is not None and best.get(primary) is not None and primary in metrics:
            axes.plot(best["epoch"], best[primary], "k*", label=f"best: {best[primary]:.2f} %")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        axes.set(xlabel="epoch", ylabel=ylabel)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    save_figure(figure, path)


# Terminal


def watch_run(folder: Path, console: Console) -> None:
    """Redraw the curves whenever the run's files or the terminal's size change, until the run is finished.

    Raises:
        InputError: The folder holds no run, or one of its files is damaged.
    """
    view, drawn = read_run(folder), None
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while view.summary is None:
            if (state := (_modification_times(folder), console.size)) != drawn:
                view, drawn = read_run(folder), state
                live.update(render_frame(view, console, console.height), refresh=True)
            else:
                time.sleep(POLL_SECONDS)
    console.print(render_frame(view, console))


def _modification_times(folder: Path) -> tuple[int | None, ...]:
    files = (folder / name for name in (Run.CONFIG, Run.METRICS, Run.SUMMARY))
    return tuple(file.stat().st_mtime_ns if file.exists() else None for file in files)


def render_frame(view: RunView, console: Console, height: int | None = None) -> Group:
    """Return the headline and curves of a run, as wide as the console and, if possible, at most `height` rows high."""
    text = format_headline(view)
    if not view.history:
        return Group(text)
    curves = {title: {name: finite_points(view.history, name) for name in PLOTS[title]} for title in PLOTS}
    plots = [(title, {n: p for n, p in each.items() if p}) for title, each in curves.items() if any(each.values())]
    columns = max(1, min(len(plots), console.width // MIN_WIDTH))
    rows = [plots[start : start + columns] for start in range(0, len(plots), columns)]
    available = math.inf if height is None else height - len(console.render_lines(text))
    plot_height = int(max(MIN_HEIGHT, min(MAX_HEIGHT, available // max(1, len(rows)))))
    grids = []
    for row in rows:
        grids.append(Table.grid())
        width = console.width // len(row)
        grids[-1].add_row(*(_plot(title, each, width, plot_height) for title, each in row))
    return Group(text, *grids)


def format_headline(view: RunView) -> Text:
    """Return the run's name, model, progress, best accuracy, speed and remaining time."""
    model, epochs, history = view.config.model, view.config.optim.epochs, view.history
    limit = view.config.optim.max_seconds
    parts = [model.arch or ARCH, *(PLUGINS[name].label for name in added_plugins(model.arch, model.plugins))]
    text = Text.assemble((view.folder.resolve().name, "bold"), f"  {' + '.join(parts)} on {view.data_name}\n")
    if not history:
        return text.append("no epoch finished yet" if limit else f"no epoch of {epochs} finished yet")
    last, primary = history[-1], primary_metric(history)
    figures = [f"epoch {last['epoch']}" if limit else f"epoch {last['epoch']}/{epochs}"]
    best = best_epoch(history, view.config.run.select_by)
    if best is not None and best[f"val_{primary}"] is not None:
        figures.append(f"best val {best[f'val_{primary}']:.2f} % (epoch {best['epoch']})")
    figures.append(f"{last['images_per_second']:,.0f} images/s")
    if view.summary is not None:
        score = view.summary[f"test_{primary}"]
        figures.append(f"test {TITLES[primary]} {score:.2f} %" if score is not None else "finished")
    else:
        left = last["seconds"] / max(1, last["epoch"]) * (epochs - last["epoch"])
        figures.append(f"{format_duration(max(0, limit - last['seconds']) if limit else left)} left")
    return text.append("  ".join(figures))


def _plot(title: str, curves: dict[str, list[tuple[int, float]]], width: int, height: int) -> Text:
    last = max(points[-1][0] for points in curves.values())
    plotext.terminal.limit(False, False)  # the console knows its size
    figure = plotext.figure
    figure.clear()
    figure.theme("simple")
    figure.plot_size(width, height)
    heading = plotext.colorize(title)
    for name, points in curves.items():
        label, marker, color = PLOTS[title][name]
        line = figure.signal(*zip(*points, strict=True), marker=plotext.marker(marker, color))
        figure.draw(line.lines(marker == "braille"))
        if label:
            heading += plotext.colorize(f"  {marker if len(marker) == 1 else '⠒'} {label}", color)
    figure.title(heading)
    figure.ruler("x").lim(1, max(2, last))
    figure.ruler("x").ticks(sorted({max(1, round(last * quarter / 4)) for quarter in range(5)}))
    return Text.from_ansi(figure.build().string().removesuffix("\n"), no_wrap=True)
