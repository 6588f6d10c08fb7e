"""Run `smallvit reproduce`: repeat a published experiment and compare the results with the published figures."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from smallvit.cli.parser import Parser, options_parser, parse
from smallvit.utils.errors import InputError, require

DESCRIPTION = """\
Reproduce a named experiment: train its models over several seeds, and print
the results next to published figures.

  smallvit list experiments                            # names of experiments
  smallvit reproduce lee2021/cifar100                  # all, best on a GPU
  smallvit reproduce lee2021/cifar100 --budget 0.05    # 5 % of the images
  smallvit reproduce lee2021/cifar100 --rows vit --rows vit+spt+lsa --seeds 2
  smallvit reproduce lee2021/digits --budget 0.3       # minutes on a CPU

Each run has its own folder in --out, by default reproduce/NAME. The same
command resumes after an interruption, also on another machine if folder and
images have the same paths. A record of each finished run is added to
records.jsonl there, and with --record DIR to a collection of records,
DIR/NAME.jsonl, whose runs are not repeated.
Exit codes: 0 success, 1 a training failed, 2 invalid input, 130 interrupted.
See also: smallvit compare, RESULTS.md, docs/reproducing.md.
"""
OPTIONS = (
    *("data_dir", "workers", "streaming", "device", "amp", "compile"),
    *("seed", "out", "checkpoint_minutes"),
)
HELP = {"out": "Folder for the runs and their records. [reproduce/NAME, with the budget if it is below 1]"}


def parser() -> Parser:
    """Return the argument parser."""
    return options_parser("smallvit reproduce", DESCRIPTION, OPTIONS, _add_arguments, HELP)


def _add_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("reproduce", "What to reproduce.")
    group.add_argument("name", nargs="?", metavar="NAME", help="An experiment (see smallvit list experiments).")
    group.add_argument(
        "--budget", type=float, default=1.0, metavar="SHARE", help="Share of the images to train on. [1]"
    )
    group.add_argument("--rows", action="append", default=[], metavar="ROW", help="A model of the experiment. [all]")
    group.add_argument("--seeds", type=int, metavar="N", help="Runs per model, starting at --seed. [the experiment's]")
    group.add_argument("--jobs", type=int, metavar="N", help="Runs trained at a time. [one per GPU, or per CPU thread]")
    folder = "The data set as a folder of class folders. [downloaded]"
    group.add_argument("--data", metavar="DIR", action="append", help=folder)
    group.add_argument("--record", metavar="DIR", help="A collection of records to add to. [none]")


def main(argv: list[str]) -> int:
    """Reproduce an experiment; return 1 if a training failed."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("smallvit reproduce starts the trainings, each on one device: start it without torchrun")
    flags = parse(parser(), argv)
    own = {name: flags.pop(name) for name in ("name", "budget", "rows", "seeds", "jobs", "data", "record")}
    if own["name"] is None:
        raise InputError("nothing to reproduce: give the name of an experiment; see smallvit list experiments")
    require(0 < own["budget"] <= 1, "budget", own["budget"], "a share above 0 and at most 1")
    for option in ("seeds", "jobs"):
        require(own[option] is None or own[option] >= 1, option, own[option], "at least 1")

    from smallvit.datasets.catalog import DATASETS
    from smallvit.experiments.catalog import get_experiment

    experiment = get_experiment(own["name"])
    experiment.select(own["rows"])  # before torch is imported
    budget = experiment.effective_budget(own["budget"])
    if own["data"] is not None:
        if not DATASETS[experiment.data].archives:
            raise InputError(f"--data {own['data']}: {experiment.data} is part of scikit-learn; remove --data")
        flags["data"] = os.path.realpath(os.path.expanduser(own["data"]))
    default = os.path.join("reproduce", own["name"] + (f"@{budget:g}" if budget < 1 else ""))
    out = Path(os.path.expanduser(flags.pop("out", default)))
    first, count = flags.pop("seed", 0), own["seeds"] or experiment.seeds

    from smallvit.experiments import reproduce
    from smallvit.utils.terminal import create_console

    plan = reproduce.Plan(
        name=own["name"],
        budget=budget,
        seeds=range(first, first + count),
        out=out,
        labels=own["rows"],
        flags=flags,
        jobs=own["jobs"],
        collection=None if own["record"] is None else Path(os.path.expanduser(own["record"])),
    )
    try:
        finished = reproduce.reproduce(plan, create_console())
    except KeyboardInterrupt:
        print("interrupted; run the same command to resume", file=sys.stderr)
        raise
    return 0 if finished else 1
