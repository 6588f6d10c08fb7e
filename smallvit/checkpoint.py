"""Saving, loading and resuming, all in safetensors: nothing in a file is ever executed.

A weights file carries one metadata entry, `smallvit`, a JSON object whose `model` are the arguments of
`create_model`, whose `data` say how images are normalised and what the classes are called, and whose `epoch` and
`val_top1` say where the weights come from; where `packed` is true, one-bit weights are packed as by `plugins.pack`.
Equal weights make equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from smallvit.distributed import spread_like, whole
from smallvit.errors import InputError, first_line
from smallvit.files import replacing
from smallvit.models import create_model
from smallvit.plugins import pack
from smallvit.trained import ENTRY, FORMAT, PACKED

REASON = 200
"""Characters that torch's list of misfit weights is cut to."""


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state on the CPU, whole where it is spread over several devices."""
    return {name: _packed(value).clone() for name, value in module.state_dict().items()}


def fill(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a snapshot into a module, spread as it is.

    Raises:
        RuntimeError: names or shapes differ.
    """
    present = module.state_dict()
    module.load_state_dict({name: spread_like(value, present.get(name, value)) for name, value in weights.items()})


def save_weights(path: Path, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a weights file, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as partial:
        entry = json.dumps({"format": FORMAT, **metadata}, sort_keys=True)
        try:
            save_file(weights, partial, {ENTRY: entry})
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from None


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and metadata of a file that `save_weights` wrote.

    Raises:
        InputError: no such file, a damaged one, or another program's.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {})[ENTRY])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except KeyError:
        raise InputError(f"{path}: not a smallvit checkpoint (no {ENTRY!r} in its metadata)") from None
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged or not a safetensors file ({error})") from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise InputError(f"{path}: not of checkpoint format {FORMAT}; it needs another version of smallvit")
    return weights, metadata


def load(run: str | Path, weights: str = "best") -> nn.Module:
    """Rebuild a trained model from a run's folder (or a weights file), in evaluation mode, on the CPU.

    `weights`: best or last, for a folder. The model's `pretrained_cfg` holds input size, mean, standard
    deviation and class names as timm's do, so `timm.data.resolve_model_data_config(model)` gives the
    preprocessing.

    Raises:
        InputError: no such run or file, or one that does not fit together.
    """
    path = Path(run).expanduser()
    path = path / f"{weights}.safetensors" if path.is_dir() else path
    tensors, metadata = load_weights(path)
    try:
        model = create_model(**metadata["model"])
        if metadata.get(PACKED):
            pack(model)
        model.load_state_dict(tensors)
        model.pretrained_cfg = timm_config(metadata)
    except Exception as error:  # whatever a constructor raises at arguments that nobody would write
        reason = textwrap.shorten(str(error) or type(error).__name__, REASON, placeholder=" ...")
        raise InputError(f"{path}: weights and metadata do not fit ({reason})") from None
    return model.eval()


def timm_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's metadata in the form of timm's `pretrained_cfg`."""
    model, data = metadata["model"], metadata["data"]
    return {
        "architecture": model["arch"],
        "num_classes": model["num_classes"],
        "input_size": (model["in_chans"], model["img_size"], model["img_size"]),
        "mean": tuple(data["mean"]),
        "std": tuple(data["std"]),
        "label_names": tuple(data["class_names"]),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }


def gather_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: ModelEmaV3 | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is needed to go on: weights, their average and the optimiser's state; its plain numbers come apart."""
    tensors = {f"model.{name}": value for name, value in snapshot(model).items()}
    if average is not None:
        tensors |= {f"average.{name}": value for name, value in snapshot(average.module).items()}
    numbers: dict[str, Any] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = _packed(value)
            else:
                numbers[f"{index}.{name}"] = value
    groups = [
        {name: value.item() if isinstance(value, Tensor) else value for name, value in group.items() if _counts(value)}
        for group in optimizer.param_groups
    ]
    return tensors, {"numbers": numbers, "groups": groups}


def save_state(path: Path, state: tuple[dict[str, Tensor], dict[str, Any]], progress: dict[str, Any]) -> None:
    """Write what `gather_state` found, and `progress` (JSON)."""
    tensors, numbers = state
    save_weights(path, tensors, {"progress": progress, "optimizer": numbers, "form": _form(tensors)})


def load_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: ModelEmaV3 | None
) -> dict[str, Any] | None:
    """Take up what `save_state` wrote, in place; returns its `progress`, or None if nothing was written yet.

    Raises:
        InputError: the file is damaged or belongs to another model.
    """
    if not path.exists():
        return None
    tensors, metadata = load_weights(path)
    state: dict[int, dict[str, Any]] = {}
    try:
        if metadata["form"] != _form(tensors):
            raise ValueError("tensors are missing, or are not those that were saved")
        fill(model, _under("model.", tensors))
        if average is not None:
            fill(average.module, _under("average.", tensors))
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for name, value in (_under("optimizer.", tensors) | metadata["optimizer"]["numbers"]).items():
            index, key = name.split(".", 1)
            if isinstance(value, Tensor):
                value = spread_like(value, parameters[int(index)])
            state.setdefault(int(index), {})[key] = value
        groups = list(zip(optimizer.state_dict()["param_groups"], metadata["optimizer"]["groups"], strict=True))
        if not all(_counts(value) for _, saved in groups for value in saved.values()):
            raise TypeError("the optimiser's settings are not numbers")
        optimizer.load_state_dict({"state": state, "param_groups": [group | saved for group, saved in groups]})
        return dict(metadata["progress"])
    except (KeyError, IndexError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: does not fit this run ({first_line(error)})") from None


def _form(tensors: dict[str, Tensor]) -> str:
    """A hash of the tensors' names and shapes."""
    return hashlib.sha256(repr(sorted((name, *value.shape) for name, value in tensors.items())).encode()).hexdigest()


def _counts(value: object) -> bool:
    """Whether a parameter group's entry is a number, such as LAMB's count of steps."""
    return value.numel() == 1 if isinstance(value, Tensor) else type(value) in (int, float)


def _packed(value: Tensor) -> Tensor:
    """A whole tensor on the CPU, laid out as files want it."""
    return whole(value.detach()).cpu().contiguous()


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
