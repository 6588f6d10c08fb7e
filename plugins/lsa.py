"""Locality self-attention (LSA): a learnt temperature per head, and no token attends to itself.

    LSA(x) = softmax(M(q kᵀ · t)) v,    M(S)ᵢⱼ = Sᵢⱼ for i ≠ j, −∞ for i = j

Source: Lee, Lee, Song 2021, "Vision Transformer for Small-Size Datasets", arXiv:2112.13492, §3.3. `t` multiplies
the scores (the paper's 1/τ), one per head, and starts at head_dim^-0.5. The class token is masked like any other.

For models that are trained already, the diagonal can be closed bit by bit: with openness o from 1 to 0, each
token's own weight exp(Sᵢᵢ) counts o-fold. At o = 1 this is plain attention, at o = 0 it is LSA.

Differs from the official code: where a token has nothing else to attend to (a single token, or a mask that hides
all others), it attends to itself instead of giving NaN. `t` is kept out of weight decay: it is one-dimensional,
and timm's parameter groups exempt such parameters.

Axes: b batch, h heads, n tokens, d head width, c = h·d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from smallvit.plugins.attend import attend

HIDDEN = -1e4
"""What a mask adds to scores that shall not count, at most; some write this, some the least number, some −∞."""


@dataclass(frozen=True, kw_only=True)
class LSAConfig:
    """The variants of locality self-attention; the defaults are the paper's."""

    temperature: Literal["head", "layer", "fixed"] = "head"
    """One learnt temperature per head, one per layer, or the layer's own constant."""
    mask: bool = True
    """Whether tokens are kept from attending to themselves."""

    def __post_init__(self) -> None:
        if self.temperature not in ("head", "layer", "fixed"):
            raise ValueError(f"temperature {self.temperature!r}: expected head, layer or fixed")
        if self.temperature == "fixed" and not self.mask:
            raise ValueError("LSAConfig(temperature='fixed', mask=False) would change nothing")


def diagonal_bias(n: int, like: Tensor, openness: Tensor | None = None) -> Float[Tensor, "n n"] | None:
    """The bias that hides every token from itself, log(openness) on the diagonal; none for a single token."""
    if n == 1:
        return None
    if openness is not None:
        return torch.diag(openness.log().to(like.dtype).expand(n))
    itself = torch.eye(n, dtype=torch.bool, device=like.device)
    return like.new_zeros(n, n).masked_fill(itself, float("-inf"))


def merge_masks(
    bias: Float[Tensor, "n n"] | None, attn_mask: Bool[Tensor, ...] | Float[Tensor, ...]
) -> Float[Tensor, "#b #h n n"]:
    """Add a caller's mask (True = may attend, or an additive bias), keeping self-attention as the last resort.

    It is that of tokens whose mask is at most `HIDDEN` for all others.
    """
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=torch.float32).masked_fill_(~attn_mask, float("-inf"))
    attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    if bias is None:
        return attn_mask
    itself = torch.eye(bias.shape[-1], dtype=torch.bool, device=bias.device)
    alone = ((attn_mask <= HIDDEN) | itself).all(dim=-1, keepdim=True)
    return (attn_mask + bias).masked_fill(alone & itself, 0.0)


def locality_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    temperature: Float[Tensor, " h"],
    attn_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "b h n d"]:
    """Attention without the diagonal, scores multiplied by a temperature per head.

    `attn_mask` broadcasts to (b, h, n, n): boolean (True = may attend) or additive. `dropout` acts on the
    attention probabilities. Source: arXiv:2112.13492, §3.3.
    """
    bias = diagonal_bias(q.shape[-2], q)
    if attn_mask is not None:
        bias = merge_masks(bias, attn_mask)
    q = q * temperature.to(q.dtype)[:, None, None]
    return attend(q, k, v, bias, dropout)


def keep_alone(
    bias: Float[Tensor, "n n"] | None, alone: Bool[Tensor, "w n"] | None
) -> Float[Tensor, "n n"] | Float[Tensor, "w 1 n n"] | None:
    """The diagonal's bias, but none for tokens that have nothing else to attend to."""
    if bias is None or alone is None:
        return bias
    return torch.where(torch.diag_embed(alone), 0.0, bias)[:, None]
