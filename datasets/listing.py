"""What a data set on disk consists of: image files, their classes and splits, in a folder or in a zip file."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO
from zipfile import ZipFile

from torchvision.datasets.folder import IMG_EXTENSIONS

from smallvit.errors import InputError

SPLITS = ("train", "val", "test")
LIKE_SPLITS = {*SPLITS, "training", "valid", "validation", "testing"}


@dataclass(frozen=True)
class Listing:
    """Image files: path, class number and split of each, in a fixed order."""

    root: Path
    """The folder, or the zip file."""
    class_names: tuple[str, ...]
    paths: tuple[str, ...]
    """Of files; of members, where `root` is a zip file."""
    labels: tuple[int, ...]
    splits: tuple[str, ...]
    """Of each file: train, val or test; 'all' where the data has no such level."""
    fingerprint: str
    """A hash of every file's relative path, class, size and time of change (or checksum)."""
    content: str
    """The same without the times, so that a copy elsewhere has the same."""
    zipped: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    def named(self, index: int) -> str:
        """An image's path in the folder or the zip file."""
        return self.paths[index] if self.zipped else os.path.relpath(self.paths[index], self.root)

    def open(self, index: int) -> str | BinaryIO:
        """What Pillow opens to read an image."""
        path = self.paths[index]
        return io.BytesIO(_members(self.root, self.fingerprint, os.getpid()).read(path)) if self.zipped else path


def is_image(name: str) -> bool:
    """Whether a file's name ends like an image's."""
    return name.lower().endswith(IMG_EXTENSIONS)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or what macOS packs into archives."""
    return name.startswith(".") or name == "__MACOSX"


def require_classes(class_names: tuple[str, ...], source: object, least: int = 2) -> None:
    """Check that there are several classes (`least` of them), and that they are no splits.

    Raises:
        InputError: there are not, or they are.
    """
    if len(class_names) < least:
        found = f"only {class_names[0]}/" if class_names else "none"
        needed = "at least two class folders with images are" if least > 1 else "a class folder with images is"
        raise InputError(f"--data {source}: {needed} needed, found {found}")
    if all(name.lower() in LIKE_SPLITS for name in class_names):
        raise InputError(f"--data {source}: {', '.join(class_names)} look like splits; call them train, val and test")


def require_known_splits(folders: set[str], source: object) -> None:
    """Check that no split beside train/ has another name than val or test: its images would be passed over.

    Raises:
        InputError: one has.
    """
    others = sorted(name for name in folders - set(SPLITS) if name.lower() in LIKE_SPLITS)
    if others:
        raise InputError(f"--data {source}: {', '.join(others)} beside train/ would not be read; call it val or test")


@lru_cache(maxsize=4)
def _members(file: Path, fingerprint: str, process: int) -> ZipFile:
    """A zip file, opened once in each process, as threads may share it, processes not; anew when it has changed."""
    return ZipFile(file)
