"""Finished runs in rows that differ only in their seed, and what can be said of them. Needs no torch."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smallvit import trained
from smallvit.comparison.rows import PLUGINS, WEIGHTS, label, spelt
from smallvit.costs import savings
from smallvit.errors import InputError
from smallvit.opening import MAY_DIFFER
from smallvit.runs import Run
from smallvit.watching import View, read

SHARED = ("data", "train_fraction", "val_fraction", "test_fraction", "split_seed", "test_flip")
"""Options that say which images runs were trained on, chosen by and tested on."""
NUMBERS = ("test_top1", "test_images", "parameters", "macs", "images_per_second", "peak_memory_bytes", "images_seen")
WORDS = ("hardware", "precision", "compile")
MEASURES = (
    "Train images/s: augmentation, forward, backward and optimiser; mean over seeds, each at its own time, so whatever "
    "else the machine did then shows. Memory: most while training, of what is allocated on a GPU or, without one, of "
    "the whole process; largest over seeds"
)


@dataclass(frozen=True)
class Standing:
    """A row of a comparison: runs that differ only in their seed."""

    label: str
    runs: tuple[View, ...]
    """The finished ones."""
    seeds: int
    """How many were asked for."""

    def values(self, name: str) -> list[Any]:
        """What the runs' summaries say."""
        return [run.summary[name] for run in self.runs]

    def option(self, name: str) -> Any:
        """What they were trained with."""
        return self.runs[0].config.options()[name]

    @property
    def data(self) -> str:
        """The data's name, without its folder."""
        return os.path.basename(self.option("data"))

    def record(self, speed: dict[str, float]) -> dict[str, Any]:
        """The row in plain numbers; nothing where no run is finished, and no spread of a single one."""
        record: dict[str, Any] = {"model": self.label, "seeds": len(self.runs), "seeds_wanted": self.seeds}
        figures = dict.fromkeys(RECORD) | speed
        if self.runs:
            rates = self.values("images_per_second")
            figures |= {
                **_spread("test_top1", self.values("test_top1")),
                **_spread("train_images_per_second", rates),
                **{name: self.values(name)[0] for name in ("parameters", "macs", "images_seen", "epochs")},
                **{name: self.runs[0].summary.get(name) for name in savings.FIGURES},
                "peak_memory_bytes": max(self.values("peak_memory_bytes")),
                "batch_size": self.option("batch_size"),
            }
        return record | figures


RECORD = (
    *("test_top1", "test_top1_std", "parameters", "macs", *savings.FIGURES),
    *("train_images_per_second", "train_images_per_second_std"),
    *("inference_images_per_second", "inference_images_per_second_iqr", "latency_ms", "latency_ms_iqr"),
    *("peak_memory_bytes", "images_seen", "epochs", "batch_size"),
)
"""A row's figures, in their order; accuracies in per cent, iqr is the range of the middle half of the measurements."""


def _spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {name: statistics.fmean(values), f"{name}_std": deviation}


def finished(folder: Path) -> View:
    """A finished run.

    Raises:
        InputError: there is none in the folder.
    """
    view = read(folder)
    if view.summary is None:
        raise InputError(
            f"{folder} cannot be compared: it is not finished; smallvit train --resume {folder} goes on with it"
        )
    numbers = [name for name in NUMBERS if not isinstance(view.summary.get(name), (int, float))]
    numbers += [name for name in savings.FIGURES if not isinstance(view.summary.get(name, 0), (int, float))]
    if lacking := numbers + [name for name in WORDS if not isinstance(view.summary.get(name), str)]:
        raise InputError(f"{folder / Run.SUMMARY}: it lacks {lacking[0]!r}; remove it, and --resume evaluates again")
    return view


def gathered(folders: Iterable[Path]) -> list[Standing]:
    """Runs in rows, in the order of the first of each; rows are called by what tells them from others of their model.

    Raises:
        InputError: a run is not finished, is there twice, or has other images than the first.
    """
    groups: dict[tuple[Any, ...], list[View]] = {}
    views: list[View] = []
    for folder in folders:
        view = finished(folder)
        if any(os.path.samefile(folder, other.folder) for other in views):
            raise InputError(f"{folder}: is there twice")
        views.append(view)
        require_same_images(views[0], view)
        groups.setdefault(tuple(_identity(view).values()), []).append(view)
    for group in groups.values():
        _require_seeds(group)
    return [Standing(_called(group, groups.values()), tuple(group), len(group)) for group in groups.values()]


def require_same_images(one: View, other: View) -> None:
    """Check that two runs had the same images to learn, to choose by and to be tested on.

    Raises:
        InputError: they had not.
    """
    ours, theirs = (_images(view) for view in (one, other))
    for name in ours:
        if ours[name] != theirs[name]:
            raise InputError(
                f"{other.folder} and {one.folder} cannot be compared: {name} is {spelt(theirs[name])} in the former, "
                f"{spelt(ours[name])} in the latter"
            )


def _images(view: View) -> dict[str, Any]:
    spec = trained.card(str(view.folder), "compare").spec or {}
    seen = {"img_size": spec.get("img_size"), "test_images": view.summary["test_images"]}
    return {name: view.config.options()[name] for name in SHARED} | seen


def _identity(view: View) -> dict[str, Any]:
    """The options that make a run's row."""
    apart = (*MAY_DIFFER, "seed", "img_size")
    return {name: value for name, value in view.config.options().items() if name not in apart}


def _require_seeds(group: list[View]) -> None:
    seen: dict[int, View] = {}
    for view in group:
        seed = view.config.run.seed
        if seed in seen:
            raise InputError(f"{view.folder}: the same as {seen[seed].folder}, seed {seed} too; leave one of them out")
        seen[seed] = view


def _called(group: list[View], groups: Iterable[list[View]]) -> str:
    """The model, and the options in which it differs from other rows of the same."""
    mine, theirs = _identity(group[0]), [_identity(other[0]) for other in groups]
    model = ("arch", *PLUGINS)
    twins = [other for other in theirs if all(other[name] == mine[name] for name in model)]
    differing = [name for name in mine if any(other[name] != mine[name] for other in twins)]
    told = {name: mine[name] for name in (*PLUGINS, *differing)}
    near = {name: min(told[name], os.path.relpath(told[name]), key=len) for name in WEIGHTS if told.get(name)}
    return label(mine["arch"], told | near)


def notes(standings: Sequence[Standing], recipes: dict[str, str], measured: str, command: str) -> list[str]:
    """How each figure of a comparison came about, a line each.

    `recipes` are those of rows that have one, `measured` says how inference was.
    """
    ran = [standing for standing in standings if standing.runs]
    lines = [
        f"{standing.label}: {len(standing.runs)} of {standing.seeds} seeds; the training of the others failed"
        for standing in standings
        if len(standing.runs) < standing.seeds
    ]
    if ran:
        saved = savings.notes(row.runs[0].summary for row in ran)
        lines += [*_data(ran), *_conditions(ran), MEASURES, *saved, measured, *_options(ran, recipes)]
    return [*lines, f"Command: {command}"]


def _data(ran: Sequence[Standing]) -> list[str]:
    """Which images, and what the accuracy is of."""
    shared = {name: ran[0].option(name) for name in SHARED}
    splits = [f"{name.replace('_', '-')} {value}" for name, value in shared.items() if name.endswith("fraction")]
    flipped = "each image and its mirror image together, " if shared["test_flip"] else ""
    best = "the epoch that was best on validation images" if shared["val_fraction"] else "the last epoch"
    spread = "; mean ± standard deviation of the sample (n - 1) over seeds" if any(len(r.runs) > 1 for r in ran) else ""
    return [
        f"Data: {ran[0].data}, {ran[0].values('test_images')[0]:,} test images; all rows have the same splits "
        f"(split-seed {shared['split_seed']}, {', '.join(splits)}, where the data brings none)",
        f"Test top-1: in %, {flipped}of the weights of {best}; the test split was used once{spread}",
    ]


def _conditions(ran: Sequence[Standing]) -> list[str]:
    """What runs were trained with: in one line what is the same for all, then what differs."""
    values: dict[str, Callable[[Standing], Iterable[str]]] = {
        "epochs": lambda row: map(str, row.values("epochs")),
        "images seen": lambda row: [f"{seen:,}" for seen in row.values("images_seen")],
        "batch size": lambda row: [str(row.option("batch_size"))],
        "seeds": lambda row: [", ".join(str(run.config.run.seed) for run in row.runs)],
        "hardware": lambda row: row.values("hardware"),
        "precision": lambda row: row.values("precision"),
        "compiling": lambda row: row.values("compile"),
        "versions": lambda row: [", ".join(" ".join(item) for item in each.items()) for each in row.values("versions")],
    }
    same, differing = [], []
    for what, of in values.items():
        rows: dict[str, list[str]] = {}
        for row in ran:
            rows.setdefault(" and ".join(dict.fromkeys(of(row))), []).append(row.label)
        if len(rows) == 1:
            same.append(f"{what} {next(iter(rows))}")
        else:
            told = "; ".join(f"{value} ({', '.join(labels)})" for value, labels in rows.items())
            differing.append(f"Rows differ in {what}: {told}")
    return [f"Training: {'; '.join(same)}", *differing]


def _options(ran: Sequence[Standing], recipes: dict[str, str]) -> list[str]:
    """Recipes, and the options in which rows differ otherwise."""
    lines = ["Recipes: " + ", ".join(f"{name} for {label}" for label, name in recipes.items())] if recipes else []
    identities = [_identity(row.runs[0]) for row in ran]
    differing = []
    for name in identities[0].keys() - {"arch", *PLUGINS, "epochs", "batch_size"}:
        values = list(dict.fromkeys(spelt(identity[name]) for identity in identities))
        if len(values) > 1:
            differing.append(f"{name.replace('_', '-')} ({', '.join(values)})")
    return [*lines, "Rows differ in options: " + ", ".join(sorted(differing))] if differing else lines
