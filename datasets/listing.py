"""Detect classes, splits and image files in a tree of folders, on disk or in a zip file."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import BinaryIO, ClassVar
from zipfile import ZipFile, ZipInfo

import numpy as np
from jaxtyping import Int64
from PIL import Image

from smallvit.utils.errors import MAX_NAMED, InputError, is_utf8

SPLITS = ("train", "val", "test")
ALIASES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Words for splits in the names of folders: Train, validation, train_set, seg_test, test-images, ..."""
NOT_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow opens but does not decode itself."""
HEIF_SUFFIXES = frozenset({".avif", ".heic", ".heif", ".hif"})
"""Images of phones and cameras that Pillow reads with pillow-heif only; AVIF since Pillow 11.3."""
HEIF_REMEDY = "pip install 'smallvit[heif]'"
ARRAY_SUFFIX = ".npy"
"""Images as NumPy arrays, see `channels`."""
SYSTEM_FILES = {"__macosx", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini"}
"""Files and folders that macOS, Linux and Windows create, in lower case."""
RUN_FILES = ("config.json", "compare.md", "crossval.json")
"""Files in the folders that `smallvit train`, `compare` and `crossval` write."""

Sample = tuple[str, int, str]
"""Name, class number and split of an image."""


class _Members(ZipFile):
    """A zip file whose directory is not read: members are opened by their `ZipInfo`."""

    def _RealGetContents(self) -> None:
        pass


@lru_cache(maxsize=256)
def _open_file(path: str, process: int) -> tuple[BinaryIO, Lock]:
    """Open a file once per process; threads may share it, processes may not."""
    return open(path, "rb"), Lock()


@lru_cache(maxsize=4)
def _open_zip(file: Path, version: bytes, process: int) -> ZipFile:
    """Open a zip file once per process and version."""
    return _Members(file)


@dataclass(frozen=True, eq=False)
class Archive:
    """Files that hold many images each."""

    root: Path
    files: tuple[str, ...]
    locations: Int64[np.ndarray, "n fields"]
    """Where each image is."""

    def read(self, index: int, name: str) -> bytes:
        """Return the bytes of an image file.

        Args:
            name: The image's path in the listing.
        """
        raise NotImplementedError


class ZipMembers(Archive):
    """Members of a zip file; worker processes do not read its directory again. A location has an entry's `fields`."""

    fields: ClassVar = ("header_offset", "compress_size", "file_size", "CRC", "compress_type", "flag_bits")

    @classmethod
    def from_infos(cls, file: Path, infos: Iterable[ZipInfo]) -> ZipMembers:
        """Return the members that entries of the zip file's directory describe."""
        return cls(file, (), np.array([[getattr(info, name) for name in cls.fields] for info in infos], dtype=np.int64))

    def read(self, index: int, name: str) -> bytes:
        info = ZipInfo(name)
        for field_name, value in zip(self.fields, self.locations[index].tolist(), strict=True):
            setattr(info, field_name, value)
        return _open_zip(self.root, self.version, os.getpid()).read(info)

    @cached_property
    def version(self) -> bytes:
        """Hash of the locations, which differ if the zip file is replaced."""
        return hashlib.blake2b(self.locations).digest()


class Shards(Archive):
    """Members of the tar files that `shards` writes. A location is a file's number, an offset and a size in bytes."""

    def read(self, index: int, name: str) -> bytes:
        number, offset, size = self.locations[index].tolist()
        file, lock = _open_file(os.path.join(self.root, self.files[number]), os.getpid())
        with lock:
            file.seek(offset)
            return file.read(size)


@dataclass(frozen=True)
class Listing:
    """Image files with their classes and splits, in a fixed order."""

    root: Path
    """The folder or zip file."""
    class_names: tuple[str, ...]
    paths: tuple[str, ...]
    """Paths of the files, or names of the zip file's members."""
    labels: tuple[int, ...]
    """Class of each image; with several labels, the index of its classes in `label_sets`."""
    splits: tuple[str, ...]
    """Split of each file: train, val or test; 'all' if there are no split folders."""
    fingerprint: str
    """Hash of every file's relative path, class, size and modification time (or checksum)."""
    content: str
    """The same without modification times, so that a copy elsewhere has the same hash."""
    archive: Archive | None = None
    """Where the images are, if they are not separate files."""
    notes: tuple[str, ...] = ()
    """Notes on ignored files, and on folders recognized as splits."""
    base: Path | None = None
    """Folder where relative paths start; by default the root."""
    groups: tuple[str, ...] | None = None
    """Group of each image, such as a patient; the images of a group are in one split."""
    weights: tuple[float, ...] | None = None
    """Weight of each image's loss in training."""
    label_sets: tuple[tuple[int, ...], ...] | None = None
    """Classes of each label, if images have several or none; None if a label is a class."""
    indexed: bool = False
    """Whether the listing was read from an index, which does not show files that were replaced in place."""

    def __len__(self) -> int:
        return len(self.paths)

    def relative_path(self, index: int) -> str:
        """Return the path of an image relative to the folder or within the archive."""
        path = self.paths[index]
        return path if self.archive is not None else os.path.relpath(path, self.base or self.root)

    def open(self, index: int) -> str | BinaryIO:
        """Return the path or file object from which Pillow reads an image."""
        path = self.paths[index]
        return path if self.archive is None else io.BytesIO(self.archive.read(index, path))


@dataclass
class Folder:
    """A tree of folders and file names, on disk or in a zip file, without hidden ones."""

    name: str = ""
    """Path relative to the data's root."""
    folders: dict[str, Folder] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    """Paths relative to the data's root."""

    @property
    def top(self) -> str:
        """The prefix of names below: the path with a slash, empty for the root."""
        return f"{self.name}/" if self.name else ""

    def walk(self) -> Iterator[str]:
        """Yield all files below, those of a folder before those of its subfolders."""
        for folder in self.subtree():
            yield from folder.files

    def subtree(self) -> Iterator[Folder]:
        """Yield the folder and all folders below."""
        yield self
        for folder in self.folders.values():
            yield from folder.subtree()

    def has_images(self) -> bool:
        """Return whether there are images below."""
        return any(map(is_image, self.walk()))

    def images(self) -> list[str]:
        """Return all images below."""
        return [name for name in self.walk() if is_image(name)]

    def loose(self) -> list[str]:
        """Return the images directly in the folder."""
        return [name for name in self.files if is_image(name)]


def build_tree(names: Iterable[str]) -> Folder:
    """Return the sorted tree of folders that names with slashes describe."""
    root = Folder()
    for name in sorted(names, key=lambda name: name.split("/")):
        folder = root
        for parent in name.split("/")[:-1]:
            folder = folder.folders.setdefault(parent, Folder(folder.top + parent))
        folder.files.append(name)
    return root


@dataclass(frozen=True)
class Layout:
    """The images of a tree of folders, with their classes and splits."""

    class_names: tuple[str, ...]
    samples: list[Sample]
    notes: tuple[str, ...]
    top: str
    """Folder that has the class or split folders, with a slash; empty for the root."""


def find_layout(root: Folder, source: object, min_classes: int = 2) -> Layout:
    """Find classes, splits and images in a tree of class folders.

    Split folders are recognized in several spellings. Folders that hold only one folder are entered. Run folders of
    smallvit are no classes, nor are copies of the class folders among them and folders without images.

    Raises:
        InputError: fewer than `min_classes` classes, a split with other classes or without images, ambiguous names, or
            names that are not UTF-8.
    """
    ignored = [f"{name}/ (a run)" for name in _remove_runs(root)]
    if arrays := _remove_arrays(root):
        ignored.append(f"{describe_kinds(arrays)} next to images of other kinds")
    root = unwrap(root)
    splits = _find_splits(root, source)
    notes = [f"{folder.name}/ is {split}" for split, folder in splits.items() if root.folders.get(split) is not folder]
    splits = {split: _enter_same_name(folder) for split, folder in splits.items()} or {"all": root}
    if "all" in splits:
        ignored += [f"{name}/ (a copy of the class folders)" for name in _remove_copies(root)]
    first = next(iter(splits.values()))
    class_names = tuple(name for name, folder in first.folders.items() if folder.has_images())
    if len(class_names) < min_classes:
        listed = f"only {class_names[0]}/" if class_names else "none"
        raise InputError(
            f"--data {source}{'/' * bool(first.name)}{first.name}: expected at least {min_classes} class "
            f"folder{'s' * (min_classes > 1)} with images, found {listed}"
        )
    samples = _list_samples(splits, class_names, source)
    require_utf8([name for name, _, _ in samples], source)
    ignored += [f"{folder.name}/ (no images)" for folder in first.folders.values() if not folder.has_images()]
    ignored = _shorten(ignored) + _describe_ignored(root, {name for name, _, _ in samples})
    notes += ["ignored: " + "; ".join(ignored)] if ignored else []
    return Layout(class_names, samples, tuple(notes), root.top)


def unwrap(root: Folder) -> Folder:
    """Enter folders that hold only one folder, down to the class or split folders."""
    while not root.loose():
        filled = [(name, folder) for name, folder in root.folders.items() if folder.has_images()]
        if len(filled) != 1:
            break
        ((name, inner),) = filled
        classes = sum(each.has_images() for each in inner.folders.values())
        if classes < (2 if inner.loose() else 1) or name.lower() in ALIASES:
            break
        root = inner
    return root


def _list_samples(splits: dict[str, Folder], class_names: tuple[str, ...], source: object) -> list[Sample]:
    number = {name: label for label, name in enumerate(class_names)}
    samples: list[Sample] = []
    first = next(iter(splits))
    for split, folder in splits.items():
        before = len(samples)
        for name, each in folder.folders.items():
            images = each.images()
            if images and name not in number:
                raise InputError(f"--data {source}: class folder {each.name} does not exist in {splits[first].name}/")
            readable = list(filter(is_readable, images))
            if images and not readable:
                raise InputError(f"--data {source}: {each.name}/ has no images except {describe_kinds(images)}")
            samples += [(image, number[name], split) for image in readable]
        if len(samples) == before and folder.folders:
            raise InputError(f"--data {source}: {folder.name}/ has no images; add some or remove it")
    return samples


def _find_splits(root: Folder, source: object) -> dict[str, Folder]:
    """Return the folder of each split, in the order of `SPLITS`; none if there are only class folders.

    Raises:
        InputError: two folders may be the same split, or folders with the names of splits have no class folders.
    """
    exact: dict[str, list[Folder]] = {}
    named: dict[str, list[Folder]] = {}
    for name, folder in root.folders.items():
        words = {ALIASES[word] for word in re.split("[ _.-]+", name.lower()) if word in ALIASES}
        if len(words) == 1:
            (split,) = words
            named.setdefault(split, []).append(folder)
            if name.lower() in ALIASES:
                exact.setdefault(split, []).append(folder)
    chosen = exact if any(folder.folders for folder in exact.get("train", ())) else named
    is_lone_word = chosen is named and len(named) == 1  # a class such as train_station
    if is_lone_word or not any(folder.folders for folder in chosen.get("train", ())):
        if len(exact) > 1 and ("train" in exact or sum(map(len, exact.values())) == len(root.folders)):
            names = ", ".join(folder.name for folders in exact.values() for folder in folders)
            raise InputError(f"--data {source}: {names} look like splits without train/<class>/...")
        return {}
    for split, folders in chosen.items():
        if len(folders) > 1:
            names = " and ".join(f"{each.name}/" for each in folders)
            raise InputError(f"--data {source}: {names} may both be the {split} split; merge them or remove one")
    return {split: chosen[split][0] for split in SPLITS if split in chosen}


def _enter_same_name(folder: Folder) -> Folder:
    """Return the folder of the same name in a split folder that holds nothing else."""
    name = PurePosixPath(folder.name).name
    return folder.folders[name] if list(folder.folders) == [name] and not folder.loose() else folder


def _remove_copies(root: Folder) -> list[str]:
    """Remove folders that hold a copy of the class folders next to them; return their names."""
    removed = []
    for name, folder in list(root.folders.items()):
        others, inner = root.folders.keys() - {name}, folder.folders.keys()
        if len(others & inner) > 1 and (inner <= others or others <= inner) and not folder.loose():
            del root.folders[name]
            removed.append(name)
    return removed


def _remove_arrays(root: Folder) -> list[str]:
    """Remove NumPy files, such as masks, if there are images of other kinds; return their names."""
    images = root.images()
    arrays = [name for name in images if os.path.splitext(name)[1].lower() == ARRAY_SUFFIX]
    if not arrays or len(arrays) == len(images):
        return []
    removed = set(arrays)
    for folder in root.subtree():
        folder.files = [name for name in folder.files if name not in removed]
    return arrays


def _remove_runs(root: Folder) -> list[str]:
    """Remove folders that smallvit has written, runs and comparisons of runs; return their names."""
    removed = []
    for name, folder in list(root.folders.items()):
        if any(folder.top + file in folder.files for file in RUN_FILES):
            del root.folders[name]
            removed.append(folder.name)
        else:
            removed += _remove_runs(folder)
    return removed


def _describe_ignored(root: Folder, used: set[str]) -> list[str]:
    """Return notes on images that are not used, by folder, and on other files in folders, by kind."""
    images: Counter[str] = Counter()
    others: list[str] = []
    for name in root.walk():
        folder, slash, _ = name.removeprefix(root.top).partition("/")
        if is_readable(name) and name not in used:
            images[f"in {root.top}{folder}/" if slash else "next to the class folders"] += 1
        elif not is_readable(name) and (slash or is_image(name)):
            others.append(name)
    notes = _shorten([f"{count:,} image{'s' * (count > 1)} {where}" for where, count in images.items()])
    return notes + [describe_kinds(others)] * bool(others)


def describe_kinds(names: Iterable[str]) -> str:
    """Return how many files there are of each kind, the most frequent first, and how to read HEIC and AVIF."""
    kinds = Counter(PurePosixPath(name).suffix.lower() for name in names)
    counts = []
    for kind, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0])):
        label, plural = kind[1:].upper(), "s" * (count > 1)
        remedy = f" (to read {label}: {HEIF_REMEDY})" * (kind in HEIF_SUFFIXES)
        counts.append(f"{count:,} {label} file{plural}{remedy}" if kind else f"{count:,} file{plural} without a suffix")
    return ", ".join(counts)


def _shorten(names: list[str]) -> list[str]:
    return names[:MAX_NAMED] + [f"{len(names) - MAX_NAMED:,} more"] * (len(names) > MAX_NAMED)


@cache
def register_heif() -> None:
    """Let Pillow read HEIC if pillow-heif is installed, once per process."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener(thumbnails=False)  # else Image.draft() decodes an embedded thumbnail in place of the image


@cache
def image_suffixes() -> frozenset[str]:
    """Return the file name suffixes that Pillow decodes, in lower case."""
    register_heif()
    return frozenset(
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in NOT_IMAGES
    )


def is_image(name: str) -> bool:
    """Return whether a file name has the suffix of an image, also of one that only pillow-heif reads."""
    suffix = _suffix(name)
    return suffix in image_suffixes() or suffix in HEIF_SUFFIXES or suffix == ARRAY_SUFFIX


def is_readable(name: str) -> bool:
    """Return whether a file name has the suffix of an image that can be decoded."""
    suffix = _suffix(name)
    return suffix in image_suffixes() or suffix == ARRAY_SUFFIX


def _suffix(name: str) -> str:
    """Return a file's suffix in lower case; faster than `os.path.splitext` for names that are not hidden."""
    return name[name.rfind(".") :].lower()


def group_by_path(listing: Listing, pattern: str) -> Listing:
    """Return the listing with groups: what a regular expression finds in relative paths.

    Raises:
        InputError: the expression is invalid, or does not match a path, or images of a group are in several splits.
    """
    option = f"--group-by {pattern}"
    if listing.groups is not None:
        raise InputError(f"{option}: {listing.root} has a column of groups; remove one of them")
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise InputError(f"{option}: not a regular expression ({error}); correct it") from None
    names = [listing.relative_path(index).replace(os.sep, "/") for index in range(len(listing))]
    matches = [regex.search(name) for name in names]
    if None in matches:
        raise InputError(
            f"{option}: does not match {names[matches.index(None)]}, nor {matches.count(None) - 1:,} other paths of "
            f"{listing.root}; every image needs a group"
        )
    groups = tuple(match[1] or "" if regex.groups else match[0] for match in matches if match)
    require_separate_groups(grouped := replace(listing, groups=groups), names)
    return grouped


def require_separate_groups(listing: Listing, locations: Sequence[str]) -> None:
    """Check that the images of each group are in one split.

    Args:
        listing: Images with or without groups.
        locations: Where each image is, for the message.

    Raises:
        InputError: they are in several.
    """
    first: dict[str, int] = {}
    for index, group in enumerate(listing.groups or ()):
        one, other = listing.splits[first.setdefault(group, index)], listing.splits[index]
        if one != other:
            raise InputError(
                f"--data {listing.root}: {locations[index]}: group {group!r} is in split {other}, but in split {one} "
                f"at {locations[first[group]]}; put it into one split"
            )


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden, or created by an operating system."""
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def require_utf8(names: list[str], source: object) -> None:
    """Check that the names of classes and images can be written to weights, tables and pages.

    Raises:
        InputError: a name is not UTF-8.
    """
    bad = [name for name in (str(source), *names) if not is_utf8(name)]
    if bad:
        more = f" and {len(bad) - 1:,} more" if len(bad) > 1 else ""
        raise InputError(
            f"--data {ascii(str(source))[1:-1]}: {bad[0]!a}{more}: the name is not UTF-8; rename it, e.g. with convmv"
        )
