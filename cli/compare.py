"""Run `smallvit compare`: train missing runs and compare models."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from smallvit.cli.parser import Parser, options_parser, parse
from smallvit.config import spec
from smallvit.config.config import Config, option_names, option_types
from smallvit.datasets.catalog import require_data
from smallvit.models.architectures import require_name
from smallvit.utils.errors import InputError, flag, require
from smallvit.utils.files import is_path

DESCRIPTION = """\
Compare models: accuracy over seeds, parameters, speed and memory, as a table
and a picture.

  smallvit compare --data cifar100 --arch vit --arch vit+spt+lsa --epochs 30
  smallvit compare vit vit+spt+lsa --data DIR
  smallvit compare --arch vit --ablation --epochs 50 --seeds 2
  smallvit compare vit vit+spt+lsa --data DIR --folds 5     # the same for all
  smallvit compare --arch vit --arch vit,lr=3e-3 --images-seen 100000
  smallvit compare RUN RUN ...

Missing runs are trained, on a CPU several at a time (--jobs); the same command
resumes after an interruption. All rows share budget, data, splits and test. A
row's own options override flags, and flags override a recipe; convolutional
rows use the recipe cnn unless one is named.

Written to --out, by default compare/<data>: compare.md (table and picture),
compare.csv, compare.png, and the folder of each run. With folders of runs,
files are written only if --out is given.
Exit codes: 0 success, 1 a training failed, 2 invalid input, 130 interrupted.
See also: smallvit train, smallvit profile, smallvit eval; docs/comparing.md.
"""
RUN_OPTIONS = ("out", "device", "amp", "speed", "runs")
"""Options that apply to existing runs."""
HELP = {"out": "Folder for the runs, the table and the picture. [compare/<data>; none for existing runs]"}


def parser() -> Parser:
    """Return the argument parser."""
    return options_parser("smallvit compare", DESCRIPTION, option_names("shared"), _add_arguments, HELP)


def _add_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("compare", "What to compare.")
    group.add_argument("runs", nargs="*", metavar="RUN", help="Finished runs to compare; or rows, as with --arch.")
    group.add_argument("--arch", action="append", default=[], metavar="ROW", help=f"A row to train: {spec.SPEC_FORM}.")
    group.add_argument("--ablation", action="store_true", help="Each row without plugins, with each, and with both.")
    group.add_argument("--seeds", type=int, default=1, metavar="N", help="Runs per row, starting at --seed. [1]")
    group.add_argument("--recipe", dest="common", metavar="NAME", help="Recipe of all rows that name none.")
    group.add_argument("--images-seen", type=int, metavar="N", help="Budget in images, instead of --epochs.")
    group.add_argument("--jobs", type=int, metavar="N", help="Runs trained at a time. [one per GPU, or per CPU thread]")
    group.add_argument("--no-speed", action="store_false", dest="speed", help="Do not measure the speed of inference.")


def main(argv: list[str]) -> int:
    """Compare rows, training what is missing, or existing runs; return 1 if a training failed."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("smallvit compare starts the trainings, each on one device: start it without torchrun")
    for argument in argv:
        name = argument.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        if argument.startswith("--") and name in option_types() and name != "arch":
            spec.require_shared_option(name)
    options = parse(parser(), argv)
    rows = [each for each in options["runs"] if not is_path(each)]
    options["runs"] = [each for each in options["runs"] if is_path(each)]
    if rows and options["runs"]:
        raise InputError(f"{rows[0]} is a row to train, {options['runs'][0]} an existing run; give one kind only")
    options["arch"] += rows
    command = shlex.join(["smallvit", "compare", *argv])
    return _compare_runs(options, command) if options["runs"] else _compare_rows(options, command)


def _compare_rows(options: dict[str, Any], command: str) -> int:
    names = ("runs", "arch", "ablation", "seeds", "common", "images_seen", "jobs", "speed")
    own = {name: options.pop(name) for name in names}
    if not own["arch"]:
        raise InputError("nothing to compare: give rows, such as vit vit+spt+lsa, or folders of runs; see --help")
    require(own["seeds"] >= 1, "seeds", own["seeds"], "at least 1")
    require(own["jobs"] is None or own["jobs"] >= 1, "jobs", own["jobs"], "at least 1")
    require(own["images_seen"] is None or own["images_seen"] >= 1, "images_seen", own["images_seen"], "at least 1")
    if own["images_seen"] is not None and "epochs" in options:
        raise InputError("--images-seen and --epochs: give only one of them")
    rows = [spec.parse_spec(text) for text in own["arch"]]
    for row in rows:
        with row.named():
            require_name(row.arch)
    if own["ablation"]:
        rows = [variant for row in rows for variant in spec.expand_ablation(row)]
    config = Config.build(**options)
    require_data(config.data.data)
    first = options.pop("seed", 0)
    data = os.path.expanduser(config.data.data)
    name = os.path.basename(os.path.realpath(data) if os.path.exists(data) else data)
    out = Path(os.path.expanduser(options.pop("out", os.path.join("compare", name))))

    from smallvit.experiments import compare
    from smallvit.experiments.grid import Grid

    seeds = range(first, first + own["seeds"])
    plan = Grid(
        rows=rows,
        flags=options,
        seeds=seeds,
        out=out,
        recipe=own["common"],
        images_seen=own["images_seen"],
        jobs=own["jobs"],
    )
    try:
        finished = compare.compare_rows(plan, compare.Output(command, out, speed=own["speed"], compute=config.compute))
    except KeyboardInterrupt:
        print("comparison interrupted; run the same command to resume", file=sys.stderr)
        raise
    return 0 if finished else 1


def _compare_runs(options: dict[str, Any], command: str) -> int:
    unset = parser().parse_args([])
    for name, value in options.items():
        if name not in RUN_OPTIONS and value != getattr(unset, name, NotImplemented):
            raise InputError(
                f"{flag('recipe' if name == 'common' else name)} does not apply to existing runs; remove it"
            )
    for run in options["runs"]:
        if not os.path.isdir(os.path.expanduser(run)):
            raise InputError(f"{run}: no such run folder")

    from smallvit.experiments import compare

    out = Path(os.path.expanduser(options["out"])) if "out" in options else None
    runs = [Path(os.path.expanduser(run)) for run in options["runs"]]
    compute = Config.build(**{name: options[name] for name in ("device", "amp") if name in options}).compute
    compare.compare_runs(runs, compare.Output(command, out, speed=options["speed"], compute=compute))
    return 0
