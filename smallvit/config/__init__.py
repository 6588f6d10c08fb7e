"""Define every option of a training run as frozen dataclasses, the recipes, and the spec string."""

from importlib import import_module
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name == "recipes":  # imported on first use
        return import_module("smallvit.config.recipes")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
