"""Write resized images as shards, tar files in the format of WebDataset, and list the images in them.

    OUT/train-000000.tar     000000000.jpg, 000000000.cls, 000000001.jpg, ...
    OUT/_info.json           class names, and the shards of each split, as timm reads them
    OUT/listing.safetensors  path, label, split and location of each image

Images are read by their location, in any order, so training from shards has the order of training from files.

Format: https://github.com/webdataset/webdataset
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from smallvit.config.options import MAX_MEGAPIXELS
from smallvit.datasets.channels import read_channels
from smallvit.datasets.decode import describe_decode_error, open_image, to_rgb
from smallvit.datasets.gray import kind_of
from smallvit.datasets.image_folder import FileInfo, build_listing
from smallvit.datasets.index import pack_listing, unpack_listing
from smallvit.datasets.listing import Layout, Listing, Shards
from smallvit.utils.cores import usable_cores
from smallvit.utils.errors import InputError, first_line, group_errors
from smallvit.utils.files import atomic_folder, atomic_write, write_text
from smallvit.utils.terminal import track

INFO, LISTING = "_info.json", "listing.safetensors"
SHARD_BYTES = 2**30
"""Size from which a shard is closed."""
QUALITY = 95
"""JPEG quality of resized images."""
CHUNK = 256
"""Number of images that are resized ahead of writing."""


def is_shards(folder: Path) -> bool:
    """Return whether a folder has been written by `write_shards`."""
    return (folder / LISTING).is_file() and (folder / INFO).is_file()


def read_shards(folder: Path) -> Listing:
    """Return the listing of the images in shards, without reading the shards.

    Raises:
        InputError: a file is missing, damaged or has another size than when it was written.
    """
    try:
        info = json.loads((folder / INFO).read_text(encoding="utf-8"))
        with safe_open(folder / LISTING, "np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
            listing = unpack_listing(folder, file.metadata()["listing"], tensors)
        for split in info["splits"].values():
            for name, size in zip(split["filenames"], split["shard_bytes"], strict=True):
                if (actual := os.stat(folder / name).st_size) != size:
                    raise InputError(f"--data {folder}: {name} has {actual:,} bytes, not {size:,}; copy it again")
    except InputError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--data {folder}: not whole ({first_line(error)}); copy it again") from None
    return listing


def write_shards(
    source: Listing, folder: Path, size: int, *, skip_corrupt: bool = False, max_megapixels: float = MAX_MEGAPIXELS
) -> Listing:
    """Write the images of a listing as shards; the folder is complete or does not exist.

    Args:
        size: Shorter side in pixels to which larger images are reduced.
        skip_corrupt: Whether to skip images that cannot be decoded.
        max_megapixels: Larger images count as ones that cannot be decoded.

    Returns:
        The listing of the images in the shards.

    Raises:
        InputError: images cannot be decoded, and they are not skipped, or none can.
    """
    kept: list[int] = []
    errors: list[tuple[str, str]] = []
    with atomic_folder(folder) as partial:
        writer = _Writer(partial)
        for index, result in enumerate(track(_encode_all(source, size, max_megapixels), "writing shards", len(source))):
            if isinstance(result, Exception):
                path = source.paths[index]
                errors.append((path, describe_decode_error(result, path)))
                if not skip_corrupt:
                    remedy = "repair or remove it (smallvit check names all), or add --skip-corrupt"
                    raise InputError(f"cannot be decoded: {group_errors(errors)}; {remedy}")
            else:
                writer.add(source.splits[index], result, None if source.label_sets else source.labels[index])
                kept.append(index)
        writer.close()
        if not kept:
            raise InputError(f"--data {source.root}: none of {len(source):,} images can be decoded")
        listing = _list_written(source, kept, errors, writer, folder)
        text, tensors = pack_listing(listing)
        with atomic_write(partial / LISTING) as file:
            save_file(tensors, file, {"listing": text})
        info = {"size": size, "class_names": listing.class_names, "splits": writer.splits}
        write_text(partial / INFO, json.dumps(info, indent=1) + "\n")
    return listing


def resize_to_jpeg(file: str | BinaryIO, size: int, max_megapixels: float = MAX_MEGAPIXELS) -> bytes:
    """Return an image as JPEG whose shorter side is at most `size`; a JPEG that is small enough is returned unchanged.

    Pillow's errors on damaged files pass through.

    Raises:
        ValueError: the image has more than 8 bits or other channels than colors, or is too large.
    """
    if read_channels(file, max_megapixels) is not None:
        raise ValueError("an array or several bands, which JPEG cannot hold")
    with open_image(file, max_megapixels) as image:
        if kind_of(image) is not None:
            raise ValueError("gray values of more than 8 bits, which JPEG cannot hold")
        if image.format == "JPEG" and min(image.size) <= size:
            image.load()  # raises if the file is damaged
            if isinstance(file, str):
                return Path(file).read_bytes()
            file.seek(0)
            return file.read()
        image.draft("RGB", (2 * size, 2 * size))
        rgb = to_rgb(ImageOps.exif_transpose(image))
    scale = min(1.0, size / min(rgb.size))
    width, height = (max(1, round(scale * side)) for side in rgb.size)
    buffer = io.BytesIO()
    rgb.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _encode_all(source: Listing, size: int, max_megapixels: float) -> Iterator[bytes | Exception]:
    """Yield each image as JPEG, or the error if it cannot be decoded, from several threads."""

    def encode(index: int) -> bytes | Exception:
        try:
            return resize_to_jpeg(source.open(index), size, max_megapixels)
        except Exception as error:  # libraries raise anything on damaged files
            return error

    with ThreadPoolExecutor(usable_cores()) as pool:
        for start in range(0, len(source), CHUNK):
            yield from pool.map(encode, range(start, min(start + CHUNK, len(source))))


def _list_written(
    source: Listing, kept: list[int], errors: list[tuple[str, str]], writer: _Writer, folder: Path
) -> Listing:
    """Return the listing of the images that were written, which are those of the source at the indices `kept`."""
    paths = [source.relative_path(index).replace(os.sep, "/") for index in kept]
    samples = [(path, source.labels[index], source.splits[index]) for path, index in zip(paths, kept, strict=True)]
    sizes = {path: FileInfo(path, str(location[2]), 0) for path, location in zip(paths, writer.locations, strict=True)}
    skipped = (f"skipped: {len(errors)} images that cannot be decoded: {group_errors(errors)}",) if errors else ()
    listing = build_listing(folder, Layout(source.class_names, samples, source.notes + skipped, ""), sizes)
    groups = None if source.groups is None else tuple([source.groups[index] for index in kept])
    return replace(
        listing,
        archive=Shards(folder, tuple(writer.names), np.array(writer.locations, dtype=np.int64)),
        groups=groups,
        weights=None if source.weights is None else tuple([source.weights[index] for index in kept]),
        label_sets=source.label_sets,
        content=f"{listing.content} {groups}" if groups else listing.content,
    )


class _Writer:
    """Write images to tar files of about `SHARD_BYTES`, and record their locations."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []
        self.locations: list[tuple[int, int, int]] = []
        self.splits: dict[str, dict[str, Any]] = {}
        """Shards of each split as timm's `ReaderWds` reads them, with their sizes in bytes."""
        self.tar: tarfile.TarFile | None = None

    def add(self, split: str, data: bytes, label: int | None) -> None:
        """Write an image, and its label if it has one."""
        if self.tar is None or self.split != split or self.tar.offset >= SHARD_BYTES:
            self._open(split)
        key = f"{len(self.locations):09}"
        self.locations.append((len(self.names) - 1, self._write(f"{key}.jpg", data), len(data)))
        if label is not None:
            self._write(f"{key}.cls", str(label).encode())
        shards = self.splits[split]
        shards["num_samples"] += 1
        shards["shard_lengths"][-1] += 1

    def close(self) -> None:
        """Complete the last shard."""
        if self.tar is not None:
            self.tar.close()
            with open(self.folder / self.names[-1], "r+b") as file:
                os.fsync(file.fileno())
                self.splits[self.split]["shard_bytes"].append(os.stat(file.fileno()).st_size)

    def _open(self, split: str) -> None:
        self.close()
        keys = ("filenames", "shard_lengths", "shard_bytes")
        shards = self.splits.setdefault(split, {"name": split, "num_samples": 0} | {key: [] for key in keys})
        name = f"{split}-{len(shards['filenames']):06}.tar"
        self.split, self.tar = split, tarfile.TarFile(self.folder / name, "w", format=tarfile.USTAR_FORMAT)
        self.names.append(name)
        shards["filenames"].append(name)
        shards["shard_lengths"].append(0)

    def _write(self, name: str, data: bytes) -> int:
        """Write a member and return where its data begins."""
        assert self.tar is not None
        member = tarfile.TarInfo(name)
        member.size, start = len(data), self.tar.offset + tarfile.BLOCKSIZE
        self.tar.addfile(member, io.BytesIO(data))
        return start
