"""`smallvit attend`: where a trained model looks."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from statistics import fmean as mean
from typing import TYPE_CHECKING, Any

from smallvit.cli.options import Parser, options_parser, parsed
from smallvit.config import Config
from smallvit.errors import InputError
from smallvit.runs import Run

if TYPE_CHECKING:
    from rich.table import Table

DESCRIPTION = """\
Draw where a trained transformer looks: attention of every layer and head, rollout, relevance, learnt temperatures.

  smallvit attend runs/vit-spt-lsa-cifar100
  smallvit attend runs/vit-spt-lsa-cifar100 --compare runs/vit-cifar100 --count 6
  smallvit attend runs/vit-spt-lsa-cifar100 cat.jpg dog.jpg --out looks
  smallvit attend deit_tiny_patch16_224:pretrained cat.jpg --out looks

RUN is a run's folder, a weights file, or a timm model with pretrained weights. Without images it is shown some of its
own test split, evenly spread over the classes. Written to RUN/attend or --out: overview.png, layers-<n>.png for each
image, heads.png, temperatures.png where temperatures are learnt, and attention.json.
See also: smallvit eval, smallvit report; docs/attention.md.
"""
SERVES = ("arch", "data", "device", "amp")


def parser() -> Parser:
    """The arguments."""
    return options_parser("smallvit attend", DESCRIPTION, SERVES, _own)


def main(argv: list[str]) -> int:
    """Look, draw, print a table of the layers and where the files are."""
    options = parsed(parser(), argv)
    own = {name: options.pop(name) for name in ("name", "images", "compare", "out", "overwrite", "count", "split")}
    drawing = {name: options.pop(name) for name in ("layers", "classes_of")}
    name, images = own["name"], own["images"]
    out = _folder(name, own["out"])

    from rich.console import Console

    from smallvit import learnt, trained
    from smallvit.attention import attending

    config = Config.build(**(options if images else learnt.with_learnt_data(trained.card(name, "attend"), options)))
    names = [name] if own["compare"] is None else [name, own["compare"]]
    given = {each: own[each] for each in ("count", "split", "overwrite")}
    command = shlex.join(["smallvit", "attend", *argv])
    found = attending.attend(names, images, config, out=out, command=command, **given, **drawing)
    console = Console()
    for record in (found, found["compared"]):
        if record is not None:
            console.print(table(record))
    for file in attending.written(out, len(found["images"])):
        print(file)
    return 0


def _own(parser: Parser) -> None:
    """The arguments that no configuration has."""
    parser.add_argument("name", metavar="RUN", help="A run's folder, a weights file, or a timm model with weights.")
    others = "Image files; by default some of the run's own data."
    parser.add_argument("images", nargs="*", default=[], metavar="IMAGE", help=others)
    group = parser.add_argument_group("attend", "What is looked at, and what is drawn.")
    group.add_argument("--compare", metavar="RUN", help="Another model, drawn beside it.")
    group.add_argument("--count", type=int, default=8, metavar="N", help="Images of the split. [8]")
    group.add_argument("--split", default="test", metavar="{train,val,test}", help="The split they are of. [test]")
    group.add_argument(
        "--classes-of",
        default="predicted",
        metavar="{predicted,label}",
        help="Whether relevance is that for the predicted class or the true one. [predicted]",
    )
    group.add_argument("--layers", type=int, default=12, metavar="N", help="Most rows of layers-<n>.png. [12]")
    group.add_argument("--out", metavar="DIR", help="Folder for the files; by default RUN/attend for a run's folder.")
    group.add_argument("--overwrite", action="store_true", help="Replace the files that are there.")


def _folder(name: str, out: str | None) -> Path:
    """Where files go."""
    if out is not None:
        return Path(os.path.expanduser(out))
    run = Path(os.path.expanduser(name))
    if os.path.isdir(run):
        return run / Run.ATTEND
    raise InputError(f"attend {name}: not the folder of a run, in which the files could lie; give --out DIR")


def table(record: dict[str, Any]) -> Table:
    """A row for each layer: means over heads, and the range of the temperatures."""
    from rich.table import Column, Table

    names = ("tokens", "entropy", "distance px", "temperatures")
    shown = Table(Column("layer", overflow="fold"), *names, title=record["name"], title_justify="left")
    for layer in record["layers"]:
        learnt = layer["temperature"]
        spread = f"{min(learnt):.3f} – {max(learnt):.3f}" if learnt else ""
        grid, entropy = "{} × {}".format(*layer["grid"]), f"{mean(layer['entropy']):.2f}"
        distance = "" if layer["distance"] is None else f"{mean(layer['distance']):.1f}"
        shown.add_row(layer["layer"], grid, entropy, distance, spread)
    return shown
