"""Write a set of images as people have them, with planted faults, and count which of the faults `smallvit check` lists.

    python benchmarks/own_data.py write CIFAR100 OUT
    smallvit check OUT/labels.csv --columns path=file,label=species,group=plant --out check.html
    python benchmarks/own_data.py count OUT check.json

CIFAR100 is a folder with train/<class>/ and test/<class>/. OUT gets ten of its classes: 500 training images of the
first and 10 of the last (1:50), 40 test images of each, resized to 24 to 72 pixels a side, as PNG and JPEG files, with
their labels and groups of five images (the column plant) in a table. 20 training images have a copy among the test
images: exact, resized, recompressed or darkened by 15 %. 3 % of the training labels are replaced by another class. What
was planted is in OUT/faults.json.
"""

from __future__ import annotations

import csv
import json
import math
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

CLASSES = (
    "sunflower",
    "keyboard",
    "motorcycle",
    "wardrobe",
    "chimpanzee",
    "orange",
    "skyscraper",
    "plain",
    "palm_tree",
    "lawn_mower",
)
LARGEST, SMALLEST, TEST, GROUP = 500, 10, 40, 5
"""Training images of the first and of the last class, test images of each class, and images of a group."""
COPIES, WRONG = 20, 0.03
"""Planted duplicates, and share of the training labels that are wrong."""
SIDES = (24, 73)
"""Bounds of the sides in pixels."""
CHANGES: tuple[Callable[[Image.Image], Image.Image], ...] = (
    lambda image: image,
    lambda image: image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.BICUBIC),
    lambda image: image,  # saved with another quality
    lambda image: ImageEnhance.Brightness(image).enhance(0.85),
)


def write(source: Path, out: Path) -> None:
    """Write the images, the table and the list of faults."""
    rng = np.random.default_rng(0)
    rows, copies = [], []
    ratio = (SMALLEST / LARGEST) ** (1 / (len(CLASSES) - 1))
    for number, name in enumerate(CLASSES):
        for split, count in (("train", round(LARGEST * ratio**number)), ("test", TEST)):
            (out / split).mkdir(parents=True, exist_ok=True)
            files = sorted((source / split / name).iterdir())
            for index in range(count):
                file = f"{split}/{name}_{index:03}.{('png', 'jpg')[index % 2]}"
                size = rng.integers(*SIDES, 2).tolist()
                Image.open(files[index]).resize(size, Image.Resampling.BICUBIC).save(out / file, quality=95)
                rows.append([file, name, f"{split}-{name}-{index // GROUP:02}", split])
    train = [row for row in rows if row[3] == "train"]
    for number, index in enumerate(rng.choice(len(train), COPIES, replace=False)):
        file, name, _, _ = train[index]
        change = number % len(CHANGES)
        copy = f"test/copy_{number:02}.{'jpg' if change == 2 else 'png'}"
        CHANGES[change](Image.open(out / file).convert("RGB")).save(out / copy, quality=75)
        rows.append([copy, name, f"test-copy-{number:02}", "test"])
        copies.append(sorted([file, copy]))
    wrong = [train[index] for index in rng.choice(len(train), math.ceil(WRONG * len(train)), replace=False)]
    for row in wrong:
        row[1] = str(rng.choice([name for name in CLASSES if name != row[1]]))
    with (out / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file", "species", "plant", "split"], *rows])
    faults = {"duplicates": copies, "wrong_labels": [row[0] for row in wrong], "train": len(train)}
    (out / "faults.json").write_text(json.dumps(faults, indent=1))
    print(f"{len(train):,} training and {len(rows) - len(train):,} test images, {len(wrong)} wrong labels")


def count(out: Path, results: Path) -> None:
    """Print how many of the faults are among the findings."""
    faults, checked = json.loads((out / "faults.json").read_text()), json.loads(results.read_text())
    groups = [{each["path"] for each in group["images"]} for group in checked["duplicates"]]
    copies = sum(any({*pair} <= group for group in groups) for pair in faults["duplicates"])
    print(f"{copies} of {len(faults['duplicates'])} duplicates, in {len(groups)} groups")
    first = [each["path"] for each in checked["wrong_labels"]][: math.floor(0.06 * faults["train"])]
    wrong = len({*first} & {*faults["wrong_labels"]})
    print(f"{wrong} of {len(faults['wrong_labels'])} wrong labels among the first {len(first)} listed")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("write", "count"))
    parser.add_argument("first", type=Path, metavar="CIFAR100|OUT")
    parser.add_argument("second", type=Path, metavar="OUT|RESULTS")
    given = parser.parse_args()
    {"write": write, "count": count}[given.action](given.first, given.second)
