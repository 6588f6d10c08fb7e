"""What an interruption must not cost: when a run is saved, and what ends it early."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from enum import IntEnum
from typing import Any, TypeVar

import torch
from torch import Tensor

from smallvit import checkpoint
from smallvit.distributed import local
from smallvit.errors import DivergedError, InputError
from smallvit.hardware import Glimpse
from smallvit.interrupt import Interrupted, Signals
from smallvit.progress import TrainingProgress
from smallvit.runs import Run
from smallvit.setup import Setup
from smallvit.state import RunState

EPOCH_SECONDS = 5.0
"""Least time between the checkpoints of two epochs."""
LOOK_SECONDS = 0.5
"""How often the loss is looked at, to show it and to see that it is finite."""
DIVERGED = 3.0
"""Training has diverged if an epoch's mean loss is so many times the first step's, or chance's."""
T = TypeVar("T")


class Wish(IntEnum):
    """What a process wants after a step; the largest wish of all is granted."""

    GO, SAVE, STOP, LOOK = range(4)


class Keeper:
    """Watches over a run between its steps."""

    def __init__(self, run: Run, setup: Setup, signals: Signals, display: TrainingProgress) -> None:
        self.run, self.setup, self.signals, self.display = run, setup, signals, display
        teacher = None if setup.teacher is None else setup.teacher.fingerprint
        self.state = RunState(images=setup.dataset.fingerprint, teacher=teacher)
        """How far the run has come."""
        self.losses = torch.zeros(len(setup.batches), device=setup.device)
        self.best: dict[str, Tensor] | None = None  # weights better than those in the last checkpoint
        self.glimpse = Glimpse(setup.device)
        self.saved = self.looked = self.ticked = time.monotonic()

    @property
    def done(self) -> int:
        """Steps of all epochs so far."""
        return self.state.epoch * len(self.losses) + self.state.step

    @property
    def place(self) -> str:
        """How far the run has come, in words."""
        return f"epoch {self.state.epoch}" + (f" and {self.state.step} steps" if self.state.step else "")

    @property
    def seconds(self) -> float:
        """Of training and validation."""
        return self.state.seconds + self.state.epoch_seconds + time.monotonic() - self.ticked

    def restore(self) -> bool:
        """Take up where an interrupted run left off, if it left anything.

        Raises:
            InputError: a damaged checkpoint, other images than those it began with, or torchrun's processes see
                different ones.
        """
        setup = self.setup
        saved = checkpoint.load_state(self.run / Run.STATE, setup.model, setup.optimizer, setup.average)
        if saved is not None:
            self._take_up(saved)
        mine = (self.state.images, self.done)
        if setup.world.agree(int(mine != setup.world.send(mine))):
            raise InputError(
                f"torchrun's processes differ in their images, or in the checkpoint they see: {self.run.folder} must "
                "be on storage that all share"
            )
        return saved is not None

    def _take_up(self, saved: dict[str, Any]) -> None:
        setup = self.setup
        if saved.get("images") != self.state.images:
            data = setup.config.data.data
            raise InputError(f"--resume {self.run.folder}: the images in {data} are not those it began with")
        if saved.get("teacher") != self.state.teacher:
            teacher = setup.config.distill.teacher
            raise InputError(f"--resume {self.run.folder}: the teacher {teacher} is not the one it began with")
        try:
            self.state = RunState(**saved)
            self.state.require_sense(setup.config.optim.epochs, len(self.losses))
        except (TypeError, ValueError, KeyError) as error:
            raise InputError(f"{self.run / Run.STATE}: does not fit this run ({error})") from None
        if setup.world.main:  # the others' shares are in its sum
            self.losses[: self.state.step] = torch.tensor(self.state.losses)
        if self.state.best_epoch:
            self._require_best()

    def _require_best(self) -> None:
        """Missing, damaged or another model's weights are better known now than after training."""
        file = self.run / Run.BEST
        weights, metadata = checkpoint.load_weights(file)
        found, wanted = (
            {name: value.shape for name, value in each.items()} for each in (weights, self.setup.judged.state_dict())
        )
        if found != wanted or not {"epoch", "val_top1"} <= metadata.keys():
            raise InputError(f"{file}: does not fit this run (its weights are not this model's)")

    def step(self, loss: Tensor) -> None:
        """A step is done: show the loss now and then, and save or stop when it is time.

        Raises:
            Interrupted: a signal asked for it; the run is saved.
            DivergedError: the loss is not finite, or has grown far beyond where it began.
        """
        state = self.state
        self.losses[state.step] = loss
        state.step += 1
        self.tick()
        wish = Wish.STOP if self.signals.received else Wish.GO
        if self.ticked - self.saved > 60 * self.setup.config.run.checkpoint_minutes:
            wish = max(wish, Wish.SAVE)
        if self.ticked - self.looked > LOOK_SECONDS:
            self.looked = self.ticked
            mean = self.glimpse.exchange(self.losses[: state.step].mean())
            if mean is not None and not self._is_good(mean := mean * self.setup.world.size):
                wish = Wish.LOOK
            elif mean is not None:
                rate = state.step * self.setup.batches.sampling.size / state.epoch_seconds
                self.display.step(self.done, mean, rate)
        self._grant(self.setup.world.agree(wish))

    def watched(self, batches: Iterable[T]) -> Iterator[T]:
        """What is judged between two epochs, unless a signal asks to stop."""
        for batch in batches:
            self._grant(self.setup.world.agree(Wish.STOP if self.signals.received else Wish.GO))
            yield batch

    def _grant(self, wish: int) -> None:
        if wish == Wish.LOOK:
            self.mean_loss()
        if wish >= Wish.SAVE and self.state.epoch < self.setup.config.optim.epochs:  # later, the chosen are judged
            self.save()
        if wish == Wish.STOP:
            raise Interrupted(self.setup.world.agree(self.signals.received))

    def tick(self) -> None:
        """Add the time since the last tick to the epoch's."""
        now = time.monotonic()
        self.state.epoch_seconds += now - self.ticked
        self.ticked = now

    def mean_loss(self) -> float:
        """Of the epoch at hand, over all processes.

        Raises:
            DivergedError: one is not finite, or they have grown far beyond where they began.
        """
        losses = self.setup.world.total(self.losses[: self.state.step])
        bad = torch.nonzero(~losses.isfinite())
        rate = self.setup.optimizer.param_groups[0]["lr"]
        advice = f"at learning rate {rate:.2g}: try a lower --lr, --clip-grad 1, a longer --warmup, or --amp off"
        if len(bad):
            step = int(bad[0])
            raise DivergedError(
                f"the loss became {losses[step].item()} in epoch {self.state.epoch + 1}, step {step + 1}, "
                f"{advice}{self._kept()}"
            )
        if self.state.first_loss is None:
            self.state.first_loss = losses[0].item()
        if not self._is_good(mean := losses.mean().item()):
            raise DivergedError(
                f"the loss has grown to {mean:.3g} in epoch {self.state.epoch + 1}, from {self.state.first_loss:.3g}, "
                f"{advice}{self._kept()}"
            )
        return mean

    def _is_good(self, mean: float) -> bool:
        """Whether a mean loss is finite and not far beyond what it began with and what guessing gives."""
        first = self.state.first_loss
        guessing = math.log(2 if self.setup.config.optim.loss == "bce" else self.setup.batches.classes)
        return math.isfinite(mean) and (first is None or mean <= DIVERGED * max(first, guessing))

    def _kept(self) -> str:
        best = self.run / Run.BEST
        return f"; the weights of the best epoch before are in {best}" if best.exists() else ""

    def epoch(self, figures: dict[str, Any], best: bool) -> None:
        """An epoch is trained and judged: note it, and save it unless another has just been saved."""
        state = self.state
        if best:
            self.best = checkpoint.snapshot(self.setup.judged)
        state.history.append(figures)
        state.epoch, state.step = state.epoch + 1, 0
        state.seconds = figures["seconds"]
        state.step_seconds += state.epoch_seconds
        state.epoch_seconds = 0.0
        self.glimpse.pending = False
        last = state.epoch == self.setup.config.optim.epochs
        late = time.monotonic() - self.saved > EPOCH_SECONDS
        if self.setup.world.agree(int(last or late or self.setup.config.run.keep > 0)):
            self.save()
        self.ticked = time.monotonic()

    @torch.no_grad()
    def save(self) -> None:
        """Write a checkpoint. The state comes last: what precedes it is repeated exactly if it is not reached.

        Raises:
            DivergedError: there are weights that are not finite; the last checkpoint stays as it is.
            OSError: it cannot be written.
        """
        run, setup, state = self.run, self.setup, self.state
        if state.step:
            self.mean_loss()
        finite = torch.stack([local(parameter).isfinite().all() for parameter in setup.model.parameters()]).all()
        if setup.world.agree(int(not finite)):
            raise DivergedError(
                f"weights are no longer finite in epoch {state.epoch + 1}: try a lower --lr{self._kept()}"
            )
        state.losses = setup.world.total(self.losses[: state.step]).tolist()
        judged = checkpoint.snapshot(setup.judged) if not state.step else None
        gathered = checkpoint.gather_state(setup.model, setup.optimizer, setup.average)
        if setup.world.main:
            if self.best is not None:
                metadata = setup.metadata(state.best_epoch, state.history[state.best_epoch - 1]["val_top1"])
                checkpoint.save_weights(run / Run.BEST, self.best, metadata)
            if judged is not None:
                self._save_epoch(judged)
            run.write_lines(Run.METRICS, state.history)
            checkpoint.save_state(run / Run.STATE, gathered, asdict(state))
        setup.world.agree(0)  # none goes on before it is written
        self.best, self.saved = None, time.monotonic()
        self.ticked = self.saved

    def _save_epoch(self, weights: dict[str, Tensor]) -> None:
        state, keep = self.state, self.setup.config.run.keep
        metadata = self.setup.metadata(state.epoch, state.history[-1]["val_top1"])
        checkpoint.save_weights(self.run / Run.LAST, weights, metadata)
        if keep:
            checkpoint.save_weights(self.run.epoch_file(state.epoch), weights, metadata)
            for file in self.run.epoch_files()[:-keep]:
                file.unlink()
