"""Predict the classes of image files: `smallvit predict`."""

from __future__ import annotations

import os
import shlex
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from smallvit.cli import hints
from smallvit.cli.parser import Parser
from smallvit.config.options import MAX_MEGAPIXELS, Amp
from smallvit.utils.errors import InputError, group_errors, print_message, require
from smallvit.utils.files import atomic_write, check_output_file

if TYPE_CHECKING:
    from smallvit.evaluation.predict import Prediction

DESCRIPTION = """\
Classify images: print the most probable classes of each image and their
probabilities.

  smallvit predict runs/vit-spt-lsa-cifar100 cat.jpg photos/
  smallvit predict runs/vit-spt-lsa-cifar100 photos/ --top 3 --out photos.csv
  find photos -name '*.jpg' | smallvit predict RUN - --format jsonl
  smallvit predict vit_tiny_patch16_224:pretrained cat.jpg

RUN is a run folder, a weights file, or a timm model with pretrained weights.
Images are decoded, resized and normalized as in training. Predictions go to
standard output, messages to standard error. Files that cannot be read are
reported and skipped. The exit code is 0 if at least one file could be read,
else 2.
See also: smallvit eval, smallvit attend, smallvit export; docs/prediction.md.
"""
FORMATS = ("table", "csv", "jsonl")


def parser() -> Parser:
    """Create the argument parser."""
    parser = Parser("smallvit predict", DESCRIPTION)
    what = "a run folder, a weights file (.safetensors), or a timm model with pretrained weights"
    images = "image files, folders, or - to read names from standard input, one per line"
    parser.add_argument("run", metavar="RUN", help=what)
    parser.add_argument("images", metavar="IMAGE", nargs="*", help=images)
    parser.add_argument("--top", type=int, default=5, metavar="N", help="Classes per image. [5]")
    parser.add_argument("--format", choices=FORMATS, help="Output format. [table, or the suffix of --out]")
    parser.add_argument("--out", metavar="FILE", help="Output file (.csv or .jsonl).")
    parser.add_argument("--overwrite", action="store_true", help="Replace --out.")
    parser.add_argument("--flip", action="store_true", help="Average over each image and its mirror image.")
    parser.add_argument("--img-size", type=int, metavar="N", help="Image size in pixels. [the model's]")
    parser.add_argument("--arch", metavar="NAME", help="The timm model in a weights file of another program.")
    limit = f"Largest image to decode, in millions of pixels. [{MAX_MEGAPIXELS:g}]"
    parser.add_argument("--max-megapixels", type=float, default=MAX_MEGAPIXELS, metavar="X", help=limit)
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps. [auto]")
    parser.add_argument("--amp", choices=get_args(Amp), default="auto", help="Mixed precision. [auto]")
    return parser


def main(argv: list[str]) -> int:
    """Classify the images and write predictions as they are computed."""
    options = parser().parse_args(argv)
    hints.require_run("smallvit predict", argv, options.run, options.images, folders=True)
    path, form = _resolve_output(options)
    require(options.top >= 1, "top", options.top, "at least 1")
    require(options.img_size is None or options.img_size >= 1, "img_size", options.img_size, "at least 1 pixel")
    limit = options.max_megapixels
    require(0 < limit <= 1000, "max_megapixels", limit, "above 0, at most 1000")
    names = _read_names(options.images, options.run)

    from smallvit.models.weights_info import read_weights_info

    read_weights_info(options.run, "predict")  # before torch is imported

    from rich.console import Console

    from smallvit.datasets.listing import describe_kinds
    from smallvit.evaluation import predict
    from smallvit.evaluation.predictor import load_predictor
    from smallvit.utils.terminal import create_progress

    arguments = {"arch": options.arch, "img_size": options.img_size, "device": options.device, "amp": options.amp}
    model = load_predictor(options.run, "predict", **arguments)
    ignored: list[str] = []
    images, settings = predict.list_images(names, ignored), {"top": options.top, "flip": options.flip}
    predictions = predict.predict_images(model, images, max_megapixels=options.max_megapixels, **settings)
    failed: list[Prediction] = []
    notes: Counter[str] = Counter()

    def collect() -> Iterator[Prediction]:
        for prediction in bar.track(predictions, total=len(images), description="images"):
            if prediction.error is not None:
                failed.append(prediction)
            if prediction.note is not None:
                notes[prediction.note] += 1
            yield prediction

    on_screen = path is None and sys.stdout.isatty()
    text = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    with nullcontext() if path is None else atomic_write(path) as partial:
        with (
            nullcontext(sys.stdout) if partial is None else open(partial, "w", **text) as file,
            create_progress(Console(stderr=True), disable=on_screen) as bar,
        ):
            predict.write_predictions(collect(), file, form, model.class_names, options.top)
        named = group_errors((each.path, each.error) for each in failed)
        unreadable = f"{len(failed):,} of {len(images):,} images cannot be read: {named}"
        if len(failed) == len(images):
            raise InputError(unreadable)
    for note, count in notes.items():
        print_message(f"{count:,} of {len(images):,} images have {note}")
    if ignored:
        print_message(f"ignored: {describe_kinds(ignored)}")
    if failed:
        print_message(unreadable)
    if path is not None:
        print(path)
    return 0


def _resolve_output(options: Namespace) -> tuple[Path | None, str]:
    """Return the output file and the format."""
    if options.out is None:
        if options.overwrite:
            raise InputError("--overwrite has no effect without --out; add --out FILE")
        if sys.stdout is None:
            raise InputError("standard output is closed; add --out FILE")
        return None, options.format or FORMATS[0]
    form = options.format or ("jsonl" if options.out.lower().endswith(".jsonl") else "csv")
    return check_output_file(options.out, f".{form}", overwrite=options.overwrite), form


def _read_names(arguments: list[str], run: str) -> list[str]:
    """Return the files and folders of the arguments and of standard input."""
    use = f"use {shlex.join(['smallvit', 'predict', run])} IMAGE ..., with files or folders"
    if not arguments and (sys.stdin is None or sys.stdin.isatty()):
        raise InputError(f"no images; {use}, or - to read names from standard input")
    lines = () if sys.stdin is None or "-" not in (arguments or ["-"]) else sys.stdin.buffer
    read = [os.fsdecode(line).rstrip("\r\n") for line in lines]
    names = [name for each in arguments or ["-"] for name in (filter(None, read) if each == "-" else [each])]
    if not names:
        raise InputError(f"no images: standard input is empty; {use}")
    return names
