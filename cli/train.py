"""`smallvit train`: train a model and write its run folder."""

from __future__ import annotations

import sys
from typing import Any

from smallvit.cli.parser import Parser, options_parser, parse
from smallvit.config.config import Config
from smallvit.training.launch import open_run

DESCRIPTION = """\
Train a model and write its run folder (weights, metrics, curves, summary).

  smallvit train --arch vit --spt --lsa               # the embedded digits
  smallvit train --arch vit --spt --lsa --data DIR    # folder of class folders
  smallvit train --init deit_tiny_patch16_224 --recipe finetune --data DIR
  smallvit train --teacher runs/resnet56-cifar100 --data cifar100
  smallvit train --resume runs/vit-spt-lsa-digits     # after an interruption
"""
DETAILS = """
The run folder is --out, by default a new one, runs/<arch>-<plugins>-<data>:
  best.safetensors          weights of the best epoch on validation images
  last.safetensors          weights of the last epoch
  summary.json              test and validation accuracy, time, size, versions
  metrics.jsonl, curves.png loss, accuracy and learning rate of every epoch
  config.json               all options, for --config and --resume
  resume.safetensors        weights and optimizer state to resume from

Several devices: torchrun --nproc-per-node 8 -m smallvit train ...

The test split is used once, at the end. Sizes are in pixels, lengths in
epochs. Defaults are in square brackets. Every switch has an opposite (--spt,
--no-spt).
Exit codes: 0 done, 1 failed (one line says why), 2 bad input, 130 interrupted
by Ctrl-C, 143 terminated.
See also: smallvit watch, eval, report, list; docs/training.md,
docs/recipes.md, docs/data.md, docs/scaling.md.
"""


def parser() -> Parser:
    """Return the argument parser."""
    return options_parser("smallvit train", DESCRIPTION, details=DETAILS)


def main(argv: list[str]) -> int:
    """Parse the flags and train."""
    return run_training(parse(parser(), argv), "train")


def run_training(options: dict[str, Any], verb: str) -> int:
    """Train by these options; an interruption names the verb that resumes."""
    with open_run(Config.build(**options)) as run:
        if run.leads:
            print(f"run    {run.folder}", flush=True)
        try:
            from smallvit.training import train  # after the first line, since torch takes seconds

            train.fit(run)
        except KeyboardInterrupt:
            if run.resumable and run.leads:
                print(f"interrupted; resume with: smallvit {verb} --resume {run.folder}", file=sys.stderr)
            raise
    return 0
