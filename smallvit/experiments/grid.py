"""Train a grid of runs: one per row and seed, each in its own folder and process, several at a time."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, TypeVar

import torch
from rich.console import Console

from smallvit import datasets
from smallvit.config.config import Config, option_names
from smallvit.config.options import OptimConfig
from smallvit.config.spec import RowSpec, format_value
from smallvit.datasets.dataset import ImageDataset
from smallvit.models import factory, weights_info
from smallvit.runs.curves import read_run
from smallvit.runs.run import Run
from smallvit.training.launch import resolve
from smallvit.training.setup import create_setup
from smallvit.utils import hardware
from smallvit.utils.errors import InputError, flag
from smallvit.utils.signals import SignalHandler, SignalInterrupt
from smallvit.utils.terminal import create_console

R, T = TypeVar("R"), TypeVar("T")
RUN_BYTES = 2 * 2**30
"""Free memory per run that is trained at the same time as others."""
CNN_RECIPE = "cnn"
"""Recipe of convolutional models that name none."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Rows and seeds to train and compare."""

    rows: Sequence[RowSpec]
    flags: dict[str, Any]
    """Options of all rows."""
    seeds: range
    out: Path
    recipe: str | None = None
    """Recipe of all rows that name none."""
    images_seen: int | None = None
    """Budget in images, if it is not given in epochs."""
    jobs: int | None = None
    """Runs trained at the same time; None chooses."""

    @property
    def folds(self) -> int:
        """Number of folds, each of which is a run of every row and seed; 0 without cross-validation."""
        return self.flags.get("folds", 0)

    @property
    def runs_per_row(self) -> int:
        """Number of runs of each row."""
        return len(self.seeds) * max(1, self.folds)

    def fold_options(self, seed: int, fold: int) -> dict[str, int]:
        """Return the options of a fold; each seed has another division."""
        first = self.flags.get("fold_seed", 0)
        return {"fold": fold, "fold_seed": first + seed - self.seeds.start} if fold else {}


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a grid or an experiment."""

    row: RowSpec
    seed: int
    folder: Path
    recipe: str | None
    options: dict[str, Any]
    """Options for `Config.build`."""

    @property
    def is_finished(self) -> bool:
        """Whether the folder holds this run, finished.

        Raises:
            InputError: The folder holds another or a damaged run.
        """
        if not (self.folder / Run.CONFIG).exists():
            return False
        view = read_run(self.folder)
        expected, actual = (resolve(config).to_dict() for config in (Config.build(**self.options), view.config))
        for name, value in expected.items():
            undecided = name == "streaming" and value == "auto"
            if name not in option_names("resumable", "launch") and value != actual[name] and not undecided:
                raise InputError(
                    f"{self.folder}: holds a run with {flag(name)} {format_value(actual[name])}, "
                    f"not {format_value(value)}; choose another --out, or remove the folder"
                )
        return view.summary is not None

    def train(self, prefix: str, trainings: Trainings) -> bool:
        """Train the run unless it is finished, and return whether it is finished now; messages start with `prefix`.

        Raises:
            SignalInterrupt: A signal stopped the run; it has been saved.
        """
        fold = f", fold {self.options['fold']}" if "fold" in self.options else ""
        title, console = f"{prefix} {self.row.label}, seed {self.seed}{fold}:", trainings.console
        if self.is_finished:
            console.print(f"{title} already finished, {self.folder}")
            return True
        console.print(f"\n{title} {'resuming ' if (self.folder / Run.STATE).exists() else ''}{self.folder}")
        code = train(self.options, self.folder, trainings)
        if code:
            console.print(f"{title} failed (exit code {code}); continuing with the other runs")
        return code == 0

    def check(self) -> None:
        """Set up the training and discard it again.

        Raises:
            InputError: A file or option does not fit.
        """
        with self.row.named():
            state = self.folder / Run.STATE
            saved = weights_info.read_progress(state) if state.exists() else None
            create_setup(resolve(Config.build(**self.options)), saved=saved)


def check_runs(runs: Sequence[PlannedRun], device: str) -> None:
    """Check runs before the first one is trained; on a GPU in another process, so that this one takes none of it.

    Raises:
        InputError: A file or option does not fit, or there is no such device.
    """
    if hardware.device_type(device) == "cpu":
        _check_each(runs, device)
    else:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(_check_each, runs, device).result()


def _check_each(runs: Sequence[PlannedRun], device: str) -> None:
    hardware.pick_device(device)
    for run in runs:
        run.check()


def plan_runs(grid: Grid) -> list[PlannedRun]:
    """Return the runs of a grid: the first seed of all rows, then their second, and so on.

    Raises:
        InputError: The data cannot be used, a row is given twice or is invalid, or rows differ in their epochs.
    """
    labels = [row.label for row in grid.rows]
    if duplicates := [label for label in labels if labels.count(label) > 1]:
        raise InputError(f"row {duplicates[0]}: given twice")
    dataset = datasets.create_dataset(Config.build(**grid.flags).data)
    if dataset.label_sets is not None:
        raise InputError(
            f"--data {dataset.name}: several labels an image, which compare and crossval do not take; use smallvit "
            "train, with --folds and --fold for a cross-validation"
        )
    flags = grid.flags | {"data": dataset.source}
    recipes, options = [], []
    for row in grid.rows:
        with row.named():
            recipes.append(_select_recipe(grid, row, dataset))
            size = {"img_size": dataset.img_size} if row.options.get("init") else {}  # not that of the weights
            options.append(row.given(flags | size, recipes[-1]))
            if options[-1].get("batch_size") == "auto":
                raise InputError("--batch-size auto: models that are compared need one batch size; give a number")
            Config.build(**options[-1])
    epochs = _common_epochs(grid, options, len(dataset.train))
    return [
        PlannedRun(
            row=row,
            seed=seed,
            folder=grid.out / f"{row.folder(seed)}{f'-fold{fold}' * bool(fold)}",
            recipe=recipe,
            options=each | {"epochs": epochs, "seed": seed} | grid.fold_options(seed, fold),
        )
        for seed in grid.seeds
        for fold in range(1, grid.folds + 1) or [0]
        for row, recipe, each in zip(grid.rows, recipes, options, strict=True)
    ]


def _select_recipe(grid: Grid, row: RowSpec, dataset: ImageDataset) -> str | None:
    if (name := row.recipe or grid.recipe) is not None:
        return name
    with torch.device("meta"):
        sizes = {"img_size": dataset.img_size, "in_chans": dataset.in_chans, "num_classes": len(dataset.class_names)}
        model = factory.create_model(row.arch, **sizes)
    return CNN_RECIPE if hardware.is_convolutional(model) else None


def _common_epochs(grid: Grid, options: Sequence[dict[str, Any]], images: int) -> int:
    if grid.images_seen is not None:
        return math.ceil(grid.images_seen / images)
    lengths = [each.get("epochs", OptimConfig.epochs) for each in options]
    if len(set(lengths)) > 1:
        listed = ", ".join(f"{row.label} {epochs}" for row, epochs in zip(grid.rows, lengths, strict=True))
        raise InputError(f"the rows' recipes differ in their epochs ({listed}); give --epochs or --images-seen for all")
    return lengths[0]


class Trainings(SignalHandler):
    """Train runs in separate processes, `jobs` at a time, and forward SIGINT and SIGTERM to them.

    A terminal sends its signals to the processes too, which count twice as one.

    Args:
        jobs: Number of processes at a time.
        console: Where to print.
        gpus: GPUs that the processes share in turns, as CUDA_VISIBLE_DEVICES names them; none to leave the choice.
    """

    def __init__(self, jobs: int, console: Console, gpus: Sequence[str] = ()) -> None:
        self.jobs, self.console = jobs, console
        self.processes: set[subprocess.Popen[str]] = set()
        self.gpus: SimpleQueue[str | None] = SimpleQueue()
        for job in range(jobs):
            self.gpus.put(gpus[job % len(gpus)] if gpus and jobs > 1 else None)

    def map(self, work: Callable[[R], T], runs: Sequence[R]) -> list[T]:
        """Return the results of `work` for all runs, which start in this order.

        Raises:
            SignalInterrupt: A signal stopped the runs; they have been saved.
        """

        def start(run: R) -> T:
            self.check()
            return work(run)

        if self.jobs == 1:
            return [start(run) for run in runs]
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(start, run) for run in runs]
            try:
                return [future.result() for future in futures]
            except BaseException:  # stop the others too
                pool.shutdown(wait=False, cancel_futures=True)
                self.handle(self.received or signal.SIGTERM, None)
                raise

    def run(self, command: list[str], title: str) -> int:
        """Run a command and return its exit code; if others run next to it, print its epochs only.

        Raises:
            SignalInterrupt: A signal stopped the run; it has been saved.
        """
        gpu = self.gpus.get()
        process = self.start(command, gpu)
        self.processes.add(process)
        if self.received:
            process.send_signal(self.received)
        for line in process.stdout or ():
            if line.startswith("epoch"):
                self.console.print(f"{title} {line.rstrip()}", highlight=False, markup=False)
        code = process.wait()
        self.processes.discard(process)
        self.gpus.put(gpu)
        if code in (130, 143) and not self.received:
            raise SignalInterrupt(code - 128)
        self.check()
        return code

    def start(self, command: list[str], gpu: str | None = None) -> subprocess.Popen[str]:
        """Start a process, with its share of the threads, which sees this GPU only."""
        if self.jobs == 1:
            return subprocess.Popen(command, text=True)
        threads = str(max(1, torch.get_num_threads() // self.jobs))
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        return subprocess.Popen(command, text=True, errors="replace", stdout=subprocess.PIPE, env=environment)

    def check(self) -> None:
        """Raise `SignalInterrupt` after a signal."""
        if self.received:
            raise SignalInterrupt(self.received)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Record a signal, and send it to the processes."""
        self.received = number
        for process in [*self.processes]:
            process.send_signal(number)


def choose_jobs(jobs: int | None, device: str, runs: int) -> int:
    """Return how many runs train at a time: as asked for, one per GPU, or one per thread as far as memory allows.

    A small model trains faster in one thread per run than with all threads, run after run.
    """
    if jobs is None and hardware.device_type(device) == "cpu":
        jobs = min(torch.get_num_threads(), hardware.free_memory() // RUN_BYTES)
    elif jobs is None:
        jobs = len(hardware.list_gpus(device))
    return max(1, min(jobs, runs))


def train(options: dict[str, Any], folder: Path, trainings: Trainings) -> int:
    """Train in `folder` in another process, resuming a run there, and return its exit code.

    Args:
        options: Options for `Config.build`.
        folder: The run's folder.
        trainings: Where the process runs.

    Raises:
        SignalInterrupt: A signal stopped the run; it has been saved.
    """
    with TemporaryDirectory() as temporary:
        file = Path(temporary, "config.json")
        file.write_text(json.dumps(options), encoding="utf-8")
        arguments = ["--config", str(file), "--out", str(folder), "--auto-resume"]
        return trainings.run([sys.executable, "-P", "-m", "smallvit", "train", *arguments], f"{folder.name}:")


def train_grid(grid: Grid, device: str) -> tuple[list[PlannedRun], list[PlannedRun]]:
    """Train the missing runs of a grid; return all its runs, and those that failed.

    Raises:
        InputError: Rows or data are invalid, or a folder holds another run; nothing has been trained.
        KeyboardInterrupt: A signal stopped a run, which has been saved.
    """
    hardware.device_type(device)
    planned = plan_runs(grid)
    check_runs([*{run.row.label: run for run in planned if not run.is_finished}.values()], device)
    for run in {run.options["fold"]: run for run in planned if "fold" in run.options}.values():
        datasets.create_dataset(Config.build(**run.options).data)  # a fold may lack a class
    jobs = choose_jobs(grid.jobs, device, sum(not run.is_finished for run in planned))
    with Trainings(jobs, create_console(), hardware.list_gpus(device)) as trainings:
        numbered = [(f"[{number}/{len(planned)}]", run) for number, run in enumerate(planned, 1)]
        finished = trainings.map(lambda each: each[1].train(each[0], trainings), numbered)
    return planned, [run for run, done in zip(planned, finished, strict=True) if not done]
