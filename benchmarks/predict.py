"""Classifying files: images per second of `smallvit predict`, against the model alone on the same images in memory.

    python benchmarks/predict.py [FOLDER] [--arch vit96] [--img-size 32] [--images 2000] [--rounds 7]

Without a folder, smooth random PNGs are written to a temporary one. The forms take turns within each round: the model
on normalised batches; decoding and the model; these and a CSV file. Printed are medians over the rounds, and medians
of the rounds' ratios. The last lines are seconds of whole processes: importing torch, and classifying one image.
"""

from __future__ import annotations

import argparse
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import smallvit
from smallvit.cli.predict import WRITERS
from smallvit.hardware import describe_hardware, pick_device, pick_dtype
from smallvit.models import create_model
from smallvit.predicting import decode, image_paths, predict
from smallvit.ready import Ready, settled
from smallvit.trained import Card

CLASSES = 100


def untrained(arch: str, img_size: int, device: torch.device) -> Ready:
    """A model with SPT and LSA that answers at random, in the precision that --amp auto takes."""
    spec = {"arch": arch, "img_size": img_size, "in_chans": 3, "num_classes": CLASSES, "spt": True, "lsa": True}
    names = tuple(str(number) for number in range(CLASSES))
    card = Card(name=arch, option="predict", path=None, spec=spec, class_names=names, mean=(0.5,) * 3, std=(0.25,) * 3)
    dtype = pick_dtype(device, "auto")
    model = settled(create_model(**spec), device, dtype)
    return Ready(card=card, model=model, img_size=img_size, device=device, dtype=dtype)


def write_images(folder: Path, count: int, size: int) -> None:
    """PNGs that are smooth, as photographs are."""
    generator = torch.Generator().manual_seed(0)
    for index in range(count):
        coarse = torch.rand(1, 3, size // 4 + 1, size // 4 + 1, generator=generator)
        pixels = F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)[0]
        Image.fromarray((pixels.permute(1, 2, 0) * 255).byte().numpy()).save(folder / f"{index:06}.png")


def forms(model: Ready, paths: list[str]) -> dict[str, Callable[[], object]]:
    """What is timed."""
    pixels = torch.from_numpy(np.stack([decode(path, model.img_size, model.in_chans) for path in paths]))
    batches = [model.normalised(part) for part in pixels.split(model.batch_size)]

    def alone() -> None:
        answers: list[Tensor] = [model.logits(batch) for batch in batches]
        torch.cat(answers).cpu()

    def whole() -> None:
        WRITERS["csv"](predict(model, paths), io.StringIO(), model, paths, 5)

    return {
        "the model alone": alone,
        "decoding and the model": lambda: deque(predict(model, paths), maxlen=0),
        "and a CSV file": whole,
    }


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def process_seconds(*arguments: str) -> float:
    """How long another Python takes, from start to end: the median of 3."""

    def start() -> None:
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    return statistics.median(seconds(start) for _ in range(3))


def startup(model: Ready, path: str) -> dict[str, float]:
    """Seconds of whole processes."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        card = model.card
        data = {"name": "random", "class_names": card.class_names, "mean": card.mean, "std": card.std}
        metadata = {"model": card.spec, "data": data, "epoch": 0, "val_top1": None}
        smallvit.checkpoint.save_weights(weights, smallvit.checkpoint.snapshot(model.model), metadata)
        return {
            "python -c 'import torch'": process_seconds("-c", "import torch"),
            "python -c 'import torch, timm'": process_seconds("-c", "import torch, timm"),
            "smallvit predict RUN IMAGE": process_seconds("-m", "smallvit", "predict", str(weights), path),
        }


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--arch", default="vit96")
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(argv)
    device = pick_device(options.device)
    model = untrained(options.arch, options.img_size, device)
    with tempfile.TemporaryDirectory() as folder:
        if options.folder is None:
            write_images(Path(folder), options.images, options.img_size)
        paths = image_paths([options.folder or folder])[: options.images]
        calls = forms(model, paths)
        times: dict[str, list[float]] = {form: [] for form in calls}
        for number in track(range(options.rounds + 1), "rounds", console=Console(stderr=True), transient=True):
            for form, call in calls.items():
                taken = seconds(call)
                if number:  # the first warms up
                    times[form].append(taken)
        processes = startup(model, paths[0])
    _print(model, len(paths), times, processes)


def _print(model: Ready, count: int, times: dict[str, list[float]], processes: dict[str, float]) -> None:
    console, alone = Console(), times["the model alone"]
    console.print(
        f"{describe_hardware(model.device)}, torch {torch.__version__}, {model.precision}: {model.card.name} + SPT + "
        f"LSA, {model.img_size} px, {count:,} images, medians of {len(alone)}"
    )
    table = Table("", "images/s", "time against the model's")
    for form, taken in times.items():
        ratio = statistics.median(mine / model for mine, model in zip(taken, alone, strict=True))
        table.add_row(form, f"{count / statistics.median(taken):,.0f}", f"{ratio:.2f}")
    console.print(table)
    for what, taken in processes.items():
        console.print(f"{taken:5.1f} s  {what}", highlight=False)


if __name__ == "__main__":
    main()
