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

from torchvision.datasets.folder import IMG_EXTENSIONS

from smallvit.config import InputError
from smallvit.datasets.listing import SPLITS, Listing, require_classes
from smallvit.datasets.tiny_imagenet import ANNOTATIONS, read_layout


def list_folder(root: Path) -> Listing:
    """Find the images of a data folder.

    Raises:
        InputError: no such folder, one that cannot be read, fewer than two classes, a class folder without images,
            a split with classes that the training split lacks, or splits under other names.
    """
    try:
        if not root.is_dir():
            raise InputError(f"--data {root}: no such folder")
        return _list_tiny_imagenet(root) if (root / ANNOTATIONS).is_file() else _list(root)
    except OSError as error:
        raise InputError(f"--data {error.filename or root}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--data {root}: its lists of classes are damaged ({error})") from None


def _list(root: Path) -> Listing:
    has_splits = bool(_subfolders(root / "train"))
    folders = {split: root / split for split in SPLITS if (root / split).is_dir()} if has_splits else {"all": root}
    first = next(iter(folders))
    class_names = _subfolders(folders[first])
    require_classes(class_names, folders[first])
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


def _list_tiny_imagenet(root: Path) -> Listing:
    digest = hashlib.sha256()
    paths = [path for name in ("train", "val") for path in _images(root / name, digest, root)]
    texts = [name for name in ("wnids.txt", "words.txt", ANNOTATIONS) if (root / name).is_file()]
    names = [Path(path).relative_to(root).as_posix() for path in paths] + texts
    class_names, entries = read_layout(names, lambda name: (root / name).read_text(), root)
    digest.update(repr([entry[1:] for entry in entries]).encode())
    files, labels, splits = zip(*((str(root / name), label, split) for name, label, split in entries), strict=True)
    return Listing(root, class_names, files, labels, splits, digest.hexdigest())


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
