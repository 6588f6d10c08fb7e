"""Save a listing in an index file, and read it instead of listing a large folder or zip file again.

The index of a folder is valid while all folders in it have the inode and times that they had when they were listed, so
files that are added, removed or renamed make it invalid. Files that are replaced in place do not change their folder:
`Listing.indexed` says that their sizes and times are those of the listing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from smallvit.datasets.decode import cache_folder
from smallvit.datasets.listing import SPLITS, Archive, Listing, Shards, ZipMembers, image_suffixes
from smallvit.utils.files import atomic_write

VERSION = 1
"""Increased when listing or the format changes, so that older indices are not used."""
INDEXED_FILES = 50_000
"""Number of files from which a folder is indexed; fewer are listed within a second."""
TICK = 2 * 10**9
"""Largest step of a file system's clock in nanoseconds; later changes may have the same time."""
SPLIT_CODES = (*SPLITS, "all")
ARCHIVES: dict[str, type[Archive]] = {"zip": ZipMembers, "shards": Shards}

Stamp = tuple[int, int, int, int]
"""Inode, modification and change time in nanoseconds, and size of a file or folder."""


def create_stamp(status: os.stat_result) -> Stamp:
    """Return the stamp of a file or folder; its status must be from before it was read."""
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size


def load_index(root: Path, variant: str) -> Listing | None:
    """Return the listing of a folder or zip file from its index; None if there is no valid one.

    Args:
        variant: Options that it is to be listed with.
    """
    try:
        with safe_open(_index_file(root), "np") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != _key(variant):
                return None
            started, names = int(metadata["started"]), _unpack(file.get_tensor("stamped"))
            for name, stamp in zip(names, file.get_tensor("stamps").tolist(), strict=True):
                now = create_stamp(os.stat(os.path.join(root, name) if name else root))
                if now != (*stamp,) or max(now[1:3]) >= started - TICK:
                    return None
            return unpack_listing(root, metadata["listing"], {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118, not a dict
    except (OSError, SafetensorError):
        return None


def save_index(listing: Listing, variant: str, stamps: Mapping[str, Stamp], started: int) -> None:
    """Write the index of a large folder or zip file; continue without if that fails.

    Args:
        variant: Options that the folder was listed with.
        stamps: Stamps of all folders and files that the listing depends on, by path relative to its root.
        started: When listing began, in nanoseconds since the epoch.
    """
    if len(listing) < INDEXED_FILES:
        return
    text, tensors = pack_listing(listing)
    tensors |= {"stamped": _pack(stamps), "stamps": np.array([*stamps.values()], dtype=np.int64)}
    with suppress(OSError, SafetensorError):
        file = _index_file(listing.root)
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as partial:
            save_file(tensors, partial, {"key": _key(variant), "started": str(started), "listing": text})


def pack_listing(listing: Listing) -> tuple[str, dict[str, np.ndarray]]:
    """Return the short fields of a listing as JSON, and the fields of each image as arrays."""
    top = "" if listing.archive else os.path.join(listing.root, "")
    tensors = {
        "paths": _pack(path.removeprefix(top) for path in listing.paths),
        "labels": np.array(listing.labels, dtype=np.int64),
        "splits": np.array([SPLIT_CODES.index(split) for split in listing.splits], dtype=np.uint8),
    }
    if listing.groups is not None:
        tensors["groups"] = _pack(listing.groups)
    if listing.weights is not None:
        tensors["weights"] = np.array(listing.weights, dtype=np.float64)
    short: dict[str, Any] = {
        name: getattr(listing, name) for name in ("fingerprint", "content", "class_names", "notes")
    }
    short["label_sets"] = listing.label_sets
    if listing.archive is not None:
        kind = next(name for name, kind in ARCHIVES.items() if isinstance(listing.archive, kind))
        short["archive"] = kind, listing.archive.files
        tensors["locations"] = listing.archive.locations
    return json.dumps(short), tensors


def unpack_listing(root: Path, text: str, tensors: Mapping[str, np.ndarray]) -> Listing:
    """Return the listing that `pack_listing` has packed, with paths below `root`."""
    short = json.loads(text)
    kind, files = short.pop("archive", (None, ()))
    top = "" if kind else os.path.join(root, "")
    sets = short.pop("label_sets")
    return Listing(
        root=root,
        paths=tuple([top + name for name in _unpack(tensors["paths"])]),
        labels=tuple(tensors["labels"].tolist()),
        splits=tuple([SPLIT_CODES[code] for code in tensors["splits"].tolist()]),
        archive=ARCHIVES[kind](root, tuple(files), tensors["locations"]) if kind else None,
        groups=tuple(_unpack(tensors["groups"])) if "groups" in tensors else None,
        weights=tuple(tensors["weights"].tolist()) if "weights" in tensors else None,
        label_sets=None if sets is None else tuple(map(tuple, sets)),
        indexed=True,
        **{name: tuple(value) if isinstance(value, list) else value for name, value in short.items()},
    )


def _pack(names: Iterable[str]) -> np.ndarray:
    return np.frombuffer("\0".join(names).encode("utf-8", "surrogateescape"), dtype=np.uint8)


def _unpack(names: np.ndarray) -> list[str]:
    return names.tobytes().decode("utf-8", "surrogateescape").split("\0")


def _index_file(root: Path) -> Path:
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    return cache_folder() / f"listing-{name}.safetensors"


def _key(variant: str) -> str:
    return f"{VERSION}-{variant}-{' '.join(sorted(image_suffixes()))}"
