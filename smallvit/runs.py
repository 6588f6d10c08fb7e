"""A run's folder: configuration, metrics and where everything else lies. Needs no torch, so it is there at once.

config.json          every option, flat; `Config.build(**json)` repeats the run
metrics.jsonl        one line an epoch
last.safetensors     weights after the last epoch, with the metadata that rebuild the model
best.safetensors     weights of the epoch with the highest validation accuracy
resume.safetensors   weights and optimiser state to go on from
curves.png           loss, accuracy and learning rate over the epochs
summary.json         the outcome; present when the run is finished
"""

from __future__ import annotations

import json
import os.path
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from smallvit.config import Config, InputError
from smallvit.files import write_text

MAY_DIFFER = ("device", "out", "overwrite", "resume")
"""Options that a resumed run need not share with the one it continues."""


class Run:
    """One run's folder, as a context manager: what came of bad input leaves nothing behind."""

    CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
    LAST, BEST, STATE = "last.safetensors", "best.safetensors", "resume.safetensors"
    CURVES = "curves.png"

    def __init__(self, folder: Path, config: Config, *, new: bool, replaces: bool = False) -> None:
        self.folder, self.config = folder, config
        self._new, self._replaces = new, replaces
        self._made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        self.history: list[dict[str, Any]] = []

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, InputError) and not (self / self.STATE).exists():
            self.forget()

    def read_summary(self) -> dict[str, Any] | None:
        """What came out, if the run is finished and not being replaced.

        Raises:
            InputError: the file is damaged.
        """
        file = self / self.SUMMARY
        if self._replaces or not file.exists():
            return None
        try:
            return json.loads(file.read_text())
        except ValueError as error:
            raise InputError(f"{file}: damaged ({error}); remove it to evaluate the run again") from None

    def begin(self, config: Config) -> None:
        """The input has proved good: write the configuration, in place of the run that is to be overwritten."""
        if self._replaces:
            for name in (self.STATE, self.SUMMARY, self.METRICS, self.LAST, self.BEST, self.CURVES):
                (self / name).unlink(missing_ok=True)
            self._replaces = False
        self.config = config
        self.write_json(self.CONFIG, config.replace(out=None, overwrite=False, resume=None).options())

    def write_metrics(self) -> None:
        """Write metrics.jsonl, one line an epoch."""
        write_text(self / self.METRICS, "".join(json.dumps(line) + "\n" for line in self.history))

    def read_metrics(self, epochs: int) -> None:
        """Take up the lines of the first `epochs` epochs; later ones will be written anew.

        Raises:
            InputError: the file is missing or damaged.
        """
        try:
            lines = (self / self.METRICS).read_text().splitlines()
            self.history = [json.loads(line) for line in lines[:epochs]]
        except (OSError, ValueError) as error:
            raise InputError(f"{self / self.METRICS}: missing or damaged ({error})") from None

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file of the run."""
        write_text(self / name, json.dumps(value, indent=2) + "\n")

    def forget(self) -> None:
        """Remove what this new run made, and nothing else."""
        if self._new:
            with suppress(OSError):
                (self / self.CONFIG).unlink()
        for folder in self._made:
            with suppress(OSError):  # not there, or no longer empty
                folder.rmdir()


def open_run(config: Config) -> Run:
    """The run that `config` asks for: a new one, one to overwrite, or one to resume.

    Raises:
        InputError: --out cannot be written or holds something; --resume names no run, or options that differ.
    """
    if config.run.resume is not None:
        return _resume(Path(config.run.resume).expanduser(), config)
    if config.run.out is None:
        return _create_numbered(config)
    folder = Path(config.run.out).expanduser()
    if not folder.is_dir() or not any(folder.iterdir()):
        return _create(folder, config)
    try:
        _read_config(folder)
    except (OSError, ValueError, TypeError):
        raise InputError(f"--out {folder}: not empty, and no run; choose another folder") from None
    if not config.run.overwrite:
        raise InputError(f"--out {folder}: holds a run; --resume {folder} continues it, --overwrite replaces it")
    return Run(folder, config, new=False, replaces=True)


def _create(folder: Path, config: Config, *, exist_ok: bool = True) -> Run:
    run = Run(folder, config, new=True)
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
        run.begin(config)
    except OSError as error:
        if isinstance(error, FileExistsError) and not exist_ok:
            raise
        run.forget()
        raise InputError(f"--out {folder}: cannot be written ({error.strerror}); choose another folder") from None
    return run


def _create_numbered(config: Config) -> Run:
    """runs/<arch>-<plugins>-<data>, or the first of -2, -3, ... that is free; two starts at once get two."""
    plugins = [name for name in ("spt", "lsa") if getattr(config.model, name)]
    data = os.path.basename(os.path.abspath(config.data.data))
    name = "-".join([config.model.arch, *plugins, data]).replace(os.sep, "-")
    for number in count(1):
        with suppress(FileExistsError):
            return _create(Path("runs", name if number == 1 else f"{name}-{number}"), config, exist_ok=False)
    raise AssertionError("there is always a free number")


def _read_config(folder: Path) -> Config:
    return Config.build(**json.loads((folder / Run.CONFIG).read_text()))


def _resume(folder: Path, given: Config) -> Run:
    try:
        stored = _read_config(folder)
    except (OSError, ValueError, TypeError) as error:
        reason = "no config.json in it" if isinstance(error, OSError) else f"its config.json is damaged: {error}"
        raise InputError(f"--resume {folder}: not the folder of a run ({reason})") from None
    options, defaults = stored.options(), Config().options()
    for name, value in given.options().items():
        same = value in (defaults[name], options[name])
        if name == "data":
            same = same or os.path.realpath(os.path.expanduser(value)) == options[name]
        if not same and name not in MAY_DIFFER:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {value}: the run in {folder} has {options[name]}; it goes on as it began")
    device = given.run.device if given.run.device != defaults["device"] else stored.run.device
    return Run(folder, stored.replace(device=device), new=False)
