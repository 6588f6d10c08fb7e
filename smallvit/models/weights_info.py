"""Read what trained weights say about themselves, without torch and without loading tensors."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smallvit.config.options import CROP_MODES, DataConfig
from smallvit.datasets.catalog import DATASETS
from smallvit.models.architectures import timm_names
from smallvit.runs.run import Run, read_options
from smallvit.utils.errors import InputError, first_line, suggest
from smallvit.utils.files import PICKLED, SUFFIX, is_path, read_safetensors
from smallvit.utils.sizes import parse_size

if TYPE_CHECKING:
    from smallvit.datasets.gray import GrayRanges

ENTRY, FORMAT = "smallvit", 3
"""Key of smallvit's entry in a file's metadata, and its format number."""
PACKED = "packed"
"""Key of the entry that marks one-bit weights as packed, eight to a byte."""
EXPORTED = "model.safetensors"
"""Name of the weights file in a folder that `smallvit export` writes for timm."""
PRETRAINED = ":pretrained"
"""Optional suffix of a timm model's name."""
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes of names saved from DataParallel or DistributedDataParallel, and from torch.compile."""
RESIZING = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
"""How images of other sizes are resized in training, in timm's terms."""


@dataclass(frozen=True, kw_only=True)
class WeightsInfo:
    """What trained weights say about themselves."""

    name: str
    """The name that the user gave."""
    option: str
    """The flag or verb that the name was given to, for error messages."""
    path: Path | None
    """The weights file; None for timm's weights that are not downloaded yet."""
    timm_name: str | None = None
    """timm's name of model and weights, with the tag; None if timm does not build the model."""
    spec: dict[str, Any] | None = None
    """Arguments of `create_model`; None if the file does not name its model."""
    class_names: tuple[str, ...] | None = None
    data: str | None = None
    """Name of the data set that the model was trained on."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resizing: Mapping[str, Any] = field(default_factory=lambda: RESIZING)
    """How images are resized for the model; timm's weights have their own interpolation and crop."""
    training_data: dict[str, Any] | None = None
    """Fingerprint of the training data and its test split, see `ImageDataset.describe_training_data`."""
    gray_ranges: GrayRanges | None = None
    """How gray values of more than 8 bits were scaled in training; None in files of other programs."""
    thresholds: tuple[float, ...] | None = None
    """Probability of each class from which it is predicted, if images have several labels; None if they have one."""
    packed: bool = False
    """Whether one-bit weights are packed: the model can be evaluated but not trained."""

    @property
    def data_options(self) -> dict[str, Any]:
        """Options of the data that the model needs: how images are resized."""
        modes = {mode: resize for resize, mode in CROP_MODES.items()}
        return {"resize": modes.get(self.resizing["crop_mode"], "crop")}

    @property
    def multi_label(self) -> bool:
        """Whether images have several labels: probabilities are sigmoids, and each class has a threshold."""
        return self.thresholds is not None

    def error(self, message: str) -> InputError:
        """Return an error that names the option and the weights."""
        return InputError(f"{self.option} {self.name}: {message}")


def read_weights_info(name: str, option: str) -> WeightsInfo:
    """Read the metadata of trained weights, without their tensors.

    Args:
        name: A run folder (its best weights), a weights file, or a timm model with pretrained weights.
        option: The flag or verb that the name was given to, for error messages.

    Raises:
        InputError: There is no such run, file or model, a run has no weights yet, a file is damaged or not
            safetensors, or a model has no pretrained weights.
    """
    if not is_path(name):
        model = name.removesuffix(PRETRAINED).partition(".")[0]
        if model not in (names := timm_names()):
            run = os.path.join("runs", name)
            hint = f" (did you mean {run!r}?)" if os.path.isdir(run) else suggest(model, names)
            raise InputError(f"{option} {name}: no such file, folder or timm model{hint}")
        from smallvit.models import weights  # timm imports torch

        return weights.read_timm_info(name, option)
    path = Path(os.path.expanduser(name))
    if not os.path.isdir(path):
        return _read_file_info(WeightsInfo(name=name, option=option, path=path))
    info = WeightsInfo(name=name, option=option, path=path / Run.BEST)
    if not os.path.exists(info.path):
        if os.path.exists(exported := path / EXPORTED):
            raise info.error(f"an exported folder; give the file in it, {exported}")
        if os.path.exists(path / Run.CONFIG):
            raise info.error(f"this run has not finished its first epoch: there is no {Run.BEST} yet")
        raise info.error(f"not a run folder: it contains neither {Run.CONFIG} nor {Run.BEST}")
    return _read_file_info(info)


def _read_file_info(info: WeightsInfo) -> WeightsInfo:
    """Add the metadata stored in a file; files of other programs have none."""
    path = info.path
    if not os.path.exists(path):
        raise info.error("no such file or folder")
    if path.suffix in PICKLED:
        raise info.error(f"only {SUFFIX} files are read, since others may run code; convert it where you trust it")
    if path.suffix != SUFFIX:
        raise info.error(f"not a weights file; expected a run folder, a {SUFFIX} file or the name of a timm model")
    try:
        entry = read_safetensors(path)[0].get(ENTRY)
    except (OSError, ValueError) as error:
        raise info.error(f"{path.name} is damaged or not a safetensors file ({first_line(error)})") from None
    if entry is None:
        return info
    from smallvit.datasets.gray import GrayRanges  # takes time to import

    try:
        metadata = json.loads(entry)
        if metadata["format"] != FORMAT:
            raise ValueError
        model, data = metadata["model"], metadata["data"]
        spec = model | {name: int(model[name]) for name in ("in_chans", "num_classes")}
        mean, std = (tuple(map(float, data[name])) for name in ("mean", "std"))
        if not len(mean) == len(std) == spec["in_chans"] or not all(0 < each < math.inf for each in std):
            raise ValueError
        return replace(
            info,
            spec=spec | {"arch": str(model["arch"]), "img_size": parse_size(model["img_size"])},
            class_names=tuple(map(str, data["class_names"])),
            data=str(data["name"]),
            mean=mean,
            std=std,
            resizing=RESIZING | {"crop_mode": CROP_MODES[data.get("resize", "crop")]},
            thresholds=tuple(map(float, data["thresholds"])) if data.get("multi_label") else None,
            packed=bool(metadata.get(PACKED)),
            gray_ranges=None if data.get("gray_ranges") is None else GrayRanges.from_json(data["gray_ranges"]),
            training_data=data.get("training_data"),
        )
    except (KeyError, TypeError, ValueError, RecursionError, AttributeError):
        raise info.error(
            f"{path.name} does not describe a model in format {FORMAT}; it may be from another version of smallvit"
        ) from None


def read_progress(state: Path) -> dict[str, Any]:
    """Return the progress stored in a run's training state (`RunState`, as a dict), without reading tensors.

    Raises:
        InputError: The file is damaged or not a run's training state.
    """
    try:
        metadata = json.loads(read_safetensors(state)[0][ENTRY])
        progress = dict(metadata["progress"])
        if metadata["format"] != FORMAT or not all(isinstance(name, str) for name in progress.get("new", ())):
            raise ValueError("another format")
    except (OSError, KeyError, TypeError, ValueError, RecursionError, AttributeError) as error:
        raise InputError(f"{state}: damaged, or not the checkpoint of a run ({first_line(error)})") from None
    return progress


def compute_fingerprint(info: WeightsInfo) -> str:
    """Return a file's SHA-256, or timm's name of the weights."""
    return compute_sha256(info) or str(info.timm_name)


def compute_sha256(info: WeightsInfo) -> str | None:
    """Return a weights file's SHA-256; None for timm's weights, which their name identifies."""
    if info.path is None:
        return None
    with open(info.path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Tensors' names and shapes


def unwrap(name: str) -> str:
    """Remove the prefixes of wrappers from a tensor's name, in any order."""
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes in a weights file by tensor name, without prefixes of wrappers.

    Raises:
        OSError, ValueError: As `read_safetensors` does.
    """
    return {unwrap(name): shape for name, shape in read_safetensors(path)[1].items()}


# The data of the run that weights belong to


def read_data_options(name: str) -> dict[str, Any] | None:
    """Return the data options of the run that weights belong to, but for the image size; None without a run.

    Args:
        name: A run folder, a file in it, or the name of a timm model.

    Raises:
        InputError: The run's configuration is damaged.
    """
    if not is_path(name):
        return None
    path = Path(os.path.expanduser(name))
    file = (path if os.path.isdir(path) else path.parent) / Run.CONFIG
    if not os.path.exists(file):
        return None
    options = read_options(file)
    names = {option.name for option in fields(DataConfig)} - {"img_size"}
    return {name: value for name, value in options.items() if name in names}


def add_data_options(info: WeightsInfo, options: Mapping[str, Any]) -> dict[str, Any]:
    """Add the data options of the run that weights belong to, unless `options` name a data set.

    Raises:
        InputError: `options` name none, and the weights belong to no run or its data has moved.
    """
    if "data" in options:
        return dict(options)
    if (own := read_data_options(info.name)) is None:
        raise info.error("not a run folder, so the data set is unknown; add --data")
    check_data_exists(info, own["data"])
    return own | options


def check_data_exists(info: WeightsInfo, data: str) -> None:
    """Check that the data of the run that weights belong to has not moved.

    Raises:
        InputError: It has, or was removed.
    """
    if is_missing(data):
        raise info.error(f"its data is no longer at {data}; if it has moved, add --data")


def is_missing(path: str) -> bool:
    """Return whether an absolute path does not exist."""
    return os.path.isabs(path) and not os.path.exists(path)


def is_training_data(data: str, options: Mapping[str, Any] | None) -> bool:
    """Return whether `--data` names the data set in a run's options."""
    path = os.path.expanduser(data)
    named = data in DATASETS or not os.path.exists(path)
    return options is not None and options.get("data") == (data if named else os.path.realpath(path))
