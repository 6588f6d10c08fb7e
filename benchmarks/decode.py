"""Compare images per second and core of streaming with those of another commit, on the same JPEG files.

    python benchmarks/decode.py COMMIT --images DIR [--count 512] [--img-size 224] [--rounds 5]

The files are images of DIR, enlarged to 500 x 375 pixels, with noise, in quality 90: as large as ImageNet's on average
and as costly to decode. Both commits read a training epoch in one process without workers, by turns; images/s are
those per second of CPU time, medians over the rounds, ratios medians of the rounds' ratios. The last rows are seconds
from the start of an epoch to its first batch of 512 images, with one worker per core: in the first epoch, which starts
the workers, and in the second.
"""

from __future__ import annotations

import argparse
import io
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import describe_machine, median_ratio, wide_console
from PIL import Image
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
TOP_LEVEL = ("cli", "datasets", "plugins")
"""Folders that are installed within smallvit."""
SIZE, QUALITY, NOISE = (500, 375), 90, 26
SETTINGS: dict[str, dict[str, Any]] = {
    "bilinear": {"aug": "augreg-none"},
    "bicubic": {"aug": "deit3", "aug_repeats": 1},
    "bicubic, three views": {"aug": "deit"},
    "evaluation": {},
}
"""Augmentation of each row; without any the center crop of evaluation."""


def write_files(source: Path, folder: Path, count: int) -> float:
    """Write JPEG files in two classes; return their mean size in kB."""
    rng, sizes = np.random.default_rng(0), []
    paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg", ".png"))
    for number, index in enumerate(np.linspace(0, len(paths) - 1, count).astype(int)):
        image = Image.open(paths[index]).convert("RGB").resize(SIZE, Image.Resampling.BICUBIC)
        pixels = np.asarray(image) + rng.normal(0, NOISE, (*SIZE[::-1], 1))
        file = folder / f"class{number % 2}" / f"{number:05}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, quality=QUALITY)
        sizes.append(file.stat().st_size)
    return statistics.mean(sizes) / 1000


def check_out(commit: str, folder: Path) -> Path:
    """Write a commit's packages to a folder as they are installed; return the folder."""
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    for name in TOP_LEVEL:
        shutil.move(folder / name, folder / "smallvit" / name)
    return folder


def start(package: Path, data: Path, img_size: int) -> subprocess.Popen[str]:
    """Start a process that measures a commit's code: see `measure`."""
    code = (
        f"import sys; sys.path[:0] = [{str(package)!r}, {str(ROOT / 'benchmarks')!r}]; import decode; decode.measure()"
    )
    command = [sys.executable, "-c", code, str(data), str(img_size)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def measure() -> None:
    """Print seconds for each setting that is read from standard input."""
    from smallvit import datasets
    from smallvit.config.options import AugmentConfig, DataConfig
    from smallvit.datasets.augment import Augment
    from smallvit.datasets.loader import create_train_loader, evaluation_batches

    torch.set_num_threads(1)
    cpu, folder, img_size = torch.device("cpu"), sys.argv[1], int(sys.argv[2])

    def load(workers: int | None) -> Any:
        config = DataConfig(data=folder, img_size=img_size, streaming="on", workers=workers, val_fraction=0)
        return datasets.create_dataset(config)

    def loader(data: Any, batch_size: int, **options: Any) -> Any:
        augment = Augment.from_config(AugmentConfig(**options), img_size, flip=True)
        return create_train_loader(data, batch_size, augment, 0, cpu)

    def read(batches: Any, epoch: int) -> Any:
        order = batches.sampling.batches(epoch)
        return batches.read(epoch, order, [slice(0, len(batch)) for batch in order], 0)

    data, epoch = load(0), 0
    for line in sys.stdin:
        setting, epoch = line.strip(), epoch + 1
        if setting == "first":
            streamed = loader(load(None), 512, aug="augreg-none")
            seconds = []
            for each in range(2):
                begin = time.perf_counter()
                iterator = read(streamed, each)
                next(iterator)
                seconds.append(time.perf_counter() - begin)
                for _ in iterator:
                    pass
            print(*seconds, flush=True)
            del iterator, streamed
            continue
        options = SETTINGS[setting]
        batches = read(loader(data, 96, **options), epoch) if options else evaluation_batches(data, "train", cpu, 96)
        begin = time.process_time()
        count = sum(len(images) for images, _ in batches)
        print((time.process_time() - begin) / count, flush=True)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("commit")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        kilobytes = write_files(options.images, folder / "data", options.count)
        packages = {"before": check_out(options.commit, folder / "before"), "now": check_out("HEAD", folder / "now")}
        processes = {name: start(package, folder / "data", options.img_size) for name, package in packages.items()}

        def ask(name: str, setting: str) -> list[float]:
            process = processes[name]
            print(setting, file=process.stdin, flush=True)
            return [float(value) for value in process.stdout.readline().split()]

        times: dict[tuple[str, str], list[list[float]]] = {}
        for number in range(1 + options.rounds):  # the first is a warm-up
            for setting in (*SETTINGS, "first"):
                for name in processes:
                    seconds = ask(name, setting)
                    times.setdefault((setting, name), []).extend([seconds] if number else [])
        for process in processes.values():
            process.stdin.close()
            process.wait()
    table = Table("", options.commit, "HEAD", "ratio")
    for setting in SETTINGS:
        before, now = ([seconds for (seconds,) in times[setting, name]] for name in packages)
        rates = [f"{1 / statistics.median(each):,.0f} images/s" for each in (before, now)]
        table.add_row(setting, *rates, f"{median_ratio(before, now):.2f}")
    for epoch, title in enumerate(("first batch", "first batch of the second epoch")):
        before, now = ([seconds[epoch] for seconds in times["first", name]] for name in packages)
        row = [f"{statistics.median(each):.2f} s" for each in (before, now)]
        table.add_row(title, *row, f"{median_ratio(before, now):.2f}")
    console = wide_console()
    size = "x".join(map(str, SIZE))
    console.print(
        f"{describe_machine(torch.device('cpu'))}; {options.count} JPEGs of {size} px and {kilobytes:.0f} kB, "
        f"{options.img_size} px, {options.rounds} rounds"
    )
    console.print(table)


if __name__ == "__main__":
    main()
