"""Which folder a run gets: a new one, one to overwrite, or one to resume. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from itertools import count
from pathlib import Path

from smallvit import trained
from smallvit.config import Config
from smallvit.errors import InputError
from smallvit.files import partial_name
from smallvit.inherit import inherited
from smallvit.options import DATA_NAMES, PLUGINS
from smallvit.runs import Run, TakenError, is_follower, read_options

PLACE = (
    *("device", "data_dir", "data_url", "workers", "skip_corrupt"),
    *("compile", "grad_checkpointing", "fsdp", "checkpoint_minutes", "keep", "log", "profile"),
)
"""Options that a resumed run takes over where they are given: how it is computed, kept and shown, and on what."""
BY_INIT = ("arch", "plugin_init", "diagonal_until")
"""Options that trained weights may have decided otherwise than they were given."""
PATIENCE = 20.0
"""Seconds that a run which is started again waits for what is left of the one before."""
MAY_DIFFER = (*PLACE, "out", "overwrite", "resume", "auto_resume")
"""Options that a resumed run need not share with the one it continues."""


def open_run(config: Config, given: Collection[str] | None = None) -> Run:
    """The run that `config` asks for: a new one, one to overwrite, or one to resume.

    `given` names the options that were set on purpose; without it, those that differ from the defaults count.

    Raises:
        InputError: --out cannot be written or holds something; --resume names no run, or options that differ.
    """
    if is_follower():
        return Run(Path(), config, new=False)
    own = {name: path and trained.absolute(path) for name, path in _weights(config).items()}
    config = config.replace(data=_absolute(config.data.data), **own)
    if config.run.resume is not None:
        return _resume(Path(os.path.expanduser(config.run.resume)), config, given)
    if _is_restartable() and (config.run.out is None or config.run.overwrite):
        raise InputError(
            "torchrun --max-restarts: give --out DIR, without --overwrite: a restart goes on with the run there"
        )
    if config.run.out is None:
        return _create_numbered(inherited(config, given))
    folder = Path(os.path.expanduser(config.run.out))
    if not os.path.isdir(folder) or _is_empty(folder):
        return _create(folder, inherited(config, given))
    try:
        _read_config(folder)
    except (OSError, ValueError):
        raise InputError(f"--out {folder}: not empty, and no run; choose another folder") from None
    if config.run.auto_resume or _is_restartable():
        return _resume(folder, config, given, PATIENCE)
    if not config.run.overwrite:
        raise _taken(folder)
    for name, path in _weights(config).items():
        if path is not None and Path(path).is_relative_to(os.path.realpath(folder)):
            raise InputError(f"--{name} {path}: would be replaced by --out {folder} --overwrite; choose another --out")
    run = Run(folder, inherited(config, given), new=False, replaces=True)
    run.lock()
    return run


def _weights(config: Config) -> dict[str, str | None]:
    """The trained weights that a run needs."""
    return {"init": config.init.init, "teacher": config.distill.teacher}


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
    plugins = [name for name in PLUGINS if getattr(config.model, name)]
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


def _read_config(folder: Path) -> Config:
    try:
        return Config.build(**read_options(folder / Run.CONFIG))
    except FileNotFoundError:
        raise ValueError(f"no {Run.CONFIG} in it") from None
    except ValueError as error:
        raise ValueError(f"its {Run.CONFIG} is damaged: {error}") from None


def _resume(folder: Path, config: Config, given: Collection[str] | None, patience: float = 0.0) -> Run:
    try:
        stored = _read_config(folder)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"--resume {folder}: not the folder of a run ({reason})") from None
    old, new, defaults = stored.options(), config.options(), Config().options()
    on_purpose = given if given is not None else [name for name in new if new[name] != defaults[name]]
    for name in on_purpose:
        decided = (name == "streaming" and new[name] == "auto") or (name in BY_INIT and old["init"] is not None)
        if name not in MAY_DIFFER and new[name] != old[name] and not decided:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {new[name]}: the run in {folder} has {old[name]}, and goes on as it began")
    stored = stored.replace(**{name: new[name] for name in PLACE if name in on_purpose})
    run = Run(folder, stored, new=False)
    run.lock(patience)
    return run
