"""`smallvit attend`: where a trained model looks."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Collection
from dataclasses import fields
from statistics import fmean as mean
from typing import TYPE_CHECKING, Any

from smallvit.cli.options import ASKS, OF_A_MODEL, Parser, options_parser, parsed
from smallvit.config import Config
from smallvit.errors import InputError
from smallvit.options import DataConfig, flag

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
image, heads.png, temperatures.png where temperatures are learnt, and attention.json. Maps of
other images than the run's own test go to RUN/attend-files, RUN/attend-<split> or RUN/attend-<data>-<split>.
See also: smallvit eval, smallvit report; docs/attention.md.
"""
OF_A_SPLIT = ("count", "split", *(option.name for option in fields(DataConfig) if option.name != "img_size"))
"""Options that say which images of which data are shown."""


def parser() -> Parser:
    """The arguments."""
    return options_parser("smallvit attend", DESCRIPTION, ASKS, _own, OF_A_MODEL)


def main(argv: list[str]) -> int:
    """Look, draw, print a table of the layers and where the files are."""
    options = parsed(parser(), argv)
    name, images, compare, out = (options.pop(each) for each in ("name", "images", "compare", "out"))
    if images:
        _require_no_split(options)
    given = {each: options.pop(each) for each in ("overwrite", "layers", "classes_of")}
    chosen = {each: options.pop(each) for each in ("count", "split") if each in options}

    from rich.console import Console

    from smallvit import learnt, trained
    from smallvit.attention import attending, folder

    config = Config.build(**(options if images else learnt.with_learnt_data(trained.card(name, "attend"), options)))
    place = folder.destination(name, None if images else config.data.data, chosen.get("split", "test"), out)
    names = [name] if compare is None else [name, compare]
    command = shlex.join(["smallvit", "attend", *argv])
    found = attending.attend(names, images, config, out=place, command=command, **given, **chosen)
    console = Console(emoji=False, markup=False)
    for record in (found, found["compared"]):
        if record is not None:
            console.print(table(record))
    for file in folder.written(place):
        print(file)
    return 0


def _own(parser: Parser) -> None:
    """The arguments that no configuration has."""
    parser.add_argument("name", metavar="RUN", help="A run's folder, a weights file, or a timm model with weights.")
    others = "Image files; by default some of the run's own data."
    parser.add_argument("images", nargs="*", default=[], metavar="IMAGE", help=others)
    group = parser.add_argument_group("attend", "What is looked at, and what is drawn.")
    unset = {"default": argparse.SUPPRESS}
    group.add_argument("--compare", metavar="RUN", help="Another model, drawn beside it.")
    group.add_argument("--count", type=int, metavar="N", help="Images of the split. [8]", **unset)
    group.add_argument("--split", metavar="{train,val,test}", help="The split they are of. [test]", **unset)
    group.add_argument(
        "--classes-of",
        default="predicted",
        metavar="{predicted,label}",
        help="Whether relevance is that for the predicted class or the true one. [predicted]",
    )
    group.add_argument("--layers", type=int, default=12, metavar="N", help="Most rows of layers-<n>.png. [12]")
    group.add_argument("--out", metavar="DIR", help="Folder for the files; by default RUN/attend for a run's folder.")
    group.add_argument("--overwrite", action="store_true", help="Replace the files that are there.")


def _require_no_split(options: Collection[str]) -> None:
    """Check that nothing is said about the images of a split where files are shown."""
    for name in OF_A_SPLIT:
        if name in options:
            raise InputError(f"{flag(name)}: image files are given, so no split is shown; leave it out")


def table(record: dict[str, Any]) -> Table:
    """A row for each layer: means over heads, and the range of the temperatures."""
    from rich.table import Column, Table
    from rich.text import Text

    names = ("tokens", "entropy", "distance px", "temperatures")
    title = Text(record["name"], style="table.title")
    shown = Table(Column("layer", overflow="fold"), *names, title=title, title_justify="left")
    for layer in record["layers"]:
        learnt = layer["temperature"]
        spread = f"{min(learnt):.3f} – {max(learnt):.3f}" if learnt else ""
        grid, entropy = "{} × {}".format(*layer["grid"]), f"{mean(layer['entropy']):.2f}"
        distance = "" if layer["distance"] is None else f"{mean(layer['distance']):.1f}"
        shown.add_row(layer["layer"], grid, entropy, distance, spread)
    return shown
