"""`smallvit show`: a picture of augmented training images, with the labels that the model is to learn."""

from __future__ import annotations

from smallvit.cli.options import Parser, new_file, options_parser, parsed
from smallvit.config import Config

DESCRIPTION = """\
Write a picture of training images as the model sees them: in each row an image, then seven augmented views of it.

  smallvit show --data cifar100 --aug paper --out sheet.png
  smallvit show --data DIR --img-size 64 --aug mix --flip 0 --overwrite --out sheet.png
  smallvit show --recipe deit --data DIR

One PNG is written, augmented.png unless --out names another. Below each image stands its label, or the two that it is
mixed from with their shares. --seed draws other images and views.
See also: smallvit list aug; docs/data.md.
"""


SERVES = ("recipe", "config", "data.*", "augment.*", "seed", "out", "overwrite")
TOLD = {"out": "File (.png) for the picture. [augmented.png]", "overwrite": "Replace --out."}


def parser() -> Parser:
    """The arguments."""
    return options_parser("smallvit show", DESCRIPTION, SERVES, told=TOLD)


def main(argv: list[str]) -> int:
    """Load the data, augment some of it, write the PNG (augmented.png, unless --out names another)."""
    config = Config.build(**parsed(parser(), argv))
    path = new_file(config.run.out or "augmented.png", ".png", overwrite=config.run.overwrite)

    from smallvit import sheet

    sheet.augmented(config).save(path)
    print(path)
    return 0
