"""Save checkpoints during training, resume from them, and stop on signals or a loss that is not finite."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any, TypeVar

import torch
from torch import Tensor

from smallvit.models import checkpoint
from smallvit.plugins.patch import misfit
from smallvit.runs.run import Run
from smallvit.training.setup import Setup
from smallvit.utils.distributed import local_tensor
from smallvit.utils.errors import DivergedError, InputError
from smallvit.utils.hardware import AsyncScalar
from smallvit.utils.signals import SignalHandler, SignalInterrupt
from smallvit.utils.terminal import TrainingProgress

EPOCH_SECONDS = 5.0
"""Minimum time between the checkpoints of two epochs."""
CHECK_SECONDS = 0.5
"""Time between two checks of the loss, and between two synchronizations of torchrun's processes."""
T = TypeVar("T")


class StepAction(IntEnum):
    """Action after a step; torchrun's processes take the largest that any of them requests."""

    CONTINUE, SAVE, STOP, CHECK_LOSS = range(4)


class Checkpointer:
    """Track the progress of a run; save it between steps, and stop it on a signal or a loss that is not finite."""

    def __init__(self, run: Run, setup: Setup, signals: SignalHandler, display: TrainingProgress) -> None:
        self.run, self.setup, self.signals, self.display = run, setup, signals, display
        teacher = None if setup.teacher is None else setup.teacher.fingerprint
        initial = setup.initial
        self.state = RunState(
            images=setup.dataset.fingerprint,
            teacher=teacher,
            class_weights=setup.objective.class_weights,
            init=initial.fingerprint,
            new=list(initial.new),
        )
        self.losses = torch.zeros(len(setup.batches), device=setup.device)
        """Loss of each step of the current epoch, this process's share."""
        self.best: dict[str, Tensor] | None = None  # weights better than those in the last checkpoint
        self.async_loss = AsyncScalar(setup.device)
        self.saved_at = self.checked_at = self.ticked_at = time.monotonic()
        self.next_agreement = 0

    @property
    def steps_done(self) -> int:
        """Steps of all epochs so far."""
        return self.state.epoch * len(self.losses) + self.state.step

    @property
    def position(self) -> str:
        """Epochs and steps done, in words."""
        number, step = self.state.epoch + bool(self.state.step), self.state.step
        total = "" if self.setup.budget else f" of {self.setup.config.optim.epochs}"
        return f"epoch {number}{total}" + (f", step {step}" if step else "")

    @property
    def finished(self) -> bool:
        """Whether training is over: all epochs are done, or the time or the patience has run out."""
        state, budget = self.state, self.setup.budget
        if self.exhausted:
            return True
        return state.epoch >= self.setup.config.optim.epochs if budget is None else budget.finished and not state.step

    @property
    def exhausted(self) -> bool:
        """Whether the selected metric has not improved for --patience epochs, as far as it was evaluated."""
        state, patience = self.state, self.setup.config.run.patience
        if not (patience and state.best_epoch):
            return False
        return state.epoch - state.best_epoch >= patience and state.history[-1]["val_loss"] is not None

    @property
    def seconds(self) -> float:
        """Time spent in training and validation so far."""
        return self.state.seconds + self.state.epoch_seconds + time.monotonic() - self.ticked_at

    # Resuming

    def restore(self) -> bool:
        """Load the last checkpoint, if there is one; return whether there was.

        Raises:
            InputError: The checkpoint is damaged, or torchrun's processes see different ones.
        """
        setup = self.setup
        saved = checkpoint.load_state(self.run / Run.STATE, setup.trained, setup.optimizer, setup.average)
        if saved is not None:
            self._load_progress(saved)
        own = (self.state.images, self.steps_done)
        if setup.world.agree(int(own != setup.world.send(own))):
            raise InputError(
                f"torchrun's processes differ in their images, or in the checkpoint they see: {self.run.folder} must "
                "be on storage that all share"
            )
        return saved is not None

    def _load_progress(self, saved: dict[str, Any]) -> None:
        setup = self.setup
        try:
            self.state = RunState(**saved)
            setup.scaler.load_state_dict(self.state.scaler)
            if setup.budget is not None:
                setup.budget.progress = self.state.progress
                setup.budget.started -= self.state.elapsed
            if setup.world.main:  # the other processes' shares are in its sum
                self.losses[: self.state.step] = torch.tensor(self.state.losses)
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise InputError(f"{self.run / Run.STATE}: does not fit this run ({error})") from None
        if self.state.best_epoch:  # check the best weights now, not after training
            file = self.run / Run.BEST
            weights, metadata = checkpoint.load_weights(file)
            if (
                misfit(weights, setup.eval_model.state_dict())
                or not {"epoch", f"val_{setup.accuracies[0]}"} <= metadata.keys()
            ):
                raise InputError(f"{file}: does not fit this run (its weights are not this model's)")

    # After a step and an epoch

    def step(self, loss: Tensor) -> None:
        """Record a step's loss; show the mean loss, save or stop if due.

        torchrun's processes synchronize every `CHECK_SECONDS`, not after every step.

        Raises:
            SignalInterrupt: A signal was received; the run is saved.
            DivergedError: The loss is not finite.
        """
        state, world = self.state, self.setup.world
        self.losses[state.step] = loss
        state.step += 1
        self.tick()
        if self.steps_done < self.next_agreement:
            return
        action = StepAction.STOP if self.signals.received else StepAction.CONTINUE
        if self.ticked_at - self.saved_at > 60 * self.setup.config.run.checkpoint_minutes:
            action = max(action, StepAction.SAVE)
        if self.ticked_at - self.checked_at > CHECK_SECONDS:
            self.checked_at = self.ticked_at
            mean = self.async_loss.exchange(self.losses[: state.step].mean())
            if mean is not None and not math.isfinite(mean):
                action = StepAction.CHECK_LOSS
            elif mean is not None:
                rate = state.step * self.setup.batches.sampling.size / state.epoch_seconds
                if self.setup.budget is not None:
                    self.display.plan(self.setup.budget.estimate_epochs(self.steps_done))
                self.display.step(self.steps_done, mean * world.size, rate)
        if world.size > 1:
            seconds_per_step = state.epoch_seconds / state.step
            interval = max(1, min(int(CHECK_SECONDS / max(seconds_per_step, 1e-6)), len(self.losses) - state.step))
            action, interval = world.agree_all(action, interval)
            self.next_agreement = self.steps_done + interval
        self._perform(action)

    def stop_on_signal(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield batches of an evaluation, unless a signal asks to stop."""
        for batch in batches:
            action = StepAction.STOP if self.signals.received else StepAction.CONTINUE
            self._perform(self.setup.world.agree(action))
            yield batch

    def _perform(self, action: int) -> None:
        if action == StepAction.CHECK_LOSS:
            self.mean_loss()
        if action >= StepAction.SAVE and not self.finished:
            self.save()  # not during the final test, which evaluates the best weights
        if action == StepAction.STOP:
            raise SignalInterrupt(self.setup.world.agree(self.signals.received))

    def epoch(self, metrics: dict[str, Any], best: bool) -> None:
        """Record an epoch's metrics, and write a checkpoint unless the last one is recent."""
        state = self.state
        if best:
            self.best = checkpoint.snapshot(self.setup.eval_model, keep=self.setup.world.main)
        state.history.append(metrics)
        state.omitted_steps = len(self.losses) - state.step
        state.epoch, state.step = state.epoch + 1, 0
        state.seconds = metrics["seconds"]
        state.step_seconds += state.epoch_seconds
        state.epoch_seconds = 0.0
        self.async_loss.pending = False
        due = time.monotonic() - self.saved_at > EPOCH_SECONDS
        if self.setup.world.agree(int(self.finished or due or self.setup.config.run.keep > 0)):
            self.save()
        self.ticked_at = time.monotonic()

    def tick(self) -> None:
        """Add the time since the last call to the epoch's training time."""
        now = time.monotonic()
        self.state.epoch_seconds += now - self.ticked_at
        self.ticked_at = now

    # Losses

    def mean_loss(self) -> float:
        """Return the mean loss of the current epoch's steps over all processes.

        Raises:
            DivergedError: The loss of a step is not finite.
        """
        losses = self.setup.world.total(self.losses[: self.state.step])
        bad = torch.nonzero(~losses.isfinite())
        if len(bad):
            step = int(bad[0])
            raise self._diverged(f"the loss became {losses[step].item()}", f", step {step + 1}")
        return losses.cpu().double().mean().item()

    def _diverged(self, problem: str, details: str = "") -> DivergedError:
        """Return an error that says where training diverged, what to try, and where the best weights are."""
        rate, best = self.setup.optimizer.param_groups[0]["lr"], self.run / Run.BEST
        kept = f"; the weights of the best epoch before are in {best}" if best.exists() else ""
        return DivergedError(
            f"{problem} in epoch {self.state.epoch + 1}{details}, at learning rate {rate:.2g}: try a lower --lr, "
            f"--clip-grad 1, a longer --warmup-ratio, or --amp off{kept}"
        )

    # Saving

    @torch.no_grad()
    def save(self) -> None:
        """Write a checkpoint. The state is written last, so an interruption only repeats steps, exactly.

        Raises:
            DivergedError: Weights are not finite; the last checkpoint stays unchanged.
            OSError: The checkpoint cannot be written.
        """
        run, setup, state = self.run, self.setup, self.state
        if state.step:
            self.mean_loss()
        finite = torch.stack(
            [local_tensor(parameter).isfinite().all() for parameter in setup.trained.parameters()]
        ).all()
        if setup.world.agree(int(not finite)):
            raise self._diverged("weights are no longer finite")
        state.scaler = setup.scaler.state_dict()
        if setup.budget is not None:
            state.progress, state.elapsed = setup.budget.progress, setup.budget.elapsed
        state.losses = setup.world.total(self.losses[: state.step]).tolist()
        keep = setup.world.main
        weights = checkpoint.snapshot(setup.eval_model, keep=keep) if not state.step else None
        gathered = checkpoint.gather_state(setup.trained, setup.optimizer, setup.average, keep=keep)
        if setup.world.main:
            if self.best is not None:
                metadata = setup.metadata(state.best_epoch, state.history[state.best_epoch - 1])
                checkpoint.save_weights(run / Run.BEST, self.best, metadata)
            if weights is not None:
                self._save_epoch(weights)
            run.write_lines(Run.METRICS, state.history)
            checkpoint.save_state(run / Run.STATE, gathered, asdict(state))
        setup.world.agree(0)  # wait until it is written
        self.best = None
        self.saved_at = self.ticked_at = time.monotonic()

    def _save_epoch(self, weights: dict[str, Tensor]) -> None:
        state, keep = self.state, self.setup.config.run.keep
        metadata = self.setup.metadata(state.epoch, state.history[-1])
        checkpoint.save_weights(self.run / Run.LAST, weights, metadata)
        if keep:
            checkpoint.save_weights(self.run.epoch_file(state.epoch), weights, metadata)
            for file in self.run.epoch_files()[:-keep]:
                file.unlink()


@dataclass
class RunState:
    """Progress of a run, saved in its checkpoint next to weights and optimizer state."""

    images: str
    """Fingerprint of the dataset."""
    teacher: str | None = None
    """Fingerprint of the teacher's weights."""
    class_weights: list[float] | None = None
    """Weights of the classes in the loss."""
    init: str | None = None
    """Fingerprint of the initial weights, if training started from any."""
    new: list[str] = field(default_factory=list)
    """Parameters that the initial weights did not contain."""
    epoch: int = 0
    """Completed epochs."""
    step: int = 0
    """Completed steps of the current epoch."""
    losses: list[float] = field(default_factory=list)
    """Losses of these steps."""
    best_epoch: int = 0
    seconds: float = 0.0
    """Time of training and validation in completed epochs."""
    epoch_seconds: float = 0.0
    """Time of training in the current epoch."""
    step_seconds: float = 0.0
    """Time of training alone in completed epochs."""
    scaler: dict[str, float] = field(default_factory=dict)
    """State of the loss scaler in fp16."""
    progress: float = 0.0
    """Share of the schedule that is complete, with --max-time."""
    elapsed: float = 0.0
    """Time since the start of the run, with --max-time."""
    omitted_steps: int = 0
    """Steps that the last epoch lacks, with --max-time."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Metrics of every epoch, as in metrics.jsonl."""
