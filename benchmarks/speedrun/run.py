"""Measure the seconds that a ViT of at most 3 million parameters needs to a test accuracy.

    python benchmarks/speedrun/run.py cifar10                         # 90 % on CIFAR-10, one GPU
    python benchmarks/speedrun/run.py cifar100-cpu --data DIR         # 50 % on CIFAR-100, two CPU cores
    python benchmarks/speedrun/run.py digits --seeds 2                # 95 % on the embedded digits, to try it

Each seed is one `smallvit train` with the options of its track in TRACKS, on all training images. Its time is
`train_seconds`: all training steps, compiling included, and the validation that they contain, without reading the data
and without the final test. A record is the mean time over the seeds, and counts if their mean test accuracy reaches the
target, as in other speed runs. Rules, records and what failed: README.md next to this file.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from smallvit import train
from smallvit.config.recipes import quick
from smallvit.utils.hardware import describe_hardware, pick_device

MAX_PARAMETERS = 3_000_000


@dataclass(frozen=True, kw_only=True)
class Track:
    """A data set, the test accuracy to reach in percent, and how it is reached."""

    data: str
    target: float
    options: dict[str, Any]
    """Options of the recipe `quick`."""
    device: str = "cpu"


SHORT = {"val_fraction": 0.02, "val_interval": 1000}
"""Almost all images, validation after the last epoch only."""
TRACKS = {
    "cifar10": Track(
        data="cifar10",
        target=90.0,
        options=SHORT
        | {"arch": "vit", "epochs": 24, "batch_size": 256, "lr": 6e-3, "progressive_size": 24, "alternate_flip": True},
        device="cuda",
    ),
    "cifar100-cpu": Track(
        data="cifar100",
        target=50.0,
        options=SHORT | {"arch": "vit96", "epochs": 8, "progressive_size": 24, "processes": "auto"},
    ),
    "digits": Track(data="digits", target=95.0, options=SHORT | {"arch": "vit96", "epochs": 10}),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a track over the seeds; return 0 if the mean accuracy reaches the target."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("track", choices=TRACKS)
    parser.add_argument("--data", help="folder with the images [downloaded]")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--device", help="another device than the track's, to try it")
    given = parser.parse_args(arguments)
    track = TRACKS[given.track]
    device = pick_device(given.device or track.device)
    table = Table("seed", "test accuracy", "s", "images")
    seconds, accuracies = [], []
    with tempfile.TemporaryDirectory() as out:
        for seed in range(given.seeds):
            run = {"data": given.data or track.data, "device": str(device), "seed": seed, "out": f"{out}/{seed}"}
            summary = train(quick(**track.options | run)).summary
            if summary["parameters"] > MAX_PARAMETERS:
                sys.exit(f"{given.track}: {summary['parameters']:,} parameters, allowed are {MAX_PARAMETERS:,}")
            seconds.append(summary["train_seconds"])
            accuracies.append(summary["test_top1"])
            table.add_row(str(seed), f"{accuracies[-1]:.2f} %", f"{seconds[-1]:.1f}", f"{summary['images_seen']:,}")
    console, mean = Console(highlight=False), statistics.fmean(accuracies)
    console.print(table)
    reached = mean >= track.target
    verb = "reached" if reached else "NOT reached"
    console.print(f"{given.track}: {statistics.fmean(seconds):.1f} s, {mean:.2f} %; {track.target:g} % {verb}")
    console.print(f"{describe_hardware(device)}, {os.cpu_count()} cores, torch {torch.__version__}")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
