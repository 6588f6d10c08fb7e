"""Format tables for Markdown and CSV, and means with their spread."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smallvit.utils.files import write_text

MISSING = "–"
"""Cell without a value."""


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation of the sample (n - 1; None for a single value) and number of values."""

    mean: float
    std: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarize one or more values."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    def __format__(self, spec: str) -> str:
        """Format as "mean ± std", both by a number's format."""
        return format(self.mean, spec) + ("" if self.std is None else f" ± {self.std:{spec.lstrip('+')}}")


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table. The first row is the header; the first column is left-aligned."""
    header, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_csv(records: list[dict[str, Any]], path: Path) -> None:
    """Write records as CSV with one line each; None becomes an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_text(path, text.getvalue())


BINARY_TITLES = {"bops": "BOPs (M)", "ops": "OPs (M)", "packed_bytes": "packed (MB)"}
"""Columns of one-bit layers, shown after the MACs where a model has such layers."""
BINARY_FIGURES = (*BINARY_TITLES, "float_bytes")
"""Values about one-bit layers in a run's summary."""
BINARY_NOTE = (
    "BOPs: the MACs whose two factors have one bit each. OPs: BOPs / 64, plus all other MACs. Packed: the model's "
    "tensors with one-bit weights stored as bits (each output padded to whole bytes, with a scale of 4 bytes), all "
    "others in full precision"
)


def has_binary_savings(record: Mapping[str, Any]) -> bool:
    """Return whether one-bit layers save a model operations or bytes; older records do not hold these values."""
    packed, full = record.get("packed_bytes"), record.get("float_bytes")
    return bool(record.get("bops")) or (None not in (packed, full) and packed < full)


def with_binary_columns(titles: Mapping[str, str], records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Insert the columns of one-bit layers after the MACs if some model has such layers."""
    binary = BINARY_TITLES if any(map(has_binary_savings, records)) else {}
    columns: dict[str, str] = {}
    for name, title in titles.items():
        columns |= {name: title} | (binary if name == "macs" else {})
    return columns


def binary_notes(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the explanation of the columns of one-bit layers if they are shown."""
    return [BINARY_NOTE] if any(map(has_binary_savings, records)) else []
