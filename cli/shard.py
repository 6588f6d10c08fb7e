"""Run `smallvit shard`: write resized images as shards."""

from __future__ import annotations

from pathlib import Path

from smallvit.cli.parser import Parser, options_parser, parse
from smallvit.config.config import Config
from smallvit.datasets.catalog import require_data
from smallvit.utils.errors import InputError, require
from smallvit.utils.files import check_output_folder

DESCRIPTION = """\
Write images as shards: a few large tar files instead of many small image
files. Larger images are reduced to --size, so that training decodes faster.

  smallvit shard DIR SHARDS
  smallvit shard imagenet SHARDS --data-dir /data --size 256
  smallvit train --data SHARDS --streaming on

Training from shards has the order, crops and labels that training from the
same resized image files has. Nothing is listed at the start, and storage is
asked for one file per gigabyte. Images are JPEG files of quality 95; those
that are JPEG and small enough already are copied unchanged. The format is
WebDataset's, with an index of locations. See also: docs/scaling.md.
"""
OPTIONS = ("columns", "data_dir", "skip_corrupt", "max_megapixels")


def parser() -> Parser:
    """Return the argument parser."""
    return options_parser("smallvit shard", DESCRIPTION, OPTIONS, _add_arguments)


def _add_arguments(parser: Parser) -> None:
    """Add the arguments that are not options of a configuration."""
    what = "Data set, folder or zip file of class folders, or table, as train --data takes."
    parser.add_argument("data", metavar="DATA", help=what)
    parser.add_argument("shards", metavar="OUT", help="Folder to write.")
    size = "Shorter side in pixels to which larger images are reduced. [256]"
    parser.add_argument("--size", type=int, default=256, metavar="N", help=size)
    parser.add_argument("--overwrite", action="store_true", help="Replace the shards in OUT.")


def main(argv: list[str]) -> int:
    """Write the shards and print what they hold."""
    options = parse(parser(), argv)
    folder, size, overwrite = Path(options.pop("shards")).expanduser(), options.pop("size"), options.pop("overwrite")
    config = Config.build(**options)
    require(size > 0, "size", size, "at least 1")
    require_data(config.data.data)
    check_output_folder(folder, "OUT", overwrite=overwrite)

    from smallvit.datasets.factory import read_source
    from smallvit.datasets.listing import Listing
    from smallvit.datasets.shards import is_shards, write_shards

    if folder.is_dir() and any(folder.iterdir()) and not is_shards(folder):
        raise InputError(f"{folder}: holds no shards, so --overwrite does not replace it; choose another folder")
    source = read_source(config.data)
    if not isinstance(source, Listing):
        raise InputError(f"{config.data.data}: is read into memory; only image files can be written as shards")
    data = config.data
    written = write_shards(source, folder, size, skip_corrupt=data.skip_corrupt, max_megapixels=data.max_megapixels)
    for note in written.notes:
        print(note)
    total = int(written.archive.locations[:, 2].sum())
    print(f"{folder}: {len(written):,} images, {len(written.archive.files)} shards, {total / 1e6:,.1f} MB")
    return 0
