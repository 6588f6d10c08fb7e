"""Configure and register one-bit layers; `binary_layers` has the equations."""

from __future__ import annotations

from dataclasses import dataclass

from smallvit.plugins.base import Citation, Plugin, PluginConfig


@dataclass(frozen=True, kw_only=True)
class BinaryConfig(PluginConfig):
    """One-bit weights, activations and attention in every block; binaryvit has them by default."""

    weights: bool = True
    """One-bit weights of linear layers and convolutions."""
    activations: bool = True
    """One-bit inputs of these layers, with a learned threshold per channel."""
    attention: bool = True
    """One-bit queries, keys, values and attention maps."""
    downsampling: bool = True
    """Apply to the layers that merge patches, too."""
    shortcut: bool = True
    """Add batch norms, shortcuts and RPReLUs to one-bit layers of other models than binaryvit."""
    step: float = 0.005
    """Initial step size of one-bit attention maps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.step > 0:
            raise ValueError(f"step {self.step}: expected a number above 0")


BINARY = Plugin(
    name="binary",
    label="binary",
    title="one-bit layers",
    config=BinaryConfig,
    citation=Citation(
        "le2023binaryvit",
        "BinaryViT: Pushing Binary Vision Transformers Towards Convolutional Models",
        "Le, Phuoc-Hoan Charles and Li, Xinlin",
        "2306.16678",
        2023,
    ),
    strict=True,
)
