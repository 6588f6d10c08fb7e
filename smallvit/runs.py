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
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from smallvit.config import Config
from smallvit.errors import InputError
from smallvit.files import partial_name, write_text
from smallvit.options import DATA_NAMES

PLACE = (
    *("device", "data_dir", "data_url", "workers", "skip_corrupt"),
    *("compile", "grad_checkpointing", "fsdp", "checkpoint_minutes", "keep", "log", "profile"),
)
"""Options that a resumed run takes over where they are given: how it is computed, kept and shown, and on what."""
MAY_DIFFER = (*PLACE, "out", "overwrite", "resume", "auto_resume")
"""Options that a resumed run need not share with the one it continues."""


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
        return not _is_follower()

    @property
    def resumable(self) -> bool:
        """Whether --resume would go on with this run, not with one that it has yet to replace."""
        return not self._replaces and (self / self.CONFIG).exists()

    def lock(self) -> None:
        """Keep other processes out until this one closes the run or ends, however it ends.

        Raises:
            TakenError: another process has the run open.
        """
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(folder)
            raise TakenError(f"{self.folder}: another process is training there; choose another --out") from None
        except OSError:
            os.close(folder)  # a file system without locks
        else:
            self._lock = folder

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
            self._replaces = False
        self.config = config
        alone = {"out": None, "overwrite": False, "resume": None, "auto_resume": False}
        self.write_json(self.CONFIG, config.options() | alone)

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


def open_run(config: Config, given: Collection[str] | None = None) -> Run:
    """The run that `config` asks for: a new one, one to overwrite, or one to resume.

    `given` names the options that were set on purpose; without it, those that differ from the defaults count.

    Raises:
        InputError: --out cannot be written or holds something; --resume names no run, or options that differ.
    """
    if _is_follower():
        return Run(Path(), config, new=False)
    config = config.replace(data=_absolute(config.data.data))
    if config.run.resume is not None:
        return _resume(Path(os.path.expanduser(config.run.resume)), config, given)
    if _is_restartable() and (config.run.out is None or config.run.overwrite):
        raise InputError(
            "torchrun --max-restarts: give --out DIR, without --overwrite: a restart goes on with the run there"
        )
    if config.run.out is None:
        return _create_numbered(config)
    folder = Path(os.path.expanduser(config.run.out))
    if not os.path.isdir(folder) or _is_empty(folder):
        return _create(folder, config)
    try:
        _read_config(folder)
    except (OSError, ValueError):
        raise InputError(f"--out {folder}: not empty, and no run; choose another folder") from None
    if config.run.auto_resume or _is_restartable():
        return _resume(folder, config, given)
    if not config.run.overwrite:
        raise _taken(folder)
    run = Run(folder, config, new=False, replaces=True)
    run.lock()
    return run


def _is_follower() -> bool:
    """Whether another of torchrun's processes opens the run's folder."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("RANK", "0")) > 0


def _is_restartable() -> bool:
    """Whether torchrun would start this command once more; which start this is, its machines count differently."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def _is_empty(folder: Path) -> bool:
    try:
        return all(path.name == partial_name(Run.CONFIG) for path in folder.iterdir())  # killed at its first file
    except OSError as error:
        raise _unwritable(folder, error) from None


def _absolute(data: str) -> str:
    """A folder's or zip file's absolute path, so that a run can be resumed from anywhere; a name as it is."""
    path = os.path.expanduser(data)
    return os.path.realpath(path) if data not in DATA_NAMES and os.path.exists(path) else data


def _create(folder: Path, config: Config) -> Run:
    run = Run(folder, config, new=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        run.lock()
        if run.resumable:  # another process was faster
            run.unlock()
            raise _taken(folder)
        run.begin(config)
    except OSError as error:
        run.forget()
        run.unlock()
        raise _unwritable(folder, error) from None
    return run


def _create_numbered(config: Config) -> Run:
    """runs/<arch>-<plugins>-<data>, or the first of -2, -3, ... that is free; two starts at once get two."""
    plugins = [name for name in ("spt", "lsa") if getattr(config.model, name)]
    name = "-".join([config.model.arch, *plugins, os.path.basename(config.data.data)[:64]]).replace(os.sep, "-")
    for number in count(1):
        folder = Path("runs", name if number == 1 else f"{name}-{number}")
        if not os.path.lexists(folder):
            with suppress(TakenError):
                return _create(folder, config)
    raise AssertionError("there is always a free number")


def _taken(folder: Path) -> TakenError:
    return TakenError(f"--out {folder}: holds a run; --resume {folder} continues it, --overwrite replaces it")


def _unwritable(folder: Path, error: OSError) -> InputError:
    return InputError(f"--out {folder}: cannot be written ({error.strerror}); choose another folder")


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


def _read_config(folder: Path) -> Config:
    try:
        return Config.build(**read_options(folder / Run.CONFIG))
    except FileNotFoundError:
        raise ValueError(f"no {Run.CONFIG} in it") from None
    except ValueError as error:
        raise ValueError(f"its {Run.CONFIG} is damaged: {error}") from None


def _resume(folder: Path, config: Config, given: Collection[str] | None) -> Run:
    try:
        stored = _read_config(folder)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"--resume {folder}: not the folder of a run ({reason})") from None
    old, new, defaults = stored.options(), config.options(), Config().options()
    on_purpose = given if given is not None else [name for name in new if new[name] != defaults[name]]
    for name in on_purpose:
        decided = name == "streaming" and new[name] == "auto"
        if name not in MAY_DIFFER and new[name] != old[name] and not decided:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {new[name]}: the run in {folder} has {old[name]}, and goes on as it began")
    stored = stored.replace(**{name: new[name] for name in PLACE if name in on_purpose})
    run = Run(folder, stored, new=False)
    run.lock()
    return run
