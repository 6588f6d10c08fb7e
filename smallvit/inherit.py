"""What a run takes over from the trained weights that it begins with."""

from __future__ import annotations

from smallvit.config import Config

ARCH = "vit"
"""The architecture where none is named."""


def inherited(config: Config) -> Config:
    """The configuration with the model that it leaves open: that of --init, or the default."""
    return config if config.model.arch is not None else config.replace(arch=ARCH)
