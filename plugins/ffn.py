"""Configure and register the depthwise FFN; `ffn_timm` has the equation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from smallvit.plugins.base import Citation, Plugin, PluginConfig

DHVT = Citation(
    "lu2022bridging",
    "Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small Datasets",
    "Lu, Zhiying and Xie, Hongtao and Liu, Chuanbin and Zhang, Yongdong",
    "2210.05958",
    2022,
)


@dataclass(frozen=True, kw_only=True)
class FFNConfig(PluginConfig):
    """Depthwise convolution over the patch grid in every MLP."""

    residual: bool = True
    """Add the convolution's output to the hidden features (DHVT), instead of replacing them (LocalViT, CeiT)."""
    norm: bool = True
    """Apply batch norm to the convolution's output."""
    zero: bool = False
    """Start the convolution's branch at zero, as --plugin-init preserve does."""
    class_token: Literal["mlp", "reweight"] = "mlp"
    """Prefix tokens pass the MLP without the convolution, or are multiplied by factors from the mean patch (DHVT)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero and not self.residual:
            raise ValueError("zero without residual gives zero outputs; remove one of the two")


FFN = Plugin(
    name="ffn",
    label="FFN",
    title="depthwise convolution in the MLP",
    config=FFNConfig,
    citation=DHVT,
    whole_grid=True,
)
