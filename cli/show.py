"""`smallvit show`: a picture of augmented training images, with the labels that the model is to learn."""

from __future__ import annotations

import os
from pathlib import Path

from smallvit.cli.options import parse_options
from smallvit.config import Config
from smallvit.errors import InputError

DESCRIPTION = """\
Write a picture of training images as the model sees them: in each row an image, then seven augmented views of it.

  smallvit show --data cifar100 --aug paper --out sheet.png
"""


def main(argv: list[str]) -> int:
    """Load the data, augment some of it, write the PNG (augmented.png, unless --out names another)."""
    serve = ("recipe", "config", "data", "augment", "seed", "out", "overwrite")
    config = Config.build(**parse_options(argv, "smallvit show", DESCRIPTION, serve))
    path = Path(os.path.expanduser(config.run.out or "augmented.png"))
    if path.suffix.lower() != ".png":
        raise InputError(f"--out {path}: expected the name of a PNG file, such as augmented.png")
    if path.exists() and not config.run.overwrite:
        raise InputError(f"--out {path}: exists already; choose another name, or --overwrite")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--out {path}: no such folder as {path.absolute().parent}")

    from smallvit import sheet

    sheet.augmented(config).save(path)
    print(path)
    return 0
