"""Configure and register LayerScale; `ls_timm` has the equation."""

from __future__ import annotations

from dataclasses import dataclass

from smallvit.plugins.base import Citation, Plugin, PluginConfig


@dataclass(frozen=True, kw_only=True)
class LSConfig(PluginConfig):
    """LayerScale on the output of attention: a learned factor per channel."""

    init: float = 0.1
    """Initial value of the factors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.init > 0:
            raise ValueError(f"init {self.init}: expected a number above 0")


LS = Plugin(
    name="ls",
    label="LS",
    title="LayerScale",
    config=LSConfig,
    citation=Citation(
        "touvron2021going", "Going deeper with Image Transformers", "Touvron, Hugo and others", "2103.17239", 2021
    ),
)
