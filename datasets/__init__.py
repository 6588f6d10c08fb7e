"""Data sets by name, and any folder of class folders, decoded into memory and split."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from smallvit.config import DataConfig, InputError, nearest
from smallvit.datasets.decode import decode_cached, default_size, describe_bad, require_memory
from smallvit.datasets.folder import Listing, list_folder
from smallvit.datasets.images import ImageDataset, Images, hold_out

__all__ = ["DATASETS", "ImageDataset", "Images", "load"]

DATASETS = {
    # Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI, the 1,797 images of its test part
    "digits": {
        "classes": 10,
        "images": 1797,
        "img_size": 8,
        "in_chans": 1,
        "flip": False,
        "aug": "basic",
        "source": "sklearn.datasets.load_digits",
    },
}


def load(config: DataConfig) -> ImageDataset:
    """Read, split and describe the data set that `config` names.

    Raises:
        InputError: unknown data set, unusable folder, or images that cannot be decoded.
    """
    if config.data in DATASETS:
        return _load_digits(config)
    root = Path(os.path.expanduser(config.data))
    if not os.path.exists(root) and root.name == config.data:
        hint = nearest(config.data, DATASETS)
        raise InputError(f"--data {config.data}: no such data set{hint} or folder; named: {', '.join(DATASETS)}")
    return _load_folder(config, list_folder(root))


def _load_digits(config: DataConfig) -> ImageDataset:
    digits = load_digits()
    pixels = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))[:, None]  # 0..16 to 0..255
    size = config.img_size or DATASETS["digits"]["img_size"]
    require_memory(4 * len(pixels), 1, size)  # resized in fp32
    if size != pixels.shape[-1]:
        pixels = F.interpolate(pixels.float(), (size, size), mode="bicubic", antialias=True)
        pixels = pixels.round().clamp(0, 255).byte()
    images = Images(pixels, torch.from_numpy(digits.target.astype(np.int64)))
    return _assemble(config, images, np.full(len(images), "all"), tuple(map(str, digits.target_names)), [])


def _load_folder(config: DataConfig, files: Listing) -> ImageDataset:
    size = config.img_size or default_size(files.paths)
    pixels, bad, cached = decode_cached(files.root, files.paths, files.fingerprint, size, config.skip_corrupt)
    images, splits = Images(pixels, torch.tensor(files.labels)), np.array(files.splits)
    notes = ["decoded images read from the cache"] if cached else []
    if bad:
        notes.append("left out: " + describe_bad(files.paths, bad))
        good = np.setdiff1d(np.arange(len(images)), list(bad))
        images, splits = images.subset(good), splits[good]
    return _assemble(config, images, splits, files.class_names, notes)


def _assemble(
    config: DataConfig, images: Images, splits: np.ndarray, class_names: tuple[str, ...], notes: list[str]
) -> ImageDataset:
    """Draw the splits that the data does not bring, and work out the training split's statistics."""
    labels = images.labels.numpy()
    parts = {split: np.flatnonzero(splits == split) for split in ("train", "val", "test", "all")}
    if len(parts["all"]):
        parts["train"] = parts["all"]
    if len(parts["val"]) and not len(parts["test"]):
        parts["test"], parts["val"] = parts["val"], parts["test"]
        notes.append("val/ stands alone: it is the test split, and the best epoch is chosen on training images")
    missing = np.setdiff1d(np.arange(len(class_names)), labels[parts["train"]])
    if len(missing):
        raise InputError(f"--data {config.data}: class {class_names[missing[0]]!r} has no usable training image")
    for split, fraction in (("test", config.test_fraction), ("val", config.val_fraction)):
        if not len(parts[split]):
            stay, held = hold_out(labels[parts["train"]], fraction, config.split_seed, f"a {split} split")
            parts["train"], parts[split] = parts["train"][stay], parts["train"][held]
            notes.append(f"{split} split: {len(held):,} images, stratified, seed {config.split_seed}")
    train, val, test = (images.subset(parts[split]) for split in ("train", "val", "test"))
    named = config.data in DATASETS
    source = config.data if named else os.path.realpath(os.path.expanduser(config.data))
    mean, std = train.channel_statistics()
    return ImageDataset(
        name=config.data if named else Path(source).name,
        source=source,
        class_names=class_names,
        train=train,
        val=val,
        test=test,
        mean=mean,
        std=std,
        flip=DATASETS[config.data]["flip"] if named else True,
        aug=DATASETS[config.data]["aug"] if named else "mix",
        fingerprint=_fingerprint(images, splits),
        notes=tuple(notes),
    )


def _fingerprint(images: Images, splits: np.ndarray) -> str:
    digest = hashlib.sha256(images.pixels.numpy())
    digest.update(images.labels.numpy())
    digest.update(" ".join(splits.tolist()).encode())
    return digest.hexdigest()
