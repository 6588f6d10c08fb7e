"""How far a run has come."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class RunState:
    """Kept in a run's checkpoint, but for weights and the optimiser's state."""

    images: str
    """Fingerprint of the data set."""
    teacher: str | None = None
    """Fingerprint of the teacher's weights."""
    epoch: int = 0
    """Epochs completed."""
    step: int = 0
    """Steps completed of the epoch at hand."""
    losses: list[float] = field(default_factory=list)
    """Of these steps."""
    first_loss: float | None = None
    best_epoch: int = 0
    best_val_top1: float = -1.0
    best_val_loss: float = math.inf
    seconds: float = 0.0
    """Of training and validation."""
    epoch_seconds: float = 0.0
    """Of training in the epoch at hand."""
    step_seconds: float = 0.0
    """Of training alone, in the epochs completed."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Metrics of every epoch: what metrics.jsonl shows."""

    def require_sense(self, epochs: int, steps: int) -> None:
        """Check that it can be the state of a run of so many epochs of so many steps.

        Raises:
            ValueError: it cannot.
        """
        times = (self.seconds, self.epoch_seconds, self.step_seconds)
        numbers = (*self.losses, *times, self.best_val_top1, self.best_val_loss, self.first_loss or 0.0)
        if not (
            all(type(count) is int for count in (self.epoch, self.step, self.best_epoch))
            and all(type(number) in (int, float) for number in numbers)
            and self.epoch <= epochs
            and self.step == len(self.losses) <= steps
            and [line["epoch"] for line in self.history] == list(range(1, self.epoch + 1))
            and min(1, self.epoch) <= self.best_epoch <= self.epoch
        ):
            raise ValueError("its progress makes no sense")
