"""Metrics on other programs' boards, as --log names them: the lines of metrics.jsonl, and at the end summary.json.

A package is imported only when it is named. A board's step is the epoch. loggers.json in the run's folder holds the
run's id on the boards and the last epoch that each has got, so that a resumed run goes on with its own curves and what
it repeats is not sent twice; a run that starts anew in the same folder gets an id of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from smallvit.errors import InputError, first_line
from smallvit.files import write_text
from smallvit.runs import Run

PROJECT, RECORD = "smallvit", "loggers.json"


class TensorBoard:
    """Event files in the run's folder tensorboard/."""

    def __init__(self, folder: Path, options: dict[str, Any], id: str, sent: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Purged are the points of a run that this one replaces, and those of which loggers.json does not know
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=sent + 1 if sent else 0)
        if not sent:
            self.writer.add_text("options", "\n".join(f"    {name} = {value}" for name, value in options.items()))

    def log(self, epoch: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def finish(self, epoch: int, summary: dict[str, Any]) -> None:
        self.log(epoch, {f"summary/{name}": value for name, value in numbers(summary).items()})

    def close(self, failed: bool) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases, as WANDB_MODE, WANDB_PROJECT, ... have it."""

    def __init__(self, folder: Path, options: dict[str, Any], id: str, sent: int) -> None:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            id=id,
            resume="allow",
            dir=folder,
            config=options,
            settings=wandb.Settings(console="off"),  # else it takes the terminal from the progress bar
        )

    def log(self, epoch: int, figures: dict[str, float]) -> None:
        self.run.log(figures, step=epoch, commit=True)

    def finish(self, epoch: int, summary: dict[str, Any]) -> None:
        self.run.summary.update(summary)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class MLflow:
    """MLflow's own store, or what MLFLOW_TRACKING_URI names."""

    MOST_PARAMS, LONGEST = 100, 500  # of one call, and of a parameter's value: what every server takes

    def __init__(self, folder: Path, options: dict[str, Any], id: str, sent: int) -> None:
        import mlflow

        self.mlflow = mlflow
        experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)).experiment_id
        known = mlflow.search_runs([experiment], f"tags.`smallvit.id` = '{id}'", output_format="list")
        if known:
            self.id = mlflow.start_run(known[0].info.run_id, nested=True).info.run_id
            return  # MLflow refuses parameters that differ, as --device may in a resumed run
        self.id = mlflow.start_run(run_name=folder.name, nested=True, tags={"smallvit.id": id}).info.run_id
        params = [(name, str(value)[: self.LONGEST]) for name, value in options.items()]
        for start in range(0, len(params), self.MOST_PARAMS):
            mlflow.log_params(dict(params[start : start + self.MOST_PARAMS]), run_id=self.id)

    def log(self, epoch: int, figures: dict[str, float]) -> None:
        self.mlflow.log_metrics(figures, step=epoch, run_id=self.id)

    def finish(self, epoch: int, summary: dict[str, Any]) -> None:
        self.log(epoch, {f"summary/{name}": value for name, value in numbers(summary).items()})
        self.mlflow.set_tags({name: value for name, value in summary.items() if isinstance(value, str)})

    def close(self, failed: bool) -> None:
        self.mlflow.end_run("FAILED" if failed else "FINISHED")


class Trackio:
    """Trackio's local database, or what TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names."""

    def __init__(self, folder: Path, options: dict[str, Any], id: str, sent: int) -> None:
        import trackio

        name = f"{folder.name}-{id}"  # Trackio finds a run to resume by its name alone
        self.run = trackio.init(PROJECT, name=name, config=options, resume="allow", embed=False)
        self.end = trackio.finish

    def log(self, epoch: int, figures: dict[str, float]) -> None:
        self.run.log(figures, step=epoch)

    def finish(self, epoch: int, summary: dict[str, Any]) -> None:
        self.log(epoch, {f"summary/{name}": value for name, value in summary.items()})

    def close(self, failed: bool) -> None:
        self.end()


LOGGERS: dict[str, type] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow, "trackio": Trackio}


class Loggers:
    """The boards that are open. One that fails is dropped with a warning; training goes on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.boards: dict[str, Any] = {}
        self.id, self.sent = _read_record(folder)

    def open(self, name: str, options: dict[str, Any]) -> None:
        """Open one board for the run in the folder.

        Raises:
            InputError: its package is not installed, or it cannot be opened.
        """
        try:
            self.boards[name] = LOGGERS[name](self.folder, options, self.id, self.sent.get(name, 0))
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                raise InputError(f"--log {name}: not installed; pip install 'smallvit[{name}]'") from None
            raise InputError(f"--log {name}: cannot be opened ({first_line(error)})") from None

    def log(self, figures: dict[str, Any]) -> None:
        """Send one epoch's line of metrics to the boards that have not got it yet."""
        epoch = figures["epoch"]
        values = {name: value for name, value in numbers(figures).items() if name != "epoch"}
        due = [name for name in self.boards if self.sent.get(name, 0) < epoch]
        for name in due:
            if self._try(name, lambda board: board.log(epoch, values)):
                self.sent[name] = epoch
        if due:
            with suppress(OSError):  # the worst of it is a point sent twice
                write_text(self.folder / RECORD, json.dumps({"id": self.id, "sent": self.sent}) + "\n")

    def finish(self, summary: dict[str, Any]) -> None:
        """Send the outcome: its numbers and strings."""
        values = {name: value for name, value in summary.items() if isinstance(value, (int, float, str))}
        for name in list(self.boards):
            self._try(name, lambda board: board.finish(summary["epochs"], values))

    def close(self, failed: bool) -> None:
        """Close the boards, as failed or not where they know the difference."""
        for name in list(self.boards):
            self._try(name, lambda board: board.close(failed))
        self.boards.clear()

    def _try(self, name: str, act: Callable[[Any], None]) -> bool:
        try:
            act(self.boards[name])
            return True
        except Exception as error:
            del self.boards[name]
            print(f"smallvit: --log {name} failed ({first_line(error)}), goes on without it", file=sys.stderr)
            return False


@contextmanager
def open_loggers(names: Sequence[str], folder: Path, options: dict[str, Any]) -> Iterator[Loggers]:
    """The boards of these names for the run in `folder`, closed at the end; those of a failed run as failed.

    A run that fails before its first checkpoint leaves none of their files behind.

    Raises:
        InputError: a package is not installed, or a board cannot be opened.
    """
    folder = folder.absolute()
    loggers = Loggers(folder)
    kept = {name for name in (RECORD, *names) if (folder / name).exists()}
    try:
        for name in names:
            loggers.open(name, options)
        yield loggers
    except BaseException as error:
        loggers.close(failed=True)
        if isinstance(error, Exception) and not any((folder / name).exists() for name in (Run.BEST, Run.STATE)):
            for name in {RECORD, *names} - kept:
                _remove(folder / name)
        raise
    loggers.close(failed=False)


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """Those of the values that are numbers."""
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}


def _read_record(folder: Path) -> tuple[str, dict[str, int]]:
    """The id and the epochs sent of the run that is resumed; those of a new one, if none is."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        if (folder / Run.STATE).exists():
            record = json.loads((folder / RECORD).read_text())
            return str(record["id"]), dict(record["sent"])
    return uuid.uuid4().hex[:12], {}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
