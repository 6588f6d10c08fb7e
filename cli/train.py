"""`smallvit train`: train a model and write its run folder."""

from __future__ import annotations

import sys

from smallvit.cli.options import Parser, options_parser, parsed
from smallvit.config import Config
from smallvit.opening import open_run

DESCRIPTION = """\
Train a model and write its run folder (weights, metrics, curves, summary).

  smallvit train --arch vit --spt --lsa                              # the embedded handwritten digits
  smallvit train --arch vit --spt --lsa --data DIR                   # your images: a folder of class folders
  smallvit train --recipe paper --arch vit --spt --lsa --data cifar100
  smallvit train --arch deit_tiny_patch16_224 --lsa --data DIR --img-size 96 --epochs 200
  smallvit train --init deit_tiny_patch16_224 --recipe finetune --data DIR      # trained weights
  smallvit train --arch vit --teacher runs/resnet56-cifar100 --data cifar100    # distillation
  smallvit train --resume runs/vit-spt-lsa-digits                    # go on after an interruption
  torchrun --nproc-per-node 8 -m smallvit train --data imagenet --arch deit_small_patch16_224

The run's folder is --out, by default a new one, runs/<arch>-<plugins>-<data>. In it:
  best.safetensors, last.safetensors   weights of the epoch best on validation images, and of the last
  summary.json                         test and validation accuracy, time, speed, size, versions
  metrics.jsonl, curves.png            loss, accuracy and learning rate of every epoch
  config.json                          every option, for --config and --resume
  resume.safetensors                   weights and optimiser state to go on from

The test split is used once, at the end. Sizes are in pixels, lengths in epochs, rates per step; in square brackets
stand the defaults. Every switch has its opposite (--spt, --no-spt).
Exit codes: 0 done, 1 failed (one line says why), 2 bad input, 130 interrupted by Ctrl-C, 143 terminated.
See also: smallvit watch, eval, report, list; docs/training.md, docs/recipes.md, docs/data.md, docs/scaling.md.
"""


def parser() -> Parser:
    """The arguments."""
    return options_parser("smallvit train", DESCRIPTION)


def main(argv: list[str]) -> int:
    """Parse the flags, train, and show where the results are."""
    options = parsed(parser(), argv)
    with open_run(Config.build(**options), given=options) as run:
        try:
            from smallvit import engine  # only now: help, bad flags and a new run's folder need no torch

            engine.fit(run)
        except KeyboardInterrupt:
            if run.resumable and run.leads:
                print(f"interrupted; go on with: smallvit train --resume {run.folder}", file=sys.stderr)
            raise
    return 0
