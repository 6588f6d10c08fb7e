"""Functions that the benchmarks share: options, synthetic images, timing in turns and tables."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from smallvit.utils.hardware import describe_hardware

Key = TypeVar("Key")


def options_parser(description: str, *, batch_size: int | None = 128, rounds: int = 7) -> argparse.ArgumentParser:
    """Create a parser with the options that most benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--img-size", type=int, default=32)
    if batch_size is not None:
        parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--device", default="auto")
    return parser


def smooth_images(count: int, size: int) -> Tensor:
    """Return random uint8 images (count, 3, size, size) that are smooth, as photographs are."""
    coarse = torch.rand(count, 3, size // 4 + 1, size // 4 + 1, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (size, size), mode="bicubic").clamp_(0, 1).mul_(255).byte()


def measure_seconds(
    call: Callable[[], object],
    device: torch.device | None = None,
    steps: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the mean seconds of `steps` calls in a row, including the device's work."""
    start = clock()
    for _ in range(steps):
        call()
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)
    return (clock() - start) / steps


def measure_in_turns(
    calls: Mapping[Key, Callable[[], object]],
    rounds: int,
    device: torch.device | None = None,
    *,
    warm_up: int = 1,
    steps: int = 1,
    title: str = "rounds",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, list[float]]:
    """Return the seconds of each call in each round.

    All calls take turns within a round, so that other load on the machine slows them alike.
    """
    times: dict[Key, list[float]] = {key: [] for key in calls}
    for number in track(range(warm_up + rounds), title, console=Console(stderr=True), transient=True):
        for key, call in calls.items():
            seconds = measure_seconds(call, device, steps, clock)
            if number >= warm_up:
                times[key].append(seconds)
    return times


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def wide_console(width: int = 120) -> Console:
    """Return a console at least `width` columns wide, also when the output goes to a file."""
    console = Console(highlight=False)
    console.width = max(width, console.width)
    return console


def describe_machine(device: torch.device) -> str:
    """Return the hardware and torch's version."""
    return f"{describe_hardware(device)}, torch {torch.__version__}"
