"""Data sets that timm's readers read, decoded into memory.

    hfds/NAME    a data set of the Hugging Face Hub, or a folder that its `datasets` package reads
    wds/DIR      WebDataset shards, with an _info.json that lists the splits
    tfds/NAME    a data set of TensorFlow Datasets

Splits are called train, validation (val, valid) and test there. A test split without labels (-1) is not used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.progress import track
from timm.data import create_dataset
from torch.utils.data import IterableDataset

from smallvit.datasets.decode import decode_image, fit, reason, to_rgb
from smallvit.datasets.images import Images
from smallvit.datasets.memory import require_memory
from smallvit.errors import InputError, first_line
from smallvit.options import DataConfig

PACKAGES = {"hfds": ("datasets",), "wds": ("webdataset",), "tfds": ("tensorflow_datasets", "tensorflow")}
"""What each reader needs to have installed."""
SPLITS = {"train": ("train",), "val": ("validation", "val", "valid"), "test": ("test",)}
DEFAULT_SIZE = 64
"""Side in pixels where the user names none; these sources say nothing of their images."""


def is_source(data: str) -> bool:
    """Whether `data` is of this kind, hfds/NAME and so on."""
    kind, _, place = data.partition("/")
    return kind in PACKAGES and bool(place)


def absolute(data: str) -> str:
    """The same source, a folder by its absolute path, so that it is found from anywhere."""
    kind, _, place = data.partition("/")
    folder = os.path.expanduser(place)
    return f"{kind}/{os.path.realpath(folder)}" if os.path.isdir(folder) else data


def read(config: DataConfig, folder: Path) -> tuple[dict[str, Images], tuple[str, ...], list[str]]:
    """The splits that the source has, the names of its classes, and notes; downloads lie in `folder`.

    Raises:
        InputError: the source has no training split or cannot be read, or a package is missing.
    """
    data = absolute(config.data)
    if config.streaming == "on":
        raise InputError(f"--streaming on: {data} is read into memory; only files of images are streamed")
    kind = data.partition("/")[0]
    missing = [package for package in PACKAGES[kind] if not _is_installed(package)]
    if missing:
        raise InputError(f"--data {data}: needs a package: pip install {' '.join(missing).replace('_', '-')}")
    parts: dict[str, Images] = {}
    classes: dict[int, str] = {}
    notes = []
    for split, names in SPLITS.items():
        source = _open(data, kind, folder, names)
        if source is None:
            continue
        part = _decode(data, split, source, config.img_size or DEFAULT_SIZE)
        if split != "train" and part.labels.min() < 0:
            notes.append(f"{split}: without labels, not used")
            continue
        classes |= {number: str(name) for name, number in (getattr(source.reader, "class_to_idx", None) or {}).items()}
        parts[split] = part
    if parts["train"].labels.min() < 0:
        raise InputError(f"--data {data}: its training images have no labels")
    count = 1 + max([*classes, *(int(part.labels.max()) for part in parts.values())])
    return parts, tuple(classes.get(number, str(number)) for number in range(count)), notes


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # imported, in some other way
        return True


def _open(data: str, kind: str, folder: Path, splits: tuple[str, ...]) -> Any | None:
    """timm's data set of the first of these splits that is there; none, if it is not the training split."""
    place = data.partition("/")[2]
    root = place if kind == "wds" else str(folder / kind)
    why: Exception | None = None
    for split in splits:
        try:
            return create_dataset(f"{kind}/{place}", root=root, split=split, download=kind == "tfds", input_img_mode="")
        except Exception as error:  # whatever three libraries raise
            why = error
    if splits == SPLITS["train"]:
        raise InputError(f"--data {data}: cannot be read ({first_line(why)})")
    return None


def _decode(data: str, split: str, source: Any, size: int) -> Images:
    count = len(source)
    require_memory(count, 3, size)
    pixels, labels = [], []
    try:
        for image, label in track(_items(source, size), f"decoding {split}", total=count or None):
            pixels.append(image)
            labels.append(int(label))
    except Exception as error:  # whatever a damaged image or shard provokes
        raise InputError(f"--data {data}: image {len(pixels) + 1} of {split}: {reason(error, data)}") from None
    if len(pixels) < max(1, count):
        raise InputError(f"--data {data}: only {len(pixels)} of {count} images of {split} can be read")
    return Images(torch.from_numpy(np.stack(pixels)), torch.tensor(labels))


def _items(source: Any, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Decoded images and labels, from the reader itself: timm's data set passes over what it cannot decode."""
    if isinstance(source, IterableDataset):
        for image, label in source.reader:
            image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
            yield fit(to_rgb(ImageOps.exif_transpose(image)), size), label
        return
    rows = source.reader.dataset
    if len(rows) and ("label" not in rows.features or rows[0]["image"] is None):  # timm adds the image, if it lacks
        raise ValueError(f"its columns are {', '.join(rows.features)}; expected image and label")
    for index in range(len(source)):
        file, label = source.reader[index]
        with file:
            yield decode_image(file, size), label
