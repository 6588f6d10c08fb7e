"""Run `smallvit check`: find problems of labeled images before training."""

from __future__ import annotations

import json

from smallvit.cli.parser import Parser, options_parser, parse
from smallvit.config.config import Config
from smallvit.datasets.catalog import require_data
from smallvit.utils.errors import require
from smallvit.utils.files import check_output_file, write_text

DESCRIPTION = """\
Check labeled images before training: unreadable files, exact and near
duplicates, class names that differ by case or space only, and tiny classes.

  smallvit check DIR
  smallvit check labels.csv --columns path=file,label=species --out check.html
  smallvit check DIR --run crossval/vit-DIR      # also likely wrong labels
  smallvit check DIR --strict                    # for scripts

Near duplicates are resized, recompressed or slightly brightened copies, not
crops or mirror images. With --run, labels are likely wrong if a model that has
not seen the image is confident of another class (confident learning): a
cross-validation predicts all images, a run only its test images.

The page that --out names shows all findings with their images, and a contact
sheet; a file next to it has the same in JSON.
Exit codes: 0 success, also with findings; 1 findings, with --strict; 2 invalid
input. See also: smallvit crossval, smallvit show; docs/own-data.md.
"""
OPTIONS = ("columns", "data_dir", "max_megapixels", "device", "out", "overwrite")
OWN = ("run", "strict", "similarity")
HELP = {"out": "Page to write (.html), with a .json file next to it.", "overwrite": "Replace --out and its .json file."}


def parser() -> Parser:
    """Return the argument parser."""
    return options_parser("smallvit check", DESCRIPTION, OPTIONS, _add_arguments, HELP)


def _add_arguments(parser: Parser) -> None:
    """Add the arguments that are not options of a configuration."""
    what = "Data set, folder or zip file of class folders, or table, as train --data takes."
    parser.add_argument("data", metavar="DATA", help=what)
    parser.add_argument("--run", metavar="RUN", help="Folder of a cross-validation or run, to find wrong labels.")
    parser.add_argument("--strict", action="store_true", help="Exit with 1 if there are findings.")
    likeness = "Correlation from which two images are near duplicates; 1 finds copies only. [0.97]"
    parser.add_argument("--similarity", type=float, default=0.97, metavar="X", help=likeness)


def main(argv: list[str]) -> int:
    """Check the images, print the findings, and write them to --out; return 1 for findings with --strict."""
    options = parse(parser(), argv)
    own = {name: options.pop(name) for name in OWN}
    config = Config.build(**options)
    require(0 < own["similarity"] <= 1, "similarity", own["similarity"], "above 0 and at most 1")
    require_data(config.data.data)
    page, overwrite = None, config.run.overwrite
    if config.run.out is not None:
        page = check_output_file(config.run.out, ".html", overwrite=overwrite)
        check_output_file(str(page.with_suffix(".json")), ".json", overwrite=overwrite)

    from smallvit.evaluation import check
    from smallvit.utils.terminal import create_console

    source, results = check.run_check(config, own["run"], own["similarity"])
    check.print_results(results, create_console())
    if page is not None:
        from smallvit.report.html import write_check

        findings, classes = check.describe_findings(results), check.class_rows(results["classes"], len(source.labels))
        write_check(results, findings, classes, source.read, check.draw_sheet(source), page)
        write_text(page.with_suffix(".json"), json.dumps(results, indent=1) + "\n")
        print(page, page.with_suffix(".json"), sep="\n")
    return int(own["strict"] and any(results[key] for key in check.FINDINGS))
