"""Records of finished runs: what a run was, on what, by which command, and what came of it. Needs no torch.

One JSON object:

    experiment, row, seed, budget   which run of which experiment
    command, config                 what trains such a model again, and every option
    summary                         accuracy, time, speed, size, hardware, versions, revision
    epochs                          what was measured after each epoch, by name

A record counts where its options are those that its experiment asks for today; others are passed over.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

from smallvit import commands
from smallvit.comparison.standings import NUMBERS, WORDS
from smallvit.config import Config
from smallvit.costs import savings
from smallvit.errors import InputError
from smallvit.opening import MAY_DIFFER
from smallvit.regularise import regularised
from smallvit.reproduction.experiments import experiment, twins
from smallvit.reproduction.trials import Experiment, Trial, required
from smallvit.watching import View

EPOCHS = ("train_loss", "val_loss", "val_top1", "lr", "images_per_second", "seconds")
"""What is kept of each epoch."""
PATHS = ("data", "init", "teacher")
"""Options that may be paths, of which the last part is kept."""
PRIVATE = ("out", "resume", "overwrite", "auto_resume", "device", "data_dir", "log", "checkpoint_minutes")
"""Options that say nothing about the model that came out."""
FREE = {*MAY_DIFFER, "data", "teacher", "streaming", "amp", "seed"}
"""Options in which runs of the same trial may differ: of the machine, where files lie, and the seed."""
FIGURES = (*NUMBERS, "train_seconds")
"""Numbers of a summary that tables need."""
KINDS: dict[str, tuple[type, ...]] = {
    "experiment": (str,),
    "row": (str,),
    "seed": (int,),
    "budget": (float, int),
    "command": (str,),
    "config": (dict,),
    "summary": (dict,),
    "epochs": (dict,),
}
"""Types of a record's parts."""


@dataclass(frozen=True)
class Record:
    """A finished run of an experiment."""

    experiment: str
    row: str
    seed: int
    budget: float
    command: str
    config: dict[str, Any]
    summary: dict[str, Any]
    epochs: dict[str, list[float]]

    @property
    def identity(self) -> tuple[str, str, int, float]:
        """What no two records have in common."""
        return self.experiment, self.row, self.seed, self.budget

    @property
    def top1(self) -> float:
        """Test accuracy in per cent."""
        return self.summary["test_top1"]

    @property
    def options(self) -> dict[str, Any] | None:
        """The options that tell its run from those of other trials; nothing where smallvit has other ones today."""
        return _options(json.dumps(self.config, sort_keys=True))


@functools.cache
def _options(config: str) -> dict[str, Any] | None:
    try:
        return fixed(regularised(Config.build(**json.loads(config))).options())
    except InputError:
        return None


def record(view: View, experiment: str, row: str, seed: int, budget: float) -> Record:
    """What is to be kept of a finished run."""
    options = view.config.options()
    config = {name: commands.portable(value) if name in PATHS and value else value for name, value in options.items()}
    return Record(
        experiment=experiment,
        row=row,
        seed=seed,
        budget=budget,
        command=commands.training(view.config, PRIVATE, in_place=False),
        config={name: value for name, value in config.items() if name not in PRIVATE},
        summary=view.summary,
        epochs={name: [line[name] for line in view.history] for name in EPOCHS} | _temperatures(view.history),
    )


def _temperatures(history: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The mean of LSA's learnt temperatures over layers and heads after each epoch, where there are any."""
    learnt = [line.get("temperatures") for line in history]
    if not all(learnt):
        return {}
    return {"temperature": [statistics.fmean(chain.from_iterable(each.values())) for each in learnt]}


def parsed(line: bytes) -> Record | None:
    """The record in a line; nothing where it holds none, or one that lacks what tables need."""
    with suppress(ValueError, TypeError):
        found = Record(**json.loads(line))
        return found if _is_sound(found) else None
    return None


def _is_sound(record: Record) -> bool:
    """Whether a record has what tables need."""
    if any(type(getattr(record, name)) not in kinds for name, kinds in KINDS.items()):
        return False
    summary, epochs = record.summary, record.epochs
    return (
        0 < record.budget <= 1
        and all(is_number(summary.get(name)) for name in FIGURES)
        and all(is_number(summary.get(name, 0)) for name in savings.FIGURES)
        and all(isinstance(summary.get(name), str) for name in WORDS)
        and (summary.get("val_top1", "") is None or is_number(summary.get("val_top1")))
        and isinstance(summary.get("versions"), dict)
        and isinstance(summary.get("git_revision", 0), str | None)
        and epochs.keys() >= {*EPOCHS}
        and all(isinstance(column, list) for column in epochs.values())
    )


def is_number(value: object) -> bool:
    """Whether a value is a finite number, and no truth value."""
    return type(value) in (int, float) and math.isfinite(value)


def of_trial(records: Iterable[Record], name: str, trial: Trial) -> list[Record]:
    """The records of a trial's runs, at any budget.

    A run that is on record under another experiment counts for this one too, if it is the same; one that was made
    with other options than the experiment has counts for none.
    """
    names, whole = twins(name, trial), experiment(name)
    return [each for each in records if (each.experiment, each.row) in names and _is_as_asked(each, whole, trial)]


def _is_as_asked(record: Record, experiment: Experiment, trial: Trial) -> bool:
    """Whether a record's options are those that a trial asks for."""
    try:
        asked = required(experiment, trial, record.budget)
    except InputError:  # a budget that leaves nothing
        return False
    return record.options == fixed(asked)


def fixed(options: dict[str, Any]) -> dict[str, Any]:
    """The options in which runs of the same trial do not differ."""
    return {name: value for name, value in options.items() if name not in FREE}


def of(records: Iterable[Record], name: str, budget: float) -> dict[str, list[Record]]:
    """The records of an experiment at a budget by its trials' labels, in the order of seeds."""
    here = [each for each in records if each.budget == budget]
    found: dict[str, list[Record]] = {}
    for trial in experiment(name).trials:
        mine = {each.seed: each for each in of_trial(here, name, trial)}
        if mine:
            found[trial.label] = [mine[seed] for seed in sorted(mine)]
    return found


def budgets(records: Iterable[Record], name: str) -> list[float]:
    """The budgets at which an experiment has records, the largest first."""
    records = list(records)
    found = {each.budget for trial in experiment(name).trials for each in of_trial(records, name, trial)}
    return sorted(found, reverse=True)
