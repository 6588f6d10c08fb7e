"""Folders of class folders: which files belong to which class and split.

    DIR/train/<class>/...  with DIR/val and/or DIR/test         splits as they are
    DIR/train/<class>/...  or DIR/<class>/...                   splits drawn from the images

Class folders are numbered in the order of their names; images may lie in folders within them.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from smallvit.config import InputError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Listing:
    """The image files of a folder: path, class number and split of each, in a fixed order."""

    root: Path
    class_names: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    splits: tuple[str, ...]
    """Of each file: train, val or test; 'all' where the folder has no such level."""

    def fingerprint(self) -> str:
        """A hash of every file's relative path, class, size and time of change."""
        digest = hashlib.sha256()
        for path, label in zip(self.paths, self.labels, strict=True):
            status = os.stat(path)
            relative = os.path.relpath(path, self.root)
            digest.update(f"{relative}\0{label}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "replace"))
        return digest.hexdigest()


def list_folder(root: Path) -> Listing:
    """Find the images of a data folder.

    Raises:
        InputError: no such folder, fewer than two classes, a class folder without images, or a split with
            classes that the training split lacks.
    """
    if not root.is_dir():
        raise InputError(f"--data {root}: no such folder")
    splits = [split for split in SPLITS if (root / split).is_dir()] if (root / "train").is_dir() else ["all"]
    folders = {split: root if split == "all" else root / split for split in splits}
    class_names = _class_folders(folders[splits[0]])
    numbers = {name: number for number, name in enumerate(class_names)}
    files: list[tuple[str, int, str]] = []
    for split, folder in folders.items():
        strange = sorted(set(_class_folders(folder)) - set(class_names))
        if strange:
            raise InputError(f"--data {root}: class folder {split}/{strange[0]} has no counterpart in train/")
        files += [(path, label, split) for path, label in _images(folder, numbers, split == splits[0])]
    paths, labels, of_split = zip(*files, strict=True)
    return Listing(root, class_names, paths, labels, of_split)


def _class_folders(folder: Path) -> tuple[str, ...]:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] not in "._")
    if len(names) < 2:
        found = f"only {names[0]}/" if names else "none"
        raise InputError(f"--data {folder}: at least two class folders with images are needed, found {found}")
    return tuple(names)


def _images(folder: Path, numbers: dict[str, int], every_class: bool) -> list[tuple[str, int]]:
    present = {name: number for name, number in numbers.items() if (folder / name).is_dir()}
    images = make_dataset(str(folder), present, extensions=IMG_EXTENSIONS, allow_empty=True)
    images = [(path, label) for path, label in images if not os.path.basename(path).startswith(".")]
    empty = set(present.values()) - {label for _, label in images}
    if empty and every_class:
        name = next(name for name, number in numbers.items() if number in empty)
        raise InputError(
            f"--data: class folder {folder / name} holds no images ({', '.join(IMG_EXTENSIONS)}): fill it or remove it"
        )
    return images
