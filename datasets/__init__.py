"""Data sets by name, any folder or zip file of class folders, and what timm's readers read.

`DATASETS` is the table of names; `load` reads, splits and describes what a `DataConfig` names.
"""

from __future__ import annotations

from typing import Any

from smallvit.datasets.table import DATASETS

__all__ = ["DATASETS", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from smallvit.datasets.source import load  # only now: the table alone needs no torch

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
