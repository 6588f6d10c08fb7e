"""Records of finished runs: what a run was, on what, by which command, and what came of it. Needs no torch.

A file holds one JSON object a line and is only ever appended to:

    experiment, row, seed, budget   which run of which experiment
    command, config                 what trains such a model again, and every option
    summary                         accuracy, time, speed, size, hardware, versions, revision
    epochs                          what was measured after each epoch, by name
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from smallvit import commands
from smallvit.errors import InputError
from smallvit.reproduction.experiments import experiment, twins
from smallvit.watching import View

EPOCHS = ("train_loss", "val_loss", "val_top1", "lr", "images_per_second", "seconds")
"""What is kept of each epoch."""
PATHS = ("data", "init", "teacher")
"""Options that may be paths, of which the last part is kept."""
PRIVATE = ("out", "resume", "overwrite", "auto_resume", "device", "data_dir", "log", "checkpoint_minutes")
"""Options that say nothing about the model that came out."""


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


def require_writable(file: Path) -> None:
    """Check that records can be added to a file, before anything is trained for them; makes its folder.

    Raises:
        InputError: they cannot.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror}); choose another folder") from None


def append(file: Path, record: Record) -> bool:
    """Add a record to the file, which is made if need be; returns whether it is new there.

    Raises:
        InputError: the file is damaged, or cannot be written.
    """
    if any(other.identity == record.identity for other in read(file)):
        return False
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a+") as stream:
            stream.seek(0)
            torn = stream.read()[-1:] not in ("", "\n")
            stream.write("\n" * torn + json.dumps(vars(record)) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror})") from None
    return True


def read(file: Path) -> list[Record]:
    """The records in a file; none where it is not there.

    Raises:
        InputError: a line is none.
    """
    try:
        lines = file.read_text().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or 'no text'})") from None
    return [_read(line, file, number) for number, line in enumerate(lines, 1)]


def _read(line: str, file: Path, number: int) -> Record:
    try:
        found = Record(**json.loads(line))
        float(found.top1)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{file}, line {number}: no record of a run; remove the line") from None
    return found


def gathered(folder: Path) -> list[Record]:
    """The records of all files in a folder and those within it, by the files' names.

    Raises:
        InputError: one of them is damaged.
    """
    return [record for file in sorted(folder.glob("*/*.jsonl")) for record in read(file)]


def of(records: Iterable[Record], name: str, budget: float) -> dict[str, list[Record]]:
    """The records of an experiment at a budget by its trials' labels, in the order of seeds.

    A run that is on record under another experiment counts for this one too, if it is the same.
    """
    found: dict[str, list[Record]] = {}
    for trial in experiment(name).trials:
        names = twins(name, trial)
        mine = {r.seed: r for r in records if (r.experiment, r.row) in names and r.budget == budget}
        if mine:
            found[trial.label] = [mine[seed] for seed in sorted(mine)]
    return found


def budgets(records: Iterable[Record], name: str) -> list[float]:
    """The budgets at which an experiment has records, the largest first."""
    names = {twin for trial in experiment(name).trials for twin in twins(name, trial)}
    return sorted({r.budget for r in records if (r.experiment, r.row) in names}, reverse=True)
