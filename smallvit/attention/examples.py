"""A few images to look at: some of a split, evenly spread over its classes, or files.

Axes: n images, c channels, s image size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt8
from rich.console import Console

from smallvit.datasets.decode import decode_image, reason
from smallvit.datasets.images import ImageDataset, Images
from smallvit.datasets.streaming import Files
from smallvit.errors import InputError
from smallvit.predicting import decode

Pixels = UInt8[np.ndarray, "c s s"]


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image, and what is known of it."""

    pixels: Pixels
    source: str
    """Its file, or its place in a split."""
    label: str | None = None
    """The name of its class."""


def of_split(dataset: ImageDataset, split: str, count: int, console: Console) -> list[Example]:
    """`count` images of a split, or all where there are fewer; those that cannot be decoded are named and left out.

    Raises:
        InputError: there are none.
    """
    images: Images | Files = getattr(dataset, split)
    found = []
    for index in spread(images.labels.numpy(), count):
        label = dataset.class_names[images.labels[index]]
        if isinstance(images, Images):
            source, pixels = f"{dataset.name} {split} {index}", images.pixels[index].numpy()
        else:
            source, pixels = _of_listing(images, index, console)
        if pixels is not None:
            found.append(Example(pixels=pixels, source=source, label=label))
    if not found:
        raise InputError(f"--split {split}: {dataset.name} has no images there that can be used")
    return found


def of_files(paths: Sequence[str], size: int, channels: int, console: Console) -> list[Example]:
    """Image files as `predict` decodes them; those that cannot be are named and left out.

    Raises:
        InputError: a file is not there, or none can be decoded.
    """
    for path in paths:
        if not os.path.isfile(path):
            raise InputError(f"{path}: {'a folder, not an image' if os.path.isdir(path) else 'no such image'}")
    tried = [(path, _tried(lambda path=path: decode(path, size, channels), path, console)) for path in paths]
    found = [Example(pixels=pixels, source=path) for path, pixels in tried if pixels is not None]
    if not found:
        raise InputError("none of the images can be decoded")
    return found


def spread(labels: Int64[np.ndarray, " n"], count: int) -> list[int]:
    """Positions of `count` images, or of all, by class: of as many classes as can be, each about equally often."""
    order = np.argsort(labels, kind="stable")
    turns = np.arange(len(order)) - np.searchsorted(labels[order], labels[order])  # its class's images before each
    order, sizes = order[np.argsort(turns, kind="stable")], np.bincount(turns)
    whole = np.searchsorted(sizes.cumsum(), count, side="right")  # turns of which all images are taken
    first = sizes[:whole].sum()
    rest = order[first : first + sizes[whole : whole + 1].sum()]
    picked = np.linspace(0, len(rest) - 1, min(len(rest), count - first)).round().astype(int)
    chosen = np.concatenate([order[:first], rest[picked]])
    return chosen[np.lexsort((chosen, labels[chosen]))].tolist()


def _of_listing(images: Files, index: int, console: Console) -> tuple[str, Pixels | None]:
    """The name and, if it can be decoded, the pixels of an image on disk."""
    file = int(images.positions[index])
    path = images.listing.paths[file]
    return path, _tried(lambda: decode_image(images.listing.open(file), images.size), path, console)


def _tried(decoding: Callable[[], Pixels], path: str, console: Console) -> Pixels | None:
    try:
        return decoding()
    except Exception as error:  # whatever a damaged file provokes
        said = f"left out: {path} ({reason(error, path)})"
        console.print(said, markup=False, emoji=False, highlight=False, soft_wrap=True)
        return None
