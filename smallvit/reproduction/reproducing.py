"""An experiment done again: trains what is missing, keeps a record of each run, and shows what was published beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from smallvit import datasets, hardware
from smallvit.comparison.contest import Entry
from smallvit.comparison.rows import folder
from smallvit.comparison.standings import finished
from smallvit.config import Config
from smallvit.datasets.table import DATASETS
from smallvit.errors import InputError
from smallvit.options import flag
from smallvit.reproduction import ledger, records, tables
from smallvit.reproduction.experiments import experiment
from smallvit.reproduction.trials import Experiment, Trial
from smallvit.runs import Run

RECORDS = "records.jsonl"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What of an experiment is to be done, and where."""

    name: str
    budget: float
    seeds: range
    out: Path
    labels: list[str]
    """Of the trials that are wanted; all where there are none."""
    flags: dict[str, Any]
    """Options of the machine, and where the data lies."""
    collection: Path | None = None
    """A folder of records to which those of this experiment are added, and whose runs are not repeated."""

    @property
    def experiment(self) -> Experiment:
        """What its name stands for."""
        return experiment(self.name)

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Those that are wanted."""
        return self.experiment.chosen(self.labels)

    @property
    def files(self) -> list[Path]:
        """Where records go: into the collection, and its own folder."""
        return [*([collected(self.collection, self.name)] if self.collection else []), self.out / RECORDS]

    def known(self) -> list[records.Record]:
        """The records that are there."""
        found = ledger.read(self.out / RECORDS)
        return found + (ledger.gathered(self.collection) if self.collection else [])


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A run of a trial."""

    trial: Trial
    entry: Entry

    @property
    def has_teacher(self) -> bool:
        """Whether the model that is to teach it is trained, or none is to."""
        return self.trial.teacher is None or (Path(self.entry.options["teacher"]) / Run.SUMMARY).exists()


def collected(collection: Path, name: str) -> Path:
    """The file that a collection of records has for an experiment."""
    return collection / f"{name}.jsonl"


def reproduce(plan: Plan, console: Console) -> bool:
    """Do an experiment, and print its table; returns whether all its runs are finished.

    Raises:
        InputError: no such experiment or trial, a bad option, other data, or a folder that holds another run or cannot
            be written to; nothing was trained.
        KeyboardInterrupt: a signal ended a run, which is saved.
        OSError: the records cannot be written.
    """
    wanted = attempts(plan)
    for each in wanted:
        Config.build(**each.entry.options)
    missing = _missing(wanted, plan, plan.known())
    if missing:
        require_possible(plan, missing)
    _collect(wanted, plan)
    for line in tables.announcement(plan.name, plan.budget):
        console.print(line)
    done = []
    for number, each in enumerate(wanted, 1):
        still = each in missing and each in _missing(wanted, plan, plan.known())  # others may have done it meanwhile
        done.append(_attempt(each, f"[{number}/{len(wanted)}]", still, plan, console))
    labels = [trial.label for trial in plan.trials]
    for line in tables.terminal(plan.name, plan.budget, labels, plan.known(), console):
        console.print(line)
    return all(done)


def require_possible(plan: Plan, missing: Sequence[Attempt]) -> None:
    """Check all that a person could have got wrong, before anything is trained.

    Raises:
        InputError: no such device, other data, a folder that holds another run, or records that cannot be written.
    """
    hardware.pick_device(plan.flags.get("device", "auto"))
    require_data(plan)
    for attempt in {each.trial.label: each for each in missing if not each.entry.is_finished}.values():
        if attempt.has_teacher:
            attempt.entry.check()
    for file in plan.files:
        ledger.require_writable(file)


def _attempt(attempt: Attempt, head: str, missing: bool, plan: Plan, console: Console) -> bool:
    """Do a run that is missing, and keep its record; returns whether it is finished."""
    head = f"{head} {attempt.trial.label}:"
    if not missing:
        console.print(f"{head} seed {attempt.entry.seed} is on record already")
        return True
    if not attempt.has_teacher:
        console.print(f"{head} seed {attempt.entry.seed} is left out, as {attempt.trial.teacher} failed")
        return False
    if not attempt.entry.train(head, console):
        return False
    _keep(attempt, plan)
    return True


def attempts(plan: Plan) -> list[Attempt]:
    """Its runs: every trial's first seed, then every trial's second, ...; teachers before those they teach."""
    return [Attempt(trial=trial, entry=_entry(plan, trial, seed)) for seed in plan.seeds for trial in plan.trials]


def require_data(plan: Plan) -> None:
    """Check that data given by its place is the experiment's: as many classes and images, of the same size.

    Raises:
        InputError: it is not.
    """
    if "data" not in plan.flags:
        return
    name, entry = plan.experiment.data, DATASETS[plan.experiment.data]
    options = plan.experiment.flags | plan.flags
    dataset = datasets.load(Config.build(**options | {"train_fraction": 1.0}).data)
    figures = {
        "classes": (len(dataset.class_names), entry.classes),
        "training images": (len(dataset.train) + len(dataset.val), entry.train),
        "test images": (len(dataset.test), entry.test),
        "channels": (dataset.in_chans, entry.in_chans),
        "pixels a side": (dataset.img_size, entry.img_size),
        "validation images of its own": (0 if dataset.drew_val else len(dataset.val), 0),
    }
    for what, (found, wanted) in figures.items():
        if found != wanted:
            raise InputError(
                f"{flag('data')} {plan.flags['data']}: has {found:,} {what}, {name} has {wanted:,}; give {name} as a "
                "folder of class folders, or use smallvit compare for other data"
            )


def _entry(plan: Plan, trial: Trial, seed: int) -> Entry:
    row = trial.parsed()
    options = row.given(plan.experiment.options(plan.budget) | plan.flags, row.recipe) | {"seed": seed}
    if trial.teacher is not None:
        options["teacher"] = str((plan.out / folder(trial.teacher, seed)).resolve())
    return Entry(row=row, seed=seed, folder=plan.out / folder(trial.label, seed), recipe=row.recipe, options=options)


def _missing(wanted: Sequence[Attempt], plan: Plan, known: Sequence[records.Record]) -> list[Attempt]:
    """Those of which there is no record, and those that teach them: their folders are asked for."""
    new = [attempt for attempt in wanted if not _is_known(attempt, plan, known)]
    teachers = {(attempt.trial.teacher, attempt.entry.seed) for attempt in new}
    return [each for each in wanted if each in new or (each.trial.label, each.entry.seed) in teachers]


def _is_known(attempt: Attempt, plan: Plan, known: Sequence[records.Record]) -> bool:
    """Whether a run is on record, made as it would be now."""
    found = records.of_trial(known, plan.name, attempt.trial)
    return any((each.seed, each.budget) == (attempt.entry.seed, plan.budget) for each in found)


def _keep(attempt: Attempt, plan: Plan) -> None:
    """Write a finished run's record."""
    view = finished(attempt.entry.folder)
    made = records.record(view, plan.name, attempt.trial.label, attempt.entry.seed, plan.budget)
    for file in plan.files:
        ledger.append(file, made)


def _collect(wanted: Sequence[Attempt], plan: Plan) -> None:
    """Add to the collection what the experiment's own folder has on record of these runs, made without it."""
    if plan.collection is None:
        return
    found = ledger.read(plan.out / RECORDS)
    for each in wanted:
        asked = (plan.name, each.trial.label, each.entry.seed, plan.budget)
        for made in records.of_trial(found, plan.name, each.trial):
            if made.identity == asked:
                ledger.append(collected(plan.collection, plan.name), made)
