"""Store finished runs of experiments as records in JSON Lines files. Imports no torch.

Each record is one JSON object:

    experiment, row, seed, budget   experiment, label of the trial, seed, and share of the experiment's images
    command, config                 the command that repeats the training, and all options
    summary                         accuracy, time, speed, size, hardware, versions, git revision
    epochs                          metrics after each epoch, by name

Records whose options differ from those that their experiment requires today are ignored.
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
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from smallvit.config.config import Config, format_train_command, option_names, strip_folder
from smallvit.experiments.catalog import (
    EXPERIMENTS,
    Experiment,
    Trial,
    find_equivalent,
    get_experiment,
    required_options,
)
from smallvit.runs.aggregate import REQUIRED_NUMBERS, REQUIRED_STRINGS
from smallvit.runs.curves import RunView
from smallvit.training.launch import apply_regularization
from smallvit.utils.errors import InputError
from smallvit.utils.files import LOCK, locked, write_text

EPOCHS = ("train_loss", "val_loss", "val_top1", "lr", "images_per_second", "seconds")
"""Metrics kept of each epoch."""
FREE = {*option_names("resumable", "launch"), "data", "teacher", "streaming", "amp", "seed"}
"""Options in which runs of the same trial may differ."""


@dataclass(frozen=True)
class Record:
    """A finished run of an experiment."""

    experiment: str
    row: str
    """Label of the trial."""
    seed: int
    budget: float
    command: str
    config: dict[str, Any]
    summary: dict[str, Any]
    epochs: dict[str, list[float]]

    @property
    def identity(self) -> tuple[str, str, int, float]:
        """Experiment, label, seed and budget."""
        return self.experiment, self.row, self.seed, self.budget

    @property
    def top1(self) -> float:
        """Test accuracy in per cent."""
        return self.summary["test_top1"]

    @property
    def options(self) -> dict[str, Any] | None:
        """The options that distinguish trials; None if this version of smallvit has other options."""
        return _trial_options(json.dumps(self.config, sort_keys=True))


@functools.cache
def _trial_options(config: str) -> dict[str, Any] | None:
    try:
        options = apply_regularization(Config.from_dict(json.loads(config))).to_dict()
    except InputError:
        return None
    return {name: value for name, value in options.items() if name not in FREE}


def create_record(view: RunView, experiment: str, row: str, seed: int, budget: float) -> Record:
    """Create the record of a finished run."""
    paths, local = option_names("path"), option_names("local")
    config = {
        name: strip_folder(value) if name in paths and value else value
        for name, value in view.config.to_dict().items()
        if name not in local
    }
    return Record(
        experiment=experiment,
        row=row,
        seed=seed,
        budget=budget,
        command=format_train_command(view.config, local, keep_folders=False),
        config=config,
        summary=view.summary,
        epochs={name: [line[name] for line in view.history] for name in EPOCHS} | _mean_temperatures(view.history),
    )


def _mean_temperatures(history: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the mean of LSA's learned temperatures over layers and heads after each epoch, if there are any."""
    temperatures = [line.get("temperatures") for line in history]
    if not all(temperatures):
        return {}
    return {"temperature": [statistics.fmean(chain.from_iterable(each.values())) for each in temperatures]}


def select_records(records: Iterable[Record], name: str, trial: Trial) -> list[Record]:
    """Return the records of a trial's runs at any budget, including those of equivalent trials of other experiments."""
    trials, experiment = find_equivalent(name, trial), get_experiment(name)
    return [r for r in records if (r.experiment, r.row) in trials and _has_required_options(r, experiment, trial)]


def _has_required_options(record: Record, experiment: Experiment, trial: Trial) -> bool:
    try:
        required = required_options(experiment, trial, record.budget)
    except InputError:  # the budget leaves no images
        return False
    return record.options == {option: value for option, value in required.items() if option not in FREE}


def group_by_trial(records: Iterable[Record], name: str, budget: float) -> dict[str, list[Record]]:
    """Return an experiment's records at a budget by trial label, sorted by seed."""
    at_budget = [record for record in records if record.budget == budget]
    groups: dict[str, list[Record]] = {}
    for trial in get_experiment(name).trials:
        by_seed = {record.seed: record for record in select_records(at_budget, name, trial)}
        if by_seed:
            groups[trial.label] = [by_seed[seed] for seed in sorted(by_seed)]
    return groups


def list_budgets(records: Iterable[Record], name: str) -> list[float]:
    """Return the budgets at which an experiment has records, the largest first."""
    records = list(records)
    trials = get_experiment(name).trials
    return sorted({record.budget for t in trials for record in select_records(records, name, t)}, reverse=True)


# Files


def read(file: Path) -> list[Record]:
    """Read the records in a file; a missing file has none.

    Raises:
        InputError: A line holds no record, or the file cannot be read.
    """
    try:
        lines = file.read_bytes().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    return [_parse(line, f"{file}, line {number}") for number, line in enumerate(lines, 1)]


def read_collection(folder: Path) -> list[Record]:
    """Read the records in a folder's files that are named after experiments.

    Raises:
        InputError: A file is damaged.
    """
    return [record for name in sorted(EXPERIMENTS) for record in read(folder / f"{name}.jsonl")]


def append(file: Path, record: Record) -> bool:
    """Add a record to a file unless it holds one of the same run; return whether it was added.

    Raises:
        InputError: The file is damaged, or cannot be written; it is then unchanged.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.with_name(f".{file.name}{LOCK}"), f"adds to {file}"):
            if any(other.identity == record.identity and other.options == record.options for other in read(file)):
                return False
            text = file.read_text(encoding="utf-8") if file.exists() else ""
            separator = "\n" if text and not text.endswith("\n") else ""
            write_text(file, f"{text}{separator}{json.dumps(vars(record))}\n")
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror})") from None
    return True


def check_writable(file: Path) -> None:
    """Check that records can be added to a file, and create its folder.

    Raises:
        InputError: The file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror}); choose another folder") from None


def _parse(line: bytes, where: str) -> Record:
    with suppress(ValueError, TypeError, AttributeError):
        record = Record(**json.loads(line))
        numbers = [record.budget, *(record.summary.get(name) for name in ("test_top1", *REQUIRED_NUMBERS))]
        named = record.summary.keys() >= {*REQUIRED_STRINGS, "val_top1", "versions"}
        if all(map(is_number, numbers)) and named and record.epochs.keys() >= {*EPOCHS}:
            record.config.pop("profile", None)  # removed from the options; it had no effect on results
            return record
    raise InputError(f"{where}: not the record of a run; remove the line")


def is_number(value: object) -> bool:
    """Return whether a value is a finite number and not a boolean."""
    return type(value) in (int, float) and math.isfinite(value)
