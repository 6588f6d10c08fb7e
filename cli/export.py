"""`smallvit export`: a trained model for other programs."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from pathlib import Path

from smallvit.cli.options import Parser
from smallvit.errors import InputError

DESCRIPTION = """\
Write a trained model for other programs, after trying it there: its answers are the same.

  smallvit export runs/vit-spt-lsa-cifar100 --format onnx
  smallvit export runs/vit-spt-lsa-cifar100 --format pt2 --out model.pt2
  smallvit export runs/vit-spt-lsa-cifar100 --format timm
  smallvit export runs/binaryvit-cifar100 --format packed
  smallvit export runs/vit-spt-lsa-cifar100 --format hub --license mit --push OWNER/NAME

RUN is a run's folder, a weights file, or a timm model with pretrained weights. onnx is a file for onnxruntime, pt2 one
of torch.export, timm a folder for timm.create_model("local-dir:FOLDER", pretrained=True), and hub the same with a model
card; Python must `import smallvit.registry` before, unless timm has such a model itself. packed is a weights file for
smallvit with eight one-bit weights to a byte. They go to RUN/export unless --out names another place; batches may have
any size. The exit code is 2, and nothing is left behind, where a model
cannot be exported or answers otherwise in its new form; where --push fails it is 2 too, but what was exported stays.
See also: smallvit predict, smallvit eval; docs/exporting.md.
"""
FORMATS = ("onnx", "pt2", "timm", "hub", "packed")


def parser() -> Parser:
    """The arguments."""
    parser = Parser("smallvit export", DESCRIPTION)
    what = "a run's folder, a weights file (.safetensors), or a timm model with pretrained weights"
    parser.add_argument("run", metavar="RUN", help=what)
    parser.add_argument("--format", choices=FORMATS, required=True, help="The form.")
    parser.add_argument("--out", metavar="PATH", help="The file or folder to write. [RUN/export/...]")
    parser.add_argument("--overwrite", action="store_true", help="Replace what was exported there before.")
    parser.add_argument("--license", metavar="ID", help="hub: the weights' license, such as mit or cc-by-4.0. [none]")
    parser.add_argument("--push", metavar="OWNER/NAME", help="hub: send the folder to this repository.")
    parser.add_argument("--private", action="store_true", help="hub: a repository that --push creates is private.")
    parser.add_argument("--img-size", type=int, metavar="N", help="Image size in pixels. [the model's]")
    parser.add_argument("--arch", metavar="NAME", help="The timm model that another program's weights file holds.")
    return parser


def main(argv: list[str]) -> int:
    """Export the model, say where it lies, and send it."""
    options = parser().parse_args(argv)
    _require_sense(options)

    from rich.console import Console
    from rich.text import Text

    from smallvit.exports import exporting, graphs, hub
    from smallvit.ready import ready

    if options.format == "onnx":
        graphs.require_onnx()
    path = exporting.destination(options.run, options.format, options.out, overwrite=options.overwrite)
    with Console(stderr=True).status(Text(f"exporting {options.run}")):
        arguments = {"arch": options.arch, "img_size": options.img_size, "device": "cpu", "amp": "off"}
        model = ready(options.run, "export", **arguments)
        card = {"run": Path(os.path.expanduser(options.run)), "terms": options.license, "repository": options.push}
        told = exporting.export(model, options.format, path, **card)
    print(path)
    if told is not None:
        print(told)
    if options.push is not None:
        print(hub.push(path, options.push, private=options.private))
    return 0


def _require_sense(options: Namespace) -> None:
    """Check what can be checked before anything is computed."""
    for name in ("license", "push", "private"):
        if getattr(options, name) and options.format != "hub":
            raise InputError(f"--{name} is of no use with --format {options.format}; give --format hub")
    if options.private and options.push is None:
        raise InputError("--private is of no use without --push OWNER/NAME")
    if options.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", options.license):
        raise InputError(f"--license {options.license}: expected an identifier of the Hub's, such as mit or cc-by-4.0")
    if options.img_size is not None and options.img_size < 1:
        raise InputError(f"--img-size {options.img_size}: expected at least 1 pixel")
