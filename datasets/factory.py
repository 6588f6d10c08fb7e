"""Create the data set that a `DataConfig` names: read it, hold out missing splits, and describe it."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from smallvit.config.options import CROP_MODES, AugmentConfig, DataConfig
from smallvit.datasets import readers
from smallvit.datasets.catalog import DATASETS, DatasetInfo, is_hub_source, is_manifest, require_data
from smallvit.datasets.dataset import (
    Files,
    ImageDataset,
    Images,
    Split,
    hold_out,
    join,
    nested_share,
    pool,
    take_fold,
)
from smallvit.datasets.decode import (
    cache_folder,
    decode_cached,
    default_size,
    describe_errors,
    detect_channels,
    is_reduced,
    median_side,
)
from smallvit.datasets.gray import GrayRanges
from smallvit.datasets.image_folder import list_folder, list_zip
from smallvit.datasets.listing import Listing, group_by_path
from smallvit.datasets.manifest import read_manifest
from smallvit.datasets.presets import preset
from smallvit.datasets.shards import is_shards, read_shards
from smallvit.utils.errors import InputError
from smallvit.utils.sizes import ImageSize, height_width

UNKNOWN = {"flip": True, "aug": "mix", "policy": "imagenet"}
"""Augmentation defaults for images that are not in the catalog."""
MAX_IN_MEMORY = 4 * 2**30
"""Size in bytes up to which decoded images are kept in memory, on any machine; larger data sets are streamed."""


def data_folder(config: DataConfig) -> Path:
    """Return the folder of downloaded data sets."""
    folder = config.data_dir or os.environ.get("SMALLVIT_DATA")
    return Path(os.path.expanduser(folder)) if folder else cache_folder() / "data"


def create_dataset(
    config: DataConfig,
    *,
    draw: bool = True,
    ranges: GrayRanges | None = None,
    labels: bool = True,
    augment: AugmentConfig | None = None,
) -> ImageDataset:
    """Read, split and describe the data set that `config` names; download it first if necessary.

    Args:
        draw: Whether to hold out missing splits. If not, they are empty, and a folder may have one class only.
        ranges: Ranges of gray values of more than 8 bits of a trained model; missing ones are measured on the training
            images.
        labels: Whether labels are needed. If not, images without labels are one class without test images.
        augment: Augmentation of training; random crops of whole files require that the images stay on disk.

    Raises:
        InputError: the data set is unknown or unusable, images cannot be decoded, or the download failed.
    """
    require_data(config.data)
    info = DATASETS.get(config.data)
    if not _has_files(config.data):
        if config.streaming == "on":
            raise InputError(f"--streaming on: {config.data} is read into memory; only image files can be streamed")
        if config.group_by is not None:
            raise InputError(f"--group-by {config.group_by}: {config.data} has no file names to group by; remove it")
    if is_hub_source(config.data):
        return _load_hub(config, draw, ranges or GrayRanges())
    min_classes = 2 if draw else 1
    images = read_source(config, min_classes, labels=labels)
    draw = draw and len(images.class_names) > 1
    if isinstance(images, Listing):
        relist = partial(list_folder, images.root, min_classes, labels=labels)
        return _load_files(config, images, draw, relist, info, None if info else ranges, augment)
    size, crop_mode = config.img_size or info.img_size, CROP_MODES[config.resize]
    splits = {split: part.resize(size, crop_mode) for split, part in images.splits.items()}
    return assemble(config, splits, images.class_names, [], info, draw=draw)


def _has_files(data: str) -> bool:
    """Return whether a data set has image files, which can be streamed."""
    info = DATASETS.get(data)
    return info.reader in readers.FILE_FORMATS if info else not is_hub_source(data)


def create_pool(config: DataConfig, more: Sequence[str] = ()) -> ImageDataset:
    """Create the data set that `config` names, with the training images of others, whose labels are not used.

    Image size, channels, statistics, and validation and test images are those of the first. Images are streamed
    if any are too large, or all together.

    Args:
        more: The other data sets; options of `config` but --img-size and --in-chans apply to each.

    Raises:
        InputError: as `create_dataset` does, or numbers of channels differ.
    """
    if not more:
        return create_dataset(config, labels=False)
    parts = _load_parts(config, more)
    size = sum(part.train.pixels.nbytes for part in parts if isinstance(part.train, Images))
    streamed = any(part.train.on_disk for part in parts) or size > MAX_IN_MEMORY
    if config.streaming == "auto" and streamed:
        parts = _load_parts(replace(config, streaming="on"), more)
    first, *others = parts
    notes = [
        f"{part.name}: {note}"
        for part in others
        for note in (f"{len(part.train):,} more images to train on, without labels", *part.notes)
    ]
    return replace(
        first,
        train=pool([part.train for part in parts]),
        flip=all(part.flip for part in parts),
        gray_ranges=others[-1].gray_ranges,
        fingerprint=hashlib.sha256("\n".join(part.fingerprint for part in parts).encode()).hexdigest(),
        notes=(*first.notes, *notes),
    )


def _load_parts(config: DataConfig, more: Sequence[str]) -> list[ImageDataset]:
    """Create the data sets of a pool, those without files in memory."""
    parts: list[ImageDataset] = []
    for data in (config.data, *more):
        own, files, ranges = replace(config, data=data), _has_files(data), None
        if not files:
            own = replace(own, streaming="off")
        if parts:
            own = replace(own, img_size=parts[0].img_size, in_chans=parts[0].in_chans if files else "auto")
            ranges = parts[-1].gray_ranges
        parts.append(create_dataset(own, labels=False, ranges=ranges))
        if (channels := parts[-1].in_chans) != parts[0].in_chans:
            raise InputError(
                f"--data {data}: has images of {channels} channel{'s' * (channels > 1)}, and --data {config.data} of "
                f"{parts[0].in_chans}; remove one"
            )
    return parts


def read_source(config: DataConfig, min_classes: int = 2, *, labels: bool = True) -> Listing | readers.Arrays:
    """Return the image files that `config` names, or the images of a data set that has none; download it first.

    Args:
        labels: Whether labels are needed.

    Raises:
        InputError: the files are unusable, or the download failed.
    """
    if config.data in DATASETS:
        return readers.read(config.data, data_folder(config))
    root = Path(os.path.expanduser(config.data))
    if is_manifest(config.data):
        return read_manifest(root, config.columns, min_classes, labels=labels)
    if is_shards(root):
        return read_shards(root)
    return list_zip(root, labels=labels) if root.is_file() else list_folder(root, min_classes, labels=labels)


def _load_hub(config: DataConfig, draw: bool, ranges: GrayRanges) -> ImageDataset:
    """Read a data set of the Hugging Face Hub into memory."""
    parts, class_names, notes = readers.read_hub(config, data_folder(config), ranges)
    config = replace(config, data=readers.absolute_hub_source(config.data))
    digest = hashlib.sha256(os.fsencode(config.data))  # with the labels, the same at any image size
    for split, part in sorted(parts.items()):
        digest.update(f"{split} {len(part)}\n".encode() + part.labels.numpy().tobytes())
    return assemble(config, parts, class_names, notes, content=digest.hexdigest(), ranges=ranges, draw=draw)


def _load_files(
    config: DataConfig,
    files: Listing,
    draw: bool,
    relist: Callable[..., Listing],
    info: DatasetInfo | None = None,
    ranges: GrayRanges | None = None,
    augment: AugmentConfig | None = None,
) -> ImageDataset:
    """Decode a listing's images into memory, or leave them on disk if they are too large.

    Args:
        relist: Lists a folder again.
        augment: Augmentation of training, as in `create_dataset`.
    """
    if config.group_by is not None:
        files = group_by_path(files, config.group_by)
    side = None if config.img_size or info else median_side(files)
    size = config.img_size or (info.img_size if info else default_size(side))
    max_megapixels, crop_mode = config.max_megapixels, CROP_MODES[config.resize]
    labels, splits, notes = torch.tensor(files.labels), np.array(files.splits), list(files.notes)
    if side is not None and side >= 2 * size:
        notes.append(f"images of {side} pixels (median shorter side) are reduced to {size}; --img-size changes that")
    indices = np.arange(len(files))
    channels = detect_channels(files) if config.in_chans == "auto" else config.in_chans
    if config.in_chans == "auto" and channels != 3:
        notes.append(f"images are read with {channels} channel{'s' * (channels > 1)}, as the first file has")
    options = {"max_megapixels": max_megapixels, "crop_mode": crop_mode, "channels": channels}
    crops_files = augment is not None and _crops_files(config, augment, files, size, info)
    if crops_files and config.streaming == "off":
        raise InputError("--streaming off: --crop resized crops the whole files; remove it, or give --crop pad")
    too_large = len(files) * channels * math.prod(height_width(size)) > MAX_IN_MEMORY
    streamed = config.streaming == "on" or crops_files or (config.streaming == "auto" and too_large)
    if files.indexed and files.archive is None and not streamed:  # decoded images are cached by each file's time
        return _load_files(config, relist(use_index=False), draw, relist, info, ranges, augment)
    images = Files(files, indices, labels, size, config.skip_corrupt, config.workers, **options)
    parts: dict[str, Split] = {
        split: images.subset(np.flatnonzero(splits == split)) for split in dict.fromkeys(files.splits)
    }
    content, ranges, label_sets = files.content, ranges or GrayRanges(), None
    if files.label_sets is not None:
        label_sets = torch.zeros(len(files.label_sets), len(files.class_names))
        for row, each in zip(label_sets, files.label_sets, strict=True):
            row[[*each]] = 1
        content += f" {files.label_sets}"
        notes.append(f"several labels an image: {label_sets[labels].sum(dim=1).mean():.1f} on average")
    if info is None:
        train = _hold_out_missing(config, parts, files.class_names, draw, label_sets).parts["train"]
        measured = train.gray_ranges()
        ranges = ranges.filled(measured)
        notes += ranges.describe() if measured else []
    if streamed:
        parts = {split: replace(part, ranges=ranges) for split, part in parts.items()}
        notes.append("streaming: worker processes decode the images in every epoch")
    else:
        decoded = decode_cached(files, size, config.skip_corrupt, max_megapixels, ranges, crop_mode, channels)
        paths = tuple(files.relative_path(index) for index in range(len(files)))
        loaded, bad = Images(decoded.pixels, labels, paths, images.groups, images.weights), list(decoded.errors)
        parts = {split: loaded.subset(np.setdiff1d(part.positions, bad)) for split, part in parts.items()}
        notes += ["decoded images read from the cache"] if decoded.cached else []
        if bad:
            notes.append("skipped: " + describe_errors(files, decoded.errors))
            content += f" without {sorted(bad)}"
    digest = None if info else hashlib.sha256(content.encode()).hexdigest()
    described = {"content": digest, "ranges": ranges, "label_sets": label_sets}
    return assemble(config, parts, files.class_names, notes, info, draw=draw, **described)


def _crops_files(
    config: DataConfig, augment: AugmentConfig, files: Listing, size: ImageSize, info: DatasetInfo | None
) -> bool:
    """Return whether random crops of the files differ from those of images in memory, which have lost pixels."""
    aug = (info.aug if info else UNKNOWN["aug"]) if augment.aug == "auto" else augment.aug
    crop = preset(aug, size)["crop"] if augment.crop == "auto" else augment.crop
    return crop == "resized" and CROP_MODES[config.resize] == "center" and is_reduced(files, size)


def assemble(
    config: DataConfig,
    parts: dict[str, Split],
    class_names: tuple[str, ...],
    notes: list[str],
    info: DatasetInfo | None = None,
    *,
    content: str | None = None,
    ranges: GrayRanges = GrayRanges(),  # noqa: B008, it is frozen
    draw: bool = True,
    label_sets: Float[Tensor, "s k"] | None = None,
) -> ImageDataset:
    """Hold out missing splits and describe the data set.

    Args:
        parts: Images by split: train, val and test, or 'all'.
        info: Catalog entry, if the data set is known by name.
        content: Hash of the images, if the data set is not known by name.
        draw: Whether to hold out missing splits; if not, they are empty.
        label_sets: Classes of each label, if images have several.

    Raises:
        InputError: a class has no training images, or too few to hold some out.
    """
    fingerprint = hashlib.sha256()
    for split, part in sorted(parts.items()):
        fingerprint.update(f"{split} {part.content()}\n".encode())
    if label_sets is not None:
        fingerprint.update(label_sets.numpy())
    parts, held_out, more = _hold_out_missing(config, parts, class_names, draw, label_sets)
    train = parts["train"]
    named = config.data in DATASETS or not os.path.exists(os.path.expanduser(config.data))
    source = config.data if named else os.path.realpath(os.path.expanduser(config.data))
    if config.in_chans not in ("auto", train.channels):
        raise InputError(f"--in-chans {config.in_chans}: images of {config.data} have {train.channels}; remove it")
    published = info is not None and info.mean is not None and len(info.mean) == train.channels
    mean, std = (info.mean, info.std) if published else train.channel_statistics()
    defaults = {name: getattr(info, name) for name in UNKNOWN} if info else UNKNOWN
    return ImageDataset(
        name=config.data if named else Path(source).name,
        source=source,
        class_names=class_names,
        train=train,
        val=parts["val"],
        test=parts["test"],
        mean=mean,
        std=std,
        fingerprint=fingerprint.hexdigest(),
        content=content,
        drew_test="test" in held_out,
        drew_val="val" in held_out,
        gray_ranges=ranges,
        notes=(*notes, *more),
        label_sets=label_sets,
        **defaults,
    )


class HeldOut(NamedTuple):
    """Complete splits."""

    parts: dict[str, Split]
    """Images by split: train, val and test."""
    names: list[str]
    """Splits that were held out here."""
    notes: list[str]


def _hold_out_missing(
    config: DataConfig,
    parts: dict[str, Split],
    class_names: tuple[str, ...],
    draw: bool,
    label_sets: Float[Tensor, "s k"] | None = None,
) -> HeldOut:
    """Hold out the splits that the data does not have; without `draw` they are empty.

    Raises:
        InputError: a class has no training images, or too few to hold some out.
    """
    parts, notes = dict(parts), []
    if "all" in parts:
        parts["train"] = parts["all"]
    if "val" in parts and "test" not in parts:
        parts["test"] = parts.pop("val")
        notes.append("val/ without test/ is used as the test split; validation images are held out of train/")
    for split in parts.keys() - {"train", "all"}:
        if not len(parts[split]):
            raise InputError(f"--data {config.data}: no image of {split}/ can be used; repair them, or remove {split}/")
    if "train" not in parts:
        raise InputError(f"--data {config.data}: no training images")
    targets = None if label_sets is None else label_sets.numpy()
    missing = np.setdiff1d(np.arange(len(class_names)), _classes_of(parts["train"].labels.numpy(), targets))
    if len(missing):
        raise InputError(f"--data {config.data}: class {class_names[missing[0]]!r} has no usable training image")
    fractions, drew_fold = {"test": config.test_fraction, "val": config.val_fraction}, bool(config.folds) and draw
    if drew_fold:
        parts, more = _hold_out_fold(config, parts, class_names, targets)
        notes += more
    held_out = [split for split in fractions if split not in parts]
    if not draw:
        parts |= {split: parts["train"].subset(np.arange(0)) for split in held_out}
        held_out = []
    for split in held_out:
        train, fraction = parts["train"], fractions[split]
        labels, groups, seed = train.labels.numpy(), train.groups, config.split_seed
        try:
            rest, held = hold_out(labels, fraction, seed, f"a {split} split", class_names, groups, targets)
        except InputError as error:
            remedy = ", or add --val-fraction 0 to use the last epoch" if split == "val" else ""
            raise InputError(f"--data {config.data}: {error}{remedy}") from None
        parts |= {"train": train.subset(rest), split: train.subset(held)}
        if fraction:
            within = "" if groups is None else f" of {len(np.unique(groups[held])):,} groups"
            notes.append(f"{split} split: {len(held):,} images{within}, stratified, seed {seed}")
            if absent := np.setdiff1d(_classes_of(labels[rest], targets), _classes_of(labels[held], targets)).tolist():
                why = ", since groups stay together" if groups is not None else ""
                notes.append(f"{split} split: no images of {', '.join(class_names[label] for label in absent)}{why}")
        else:
            notes.append(f"no {split} split: the last epoch's weights are used")
    train = parts["train"]
    if config.train_fraction < 1:
        labels = train.labels.numpy() if targets is None else np.zeros(len(train), dtype=int)
        train = train.subset(nested_share(labels, config.train_fraction, config.split_seed))
        of = "each class" if targets is None else "all images"
        notes.append(f"training on {len(train):,} images, {100 * config.train_fraction:g} % of {of}")
    return HeldOut(parts | {"train": train}, ["test"] * drew_fold + held_out, notes)


def _classes_of(labels: np.ndarray, targets: np.ndarray | None) -> np.ndarray:
    """Return the classes of images with these labels."""
    return labels if targets is None else np.flatnonzero(targets[labels].any(axis=0))


def _hold_out_fold(
    config: DataConfig, parts: dict[str, Split], class_names: tuple[str, ...], targets: np.ndarray | None
) -> tuple[dict[str, Split], list[str]]:
    """Return a fold of the training and validation images as the test split, and notes.

    Raises:
        InputError: there are too few images or groups, or all images of a class are in the fold.
    """
    pool, notes = join(parts["train"], parts["val"]) if "val" in parts else parts["train"], []
    if "test" in parts:
        notes.append(f"--folds: the test split, {len(parts['test']):,} images, is not used")
    labels, groups = pool.labels.numpy(), pool.groups
    rest, held = take_fold(labels, groups, config.folds, config.fold, config.fold_seed, targets)
    if missing := np.setdiff1d(_classes_of(labels, targets), _classes_of(labels[rest], targets)).tolist():
        raise InputError(
            f"--data {config.data}: all images of class {class_names[missing[0]]!r} are in fold {config.fold} of "
            f"{config.folds}; add images{'' if groups is None else ' of other groups'}"
        )
    within = "" if groups is None else f" of {len(np.unique(groups[held])):,} groups"
    notes.append(
        f"fold {config.fold} of {config.folds} is the test split: {len(held):,} images{within}, seed {config.fold_seed}"
    )
    return {"train": pool.subset(rest), "test": pool.subset(held)}, notes
