"""Copy the arrays of a nested structure to a device at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")
ALIGNMENT = 8
"""Bytes to which arrays are aligned in the common buffer; the size of the largest items."""


def upload(tree: T, device: torch.device) -> T:
    """Return a structure of dataclasses, tuples and dictionaries with its NumPy arrays as tensors on the device.

    They are packed into one buffer, since each copy costs a launch. Other values, such as tensors, remain.
    """
    arrays: list[np.ndarray] = []
    _map(tree, lambda array: arrays.append(np.ascontiguousarray(array)))
    tensors = iter(_copy(arrays, device))
    return _map(tree, lambda _: next(tensors))


def _map(tree: Any, function: Callable[[np.ndarray], Any]) -> Any:
    """Apply a function to all arrays of a structure, in order."""
    if isinstance(tree, np.ndarray):
        return function(tree)
    if isinstance(tree, tuple):
        return tuple(_map(each, function) for each in tree)
    if isinstance(tree, dict):
        return {key: _map(each, function) for key, each in tree.items()}
    if dataclasses.is_dataclass(tree):
        names = (each.name for each in dataclasses.fields(tree))
        return type(tree)(**{name: _map(getattr(tree, name), function) for name in names})
    return tree


def _copy(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Return contiguous arrays as tensors on the device, views of one buffer."""
    starts = np.cumsum([0, *(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays)]).tolist()
    parts = [slice(start, start + array.nbytes) for start, array in zip(starts, arrays, strict=False)]
    buffer = np.empty(starts[-1] + ALIGNMENT, dtype=np.uint8)  # torch takes no views of an empty one
    for part, array in zip(parts, arrays, strict=True):
        buffer[part] = array.reshape(-1).view(np.uint8)
    packed = torch.from_numpy(buffer)
    packed = packed.pin_memory() if device.type == "cuda" and torch.cuda.is_available() else packed
    moved = packed.to(device, non_blocking=True)
    return [
        moved[part].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
        for part, array in zip(parts, arrays, strict=True)
    ]
