"""Configure and register shifted patch tokenization; `spt_layer` has the equation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from smallvit.plugins.base import Citation, Plugin, PluginConfig


@dataclass(frozen=True, kw_only=True)
class SPTConfig(PluginConfig):
    """Shifted patch tokenization in the patch embedding and where patches are merged."""

    directions: Literal["diagonal", "cardinal", "all"] = "diagonal"
    """Directions of the shifted views: four diagonal (the paper's), four cardinal, or all eight."""
    shift: float = 0.5
    """Distance of the shifted views as a fraction of the patch, rounded down, at least one pixel."""
    norm: bool = True
    """Apply LayerNorm to all views together before projecting them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.shift <= 1:
            raise ValueError(f"shift {self.shift}: expected a fraction of the patch above 0, at most 1")


SPT = Plugin(
    name="spt",
    label="SPT",
    title="shifted patch tokenization",
    config=SPTConfig,
    citation=Citation(
        "lee2021vision",
        "Vision Transformer for Small-Size Datasets",
        "Lee, Seung Hoon and Lee, Seunghyun and Song, Byung Cheol",
        "2112.13492",
        2021,
    ),
)
