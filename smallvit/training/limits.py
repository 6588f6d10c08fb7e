"""Fit a run to a limit of time (--max-time), and its batches to the memory (--batch-size auto)."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING

import torch

from smallvit.config.config import Config
from smallvit.datasets.loader import create_train_loader
from smallvit.utils.distributed import World
from smallvit.utils.errors import InputError
from smallvit.utils.hardware import is_out_of_memory, pick_device

if TYPE_CHECKING:
    from torch import Tensor

    from smallvit.training.setup import Setup

SCHEDULE_STEPS = 10_000
"""Steps of the schedule of a run that is limited by time; its progress is a share of them."""
TARGET = 0.98
"""Share of the limit that a run aims at, since the times of its last steps and evaluations are estimates."""
FINISH_SECONDS, FINISH_SHARE = 5.0, 0.05
"""Time to draw the curves and write the results, also on a busy machine, and its largest share of the limit."""
SMOOTHING = 0.1
"""Weight of the latest step in the mean time of a step."""
COMPILE_SECONDS = 1800.0
"""Limit from which --compile auto compiles the model of a run that is limited by time."""
SMALLEST_BATCH, USUAL_BATCH = 16, 128
"""First batch size that is tried, and the one that learning rates are meant for without a recipe."""
LEAST_STEPS = 50
"""Steps of an epoch from which --batch-size auto tries no larger batches, beyond the usual one."""
WITHOUT_LIMIT = ("cpu",)
"""Devices whose memory does not limit the batch."""


class TimeBudget:
    """Advance the schedule of a run such that it ends, with its evaluations, when the time does.

    A step advances the schedule by its share of the training time that is left. If the machine becomes slower or
    faster, the steps that remain advance it by more or less, and nothing jumps. The schedule is complete in the last
    step.

    Args:
        limit: Seconds from the start of the run to its end.
        epoch_steps: Steps of an epoch.
        val_images: Images that are evaluated after an epoch.
        test_images: Images that are evaluated at the end, besides these.
        val_interval: Epochs from one evaluation to the next.
    """

    def __init__(
        self, limit: float, epoch_steps: int, val_images: int, test_images: int, val_interval: int = 1
    ) -> None:
        self.limit, self.epoch_steps, self.val_interval = limit, epoch_steps, val_interval
        self.val_images, self.test_images = val_images, test_images
        self.started = monotonic()
        self.progress = 0.0
        """Share of the schedule that is complete."""
        self.seconds_per_image = 0.0
        """Time to evaluate an image."""
        self.val_seconds = 0.0
        """Time from the end of an epoch's steps to the start of the next epoch."""
        self.step_seconds: float | None = None
        """Mean time of a step; unknown in the first steps, which may compile the model."""
        self.calls, self.called_at = 0, self.started

    @property
    def elapsed(self) -> float:
        """Seconds since the start of the run, without those between an interruption and its resumption."""
        return monotonic() - self.started

    @property
    def finished(self) -> bool:
        """Whether the schedule is complete."""
        return self.progress >= 1

    @property
    def seconds_left(self) -> float:
        """Seconds left for training and for the evaluations before the last ones."""
        final = self.val_seconds + self.seconds_per_image * self.test_images
        return TARGET * self.limit - self.elapsed - final - min(FINISH_SECONDS, FINISH_SHARE * self.limit)

    def measured(self, images: int, seconds: float) -> None:
        """Record the time of evaluating images before the first step.

        Raises:
            InputError: No time is left for training; a run that is resumed completes its schedule at once then.
        """
        self.seconds_per_image = seconds / images
        self.val_seconds = self.seconds_per_image * self.val_images
        self.calls, self.called_at = 0, monotonic()
        if self.seconds_left <= 0 and not self.progress:
            final = self.val_seconds + self.seconds_per_image * self.test_images
            raise InputError(
                f"--max-time: {self.elapsed:.0f} s have passed before the first step, and evaluation takes about "
                f"{final:.0f} s: give more than {self.limit:g} s"
            )

    def advance(self, world: World = World()) -> float:  # noqa: B008, it is frozen
        """Return the share of the schedule that is complete with the next step."""
        now = monotonic()
        if self.calls > 1:  # the first step is no example of the others
            seconds = now - self.called_at
            mean = self.step_seconds
            self.step_seconds = seconds if mean is None else mean + SMOOTHING * (seconds - mean)
        self.calls, self.called_at = self.calls + 1, now
        own = self.progress
        if self.step_seconds is not None or self.seconds_left <= 0:  # each process has its own clock
            own += (1 - own) * self._share()
        self.progress = min(1.0, world.agree(round(own * 2**30)) / 2**30)
        return self.progress

    def _share(self) -> float:
        """Return the share of the rest of the schedule that the next step completes."""
        seconds, left = self.step_seconds or 0.0, self.seconds_left
        if left < 2 * seconds:
            return 1.0  # no time for another step
        training = self.epoch_steps * seconds
        return min(1.0, seconds / left * (training + self.val_seconds / self.val_interval) / training)

    @property
    def skips_validation(self) -> bool:
        """Whether evaluating an epoch that is not the last would leave no time for another step."""
        return not self.finished and self.seconds_left - self.val_seconds < 2 * (self.step_seconds or 0.0)

    def end_epoch(self, seconds: float, *, validated: bool) -> None:
        """Record the time from the end of an epoch's steps to the start of the next epoch."""
        self.called_at += seconds
        if validated:
            self.val_seconds, self.seconds_per_image = seconds, seconds / self.val_images

    def estimate_epochs(self, steps: int) -> int:
        """Return the number of epochs of the whole run, begun ones included, after some steps."""
        return max(1, -(-round(steps / self.progress) // self.epoch_steps)) if self.progress else 1


def fit_batch_size(
    config: Config,
    world: World,
    create_setup: Callable[[Config, World], Setup],
    train_step: Callable[[Setup, int, int, Tensor, Tensor], Tensor],
) -> Config:
    """Return the configuration with the largest power of two as batch size whose steps fit into the device's memory.

    Steps are tried out as training takes them, but not compiled. The learning rate is scaled as for a given batch size:
    --lr is for --lr-base-size, else for the recipe's batch size, or 128.

    Raises:
        InputError: The device is a CPU, there are several processes, or no batch fits.
    """
    device = pick_device(config.compute.device)
    if device.type in WITHOUT_LIMIT:
        raise InputError("--batch-size auto is for GPUs: a CPU's memory does not limit the batch; give e.g. 128")
    if world.size > 1:
        raise InputError("--batch-size auto is for one process; with torchrun give a number")
    config = config.replace(lr_base_size=config.optim.lr_base_size or USUAL_BATCH)
    whole = {"progressive_size": None, "patch_drop_rate": 0.0}  # as in the last steps
    trial = config.replace(batch_size=max(USUAL_BATCH, parts := config.optim.grad_accum_steps), compile="off", **whole)
    setup = create_setup(trial.replace(max_time=None), world)
    largest, size, best = max(USUAL_BATCH, len(setup.dataset.train) // LEAST_STEPS), SMALLEST_BATCH, None
    while size < 2 * parts:
        size *= 2
    while size <= largest:
        try:
            _try_steps(setup, size, train_step)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
        finally:
            setup.optimizer.zero_grad()
            gc.collect()
            torch.cuda.empty_cache()
        best, size = size, 2 * size
    if best is None:
        raise InputError(
            f"--batch-size auto: not even {SMALLEST_BATCH} images fit into memory; try a smaller --img-size"
        )
    return config.replace(batch_size=best)


def _try_steps(setup: Setup, size: int, train_step: Callable[[Setup, int, int, Tensor, Tensor], Tensor]) -> None:
    """Take two steps; the optimizer's state is created in the first."""
    options = {"balanced": setup.config.data.balanced}
    batches = create_train_loader(
        setup.dataset, size, setup.batches.augment, setup.config.run.seed, setup.device, **options
    )
    trial = replace(setup, batches=batches, config=setup.config.replace(batch_size=size))
    images, targets = next(iter(batches.epoch(0)))
    for step in range(2):
        train_step(trial, 0, step, images, targets)
