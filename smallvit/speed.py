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
LONG = 1.0
"""Seconds of a pass that is warm-up enough."""
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
        self.passes = max(1, math.ceil(SAMPLE_SECONDS / self._warm_up()))

    def round(self) -> None:
        """Take samples."""
        if self.alone:
            self.seconds += [self._time(1) for _ in range(self.passes)]
        else:
            self.seconds.append(self._time(self.passes) / self.passes)

    @property
    def rates(self) -> list[float]:
        """Images a second, of each sample."""
        return [len(self.images) / seconds for seconds in self.seconds]

    @property
    def milliseconds(self) -> list[float]:
        """An image's, of each sample."""
        return [1e3 * seconds / len(self.images) for seconds in self.seconds]

    def _warm_up(self) -> float:
        """Seconds of the last pass of some."""
        for _ in range(WARM_UP + 1):
            if (seconds := self._time(1)) >= LONG:
                break
        return seconds

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
    return spread("inference_images_per_second", batches.rates) | spread("latency_ms", single.milliseconds)


def spread(name: str, samples: Sequence[float]) -> dict[str, float]:
    """The median of samples by a figure's name, and the range of their middle half by this name with _iqr."""
    first, _, third = statistics.quantiles(samples, n=4)
    return {name: statistics.median(samples), f"{name}_iqr": third - first}
