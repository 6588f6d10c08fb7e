"""`smallvit train`: train a model and write its run folder."""

from __future__ import annotations

import sys

from smallvit.cli.options import parse_config
from smallvit.runs import open_run

DESCRIPTION = "Train a model and write its run folder (weights, metrics, curves, summary)."


def main(argv: list[str]) -> int:
    """Parse the flags, train, and show where the results are."""
    config = parse_config(argv, "smallvit train", DESCRIPTION)
    with open_run(config) as run:
        from smallvit import engine  # only now: help, bad flags and a new run's folder need no torch

        try:
            engine.fit(run)
        except (engine.TrainingError, OSError) as error:
            print(f"smallvit: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"interrupted; smallvit train --resume {run.folder} goes on", file=sys.stderr)
            return 130
    return 0
