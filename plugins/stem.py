"""Configure and register the convolutional stem; `stem_timm` has the equation."""

from __future__ import annotations

from dataclasses import dataclass

from smallvit.plugins.base import Plugin, PluginConfig
from smallvit.plugins.ffn import DHVT


@dataclass(frozen=True, kw_only=True)
class StemConfig(PluginConfig):
    """Strided 3x3 convolutions instead of the patch embedding; cannot be combined with SPT."""

    norm: bool = True
    """Apply batch norm after each convolution."""


STEM = Plugin(
    name="stem",
    label="Stem",
    title="convolutional stem",
    config=StemConfig,
    excludes=("spt",),
    citation=DHVT,
)
