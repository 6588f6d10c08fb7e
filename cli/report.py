"""`smallvit report`: runs as one HTML page."""

from __future__ import annotations

import os
from pathlib import Path

from smallvit.cli.options import Parser, new_file, options_parser
from smallvit.config import Config
from smallvit.runs import Run

DESCRIPTION = """\
Write a run, or several side by side, as one HTML page that needs nothing but itself.

  smallvit report runs/vit-spt-lsa-digits
  smallvit report runs/vit-digits runs/vit-spt-lsa-digits --out digits.html
  smallvit report RUN --no-compute --overwrite

The page has accuracy, curves, classes, confusions, calibration, mistakes, attention maps, all options, and how to
repeat it. Test results and attention maps that are missing, or are of former weights, are computed first and stay in
the run's folder; --no-compute leaves them out.
See also: smallvit eval, smallvit attend, smallvit compare; docs/reporting.md.
"""


def parser() -> Parser:
    """The arguments."""
    return options_parser("smallvit report", DESCRIPTION, ("device",), _own)


def main(argv: list[str]) -> int:
    """Compute what is missing, and write the page."""
    given = parser().parse_args(argv)
    config = Config.build(device=getattr(given, "device", "auto"))
    folders = [Path(os.path.expanduser(run)) for run in given.runs]
    out = given.out or (os.path.join(folders[0], Run.REPORT) if len(folders) == 1 else Run.REPORT)

    from rich.console import Console

    from smallvit.pages import dossier, page

    dossier.require_apart(folders)
    runs = [dossier.read(folder) for folder in folders]
    path = new_file(out, ".html", overwrite=given.overwrite)
    if given.compute and any(run.lacking for run in runs):
        from smallvit.pages import lacking  # only now: what is all there needs no torch

        console = Console(stderr=True)
        runs = [lacking.completed(run, config.compute.device, console) if run.lacking else run for run in runs]
    page.write(runs, path)
    for run in runs:
        for note in run.notes:
            print(f"{run.folder}: {note}")
    print(path)
    return 0


def _own(parser: Parser) -> None:
    """The arguments that no configuration has."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Folders of runs.")
    page = f"The page; by default {Run.REPORT} in the run's folder, or here where there are several."
    parser.add_argument("--out", metavar="FILE.html", help=page)
    parser.add_argument("--overwrite", action="store_true", help="Replace the page that is there.")
    nothing = "Leave out what is missing; by default it is computed."
    parser.add_argument("--no-compute", action="store_false", dest="compute", help=nothing)
