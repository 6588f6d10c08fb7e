"""Zip files of class folders, or of Tiny-ImageNet's layout, read as they are, without being unpacked."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from smallvit.datasets.listing import SPLITS, Listing, is_hidden, is_image, require_classes, require_known_splits
from smallvit.datasets.tiny_imagenet import ANNOTATIONS, Entry, read_layout
from smallvit.errors import InputError


def list_zip(file: Path) -> Listing:
    """Find the images of a zip file.

    Raises:
        InputError: no such file, none of its kind, damaged, or fewer than two classes.
    """
    try:
        with ZipFile(file) as archive:
            members = {_plain(info.filename): info for info in archive.infolist() if not info.is_dir()}
            members = {name: info for name, info in members.items() if not any(map(is_hidden, name.split("/")))}
            top = _common_folders([name for name in members if is_image(name)])
            names = {name.removeprefix(top): info for name, info in members.items() if name.startswith(top)}
            if ANNOTATIONS in names:
                class_names, entries = read_layout(list(names), lambda name: archive.read(names[name]).decode(), file)
            else:
                class_names, entries = _class_folders(list(names), file)
    except (BadZipFile, EOFError, ValueError, RuntimeError, zlib.error) as error:  # RuntimeError: encrypted, or new
        if isinstance(error, InputError):
            raise
        raise InputError(f"--data {file}: damaged, or no zip file ({error})") from None
    except OSError as error:
        raise InputError(f"--data {file}: cannot be read ({error.strerror or error})") from None
    digest = hashlib.sha256()
    for name, label, split in entries:
        stamp = f"{names[name].file_size} {names[name].CRC}"
        digest.update(f"{name}\0{label} {split}\0{stamp}\n".encode("utf-8", "replace"))
    files = ((names[name].filename, label, split) for name, label, split in entries)
    paths, labels, splits = zip(*files, strict=True)
    content = digest.hexdigest()
    return Listing(file, class_names, paths, labels, splits, content, content, zipped=True)


def _class_folders(names: list[str], file: Path) -> tuple[tuple[str, ...], list[Entry]]:
    images = [name.split("/") for name in sorted(names) if is_image(name)]
    with_splits = any(parts[0] == "train" and len(parts) > 2 for parts in images)
    if with_splits:
        require_known_splits({parts[0] for parts in images}, file)
    kept = [parts for parts in images if len(parts) > 1 + with_splits and (not with_splits or parts[0] in SPLITS)]
    class_names = tuple(sorted({parts[with_splits] for parts in kept if not with_splits or parts[0] == "train"}))
    require_classes(class_names, file)
    number = {name: index for index, name in enumerate(class_names)}
    entries = []
    for parts in kept:
        if parts[with_splits] not in number:
            raise InputError(f"--data {file}: class folder {parts[0]}/{parts[1]} has no counterpart in train/")
        entries.append(("/".join(parts), number[parts[with_splits]], parts[0] if with_splits else "all"))
    return class_names, entries


def _common_folders(names: list[str]) -> str:
    """The folders that everything lies in, down to where there are several things, or a split."""
    top = ""
    while True:
        first = {name.removeprefix(top).split("/")[0] for name in names}
        only = next(iter(first), "")
        if len(first) != 1 or only in SPLITS or f"{top}{only}" in names:
            return top
        top += only + "/"


def _plain(name: str) -> str:
    """A member's name without ./ in front."""
    return name.removeprefix("./")
