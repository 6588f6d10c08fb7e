"""Group finished runs that differ only in their seed, and compare the means over seeds: table and picture. No torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from smallvit.config.config import option_names
from smallvit.config.spec import format_label, format_value
from smallvit.plugins import PLUGINS
from smallvit.runs.curves import RunView, read_run
from smallvit.runs.run import Run, primary_metric
from smallvit.utils import tables
from smallvit.utils.errors import InputError
from smallvit.utils.files import read_safetensors
from smallvit.utils.plots import save_figure
from smallvit.utils.sizes import parse_size
from smallvit.utils.tables import MISSING, Spread

REQUIRED_NUMBERS = (
    *("test_images", "parameters", "macs", "images_per_second", "peak_memory_bytes", "images_seen"),
    *("train_seconds", "epochs"),
)
REQUIRED_STRINGS = ("hardware", "precision", "compile", "device")
"""What a summary must hold to be compared."""
COLUMNS = {
    "model": "model",
    "test_top1": "test top-1 (%)",
    "seeds": "seeds",
    "parameters": "parameters",
    "macs": "MACs (M)",
    "train_images_per_second": "train images/s",
    "inference_images_per_second": "inference images/s",
    "latency_ms": "latency (ms)",
    "peak_memory_bytes": "memory (MB)",
    "images_seen": "images seen",
}
"""Titles of a comparison's columns by field; `tables.with_binary_columns` adds those of one-bit layers."""
FORMATS = {
    **dict.fromkeys(("macs", "bops", "ops"), (",.1f", 1e6)),
    "packed_bytes": (",.2f", 1e6),
    "peak_memory_bytes": (",.0f", 1e6),
    "latency_ms": (".2f", 1),
}
"""Number format and unit of the fields that are not whole numbers."""
FIELDS = (
    *("test_top1", "test_top1_std", "parameters", "macs", *tables.BINARY_FIGURES),
    *("train_images_per_second", "train_images_per_second_std"),
    *("inference_images_per_second", "inference_images_per_second_iqr", "latency_ms", "latency_ms_iqr"),
    *("peak_memory_bytes", "images_seen", "epochs", "batch_size", "folds"),
)
"""Fields of a record after model and seeds; accuracies in per cent, iqr is the interquartile range."""
PANELS = {"inference_images_per_second": "inference images/s", "train_images_per_second": "training images/s"}
"""Speeds that accuracy is plotted against."""
MARKERS = "os^Dv"
"""Shapes of points: the first for ten colors, then the next."""
MIN_SIZE, MAX_SIZE = 6.0, 15.0
"""Diameters of points; areas in between are proportional to the number of parameters."""
MEASUREMENT_NOTE = (
    "Train images/s: augmentation, forward, backward and optimizer; mean over seeds, each measured during its own run, "
    "so other load on the machine shows. Memory: peak during training, allocated on the GPU or, without one, of the "
    "whole process; maximum over seeds"
)


@dataclass(frozen=True)
class AggregatedRun:
    """A row of a comparison: runs that differ only in their seed."""

    label: str
    runs: tuple[RunView, ...]
    """The finished runs."""
    seeds: int
    """Number of seeds requested."""

    def values(self, name: str) -> list[Any]:
        """Return a value of each run's summary."""
        return [run.summary[name] for run in self.runs]

    def option(self, name: str) -> Any:
        """Return an option of the first run's configuration."""
        return self.runs[0].config.to_dict()[name]

    @property
    def data(self) -> str:
        """Name of the data set, without its folder."""
        return os.path.basename(self.option("data"))

    def record(self, speed: dict[str, float]) -> dict[str, Any]:
        """Return the row's numbers; None where no run is finished, and for the deviation of a single run."""
        record = {"model": self.label, "seeds": len(self.runs), "seeds_requested": self.seeds}
        record |= dict.fromkeys(FIELDS) | speed
        if self.runs:
            for field, name in (("test_top1", "test_top1"), ("train_images_per_second", "images_per_second")):
                spread = Spread.of(self.values(name))
                record |= {field: spread.mean, f"{field}_std": spread.std}
            record |= {name: self.values(name)[0] for name in ("parameters", "macs", "images_seen", "epochs")}
            record |= {name: self.runs[0].summary.get(name) for name in tables.BINARY_FIGURES}
            record |= {"peak_memory_bytes": max(self.values("peak_memory_bytes"))}
            record |= {name: self.option(name) for name in ("batch_size", "folds")}
        return record


def read_finished_run(folder: Path) -> RunView:
    """Read a finished run.

    Raises:
        InputError: The folder holds no finished run, or its summary is incomplete.
    """
    view = read_run(folder)
    if view.summary is None:
        raise InputError(f"{folder}: not finished; continue it with smallvit train --resume {folder}")
    summary = dict.fromkeys(tables.BINARY_FIGURES, 0) | view.summary
    pretrained = not view.config.pretrain.labels
    score = "rank" if pretrained else f"test_{primary_metric([summary])}"  # there may have been no labels
    numbers = (score, *REQUIRED_NUMBERS, *tables.BINARY_FIGURES)
    missing = [n for n in numbers if not isinstance(summary.get(n), (int, float))]
    if missing := missing + [name for name in REQUIRED_STRINGS if not isinstance(summary.get(name), str)]:
        raise InputError(f"{folder / Run.SUMMARY}: {missing[0]!r} is missing; train the run again")
    return view


def aggregate_runs(folders: Iterable[Path]) -> list[AggregatedRun]:
    """Group runs that differ only in their seed, in the order of each group's first run.

    Labels name the options that distinguish a group from others of the same model.

    Raises:
        InputError: A run is unfinished, given twice, or was trained or tested on other images than the first.
    """
    groups: dict[str, list[RunView]] = {}
    views: list[RunView] = []
    for folder in folders:
        view = read_finished_run(folder)
        if any(os.path.samefile(folder, other.folder) for other in views):
            raise InputError(f"{folder}: given twice")
        if not view.config.pretrain.labels:
            raise InputError(f"{folder}: was trained without labels, which cannot be compared yet; report it alone")
        if primary_metric([view.summary]) != "top1":
            raise InputError(f"{folder}: has several labels an image, which cannot be compared yet; evaluate it alone")
        views.append(view)
        _require_same_images(views[0], view)
        group = groups.setdefault(json.dumps(_identity(view)), [])
        if twin := next((other for other in group if other.config.run.seed == view.config.run.seed), None):
            raise InputError(f"{folder}: same options and seed as {twin.folder}; remove one of them")
        group.append(view)
    return [AggregatedRun(_label(group, groups.values()), tuple(group), len(group)) for group in groups.values()]


def _require_same_images(first: RunView, other: RunView) -> None:
    expected, images = _images(first), _images(other)
    for name in expected:
        if expected[name] != images[name]:
            raise InputError(
                f"{first.folder} and {other.folder} cannot be compared: {name} differs "
                f"({format_value(expected[name])} and {format_value(images[name])})"
            )


def _images(view: RunView) -> dict[str, Any]:
    """Return the options and sizes that determine a run's test images."""
    try:
        model = json.loads(read_safetensors(view.folder / Run.BEST)[0]["smallvit"])["model"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{view.folder}: {Run.BEST} is missing or damaged") from None
    options = view.config.to_dict()
    sizes = {"img_size": parse_size(model["img_size"]), "test_images": view.summary["test_images"]}
    return {name: options[name] for name in option_names("affects_test")} | sizes


def _identity(view: RunView) -> dict[str, Any]:
    """Return the options that runs of one group share."""
    excluded = (*option_names("resumable", "launch"), "seed", "img_size")
    return {name: value for name, value in view.config.to_dict().items() if name not in excluded}


def _label(group: list[RunView], groups: Iterable[list[RunView]]) -> str:
    """Return the model, and the options in which it differs from other groups of the same model."""
    own = _identity(group[0])
    same_model = [
        other
        for other in (_identity(each[0]) for each in groups)
        if all(other[name] == own[name] for name in ("arch", *PLUGINS))
    ]
    differing = [name for name in own if any(other[name] != own[name] for other in same_model)]
    options = {name: own[name] for name in (*PLUGINS, *differing)}
    paths = {
        name: min(path, os.path.relpath(path), key=len)
        for name in option_names("path")
        if name != "data" and (path := options.get(name))
    }
    return format_label(own["arch"], options | paths)


# Formatting


def format_cell(record: dict[str, Any], name: str) -> str:
    """Format a field of `AggregatedRun.record` as a table's cell."""
    value = record[name]
    if value is None:
        return MISSING
    if name == "model":
        return value
    if name == "test_top1":
        return format(Spread(value, record["test_top1_std"], record["seeds"]), ".2f")
    if name == "seeds":
        return str(value) if value == record["seeds_requested"] else f"{value} of {record['seeds_requested']}"
    spec, unit = FORMATS.get(name, (",.0f", 1))
    return format(value / unit, spec)


def comparison_rows(records: list[dict[str, Any]], without: Sequence[str] = ()) -> list[list[str]]:
    """Return header and cells of a comparison; `without` names columns to omit."""
    columns = tables.with_binary_columns(COLUMNS, records)
    columns = {name: title for name, title in columns.items() if name not in without}
    if any(record.get("folds") for record in records):
        columns["seeds"] = "folds"
    return [[*columns.values()], *([format_cell(record, name) for name in columns] for record in records)]


def format_comparison(records: list[dict[str, Any]], lines: list[str], title: str, picture: str | None) -> str:
    """Return a comparison in Markdown: table, notes, and a picture if there is one."""
    notes = "\n".join(f"- {line}" for line in lines)
    image = f"\n![accuracy against speed]({picture})\n" if picture else ""
    return f"# {title}\n\n{tables.markdown_table(comparison_rows(records))}\n\n{notes}\n{image}"


def describe_conditions(runs: Sequence[AggregatedRun], recipes: dict[str, str], inference: str) -> list[str]:
    """Return notes on data, training and measurements, one line each.

    Args:
        runs: Rows of the comparison.
        recipes: Recipes of the rows that have one, by label.
        inference: How the speed of inference was measured.
    """
    finished = [run for run in runs if run.runs]
    lines = [
        f"{run.label}: {len(run.runs)} of {run.seeds} seeds; training failed for the others"
        for run in runs
        if len(run.runs) < run.seeds
    ]
    if finished:
        binary = tables.binary_notes(run.runs[0].summary for run in finished)
        lines += [*_describe_data(finished), *_describe_training(finished), MEASUREMENT_NOTE, *binary, inference]
        lines += _describe_options(finished, recipes)
    return lines


def _describe_data(runs: Sequence[AggregatedRun]) -> list[str]:
    shared = {name: runs[0].option(name) for name in option_names("affects_test")}
    splits = [f"{name.replace('_', '-')} {value}" for name, value in shared.items() if name.endswith("fraction")]
    flip = "averaged over each image and its mirror image, " if shared["test_flip"] else ""
    epoch = "best epoch on validation images" if shared["val_fraction"] else "last epoch"
    spread = (
        "; mean ± standard deviation of the sample (n - 1) over seeds" if any(len(r.runs) > 1 for r in runs) else ""
    )
    if shared["folds"]:
        return [
            f"Data: {runs[0].data}, {shared['folds']} folds, the same for all rows, of what is in no test split of the "
            f"data (fold-seed {shared['fold_seed']}; val-fraction {shared['val_fraction']} of the other folds)",
            f"Test top-1: in %, {flip}weights of the {epoch}; mean ± standard deviation (n - 1) over folds",
        ]
    return [
        f"Data: {runs[0].data}, {runs[0].values('test_images')[0]:,} test images; same splits for all rows (split-seed "
        f"{shared['split_seed']}, {', '.join(splits)}, for splits that the data does not define)",
        f"Test top-1: in %, {flip}weights of the {epoch}; the test split was used once{spread}",
    ]


def _describe_training(runs: Sequence[AggregatedRun]) -> list[str]:
    """Return one line with the settings that all rows share, then one line per difference."""
    values: dict[str, Callable[[AggregatedRun], Iterable[str]]] = {
        "epochs": lambda row: map(str, row.values("epochs")),
        "images seen": lambda row: [f"{seen:,}" for seen in row.values("images_seen")],
        "batch size": lambda row: [str(row.option("batch_size"))],
        "seeds": lambda row: [", ".join(str(run.config.run.seed) for run in row.runs)],
        "hardware": lambda row: row.values("hardware"),
        "precision": lambda row: row.values("precision"),
        "compile": lambda row: row.values("compile"),
        "versions": lambda row: [", ".join(" ".join(item) for item in each.items()) for each in row.values("versions")],
    }
    same, differing = [], []
    for name, get in values.items():
        labels: dict[str, list[str]] = {}
        for run in runs:
            labels.setdefault(" and ".join(dict.fromkeys(get(run))), []).append(run.label)
        if len(labels) == 1:
            same.append(f"{name} {next(iter(labels))}")
        else:
            parts = "; ".join(f"{value} ({', '.join(rows)})" for value, rows in labels.items())
            differing.append(f"Rows differ in {name}: {parts}")
    return [f"Training: {'; '.join(same)}", *differing]


def _describe_options(runs: Sequence[AggregatedRun], recipes: dict[str, str]) -> list[str]:
    """Return the recipes, and the other options in which rows differ."""
    lines = ["Recipes: " + ", ".join(f"{name} for {label}" for label, name in recipes.items())] if recipes else []
    identities = [_identity(run.runs[0]) for run in runs]
    differing = []
    for name in identities[0].keys() - {"arch", *PLUGINS, "epochs", "batch_size"}:
        values = list(dict.fromkeys(format_value(identity[name]) for identity in identities))
        if len(values) > 1:
            differing.append(f"{name.replace('_', '-')} ({', '.join(values)})")
    return [*lines, "Rows differ in options: " + ", ".join(sorted(differing))] if differing else lines


# Picture


def plot_comparison(records: list[dict[str, Any]], path: Path, title: str) -> bool:
    """Plot accuracy against each known speed as a PNG, with standard deviations as bars; return False without speeds.

    Args:
        records: Records of `AggregatedRun.record`.
        path: The PNG file.
        title: Title of the figure.
    """
    panels = [name for name in PANELS if any(record[name] is not None for record in records)]
    if not panels:
        return False
    measured = [record for record in records if record["parameters"] is not None]
    figure = Figure(figsize=(5.2 * len(panels) + 3, max(4.8, 1 + 0.22 * len(measured))), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _plot_points(axes, measured, name)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(f"{title}\nbars: standard deviation over seeds; areas: parameters", fontsize=10)
    save_figure(figure, path)
    return True


def _plot_points(axes: Axes, records: Sequence[dict[str, Any]], name: str) -> None:
    largest = max(record["parameters"] for record in records)
    for number, record in enumerate(records):
        speed, top1 = record[name] or math.nan, record["test_top1"]
        size = math.sqrt(MIN_SIZE**2 + (MAX_SIZE**2 - MIN_SIZE**2) * record["parameters"] / largest)
        style = {"marker": MARKERS[number // 10 % len(MARKERS)], "color": f"C{number % 10}", "alpha": 0.6}
        label = f"{record['model']} ({record['parameters'] / 1e6:,.2f} M)"
        axes.plot(speed, top1, linestyle="", markersize=size, markeredgewidth=0, label=label, **style)
        axes.errorbar(speed, top1, yerr=record["test_top1_std"], color="0.2", capsize=3, linewidth=1, zorder=3)
    axes.set(xscale="log", xlabel=f"{PANELS[name]} (log scale)", ylabel="test top-1 (%)")
    axes.margins(0.2)
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, -0.5), min(top, 100.5))
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 8 * low else MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
