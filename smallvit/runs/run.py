"""Create, lock, read and write the folder of a training run. Imports no torch.

config.json                           all options, flat; `Config.from_dict(json)` repeats the run
metrics.jsonl                         one JSON object per epoch
last.safetensors                      weights after the last epoch, with the metadata that rebuild the model
best.safetensors                      weights of the best epoch on validation images
epoch-0007.safetensors, ...           weights of single epochs, with --keep
resume.safetensors                    weights and optimizer state to resume from
curves.png                            loss, accuracy and learning rate per epoch
summary.json                          final results; exists once the run is finished
tensorboard/, trackers.json           event files of TensorBoard, and what other trackers have received
eval/, attend/, export/, report.html  outputs of the verbs of these names
neighbors/                            nearest neighbors in report.html, after training without labels
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from smallvit.config.config import Config, option_types
from smallvit.utils.errors import InputError, suggest
from smallvit.utils.files import LOCK, Lock, write_text


class RunExistsError(InputError):
    """The folder already holds a run, or another process is training there."""


class Run:
    """The folder of a run, locked against other writers while it is open as a context manager.

    A new run that fails before its first checkpoint leaves no files behind.
    """

    CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
    LAST, BEST, STATE = "last.safetensors", "best.safetensors", "resume.safetensors"
    CURVES = "curves.png"
    RESULTS = (STATE, SUMMARY, METRICS, LAST, BEST, CURVES)
    EVAL, ATTEND, NEIGHBORS, EXPORT, REPORT = "eval", "attend", "neighbors", "export", "report.html"

    def __init__(
        self, folder: Path, config: Config, *, new: bool, replaces: bool = False, extends: bool = False
    ) -> None:
        self.folder, self.config = folder, config
        self._new, self._replaces, self._extends = new, replaces, extends
        self._created = [parent for parent in (folder, *folder.parents) if not os.path.exists(parent)]
        self._lock: Lock | None = None
        self.opened_at = time.monotonic()

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        saved = any((self / name).exists() for name in (self.BEST, self.STATE))  # the first files of a checkpoint
        if kind is not None and issubclass(kind, Exception) and not saved:
            self.discard()
        self.unlock()

    def follow(self, folder: Path, config: Config) -> None:
        """Join the run that torchrun's first process opened."""
        self.folder, self.config = folder, config

    def epoch_file(self, epoch: int) -> Path:
        """Return the path of the weights of one epoch."""
        return self / f"epoch-{epoch:04}.safetensors"

    def epoch_files(self) -> list[Path]:
        """Return the saved weights of single epochs, the latest last."""
        return sorted(self.folder.glob("epoch-*.safetensors"), key=lambda file: (len(file.name), file.name))

    @property
    def leads(self) -> bool:
        """Whether this process opened the folder, unlike torchrun's other processes."""
        return not is_follower()

    @property
    def resumable(self) -> bool:
        """Whether --resume would continue this run, rather than one that it is about to replace."""
        return not self._replaces and (self / self.CONFIG).exists()

    @property
    def saved(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return not self._replaces and (self / self.STATE).exists()

    def lock(self, timeout: float = 0.0) -> None:
        """Lock the folder until this process closes the run or ends.

        Args:
            timeout: Seconds to wait for a process that is ending, such as the image decoders of a killed run.

        Raises:
            RunExistsError: Another process has the run open.
        """
        lock = Lock(self / LOCK)
        if not lock.acquire(timeout):
            raise RunExistsError(f"{self.folder}: another process is training there; choose another --out")
        self._lock = lock

    def unlock(self) -> None:
        """Release the lock on the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def read_summary(self) -> dict[str, Any] | None:
        """Return the final results; None if the run is unfinished or about to be replaced or extended.

        Raises:
            InputError: The file is damaged.
        """
        file = self / self.SUMMARY
        if self._replaces or self._extends or not file.exists():
            return None
        with suppress(ValueError):
            summary = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(summary, dict) and any(f"test_{metric}" in summary for metric in PRIMARY):
                return summary
        raise InputError(f"{file}: damaged; evaluate its weights with smallvit eval {self.folder}, or train it again")

    def begin(self, config: Config) -> None:
        """Remove the run that is to be overwritten, or the results of one to be extended; write the configuration."""
        if self._extends:
            (self / self.SUMMARY).unlink(missing_ok=True)
            self._extends = False
        if self._replaces:
            for file in (*(self / name for name in self.RESULTS), self / self.REPORT, *self.epoch_files()):
                file.unlink(missing_ok=True)
            folders = (self / name for name in (self.EVAL, self.ATTEND, self.NEIGHBORS))
            for folder in (*folders, *self.folder.glob(f"{self.ATTEND}-*")):
                shutil.rmtree(folder, ignore_errors=True)  # results of the removed weights; exports stay
            self._replaces = False
        self.config = config
        defaults = {"out": None, "overwrite": False, "resume": None, "auto_resume": False}
        self.write_json(self.CONFIG, config.to_dict() | defaults)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file of the run."""
        write_text(self / name, json.dumps(value, indent=2) + "\n")

    def write_lines(self, name: str, values: Iterable[dict[str, Any]]) -> None:
        """Write a file of the run with one JSON object per line."""
        write_text(self / name, "".join(json.dumps(value) + "\n" for value in values))

    def discard(self) -> None:
        """Remove the files and folders that this new run created, and nothing else."""
        if self._new:
            with suppress(OSError):
                (self / self.CONFIG).unlink()
        self.unlock()
        for folder in self._created:
            with suppress(OSError):  # missing or not empty
                folder.rmdir()


TITLES = {"top1": "top-1", "map": "mAP", "knn_top1": "k-NN top-1", "macro_f1": "macro F1", "micro_f1": "micro F1"}
"""Names of metrics in messages, if they are not those in files without underscores."""
PRIMARY = ("map", "knn_top1", "top1")
"""Main metrics; a run has one of them."""
METRICS, ATTENTION = f"{Run.EVAL}/test/metrics.json", f"{Run.ATTEND}/attention.json"
"""Results of `smallvit eval` and `smallvit attend` in a run's folder."""
NEIGHBORS = f"{Run.NEIGHBORS}/neighbors.json"
"""Nearest neighbors of images by features that were trained without labels, written by `smallvit report`."""


def is_follower() -> bool:
    """Return whether another of torchrun's processes opens the run's folder."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("RANK", "0")) > 0


def best_epoch(history: Sequence[dict[str, Any]], select_by: str) -> dict[str, Any] | None:
    """Return the metrics of the first best epoch by a validation metric, then loss; None if none was validated.

    By "last" it is the last epoch.
    """
    if select_by == "last":
        return history[-1] if history else None
    validated = [line for line in history if None not in (line[f"val_{primary_metric(history)}"], line["val_loss"])]
    sign = -1 if select_by == "loss" else 1
    return max(validated, key=lambda line: (sign * line[f"val_{select_by}"], -line["val_loss"]), default=None)


def primary_metric(records: Iterable[dict[str, Any]]) -> str:
    """Return the main metric of a run's epochs or summary.

    It is map with several labels an image, knn_top1 after pretraining without labels, else top1.
    """
    names = {name for each in records for name in each}
    return next((metric for metric in PRIMARY if f"val_{metric}" in names), "top1")


def read_config(folder: Path) -> Config:
    """Return the configuration of the run in a folder.

    Raises:
        InputError: The folder holds no run, or its config.json is damaged or of another version of smallvit.
    """
    if not (folder / Run.CONFIG).exists():
        raise InputError(f"{folder}: not the folder of a run (no {Run.CONFIG} in it)")
    return Config.from_dict(read_options(folder / Run.CONFIG))


def read_options(file: Path) -> dict[str, Any]:
    """Return the options in a config.json.

    Raises:
        InputError: The file cannot be read, is damaged, or was written by another version of smallvit.
    """
    try:
        options = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{file}: damaged (not JSON: {error})") from None
    if not isinstance(options, dict) or not options:
        raise InputError(f"{file}: damaged (it holds no options)")
    if unknown := options.keys() - option_types().keys():
        name = min(unknown)
        hint = suggest(name, option_types())
        raise InputError(f"{file}: written by another version of smallvit: unknown option {name!r}{hint}")
    try:
        Config.from_dict(options)
    except InputError as error:
        raise InputError(f"{file}: damaged ({error})") from None
    return options
