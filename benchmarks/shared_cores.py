"""Compare training speed alone and next to another training, with several OpenMP settings.

    python benchmarks/shared_cores.py [--processes 2] [--images 4096] [--batch-size 128] [--rounds 3]

Settings: `spinning` (OpenMP's default: idle threads spin), `passive` (OMP_WAIT_POLICY=passive, as smallvit sets it) and
`spincount` (GOMP_SPINCOUNT=1000), all with the number of threads that smallvit sets. The settings take turns within
each round, each with one training alone and with several at the same time. The table has medians over the rounds:
images/s of a training, its share of the speed alone, and the speed alone relative to `spinning`. Run it on an idle
machine.

A training is `smallvit train` in fp32 on random images in a temporary folder. Its speed is the median of its middle
epochs, during which all trainings that were started together run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from smallvit.utils.cores import WAIT_VARIABLES, set_openmp_defaults

SETTINGS = {"spinning": {}, "passive": {"OMP_WAIT_POLICY": "passive"}, "spincount": {"GOMP_SPINCOUNT": "1000"}}
EPOCHS = 4
"""Epochs of each training; the first and the last are not measured."""


def write_images(folder: Path, count: int, size: int) -> None:
    """Write random images of two classes."""
    rng = np.random.default_rng(0)
    for number in range(count):
        file = folder / f"class{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file)


def environment(setting: str) -> dict[str, str]:
    """Return the environment of a training: smallvit's number of threads and the setting's variables."""
    variables = {name: value for name, value in os.environ.items() if name not in WAIT_VARIABLES}
    set_openmp_defaults(variables)
    del variables["OMP_WAIT_POLICY"]
    return variables | SETTINGS[setting]


def start(data: Path, out: Path, setting: str, given: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Start a training, bypassing the environment that the command line sets."""
    options = {"arch": given.arch, "data": str(data), "img-size": given.img_size, "batch-size": given.batch_size}
    options |= {"epochs": EPOCHS, "aug": "none", "amp": given.amp, "compile": "off", "out": str(out)}
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    code = f"from smallvit.cli import main; raise SystemExit(main({['train', *flags]!r}))"
    return subprocess.Popen([sys.executable, "-c", code], env=environment(setting), stdout=subprocess.DEVNULL)


def rate(out: Path) -> float:
    """Return the images/s of a finished training: the median of the epochs after the first and before the last."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return statistics.median(line["images_per_second"] for line in lines[1:-1])


def rates(data: Path, folder: Path, setting: str, count: int, given: argparse.Namespace) -> float:
    """Return the mean images/s of trainings that run at the same time."""
    outs = [folder / f"{setting}-{count}-{number}" for number in range(count)]
    processes = [start(data, out, setting, given) for out in outs]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"a training ended with exit codes {codes}")
    return statistics.mean(map(rate, outs))


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit96")
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--amp", default="off", help="Precision, as in smallvit train. [off]")
    parser.add_argument("--processes", type=int, default=2, help="Trainings at the same time. [2]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    given = parser.parse_args(argv)
    measured: dict[str, list[tuple[float, float]]] = {setting: [] for setting in given.settings}
    with tempfile.TemporaryDirectory() as root:
        data = Path(root, "images")
        write_images(data, given.images, given.img_size)
        os.environ["SMALLVIT_CACHE"] = str(Path(root, "cache"))
        for number in range(given.rounds):
            for setting in given.settings:
                folder = Path(root, f"round{number}")
                pair = tuple(rates(data, folder, setting, count, given) for count in (1, given.processes))
                measured[setting].append(pair)
    report(measured, given)


def report(measured: dict[str, list[tuple[float, float]]], given: argparse.Namespace) -> None:
    """Print a table of medians over the rounds."""
    console = Console()
    threads = environment("spinning").get("OMP_NUM_THREADS", "as MKL chooses")
    console.print(
        f"{given.arch}, {given.img_size} px, batch {given.batch_size}, amp {given.amp}, OMP_NUM_THREADS={threads}, "
        f"{given.rounds} rounds",
        highlight=False,
    )
    table = Table("", "images/s alone", f"images/s, {given.processes} at once", "share of alone", "alone / spinning")
    base = [alone for alone, _ in measured.get("spinning", [])]
    for setting, pairs in measured.items():
        alone, together = (statistics.median(column) for column in zip(*pairs, strict=True))
        share = statistics.median(two / one for one, two in pairs)
        ratio = statistics.median(one / first for (one, _), first in zip(pairs, base, strict=True)) if base else None
        cells = (f"{alone:,.0f}", f"{together:,.0f}", f"{share:.2f}", "" if ratio is None else f"{ratio:.2f}")
        table.add_row(setting, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
