"""Run folders to pictures and tables. Reads plain records, imports no torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from smallvit.costs import savings
from smallvit.files import replacing, write_text
from smallvit.runs import best_epoch

WIDEST = 1000
"""Columns of a table in the terminal."""


def plot_curves(history: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss, accuracy and learning rate over the epochs, as a PNG."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    epochs = [line["epoch"] for line in history]
    style = {"marker": "o", "markersize": 3} if len(epochs) < 30 else {}
    loss.plot(epochs, [line["train_loss"] for line in history], label="training (augmented)", **style)
    validated = [line for line in history if line["val_top1"] is not None]
    tested = [line["epoch"] for line in validated]
    loss.plot(tested, [line["val_loss"] for line in validated], label="validation", **style)
    loss.set(ylabel="cross-entropy")
    loss.legend()
    accuracy.plot(tested, [line["val_top1"] for line in validated], color="C1", label="validation", **style)
    if (best := best_epoch(history)) is not None:
        accuracy.plot(best["epoch"], best["val_top1"], "k*", label=f"best: {best['val_top1']:.2f} %")
    accuracy.set(ylabel="top-1 accuracy (%)")
    accuracy.legend(loc="lower right")
    rate.plot(epochs, [line["lr"] for line in history], color="C2", **style)
    rate.set(ylabel="learning rate")
    for axes in (loss, accuracy, rate):
        axes.set(xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


TITLES = {
    "model": "model",
    "test_top1": "test top-1 (%)",
    "seeds": "seeds",
    "parameters": "parameters",
    "macs": "MACs (M)",
    "train_images_per_second": "train images/s",
    "inference_images_per_second": "inference images/s",
    "latency_ms": "latency (ms)",
    "peak_memory_bytes": "memory (MB)",
    "images_seen": "images seen",
}
"""A comparison's columns for people, by the figure that each shows; `savings.joined` adds those of one-bit layers."""


def comparison_table(records: list[dict[str, Any]]) -> Table:
    """A comparison for the terminal; `records` are those of `Standing.record`."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    titles = savings.joined(TITLES, records)
    for name, title in titles.items():
        table.add_column(title.replace(" ", "\n", 1), justify="left" if name == "model" else "right", no_wrap=True)
    for record in records:
        table.add_row(*(Text(cell(record, name)) for name in titles))
    return table


def comparison_page(records: list[dict[str, Any]], lines: list[str], title: str, picture: str | None) -> str:
    """A comparison in Markdown: the table, lines that say how it came about, and a picture, if there is one."""
    titles = savings.joined(TITLES, records)
    table = markdown([list(titles.values()), *([cell(record, name) for name in titles] for record in records)])
    said = "\n".join(f"- {line}" for line in lines)
    return f"# {title}\n\n{table}\n\n{said}\n" + (f"\n![accuracy against speed]({picture})\n" if picture else "")


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first row is its head, the first column stands left, the others right."""
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def widen(console: Console, table: Table) -> None:
    """Give a console the columns that a table needs, so that no figure is cut."""
    needed = Measurement.get(console, console.options.update(width=WIDEST), table).maximum
    console.width = max(console.width, needed)


def write_csv(records: list[dict[str, Any]], path: Path) -> None:
    """Plain numbers, one line a record; what is not known is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_text(path, text.getvalue())


def cell(record: dict[str, Any], name: str) -> str:
    """A figure in words."""
    value = record[name]
    if value is None:
        return "–"
    match name:
        case "model":
            return value
        case "test_top1":
            spread = record["test_top1_std"]
            return f"{value:.2f}" + ("" if spread is None else f" ± {spread:.2f}")
        case "seeds":
            return str(value) if value == record["seeds_wanted"] else f"{value} of {record['seeds_wanted']}"
        case "macs" | "bops" | "ops":
            return f"{value / 1e6:,.1f}"
        case "packed_bytes":
            return f"{value / 1e6:,.2f}"
        case "peak_memory_bytes":
            return f"{value / 1e6:,.0f}"
        case "latency_ms":
            return f"{value:.2f}"
        case _:
            return f"{value:,.0f}"
