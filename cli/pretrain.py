"""`smallvit pretrain`: train features on images without labels."""

from __future__ import annotations

from smallvit.cli import train
from smallvit.cli.parser import Parser, options_parser, parse
from smallvit.utils.errors import InputError

DESCRIPTION = """\
Train a model on images without labels, to start training with few labels from
it. Labels are not used, and not needed.

  smallvit pretrain --arch vit --spt --lsa --data DIR     # any folder of images
  smallvit pretrain --arch vit --data cifar100 --data photos/ --data more.zip
  smallvit pretrain --arch vit --data DIR --objective dino
  smallvit train --init RUN --recipe finetune-ssl --data LABELED
  smallvit probe RUN --data LABELED           # linear classifier, k-NN
  smallvit pretrain --resume RUN              # after an interruption

The training images of all --data are pooled. If the first one has classes, the
accuracy of nearest neighbors on its validation images is shown after each
--val-interval epochs. The splits of data with classes are those of smallvit
train; else all images are trained on.

Without --recipe, the recipe pretrain replaces defaults below: lejepa, 200
epochs, batches of 256, learning rate 2e-3.
"""
DETAILS = """
The run folder is --out, by default a new one, as smallvit train writes it, with
the model's weights without a classifier. watch and report show its curves. The
rank in metrics.jsonl is the number of dimensions that features use: about 1 if
they collapse.
See also: smallvit train, probe; docs/pretraining.md.
"""


def parser() -> Parser:
    """Return the argument parser."""
    return options_parser("smallvit pretrain", DESCRIPTION, details=DETAILS, shown="pretrain")


def main(argv: list[str]) -> int:
    """Parse the flags and pretrain."""
    if not any(each.split("=")[0] in ("--recipe", "--config", "--resume") for each in argv):
        argv = ["--recipe", "pretrain", *argv]
    options = parse(parser(), argv)
    if options.get("objective", "lejepa") == "supervised":
        raise InputError("--objective supervised: needs labels; use smallvit train")
    return train.run_training(options, "pretrain")
