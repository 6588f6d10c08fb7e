"""Run `smallvit attend`: draw the attention of a trained model."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import fields
from statistics import fmean
from typing import TYPE_CHECKING, Any

from smallvit.cli.parser import Parser, evaluation_config, evaluation_parser, parse, require_run
from smallvit.config.config import Config
from smallvit.config.options import DataConfig
from smallvit.models import weights_info
from smallvit.utils.errors import InputError, flag

if TYPE_CHECKING:
    from rich.table import Table

DESCRIPTION = """\
Draw the attention of a trained transformer: every layer and head, rollout,
relevance, learned temperatures.

  smallvit attend runs/vit-spt-lsa-cifar100
  smallvit attend runs/vit-spt-lsa-cifar100 cat.jpg dog.jpg --out attention
  smallvit attend deit_tiny_patch16_224:pretrained cat.jpg --out attention

Without image files, images are selected from the run's own test split, evenly
over the classes. Writes overview.png, layers-<n>.png for each image,
heads.png, temperatures.png (if temperatures are learned) and attention.json to
RUN/attend or --out. The default folder for images other than the run's own
test split is RUN/attend-files, RUN/attend-<split> or
RUN/attend-<data>-<split>.
See also: smallvit eval, smallvit report; docs/attention.md.
"""
FILE_OPTIONS = ("img_size", "max_megapixels")
"""Data options that apply to image files."""
SPLIT_OPTIONS = ("count", "split", *(option.name for option in fields(DataConfig) if option.name not in FILE_OPTIONS))
"""Options that select the images of a split."""


def parser() -> Parser:
    """Return the argument parser."""
    return evaluation_parser("smallvit attend", DESCRIPTION, _add_arguments)


def main(argv: list[str]) -> int:
    """Draw the attention, and print a table of the layers and the files written."""
    options = parse(parser(), argv)
    name, images, out = (options.pop(each) for each in ("name", "images", "out"))
    require_run("smallvit attend", argv, name, images)
    for option in SPLIT_OPTIONS if images else ():
        if option in options:
            raise InputError(f"{flag(option)} has no effect with image files; remove it")
    overwrite = options.pop("overwrite")
    selection = {each: options.pop(each) for each in ("count", "split") if each in options}

    if images:
        weights_info.read_weights_info(name, "attend")  # before torch is imported
        config = Config.build(**options)
    else:
        config = evaluation_config(name, "attend", options)

    from rich.console import Console

    from smallvit.attention.attend import attend, list_outputs, resolve_output  # imports torch

    folder = resolve_output(name, None if images else config.data.data, selection.get("split", "test"), out)
    command = shlex.join(["smallvit", "attend", *argv])
    results = attend(name, images, config, out=folder, command=command, overwrite=overwrite, **selection)
    console = Console(emoji=False, markup=False)
    console.print(format_layers(results))
    for file in list_outputs(folder):
        print(file)
    return 0


def format_layers(results: dict[str, Any]) -> Table:
    """Return a table with a row for each layer: means over heads, and the range of temperatures."""
    from rich.table import Column, Table
    from rich.text import Text

    names = ("tokens", "entropy", "distance px", "temperatures")
    title = Text(results["name"], style="table.title")
    table = Table(Column("layer", overflow="fold"), *names, title=title, title_justify="left")
    for layer in results["layers"]:
        learned = layer["temperature"]
        table.add_row(
            layer["layer"],
            "{} × {}".format(*layer["grid"]),
            f"{fmean(layer['entropy']):.2f}",
            "" if layer["distance"] is None else f"{fmean(layer['distance']):.1f}",
            f"{min(learned):.3f} – {max(learned):.3f}" if learned else "",
        )
    return table


def _add_arguments(parser: Parser) -> None:
    parser.add_argument("images", nargs="*", default=[], metavar="IMAGE", help="Image files. [images of --split]")
    group = parser.add_argument_group("attend", "Images to analyze, and files to write.")
    unset = {"default": argparse.SUPPRESS}
    group.add_argument("--count", type=int, metavar="N", help="Number of images to select from the split. [8]", **unset)
    group.add_argument("--split", metavar="{train,val,test}", help="Split to select images from. [test]", **unset)
    group.add_argument("--out", metavar="DIR", help="Folder to write to. [RUN/attend]")
    group.add_argument("--overwrite", action="store_true", help="Replace earlier results.")
