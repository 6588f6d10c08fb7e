"""Predict the classes of image files: `smallvit predict`."""

from __future__ import annotations

import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from smallvit.cli.parser import Parser, evaluation_parser, parse, require_run
from smallvit.config.config import Config
from smallvit.config.options import DataConfig
from smallvit.datasets.catalog import is_manifest, require_data
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
  smallvit predict RUN --data table.csv         # the images of its column path

If the model was trained on images with several labels, each label above its
threshold is printed, perhaps none; --top N prints the N most probable.

Images are decoded, resized and normalized as in training. Predictions go to
standard output, messages to standard error. Files that cannot be read are
reported and skipped. The exit code is 0 if at least one file could be read,
else 2.
See also: smallvit eval, smallvit attend, smallvit export; docs/prediction.md.
"""
FORMATS = ("table", "csv", "jsonl")
OPTIONS = ("arch", "data", "columns", "img_size", "max_megapixels", "device", "amp")
IMAGES = "image files, folders, or - to read names from standard input, one per line"
"""Help of the arguments IMAGE."""


def parser() -> Parser:
    """Create the argument parser."""
    return images_parser("predict", DESCRIPTION, _add_arguments)


def images_parser(verb: str, description: str, add_arguments: Callable[[Parser], None]) -> Parser:
    """Create the argument parser of a verb whose `OPTIONS` include --data with images that need no labels."""
    data = "A folder or a table (.csv, .tsv or .parquet with a column path) of images, in addition to IMAGE."
    return evaluation_parser(f"smallvit {verb}", description, add_arguments, OPTIONS, {"data": data})


def _add_arguments(parser: Parser) -> None:
    """Add the arguments that are not configuration options."""
    group = parser.add_argument_group("predict", "What to classify, and how to print it.")
    group.add_argument("images", metavar="IMAGE", nargs="*", help=IMAGES)
    top = "Classes per image. [5; those above their thresholds if images have several labels]"
    group.add_argument("--top", type=int, metavar="N", help=top)
    group.add_argument("--format", choices=FORMATS, help="Output format. [table, or the suffix of --out]")
    group.add_argument("--out", metavar="FILE", help="Output file (.csv or .jsonl).")
    group.add_argument("--overwrite", action="store_true", help="Replace --out.")
    group.add_argument("--flip", action="store_true", help="Average over each image and its mirror image.")


def main(argv: list[str]) -> int:
    """Classify the images and write predictions as they are computed."""
    options = parse(parser(), argv)
    config = Config.build(**{name: options.pop(name) for name in OPTIONS if name in options})
    run, top = options["name"], options["top"]
    require_run("smallvit predict", argv, run, options["images"], folders=True)
    path, form = _resolve_output(options["out"], options["format"], overwrite=options["overwrite"])
    require(top is None or top >= 1, "top", top, "at least 1")
    names = list_names("predict", run, options["images"], config)

    from smallvit.models.weights_info import read_weights_info

    read_weights_info(run, "predict")  # before torch is imported

    from rich.console import Console

    from smallvit.datasets.listing import describe_kinds
    from smallvit.evaluation import predict
    from smallvit.evaluation.predictor import load_predictor
    from smallvit.utils.terminal import create_progress

    arguments = {"arch": config.model.arch, "img_size": config.data.img_size}
    model = load_predictor(run, "predict", **arguments, device=config.compute.device, amp=config.compute.amp)
    ignored: list[str] = []
    images, settings = predict.list_images(names, ignored), {"top": top, "flip": options["flip"]}
    predictions = predict.predict_images(model, images, max_megapixels=config.data.max_megapixels, **settings)
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
            written = top or (None if model.info.multi_label else predict.TOP)
            predict.write_predictions(collect(), file, form, model.class_names, written)
        unreadable = describe_unreadable(failed, len(images))
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


def describe_unreadable(failed: Sequence[Prediction], total: int) -> str:
    """Return how many images cannot be read, and why, in one line."""
    named = group_errors((each.path, each.error) for each in failed)
    return f"{len(failed):,} of {total:,} images cannot be read: {named}"


def _resolve_output(out: str | None, form: str | None, *, overwrite: bool) -> tuple[Path | None, str]:
    """Return the output file and the format."""
    if out is None:
        if sys.stdout is None:
            raise InputError("standard output is closed; add --out FILE")
        return None, form or FORMATS[0]
    form = form or ("jsonl" if out.lower().endswith(".jsonl") else "csv")
    return check_output_file(out, f".{form}", overwrite=overwrite), form


def list_names(verb: str, run: str, images: list[str], config: Config) -> list[str]:
    """Return the files and folders of the arguments, of standard input and of --data.

    Raises:
        InputError: There are none, or --data is neither a folder nor a table.
    """
    given = "data" in config.given
    names = _read_names(images, shlex.join(["smallvit", verb, run])) if images or not given else []
    return [*names, *_list_data(config.data)] if given else names


def _list_data(config: DataConfig) -> list[str]:
    """Return the folder of --data, or the files of its table."""
    from smallvit.datasets.manifest import list_paths

    require_data(config.data)
    path = Path(os.path.expanduser(config.data))
    require(is_manifest(config.data) or path.is_dir(), "data", path, "a folder or a table of images")
    return list_paths(path, config.columns) if is_manifest(config.data) else [str(path)]


def _read_names(arguments: list[str], command: str) -> list[str]:
    """Return the files and folders of the arguments and of standard input."""
    use = f"use {command} IMAGE ..., with files or folders"
    if not arguments and (sys.stdin is None or sys.stdin.isatty()):
        raise InputError(f"no images; {use}, or - to read names from standard input")
    lines = () if sys.stdin is None or "-" not in (arguments or ["-"]) else sys.stdin.buffer
    read = [os.fsdecode(line).rstrip("\r\n") for line in lines]
    names = [name for each in arguments or ["-"] for name in (filter(None, read) if each == "-" else [each])]
    if not names:
        raise InputError(f"no images: standard input is empty; {use}")
    return names
