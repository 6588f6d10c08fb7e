"""A judgement in words and tables, for the terminal. Reads plain records, imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from smallvit.judgement.chance import METHODS, in_words
from smallvit.words import one_line

FEW = 20
"""Most classes that are all shown; of more, the worst."""
WORST, CONFUSIONS = 10, 5
"""Classes and confusions that are shown."""


def show(record: dict[str, Any], console: Console) -> None:
    """Print what a record of `judging.judge` says."""
    say = partial(console.print, markup=False, highlight=False, emoji=False)
    for line in headline(record):
        say(line)
    console.print()
    console.print(class_table(record["classes"]))
    for line in confusions(record):
        say(line)
    if record["robustness"] is not None:
        console.print()
        console.print(robustness_table(record["robustness"], record["top1"]))
    if (found := record["comparison"]) is not None:
        console.print()
        say(comparison(record["name"], found))


def headline(record: dict[str, Any]) -> Iterator[str]:
    """On what, and how good."""
    flipped = ", each with its mirror image" if record["flip"] else ""
    left_out = f" ({record['left_out']:,} more cannot be decoded)" if record["left_out"] else ""
    images = f"{record['images']:,} images{left_out} at {record['img_size']} pixels{flipped}"
    yield f"{record['name']} on {record['data']}, {record['split']}: {images}"
    low, high = record["interval"]
    top5 = f"   top-5 {record['top5']:.2f} %" if len(record["classes"]) > 5 else ""
    yield (
        f"top-1 {record['top1']:.2f} % ({METHODS[record['interval_method']]} {low:.2f} to {high:.2f}){top5}   "
        f"loss {record['loss']:.4f}   calibration error {record['ece']:.2f} %"
    )


def class_table(classes: list[dict[str, Any]]) -> Table:
    """Precision, recall and F1 of all classes that have images, or of the worst by F1."""
    judged = [each for each in classes if each["images"]]
    title = "class"
    if len(judged) > FEW:
        title = f"worst {WORST} of {len(judged)} classes"
        judged = sorted(judged, key=lambda each: each["f1"])[:WORST]
    table = _table(title, "precision %", "recall %", "F1 %", "images")
    for each in judged:
        figures = (f"{each[name]:.1f}" for name in ("precision", "recall", "f1"))
        table.add_row(Text(one_line(each["name"])), *figures, f"{each['images']:,}")
    return table


def confusions(record: dict[str, Any]) -> Iterator[str]:
    """The most frequent ones, as far as there are any."""
    classes, pairs = record["classes"], []
    for row, (true, counts) in enumerate(zip(classes, record["confusion"], strict=True)):
        pairs += [(n, true, classes[column]["name"]) for column, n in enumerate(counts) if n and column != row]
    frequent = sorted(pairs, key=lambda pair: -pair[0])[:CONFUSIONS]
    if frequent:
        yield ""
        yield "most frequent confusions"
    for count, true, predicted in frequent:
        yield f"  {one_line(true['name'])} taken for {one_line(predicted)}: {count:,} of {true['images']:,}"


def robustness_table(found: dict[str, dict[str, float]], top1: float) -> Table:
    """Top-1 under each corruption at each strength, and what is lost."""
    table = _table("corruption", *(f"strength {strength}" for strength in next(iter(found.values()))))
    for kind, figures in found.items():
        table.add_row(kind, *(f"{each:.2f} ({each - top1:+.2f})".replace("-", "−") for each in figures.values()))
    return table


def comparison(name: str, found: dict[str, Any]) -> str:
    """Two models on the same images."""
    return f"{name} {found['top1']:.2f} %, {found['name']} {found['other_top1']:.2f} %: {in_words(found)}"


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column(first)
    for other in others:
        table.add_column(other, justify="right", no_wrap=True)
    return table
