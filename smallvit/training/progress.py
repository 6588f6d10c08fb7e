"""Show training progress: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from smallvit.utils.errors import format_duration

PLAIN_SECONDS = 30.0
"""Time between plain lines within an epoch."""


class TrainingProgress:
    """Show finished steps, loss and speed, and one line per finished epoch."""

    def __init__(self, console: Console, steps: int, epochs: int) -> None:
        self.console, self.steps, self.epochs = console, steps, epochs
        self.accuracy = ""
        self.first: tuple[float, int] | None = None
        self.last_line = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            console=console,
            transient=True,
            disable=console.quiet or not console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=steps, completed=0, figures="")

    def __enter__(self) -> TrainingProgress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def begin(self, done: int) -> None:
        """Show that `done` steps were completed before the run was resumed."""
        self.bar.update(self.task, completed=done)

    def step(self, done: int, loss: float, images_per_second: float) -> None:
        """Show the progress after `done` steps; `loss` is the epoch's mean so far."""
        shown = self._show((done - 1) * self.epochs // self.steps + 1, done, loss, images_per_second)
        if not self.console.is_terminal and time.monotonic() - self.last_line > PLAIN_SECONDS:
            label, figures, left = shown
            self.line(f"{label}  {done}/{self.steps} steps  {figures}{left}")

    def epoch(self, figures: dict[str, Any]) -> None:
        """Print an epoch's metrics in one line."""
        done = figures["epoch"] * self.steps // self.epochs
        validated = figures["val_top1"] is not None
        self.accuracy = f"val top-1 {figures['val_top1']:.2f} %  " if validated else ""
        label, _, left = self._show(figures["epoch"], done, figures["train_loss"], figures["images_per_second"])
        self.line(
            f"{label}  loss {figures['train_loss']:.3f}  "
            + (f"val loss {figures['val_loss']:.3f}  {self.accuracy}" if validated else "")
            + f"{figures['images_per_second']:,.0f} images/s"
            + ("" if self.console.is_terminal else left)  # the bar shows it
        )

    def _show(self, number: int, done: int, loss: float, images_per_second: float) -> tuple[str, str, str]:
        label, left = f"epoch {number}/{self.epochs}", self._left(done)
        figures = f"loss {loss:.3f}  {self.accuracy}{images_per_second:,.0f} images/s"
        self.bar.update(self.task, completed=done, description=label, figures=figures + left)
        return label, figures, left

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False, markup=False)
        self.last_line = time.monotonic()

    def _left(self, done: int) -> str:
        """Return the time left, by the speed since the first call: what precedes it may be another process's steps, and
        the first step, which may compile the model."""
        now = time.monotonic()
        started, first = self.first = self.first or (now, done)
        if done == first:
            return ""
        return f"  {format_duration((now - started) / (done - first) * (self.steps - done))} left"
