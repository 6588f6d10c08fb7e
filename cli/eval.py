"""`smallvit eval`: how good a trained model is, how sure of that one can be, and where it errs."""

from __future__ import annotations

import shlex
from typing import Any

from smallvit.cli.options import ASKS, OF_A_MODEL, Parser, options_parser, parsed
from smallvit.config import Config

DESCRIPTION = """\
Judge a trained model: accuracy with its interval, each class, calibration, mistakes, robustness.

  smallvit eval runs/vit-spt-lsa-digits
  smallvit eval runs/vit-spt-lsa-cifar100 --flip --robustness --overwrite
  smallvit eval runs/vit-spt-lsa-cifar100 --compare runs/vit-cifar100
  smallvit eval runs/vit-spt-lsa-cifar100 --data photos --split all --out judged
  smallvit eval vit_tiny_patch16_224:pretrained --data imagenet

RUN is a run's folder, a weights file, or a timm model with pretrained weights. Without --data, the run's own data is
judged with the options that the run had, and flags win over these; the defaults in brackets are those of other data.
Classes of other data are matched by name.

Written into --out, by default RUN/eval/<split>, or RUN/eval/<data>-<split> for other data: metrics.json, classes.csv,
confusion.csv, predictions.csv, confusion.png, reliability.png, mistakes.png. Without a run's folder files are written
only if --out is given.
See also: smallvit report, smallvit probe, smallvit predict; docs/evaluation.md.
"""
OWN = ("split", "flip", "robustness", "compare", "out", "overwrite")


def parser() -> Parser:
    """The arguments."""
    return options_parser("smallvit eval", DESCRIPTION, ASKS, _own, OF_A_MODEL)


def main(argv: list[str]) -> int:
    """Judge the model, write what was found, and print it."""
    options = parsed(parser(), argv)
    name = options.pop("name")
    own: dict[str, Any] = {each: options.pop(each) for each in OWN}

    from rich.console import Console

    from smallvit import learnt, trained
    from smallvit.judgement import evidence, judging, verdict

    config = Config.build(**learnt.with_learnt_data(trained.card(name, "eval"), options))
    folder = evidence.destination(name, config.data.data, own["split"], own["out"])
    record = judging.judge(name, config, **own, command=shlex.join(["smallvit", "eval", *argv]))
    verdict.show(record, Console(soft_wrap=True))
    print()
    if folder is None:
        print("nothing is written without --out, as this is no run's folder")
        return 0
    if record["top1"] == 100:
        print(f"no mistakes, hence no {evidence.MISTAKES}")
    for file in evidence.FILES:
        if (folder / file).exists():
            print(folder / file)
    return 0


def _own(parser: Parser) -> None:
    """The arguments that no configuration has."""
    group = parser.add_argument_group("eval", "What is judged, and how.")
    what = "a run's folder, a weights file (.safetensors), or a timm model with pretrained weights"
    group.add_argument("name", metavar="RUN", help=what)
    group.add_argument("--split", default="test", metavar="{test,val,train,all}", help="Which images. [test]")
    group.add_argument("--flip", action="store_true", help="Average over each image and its mirror image.")
    group.add_argument("--robustness", action="store_true", help="Also with noise, blur, less contrast, and as JPEG.")
    group.add_argument("--compare", metavar="RUN", help="Another trained model, for the same images.")
    group.add_argument("--out", metavar="DIR", help="Folder for what is found.")
    group.add_argument("--overwrite", action="store_true", help="Replace what was found before.")
