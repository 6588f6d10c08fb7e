"""Write the features of image files: `smallvit embed`."""

from __future__ import annotations

import os
from pathlib import Path

from smallvit.cli.parser import Parser, parse, require_run
from smallvit.cli.predict import IMAGES, OPTIONS, describe_unreadable, images_parser, list_names
from smallvit.config.config import Config
from smallvit.utils.errors import InputError, print_message, require
from smallvit.utils.files import check_output_file

DESCRIPTION = """\
Write the features of images, the input of the model's classifier, and the
nearest neighbors of each image.

  smallvit embed runs/vit-spt-lsa-cifar100 photos/ --out photos.npy
  smallvit embed runs/vit-spt-lsa-cifar100 photos/ --out photos.parquet
  smallvit embed vit_small_patch14_dinov2:pretrained DIR --out dinov2.npy
  smallvit embed RUN --data table.csv --out features.npy

A .npy file has the features, float32 (images, features); NAME.neighbors.csv
next to it names the image of each row and its neighbors by cosine similarity.
A .parquet file has the columns path, features, neighbors and similarities.
Images are decoded, resized and normalized as in training. Files that cannot be
read are reported and have no row; if none can be read, the exit code is 2.
See also: smallvit predict, smallvit probe; docs/prediction.md.
"""


def parser() -> Parser:
    """Create the argument parser."""
    return images_parser("embed", DESCRIPTION, _add_arguments)


def _add_arguments(parser: Parser) -> None:
    """Add the arguments that are not configuration options."""
    group = parser.add_argument_group("embed", "What to compute features of, and where to write them.")
    group.add_argument("images", metavar="IMAGE", nargs="*", help=IMAGES)
    group.add_argument("--out", metavar="FILE", required=True, help="Output file (.npy or .parquet).")
    group.add_argument("--neighbors", type=int, default=5, metavar="K", help="Nearest neighbors per image. [5]")
    group.add_argument("--overwrite", action="store_true", help="Replace --out.")


def main(argv: list[str]) -> int:
    """Compute the features, find neighbors and write both."""
    options = parse(parser(), argv)
    config = Config.build(**{name: options.pop(name) for name in OPTIONS if name in options})
    run, out, overwrite = options["name"], options["out"], options["overwrite"]
    require_run("smallvit embed", argv, run, options["images"], folders=True)
    require(options["neighbors"] >= 0, "neighbors", options["neighbors"], "at least 0")
    suffix = Path(out).suffix.lower()
    require(suffix in (".npy", ".parquet"), "out", out, "a name that ends in .npy or .parquet")
    path = check_output_file(out, suffix, overwrite=overwrite)
    table = path.with_suffix(".neighbors.csv")
    if suffix == ".npy":
        check_output_file(str(table), ".csv", overwrite=overwrite)
    if "data" in config.given and os.path.realpath(os.path.expanduser(config.data.data)) == os.path.realpath(path):
        raise InputError(f"--out {out}: is the table of --data; choose another name")
    names = list_names("embed", run, options["images"], config)

    from smallvit.models.weights_info import read_weights_info

    read_weights_info(run, "embed")  # before torch is imported

    import numpy as np
    from rich.console import Console

    from smallvit.datasets.listing import describe_kinds
    from smallvit.evaluation import embed
    from smallvit.evaluation.predict import list_images
    from smallvit.evaluation.predictor import load_predictor
    from smallvit.utils.terminal import create_progress

    if suffix == ".parquet":
        embed.require_parquet()
    arguments = {"arch": config.model.arch, "img_size": config.data.img_size}
    model = load_predictor(run, "embed", **arguments, device=config.compute.device, amp=config.compute.amp)
    ignored: list[str] = []
    images = list_images(names, ignored)
    read, failed, batches = [], [], []
    with create_progress(Console(stderr=True)) as bar:
        task = bar.add_task("images", total=len(images))
        for predictions, features in embed.embed_images(model, images, config.data.max_megapixels):
            failed += [each for each in predictions if each.error is not None]
            read += [each.path for each in predictions if each.error is None]
            batches += [features] if len(features) else []
            bar.advance(task, len(predictions))
    if not batches:
        raise InputError(describe_unreadable(failed, len(images)))
    features = np.concatenate(batches)
    files = embed.write_embedding(path, table, read, features, embed.find_neighbors(features, options["neighbors"]))
    if ignored:
        print_message(f"ignored: {describe_kinds(ignored)}")
    if failed:
        print_message(describe_unreadable(failed, len(images)))
    print(f"{features.shape[0]:,} images, {features.shape[1]:,} features", *files, sep="\n")
    return 0
