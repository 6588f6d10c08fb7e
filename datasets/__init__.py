"""Load image classification data sets: by name, from a folder or zip file, or from the Hugging Face Hub.

`DATASETS` lists the data sets known by name; `create_dataset` reads, splits and describes what a `DataConfig` names.
"""

from __future__ import annotations

from typing import Any

from smallvit.datasets.catalog import DATASETS

__all__ = ["DATASETS", "create_dataset", "create_pool"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # imported on first use, as DATASETS alone needs no torch
        from smallvit.datasets import factory

        return getattr(factory, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
