"""Run `smallvit report`: write runs as one HTML page."""

from __future__ import annotations

import os
from pathlib import Path

from smallvit.cli.parser import Parser, options_parser
from smallvit.config.config import Config
from smallvit.runs.run import Run, read_config
from smallvit.utils.files import check_output_file

DESCRIPTION = """\
Write a run, or a comparison of several, as one self-contained HTML page.

  smallvit report runs/vit-spt-lsa-digits
  smallvit report runs/vit-digits runs/vit-spt-lsa-digits --out digits.html
  smallvit report RUN --no-compute --overwrite
  smallvit report RUN --data DIR                 # if the run's data has moved

The page shows accuracy, curves, classes, confusions, calibration, mistakes,
attention maps, all options, and the command that repeats the training. Test
results and attention maps that are missing, or of other weights, are computed
first and stored in the run's folder, unless --no-compute is given.
See also: smallvit eval, smallvit attend, smallvit compare; docs/reporting.md.
"""


def parser() -> Parser:
    """Return the argument parser."""
    moved = "New location of the runs' data, if it has moved; contents are compared."
    return options_parser("smallvit report", DESCRIPTION, ("device", "data"), _add_arguments, {"data": moved})


def main(argv: list[str]) -> int:
    """Compute missing results, and write the page."""
    given = parser().parse_args(argv)
    config = Config.build(device=getattr(given, "device", "auto"))
    folders = [Path(os.path.expanduser(run)) for run in given.runs]
    out = given.out or (os.path.join(folders[0], Run.REPORT) if len(folders) == 1 else Run.REPORT)
    for folder in folders:
        read_config(folder)  # before torch is imported

    from smallvit.report import html, run_summary
    from smallvit.utils.terminal import create_console

    runs = [run_summary.read_run_summary(folder) for folder in folders]
    path = check_output_file(out, ".html", overwrite=given.overwrite)
    if given.compute:
        moved, console = getattr(given, "data", None), create_console(stderr=True)
        device = config.compute.device
        runs = [run_summary.complete_summary(run, device, console, moved) if run.computable else run for run in runs]
    html.write_report(runs, path)
    for run in runs:
        for note in run.notes:
            print(f"{run.folder}: {note}")
    print(path)
    return 0


def _add_arguments(parser: Parser) -> None:
    """Add the arguments that are not options of a configuration."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Folders of runs.")
    page = f"The page; by default {Run.REPORT} in the run's folder, or in the working directory for several runs."
    parser.add_argument("--out", metavar="FILE.html", help=page)
    parser.add_argument("--overwrite", action="store_true", help="Replace an existing page.")
    nothing = "Do not compute missing results."
    parser.add_argument("--no-compute", action="store_false", dest="compute", help=nothing)
