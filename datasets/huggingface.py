"""Read data sets of the Hugging Face Hub, or folders that its `datasets` package reads, into memory.

Their splits are called train, validation (val, valid) and test. A split without labels (-1) is not used.
"""

from __future__ import annotations

import io
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smallvit.config.options import DataConfig
from smallvit.datasets.dataset import Images
from smallvit.datasets.decode import NO_RANGES, decode_image, run_in_threads
from smallvit.datasets.gray import GrayRanges
from smallvit.utils.errors import InputError, first_line
from smallvit.utils.hardware import require_memory

SPLITS = {"train": ("train",), "val": ("validation", "val", "valid"), "test": ("test",)}
DEFAULT_SIZE = 64
"""Default height and width in pixels; the size of the images is not known beforehand."""


def absolute(data: str) -> str:
    """Return hfds/DIR with the absolute path of the folder; hfds/NAME unchanged."""
    kind, _, name = data.partition("/")
    folder = os.path.expanduser(name)
    return f"{kind}/{os.path.realpath(folder)}" if os.path.isdir(folder) else data


def read(
    config: DataConfig, folder: Path, ranges: GrayRanges = NO_RANGES
) -> tuple[dict[str, Images], tuple[str, ...], list[str]]:
    """Return the images of each split, the class names, and notes.

    Args:
        folder: Folder for downloads.
        ranges: Ranges of gray values of more than 8 bits; by default 0 to 65,535, of floats 0 to 1.

    Raises:
        InputError: the source has no training split or cannot be read, or the package is missing.
    """
    data = absolute(config.data)
    if config.streaming == "on":
        raise InputError(f"--streaming on: {data} is read into memory; only image files can be streamed")
    try:
        hub = import_module("datasets")
    except ImportError:
        raise InputError(f"--data {data}: needs a package: pip install datasets") from None
    try:
        source = hub.load_dataset(data.partition("/")[2], cache_dir=str(folder / "hfds"))
    except Exception as error:  # the package raises anything
        raise InputError(f"--data {data}: cannot be read ({first_line(error)})") from None
    if "train" not in source:
        raise InputError(f"--data {data}: has no split train, only {', '.join(source)}")
    features = source["train"].features
    if not {"image", "label"} <= features.keys():
        raise InputError(f"--data {data}: its columns are {', '.join(features)}; expected image and label")
    parts, notes = {}, []
    for split, names in SPLITS.items():
        rows = next((source[name] for name in names if name in source), None)
        if rows is None:
            continue
        labels = torch.tensor(rows["label"][:])
        if labels.min() >= 0:
            parts[split] = Images(_decode(split, rows, config, ranges), labels)
        elif split == "train":
            raise InputError(f"--data {data}: the training images have no labels")
        else:
            notes.append(f"{split}: no labels, not used")
    count = 1 + max(int(part.labels.max()) for part in parts.values())
    return parts, tuple(getattr(features["label"], "names", None) or map(str, range(count))), notes


def _decode(split: str, rows: Any, config: DataConfig, ranges: GrayRanges) -> torch.Tensor:
    image_files = import_module("datasets").Image(decode=False)
    rows, size = rows.cast_column("image", image_files), config.img_size or DEFAULT_SIZE
    require_memory(len(rows), 3, size)
    pixels = np.empty((len(rows), 3, size, size), dtype=np.uint8)

    def decode(index: int) -> None:
        image = rows[index]["image"]
        file = io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]
        pixels[index] = decode_image(file, size, ranges, config.max_megapixels)

    errors = run_in_threads(decode, range(len(rows)), [config.data] * len(rows), f"decoding {split}")
    for index, reason in sorted(errors.items()):
        raise InputError(f"--data {absolute(config.data)}: image {index + 1} of {split}: {reason}")
    return torch.from_numpy(pixels)
