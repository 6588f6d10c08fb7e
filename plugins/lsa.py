"""Configure and register locality self-attention; `lsa_layer` has the equation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from smallvit.plugins.base import Plugin, PluginConfig
from smallvit.plugins.spt import SPT


@dataclass(frozen=True, kw_only=True)
class LSAConfig(PluginConfig):
    """Locality self-attention in every block."""

    temperature: Literal["head", "layer", "fixed"] = "head"
    """One learned temperature per head (the paper's), one per layer, or timm's constant scale."""
    mask: bool = True
    """Mask the diagonal, so that no token attends to itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature == "fixed" and not self.mask:
            raise ValueError("temperature fixed without a mask changes nothing; remove one of the two")


LSA = Plugin(
    name="lsa",
    label="LSA",
    title="locality self-attention",
    config=LSAConfig,
    gradual=True,
    citation=SPT.citation,
)
