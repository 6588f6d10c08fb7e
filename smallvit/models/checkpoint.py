"""Write and read smallvit's checkpoints: weights files and training states, all in safetensors.

A weights file has one metadata entry, `smallvit`, a JSON object:

    format      number of this format
    model       arguments of `create_model`
    data        normalization, class names, and which data the model was trained on
    epoch, val_top1
    packed      whether one-bit weights are packed by `plugins.pack`

Nothing in a file is ever executed. Equal weights give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from smallvit.config.options import CROP_MODES
from smallvit.models.factory import create_model
from smallvit.models.weights_info import ENTRY, FORMAT, PACKED, RESIZING, unwrap
from smallvit.utils.distributed import distribute_like, full_tensor
from smallvit.utils.errors import InputError, first_line
from smallvit.utils.files import atomic_write
from smallvit.utils.sizes import height_width

MAX_REASON = 200
"""Maximum length of an error message of torch, in characters."""


def snapshot(module: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Copy a module's state to the CPU, gathered if it is sharded over several devices.

    Args:
        module: The module.
        keep: Whether this process keeps the copy; else it only takes part in gathering, and returns nothing.
    """
    gathered = ((name, _gather(value, keep)) for name, value in module.state_dict().items())
    return {name: value.clone() for name, value in gathered if value is not None}


def load_tensors(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a snapshot into a module, sharded as the module is.

    Raises:
        RuntimeError: Names or shapes differ.
    """
    current = module.state_dict()
    module.load_state_dict({name: distribute_like(value, current.get(name, value)) for name, value in weights.items()})


def save_weights(path: Path, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a weights file atomically.

    Raises:
        OSError: The file cannot be written.
    """
    with atomic_write(path) as partial:
        entry = json.dumps({"format": FORMAT, **metadata}, sort_keys=True)
        try:
            save_file(weights, partial, {ENTRY: entry})
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from None


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights and metadata of a file that `save_weights` wrote, without prefixes of wrappers.

    Raises:
        InputError: The file does not exist, is damaged, or was written by another program.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {})[ENTRY])
            weights = {unwrap(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except KeyError:
        raise InputError(f"{path}: not a smallvit checkpoint (no {ENTRY!r} in its metadata)") from None
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged or not a safetensors file ({error})") from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise InputError(f"{path}: not in checkpoint format {FORMAT}; it needs another version of smallvit")
    return weights, metadata


def load_model(run: str | Path, weights: str = "best") -> nn.Module:
    """Load a trained model from a run folder or a weights file, in evaluation mode, on the CPU.

    The model's `pretrained_cfg` has the input size, mean, standard deviation and class names as in timm, so
    `timm.data.resolve_model_data_config(model)` returns the preprocessing.

    Args:
        run: A run folder or a weights file.
        weights: "best" or "last", of a folder.

    Raises:
        InputError: There is no such run or file, or its weights do not fit its metadata.
    """
    from smallvit.plugins.patch import misfit

    path = Path(run).expanduser()
    path = path / f"{weights}.safetensors" if path.is_dir() else path
    tensors, metadata = load_weights(path)
    try:
        model = create_model(**metadata["model"])
        if metadata.get(PACKED):
            from smallvit.plugins.binary_packing import pack  # rarely needed

            pack(model)
        if reason := misfit(tensors, model.state_dict()):
            raise ValueError(reason)
        model.load_state_dict(tensors)
        model.pretrained_cfg = to_pretrained_cfg(metadata)
    except Exception as error:  # constructors raise anything for unusual arguments
        raise InputError(f"{path}: weights and metadata do not fit ({shorten(error)})") from None
    return model.eval()


def shorten(error: Exception) -> str:
    """Return the beginning of an error message in one line; torch's name every key that does not fit."""
    return textwrap.shorten(str(error) or type(error).__name__, MAX_REASON, placeholder=" ...")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a safetensors file, without prefixes of wrappers."""
    return {unwrap(name): value for name, value in load_file(path).items()}


def to_pretrained_cfg(metadata: dict[str, Any]) -> dict[str, Any]:
    """Convert a checkpoint's metadata to timm's `pretrained_cfg`."""
    model, data = metadata["model"], metadata["data"]
    ranges = data.get("gray_ranges") or {}
    return ({"gray_ranges": ranges} if any(ranges.values()) else {}) | {
        "architecture": model["arch"],
        "num_classes": model["num_classes"],
        "input_size": (model["in_chans"], *height_width(model["img_size"])),
        "mean": tuple(data["mean"]),
        "std": tuple(data["std"]),
        "label_names": tuple(data["class_names"]),
        **RESIZING,
        "crop_mode": CROP_MODES[data.get("resize", "crop")],
    }


def gather_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: ModelEmaV3 | None, *, keep: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Gather the weights, their average and the optimizer's state to resume from.

    Args:
        model: The model.
        optimizer: Its optimizer.
        average: The moving average of the weights.
        keep: Whether this process keeps the tensors; see `snapshot`.

    Returns:
        The tensors, and the optimizer's plain numbers.
    """
    tensors = {f"model.{name}": value for name, value in snapshot(model, keep=keep).items()}
    if average is not None:
        tensors |= {f"average.{name}": value for name, value in snapshot(average.module, keep=keep).items()}
    numbers: dict[str, Any] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if not isinstance(value, Tensor):
                numbers[f"{index}.{name}"] = value
            elif (gathered := _gather(value, keep)) is not None:
                tensors[f"optimizer.{index}.{name}"] = gathered
    groups = [
        {
            name: value.item() if isinstance(value, Tensor) else value
            for name, value in group.items()
            if _is_number(value)
        }
        for group in optimizer.param_groups
    ]
    return tensors, {"numbers": numbers, "groups": groups}


def save_state(path: Path, state: tuple[dict[str, Tensor], dict[str, Any]], progress: dict[str, Any]) -> None:
    """Write a training state of `gather_state` and the run's progress."""
    tensors, numbers = state
    save_weights(path, tensors, {"progress": progress, "optimizer": numbers, "layout": _hash_layout(tensors)})


def load_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: ModelEmaV3 | None
) -> dict[str, Any] | None:
    """Load a training state that `save_state` wrote, in place.

    Returns:
        The run's progress; None if there is no such file.

    Raises:
        InputError: The file is damaged or belongs to another model.
    """
    if not path.exists():
        return None
    tensors, metadata = load_weights(path)
    state: dict[int, dict[str, Any]] = {}
    try:
        if metadata["layout"] != _hash_layout(tensors):
            raise ValueError("tensors are missing or have changed")
        load_tensors(model, _select("model.", tensors))
        if average is not None:
            load_tensors(average.module, _select("average.", tensors))
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for name, value in (_select("optimizer.", tensors) | metadata["optimizer"]["numbers"]).items():
            index, key = name.split(".", 1)
            if isinstance(value, Tensor):
                value = distribute_like(value, parameters[int(index)])
            state.setdefault(int(index), {})[key] = value
        groups = list(zip(optimizer.state_dict()["param_groups"], metadata["optimizer"]["groups"], strict=True))
        if not all(_is_number(value) for _, saved in groups for value in saved.values()):
            raise TypeError("the optimizer's settings are not numbers")
        optimizer.load_state_dict({"state": state, "param_groups": [group | saved for group, saved in groups]})
        return dict(metadata["progress"])
    except (KeyError, IndexError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: does not fit this run ({first_line(error)})") from None


def _hash_layout(tensors: dict[str, Tensor]) -> str:
    """Return a hash of the tensors' names and shapes."""
    return hashlib.sha256(repr(sorted((name, *value.shape) for name, value in tensors.items())).encode()).hexdigest()


def _is_number(value: object) -> bool:
    """Return whether a parameter group's entry is a number, such as LAMB's count of steps."""
    return value.numel() == 1 if isinstance(value, Tensor) else type(value) in (int, float)


def _gather(value: Tensor, keep: bool) -> Tensor | None:
    """Return a full, contiguous tensor on the CPU; None if this process does not keep it."""
    full = full_tensor(value.detach())
    return full.cpu().contiguous() if keep else None


def _select(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names have a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
