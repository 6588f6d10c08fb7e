"""`smallvit predict`: the likeliest classes of image files."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from smallvit.cli.options import Parser, new_file
from smallvit.errors import InputError
from smallvit.files import replacing
from smallvit.options import require

if TYPE_CHECKING:
    from smallvit.predicting import Prediction
    from smallvit.ready import Ready

DESCRIPTION = """\
Classify images: the likeliest classes of each, and their probabilities.

  smallvit predict runs/vit-spt-lsa-cifar100 cat.jpg photos/
  smallvit predict runs/vit-spt-lsa-cifar100 photos/ --top 3 --out predictions.csv
  find photos -name '*.jpg' | smallvit predict runs/vit-spt-lsa-cifar100 - --format jsonl
  smallvit predict vit_tiny_patch16_224:pretrained cat.jpg

RUN is a run's folder, a weights file, or a timm model with pretrained weights. Images are decoded, resized and
normalised as in training. Data goes to standard output, all else to standard error; files that cannot be read are
named there and passed over. The exit code is 0 if any could be read, and 2 if none could.
See also: smallvit eval, smallvit attend, smallvit export; docs/prediction.md.
"""
FORMATS = ("table", "csv", "jsonl")
TOP = 5
DIGITS = 6
"""Significant digits of a probability that is written to a file."""
WIDEST = 60
"""Columns of the terminal that a path may take where it stands before the classes."""
NAMED = 3
"""Files that are named among those that cannot be read."""


def parser() -> Parser:
    """The arguments."""
    parser = Parser("smallvit predict", DESCRIPTION)
    what = "a run's folder, a weights file (.safetensors), or a timm model with pretrained weights"
    images = "image files, folders of them, or - for names on standard input, a line each"
    parser.add_argument("run", metavar="RUN", help=what)
    parser.add_argument("images", metavar="IMAGE", nargs="*", help=images)
    parser.add_argument("--top", type=int, metavar="N", help=f"Classes to name for each image. [{TOP}]")
    parser.add_argument("--format", choices=FORMATS, help="How they are written. [table, or as --out is named]")
    parser.add_argument("--out", metavar="FILE", help="Write to this .csv or .jsonl file.")
    parser.add_argument("--overwrite", action="store_true", help="Replace --out.")
    parser.add_argument("--flip", action="store_true", help="Average over each image and its mirror image.")
    parser.add_argument("--img-size", type=int, metavar="N", help="Image size in pixels. [the model's]")
    parser.add_argument("--arch", metavar="NAME", help="The timm model that another program's weights file holds.")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps. [auto]")
    parser.add_argument("--amp", choices=("auto", "bf16", "off"), default="auto", help="Mixed precision. [auto]")
    return parser


def main(argv: list[str]) -> int:
    """Classify the images and write what was found as it comes."""
    options = parser().parse_args(argv)
    path = _out(options)
    require(options.top is None or options.top >= 1, "top", options.top, "at least 1")
    require(options.img_size is None or options.img_size >= 1, "img_size", options.img_size, "at least 1 pixel")
    names = _names(options.images)

    from smallvit import trained
    from smallvit.predicting import image_paths
    from smallvit.ready import described, prepared

    card = described(options.run, "predict", options.arch)
    trained.require_classifier(card)
    model = prepared(card, options.img_size or card.spec["img_size"], options.device, options.amp)
    paths = image_paths(names)
    with nullcontext() if path is None else replacing(path) as partial:
        failed = _write(model, paths, options, partial)
        if len(failed) == len(paths):
            raise InputError(_described(failed, paths))
    if failed:
        print(_described(failed, paths), file=sys.stderr)
    if path is not None:
        print(path)
    return 0


def _out(options: Namespace) -> Path | None:
    """Where to, and in which format, which is noted among the options."""
    if options.out is None:
        options.format = options.format or FORMATS[0]
        if options.overwrite:
            raise InputError("--overwrite needs --out FILE: which file to replace")
        if sys.stdout is None:
            raise InputError("standard output is closed: give --out FILE")
        return None
    suffix = Path(options.out).suffix.lower()
    if suffix not in (".csv", ".jsonl"):
        raise InputError(f"--out {options.out}: expected a name that ends in .csv or .jsonl")
    if options.format not in (None, suffix[1:]):
        raise InputError(f"--format {options.format} --out {options.out}: they name two formats; leave --format out")
    options.format = suffix[1:]
    return new_file(options.out, suffix, overwrite=options.overwrite)


def _names(given: list[str]) -> list[str]:
    """Files and folders as they were given, and those that standard input names."""
    if not given and (sys.stdin is None or sys.stdin.isatty()):
        raise InputError("no images: give files or folders, or - for names on standard input")
    names = [name for each in given or ["-"] for name in (_listed() if each == "-" else [each])]
    if not names:
        raise InputError("no images: standard input names none")
    return names


def _listed() -> Iterator[str]:
    lines = (os.fsdecode(line).rstrip("\r\n") for line in (() if sys.stdin is None else sys.stdin.buffer))
    return (line for line in lines if line)


def _write(model: Ready, paths: list[str], options: Namespace, partial: Path | None) -> list[Prediction]:
    """Write the predictions to a file or to standard output; returns those of files that cannot be read."""
    from rich.console import Console
    from rich.progress import Progress

    from smallvit.predicting import predict

    failed: list[Prediction] = []

    def noted() -> Iterator[Prediction]:
        predictions = predict(model, paths, top=options.top or TOP, flip=options.flip)
        for prediction in bar.track(predictions, total=len(paths), description="images"):
            if prediction.error is not None:
                failed.append(prediction)
            yield prediction

    console, text = Console(stderr=True), {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    quiet = not console.is_terminal or (partial is None and sys.stdout.isatty())
    with (
        nullcontext(sys.stdout) if partial is None else open(partial, "w", **text) as file,
        Progress(console=console, transient=True, disable=quiet) as bar,
    ):
        WRITERS[options.format](noted(), file, model, paths, options.top)
        file.flush()
    return failed


def _write_table(
    predictions: Iterator[Prediction], file: TextIO, model: Ready, paths: list[str], top: int | None
) -> None:
    """A line for each image as it comes; on a terminal as many classes as fit, unless --top says how many."""
    from rich.cells import cell_len, set_cell_size

    from smallvit.predicting import readable

    wide = min(WIDEST, max(map(cell_len, map(_shown, paths))))
    name_wide = max(map(cell_len, map(_shown, readable(model.class_names))))
    fitting = TOP
    if top is None and file.isatty():
        fitting = max(1, (shutil.get_terminal_size().columns - wide) // (name_wide + len("  100.0 %  ")))
    for prediction in predictions:
        if prediction.error is not None:
            continue
        path = _shown(prediction.path)
        cells = [f"{set_cell_size(_shown(name), name_wide)} {100 * p:5.1f} %" for name, p in prediction.classes]
        print("  ".join([path + " " * (wide - cell_len(path)), *cells[: top or fitting]]), file=file)


def _write_csv(
    predictions: Iterator[Prediction], file: TextIO, model: Ready, paths: list[str], top: int | None
) -> None:
    """A row for each image: its path, and classes and probabilities in turn."""
    writer = csv.writer(file, lineterminator="\n")
    numbers = range(1, min(top or TOP, len(model.class_names)) + 1)
    writer.writerow(["path", *(f"{what}_{number}" for number in numbers for what in ("class", "probability"))])
    for prediction in predictions:
        if prediction.error is None:
            cells = (cell for name, p in prediction.classes for cell in (name, f"{p:.{DIGITS}g}"))
            writer.writerow([prediction.path, *cells])


def _write_jsonl(
    predictions: Iterator[Prediction], file: TextIO, model: Ready, paths: list[str], top: int | None
) -> None:
    """An object for each file, also for those that cannot be read."""
    for prediction in predictions:
        found = {"error": prediction.error}
        if prediction.error is None:
            classes = [{"name": name, "probability": float(f"{p:.{DIGITS}g}")} for name, p in prediction.classes]
            found = {"classes": classes}
        print(json.dumps({"path": prediction.path} | found), file=file)


WRITERS = dict(zip(FORMATS, (_write_table, _write_csv, _write_jsonl), strict=True))


def _shown(text: str) -> str:
    """A text on one line, whatever it holds."""
    return repr(text)[1:-1] if not text.isprintable() else text


def _described(failed: list[Prediction], paths: list[str]) -> str:
    """One line that names the first few files that cannot be read."""
    named = ", ".join(f"{_shown(each.path)} ({each.error})" for each in failed[:NAMED])
    more = f" and {len(failed) - NAMED:,} more" if len(failed) > NAMED else ""
    return f"{len(failed):,} of {len(paths):,} images cannot be read: {named}{more}"
