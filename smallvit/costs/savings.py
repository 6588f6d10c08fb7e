"""How what one-bit layers save is told: columns of tables, and their meaning. Reads plain records, imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

TITLES = {"bops": "BOPs (M)", "ops": "OPs (M)", "packed_bytes": "packed (MB)"}
"""Columns that stand behind that of the MACs where some model has one-bit layers, by the figure that each shows."""
FIGURES = (*TITLES, "float_bytes")
"""What a run's summary says of them; older ones say nothing."""
MEASURES = (
    "BOPs: those MACs whose two factors have one bit each. OPs: BOPs / 64, and all other MACs. Packed: the model's "
    "tensors with one-bit weights kept as bits (each output's filled up to whole bytes, with a scale of 4 bytes), all "
    "others in full precision"
)


def has_bits(record: Mapping[str, Any]) -> bool:
    """Whether one-bit layers save a model operations or bytes; of older records, which do not say, it is none."""
    packed, whole = record.get("packed_bytes"), record.get("float_bytes")
    return bool(record.get("bops")) or (None not in (packed, whole) and packed < whole)


def joined(titles: Mapping[str, str], records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """A table's columns with `TITLES` among them, where some model has one-bit layers."""
    ours = TITLES if any(map(has_bits, records)) else {}
    whole: dict[str, str] = {}
    for name, title in titles.items():
        whole |= {name: title} | (ours if name == "macs" else {})
    return whole


def notes(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """What these columns mean, where they are shown."""
    return [MEASURES] if any(map(has_bits, records)) else []
