"""Curves of a run in the terminal while it trains, from its folder alone. Imports no torch."""

from __future__ import annotations

import json
import math
import os
import time
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

from smallvit.config import Config
from smallvit.errors import InputError
from smallvit.inherit import ARCH
from smallvit.options import PLUGINS
from smallvit.runs import Run, best_epoch, read_options

POLL_SECONDS = 1.0
NARROWEST, LOWEST, HIGHEST = 38, 7, 16
"""Columns and rows of a plot: narrower ones are stacked instead."""
ALWAYS, VALIDATED = ("epoch", "train_loss", "lr", "images_per_second", "seconds"), ("val_loss", "val_top1")
PLOTS: dict[str, dict[str, tuple[str, str, str]]] = {
    "loss": {"train_loss": ("training", "braille", "cyan"), "val_loss": ("validation", "•", "orange")},
    "validation accuracy (%)": {"val_top1": ("", "braille", "orange")},
    "learning rate": {"lr": ("", "braille", "green")},
}
"""By title: the figures drawn there, each with its label, marker and colour."""


@dataclass(frozen=True)
class View:
    """What a run's folder tells at one moment."""

    folder: Path
    config: Config
    history: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    summary: dict[str, Any] | None
    """The outcome of a finished run."""


def watch(folder: Path, console: Console) -> None:
    """Draw the curves anew whenever the folder's files or the terminal's size change, until the run is finished.

    Raises:
        InputError: there is no run in the folder, or one of its files is damaged.
    """
    view, drawn = read(folder), None
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while view.summary is None:
            if (seen := (_stamps(folder), console.size)) != drawn:
                view, drawn = read(folder), seen
                live.update(frame(view, console, console.height), refresh=True)
            else:
                time.sleep(POLL_SECONDS)
    console.print(frame(view, console))


def read(folder: Path) -> View:
    """Read what is there of a run.

    Raises:
        InputError: there is no run in the folder, or one of its files is damaged.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    try:
        config = Config.build(**read_options(folder / Run.CONFIG))
    except FileNotFoundError:
        raise InputError(f"{folder}: not the folder of a run (no {Run.CONFIG} in it)") from None
    except ValueError as error:
        raise InputError(f"{folder / Run.CONFIG}: damaged ({error})") from None
    history = _records(folder / Run.METRICS, ALWAYS)
    summary = _records(folder / Run.SUMMARY, ("test_top1",), whole=True)
    return View(folder, config, history, summary[0] if summary else None)


def frame(view: View, console: Console, height: int | None = None) -> Group:
    """The run in words, and its curves, as wide as the console; no higher than `height` rows, if it may be."""
    words = headline(view)
    if not view.history:
        return Group(words)
    drawn = {title: curves for title in PLOTS if (curves := _curves(view, title))}
    columns = max(1, min(len(drawn), console.width // NARROWEST))
    rows = math.ceil(len(drawn) / columns)
    rest = math.inf if height is None else height - len(console.render_lines(words))
    high = int(max(LOWEST, min(HIGHEST, rest // rows)))
    plots, grids = list(drawn.items()), []
    for row in (plots[start : start + columns] for start in range(0, len(plots), columns)):
        grids.append(Table.grid())
        wide = console.width // len(row)
        grids[-1].add_row(*(_plot(title, curves, wide, high) for title, curves in row))
    return Group(words, *grids)


def headline(view: View) -> Text:
    """Which run it is, how far it has come, how well it does, and how long it will take."""
    model, epochs, history = view.config.model, view.config.optim.epochs, view.history
    parts = [model.arch or ARCH, *(called for name, called in PLUGINS.items() if getattr(model, name))]
    data = view.config.data.data
    data = os.path.basename(data) if os.path.isabs(data) else data
    words = Text.assemble((view.folder.resolve().name, "bold"), f"  {' + '.join(parts)} on {data}\n")
    if not history:
        return words.append(f"no epoch of {epochs} is finished yet")
    last = history[-1]
    figures = [f"epoch {last['epoch']}/{epochs}"]
    if (best := best_epoch(history)) is not None:
        figures.append(f"best val {best['val_top1']:.2f} % (epoch {best['epoch']})")
    figures.append(f"{last['images_per_second']:,.0f} images/s")
    if view.summary is not None:
        figures.append(f"test top-1 {view.summary['test_top1']:.2f} %")
    else:
        figures.append(f"{_clock(last['seconds'] / max(1, last['epoch']) * (epochs - last['epoch']))} left")
    return words.append("  ".join(figures))


def _curves(view: View, title: str) -> dict[str, list[tuple[int, float]]]:
    """The finite points of each figure that a plot shows, by its name."""
    curves = {}
    for name in PLOTS[title]:
        points = [(line["epoch"], line[name]) for line in view.history if line[name] is not None]
        curves[name] = [point for point in points if math.isfinite(point[1])]
    return {name: points for name, points in curves.items() if points}


def _plot(title: str, curves: dict[str, list[tuple[int, float]]], wide: int, high: int) -> Text:
    last = max(points[-1][0] for points in curves.values())
    plotext.terminal.limit(False, False)  # the console knows the size
    figure = plotext.figure
    figure.clear()
    figure.theme("simple")
    figure.plot_size(wide, high)
    heading = plotext.colorize(title)
    for name, points in curves.items():
        label, marker, colour = PLOTS[title][name]
        line = figure.signal(*zip(*points, strict=True), marker=plotext.marker(marker, colour))
        figure.draw(line.lines(marker == "braille"))
        if label:
            heading += plotext.colorize(f"  {marker if len(marker) == 1 else '⠒'} {label}", colour)
    figure.title(heading)
    figure.ruler("x").lim(1, max(2, last))
    figure.ruler("x").ticks(sorted({max(1, round(last * quarter / 4)) for quarter in range(5)}))
    return Text.from_ansi(figure.build().string().removesuffix("\n"), no_wrap=True)


def _records(file: Path, needed: tuple[str, ...], whole: bool = False) -> list[dict[str, Any]]:
    """The JSON objects in a file, one a line or one in the whole; none where there is no file.

    Raises:
        InputError: one is damaged, or has not the numbers that are needed.
    """
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate([text] if whole else text.splitlines(), 1):
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and _has_numbers(record, needed):
                records.append(dict.fromkeys(VALIDATED) | record)
                continue
        raise InputError(f"{file}: {'' if whole else f'line {number} is '}damaged; training goes on all the same")
    return records


def _has_numbers(record: dict[str, Any], needed: tuple[str, ...]) -> bool:
    return all(isinstance(record.get(name), (int, float)) for name in needed) and all(
        isinstance(record.get(name), (int, float, NoneType)) for name in VALIDATED
    )


def _stamps(folder: Path) -> tuple[int | None, ...]:
    """When the files that are shown were written."""
    files = (folder / name for name in (Run.CONFIG, Run.METRICS, Run.SUMMARY))
    return tuple(file.stat().st_mtime_ns if file.exists() else None for file in files)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
