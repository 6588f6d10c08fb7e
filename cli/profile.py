"""Profile models: `smallvit profile`."""

from __future__ import annotations

import json
import math
import os
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from smallvit.cli.parser import Parser, options_parser, parse
from smallvit.config import spec
from smallvit.config.config import Config
from smallvit.config.model import ARCH, ModelConfig
from smallvit.models import weights_info
from smallvit.models.architectures import require_name
from smallvit.utils.errors import require
from smallvit.utils.files import check_output_folder, is_path
from smallvit.utils.sizes import parse_size

DESCRIPTION = """\
Measure parameters, operations, memory, latency and throughput of models side
by side.

  smallvit profile vit vit+spt+lsa resnet56 --img-size 32 64
  smallvit profile runs/vit-spt-lsa-digits --batch-sizes 1 16 --out costs
  smallvit profile vit swin cait --growth --out growth
  smallvit profile --arch vit --spt --lsa
  smallvit profile vit,patch_size=8 swin+lsa --img-size 64 --growth 64 96 128

A row is a model with its plugins and options, or a run folder; by default vit
and vit+spt+lsa. The patch size follows the image size as in training; --growth
keeps that of the smallest size. Models take turns. When --seconds end, larger
batches and further rounds are skipped.

Output files in --out: profile.md, profile.csv, profile.json; with --growth
also growth.csv and growth.png. Nothing is written without --out.
See also: smallvit compare, smallvit list; docs/profiling.md.
"""
ROWS = ("vit", "vit+spt+lsa")
"""Default rows."""
SERVES = ("device", "amp", "model.*")
CSV, JSON, PAGE, GROWTH, FIGURE = "profile.csv", "profile.json", "profile.md", "growth.csv", "growth.png"


def parser() -> Parser:
    """Create the argument parser."""
    return options_parser("smallvit profile", DESCRIPTION, SERVES, _own)


def _own(parser: Parser) -> None:
    """Add the arguments that are not configuration options."""
    group = parser.add_argument_group("profile", "What to measure.")
    sizes = {"type": int, "metavar": "N"}
    group.add_argument("rows", nargs="*", metavar="ROW", help=f"{spec.SPEC_FORM}, or a run folder.")
    group.add_argument(
        "--img-size", nargs="+", metavar="SIZE", help="Image sizes in pixels, e.g. 64 64x96. [a run's own, else 32]"
    )
    group.add_argument("--classes", default=100, **sizes, help="Classes of rows that are not runs. [100]")
    group.add_argument(
        "--batch-sizes",
        nargs="+",
        default=[1, 16, 128],
        **sizes,
        help="Batch sizes of inference; the training step uses the largest (at least 2), growth the first. [1 16 128]",
    )
    group.add_argument(
        "--growth",
        nargs="*",
        **sizes,
        help="Also measure over image sizes; by default those from 32 to 224 that a model supports.",
    )
    group.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="Time budget of each model at each image size. [10]",
    )
    group.add_argument("--out", metavar="DIR", help="Output folder.")
    group.add_argument("--overwrite", action="store_true", help="Replace earlier results.")


def main(argv: list[str]) -> int:
    """Measure the rows, print a table, and write the files to --out."""
    given = parse(parser(), argv)
    names = ("rows", "img_size", "classes", "batch_sizes", "growth", "seconds", "out", "overwrite")
    own = {name: given.pop(name) for name in names}
    model = {each.name: given.pop(each.name) for each in fields(ModelConfig) if each.name in given}
    if model:
        own["rows"] = [*own["rows"], spec.format_label(model.pop("arch", ARCH), model)]
    for text in own["rows"]:  # before torch is imported
        if is_path(text):
            weights_info.read_weights_info(text, "profile")
            continue
        row = spec.parse_spec(text)
        with row.named():
            require_name(row.arch)
    compute = Config.build(**given).compute
    sizes = [parse_size(size) for size in own["img_size"] or []]
    for name in ("batch_sizes", "growth", "classes"):
        for value in [own[name]] if name == "classes" else own[name] or []:
            require(value >= 1, name, value, "at least 1")
    require(0 < own["seconds"] < math.inf, "seconds", own["seconds"], "more than 0")
    out = None if own["out"] is None else Path(os.path.expanduser(own["out"]))
    if out is not None:
        check_output_folder(out, overwrite=own["overwrite"])

    from smallvit.profiling import profile
    from smallvit.utils.terminal import create_console, print_table

    rows = [profile.parse_row(text, own["classes"]) for text in own["rows"] or ROWS]
    plan = profile.ProfileConfig(
        rows=list({row.label: row for row in rows}.values()),
        img_sizes=sizes,
        batch_sizes=own["batch_sizes"],
        growth=own["growth"],
        device=compute.device,
        amp=compute.amp,
        seconds=own["seconds"],
    )
    results = profile.run_profile(plan) | {"command": shlex.join(["smallvit", "profile", *argv])}
    notes = profile.list_notes(results)
    written = [] if out is None else _write(results, notes, out)
    console = create_console()
    print_table(console, profile.list_cells(results), wrap_header=True)
    console.print()
    for note in notes:
        console.print(note)
    if written:
        console.print(f"\nwrote {', '.join(map(str, written))}")
    return 0


def _write(results: dict[str, Any], notes: list[str], out: Path) -> list[Path]:
    """Write a profile's files; return their paths."""
    from smallvit.profiling import profile
    from smallvit.utils import tables
    from smallvit.utils.files import write_text

    out.mkdir(parents=True, exist_ok=True)
    growth = results.get("growth")
    tables.write_csv(results["rows"], out / CSV)
    write_text(out / JSON, json.dumps(results, indent=2) + "\n")
    for name in (GROWTH, FIGURE):
        (out / name).unlink(missing_ok=True)
    if growth:
        tables.write_csv(growth, out / GROWTH)
        profile.plot_growth(growth, out / FIGURE, f"{results['hardware']}, {results['precision']}")
    write_text(out / PAGE, profile.format_markdown(results, notes, FIGURE if growth else None))
    return [out / name for name in (PAGE, CSV, JSON, *([GROWTH, FIGURE] if growth else []))]
