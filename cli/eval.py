"""Evaluate a trained model: `smallvit eval`."""

from __future__ import annotations

import shlex
from typing import Any

from smallvit.cli.parser import EVALUATION_OPTIONS, Parser, evaluation_config, evaluation_parser, parse

DESCRIPTION = """\
Evaluate a trained model: accuracy with confidence interval, per-class metrics,
calibration, mistakes, robustness.

  smallvit eval runs/vit-spt-lsa-digits
  smallvit eval runs/vit-spt-lsa-cifar100 --flip --robustness --overwrite
  smallvit eval runs/vit-spt-lsa-cifar100 --compare runs/vit-cifar100
  smallvit eval runs/vit-spt-lsa-cifar100 --data DIR --split all --out results
  smallvit eval vit_tiny_patch16_224:pretrained --data imagenet

Without --data, the model is evaluated on the run's data with the run's data
options; flags override them. The defaults in brackets apply to other data.
Classes of other data are matched by name.

Output files: metrics.json, classes.csv, confusion.csv, predictions.csv,
confusion.png, reliability.png, mistakes.png. They are written to --out, by
default RUN/eval/<split>, or RUN/eval/<data>-<split> for other data. Without a
run folder nothing is written unless --out is given.
See also: smallvit report, smallvit probe, smallvit predict;
docs/evaluation.md.
"""
OWN = ("split", "flip", "robustness", "compare", "out", "overwrite")


def parser() -> Parser:
    """Create the argument parser."""
    only = (*EVALUATION_OPTIONS, "eval_batch_size")
    return evaluation_parser("smallvit eval", DESCRIPTION, _add_arguments, only)


def main(argv: list[str]) -> int:
    """Evaluate the model, write the results and print them."""
    options = parse(parser(), argv)
    name = options.pop("name")
    own: dict[str, Any] = {each: options.pop(each) for each in OWN}

    config = evaluation_config(name, "eval", options)

    from smallvit.evaluation import artifacts, evaluator  # import torch
    from smallvit.utils.terminal import create_console

    folder = artifacts.resolve_output(name, config.data.data, own["split"], own["out"])
    record = evaluator.evaluate_run(name, config, **own, command=shlex.join(["smallvit", "eval", *argv]))
    artifacts.print_metrics(record, create_console())
    print()
    if folder is None:
        print("no files written, since this is not a run folder; add --out to write them")
        return 0
    for file in artifacts.list_outputs(folder):
        print(file)
    return 0


def _add_arguments(parser: Parser) -> None:
    """Add the arguments that are not configuration options."""
    group = parser.add_argument_group("eval", "What to evaluate.")
    group.add_argument("--split", default="test", metavar="{test,val,train,all}", help="Split to evaluate on. [test]")
    group.add_argument("--flip", action="store_true", help="Average over each image and its mirror image.")
    group.add_argument(
        "--robustness", action="store_true", help="Also evaluate with noise, blur, lower contrast and JPEG artifacts."
    )
    group.add_argument("--compare", metavar="RUN", help="A second trained model to compare with on the same images.")
    group.add_argument("--out", metavar="DIR", help="Output folder.")
    group.add_argument("--overwrite", action="store_true", help="Replace earlier results.")
