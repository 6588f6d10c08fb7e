"""Reproduce an experiment: train missing runs, record them, and print results next to published figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from rich.console import Console

from smallvit import datasets
from smallvit.config.config import Config
from smallvit.config.spec import run_folder_name
from smallvit.datasets.catalog import DATASETS
from smallvit.experiments import records, tables
from smallvit.experiments.catalog import Experiment, Trial, get_experiment
from smallvit.experiments.grid import PlannedRun, Trainings, check_runs, choose_jobs
from smallvit.runs.aggregate import read_finished_run
from smallvit.runs.run import Run
from smallvit.utils import hardware
from smallvit.utils.errors import InputError, flag

RECORDS = "records.jsonl"
SIZES = "{:,} classes, {:,} training and {:,} test images of {} channels and {} pixels"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which part of an experiment to run, and where."""

    name: str
    budget: float
    seeds: range
    out: Path
    labels: list[str]
    """Labels of the trials to run; all if empty."""
    flags: dict[str, Any]
    """Options of the machine, and where the data is."""
    jobs: int | None = None
    """Runs trained at the same time; None chooses."""
    collection: Path | None = None
    """Folder of records to add to, whose runs are not repeated."""

    @property
    def experiment(self) -> Experiment:
        """The experiment."""
        return get_experiment(self.name)

    @property
    def trials(self) -> tuple[Trial, ...]:
        """The trials to run."""
        return self.experiment.select(self.labels)

    @property
    def files(self) -> list[Path]:
        """The files that records are added to."""
        collected = [] if self.collection is None else [self.collection / f"{self.name}.jsonl"]
        return [*collected, self.out / RECORDS]

    def known_records(self) -> list[records.Record]:
        """Read the existing records."""
        collected = records.read_collection(self.collection) if self.collection else []
        return records.read(self.out / RECORDS) + collected


@dataclass(frozen=True, kw_only=True)
class TrialRun(PlannedRun):
    """One run of a trial."""

    trial: Trial

    @property
    def lacks_teacher(self) -> bool:
        """Whether the trial needs a teacher that is not trained yet."""
        return self.trial.teacher is not None and not (Path(self.options["teacher"]) / Run.SUMMARY).exists()


def reproduce(plan: Plan, console: Console) -> bool:
    """Run an experiment and print its table; return whether all runs are finished.

    Raises:
        InputError: An option or the data is invalid, or a folder holds another run or cannot be written to; nothing
            has been trained.
        KeyboardInterrupt: A signal stopped a run, which has been saved.
        OSError: The records cannot be written.
    """
    runs = plan_trials(plan)
    for each in runs:
        Config.build(**each.options)
    missing = _select_missing(runs, plan)
    if missing:
        _check(plan, missing)
    if plan.collection is not None:
        collected, own = plan.files
        for record in records.read(own):
            if (record.experiment, record.budget) == (plan.name, plan.budget):
                records.append(collected, record)  # made without --record
    console.print(f"{plan.name}: {plan.experiment.title}")
    console.print(tables.describe_length(plan.name, plan.budget))
    ended = {(each.trial.label, each.seed): Event() for each in runs}

    def work(each: TrialRun) -> bool:
        try:
            if each.trial.teacher is not None:
                ended[each.trial.teacher, each.seed].wait()  # it has been started before
            is_missing = each in missing and each in _select_missing(runs, plan)  # another process may have run it
            prefix = f"[{runs.index(each) + 1}/{len(runs)}] {each.trial.label}:"
            return _run(each, prefix, is_missing, plan, trainings)
        finally:
            ended[each.trial.label, each.seed].set()

    device = plan.flags.get("device", "auto")
    jobs = choose_jobs(plan.jobs, device, len(missing))
    with Trainings(jobs, console, hardware.list_gpus(device)) as trainings:
        finished = trainings.map(work, runs)
    labels = [trial.label for trial in plan.trials]
    tables.print_results(plan.name, plan.budget, labels, plan.known_records(), console)
    return all(finished)


def plan_trials(plan: Plan) -> list[TrialRun]:
    """Return the runs: the first seed of all trials, then their second, and so on; teachers before their students."""
    runs = []
    for seed in plan.seeds:
        for trial in plan.trials:
            row = trial.parse()
            options = row.given(plan.experiment.options(plan.budget) | plan.flags, row.recipe) | {"seed": seed}
            if trial.teacher is not None:
                options["teacher"] = str((plan.out / run_folder_name(trial.teacher, seed)).resolve())
            folder = plan.out / run_folder_name(trial.label, seed)
            runs.append(TrialRun(trial=trial, row=row, seed=seed, folder=folder, recipe=row.recipe, options=options))
    return runs


def _select_missing(runs: Sequence[TrialRun], plan: Plan) -> list[TrialRun]:
    """Return the runs without a record, and those of their teachers, whose weights are needed."""
    known = [record for record in plan.known_records() if record.budget == plan.budget]
    recorded = {
        (trial.label, record.seed)
        for trial in plan.trials
        for record in records.select_records(known, plan.name, trial)
    }
    new = [each for each in runs if (each.trial.label, each.seed) not in recorded]
    teachers = {(each.trial.teacher, each.seed) for each in new}
    return [each for each in runs if each in new or (each.trial.label, each.seed) in teachers]


def _check(plan: Plan, missing: Sequence[TrialRun]) -> None:
    """Check device, data, folders and record files before anything is trained."""
    device = plan.flags.get("device", "auto")
    hardware.device_type(device)
    _check_data(plan)
    unfinished = {each.trial.label: each for each in missing if not each.is_finished}.values()
    check_runs([each for each in unfinished if not each.lacks_teacher], device)
    for file in plan.files:
        records.check_writable(file)


def _check_data(plan: Plan) -> None:
    """Check that a folder given by --data holds the experiment's data set, by its sizes."""
    if "data" not in plan.flags:
        return
    name, entry = plan.experiment.data, DATASETS[plan.experiment.data]
    options = plan.experiment.flags | plan.flags
    dataset = datasets.create_dataset(Config.build(**options | {"train_fraction": 1.0}).data)
    train = len(dataset.train) + len(dataset.val) * dataset.drew_val
    actual = len(dataset.class_names), train, len(dataset.test), dataset.in_chans, dataset.img_size
    expected = entry.num_classes, entry.num_train, entry.num_test, entry.in_chans, entry.img_size
    if actual != expected:
        raise InputError(
            f"{flag('data')} {plan.flags['data']}: has {SIZES.format(*actual)}, {name} has {SIZES.format(*expected)}; "
            f"give {name} as a folder of class folders, or use smallvit compare for other data"
        )


def _run(each: TrialRun, prefix: str, is_missing: bool, plan: Plan, trainings: Trainings) -> bool:
    """Train a run if it is missing, and record it; return whether it is finished."""
    seed, console = each.seed, trainings.console
    if not is_missing:
        console.print(f"{prefix} seed {seed} is already recorded")
        return True
    if each.lacks_teacher:
        console.print(f"{prefix} seed {seed} is skipped, since {each.trial.teacher} failed")
        return False
    if not each.train(prefix, trainings):
        return False
    view = read_finished_run(each.folder)
    record = records.create_record(view, plan.name, each.trial.label, seed, plan.budget)
    for file in plan.files:
        records.append(file, record)
    return True
