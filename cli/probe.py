"""`smallvit probe`: what a trained model's features are worth for some data."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from smallvit.cli.options import ASKS, OF_A_MODEL, Parser, new_file, options_parser, parsed
from smallvit.config import Config

if TYPE_CHECKING:
    from rich.table import Table

DESCRIPTION = """\
Classify the features of a trained model, which stays as it is: by a linear classifier and by nearest neighbours.

  smallvit probe runs/vit-spt-lsa-digits --data digits
  smallvit probe vit_small_patch14_dinov2:pretrained --img-size 224 --data DIR --out probe.json
  smallvit probe model.safetensors --arch vit_small_patch16_224.dino --data DIR

Images are normalised as the model wants them, at its own size unless --img-size names another. Without --data it is
the run's own that is probed. --arch is for weights files of other programs: the timm model, with or without a tag, that
they hold. Accuracies are top-1 in per cent;
nothing is written but --out, a JSON file.
See also: smallvit eval, smallvit train --init; docs/probing.md.
"""
SERVES = (*ASKS, "balanced", "out", "overwrite")
TOLD = OF_A_MODEL | {"out": "File (.json) for the figures.", "overwrite": "Replace --out."}


def parser() -> Parser:
    """The arguments."""
    return options_parser("smallvit probe", DESCRIPTION, SERVES, _add_name, TOLD)


def main(argv: list[str]) -> int:
    """Probe the model, print a table, and write the figures to --out."""
    options = parsed(parser(), argv)
    name = options.pop("name")

    from smallvit import learnt, trained

    config = Config.build(**learnt.with_learnt_data(trained.card(name, "probe"), options))
    path = None if config.run.out is None else new_file(config.run.out, ".json", overwrite=config.run.overwrite)

    from rich.console import Console

    from smallvit import probing
    from smallvit.files import write_text

    found = probing.probe(name, config)
    console = Console()
    what = f"{found['features']:,} features at {found['img_size']} pixels"
    console.print(f"{found['name']} on {found['data']}: {what}", markup=False)
    console.print(table(found))
    if path is not None:
        write_text(path, json.dumps(found, indent=2) + "\n")
        print(path)
    return 0


def table(found: dict[str, Any]) -> Table:
    """Top-1 accuracies in per cent."""
    from rich.table import Table

    shown = Table("probe", "", "val top-1 %", "test top-1 %")
    val = found["linear_val_top1"]
    shown.add_row("linear", f"C {found['C']:g}", "" if val is None else f"{val:.2f}", f"{found['linear_top1']:.2f}")
    shown.add_row("neighbours", f"k {found['k']}", "", f"{found['knn_top1']:.2f}")
    return shown


def _add_name(parser: Parser) -> None:
    what = "a run's folder, a weights file (.safetensors), or a timm model with pretrained weights"
    parser.add_argument("name", metavar="NAME", help=what)
