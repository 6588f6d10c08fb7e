"""Print text, tables and progress: a terminal wraps lines at words and tables by column, files get whole lines.

Training shows a live bar in a terminal, and plain lines elsewhere.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from smallvit.utils.errors import WORDS, format_duration

T = TypeVar("T")

MAX_WIDTH = 1000
"""Maximum width of a table in a file."""
PLAIN_SECONDS = 30.0
"""Time between plain lines within an epoch."""


def create_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console for text without markup, which wraps lines in terminals only."""
    console = Console(stderr=stderr, quiet=quiet, highlight=False, markup=False, emoji=False)
    console.soft_wrap = not console.is_terminal
    return console


def create_progress(console: Console, *, disable: bool = False) -> Progress:
    """Return progress bars with the time left, which terminals show and then remove."""
    columns = (*Progress.get_default_columns(), TextColumn("left"))
    return Progress(*columns, console=console, transient=True, disable=disable or not console.is_terminal)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield items, with a progress bar on standard error."""
    with create_progress(Console(stderr=True)) as progress:
        yield from progress.track(items, total, description=description)


def print_indented(console: Console, text: str) -> None:
    """Print lines that a terminal continues with an indent."""
    for line in text.splitlines():
        if console.is_terminal:
            indent = " " * (7 + len(line) - len(line.lstrip()))
            line = textwrap.fill(line, console.width, subsequent_indent=indent, **WORDS)
        console.print(line, soft_wrap=True)


def print_table(console: Console, rows: Sequence[Sequence[str]], *, wrap_header: bool = False) -> None:
    """Print a table; if a terminal is too narrow for all columns, in parts that all start with the first column.

    Args:
        console: Where to print.
        rows: Cells of the header and of each row. The first column is left-aligned.
        wrap_header: Break each title after its first word.
    """
    titles = [title.replace(" ", "\n", 1) if wrap_header else title for title in rows[0]]

    def create(columns: Sequence[int]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        table.add_column(titles[0], overflow="fold")
        for number in columns:
            table.add_column(titles[number], justify="right", no_wrap=True)
        for row in rows[1:]:
            table.add_row(*(Text(row[number]) for number in (0, *columns)))
        return table

    def measure(columns: Sequence[int]) -> int:
        return Measurement.get(console, console.options.update(width=MAX_WIDTH), create(columns)).maximum

    parts: list[list[int]] = [[]]
    for number in range(1, len(titles)):
        if console.is_terminal and parts[-1] and measure([*parts[-1], number]) > console.width:
            parts.append([])
        parts[-1].append(number)
    if not console.is_terminal:
        console.width = max(console.width, measure(parts[0]))
    for number, columns in enumerate(parts):
        if number:
            console.print()
        console.print(create(columns))


class TrainingProgress(Progress):
    """Show finished steps, loss and speed, and one line per finished epoch."""

    def __init__(self, console: Console, steps: int, epochs: int) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            console=console,
            transient=True,
            disable=console.quiet or not console.is_terminal,
        )
        self.steps, self.epochs = steps, epochs
        self.accuracy = ""
        self.first: tuple[float, int] | None = None
        self.deadline: float | None = None
        """End of a run that is limited by time, on the monotonic clock."""
        self.last_line = time.monotonic()
        self.task = self.add_task("training", total=steps, completed=0, figures="")

    def begin(self, done: int) -> None:
        """Show that `done` steps were completed before the run was resumed."""
        self.update(self.task, completed=done)

    def plan(self, epochs: int) -> None:
        """Show another number of epochs."""
        self.steps, self.epochs = self.steps // self.epochs * epochs, epochs
        self.update(self.task, total=self.steps)

    def step(self, done: int, loss: float, images_per_second: float) -> None:
        """Show the progress after `done` steps; `loss` is the epoch's mean so far."""
        shown = self._show((done - 1) * self.epochs // self.steps + 1, done, loss, images_per_second)
        if not self.console.is_terminal and time.monotonic() - self.last_line > PLAIN_SECONDS:
            label, figures, left = shown
            self.line(f"{label}  {done}/{self.steps} steps  {figures}{left}")

    def epoch(self, figures: dict[str, Any]) -> None:
        """Print an epoch's metrics in one line."""
        done = figures["epoch"] * self.steps // self.epochs
        titles = {"val_map": "val mAP", "val_knn_top1": "val k-NN top-1", "val_top1": "val top-1"}
        name = next(name for name in titles if name in figures)
        value, loss = figures[name], figures.get("val_loss")
        self.accuracy = f"{titles[name]} {value:.2f} %  " if value is not None else ""
        label, _, left = self._show(figures["epoch"], done, figures["train_loss"], figures["images_per_second"])
        self.line(
            f"{label}  loss {figures['train_loss']:.3f}  "
            + (f"val loss {loss:.3f}  " if loss is not None else "")
            + self.accuracy
            + f"{figures['images_per_second']:,.0f} images/s"
            + ("" if self.console.is_terminal else left)  # the bar shows it
        )

    def _show(self, number: int, done: int, loss: float, images_per_second: float) -> tuple[str, str, str]:
        label, left = f"epoch {number}/{self.epochs}", self._left(done)
        figures = f"loss {loss:.3f}  {self.accuracy}{images_per_second:,.0f} images/s"
        self.update(self.task, completed=done, description=label, figures=figures + left)
        return label, figures, left

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False, markup=False)
        self.last_line = time.monotonic()

    def _left(self, done: int) -> str:
        """Return the time left, by the speed since the first call: what precedes it may be another process's steps, and
        the first step, which may compile the model."""
        now = time.monotonic()
        if self.deadline is not None:
            return f"  {format_duration(max(0.0, self.deadline - now))} left"
        started, first = self.first = self.first or (now, done)
        if done == first:
            return ""
        return f"  {format_duration((now - started) / (done - first) * (self.steps - done))} left"
