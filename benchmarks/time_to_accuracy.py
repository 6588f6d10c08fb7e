"""Compare the time to a validation accuracy with the usual training script.

    python benchmarks/time_to_accuracy.py --data cifar100 --epochs 10 --train-fraction 0.3 [--arch vit] [--seeds 3]
    python benchmarks/time_to_accuracy.py --data digits --epochs 50 --shares 0.1 0.2 0.4
    python benchmarks/time_to_accuracy.py --ours vit96,recipe=best vit96,recipe=best,opt=adamw   # one change at a time

The usual script trains `plain.PlainViT` as Lee, Lee, Song 2021 do: fp32, eager, torch's AdamW, and torchvision's
transforms image by image in worker processes. It trains for a fixed number of epochs; its accuracy after the last one
is the target. smallvit then trains on the same images with each row of --ours. For the first seed, its schedule gets
longer (--shares of the images that the usual script sees) until its last accuracy reaches the target; other seeds start
with the share of the first. A schedule below one epoch is one epoch over a share of each class.

Every run trains its whole schedule. Seconds are those of training and validating, without reading the data and without
the final test. The ways take turns on the same machine with the same number of threads. A ratio above 1 is in favor of
smallvit.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import describe_machine, wide_console
from input import EXPRESSIBLE, PerImage
from PIL import Image
from plain import PlainViT
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from smallvit import Config, train
from smallvit.config.spec import parse_spec
from smallvit.datasets import create_dataset
from smallvit.datasets.dataset import ImageDataset, Images
from smallvit.datasets.loader import evaluation_batches
from smallvit.evaluation.evaluate import evaluate
from smallvit.models.factory import default_patch_size
from smallvit.utils.hardware import pick_device

SIZES = {"vit": {"dim": 192, "depth": 9, "heads": 12}, "vit96": {"dim": 96, "depth": 6, "heads": 6}}
"""Arguments of `PlainViT` by architecture."""
SHARES = (0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)
LR, MIN_LR, WARMUP, WEIGHT_DECAY, BATCH_SIZE, LABEL_SMOOTHING = 3e-3, 1e-6, 0.1, 0.05, 128, 0.1
"""Training of Lee, Lee, Song 2021, arXiv:2112.13492, its code; the warmup is a share of the steps."""


@dataclass(frozen=True)
class Outcome:
    """A finished training."""

    top1: float
    """Validation accuracy after the last epoch, in percent."""
    seconds: float
    images: int


class PILImages(Dataset):
    """Transform images one by one, as torchvision's data sets do."""

    def __init__(self, images: Images, transform: Callable[[Image.Image], Tensor]) -> None:
        self.pixels, self.labels = images.pixels.permute(0, 2, 3, 1).squeeze(-1).numpy(), images.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def train_usual(data: ImageDataset, given: Namespace, seed: int, device: torch.device) -> Outcome:
    """Train as the usual script does, from random weights."""
    torch.manual_seed(seed)
    classes, size = len(data.class_names), data.img_size
    model = PlainViT(
        img_size=size,
        in_chans=data.train.pixels.shape[1],
        num_classes=classes,
        patch_size=default_patch_size(given.arch, size),
        drop_path=0.1,
        **SIZES[given.arch],
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    per_image = PerImage(given.aug, data.train.pixels[:1], data.train.labels[:1], data.mean, data.std, classes)
    images = PILImages(data.train, per_image.transform)
    workers = {"num_workers": given.workers, "persistent_workers": given.workers > 0}
    loader = DataLoader(images, BATCH_SIZE, shuffle=True, **workers)
    steps, step, top1 = given.epochs * len(loader), 0, 0.0
    start = time.perf_counter()
    for _ in track(range(given.epochs), f"usual script, seed {seed}", transient=True):
        model.train()
        for x, labels in loader:
            x, targets = per_image.mix_batch(x.to(device), labels.to(device))
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
            optimizer.zero_grad()
            F.cross_entropy(model(x), targets, label_smoothing=LABEL_SMOOTHING).backward()
            optimizer.step()
            step += 1
        top1 = evaluate(model, evaluation_batches(data, "val", device, BATCH_SIZE), device, torch.float32)["top1"]
    return Outcome(top1, time.perf_counter() - start, given.epochs * len(images))


def learning_rate(step: int, steps: int) -> float:
    """Return the rate of a step, counted from 0: linear warmup, then a cosine."""
    warmup = WARMUP * steps
    if step < warmup:
        return LR * (step + 1) / (warmup + 1)
    return MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def train_ours(given: Namespace, row: str, seed: int, share: float, out: Path) -> Outcome:
    """Train a row with smallvit on a share of the images that the usual script sees."""
    epochs = share * given.epochs
    flags = data_options(given) | {"epochs": max(1, round(epochs)), "seed": seed, "device": given.device}
    flags["train_fraction"] *= min(1.0, epochs)
    folder = out / f"{row}-share{share:g}-seed{seed}"
    summary = train(Config.build(**parse_spec(row).given(flags, None), out=str(folder))).summary
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return Outcome(last["val_top1"], summary["train_seconds"], summary["images_seen"])


def data_options(given: Namespace) -> dict[str, Any]:
    """Return the options of `Config` for the data of both ways."""
    return {"data": given.data, "val_fraction": given.val_fraction, "train_fraction": given.train_fraction}


def parse_options(arguments: Sequence[str] | None) -> Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--data", default="digits", help="a data set, or a folder of class folders")
    parser.add_argument("--train-fraction", type=float, default=1.0)
    parser.add_argument("--val-fraction", type=float, default=0.1)
    parser.add_argument("--arch", choices=SIZES, default="vit96")
    parser.add_argument("--aug", choices=EXPRESSIBLE, default="lee2021", help="preset of the usual script")
    parser.add_argument("--epochs", type=int, default=10, help="of the usual script")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of the usual script's data loader")
    parser.add_argument("--ours", nargs="+", help="rows of smallvit compare [ARCH,recipe=best]")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0]
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args(arguments)
    given.ours = given.ours or [f"{given.arch},recipe=best"]
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    """Train both ways over the seeds, and print the times and their ratios."""
    given = parse_options(arguments)
    device = pick_device(given.device)
    data = create_dataset(Config.build(**data_options(given)).data)
    table = Table("row", "seed", "share", "top-1", "s", "images", "ratio")
    usual_seconds: list[float] = []
    seconds: dict[str, list[float]] = {row: [] for row in given.ours}
    shares = dict.fromkeys(given.ours, given.shares)
    with tempfile.TemporaryDirectory() as out:
        for seed in range(given.seeds):
            usual = train_usual(data, given, seed, device)
            usual_seconds.append(usual.seconds)
            table.add_row("usual script", str(seed), "1", *format_outcome(usual), "1")
            for row in given.ours:
                for share in shares[row]:
                    ours = train_ours(given, row, seed, share, Path(out))
                    if ours.top1 >= usual.top1:
                        break
                else:
                    sys.exit(f"{row} did not reach {usual.top1:.2f} % with seed {seed}: {ours.top1:.2f} %")
                shares[row] = shares[row] if seed else shares[row][shares[row].index(share) :]
                seconds[row].append(ours.seconds)
                ratio = usual.seconds / ours.seconds
                table.add_row(row, str(seed), f"{share:g}", *format_outcome(ours), f"{ratio:.2f}")
    console = wide_console()
    console.print(table)
    console.print(f"usual script: {format_mean(usual_seconds, 1)} s, {given.seeds} seeds")
    for row, values in seconds.items():
        ratios = [usual / ours for usual, ours in zip(usual_seconds, values, strict=True)]
        console.print(f"{row}: {format_mean(values, 1)} s, {format_mean(ratios, 2)} times shorter, {given.seeds} seeds")
    console.print(describe_machine(device))
    console.print(f"python benchmarks/time_to_accuracy.py {shlex.join(arguments or sys.argv[1:])}")


def format_mean(values: Sequence[float], digits: int) -> str:
    """Return the mean, and the standard deviation if there are several values."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def format_outcome(outcome: Outcome) -> tuple[str, str, str]:
    """Return accuracy, seconds and images as text."""
    return f"{outcome.top1:.2f} %", f"{outcome.seconds:.1f}", f"{outcome.images:,}"


if __name__ == "__main__":
    main()
