"""Run `smallvit watch`: plot a run's curves in the terminal."""

from __future__ import annotations

import os
from pathlib import Path

from smallvit.cli.parser import Parser

DESCRIPTION = """\
Plot a run's loss, accuracy and learning rate in the terminal, updated after
every checkpoint until it is finished.

  smallvit watch runs/vit-spt-lsa-digits
  smallvit watch --once runs/vit-spt-lsa-digits > curves.txt

It only reads the run's folder. Ctrl-C stops watching (exit code 130), not the
training. If the output is not a terminal, the curves are printed once, as with
--once.
See also: smallvit train --log tensorboard, smallvit report; docs/training.md.
"""


def parser() -> Parser:
    """Return the argument parser."""
    parser = Parser("smallvit watch", DESCRIPTION)
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--once", action="store_true", help="print the current curves and exit")
    return parser


def main(argv: list[str]) -> int:
    """Watch the run, or print its curves once."""
    options = parser().parse_args(argv)

    from rich.console import Console

    from smallvit.runs import curves

    folder, console = Path(os.path.expanduser(options.run)), Console()
    if options.once or not console.is_terminal or console.is_dumb_terminal:
        console.print(curves.render_frame(curves.read_run(folder), console))
    else:
        curves.watch_run(folder, console)
    return 0
