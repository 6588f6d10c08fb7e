"""Measure images a second that one core loads from a folder, from shards, and from a folder of the shards' images.

    python benchmarks/shards.py [--images FOLDER] [--count 600] [--img-size 224] [--rounds 5]

Without --images, the originals are smooth JPEGs of 500 x 375 pixels, as ImageNet's are on average. All files are in the
operating system's cache. Each pass decodes and crops every image as training does (the crop `resized`, no other
augmentation), without worker processes. The forms take turns; figures are medians over CPU time.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import describe_machine, measure_in_turns, median_ratio, options_parser, wide_console
from PIL import Image
from rich.table import Table
from torch.nn import functional as F

from smallvit import datasets
from smallvit.config.options import AugmentConfig, DataConfig
from smallvit.datasets.augment import Augment
from smallvit.datasets.factory import read_source
from smallvit.datasets.loader import create_train_loader
from smallvit.datasets.shards import write_shards


def write_images(folder: Path, count: int) -> None:
    """Write JPEGs with structure and some noise in two class folders."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        inner = folder / "ab"[number % 2]
        inner.mkdir(parents=True, exist_ok=True)
        coarse = F.interpolate(torch.rand(1, 3, 24, 32, generator=generator), (375, 500), mode="bicubic")[0]
        pixels = (255 * coarse + 12 * torch.randn(3, 375, 500, generator=generator)).clamp(0, 255).byte()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(inner / f"{number}.jpg", quality=90)


class Pass:
    """Load all training images once."""

    def __init__(self, folder: Path, size: int) -> None:
        config = DataConfig(data=str(folder), img_size=size, streaming="on", val_fraction=0, workers=0)
        data = datasets.create_dataset(config)
        augment = Augment.from_config(AugmentConfig(aug="none", crop="resized"), size, data.flip)
        self.loader, self.count = create_train_loader(data, 64, augment, 0, torch.device("cpu")), len(data.train)

    def __call__(self) -> None:
        for _ in self.loader.epoch(0):
            pass


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = options_parser(__doc__, batch_size=None, rounds=5)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--size", type=int, default=256)
    parser.set_defaults(img_size=224)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.images or Path(temporary, "images")
        if options.images is None:
            write_images(folder, options.count)
        source, shards, resized = read_source(DataConfig(data=str(folder))), Path(temporary, "s"), Path(temporary, "r")
        start = time.perf_counter()
        written = write_shards(source, shards, options.size)
        seconds = time.perf_counter() - start
        for index, path in enumerate(written.paths):
            (resized / path).parent.mkdir(parents=True, exist_ok=True)
            (resized / path).write_bytes(written.open(index).read())
        folders = {"folder": folder, "shards": shards, f"folder of {options.size} px": resized}
        passes = {name: Pass(each, options.img_size) for name, each in folders.items()}
        times = measure_in_turns(passes, options.rounds, clock=time.process_time)
    table = Table("images", "images/s a core", "to the folder")
    for name, each in passes.items():
        rate = each.count / statistics.median(times[name])
        table.add_row(name, f"{rate:,.0f}", f"{median_ratio(times['folder'], times[name]):.2f}")
    console = wide_console()
    console.print(f"{describe_machine(torch.device('cpu'))}, {options.img_size} px, {len(source):,} images")
    console.print(f"writing the shards: {len(source) / seconds:,.0f} images/s")
    console.print(table)


if __name__ == "__main__":
    main()
