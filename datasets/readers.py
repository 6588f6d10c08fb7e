"""Read the data sets known by name from their archives, and those of the Hugging Face Hub.

torchvision reads the files after their checksums were verified, since CIFAR's are pickles, which can run code. The
folder of a data set holds the archives, or only the unpacked files as torchvision names them (cifar-10-batches-py/,
cifar-100-python/, MNIST/raw/, FashionMNIST/raw/).
"""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, CIFAR100, SVHN
from torchvision.datasets.imagenet import load_meta_file, parse_devkit_archive
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import check_integrity

from smallvit.config.options import CROP_MODES, DataConfig
from smallvit.datasets.catalog import DATASETS
from smallvit.datasets.dataset import Images
from smallvit.datasets.decode import decode_image, run_in_threads
from smallvit.datasets.download import explain_damage, fetch, open_tar, unpack_gzip, unpack_tar
from smallvit.datasets.gray import GrayRanges
from smallvit.datasets.image_folder import list_folder, list_zip
from smallvit.datasets.listing import Listing
from smallvit.utils.errors import InputError, first_line
from smallvit.utils.files import LOCK, atomic_folder, locked
from smallvit.utils.hardware import require_memory
from smallvit.utils.sizes import height_width

HUB_SPLITS = {"train": ("train",), "val": ("validation", "val", "valid"), "test": ("test",)}
"""Names of each split at the Hugging Face Hub."""
HUB_SIZE = 64
"""Default height and width in pixels at the Hub; the size of the images is not known beforehand."""


class Arrays(NamedTuple):
    """Decoded images of a data set and the names of its classes."""

    splits: dict[str, Images]
    """By split: train and test, or 'all' if there is no published test set."""
    class_names: tuple[str, ...]


def read(name: str, data_dir: Path) -> Arrays | Listing:
    """Read a data set from its folder in `data_dir`; download and unpack what is missing.

    Args:
        name: Key of `catalog.DATASETS`.

    Returns:
        Decoded images, or the listing of image files.

    Raises:
        InputError: a file is missing and cannot be downloaded, has another checksum, or cannot be read.
    """
    info = DATASETS[name]
    folder = data_dir / (info.folder or name)
    try:
        return READERS[info.reader](name, folder)
    except (OSError, RuntimeError) as error:
        raise InputError(f"--data {name}: {folder} cannot be read ({first_line(error)})") from None


def _read_image_folder(name: str, folder: Path) -> Listing:
    """List class folders in a zip file, or those unpacked from a tar file."""
    archives = DATASETS[name].archives
    unpacked = folder / archives[0].file.split(".")[0]
    if not unpacked.is_dir():
        (archive,) = fetch(folder.name, archives, folder)
        if archive.suffix == ".zip":
            return list_zip(archive)
        with locked(folder / LOCK, f"unpacks {name}"):
            if not unpacked.is_dir():
                unpack_tar(archive, unpacked)
    return list_folder(unpacked)


def _read_imagenet(name: str, folder: Path) -> Listing:
    unpack_imagenet(folder)
    return list_folder(folder)


def unpack_imagenet(folder: Path) -> None:
    """Create the folders train/ and val/ that are missing in `folder` from the official archives.

    ILSVRC2012_img_train.tar        a tar file of one tar file per class, <wnid>.tar  -> train/<wnid>/*.JPEG
    ILSVRC2012_img_val.tar          the validation images in one folder               -> val/<wnid>/*.JPEG
    ILSVRC2012_devkit_t12.tar.gz    the classes of the validation images, in order of their names
    """
    train, val, devkit = DATASETS["imagenet"].archives
    no_train, no_val = not (folder / "train").is_dir(), not (folder / "val").is_dir()
    if no_train or no_val:
        fetch("imagenet", [train] * no_train + [val, devkit] * no_val, folder)
        with locked(folder / LOCK, "unpacks imagenet"):
            if not (folder / "train").is_dir():
                _unpack_imagenet_train(folder / train.file, folder / "train")
            if not (folder / "val").is_dir():
                parse_devkit_archive(folder)  # each time: an interruption may have left half of the file it writes
                _unpack_imagenet_val(folder / val.file, folder / "val", load_meta_file(folder)[1])


def _unpack_imagenet_train(archive: Path, folder: Path) -> None:
    with explain_damage(archive), atomic_folder(folder) as partial, open_tar(archive) as tar:
        for member in tar:
            with tarfile.open(fileobj=tar.extractfile(member)) as images:
                images.extractall(partial / Path(member.name).stem, filter="data")


def _unpack_imagenet_val(archive: Path, folder: Path, wnids: list[str]) -> None:
    with explain_damage(archive), atomic_folder(folder) as partial, open_tar(archive) as tar:
        for member in tar:
            number = int(Path(member.name).stem.rpartition("_")[2])  # ILSVRC2012_val_00000001.JPEG
            tar.extract(member, partial / wnids[number - 1], filter="data")


def _read_digits(name: str, folder: Path) -> Arrays:
    digits = load_digits()
    pixels = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))[:, None]  # 0..16 to 0..255
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return Arrays({"all": Images(pixels, labels)}, DATASETS[name].class_names)


def _read_cifar(name: str, folder: Path) -> Arrays:
    reader = {CIFAR10.filename: CIFAR10, CIFAR100.filename: CIFAR100}[DATASETS[name].archives[0].file]
    base = folder / reader.base_folder
    if not _is_cifar_intact(reader, base):
        (archive,) = fetch(folder.name, DATASETS[name].archives, folder)
        with locked(folder / LOCK, f"unpacks {name}"):
            if not _is_cifar_intact(reader, base):
                unpack_tar(archive, base)
    train, test = reader(folder, train=True), reader(folder, train=False)
    labels, class_names = (train.targets, test.targets), train.classes
    if name == "cifar100-coarse":
        labels = [_unpickle(base / part)["coarse_labels"] for part in ("train", "test")]
        class_names = _unpickle(base / "meta")["coarse_label_names"]
    return _arrays([part.data.transpose(0, 3, 1, 2) for part in (train, test)], labels, class_names)


def _is_cifar_intact(reader: type[CIFAR10], base: Path) -> bool:
    files = [*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])]
    return all(check_integrity(base / file, md5) for file, md5 in files)


def _unpickle(path: Path) -> dict[str, list]:
    """Load a file of CIFAR whose checksum was verified."""
    with open(path, "rb") as file:
        return pickle.load(file, encoding="latin1")


def _read_svhn(name: str, folder: Path) -> Arrays:
    archives = DATASETS[name].archives
    fetch(folder.name, archives, folder)
    parts = {"train": [], "test": []}
    for archive in archives:
        split = archive.file.split("_")[0]  # train, test or extra
        parts["test" if split == "test" else "train"].append(SVHN(folder, split))
    pixels = [np.concatenate([each.data for each in part]) for part in parts.values()]
    labels = [np.concatenate([each.labels for each in part]) for part in parts.values()]
    return _arrays(pixels, labels, DATASETS[name].class_names)


def _read_mnist(name: str, folder: Path) -> Arrays:
    info = DATASETS[name]  # archives: training images and labels, test images and labels
    unpacked = folder / info.title.replace("-", "") / "raw"  # as torchvision names it
    files = [unpacked / Path(archive.file).stem for archive in info.archives]
    if not all(file.is_file() for file in files):
        paths = fetch(folder.name, info.archives, folder)
        with locked(folder / LOCK, f"unpacks {name}"):
            for path, file in zip(paths, files, strict=True):
                unpack_gzip(path, file)
    pixels = [read_image_file(str(file))[:, None].numpy() for file in files[::2]]
    return _arrays(pixels, [read_label_file(str(file)) for file in files[1::2]], info.class_names)


def _arrays(pixels: Iterable[np.ndarray], labels: Iterable[object], class_names: Sequence[str]) -> Arrays:
    """Collect pixels (n, c, h, w) in uint8 and labels (n), of the training and of the test images."""
    splits = {
        split: Images(torch.from_numpy(np.ascontiguousarray(x)), torch.as_tensor(y, dtype=torch.int64))
        for split, x, y in zip(("train", "test"), pixels, labels, strict=True)
    }
    return Arrays(splits, tuple(class_names))


FILE_FORMATS = {"image-folder", "imagenet"}
"""Formats of `READERS` with image files, which can be streamed."""
READERS: dict[str, Callable[[str, Path], Arrays | Listing]] = {
    "image-folder": _read_image_folder,
    "sklearn-digits": _read_digits,
    "cifar": _read_cifar,
    "svhn": _read_svhn,
    "mnist": _read_mnist,
    "imagenet": _read_imagenet,
}
"""A reader for each format: called with the data set's name and its folder."""


def absolute_hub_source(data: str) -> str:
    """Return hfds/DIR with the absolute path of the folder; hfds/NAME unchanged."""
    kind, _, name = data.partition("/")
    folder = os.path.expanduser(name)
    return f"{kind}/{os.path.realpath(folder)}" if os.path.isdir(folder) else data


def read_hub(
    config: DataConfig, folder: Path, ranges: GrayRanges
) -> tuple[dict[str, Images], tuple[str, ...], list[str]]:
    """Read a data set of the Hugging Face Hub, or a folder that its `datasets` package reads, into memory.

    A split without labels (-1) is not used.

    Args:
        folder: Folder for downloads.
        ranges: Ranges of gray values of more than 8 bits; where there are none, 0 to 65,535, of floats 0 to 1.

    Returns:
        The images of each split, the class names, and notes.

    Raises:
        InputError: the source has no training split or cannot be read, or the package is missing.
    """
    data = absolute_hub_source(config.data)
    try:
        hub = import_module("datasets")
    except ImportError:
        raise InputError(f"--data {data}: needs a package: pip install datasets") from None
    try:
        source = hub.load_dataset(data.partition("/")[2], cache_dir=str(folder / "hfds"))
    except Exception as error:  # the package raises anything
        raise InputError(f"--data {data}: cannot be read ({first_line(error)})") from None
    if "train" not in source:
        raise InputError(f"--data {data}: has no split train, only {', '.join(source)}")
    features = source["train"].features
    if not {"image", "label"} <= features.keys():
        raise InputError(f"--data {data}: its columns are {', '.join(features)}; expected image and label")
    parts, notes = {}, []
    for split, names in HUB_SPLITS.items():
        rows = next((source[name] for name in names if name in source), None)
        if rows is None:
            continue
        labels = torch.tensor(rows["label"][:])
        if labels.min() >= 0:
            parts[split] = Images(_decode_rows(split, rows, config, ranges), labels)
        elif split == "train":
            raise InputError(f"--data {data}: the training images have no labels")
        else:
            notes.append(f"{split}: no labels, not used")
    count = 1 + max(int(part.labels.max()) for part in parts.values())
    return parts, tuple(getattr(features["label"], "names", None) or map(str, range(count))), notes


def _decode_rows(split: str, rows: Any, config: DataConfig, ranges: GrayRanges) -> torch.Tensor:
    image_files = import_module("datasets").Image(decode=False)
    rows, size = rows.cast_column("image", image_files), config.img_size or HUB_SIZE
    require_memory(len(rows), 3, size)
    pixels = np.empty((len(rows), 3, *height_width(size)), dtype=np.uint8)

    def decode(index: int) -> None:
        image = rows[index]["image"]
        file = io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]
        pixels[index] = decode_image(file, size, ranges, config.max_megapixels, CROP_MODES[config.resize])

    errors = run_in_threads(decode, range(len(rows)), [config.data] * len(rows), f"decoding {split}")
    for index, reason in sorted(errors.items()):
        raise InputError(f"--data {absolute_hub_source(config.data)}: image {index + 1} of {split}: {reason}")
    return torch.from_numpy(pixels)
