"""`smallvit train`: train a model and write its run folder."""

from __future__ import annotations

import sys

from smallvit.cli.options import Parser, options_parser, parsed
from smallvit.config import Config
from smallvit.opening import open_run

DESCRIPTION = "Train a model and write its run folder (weights, metrics, curves, summary)."


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
