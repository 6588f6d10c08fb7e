"""Tiny-ImageNet's official layout, unpacked or in the zip file as it comes.

    wnids.txt                              the classes, in their order
    words.txt                              their names
    train/<wnid>/images/*.JPEG
    val/images/*.JPEG                      all in one folder; their classes stand in val/val_annotations.txt
    test/images/*.JPEG                     without labels: not used

The validation images are the ones everybody reports on, so they are the test split here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import PurePosixPath

from smallvit.datasets.listing import is_image
from smallvit.errors import InputError

ANNOTATIONS = "val/val_annotations.txt"

Entry = tuple[str, int, str]
"""An image's name, class number and split."""


def read_layout(
    names: list[str], read_text: Callable[[str], str], source: object
) -> tuple[tuple[str, ...], list[Entry]]:
    """Class names, and the labelled images among `names`, which are relative to the layout's top.

    Raises:
        InputError: validation images without a label, labels without an image, or fewer than two classes.
    """
    images = sorted(name for name in names if is_image(name))
    training = [name for name in images if name.startswith("train/")]
    wnids = read_text("wnids.txt").split() if "wnids.txt" in names else sorted({_part(name, 1) for name in training})
    number = {wnid: index for index, wnid in enumerate(wnids)}
    if len(number) < 2:
        raise InputError(f"--data {source}: at least two classes are needed, wnids.txt and train/ have {len(number)}")
    words = _table(read_text("words.txt")) if "words.txt" in names else {}
    labels = _table(read_text(ANNOTATIONS))
    if not training:
        raise InputError(f"--data {source}: train/ holds no images")
    entries: list[Entry] = []
    for name in training:
        if _part(name, 1) not in number:
            raise InputError(f"--data {source}: class folder train/{_part(name, 1)} is not listed in wnids.txt")
        entries.append((name, number[_part(name, 1)], "train"))
    seen = set()
    for name in images:
        if name.startswith("val/"):
            file = PurePosixPath(name).name
            if labels.get(file) not in number:
                raise InputError(f"--data {source}: {name} has no (known) class in {ANNOTATIONS}")
            seen.add(file)
            entries.append((name, number[labels[file]], "test"))
    missing = sorted(labels.keys() - seen)
    if missing:
        raise InputError(f"--data {source}: val/images/{missing[0]} is labelled but missing; unpack the archive anew")
    return _class_names(wnids, words), entries


def _class_names(wnids: list[str], words: Mapping[str, str]) -> tuple[str, ...]:
    """The first word for each class, with its number where two classes share it."""
    first = [words.get(wnid, wnid).split(",")[0] for wnid in wnids]
    pairs = zip(first, wnids, strict=True)
    return tuple(name if first.count(name) == 1 else f"{name} ({wnid})" for name, wnid in pairs)


def _table(text: str) -> dict[str, str]:
    """The first two columns of a file with tabs between them."""
    rows = (line.split("\t") for line in text.splitlines() if line.strip())
    return {row[0]: row[1] for row in rows if len(row) > 1}


def _part(name: str, position: int) -> str:
    return name.split("/")[position]
