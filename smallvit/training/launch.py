"""Resolve the options of a run and open its folder: new, to overwrite, or to resume. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import Any

from smallvit.config.config import Config, option_names
from smallvit.config.model import ALIASES, ARCH, ModelConfig, flatten_spec
from smallvit.config.options import AUTO_REGULARIZATION, REGULARIZATION
from smallvit.datasets.catalog import DATASETS, is_hub_source, is_manifest, require_data
from smallvit.models import weights_info
from smallvit.models.architectures import OURS, require_multiple, require_name
from smallvit.models.weights_info import WeightsInfo
from smallvit.plugins import PLUGINS
from smallvit.runs.run import Run, RunExistsError, is_follower, read_config
from smallvit.training.losses import LOSSES, create_objective, get_loss, loss_option_names, read_class_weights
from smallvit.utils import files
from smallvit.utils.errors import InputError, flag, warn
from smallvit.utils.files import LOCK, partial_name

SET_BY_INIT = ("arch", "plugin_init", "plugin_warmup_ratio")
"""Options that the weights of --init may have changed."""
NOT_INHERITED = ("dropout", "drop_path", "linear_drop_path")
"""Options of the model that do not follow the weights of --init."""
CHOSEN = ("streaming", "batch_size")
"""Options whose value auto is replaced by what a run chose."""
RESTART_SECONDS = 20.0
"""Maximum wait of a restarted run for its predecessor to end."""


def resolve(config: Config) -> Config:
    """Return the configuration with what its options imply: the model of --init, and a preset's regularization.

    A resolved configuration stays unchanged.

    Raises:
        InputError: No such weights or loss, or options that contradict each other.
    """
    create_objective(config.optim, config.distill)
    return apply_regularization(inherit_from_init(config))


def apply_regularization(config: Config) -> Config:
    """Return the configuration with the values of its regularization preset for options that are None."""
    name = config.optim.regularization
    values = AUTO_REGULARIZATION if name == "auto" else REGULARIZATION[name]
    if not get_loss(config.optim.loss, distillation=False).label_smoothing:
        values = values | {"label_smoothing": 0.0}
    options = config.to_dict()
    return config.replace(**{name: value for name, value in values.items() if options[name] is None})


def warn_ineffective(config: Config) -> None:
    """Warn on standard error of options that have no effect with the others."""
    ineffective = config.model.find_ineffective() + config.distill.find_ineffective()
    several = is_manifest(config.data.data) and LOSSES[config.optim.loss].multi_label  # perhaps
    if config.optim.label_smoothing and not (LOSSES[config.optim.loss].label_smoothing or several):
        smoothed = " or ".join(name for name, loss in LOSSES.items() if loss.label_smoothing)
        ineffective.append(("label_smoothing", f"--loss {smoothed}; remove it"))
    chosen = (config.optim.loss, config.distill.distill if config.distill.teacher else None)
    losses = loss_option_names()
    ineffective += [
        (name, f"{'--distill' if LOSSES[losses[name]].distillation else '--loss'} {losses[name]}; add it")
        for name in config.optim.loss_options
        if losses[name] not in chosen
    ]
    downloaded = is_hub_source(config.data.data) or getattr(DATASETS.get(config.data.data), "archives", ())
    if config.data.data_dir is not None and not downloaded:
        ineffective.append(("data_dir", "a data set that is downloaded; give a folder of images by --data"))
    if config.data.columns is not None and not is_manifest(config.data.data):
        ineffective.append(("columns", "a table; give a .csv, .tsv or .parquet file by --data"))
    if config.data.fold > 1 and not config.data.folds:
        ineffective.append(("fold", "--folds; add e.g. --folds 5"))
    for name, needed in ineffective:
        warn(f"{flag(name)} has no effect without {needed}")


def open_run(config: Config) -> Run:
    """Open the run that a configuration describes: a new one, one to overwrite, or one to resume.

    Raises:
        InputError: --out cannot be written or is not empty; --resume names no run, or options differ from its own.
    """
    if is_follower():
        return Run(Path(), config, new=False)
    create_objective(config.optim, config.distill)
    warn_ineffective(config)
    paths = {name: path and files.absolute_name(path) for name, path in _weights(config).items()}
    if (file := config.optim.class_weights) not in (None, "balanced"):
        paths["class_weights"] = os.path.realpath(os.path.expanduser(file))
        read_class_weights(paths["class_weights"])  # before images are decoded
    more = [*map(_absolute, config.pretrain.more_data)]
    config = config.replace(data=_absolute(config.data.data), more_data=more, **paths)
    if config.run.resume is not None:
        return _resume(Path(os.path.expanduser(config.run.resume)), config)
    for data in (config.data.data, *more):
        require_data(data)
    arch = config.model.arch or (ARCH if config.init.init is None else None)
    if arch is not None:
        require_name(arch)
        if arch in OURS and None not in (config.data.img_size, config.model.patch_size):
            require_multiple(config.data.img_size, config.model.patch_size)
    restartable = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    if restartable and (config.run.out is None or config.run.overwrite):
        raise InputError("torchrun --max-restarts: add --out DIR, without --overwrite; a restart resumes the run there")
    if config.run.out is None:
        return _create_numbered(resolve(config))
    folder = Path(os.path.expanduser(config.run.out))
    if not os.path.isdir(folder) or _is_empty(folder):
        return _create(folder, resolve(config))
    try:
        read_config(folder)
    except InputError:
        raise InputError(f"--out {folder}: not empty, and not a run; choose another folder") from None
    if config.run.auto_resume or restartable:
        return _resume(folder, config, RESTART_SECONDS)
    if not config.run.overwrite:
        raise _run_exists(folder)
    for name, path in _weights(config).items():
        if path is not None and Path(path).is_relative_to(os.path.realpath(folder)):
            raise InputError(f"--{name} {path}: would be replaced by --out {folder} --overwrite; choose another --out")
    run = Run(folder, resolve(config), new=False, replaces=True)
    run.lock()
    return run


def _weights(config: Config) -> dict[str, str | None]:
    """Return the trained weights that a run needs, by option."""
    return {"init": config.init.init, "teacher": config.distill.teacher}


def _is_empty(folder: Path) -> bool:
    """Return whether a folder is empty, apart from what a run leaves if it is killed at its start."""
    try:
        return all(path.name in (LOCK, partial_name(Run.CONFIG)) for path in folder.iterdir())
    except OSError as error:
        raise _not_writable(folder, error) from None


def _absolute(data: str) -> str:
    """Return a folder's or zip file's absolute path, so that a run can be resumed from anywhere; a name unchanged."""
    path = os.path.expanduser(data)
    return os.path.realpath(path) if data not in DATASETS and os.path.exists(path) else data


def _create(folder: Path, config: Config) -> Run:
    run = Run(folder, config, new=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        run.lock()
        if run.resumable:  # another process was faster
            run.unlock()
            raise _run_exists(folder)
        run.begin(config)
    except OSError as error:
        run.discard()
        run.unlock()
        raise _not_writable(folder, error) from None
    return run


def _create_numbered(config: Config) -> Run:
    """Create runs/<arch>-<plugins>-<data>, or the first free of -2, -3, ...; simultaneous starts get different ones."""
    plugins = [name for name in PLUGINS if getattr(config.model, name)]
    name = "-".join([config.model.arch, *plugins, os.path.basename(config.data.data)[:64]])
    name = re.sub(r"[/\\:]", "-", name)  # not allowed in folder names on some systems
    for number in count(1):
        folder = Path("runs", name if number == 1 else f"{name}-{number}")
        if not os.path.lexists(folder):
            with suppress(RunExistsError):
                return _create(folder, config)
    raise AssertionError("there is always a free number")


def _run_exists(folder: Path) -> RunExistsError:
    return RunExistsError(f"--out {folder}: holds a run; --resume {folder} continues it, --overwrite replaces it")


def _not_writable(folder: Path, error: OSError) -> InputError:
    return InputError(f"--out {folder}: cannot be written ({error.strerror}); choose another folder")


def _resume(folder: Path, config: Config, timeout: float = 0.0) -> Run:
    """Open a run to resume, with its own options except those that are given and may change."""
    stored = read_config(folder)
    old, new = stored.to_dict(), config.to_dict()
    extended = _extend(folder, stored, config)
    # where both name files, contents are compared instead of names
    paths = [name for name in option_names("path") if not {old[name], new[name]} & {None, *DATASETS}]
    moved = [name for name in (*paths, "more_data") if name in config.given]
    free = {*option_names("resumable", "launch"), *moved, *extended, *(SET_BY_INIT if old["init"] is not None else ())}
    for name in config.given:
        if name not in free and new[name] not in (old[name], "auto" if name in CHOSEN else old[name]):
            raise InputError(
                f"{flag(name)} {new[name]}: the run in {folder} has {old[name]}, which cannot change; remove it"
            )
    changes = {name: new[name] for name in (*option_names("resumable"), *moved) if name in config.given}
    stored = stored.replace(**changes, **extended)
    if not (folder / Run.SUMMARY).exists():
        _require_inputs(folder, stored, {name for name in moved if new[name] != old[name]})
    run = Run(folder, stored, new=False, extends=bool(extended))
    run.lock(timeout)
    return run


def _extend(folder: Path, stored: Config, config: Config) -> dict[str, Any]:
    """Return the changed options of a finished run that is to be trained for more epochs; empty if it is not.

    Raises:
        InputError: The run is finished, and its state was removed.
    """
    before, after = stored.optim.epochs, config.optim.epochs
    finished = (folder / Run.SUMMARY).exists()
    if not (folder / Run.STATE).exists() and (folder / Run.CURVES).exists():  # drawn at the end
        if not finished:
            raise InputError(
                f"--resume {folder}: has weights, but neither {Run.STATE} nor {Run.SUMMARY}; evaluate it with smallvit "
                f"eval {folder}, or start from it with --init {folder}"
            )
        if "epochs" in config.given and after > before:
            raise InputError(
                f"--epochs {after}: the run in {folder} is finished, and its {Run.STATE} was removed (--keep-resume "
                f"keeps it); train from its weights with --init {folder} --epochs {after - before}"
            )
    if not finished or "epochs" not in config.given or after <= before:
        return {}
    summary = Run(folder, stored, new=False).read_summary()
    if stored.optim.max_time or (summary and summary["epochs"] < before):
        raise InputError(
            f"--epochs {after}: the run in {folder} ended by --max-time or --patience; train from its weights with "
            f"--init {folder} --epochs N"
        )
    return {"epochs": after, "sched_start_epoch": before}


def _require_inputs(folder: Path, config: Config, moved: Collection[str]) -> None:
    """Check that the inputs of a resumed run exist, and that moved weights are those it was started with.

    Images are compared when they are read. Before its first checkpoint a run has nothing to compare with.
    """
    state = folder / Run.STATE
    saved = weights_info.read_progress(state) if state.exists() else {}
    inputs = [*_weights(config).items(), ("data", config.data.data)]
    for name, path in [*inputs, *(("more_data", each) for each in config.pretrain.more_data)]:
        needed = name != "init" or not saved
        if name in moved and name in _weights(config):
            card, before = weights_info.read_weights_info(path, flag(name)), saved.get(name)
            if before is not None and before != weights_info.compute_fingerprint(card):
                raise card.error(f"not the weights that the run in {folder} was started with: their contents differ")
        elif name not in moved and needed and path is not None and weights_info.is_missing(path):
            raise InputError(
                f"--resume {folder}: {path} no longer exists; if it has moved, give its path by "
                f"{'all --data again' if name == 'more_data' else flag(name)}"
            )


def inherit_from_init(config: Config) -> Config:
    """Return the configuration with the architecture, plugins, patch size and image size of the weights of --init.

    Plugins that the weights do not have are added.

    Raises:
        InputError: No such weights, or given options that contradict them.
    """
    name = config.init.init
    card = None if name is None else weights_info.read_weights_info(name, "--init")
    if card is None:
        return config if config.model.arch is not None else config.replace(arch=ARCH)
    if card.spec is None:  # a file of another program does not name its model
        return config.replace(arch=config.model.arch or ARCH)
    model = _inherit_model(config.model, card, config.given)
    gradual = any(PLUGINS[name].gradual for name in card.spec.get("plugins", {}))
    closed = {"plugin_warmup_ratio": 0.0} if gradual and model["plugin_init"] == "preserve" else {}
    return config.replace(img_size=config.data.img_size or card.spec["img_size"], **model, **closed)


def _inherit_model(asked_for: ModelConfig, card: WeightsInfo, given: Collection[str]) -> dict[str, Any]:
    """Return the options of the model: those of the weights, and of the plugins and the token added to them."""
    has = flatten_spec(card.spec)
    asked = {field.name: getattr(asked_for, field.name) for field in fields(ModelConfig)}
    added = [name for name in (*PLUGINS, "dist_token") if asked[name] and not has[name]]
    old = any(has[name] for name in PLUGINS)
    plugin_of = {field.name: field.metadata.get("plugin") for field in fields(ModelConfig)}
    options = has | {name: asked[name] for name in (*NOT_INHERITED, *added)}
    for name in asked.keys() - {*NOT_INHERITED, *added}:
        new = name == "plugin_init" and not old
        if new or plugin_of[name] in added or (name == "dist_average" and "dist_token" in added):
            options[name] = asked[name]
        elif plugin_of[name] and not has[plugin_of[name]]:
            continue  # has no effect
        elif name in given and asked[name] not in (has[name], ALIASES.get(has[name]), None):
            if name == "plugin_init" and not PLUGINS.keys() & added:
                continue  # no plugin to initialize
            raise card.error(
                f"has {_format_option(name, has[name])}, not {_format_option(name, asked[name])}; remove it"
            )
    if has["arch"] == ARCH:
        options["fit"] = False  # the smallest images would get another model
    return options


def _format_option(name: str, value: object) -> str:
    """Return an option as given on the command line."""
    if isinstance(value, bool):
        return flag(name) if value else flag(f"no_{name}")
    return f"{flag(name)} {value}"
