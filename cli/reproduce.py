"""`smallvit reproduce`: a published experiment again, and its table beside what was published."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from smallvit.cli.options import Parser, options_parser, parsed
from smallvit.errors import InputError
from smallvit.options import require

DESCRIPTION = """\
Do a named experiment again: train its models over several seeds, and set them beside the published figures.

  smallvit list experiments                                       # what has a name
  smallvit reproduce lee2021/cifar100                             # all of it: best on a GPU
  smallvit reproduce lee2021/cifar100 --budget 0.05               # a twentieth of the images for each model
  smallvit reproduce lee2021/cifar100 --rows vit --rows vit+spt+lsa --seeds 2
  smallvit reproduce lee2021/digits --budget 0.3                  # minutes on a CPU

Each run has a folder of its own below --out, by default reproduce/NAME. The same command goes on after an interruption,
or on another machine where folder and images lie at the same places. A record of each finished run is added to
records.jsonl there, and with --record DIR to a collection of records, DIR/NAME.jsonl, whose runs are not repeated.
Exit codes: 0 done, 1 a training failed, 2 bad input, 130 interrupted.
See also: smallvit compare, RESULTS.md, docs/reproducing.md.
"""
COMMON = (
    "data_dir",
    "data_url",
    "workers",
    "streaming",
    "device",
    "amp",
    "compile",
    "seed",
    "out",
    "checkpoint_minutes",
)
TOLD = {"out": "Folder of the runs and their records. [reproduce/NAME, with the budget if there is one]"}


def parser() -> Parser:
    """The arguments."""
    return options_parser("smallvit reproduce", DESCRIPTION, COMMON, _own, TOLD)


def _own(parser: Parser) -> None:
    """The arguments that no configuration has."""
    group = parser.add_argument_group("reproduce", "What is done again.")
    group.add_argument("name", nargs="?", metavar="NAME", help="An experiment (see smallvit list experiments).")
    group.add_argument("--budget", type=float, default=1.0, metavar="SHARE", help="Of the images that are shown. [1]")
    group.add_argument("--rows", action="append", default=[], metavar="ROW", help="A model of the experiment. [all]")
    group.add_argument("--seeds", type=int, metavar="N", help="Runs of each model, from --seed on. [the experiment's]")
    group.add_argument("--data", metavar="DIR", help="The data set as a folder of class folders. [downloaded]")
    group.add_argument("--record", metavar="DIR", help="A collection of records to add to. [none]")


def main(argv: list[str]) -> int:
    """Do an experiment again; 1 if a training failed."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("smallvit reproduce trains one run after the other, on one device: start it without torchrun")
    given = parsed(parser(), argv)
    own = {name: given.pop(name) for name in ("name", "budget", "rows", "seeds", "data", "record")}
    if own["name"] is None:
        raise InputError("nothing to reproduce: give an experiment's name; smallvit list experiments shows them")
    require(0 < own["budget"] <= 1, "budget", own["budget"], "a share above 0, at most 1")
    require(own["seeds"] is None or own["seeds"] >= 1, "seeds", own["seeds"], "at least 1")
    return _reproduce(own, given)


def _reproduce(own: dict[str, Any], flags: dict[str, Any]) -> int:
    from smallvit.datasets.table import DATASETS
    from smallvit.reproduction.experiments import experiment

    chosen = experiment(own["name"])
    chosen.chosen(own["rows"])  # before torch is imported
    budget = chosen.counted(own["budget"])
    if own["data"] is not None and not DATASETS[chosen.data].archives:
        raise InputError(f"--data {own['data']}: {chosen.data} come with scikit-learn; leave out --data")
    usual = os.path.join("reproduce", own["name"] + (f"@{budget:g}" if budget < 1 else ""))
    out = Path(os.path.expanduser(flags.pop("out", usual)))
    first, count = flags.pop("seed", 0), own["seeds"] or chosen.seeds
    data = {} if own["data"] is None else {"data": os.path.realpath(os.path.expanduser(own["data"]))}

    from rich.console import Console

    from smallvit.reproduction import reproducing

    plan = reproducing.Plan(
        name=own["name"],
        budget=budget,
        seeds=range(first, first + count),
        out=out,
        labels=own["rows"],
        flags=flags | data,
        collection=None if own["record"] is None else Path(os.path.expanduser(own["record"])),
    )
    try:
        done = reproducing.reproduce(plan, Console(highlight=False, markup=False, soft_wrap=True))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        raise
    return 0 if done else 1
