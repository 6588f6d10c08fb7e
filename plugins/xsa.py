"""Configure and register exclusive self-attention; `xsa_timm` has the equation."""

from __future__ import annotations

from dataclasses import dataclass

from smallvit.plugins.base import Citation, Plugin, PluginConfig


@dataclass(frozen=True, kw_only=True)
class XSAConfig(PluginConfig):
    """Exclusive self-attention in the last blocks: a token's output has no component along its own value."""

    layers: int = 4
    """Number of attention layers, counted from the last."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 1:
            raise ValueError(f"layers {self.layers}: expected at least 1")


XSA = Plugin(
    name="xsa",
    label="XSA",
    title="exclusive self-attention",
    config=XSAConfig,
    citation=Citation("zhai2026exclusive", "Exclusive Self Attention", "Zhai, Shuangfei", "2603.09078", 2026),
)
