"""Run `smallvit crossval`: train a run for each fold, and summarize their results."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from smallvit.cli.parser import Parser, options_parser, parse
from smallvit.config import spec
from smallvit.config.config import Config, option_names, option_types
from smallvit.config.recipes import apply_recipe
from smallvit.config.spec import RowSpec
from smallvit.datasets.catalog import require_data
from smallvit.plugins import PLUGINS
from smallvit.runs.run import Run
from smallvit.training.launch import resolve
from smallvit.utils.errors import InputError, require

DESCRIPTION = """\
Cross-validate a model: train a run for each fold, each tested on the fold that
it has not seen.

  smallvit crossval --arch vit --spt --lsa --data labels.csv --folds 5
  smallvit crossval --arch vit+spt --data DIR --group-by '(patient[0-9]+)_'
  smallvit crossval --arch vit --data DIR --repeats 2 --compare vit+spt+lsa
  smallvit crossval --arch vit --data DIR --compare crossval/OTHER

Folds divide the training and validation images, stratified by class; groups
stay together. A test split of the data is not used at all: keep it for the
final model. A run's fold is its test split. The best epoch is chosen on
--val-fraction of the other folds, so the fold has no influence on training.

Missing runs are trained, on a CPU several at a time (--jobs); the same command
resumes after an interruption. --compare trains a second model on the same
folds, or reads another cross-validation, and tests the difference (corrected
resampled t-test). Options of the model and the optimizer are of the first
model alone; the second has its own, such as vit+spt,patch-size=8,lr=0.003.

Written to --out, by default crossval/<model>-<data>: crossval.json,
predictions.csv (of each image, by the run that has not seen it), classes.csv,
confusion.csv, confusion.png, report.html, and the folder of each run.
Exit codes: 0 success, 1 a training failed, 2 invalid input, 130 interrupted.
See also: smallvit train, smallvit compare, smallvit eval; docs/own-data.md.
"""
OWN = ("recipe_name", "repeats", "compare", "jobs")
HELP = {
    "out": "Folder for the results and the runs. [crossval/<model>-<data>]",
    "folds": "Number of folds. [5]",
    "fold_seed": "Seed of the folds of the first repeat; the next have the next. [0]",
    "seed": "Seed of the first repeat. [0]",
}


def parser() -> Parser:
    """Return the argument parser."""
    excluded = {*option_names("launch"), "fold", "keep", "keep_resume", "processes"} - {"out"}
    names = [name for name in option_types() if name not in excluded]
    return options_parser("smallvit crossval", DESCRIPTION, names, _add_arguments, HELP)


def _add_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("crossval", "What to train and compare.")
    group.add_argument("--repeats", type=int, default=1, metavar="N", help="Divisions into folds. [1]")
    group.add_argument("--compare", metavar="OTHER", help=f"Another model, {spec.SPEC_FORM}, or crossval folder.")
    group.add_argument("--recipe", dest="recipe_name", metavar="NAME", help="Defaults of a recipe, for both models.")
    group.add_argument("--jobs", type=int, metavar="N", help="Runs trained at a time. [one per GPU, or per CPU thread]")


def main(argv: list[str]) -> int:
    """Train the missing runs, and write and print the results; return 1 if a training failed."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("smallvit crossval starts the trainings, each on one device: start it without torchrun")
    options = {"folds": 5} | parse(parser(), argv)
    own: dict[str, Any] = {name: options.pop(name) for name in OWN}
    require(options["folds"] >= 2, "folds", options["folds"], "at least 2")
    require(own["repeats"] >= 1, "repeats", own["repeats"], "at least 1")
    require(own["jobs"] is None or own["jobs"] >= 1, "jobs", own["jobs"], "at least 1")
    config = Config.build(**options)
    require_data(config.data.data)
    row = _row(options, own["recipe_name"])
    flags = {name: options[name] for name in options.keys() & {*option_names("shared")}}
    first, out = flags.pop("seed", 0), flags.pop("out", None)
    other = Path(os.path.expanduser(own["compare"] or ""))
    rows = [row] if own["compare"] is None or other.is_dir() else [row, spec.parse_spec(own["compare"])]
    data = os.path.expanduser(config.data.data)
    name = os.path.basename(os.path.realpath(data) if os.path.exists(data) else data)
    model = row.folder(0).removesuffix("-seed0")
    folder = Path(os.path.expanduser(out or os.path.join("crossval", f"{model}-{name}")))

    from smallvit.experiments import crossval
    from smallvit.experiments.grid import Grid
    from smallvit.report.html import write_crossval

    seeds = range(first, first + own["repeats"])
    grid = Grid(rows=rows, flags=flags, seeds=seeds, out=folder, recipe=own["recipe_name"], jobs=own["jobs"])
    command = shlex.join(["smallvit", "crossval", *argv])
    try:
        compared = other if own["compare"] is not None and len(rows) == 1 else None
        record = crossval.cross_validate(grid, config.compute, command, compared)
    except KeyboardInterrupt:
        print("cross-validation interrupted; run the same command to resume", file=sys.stderr)
        raise
    if record is None:
        print("no results, since a training failed; the same command trains the runs that are missing")
        return 1
    crossval.print_record(record)
    write_crossval(record, crossval.score_rows(record), crossval.class_rows(record), folder / Run.REPORT)
    for file in (*crossval.FILES, Run.REPORT):
        print(folder / file)
    return 0


def _row(options: dict[str, Any], recipe: str | None) -> RowSpec:
    """Return the model, with the plugins of its recipe, and the options that a second model does not share."""
    values = options if recipe is None else apply_recipe(recipe, options)
    arch = resolve(Config.build(**{name: values[name] for name in ("arch", "init") if name in values})).model.arch
    own = {name: value for name, value in options.items() if name not in (*option_names("shared"), "arch")}
    own |= {name: values[name] for name in PLUGINS if name in values}
    return RowSpec(arch, {name: value for name, value in own.items() if name not in PLUGINS or value}, recipe)
