"""Measure throughput in images per second, the latency of one image, and memory, of several models side by side.

Models take turns within each round, so that a busy or hot machine slows them alike; medians are over rounds. Each model
has a time budget, which decides the batch size and the number of rounds. The memory is that of training: activations
kept for the backward pass, and the peak of a training step on a GPU.

Axes: b batch, c channels, h w pixels.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from smallvit.config.options import Amp
from smallvit.models.factory import fuse_for_inference, prepare_for_inference
from smallvit.utils import hardware
from smallvit.utils.hardware import autocast, choose_dtype, precision_name
from smallvit.utils.sizes import ImageSize, height_width

SECONDS = 10.0
"""Time budget per model."""
ROUNDS = 9
MIN_ROUNDS = 3
WARM_UP_PASSES, WARM_UP_SECONDS = 4, 1.0
"""Passes before the first round, or fewer once they take this long."""
MIN_PASSES = MIN_ROUNDS + 2
"""Passes that the budget must allow before a batch size is measured."""
BATCH_FACTOR = 4
"""Factor between batch sizes that are tried."""
SAMPLE_SECONDS = 0.05
"""Minimum duration of a sample; several passes if needed."""
TRAINING_STEPS = 2
"""Training steps until the peak memory is reached: the first creates the optimizer's state."""
OUT_OF_MEMORY = ("can't allocate memory", "out of memory")
"""Texts of torch's errors."""

T = TypeVar("T")

clock = time.perf_counter


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Measured speeds and how they were measured."""

    figures: list[dict[str, float]]
    """Medians and interquartile ranges (iqr) of each model."""
    batch_size: int
    precision: str
    """bf16, fp16, tf32 or fp32, the same for all models."""


class Stopwatch:
    """Time forward passes of one model on noise, within a budget of seconds."""

    def __init__(
        self, model: nn.Module, size: tuple[int, int, int], device: torch.device, dtype: torch.dtype, seconds: float
    ) -> None:
        self.model, self.size, self.device, self.dtype = model, size, device, dtype
        self.left = seconds
        """Seconds neither spent nor reserved."""
        self.tried = 0
        """The largest batch size tried so far."""
        self.per_image = 0.0
        """Seconds per image at this batch size."""

    def make_images(self, batch: int) -> Float[Tensor, "b c h w"]:
        """Return reproducible random images."""
        return torch.randn(batch, *self.size, generator=torch.Generator().manual_seed(0)).to(self.device)

    @torch.inference_mode()
    def time(self, images: Float[Tensor, "b c h w"], passes: int = 1) -> float:
        """Return the seconds of some passes."""
        self._wait()
        started = clock()
        for _ in range(passes):
            with autocast(self.device, self.dtype):
                self.model(images)
        self._wait()
        return clock() - started

    def has_time_for(self, batch: int) -> bool:
        """Return whether the budget allows `MIN_PASSES` of a batch, based on the largest batch tried."""
        return MIN_PASSES * batch * self.per_image <= self.left

    def find_batch_size(self, batch: int) -> int:
        """Return the largest batch size up to `batch` that the budget allows, by trying increasing ones."""
        while self.tried < batch and self.has_time_for(candidate := min(batch, BATCH_FACTOR * self.tried or 1)):
            images = self.make_images(candidate)
            seconds = self.time(images)
            self.left -= seconds
            if seconds < WARM_UP_SECONDS or not self.tried:  # the first pass may load libraries and choose kernels
                self.left -= (second := self.time(images))
                seconds = min(seconds, second)
            self.tried, self.per_image = candidate, seconds / candidate
        return min(batch, self.tried)

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


class Timing:
    """Sample the time of a model for a batch; the first `MIN_ROUNDS` rounds are reserved in its budget.

    Args:
        watch: The model's stopwatch.
        images: The batch.
        alone: Wait for the device after each pass, so that each pass is a sample.
    """

    def __init__(self, watch: Stopwatch, images: Float[Tensor, "b c h w"], *, alone: bool) -> None:
        self.watch, self.images, self.alone = watch, images, alone
        self.seconds: list[float] = []
        self.rounds = 0
        seconds = self._warm_up()
        self.passes = max(1, math.ceil(SAMPLE_SECONDS / seconds))
        self.cost = self.passes * seconds
        watch.left -= MIN_ROUNDS * self.cost

    def sample(self) -> None:
        """Take samples unless the budget is spent."""
        self.rounds += 1
        if self.rounds > MIN_ROUNDS:
            if self.watch.left < self.cost:
                return
            self.watch.left -= self.cost
        if self.alone:
            self.seconds += [self.watch.time(self.images) for _ in range(self.passes)]
        else:
            self.seconds.append(self.watch.time(self.images, self.passes) / self.passes)

    def summarize(self, name: str) -> dict[str, float]:
        """Return the median of the samples as `name`, and their interquartile range as `name`_iqr.

        They are images per second if the name says so, else milliseconds per image.
        """
        if "images_per_second" in name:
            samples = [len(self.images) / seconds for seconds in self.seconds]
        else:
            samples = [1e3 * seconds / len(self.images) for seconds in self.seconds]
        first, _, third = statistics.quantiles(samples, n=4)
        return {name: statistics.median(samples), f"{name}_iqr": third - first}

    def _warm_up(self) -> float:
        """Run some passes; return the seconds of the last."""
        total = 0.0
        for _ in range(WARM_UP_PASSES):
            total += (seconds := self.watch.time(self.images))
            if total >= WARM_UP_SECONDS:
                break
        self.watch.left -= total
        return seconds


def measure_speed(models: Sequence[nn.Module], device: torch.device, amp: Amp, seconds: float = SECONDS) -> Speeds:
    """Measure the speed of models on one device in one precision; they are moved there.

    Args:
        models: Models loaded with `smallvit.load_model`.
        device: The device.
        amp: Mixed precision.
        seconds: Time budget per model. The batch size, the same for all, is the largest that all budgets allow.

    Raises:
        InputError: The requested precision is not supported.
    """
    sizes = [model.pretrained_cfg["input_size"] for model in models]
    dtypes = {choose_dtype(device, amp, model, *size[:2]) for model, size in zip(models, sizes, strict=True)}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    watches = [
        Stopwatch(
            fuse_for_inference(prepare_for_inference(model, device, dtype), device, dtype), size, device, dtype, seconds
        )
        for model, size in zip(models, sizes, strict=True)
    ]
    batch_size = min(watch.find_batch_size(hardware.batch_size(device)) for watch in watches)
    pairs = [
        (Timing(watch, watch.make_images(1), alone=True), Timing(watch, watch.make_images(batch_size), alone=False))
        for watch in watches
    ]
    take_turns([timing for column in zip(*pairs, strict=True) for timing in column], range(ROUNDS))
    figures = [
        batches.summarize("inference_images_per_second") | single.summarize("latency_ms") for single, batches in pairs
    ]
    return Speeds(figures=figures, batch_size=batch_size, precision=precision_name(device, dtype))


def take_turns(timings: Sequence[Timing], rounds: Iterable[int]) -> None:
    """Take samples round by round."""
    for _ in rounds:
        for timing in timings:
            timing.sample()


# Memory


def activation_bytes(
    model: nn.Module, in_chans: int, img_size: ImageSize, device: torch.device, dtype: torch.dtype
) -> int:
    """Measure the bytes that each further image of a batch adds to what is kept for the backward pass."""
    two, three = (  # some batch norms cannot train on one image
        kept_bytes(model, torch.zeros(count, in_chans, *height_width(img_size), device=device), dtype)
        for count in (2, 3)
    )
    return three - two


def kept_bytes(model: nn.Module, images: Float[Tensor, "b c h w"], dtype: torch.dtype) -> int:
    """Measure the bytes that a forward pass keeps for the backward pass, without parameters and buffers.

    Tensors that share memory count once. They are released at once, so the pass needs no more memory than inference.
    """
    own = _get_storages(chain(model.parameters(), model.buffers()))
    kept: dict[StorageWeakRef, int] = {}

    def keep(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        kept[StorageWeakRef(storage)] = storage.nbytes()  # while the reference lives, no other storage is equal to it

    def unpack(_: None) -> Tensor:
        raise RuntimeError("activations were counted but not kept, so there is no backward pass")

    training = model.training
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, unpack), autocast(images.device, dtype):
        model(images)
    model.train(training)
    return sum(size for storage, size in kept.items() if storage not in own)


def step_peak_bytes(model: nn.Module, images: Float[Tensor, "b c h w"], dtype: torch.dtype) -> int:
    """Measure the peak memory of tensors in a training step with AdamW on a GPU, by torch's allocator.

    Weights, gradients, the optimizer's state and the batch are included, other models on the GPU are not. The model is
    trained by it.
    """
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    own = sum(_get_storages(chain(model.parameters(), model.buffers(), [images, labels])).values())
    before = torch.cuda.memory_allocated(images.device)
    torch.cuda.reset_peak_memory_stats(images.device)
    training, optimizer = model.training, torch.optim.AdamW(model.parameters(), fused=True)
    model.train()
    for _ in range(TRAINING_STEPS):
        optimizer.zero_grad()
        with autocast(images.device, dtype):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
    model.train(training).zero_grad()
    return own + torch.cuda.max_memory_allocated(images.device) - before


def run_if_memory_allows(task: Callable[[], T]) -> T | None:
    """Run a task and return its result; None if it needs more memory than is free."""
    try:
        return task()
    except RuntimeError as error:
        if not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
    gc.collect()
    torch.cuda.empty_cache()  # has no effect without a GPU
    return None


def _get_storages(tensors: Iterable[Tensor]) -> dict[StorageWeakRef, int]:
    """Return the storages of tensors, each once, and their bytes."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {StorageWeakRef(storage): storage.nbytes() for storage in storages}
