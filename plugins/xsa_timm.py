"""Apply exclusive self-attention (XSA) to timm's attention layers, those with LSA included.

    zᵢ = yᵢ − (yᵢ·vᵢ) vᵢ / ‖vᵢ‖²,    y = attention(q, k, v), per head

Source: arXiv:2603.09078, for language models. A token's output has no component along its own value, as LSA's mask
keeps a token from attending to itself. There are no parameters.

The class of a layer changes in place. Its `forward` runs unchanged while a mode changes what the attention returns.

Axes: b batch (and heads), n tokens, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models import efficientvit_msra, levit, shvit
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from smallvit.plugins import lsa_timm  # noqa: F401, registers the adapters
from smallvit.plugins.base import Init, Site
from smallvit.plugins.binary_layers import Binary
from smallvit.plugins.leaf import Derived, derive
from smallvit.plugins.lsa_layer import Locality
from smallvit.plugins.xsa import XSAConfig

CHANNELS_FIRST = (efficientvit_msra.CascadedGroupAttention, shvit.SHSA, levit.Attention)
"""Classes whose values are, or can be, matrices of channels by tokens."""
SOFTMAX = {Tensor.softmax, torch.softmax, F.softmax}
PRODUCT = {Tensor.matmul, Tensor.__matmul__, torch.matmul, Tensor.bmm, torch.bmm}


def exclude(y: Float[Tensor, "*b n d"], v: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
    """Return the part of each vector of y that is orthogonal to that of v; all of it where v is zero."""
    squares = (v * v).sum(dim=-1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
    return y - (y * v).sum(dim=-1, keepdim=True) / squares * v


class Exclusive(Derived):
    """Mixin of an attention class: outputs have no component along the token's own value."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with ExcludedValues():
            return super().forward(*args, **kwargs)


ADAPTER = Exclusive


class ExcludedValues(TorchFunctionMode):
    """Mode in which the fused kernel, or the first product after a softmax, returns exclusive outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.has_probabilities = False

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is F.scaled_dot_product_attention:
            return exclude(result, args[2])
        if function in SOFTMAX:
            self.has_probabilities = True
        elif self.has_probabilities and function in PRODUCT:
            self.has_probabilities = False
            return exclude(result, args[1])
        return result


def sites(model: nn.Module, config: XSAConfig, init: Init) -> Iterator[Site]:
    """Yield the last attention layers whose queries are the keys."""
    layers = [(name, layer) for name, layer in model.named_modules() if _attends_to_itself(layer)]
    for name, layer in layers[-config.layers :]:
        if not isinstance(layer, Exclusive):
            yield Site(name, layer, _refusal(layer, init))


def apply(model: nn.Module, site: Site, config: XSAConfig, init: Init) -> None:
    """Make an attention layer exclusive."""
    site.layer.__class__ = derive(Exclusive, type(site.layer))


def describe(layer: nn.Module) -> str:
    """Describe the change."""
    return "outputs have no component along the token's own value"


def describe_loss(layer: nn.Module) -> str:
    """Return the whole change, which has no parameters."""
    return "exclusive self-attention (outputs have a component along the token's own value again)"


def _attends_to_itself(layer: nn.Module) -> bool:
    adapter = layer if isinstance(layer, Locality) else Locality.adapters.get(type(layer))
    return isinstance(layer, Exclusive) or (adapter is not None and adapter.has_diagonal)


def _refusal(layer: nn.Module, init: Init) -> str | None:
    """Return why a layer cannot be changed, if it cannot."""
    if init == "preserve":
        return "it changes the outputs; use init='paper'"
    if isinstance(layer, Binary):
        return "its attention has one bit"
    if isinstance(layer, CHANNELS_FIRST):
        return "its values have channels before tokens"
    adapter = type(layer) if isinstance(layer, Locality) else Locality.adapters[type(layer)]
    return adapter.refusal(layer)
