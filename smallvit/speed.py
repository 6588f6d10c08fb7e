"""How fast models answer: images a second in batches, and the time that one image takes; side by side.

Models take turns within each round, so that a busy machine, or a warm one, slows them alike; medians are over rounds.

Axes: b batch, c channels, h w pixels.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smallvit import evaluate
from smallvit.hardware import autocast
from smallvit.precision import sound_dtype
from smallvit.ready import settled

ROUNDS = 9
WARM_UP = 3
SAMPLE_SECONDS = 0.05
"""A sample lasts that long at least, in as many passes as it takes."""


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What was measured, and how."""

    figures: list[dict[str, float]]
    """Of each model: medians, and the range of the middle half of the samples (iqr)."""
    batch_size: int
    precision: str
    """bf16 or fp32, the same for all."""


class Timed:
    """A model that answers the same images over and over; `seconds` are its samples.

    `alone`: the device is waited for after each pass, which then is a sample.
    """

    def __init__(self, model: nn.Module, images: Float[Tensor, "b c h w"], dtype: torch.dtype, *, alone: bool) -> None:
        self.model, self.images, self.dtype, self.alone = model, images, dtype, alone
        self.seconds: list[float] = []
        self._time(WARM_UP)
        self.passes = max(1, math.ceil(SAMPLE_SECONDS / self._time(1)))

    def round(self) -> None:
        """Take samples."""
        if self.alone:
            self.seconds += [self._time(1) for _ in range(self.passes)]
        else:
            self.seconds.append(self._time(self.passes) / self.passes)

    @torch.inference_mode()
    def _time(self, passes: int) -> float:
        """Seconds of so many passes."""
        self._wait()
        started = time.perf_counter()
        for _ in range(passes):
            with autocast(self.images.device, self.dtype):
                self.model(self.images)
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.images.device.type != "cpu":
            torch.accelerator.synchronize(self.images.device)


def measure(models: Sequence[nn.Module], device: torch.device, amp: Literal["auto", "bf16", "off"]) -> Speeds:
    """Measure models that `smallvit.load` gave, on one device, in one precision; they are moved there.

    Raises:
        InputError: a precision that is not sound here was asked for by name.
    """
    sizes = [model.pretrained_cfg["input_size"] for model in models]
    sound = {sound_dtype(device, amp, model, *size[:2]) for model, size in zip(models, sizes, strict=True)}
    dtype = sound.pop() if len(sound) == 1 else torch.float32
    batch_size = evaluate.batch_size(device)
    pairs = [
        [_timed(model, size, batch, device, dtype) for batch in (batch_size, 1)]
        for model, size in zip(models, sizes, strict=True)
    ]
    for _ in range(ROUNDS):
        for column in zip(*pairs, strict=True):
            for timed in column:
                timed.round()
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    return Speeds(figures=[_figures(*pair) for pair in pairs], batch_size=batch_size, precision=precision)


def _timed(model: nn.Module, size: tuple[int, int, int], batch: int, device: torch.device, dtype: torch.dtype) -> Timed:
    """A model as the trainer judges it."""
    model = settled(model, device, dtype)
    images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(0)).to(device)
    return Timed(model, images, dtype, alone=batch == 1)


def _figures(batches: Timed, single: Timed) -> dict[str, float]:
    rates = [len(batches.images) / seconds for seconds in batches.seconds]
    times = [1e3 * seconds for seconds in single.seconds]
    return {
        "inference_images_per_second": statistics.median(rates),
        "inference_images_per_second_iqr": _iqr(rates),
        "latency_ms": statistics.median(times),
        "latency_ms_iqr": _iqr(times),
    }


def _iqr(samples: Sequence[float]) -> float:
    first, _, third = statistics.quantiles(samples, n=4)
    return third - first
