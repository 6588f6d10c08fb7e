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

from torchvision.datasets.folder import IMG_EXTENSIONS

from smallvit.config import InputError

SPLITS = ("train", "val", "test")
LIKE_SPLITS = {*SPLITS, "training", "valid", "validation", "testing"}


@dataclass(frozen=True)
class Listing:
    """The image files of a folder: path, class number and split of each, in a fixed order."""

    root: Path
    class_names: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    splits: tuple[str, ...]
    """Of each file: train, val or test; 'all' where the folder has no such level."""
    fingerprint: str
    """A hash of every file's relative path, class, size and time of change."""


def list_folder(root: Path) -> Listing:
    """Find the images of a data folder.

    Raises:
        InputError: no such folder, one that cannot be read, fewer than two classes, a class folder without images,
            a split with classes that the training split lacks, or splits under other names.
    """
    try:
        if not root.is_dir():
            raise InputError(f"--data {root}: no such folder")
        return _list(root)
    except OSError as error:
        raise InputError(f"--data {error.filename or root}: cannot be read ({error.strerror})") from None


def _list(root: Path) -> Listing:
    has_splits = bool(_subfolders(root / "train"))
    folders = {split: root / split for split in SPLITS if (root / split).is_dir()} if has_splits else {"all": root}
    first = next(iter(folders))
    class_names = _subfolders(folders[first])
    if len(class_names) < 2:
        found = f"only {class_names[0]}/" if class_names else "none"
        raise InputError(f"--data {folders[first]}: at least two class folders with images are needed, found {found}")
    if all(name.lower() in LIKE_SPLITS for name in class_names):
        raise InputError(f"--data {root}: {', '.join(class_names)} look like splits; call them train, val and test")
    files: list[tuple[str, int, str]] = []
    digest = hashlib.sha256()
    for split, folder in folders.items():
        for name in _subfolders(folder):
            if name not in class_names:
                raise InputError(f"--data {root}: class folder {split}/{name} has no counterpart in train/")
            label = class_names.index(name)
            images = _images(folder / name, digest, root)
            if not images and split == first:
                kinds = ", ".join(IMG_EXTENSIONS)
                raise InputError(f"--data: class folder {folder / name} holds no images ({kinds}): fill or remove it")
            files += [(path, label, split) for path in images]
    paths, labels, splits = zip(*files, strict=True)
    return Listing(root, class_names, paths, labels, splits, digest.hexdigest())


def _subfolders(folder: Path) -> tuple[str, ...]:
    """Names of the folders in a folder, sorted; hidden ones and what macOS packs into archives left out."""
    if not folder.is_dir():
        return ()
    return tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not _hidden(entry.name)))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _images(folder: Path, digest: hashlib._Hash, root: Path) -> list[str]:
    """Paths of a class's images, sorted, every file once however many links lead to it; adds them to the digest."""
    os.scandir(folder).close()  # os.walk passes over what it cannot read
    seen: set[tuple[int, int]] = set()
    images = []
    for place, subfolders, names in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:  # a link back
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not _hidden(name))
        for name in sorted(names):
            if _hidden(name) or not name.lower().endswith(IMG_EXTENSIONS):
                continue
            path = os.path.join(place, name)
            try:
                status = os.stat(path)
                identity, change = (status.st_dev, status.st_ino), f"{status.st_size} {status.st_mtime_ns}"
            except OSError:  # a dangling link: decoding will name it
                identity, change = (-1, len(images)), "missing"
            if identity not in seen:
                seen.add(identity)
                images.append(path)
                digest.update(f"{os.path.relpath(path, root)}\0{folder.name}\0{change}\n".encode("utf-8", "replace"))
    return images
