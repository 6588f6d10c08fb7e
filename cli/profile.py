"""`smallvit profile`: what models cost."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smallvit.cli.options import Parser, options_parser, parsed
from smallvit.comparison import rows
from smallvit.config import Config
from smallvit.errors import InputError
from smallvit.files import require_free
from smallvit.options import require

if TYPE_CHECKING:
    from rich.console import Console

DESCRIPTION = """\
Measure what models cost: parameters, operations, memory, latency, throughput, side by side.

  smallvit profile vit vit+spt+lsa resnet56 --img-size 32 64
  smallvit profile runs/vit-spt-lsa-digits --batch-sizes 1 16 --out costs
  smallvit profile vit swin cait --growth --out growth
  smallvit profile vit,patch_size=8 deit_tiny_patch16_224+lsa --img-size 64 --growth 64 96 128

A row is a model with its plugins and options, or a run's folder; without any they are vit and vit+spt+lsa. Patches
follow the image size as in training, but for --growth, which keeps those of the smallest size. Models take turns.

Written into --out: profile.md, profile.csv, profile.json; with --growth also growth.csv and growth.png. Without --out
nothing is written.
See also: smallvit compare, smallvit list, smallvit coverage; docs/profiling.md.
"""
ROWS = ("vit", "vit+spt+lsa")
"""Where none are given."""
SERVES = ("device", "amp")
CSV, JSON, PAGE, GROWTH, PICTURE = "profile.csv", "profile.json", "profile.md", "growth.csv", "growth.png"


def parser() -> Parser:
    """The arguments."""
    return options_parser("smallvit profile", DESCRIPTION, SERVES, _own)


def _own(parser: Parser) -> None:
    """The arguments that no configuration has."""
    group = parser.add_argument_group("profile", "What is measured.")
    sizes = {"type": int, "metavar": "N"}
    group.add_argument("rows", nargs="*", metavar="ROW", help=f"{rows.FORM}, or a run's folder.")
    group.add_argument(
        "--img-size", nargs="+", **sizes, help="Image sizes in pixels; by default a run's own, and 32 of others."
    )
    group.add_argument("--classes", default=100, **sizes, help="Classes, of rows that are no runs. [100]")
    group.add_argument(
        "--batch-sizes",
        nargs="+",
        default=[1, 16, 128],
        **sizes,
        help="Batches of inference; the largest (2 at least) is the training step's, the first growth's. [1 16 128]",
    )
    group.add_argument(
        "--growth",
        nargs="*",
        **sizes,
        help="Also over image sizes, by default those from 32 to 224 that a model takes.",
    )
    group.add_argument("--out", metavar="DIR", help="Folder for the table, the figures and the picture.")
    group.add_argument("--overwrite", action="store_true", help="Replace the files that are in --out.")


def main(argv: list[str]) -> int:
    """Measure the rows, print a table, and write the files to --out."""
    given = parsed(parser(), argv)
    own = {
        name: given.pop(name) for name in ("rows", "img_size", "classes", "batch_sizes", "growth", "out", "overwrite")
    }
    compute = Config.build(**given).compute
    for name in ("img_size", "batch_sizes", "growth"):
        for value in own[name] or []:
            require(value >= 1, name, value, "at least 1")
    require(own["classes"] >= 1, "classes", own["classes"], "at least 1")
    out = None if own["out"] is None else Path(os.path.expanduser(own["out"]))
    if out is not None:
        require_free(out, "--out", overwrite=own["overwrite"])
    if own["overwrite"] and out is None:
        raise InputError("--overwrite needs --out DIR: which folder to replace")

    from rich.console import Console

    from smallvit.costs import profiling, subjects

    plan = profiling.Plan(
        subjects=subjects.subjects(own["rows"] or list(ROWS), own["classes"]),
        img_sizes=_once(own["img_size"]),
        batch_sizes=_once(own["batch_sizes"]),
        growth=None if own["growth"] is None else _once(own["growth"]),
        device=compute.device,
        amp=compute.amp,
    )
    found = profiling.measure(plan) | {"command": shlex.join(["smallvit", "profile", *argv])}
    _show(found, Console(highlight=False, markup=False, soft_wrap=True), out)
    return 0


def _once(values: Sequence[int] | None) -> list[int]:
    return list(dict.fromkeys(values or []))


def _show(found: dict[str, Any], console: Console, out: Path | None) -> None:
    """Write the files, and print a table and how it came about."""
    from rich.measure import Measurement

    from smallvit.costs import tables

    table, lines = tables.table(found), tables.notes(found)
    written = [] if out is None else _write(found, lines, out)
    needed = Measurement.get(console, console.options.update(width=1000), table).maximum
    console.width = max(console.width, needed)  # no figure is cut
    console.print(table)
    console.print()
    for line in lines:
        console.print(line)
    if written:
        console.print(f"\nwritten {', '.join(map(str, written))}")


def _write(found: dict[str, Any], lines: list[str], out: Path) -> list[Path]:
    """Write a profile's files; returns them."""
    from smallvit import report
    from smallvit.costs import loglog, tables
    from smallvit.files import write_text

    out.mkdir(parents=True, exist_ok=True)
    grown = found.get("growth")
    report.write_csv(found["rows"], out / CSV)
    write_text(out / JSON, json.dumps(found, indent=2) + "\n")
    for name in (GROWTH, PICTURE):
        (out / name).unlink(missing_ok=True)
    if grown:
        report.write_csv(grown, out / GROWTH)
        loglog.plot_growth(grown, out / PICTURE, f"Growth with the image: {found['hardware']}, {found['precision']}")
    write_text(out / PAGE, tables.page(found, lines, PICTURE if grown else None))
    return [out / name for name in (PAGE, CSV, JSON, *([GROWTH, PICTURE] if grown else []))]
