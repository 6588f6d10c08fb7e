"""From what --data names to images: a data set by name, files, or a source of timm's; split and described."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from sklearn.datasets import load_digits

from smallvit.datasets import readers, timm_source
from smallvit.datasets.decode import cache_folder, decode_cached, default_size, describe_bad
from smallvit.datasets.download import fetch
from smallvit.datasets.folder import list_folder
from smallvit.datasets.imagenet import unpack_imagenet
from smallvit.datasets.images import ImageDataset, Images, hold_out, nested_share
from smallvit.datasets.listing import Listing
from smallvit.datasets.memory import fits_memory
from smallvit.datasets.streaming import Files
from smallvit.datasets.table import DATASETS, Entry
from smallvit.datasets.zips import list_zip
from smallvit.errors import InputError, nearest
from smallvit.options import DataConfig

Split = Images | Files

FOLDER = {"flip": True, "aug": "mix", "policy": "imagenet"}
"""What suits images of which nothing is known."""
IN_MEMORY = 0.5
"""Share of the free memory that decoded images may take before they are streamed instead."""


def data_folder(config: DataConfig) -> Path:
    """Where downloaded data sets are kept."""
    given = config.data_dir or os.environ.get("SMALLVIT_DATA")
    return Path(os.path.expanduser(given)) if given else cache_folder() / "data"


def load(config: DataConfig, *, draw: bool = True) -> ImageDataset:
    """Read, split and describe the data set that `config` names; download it first, if it is one that can be.

    Without `draw`, splits that the data does not bring have no images, and of a folder one class is enough.

    Raises:
        InputError: unknown data set, unusable folder, images that cannot be decoded, or a download that failed.
    """
    if config.data_url is not None and not (config.data in DATASETS and DATASETS[config.data].archives):
        raise InputError(f"--data-url: {config.data} is not downloaded; leave it out")
    if config.data in DATASETS:
        return _load_named(config, DATASETS[config.data], draw)
    if timm_source.is_source(config.data):
        parts, class_names, notes = timm_source.read(config, data_folder(config))
        config = replace(config, data=timm_source.absolute(config.data))
        return assemble(config, parts, class_names, notes, content=_counted(config.data, parts), draw=draw)
    root = Path(os.path.expanduser(config.data))
    if not os.path.exists(root) and root.name == config.data:
        hint = nearest(config.data, DATASETS)
        raise InputError(f"--data {config.data}: no such data set{hint} or folder; named: {', '.join(DATASETS)}")
    lister = list_zip if root.is_file() else partial(list_folder, least=2 if draw else 1)
    return _load_files(config, _list(lister, root), draw)


def _load_named(config: DataConfig, entry: Entry, draw: bool) -> ImageDataset:
    folder, name = data_folder(config), config.data
    if name in ("tiny-imagenet", "imagenet"):
        return _load_files(config, _named_files(name, folder, config.data_url), draw, entry)
    if config.streaming == "on":
        raise InputError(f"--streaming on: {name} is read into memory; only files of images are streamed")
    size = config.img_size or entry.img_size
    if name == "digits":
        return assemble(config, {"all": _digits().resize(size)}, readers.DIGITS, [], entry, draw=draw)
    read = readers.read(name, folder, config.data_url)
    parts = {"train": Images(read.train_pixels, read.train_labels), "test": Images(read.test_pixels, read.test_labels)}
    resized = {split: part.resize(size) for split, part in parts.items()}
    return assemble(config, resized, read.class_names, [], entry, draw=draw)


def _digits() -> Images:
    digits = load_digits()
    pixels = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))[:, None]  # 0..16 to 0..255
    return Images(pixels, torch.from_numpy(digits.target.astype(np.int64)))


def _named_files(name: str, folder: Path, url: str | None) -> Listing:
    """The files of Tiny-ImageNet (its zip as it comes, or unpacked beside it) or ImageNet (its folders)."""
    home = folder / name
    if name == "imagenet":
        unpack_imagenet(home, url)
        return _list(list_folder, home)
    if (unpacked := home / "tiny-imagenet-200").is_dir():
        return list_folder(unpacked)
    return list_zip(*fetch(name, DATASETS[name].archives, home, url))


def _list(lister: Callable[[Path], Listing], root: Path) -> Listing:
    with Console(stderr=True).status(f"listing {escape(str(root))}"):  # a minute, for a million files on a network
        return lister(root)


def _load_files(config: DataConfig, files: Listing, draw: bool, entry: Entry | None = None) -> ImageDataset:
    """Decode a listing's images into memory, or leave them on disk where they do not fit there."""
    size = config.img_size or (entry.img_size if entry else default_size(files))
    labels, splits, notes = torch.tensor(files.labels), np.array(files.splits), []
    images: Split
    content = files.content
    if config.streaming == "on" or (config.streaming == "auto" and not fits_memory(len(files), 3, size, IN_MEMORY)):
        images = Files(files, np.arange(len(files)), labels, size, config.skip_corrupt, config.workers)
        notes.append("images are decoded anew each epoch, by worker processes")
    else:
        pixels, bad, cached = decode_cached(files, size, config.skip_corrupt)
        images = Images(pixels, labels, tuple(files.named(index) for index in range(len(files))))
        notes += ["decoded images read from the cache"] if cached else []
        if bad:
            notes.append("left out: " + describe_bad(files, bad))
            good = np.setdiff1d(np.arange(len(images)), list(bad))
            images, splits = images.subset(good), splits[good]
            content += f" without {sorted(bad)}"
    parts = {split: images.subset(np.flatnonzero(splits == split)) for split in dict.fromkeys(files.splits)}
    told = None if entry else hashlib.sha256(content.encode()).hexdigest()
    return assemble(config, parts, files.class_names, notes, entry, content=told, draw=draw)


def assemble(
    config: DataConfig,
    parts: dict[str, Split],
    class_names: tuple[str, ...],
    notes: list[str],
    entry: Entry | None = None,
    *,
    content: str | None = None,
    draw: bool = True,
) -> ImageDataset:
    """Draw the splits that the data does not bring (of train, val, test; or all), and describe the whole.

    Without `draw` they are empty; `content` tells the images from others, where no name does.

    Raises:
        InputError: a class without training images, or with too few to hold some out.
    """
    fingerprint = _fingerprint(parts)
    if "all" in parts:
        parts = parts | {"train": parts["all"]}
    if "val" in parts and "test" not in parts:
        parts = {split: part for split, part in parts.items() if split != "val"} | {"test": parts["val"]}
        notes.append("val/ stands alone: it is the test split, and the best epoch is chosen on training images")
    for split in parts.keys() - {"train", "all"}:
        if not len(parts[split]):
            raise InputError(f"--data {config.data}: no image of {split}/ can be used; repair them, or remove {split}/")
    if "train" not in parts:
        raise InputError(f"--data {config.data}: it holds no training images")
    missing = np.setdiff1d(np.arange(len(class_names)), parts["train"].labels.numpy())
    if len(missing):
        raise InputError(f"--data {config.data}: class {class_names[missing[0]]!r} has no usable training image")
    fractions = {"test": config.test_fraction, "val": config.val_fraction}
    drawn = [split for split in fractions if split not in parts]
    if not draw:
        parts |= {split: parts["train"].subset(np.arange(0)) for split in drawn}
        drawn = []
    for split in drawn:
        train, fraction = parts["train"], fractions[split]
        stay, held = hold_out(train.labels.numpy(), fraction, config.split_seed, f"a {split} split", class_names)
        parts |= {"train": train.subset(stay), split: train.subset(held)}
        if fraction:
            notes.append(f"{split} split: {len(held):,} images, stratified, seed {config.split_seed}")
        else:
            notes.append(f"no {split} split: the last epoch is taken")
    train = parts["train"]
    if config.train_fraction < 1:
        train = train.subset(nested_share(train.labels.numpy(), config.train_fraction, config.split_seed))
        notes.append(f"trained on {len(train):,} images, {100 * config.train_fraction:g} % of each class")
    named = config.data in DATASETS or not os.path.exists(os.path.expanduser(config.data))
    source = config.data if named else os.path.realpath(os.path.expanduser(config.data))
    published = entry is not None and bool(entry.archives)
    mean, std = (entry.mean, entry.std) if published else train.channel_statistics()
    suits = {name: getattr(entry, name) for name in FOLDER} if entry else FOLDER
    return ImageDataset(
        name=config.data if named else Path(source).name,
        source=source,
        class_names=class_names,
        train=train,
        val=parts["val"],
        test=parts["test"],
        mean=mean,
        std=std,
        fingerprint=fingerprint,
        content=content,
        drew_test="test" in drawn,
        drew_val="val" in drawn,
        notes=tuple(notes),
        **suits,
    )


def _counted(source: str, parts: dict[str, Split]) -> str:
    """What tells a source's images from those that it held before, at any size: how many of which class."""
    digest = hashlib.sha256(os.fsencode(source))
    for split, part in sorted(parts.items()):
        digest.update(f"{split} {len(part)}\n".encode() + part.labels.numpy().tobytes())
    return digest.hexdigest()


def _fingerprint(parts: dict[str, Split]) -> str:
    digest = hashlib.sha256()
    for split, part in sorted(parts.items()):
        digest.update(f"{split} {part.content()}\n".encode())
    return digest.hexdigest()
