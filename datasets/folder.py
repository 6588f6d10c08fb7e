"""Folders and zip files of class folders: which files belong to which class and split.

    DIR/train/<class>/...  with DIR/val and/or DIR/test         splits as they are
    DIR/train/<class>/...  or DIR/<class>/...                   splits drawn from the images
    DIR/train/<class>/...  with DIR/val/val_annotations.txt     Tiny-ImageNet's layout: `tiny_imagenet`

Class folders are numbered in the order of their names; images may lie in folders within them.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from smallvit.datasets.listing import SPLITS, Listing, is_hidden, is_image, require_classes, require_known_splits
from smallvit.datasets.tiny_imagenet import ANNOTATIONS, read_layout
from smallvit.errors import InputError


class File(NamedTuple):
    """A file as it was found."""

    path: str
    size: int
    changed: int
    """Time of its last change in nanoseconds."""


def list_folder(root: Path, least: int = 2) -> Listing:
    """Find the images of a data folder.

    Raises:
        InputError: no such folder, one that cannot be read, fewer than `least` classes, a class folder without images,
            a split with classes that the training split lacks, or splits under other names.
    """
    try:
        if not root.is_dir():
            raise InputError(f"--data {root}: no such folder")
        return _list_tiny_imagenet(root) if (root / ANNOTATIONS).is_file() else _list(root, least)
    except OSError as error:
        raise InputError(f"--data {error.filename or root}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--data {root}: its lists of classes are damaged ({error})") from None


def _list(root: Path, least: int) -> Listing:
    top = _subfolders(root)
    has_splits = bool(_subfolders(root / "train"))
    if has_splits:
        require_known_splits(set(top), root)
    folders = {split: root / split for split in SPLITS if split in top} if has_splits else {"all": root}
    first = next(iter(folders))
    class_names = _subfolders(folders[first])
    require_classes(class_names, folders[first], least)
    number = {name: label for label, name in enumerate(class_names)}
    files: list[tuple[File, int, str]] = []
    for split, folder in folders.items():
        before = len(files)
        for name in _subfolders(folder):
            if name not in number:
                raise InputError(f"--data {root}: class folder {split}/{name} has no counterpart in train/")
            images = _images(folder / name)
            if not images and split == first:
                kinds = ", ".join(IMG_EXTENSIONS)
                raise InputError(f"--data: class folder {folder / name} holds no images ({kinds}): fill or remove it")
            files += [(image, number[name], split) for image in images]
        if len(files) == before and _subfolders(folder):
            raise InputError(f"--data {root}: {split}/ holds no images: fill or remove it")
    return _listing(root, class_names, files)


def _list_tiny_imagenet(root: Path) -> Listing:
    found = {os.path.relpath(file.path, root): file for name in ("train", "val") for file in _images(root / name)}
    texts = [name for name in ("wnids.txt", "words.txt", ANNOTATIONS) if (root / name).is_file()]
    names = {Path(path).as_posix(): file for path, file in found.items()}
    class_names, entries = read_layout([*names, *texts], lambda name: (root / name).read_text(), root)
    return _listing(root, class_names, [(names[name], label, split) for name, label, split in entries])


def _listing(root: Path, class_names: tuple[str, ...], files: list[tuple[File, int, str]]) -> Listing:
    fingerprint, content, skip = hashlib.sha256(), hashlib.sha256(), len(os.path.join(root, ""))
    for file, label, split in files:
        row = f"{file.path[skip:]}\0{label} {split}\0{file.size}".encode("utf-8", "replace")
        content.update(row)
        fingerprint.update(row + f"\0{file.changed}".encode())
    paths, labels, splits = zip(*((file.path, label, split) for file, label, split in files), strict=True)
    return Listing(root, class_names, paths, labels, splits, fingerprint.hexdigest(), content.hexdigest())


def _subfolders(folder: Path) -> tuple[str, ...]:
    """Names of the folders in a folder, sorted; hidden ones and what macOS packs into archives left out."""
    if not folder.is_dir():
        return ()
    return tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name)))


def _images(folder: Path) -> list[File]:
    """A class's images, sorted, every file once however many links lead to it."""
    os.scandir(folder).close()  # os.walk passes over what it cannot read
    seen: set[tuple[int, int]] = set()
    images: list[File] = []
    for place, subfolders, names in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:  # a link back
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
        for name in sorted(names):
            if is_hidden(name) or not is_image(name):
                continue
            path = os.path.join(place, name)
            try:
                status = os.stat(path)
                identity, file = (status.st_dev, status.st_ino), File(path, status.st_size, status.st_mtime_ns)
            except OSError:  # a dangling link: decoding will name it
                identity, file = (-1, len(images)), File(path, -1, -1)
            if identity not in seen:
                seen.add(identity)
                images.append(file)
    return images
