"""`smallvit compare`: train what is missing, and set models side by side."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smallvit.cli.options import Parser, options_parser, parsed
from smallvit.comparison import rows
from smallvit.config import Config, option_homes
from smallvit.errors import InputError
from smallvit.options import flag, require

if TYPE_CHECKING:
    from smallvit.comparison.comparing import Showing

DESCRIPTION = """\
Set models side by side: accuracy over seeds, parameters, speed and memory, as a table and a picture.

  smallvit compare --data cifar100 --arch vit --arch vit+spt+lsa --arch resnet56 --epochs 30 --seeds 3
  smallvit compare --arch vit --ablation --epochs 50 --seeds 2
  smallvit compare --arch vit --arch vit,lr=3e-3 --images-seen 100000
  smallvit compare RUN RUN ...

Runs that are missing are trained, one after the other, and the same command goes on after an interruption.
Rows have one budget and the same data, splits and test. A row's own options win over flags, and these over a recipe's;
convolutional rows take the recipe cnn where none is named.

Written into --out, by default compare/<data>: compare.md (table and picture), compare.csv, compare.png, and a run's
folder for each row and seed. With folders of runs files are written only if --out is given.
Exit codes: 0 done, 1 a training failed, 2 bad input, 130 interrupted.
See also: smallvit train, smallvit profile, smallvit eval; docs/comparing.md.
"""
FOR_RUNS = ("out", "device", "amp", "speed", "runs")
"""What serves for runs that are there."""


TOLD = {"out": "Folder of the runs, the table and the picture. [compare/<data>; none for runs that are there]"}


def parser() -> Parser:
    """The arguments."""
    return options_parser("smallvit compare", DESCRIPTION, rows.COMMON, _own, TOLD)


def main(argv: list[str]) -> int:
    """Compare rows, training what is missing (1 if a training failed), or runs that are there."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("smallvit compare trains one run after the other, on one device: start it without torchrun")
    for argument in argv:
        name = argument.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        if argument.startswith("--") and name in option_homes() and name != "arch":
            rows.require_common(name)
    given = parsed(parser(), argv)
    command = shlex.join(["smallvit", "compare", *argv])
    return _runs(given, command) if given["runs"] else _rows(given, command)


def _own(parser: Parser) -> None:
    """The arguments that no configuration has."""
    group = parser.add_argument_group("compare", "What is compared.")
    group.add_argument("runs", nargs="*", metavar="RUN", help="Folders of finished runs: nothing is trained.")
    group.add_argument("--arch", action="append", default=[], metavar="ROW", help=f"A row to train: {rows.FORM}.")
    group.add_argument("--ablation", action="store_true", help="Each row without plugins, with each, and with both.")
    group.add_argument("--seeds", type=int, default=1, metavar="N", help="Runs of each row, from --seed on. [1]")
    group.add_argument("--recipe", dest="common", metavar="NAME", help="A recipe for all rows that name none.")
    group.add_argument("--images-seen", type=int, metavar="N", help="The budget in images, in place of --epochs.")
    group.add_argument("--no-speed", action="store_false", dest="speed", help="Do not measure the speed of inference.")


def _rows(given: dict[str, Any], command: str) -> int:
    own = {name: given.pop(name) for name in ("runs", "arch", "ablation", "seeds", "common", "images_seen", "speed")}
    if not own["arch"]:
        raise InputError("nothing to compare: give --arch ROW for each row, or folders of runs; see --help")
    require(own["seeds"] >= 1, "seeds", own["seeds"], "at least 1")
    require(own["images_seen"] is None or own["images_seen"] >= 1, "images_seen", own["images_seen"], "at least 1")
    if own["images_seen"] is not None and "epochs" in given:
        raise InputError("--images-seen and --epochs: give one of them")
    chosen = [rows.parse(text) for text in own["arch"]]
    if own["ablation"]:
        chosen = [variant for row in chosen for variant in rows.ablation(row)]
    config = Config.build(**given)
    first = given.pop("seed", 0)
    out = Path(os.path.expanduser(given.pop("out", os.path.join("compare", _data_name(config.data.data)))))

    from smallvit.comparison import comparing, contest  # only now: help and bad flags need no torch

    plan = contest.Contest(
        rows=chosen,
        flags=given,
        seeds=range(first, first + own["seeds"]),
        out=out,
        recipe=own["common"],
        images_seen=own["images_seen"],
    )
    try:
        done = comparing.compare_rows(plan, _showing(given | own, out, command))
    except KeyboardInterrupt:
        print("comparison interrupted; the same command goes on", file=sys.stderr)
        raise
    return 0 if done else 1


def _data_name(data: str) -> str:
    path = os.path.expanduser(data)
    return os.path.basename(os.path.realpath(path) if os.path.exists(path) else data)


def _runs(given: dict[str, Any], command: str) -> int:
    unset = {"arch": [], "ablation": False, "seeds": 1, "common": None, "images_seen": None}
    for name, value in given.items():
        if name not in FOR_RUNS and not (name in unset and value == unset[name]):
            told = flag("recipe" if name == "common" else name)
            raise InputError(f"{told} is of no use with runs that are there; leave it out")
    for run in given["runs"]:
        if not os.path.isdir(os.path.expanduser(run)):
            raise InputError(f"{run}: no such folder of a run; a row to train is given as --arch {run}")

    from smallvit.comparison import comparing

    out = Path(os.path.expanduser(given["out"])) if "out" in given else None
    comparing.compare_runs([Path(os.path.expanduser(run)) for run in given["runs"]], _showing(given, out, command))
    return 0


def _showing(given: dict[str, Any], out: Path | None, command: str) -> Showing:
    from rich.console import Console

    from smallvit.comparison import comparing

    return comparing.Showing(
        console=Console(highlight=False, markup=False, soft_wrap=True),
        command=command,
        out=out,
        device=given.get("device", "auto"),
        amp=given.get("amp", "auto"),
        measured=given["speed"],
    )
