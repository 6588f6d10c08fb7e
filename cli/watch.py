"""`smallvit watch`: a run's curves in the terminal."""

from __future__ import annotations

import os
from pathlib import Path

from smallvit.cli.options import Parser

DESCRIPTION = """\
Draw a run's loss, accuracy and learning rate in the terminal, anew after every checkpoint, until it is finished.

  smallvit watch runs/vit-spt-lsa-digits
  smallvit watch --once runs/vit-spt-lsa-digits > curves.txt

It reads the run's folder and writes nothing there. Ctrl-C ends it (exit code 130); the training goes on. Where the
output is no terminal it prints one frame, as with --once.
See also: smallvit train --log tensorboard, smallvit report; docs/training.md.
"""


def parser() -> Parser:
    """The arguments."""
    parser = Parser("smallvit watch", DESCRIPTION)
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--once", action="store_true", help="print the curves as they are, and exit")
    return parser


def main(argv: list[str]) -> int:
    """Watch the run, or print one frame of it where that is asked for or nothing can move."""
    options = parser().parse_args(argv)

    from rich.console import Console

    from smallvit import watching

    folder, console = Path(os.path.expanduser(options.run)), Console()
    if options.once or not console.is_terminal or console.is_dumb_terminal:
        console.print(watching.frame(watching.read(folder), console))
    else:
        watching.watch(folder, console)
    return 0
