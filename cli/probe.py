"""Evaluate a trained model's features: `smallvit probe`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from smallvit.cli.parser import EVALUATION_OPTIONS, Parser, evaluation_config, evaluation_parser, parse
from smallvit.utils.files import check_output_file

if TYPE_CHECKING:
    from rich.table import Table

DESCRIPTION = """\
Evaluate the frozen features of a trained model with a linear classifier and
nearest neighbors.

  smallvit probe runs/vit-spt-lsa-digits --data digits
  smallvit probe vit_small_patch14_dinov2:pretrained --img-size 224 --data DIR
  smallvit probe model.safetensors --arch vit_small_patch16_224.dino --data DIR

Images are normalized as in the model's training, at the model's size unless
--img-size is given. Without --data, the run's data is used. --arch is the timm
model, with or without a tag, in a weights file of another program. Accuracies
are top-1 in percent. Nothing is written unless --out is given, a JSON file.
See also: smallvit eval, smallvit train --init; docs/probing.md.
"""
OPTIONS = (*EVALUATION_OPTIONS, "eval_batch_size", "balanced", "out", "overwrite")
HELP = {"out": "Output file (.json).", "overwrite": "Replace --out."}


def parser() -> Parser:
    """Create the argument parser."""
    return evaluation_parser("smallvit probe", DESCRIPTION, only=OPTIONS, help_texts=HELP)


def main(argv: list[str]) -> int:
    """Evaluate the features, print a table, and write the results to --out."""
    options = parse(parser(), argv)
    name = options.pop("name")
    config = evaluation_config(name, "probe", options)
    out, overwrite = config.run.out, config.run.overwrite
    path = None if out is None else check_output_file(out, ".json", overwrite=overwrite)

    from rich.console import Console

    from smallvit.evaluation import probe
    from smallvit.utils.files import write_text

    results = probe.probe(name, config)
    console = Console()
    features = f"{results['features']:,} features at {results['img_size']} pixels"
    console.print(f"{results['name']} on {results['data']}: {features}", markup=False)
    console.print(create_table(results))
    if path is not None:
        write_text(path, json.dumps(results, indent=2) + "\n")
        print(path)
    return 0


def create_table(results: dict[str, Any]) -> Table:
    """Create a table of top-1 accuracies in percent."""
    from rich.table import Table

    table = Table("probe", "", "val top-1 %", "test top-1 %")
    val = results["linear_val_top1"]
    table.add_row("linear", f"C {results['C']:g}", "" if val is None else f"{val:.2f}", f"{results['linear_top1']:.2f}")
    table.add_row("neighbors", f"k {results['k']}", "", f"{results['knn_top1']:.2f}")
    return table
