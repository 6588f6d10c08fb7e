"""Compare the images per second of `smallvit predict` with the model alone on the same images in memory.

    python benchmarks/predict.py [FOLDER] [--arch vit96] [--img-size 32] [--images 2000] [--rounds 7]

Without a folder, smooth random PNGs are written to a temporary one. The forms take turns within each round: the model
on normalized batches; decoding and the model; both and writing a CSV file. The table has medians over the rounds and
medians of the rounds' ratios. The last lines are the seconds of whole processes: importing torch, and classifying one
image.
"""

from __future__ import annotations

import io
import statistics
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import (
    describe_machine,
    measure_in_turns,
    measure_seconds,
    median_ratio,
    options_parser,
    smooth_images,
    wide_console,
)
from PIL import Image
from rich.table import Table

from smallvit.evaluation.predict import decode, list_images, predict_images, write_predictions
from smallvit.evaluation.predictor import Predictor
from smallvit.models import checkpoint
from smallvit.models.factory import create_model, prepare_for_inference
from smallvit.models.weights_info import WeightsInfo
from smallvit.utils.hardware import pick_device, pick_dtype

CLASSES = 100


def untrained(arch: str, img_size: int, device: torch.device) -> Predictor:
    """Return a model with SPT and LSA and random weights, in the precision of --amp auto."""
    plugins = {"spt": {}, "lsa": {}}
    spec = {"arch": arch, "img_size": img_size, "in_chans": 3, "num_classes": CLASSES, "plugins": plugins}
    names = tuple(str(number) for number in range(CLASSES))
    info = WeightsInfo(
        name=arch, option="predict", path=None, spec=spec, class_names=names, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    dtype = pick_dtype(device, "auto")
    model = prepare_for_inference(create_model(**spec), device, dtype)
    return Predictor(info=info, model=model, img_size=img_size, device=device, dtype=dtype)


def write_images(folder: Path, count: int, size: int) -> None:
    """Write smooth random PNGs."""
    for index, pixels in enumerate(smooth_images(count, size)):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{index:06}.png")


def forms(model: Predictor, paths: list[str]) -> dict[str, Callable[[], object]]:
    """Return the calls to time."""
    pixels = torch.from_numpy(np.stack([decode(model, path)[0] for path in paths]))
    batches = [model.normalize(part) for part in pixels.split(model.batch_size)]

    def alone() -> None:
        torch.cat([model.predict_logits(batch) for batch in batches]).cpu()

    def whole() -> None:
        write_predictions(predict_images(model, paths), io.StringIO(), "csv", model.class_names, 5)

    return {
        "the model alone": alone,
        "decoding and the model": lambda: deque(predict_images(model, paths), maxlen=0),
        "and a CSV file": whole,
    }


def process_seconds(*arguments: str) -> float:
    """Return the seconds of a Python process from start to end: median of 3."""

    def start() -> None:
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    return statistics.median(measure_seconds(start) for _ in range(3))


def startup(model: Predictor, path: str) -> dict[str, float]:
    """Return the seconds of whole processes."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        info = model.info
        data = {"name": "random", "class_names": info.class_names, "mean": info.mean, "std": info.std}
        metadata = {"model": info.spec, "data": data, "epoch": 0, "val_top1": None}
        checkpoint.save_weights(weights, checkpoint.snapshot(model.model), metadata)
        return {
            "python -c 'import torch'": process_seconds("-c", "import torch"),
            "python -c 'import torch, timm'": process_seconds("-c", "import torch, timm"),
            "smallvit predict RUN IMAGE": process_seconds("-m", "smallvit", "predict", str(weights), path),
        }


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = options_parser(__doc__, batch_size=None)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--arch", default="vit96")
    parser.add_argument("--images", type=int, default=2000)
    options = parser.parse_args(argv)
    device = pick_device(options.device)
    model = untrained(options.arch, options.img_size, device)
    with tempfile.TemporaryDirectory() as folder:
        if options.folder is None:
            write_images(Path(folder), options.images, options.img_size)
        paths = list_images([options.folder or folder])[: options.images]
        calls = forms(model, paths)
        times = measure_in_turns(calls, options.rounds)
        processes = startup(model, paths[0])
    print_table(model, len(paths), times, processes)


def print_table(model: Predictor, count: int, times: dict[str, list[float]], processes: dict[str, float]) -> None:
    console, alone = wide_console(), times["the model alone"]
    console.print(
        f"{describe_machine(model.device)}, {model.precision}: {model.info.name} + SPT + "
        f"LSA, {model.img_size} px, {count:,} images, medians of {len(alone)}"
    )
    table = Table("", "images/s", "time / model alone")
    for form, seconds in times.items():
        table.add_row(form, f"{count / statistics.median(seconds):,.0f}", f"{median_ratio(seconds, alone):.2f}")
    console.print(table)
    for what, seconds in processes.items():
        console.print(f"{seconds:5.1f} s  {what}")


if __name__ == "__main__":
    main()
