"""ImageNet's official archives to folders of class folders.

ILSVRC2012_img_train.tar        a tar of one tar per class, <wnid>.tar   -> train/<wnid>/*.JPEG
ILSVRC2012_img_val.tar          the validation images, flat              -> val/<wnid>/*.JPEG
ILSVRC2012_devkit_t12.tar.gz    their classes, by number
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from torchvision.datasets.imagenet import load_meta_file, parse_devkit_archive

from smallvit.datasets.archives import members_of, opened_tar, unpacked, write
from smallvit.datasets.download import fetch, locked
from smallvit.datasets.table import DATASETS
from smallvit.errors import InputError

CLASS_TAR = re.compile(r"(n\d{8})\.tar")
VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


def unpack_imagenet(folder: Path, mirror: str | None = None) -> None:
    """Make sure that `folder` holds train/ and val/; what is missing comes from the archives in it, or on the mirror.

    A folder that is there is taken as it is, and its archive is not asked for.

    Raises:
        InputError: an archive is missing, has another checksum or holds something else, or the disk is full.
    """
    train, val, devkit = DATASETS["imagenet"].archives
    wanted = [train] * (not (folder / "train").is_dir()) + [val, devkit] * (not (folder / "val").is_dir())
    if not wanted:
        return
    fetch("imagenet", wanted, folder, mirror)
    with locked(folder, "unpacks imagenet"):
        if not (folder / "train").is_dir():
            _unpack_train(folder / train.file, folder / "train")
        if not (folder / "val").is_dir():
            _unpack_val(folder / val.file, folder / "val", _val_classes(folder))


def _unpack_train(archive: Path, into: Path) -> None:
    with unpacked(archive, into) as partial, opened_tar(archive, "imagenet, train") as members:
        for name, content in members:
            wnid = _match(CLASS_TAR, name, archive)
            with tarfile.open(fileobj=content) as images:
                _write_all(members_of(images, archive), partial / wnid)


def _write_all(images: Iterable[tuple[str, IO[bytes]]], into: Path) -> None:
    for name, content in images:
        write(content, into / name)


def _unpack_val(archive: Path, into: Path, wnids: list[str]) -> None:
    with unpacked(archive, into) as partial, opened_tar(archive, "imagenet, val") as members:
        count = 0
        for name, content in members:
            number = int(_match(VAL_IMAGE, name, archive))
            if not 1 <= number <= len(wnids):
                raise InputError(f"{archive}: {name!r} has no class among the {len(wnids):,} of the devkit")
            write(content, partial / wnids[number - 1] / name)
            count += 1
        if count != len(wnids):
            raise InputError(f"{archive}: holds {count:,} images, the devkit has the classes of {len(wnids):,}")


def _val_classes(folder: Path) -> list[str]:
    """The class of each validation image, in order."""
    try:
        parse_devkit_archive(folder)  # each time: an interruption may have left half of the file it writes
        return load_meta_file(folder)[1]
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        raise InputError(f"{folder}: ILSVRC2012_devkit_t12.tar.gz cannot be read ({error})") from None


def _match(pattern: re.Pattern[str], name: str, archive: Path) -> str:
    found = pattern.fullmatch(name)
    if not found:
        raise InputError(f"{archive}: {name!r} does not belong there: expected names like {pattern.pattern}")
    return found[1]
