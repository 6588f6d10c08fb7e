"""Data sets by name, from their archives to tensors: CIFAR, SVHN, MNIST, Fashion-MNIST.

Files are read by torchvision, after their checksums were found right: CIFAR's are pickles, which run what they hold.
Each data set has a folder of its own, which may hold the archives, or the unpacked files alone as torchvision lays
them out (cifar-10-batches-py/, cifar-100-python/, MNIST/raw/, FashionMNIST/raw/).

Axes: n images, c channels, h w pixels.
"""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST
from torchvision.datasets.utils import check_integrity

from smallvit.datasets.archives import unpack_gzip, unpack_tar
from smallvit.datasets.download import fetch, locked
from smallvit.datasets.table import DATASETS
from smallvit.errors import InputError, first_line

DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class Arrays:
    """The published training and test images of a data set."""

    train_pixels: UInt8[Tensor, "n c h w"]
    train_labels: Int64[Tensor, " n"]
    test_pixels: UInt8[Tensor, "m c h w"]
    test_labels: Int64[Tensor, " m"]
    class_names: tuple[str, ...]


def read(name: str, folder: Path, mirror: str | None = None) -> Arrays:
    """Read a data set from its folder in `folder`, fetching and unpacking what is missing.

    `mirror` is what --data-url says.

    Raises:
        InputError: a file is missing and cannot be had, has another checksum or cannot be read.
    """
    reader, home = READERS[name]
    try:
        return reader(name, folder / home, mirror)
    except (OSError, RuntimeError) as error:
        raise InputError(f"--data {name}: {folder / home} cannot be read ({first_line(error)})") from None


def _read_cifar(name: str, home: Path, mirror: str | None) -> Arrays:
    reader = CIFAR10 if name == "cifar10" else CIFAR100
    base = home / reader.base_folder
    if not _whole_cifar(reader, base):
        (archive,) = fetch(home.name, DATASETS[name].archives, home, mirror)
        with locked(home, f"unpacks {home.name}"):
            if not _whole_cifar(reader, base):
                unpack_tar(archive, base, home.name)
    train, test = reader(home, train=True), reader(home, train=False)
    labels, class_names = (train.targets, test.targets), train.classes
    if name == "cifar100-coarse":
        labels = [_unpickle(base / part)["coarse_labels"] for part in ("train", "test")]
        class_names = _unpickle(base / "meta")["coarse_label_names"]
    pixels = (part.data.transpose(0, 3, 1, 2) for part in (train, test))
    return _arrays(pixels, labels, class_names)


def _whole_cifar(reader: type[CIFAR10], base: Path) -> bool:
    files = [*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])]
    return all(check_integrity(base / file, md5) for file, md5 in files)


def _unpickle(path: Path) -> dict[str, list]:
    """One of CIFAR's files, whose checksum was found right."""
    with open(path, "rb") as file:
        return pickle.load(file, encoding="latin1")


def _read_svhn(name: str, home: Path, mirror: str | None) -> Arrays:
    fetch(home.name, DATASETS[name].archives, home, mirror)
    train, test = ([SVHN(home, split) for split in splits] for splits in (SVHN_TRAIN[name], ("test",)))
    pixels = (np.concatenate([part.data for part in parts]) for parts in (train, test))
    labels = (np.concatenate([part.labels for part in parts]) for parts in (train, test))
    return _arrays(pixels, labels, DIGITS)


def _read_mnist(name: str, home: Path, mirror: str | None) -> Arrays:
    reader = MNIST if name == "mnist" else FashionMNIST
    archives = DATASETS[name].archives
    targets = [home / reader.__name__ / "raw" / Path(archive.file).stem for archive in archives]
    if not all(map(_whole_idx, targets)):
        packed = fetch(name, archives, home, mirror)
        with locked(home, f"unpacks {name}"):
            for archive, target in zip(packed, targets, strict=True):
                if not _whole_idx(target):
                    unpack_gzip(archive, target, f"{name}, {target.name}")
    train, test = reader(home, train=True), reader(home, train=False)
    pixels = (part.data[:, None].numpy() for part in (train, test))
    class_names = DIGITS if name == "mnist" else reader.classes
    return _arrays(pixels, (train.targets, test.targets), class_names)


def _whole_idx(path: Path) -> bool:
    """Whether a file of MNIST's format is as long as its header says; unpacked, it has no published checksum."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        header = file.read(16)
    axes = header[3] if header[:3] == b"\0\0\x08" and len(header) > 3 else 0  # bytes, and how many axes
    shape = struct.unpack_from(f">{axes}I", header, 4) if len(header) >= 4 + 4 * axes else (-1,)
    return bool(axes) and path.stat().st_size == 4 + 4 * axes + math.prod(shape)


def _arrays(pixels: Iterable[np.ndarray], labels: Iterable[object], class_names: Sequence[str]) -> Arrays:
    train_pixels, test_pixels = (torch.from_numpy(np.ascontiguousarray(part)) for part in pixels)
    train_labels, test_labels = (torch.as_tensor(part, dtype=torch.int64) for part in labels)
    return Arrays(train_pixels, train_labels, test_pixels, test_labels, tuple(class_names))


SVHN_TRAIN = {"svhn": ("train",), "svhn-extra": ("train", "extra")}

READERS: dict[str, tuple[Callable[[str, Path, str | None], Arrays], str]] = {
    "cifar10": (_read_cifar, "cifar10"),
    "cifar100": (_read_cifar, "cifar100"),
    "cifar100-coarse": (_read_cifar, "cifar100"),
    "svhn": (_read_svhn, "svhn"),
    "svhn-extra": (_read_svhn, "svhn"),
    "mnist": (_read_mnist, "mnist"),
    "fashion-mnist": (_read_mnist, "fashion-mnist"),
}
"""Of each data set its reader, and the name of its folder and of its place on mirrors."""
