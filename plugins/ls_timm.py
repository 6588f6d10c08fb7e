"""Multiply the output of attention's projection by a learned factor per channel: y = λ ⊙ (W x + b).

Source: CaiT (arXiv:2103.17239).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smallvit.plugins.base import Init, Site
from smallvit.plugins.leaf import Adapter
from smallvit.plugins.ls import LSConfig


class ScaledLinear(Adapter, nn.Linear):
    """A linear layer whose outputs are multiplied by a factor per channel."""

    added = ("scale",)

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b d"]:
        return super().forward(x) * self.scale


ADAPTER = ScaledLinear


def sites(model: nn.Module, config: LSConfig, init: Init) -> Iterator[Site]:
    """Yield the projection of every attention layer."""
    for name, layer in model.named_modules():
        if name.endswith("attn.proj") and not isinstance(layer, ScaledLinear):
            yield Site(name, layer, None if type(layer) is nn.Linear else "it is not a linear layer")


def apply(model: nn.Module, site: Site, config: LSConfig, init: Init) -> None:
    """Add the factors to a projection."""
    layer = site.layer
    layer.__class__ = ScaledLinear
    value = 1.0 if init == "preserve" else config.init
    layer.scale = nn.Parameter(torch.full_like(layer.weight[:, 0], value))


def describe(layer: ScaledLinear) -> str:
    """Describe the change."""
    return f"{layer.out_features} factors of attention's output"


def describe_loss(layer: ScaledLinear) -> str | None:
    """Return the factors, unless they are 1."""
    return None if (layer.scale == 1).all() else "the learned factors of attention's output"
