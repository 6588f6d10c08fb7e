"""Log metrics to TensorBoard and Weights & Biases, as `--log` names them.

Each epoch's line of metrics.jsonl is logged with the epoch as step, and summary.json at the end. A tracker's package is
imported only when it is named. trackers.json in the run's folder holds the run's id and the last epoch that each
tracker received, so a resumed run continues its curves without sending points twice. (accelerate.tracking has no such
record.)
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

from smallvit.runs.run import Run
from smallvit.utils.errors import InputError, first_line
from smallvit.utils.files import write_text

PROJECT, RECORD = "smallvit", "trackers.json"


class TensorBoard:
    """Event files in the run's folder tensorboard/."""

    def __init__(self, folder: Path, options: dict[str, Any], id: str, sent: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Purge the points of a run that this one replaces, and those missing in trackers.json
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=sent + 1 if sent else 0)
        if not sent:
            self.writer.add_text("options", "\n".join(f"    {name} = {value}" for name, value in options.items()))

    def log(self, epoch: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def finish(self, epoch: int, summary: dict[str, Any]) -> None:
        self.log(epoch, {f"summary/{name}": value for name, value in select_numbers(summary).items()})

    def close(self, failed: bool) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases, configured by WANDB_MODE, WANDB_PROJECT, ..."""

    def __init__(self, folder: Path, options: dict[str, Any], id: str, sent: int) -> None:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            id=id,
            resume="allow",
            dir=folder,
            config=options,
            settings=wandb.Settings(console="off"),  # keeps the terminal for the progress bar
        )

    def log(self, epoch: int, figures: dict[str, float]) -> None:
        self.run.log(figures, step=epoch, commit=True)

    def finish(self, epoch: int, summary: dict[str, Any]) -> None:
        self.run.summary.update(summary)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


TRACKERS: dict[str, type] = {"tensorboard": TensorBoard, "wandb": Wandb}


class Trackers:
    """The open trackers of a run. A tracker that fails is dropped with a warning, and training continues."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open_trackers: dict[str, Any] = {}
        self.id, self.sent = _read_record(folder)

    def open(self, name: str, options: dict[str, Any]) -> None:
        """Open one tracker.

        Raises:
            InputError: Its package is not installed, or it cannot be opened.
        """
        try:
            self.open_trackers[name] = TRACKERS[name](self.folder, options, self.id, self.sent.get(name, 0))
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                raise InputError(f"--log {name}: not installed; pip install 'smallvit[{name}]'") from None
            raise InputError(f"--log {name}: cannot be opened ({first_line(error)})") from None

    def log(self, figures: dict[str, Any]) -> None:
        """Send one epoch's metrics to the trackers that have not received them yet."""
        epoch = figures["epoch"]
        values = {name: value for name, value in select_numbers(figures).items() if name != "epoch"}
        due = [name for name in self.open_trackers if self.sent.get(name, 0) < epoch]
        for name in due:
            if self._try(name, lambda tracker: tracker.log(epoch, values)):
                self.sent[name] = epoch
        if due:
            with suppress(OSError):  # at worst a point is sent twice
                write_text(self.folder / RECORD, json.dumps({"id": self.id, "sent": self.sent}) + "\n")

    def finish(self, summary: dict[str, Any]) -> None:
        """Send the numbers and strings of the run's summary."""
        values = {name: value for name, value in summary.items() if isinstance(value, (int, float, str))}
        for name in list(self.open_trackers):
            self._try(name, lambda tracker: tracker.finish(summary["epochs"], values))

    def close(self, failed: bool) -> None:
        """Close all trackers, marking the run as failed where they support it."""
        for name in list(self.open_trackers):
            self._try(name, lambda tracker: tracker.close(failed))
        self.open_trackers.clear()

    def _try(self, name: str, action: Callable[[Any], None]) -> bool:
        try:
            action(self.open_trackers[name])
            return True
        except Exception as error:
            del self.open_trackers[name]
            print(f"smallvit: --log {name} failed ({first_line(error)}); continuing without it", file=sys.stderr)
            return False


@contextmanager
def open_trackers(names: Sequence[str], folder: Path, options: dict[str, Any]) -> Iterator[Trackers]:
    """Open trackers for the run in `folder` and close them at the end, as failed after an error.

    A run that fails before its first checkpoint leaves none of their files behind.

    Raises:
        InputError: A package is not installed, or a tracker cannot be opened.
    """
    folder = folder.absolute()
    trackers = Trackers(folder)
    existing = {name for name in (RECORD, *names) if (folder / name).exists()}
    try:
        for name in names:
            trackers.open(name, options)
        yield trackers
    except BaseException as error:
        trackers.close(failed=True)
        if isinstance(error, Exception) and not any((folder / name).exists() for name in (Run.BEST, Run.STATE)):
            for path in (folder / name for name in {RECORD, *names} - existing):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise
    trackers.close(failed=False)


def select_numbers(values: dict[str, Any]) -> dict[str, float]:
    """Return the values that are numbers."""
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}


def _read_record(folder: Path) -> tuple[str, dict[str, int]]:
    """Return the id and the last epoch sent to each tracker; a new id unless a run is resumed."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        if (folder / Run.STATE).exists():
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            return str(record["id"]), dict(record["sent"])
    return uuid.uuid4().hex[:12], {}
