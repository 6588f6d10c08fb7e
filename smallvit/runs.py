"""A run's folder: configuration, metrics and where everything else lies. Needs no torch, so it is there at once.

config.json          every option, flat; `Config.build(**json)` repeats the run
metrics.jsonl        one line an epoch
tensorboard/, loggers.json   what --log tensorboard writes, and what other boards have received
last.safetensors     weights after the last epoch, with the metadata that rebuild the model
epoch-0007.safetensors, ...   of that epoch, with --keep
best.safetensors     weights of the epoch with the highest validation accuracy
resume.safetensors   weights and optimiser state to go on from
curves.png           loss, accuracy and learning rate over the epochs
trace.json, profile.txt   where the time of a few steps goes, with --profile
summary.json         the outcome; present when the run is finished
eval/, attend/, export/, report.html   what the verbs of these names write
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from smallvit.config import Config
from smallvit.errors import InputError
from smallvit.files import write_text


class TakenError(InputError):
    """The folder holds a run already, or another process is training there."""


class Run:
    """One run's folder, locked against other writers while it is open, as a context manager.

    A new run that fails before its first checkpoint leaves nothing behind.
    """

    CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
    LAST, BEST, STATE = "last.safetensors", "best.safetensors", "resume.safetensors"
    CURVES, TRACE, PROFILE = "curves.png", "trace.json", "profile.txt"
    RESULTS = (STATE, SUMMARY, METRICS, LAST, BEST, CURVES, TRACE, PROFILE)
    EVAL, ATTEND, EXPORT, REPORT = "eval", "attend", "export", "report.html"

    def __init__(self, folder: Path, config: Config, *, new: bool, replaces: bool = False) -> None:
        self.folder, self.config = folder, config
        self._new, self._replaces = new, replaces
        self._made = [parent for parent in (folder, *folder.parents) if not os.path.exists(parent)]
        self._lock: int | None = None

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        saved = any((self / name).exists() for name in (self.BEST, self.STATE))  # the first that training writes
        if kind is not None and issubclass(kind, Exception) and not saved:
            self.forget()
        self.unlock()

    def place(self) -> tuple[Path, Config]:
        """What torchrun's other processes need to know."""
        return self.folder, self.config

    def follow(self, folder: Path, config: Config) -> None:
        """Take part in the run that torchrun's first process opened."""
        self.folder, self.config = folder, config

    def epoch_file(self, epoch: int) -> Path:
        """The weights of one epoch, where they are kept."""
        return self / f"epoch-{epoch:04}.safetensors"

    def epoch_files(self) -> list[Path]:
        """The weights of single epochs that are kept, the latest last."""
        return sorted(self.folder.glob("epoch-*.safetensors"), key=lambda file: (len(file.name), file.name))

    @property
    def leads(self) -> bool:
        """Whether this process opened the folder; torchrun's others do not."""
        return not is_follower()

    @property
    def resumable(self) -> bool:
        """Whether --resume would go on with this run, not with one that it has yet to replace."""
        return not self._replaces and (self / self.CONFIG).exists()

    @property
    def saved(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return not self._replaces and (self / self.STATE).exists()

    def lock(self, patience: float = 0.0) -> None:
        """Keep other processes out until this one closes the run or ends, however it ends.

        `patience`: seconds to wait for one that is ending, such as what decodes images for a process just killed.

        Raises:
            TakenError: another process has the run open.
        """
        folder = os.open(self.folder, os.O_RDONLY)
        deadline = time.monotonic() + patience
        while self._lock is None:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._lock = folder
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(folder)
                    raise TakenError(
                        f"{self.folder}: another process is training there; choose another --out"
                    ) from None
                time.sleep(0.1)
            except OSError:  # a file system without locks
                os.close(folder)
                return

    def unlock(self) -> None:
        """Let other processes in."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def read_summary(self) -> dict[str, Any] | None:
        """What came out, if the run is finished and not being replaced.

        Raises:
            InputError: the file is damaged.
        """
        file = self / self.SUMMARY
        if self._replaces or not file.exists():
            return None
        with suppress(ValueError):
            summary = json.loads(file.read_text())
            if isinstance(summary, dict) and "test_top1" in summary:
                return summary
        raise InputError(f"{file}: damaged; remove it, and --resume evaluates the run again")

    def begin(self, config: Config) -> None:
        """The input has proved good: write the configuration, in place of the run that is to be overwritten."""
        if self._replaces:
            for file in (*(self / name for name in self.RESULTS), *self.epoch_files()):
                file.unlink(missing_ok=True)
            self._remove_what_judged_it()
            self._replaces = False
        self.config = config
        alone = {"out": None, "overwrite": False, "resume": None, "auto_resume": False}
        self.write_json(self.CONFIG, config.options() | alone)

    def _remove_what_judged_it(self) -> None:
        """What was said of weights that are no more; exports are weights of their own, and stay."""
        for folder in (self / self.EVAL, self / self.ATTEND, *self.folder.glob(f"{self.ATTEND}-*")):
            shutil.rmtree(folder, ignore_errors=True)
        (self / self.REPORT).unlink(missing_ok=True)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file of the run."""
        write_text(self / name, json.dumps(value, indent=2) + "\n")

    def write_lines(self, name: str, values: Iterable[dict[str, Any]]) -> None:
        """Write a file of the run with one JSON object a line."""
        write_text(self / name, "".join(json.dumps(value) + "\n" for value in values))

    def forget(self) -> None:
        """Remove what this new run made, and nothing else."""
        if self._new:
            for name in (self.CONFIG, self.TRACE, self.PROFILE):
                with suppress(OSError):
                    (self / name).unlink()
        for folder in self._made:
            with suppress(OSError):  # not there, or no longer empty
                folder.rmdir()


def is_follower() -> bool:
    """Whether another of torchrun's processes opens the run's folder."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("RANK", "0")) > 0


def best_epoch(history: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The line of metrics of the epoch whose weights are the best: by accuracy, then loss, on validation images."""
    validated = [line for line in history if None not in (line["val_top1"], line["val_loss"])]
    return max(validated, key=lambda line: (line["val_top1"], -line["val_loss"]), default=None)


def read_options(file: Path) -> dict[str, Any]:
    """The options in a run's config.json, or in a file like it.

    Raises:
        ValueError: it holds something else, or an option that is unknown or out of range.
    """
    try:
        options = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from None
    if not isinstance(options, dict) or not options:
        raise ValueError("no options in it")
    Config.build(**options)
    return options
