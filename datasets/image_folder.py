"""List the images of a folder or zip file of class folders, with their classes and splits.

    DIR/train/<class>/...  with DIR/val and/or DIR/test         published splits
    DIR/train/<class>/...  or DIR/<class>/...                   splits are held out of the images later
    DIR/train/<class>/...  with DIR/val/val_annotations.txt     Tiny-ImageNet's layout

Classes are numbered in sorted order of their folders' names; images may lie in subfolders of a class folder.
"""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from zipfile import BadZipFile, ZipFile

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID

from smallvit.datasets.index import Stamp, create_stamp, load_index, save_index
from smallvit.datasets.listing import (
    Folder,
    Layout,
    Listing,
    Sample,
    ZipMembers,
    build_tree,
    describe_kinds,
    find_layout,
    is_hidden,
    is_image,
    is_readable,
    require_utf8,
    unwrap,
)
from smallvit.utils.errors import InputError
from smallvit.utils.terminal import create_progress

ANNOTATIONS = "val/val_annotations.txt"
UNLABELED = ("images",)
"""The class of images without labels."""
MIN_CLASS = 3
"""Number of images that a class needs to hold out validation and test images."""


class FileInfo(NamedTuple):
    """Identify the contents of a file."""

    path: str
    """Path on disk, or name of the zip file's member."""
    content: str
    """Size in bytes, with the checksum if it is known."""
    changed: int
    """Modification time in nanoseconds, if there is no checksum."""


def list_folder(root: Path, min_classes: int = 2, *, labels: bool = True, use_index: bool = True) -> Listing:
    """List the images of a folder of class folders.

    Args:
        root: The folder.
        min_classes: Minimum number of classes.
        labels: Whether class folders are needed. If not, a folder of another layout is one class of training images.
        use_index: Whether to read the index of a large folder that has not changed.

    Raises:
        InputError: the folder does not exist or cannot be read, or its layout is unusable; see `find_layout`.
    """
    require_utf8([], root)
    variant = f"{min_classes} {labels}"
    if use_index and (known := load_index(root, variant)):
        return known
    started, stamps, files = time.time_ns(), {}, {}

    def read_text(name: str) -> str:
        stamps[name] = create_stamp(os.stat(root / name))
        return (root / name).read_text(encoding="utf-8")

    try:
        if not root.is_dir():
            raise InputError(f"--data {root}: no such folder")
        with create_progress(Console(stderr=True)) as progress:
            task = progress.add_task(f"listing {escape(str(root))}", total=1)
            tree = _scan(root, "", files, stamps, (), partial(_show, progress, task))
        layout = _find_layout(tree, read_text, root, min_classes, labels=labels)
    except OSError as error:
        raise InputError(f"--data {error.filename or root}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--data {root}: a list of classes is damaged ({error})") from None
    listing = build_listing(root, layout, files)
    save_index(listing, variant, stamps, started)
    return listing


def _show(progress: Progress, task: TaskID, inner: int) -> None:
    """Show that a folder was listed, and how many folders are in it."""
    total = progress.tasks[task].total
    progress.update(task, advance=1, total=None if total is None else total + inner)


def list_zip(file: Path, *, labels: bool = True) -> Listing:
    """List the images of a zip file of class folders.

    Args:
        file: The zip file.
        labels: Whether class folders are needed, as in `list_folder`.

    Raises:
        InputError: the file does not exist, is damaged or no zip file, or its layout is unusable; see `find_layout`.
    """
    require_utf8([], file)
    variant = f"zip {labels}"
    if known := load_index(file, variant):
        return known
    try:
        started, status = time.time_ns(), os.stat(file)
        with ZipFile(file) as archive:
            members = {info.filename.removeprefix("./"): info for info in archive.infolist() if not info.is_dir()}
            members = {name: info for name, info in members.items() if not any(map(is_hidden, name.split("/")))}
            tree = build_tree(members)
            layout = _find_layout(tree, lambda name: archive.read(members[name]).decode(), file, labels=labels)
    except InputError:
        raise
    except (BadZipFile, EOFError, ValueError, RuntimeError, zlib.error) as error:  # RuntimeError: encrypted, or new
        raise InputError(f"--data {file}: damaged, or no zip file ({error})") from None
    except OSError as error:
        raise InputError(f"--data {file}: cannot be read ({error.strerror or error})") from None
    files = {name: FileInfo(info.filename, f"{info.file_size} {info.CRC}", 0) for name, info in members.items()}
    locations = ZipMembers.from_infos(file, (members[name] for name, _, _ in layout.samples))
    listing = replace(build_listing(file, layout, files), archive=locations)
    save_index(listing, variant, {"": create_stamp(status)}, started)
    return listing


def _find_layout(
    tree: Folder, read_text: Callable[[str], str], source: Path, min_classes: int = 2, *, labels: bool = True
) -> Layout:
    """Find out which files are images of which class and split, in Tiny-ImageNet's layout or class folders.

    Without need for `labels`, all images are training images of one class if they do not lie in class folders, or
    most do not, or a class has too few to hold some out.
    """
    images = [] if labels else sorted(filter(is_readable, tree.images()))
    try:
        layout = _labeled_layout(tree, read_text, source, min_classes)
    except InputError:
        if labels:
            raise
        if not images:
            unreadable = describe_kinds(tree.images())
            raise InputError(f"--data {source}: holds no images" + f" except {unreadable}" * bool(unreadable)) from None
        return _unlabeled_layout(images)
    if labels:
        return layout
    counts = Counter(label for _, label, split in layout.samples if split == "all")
    if few := [layout.class_names[label] for label, count in counts.items() if count < MIN_CLASS]:
        return _unlabeled_layout(images, f"folders are no classes, since {few[0]}/ has fewer than {MIN_CLASS} images")
    if 2 * len(layout.samples) < len(images):
        return _unlabeled_layout(images, "folders are no classes, since most images do not lie in them")
    return layout


def _labeled_layout(tree: Folder, read_text: Callable[[str], str], source: Path, min_classes: int) -> Layout:
    top = unwrap(tree)
    if "val" in top.folders and top.top + ANNOTATIONS in top.folders["val"].files:
        return _read_tiny_imagenet(top, read_text, source)
    return find_layout(tree, source, min_classes)


def _unlabeled_layout(names: list[str], *notes: str) -> Layout:
    """Return images as training images of one class."""
    return Layout(UNLABELED, [(name, 0, "train") for name in names], notes, "")


def build_listing(root: Path, layout: Layout, files: Mapping[str, FileInfo]) -> Listing:
    """Return the listing of a layout's images; `files` has them by name."""
    fingerprint, content = hashlib.sha256(), hashlib.sha256()
    for name, label, split in layout.samples:
        row = f"{name.removeprefix(layout.top)}\0{label} {split}\0{files[name].content}".encode("utf-8", "replace")
        content.update(row)
        fingerprint.update(row + f"\0{files[name].changed}".encode())
    names, labels, splits = zip(*layout.samples, strict=True)
    return Listing(
        root=root,
        class_names=layout.class_names,
        paths=tuple(files[name].path for name in names),
        labels=labels,
        splits=splits,
        fingerprint=fingerprint.hexdigest(),
        content=content.hexdigest(),
        notes=layout.notes,
    )


def _scan(
    path: str | Path,
    name: str,
    files: dict[str, FileInfo],
    stamps: dict[str, Stamp],
    parents: tuple[tuple[int, int], ...],
    show: Callable[[int], None],
) -> Folder:
    """Return a folder with everything below it, sorted; skip links that lead back to a parent.

    Args:
        name: Path relative to the data's root.
        files: Collects the images.
        stamps: Collects the stamps of folders.
        parents: Device and inode of the folders above.
        show: Called with the number of folders in each folder.
    """
    folder = Folder(name)
    status = os.stat(path)
    identity = status.st_dev, status.st_ino
    if identity in parents:
        show(0)
        return folder
    stamps[name] = create_stamp(status)
    inner = []
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        if is_hidden(entry.name):
            continue
        child = f"{name}/{entry.name}" if name else entry.name
        if entry.is_dir():
            inner.append((entry, child))
        else:
            folder.files.append(child)
            if is_image(child):
                files[child] = _file_info(entry)
    show(len(inner))
    for entry, child in inner:
        folder.folders[entry.name] = _scan(entry.path, child, files, stamps, (*parents, identity), show)
    return folder


def _file_info(entry: os.DirEntry[str]) -> FileInfo:
    try:
        status = entry.stat()
    except OSError:  # a dangling link: decoding reports it
        return FileInfo(entry.path, "-1", -1)
    return FileInfo(entry.path, str(status.st_size), status.st_mtime_ns)


def _read_tiny_imagenet(root: Folder, read_text: Callable[[str], str], source: object) -> Layout:
    """Return the class names and the labeled images of Tiny-ImageNet's official layout.

        words.txt                the names of the classes
        train/<wnid>/images/     training images
        val/images/              validation images of all classes; their labels are in val/val_annotations.txt
        test/images/             images without labels: not used

    The validation images are the ones that papers report on, so they are the test split here. Classes are numbered in
    sorted order of their WordNet ids, as torchvision's `ImageFolder` numbers the folders in train/.

    Raises:
        InputError: validation images without a label, labels without an image, or fewer than two classes.
    """

    def read_table(file: str) -> dict[str, str]:
        """Return the second column of a tab-separated file by the first."""
        rows = [line.split("\t") for line in read_text(root.top + file).splitlines()]
        return {row[0]: row[1] for row in rows if len(row) > 1}

    train = root.folders["train"].folders if "train" in root.folders else {}
    wnids = [wnid for wnid, folder in train.items() if folder.has_images()]
    number = {wnid: label for label, wnid in enumerate(wnids)}
    if len(wnids) < 2:
        raise InputError(f"--data {source}: expected at least two classes with images in train/, found {len(wnids)}")
    samples: list[Sample] = [(name, number[wnid], "train") for wnid in wnids for name in sorted(train[wnid].images())]
    labels = read_table(ANNOTATIONS)
    for name in sorted(root.folders["val"].images()):
        wnid = labels.get(PurePosixPath(name).name)
        if wnid not in number:
            raise InputError(f"--data {source}: {name} has no (known) class in {ANNOTATIONS}")
        samples.append((name, number[wnid], "test"))
    if missing := labels.keys() - {PurePosixPath(name).name for name, _, split in samples if split == "test"}:
        raise InputError(f"--data {source}: val/images/{min(missing)} is labeled but missing; unpack the archive again")
    words = read_table("words.txt") if root.top + "words.txt" in root.files else {}
    return Layout(_class_names(wnids, words), samples, (), root.top)


def _class_names(wnids: list[str], words: dict[str, str]) -> tuple[str, ...]:
    """Return the first word for each class, with its WordNet id if two classes share it."""
    first = [words.get(wnid, wnid).split(",")[0] for wnid in wnids]
    pairs = zip(first, wnids, strict=True)
    return tuple(name if first.count(name) == 1 else f"{name} ({wnid})" for name, wnid in pairs)
