"""Print text, tables and progress: a terminal wraps lines at words and tables by column, files get whole lines."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from smallvit.utils.errors import WORDS

T = TypeVar("T")

MAX_WIDTH = 1000
"""Maximum width of a table in a file."""


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
