"""`smallvit show`: draw augmented training images with their labels."""

from __future__ import annotations

from smallvit.cli.parser import Parser, options_parser, parse
from smallvit.config.config import Config
from smallvit.datasets.catalog import require_data
from smallvit.utils.files import check_output_file

DESCRIPTION = """\
Draw training images as the model sees them: each row has an image and seven
augmented views of it.

  smallvit show --data cifar100 --aug lee2021 --out sheet.png
  smallvit show --data DIR --img-size 64 --aug mix --flip 0 --out sheet.png
  smallvit show --recipe deit --data DIR

The output is one PNG file. The caption of a view is its label, or the two
mixed labels with their shares. Another --seed draws other images and views.
See also: smallvit list aug; docs/data.md.
"""
SERVES = ("recipe", "config", "data.*", "augment.*", "seed", "out", "overwrite")
HELP = {"out": "Output file (.png). [augmented.png]", "overwrite": "Replace --out."}


def parser() -> Parser:
    """Return the argument parser."""
    return options_parser("smallvit show", DESCRIPTION, SERVES, help_texts=HELP)


def main(argv: list[str]) -> int:
    """Load the data, augment some images, and write the PNG file."""
    config = Config.build(**parse(parser(), argv))
    require_data(config.data.data)
    path = check_output_file(config.run.out or "augmented.png", ".png", overwrite=config.run.overwrite)

    from smallvit.datasets.loader import draw_augmented

    draw_augmented(config).save(path)
    print(path)
    return 0
