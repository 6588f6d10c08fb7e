"""Run `smallvit export`: write a trained model for other programs."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from smallvit.cli.parser import Parser, evaluation_config
from smallvit.runs.run import Run
from smallvit.utils.errors import InputError, print_message, require
from smallvit.utils.files import check_output_file, check_output_folder
from smallvit.utils.sizes import parse_size

if TYPE_CHECKING:
    from smallvit.export.quantize import Reduction

DESCRIPTION = """\
Export a trained model for other programs, and verify that its logits are the
same there.

  smallvit export runs/vit-spt-lsa-cifar100 --format onnx
  smallvit export runs/vit-spt-lsa-cifar100 --format onnx --precision int8
  smallvit export runs/vit-spt-lsa-cifar100 --format pt2 --out model.pt2
  smallvit export runs/vit-spt-lsa-cifar100 --format timm
  smallvit export runs/binaryvit-cifar100 --format packed
  smallvit export runs/vit-spt-lsa-cifar100 --format hub --push OWNER/NAME

RUN is a run folder, a weights file, or a timm model with pretrained weights.
Formats: onnx is a file for onnxruntime and OpenVINO, pt2 a torch.export
program, timm a folder for timm.create_model("local-dir:FOLDER",
pretrained=True), hub the same with a model card, packed a weights file for
smallvit with eight one-bit weights per byte. Models that timm cannot build
alone need `import smallvit.models.timm_registry` first. Exports accept any
batch size and go to RUN/export or --out. All but packed come with
preprocess.py, which preprocesses images with Pillow and NumPy alone. If a
model cannot be exported, or its logits differ, the exit code is 2 and no file
is written; if only --push fails, the exit code is 2 and the export is kept.
See also: smallvit predict, smallvit eval; docs/exporting.md.
"""
FORMATS = ("onnx", "pt2", "timm", "hub", "packed")
PRECISIONS = ("fp32", "fp16", "int8")
PRECISION_HELP = "onnx: int8 is calibrated on val; int8 and fp16 are compared with fp32 on test. [fp32]"
SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "packed": ".packed.safetensors"}
"""Default suffixes of formats that are a single file; the others are folders."""


def parser() -> Parser:
    """Return the argument parser."""
    parser = Parser("smallvit export", DESCRIPTION)
    sources = "A run folder, a weights file (.safetensors), or a timm model with pretrained weights."
    parser.add_argument("run", metavar="RUN", help=sources)
    parser.add_argument("--format", choices=FORMATS, required=True, help="Format to write.")
    parser.add_argument("--out", metavar="PATH", help="File or folder to write. [RUN/export/...]")
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier export.")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help=PRECISION_HELP)
    parser.add_argument(
        "--data", metavar="DATA", help="onnx in int8, fp16: images to calibrate and test on. [the run's]"
    )
    parser.add_argument("--license", metavar="ID", help="hub: license of the weights, e.g. mit or cc-by-4.0. [none]")
    parser.add_argument("--push", metavar="OWNER/NAME", help="hub: upload the folder to this repository.")
    parser.add_argument("--private", action="store_true", help="hub: create a private repository.")
    parser.add_argument("--img-size", metavar="SIZE", help="Image size in pixels, e.g. 64 or 64x96. [the model's]")
    parser.add_argument("--arch", metavar="NAME", help="timm model of a weights file from another program.")
    return parser


def main(argv: list[str]) -> int:
    """Export the model, print its path, and upload it."""
    options = parser().parse_args(argv)
    _check_options(options)

    from smallvit.models.weights_info import read_weights_info

    read_weights_info(options.run, "export")  # before torch is imported
    path = resolve_output(
        options.run, options.format, options.out, overwrite=options.overwrite, precision=options.precision
    )

    from rich.console import Console

    from smallvit.evaluation.predictor import load_predictor
    from smallvit.export import export, timm_folder
    from smallvit.report.model_card import render_model_card
    from smallvit.utils.terminal import create_progress

    if options.format == "onnx":
        export.require_onnx()
    with create_progress(Console(stderr=True)) as progress:
        progress.add_task("export", total=None)
        reduction = None if options.precision == "fp32" else _read_images(options)
        arguments = {"arch": options.arch, "img_size": options.img_size, "device": "cpu", "amp": "off"}
        model = load_predictor(options.run, "export", **arguments)
        readme = None
        if options.format == "hub":
            readme = render_model_card(model, Path(os.path.expanduser(options.run)), options.license, options.push)
        message = export.export_model(
            model,
            options.format,
            path,
            readme=readme,
            overwrite=options.overwrite,
            reduction=reduction,
            progress=progress,
        )
    print(path)
    if message is not None:
        print(message)
    if options.push is not None:
        print(timm_folder.push_to_hub(path, options.push, private=options.private))
    return 0


def _read_images(options: Namespace) -> Reduction:
    """Return the precision with the images to calibrate and to test on."""
    from smallvit.evaluation.evaluator import create_tasks
    from smallvit.evaluation.predictor import check_test_split, read_model_info
    from smallvit.export.quantize import Reduction

    given = {"data": options.data, "img_size": options.img_size}
    given = {name: value for name, value in given.items() if value is not None} | {"device": "cpu", "amp": "off"}
    config = evaluation_config(options.run, "export", given)
    info = read_model_info(options.run, "export", options.arch)
    (test,) = create_tasks(options.run, [info], config, "test")
    for warning in check_test_split(info, test.dataset, config.data):
        print_message(warning)
    (calibration,) = create_tasks(options.run, [info], config, "val" if len(test.dataset.val) else "train")
    return Reduction(precision=options.precision, calibration=calibration, test=test)


def _check_options(options: Namespace) -> None:
    for name in ("license", "push", "private"):
        if getattr(options, name) and options.format != "hub":
            raise InputError(f"--{name} has no effect with --format {options.format}; use --format hub")
    if options.precision != "fp32" and options.format != "onnx":
        raise InputError(f"--precision {options.precision} has no effect with --format {options.format}; use onnx")
    if options.data is not None and options.precision == "fp32":
        raise InputError("--data has no effect without --precision int8 or fp16; add it")
    if options.private and options.push is None:
        raise InputError("--private has no effect without --push OWNER/NAME; add it")
    is_id = options.license is None or re.fullmatch(r"[a-z0-9][a-z0-9.-]*", options.license)
    require(bool(is_id), "license", options.license, "a license identifier of the Hub, e.g. mit or cc-by-4.0")
    if options.img_size is not None:
        parse_size(options.img_size)


def resolve_output(name: str, form: str, out: str | None, *, overwrite: bool, precision: str = "fp32") -> Path:
    """Return the file or folder to write, after checking that it can be written.

    Args:
        name: The model; a run folder is also the default place.
        form: The format.
        out: Path given by the user.
        overwrite: Replace an earlier export.
        precision: Below fp32, it is part of the default name.

    Raises:
        InputError: `out` is None and `name` is not a run folder; `out` has another suffix, is not writable, or exists
            and is not to be replaced.
    """
    run = Path(os.path.expanduser(name))
    if out is None and not os.path.isdir(run):
        raise InputError(f"export {name}: not a run folder, so there is no default output path; add --out")
    part = "" if precision == "fp32" else f".{precision}"
    default = f"{os.path.basename(os.path.realpath(run))}{part}{SUFFIXES[form]}" if form in SUFFIXES else form
    path = run / Run.EXPORT / default if out is None else Path(os.path.expanduser(out))
    if form not in SUFFIXES:
        check_output_folder(path, overwrite=overwrite)
        return path
    if out is None:
        path.parent.mkdir(exist_ok=True)
    return check_output_file(str(path), "." + SUFFIXES[form].rpartition(".")[2], overwrite=overwrite)
