"""`smallvit show`: a picture of augmented training images, with the labels that the model is to learn."""

from __future__ import annotations

from smallvit.cli.options import new_file, parse_options
from smallvit.config import Config

DESCRIPTION = """\
Write a picture of training images as the model sees them: in each row an image, then seven augmented views of it.

  smallvit show --data cifar100 --aug paper --out sheet.png
"""


def main(argv: list[str]) -> int:
    """Load the data, augment some of it, write the PNG (augmented.png, unless --out names another)."""
    serve = ("recipe", "config", "data", "augment", "seed", "out", "overwrite")
    config = Config.build(**parse_options(argv, "smallvit show", DESCRIPTION, serve))
    path = new_file(config.run.out or "augmented.png", ".png", overwrite=config.run.overwrite)

    from smallvit import sheet

    sheet.augmented(config).save(path)
    print(path)
    return 0
