"""Locality self-attention (LSA): a learnt temperature per head, and no token attends to itself.

    LSA(x) = softmax(M(q kᵀ · t)) v,    M(S)ᵢⱼ = Sᵢⱼ for i ≠ j, −∞ for i = j

Source: Lee, Lee, Song 2021, "Vision Transformer for Small-Size Datasets", arXiv:2112.13492, §3.3. `t` multiplies
the scores (the paper's 1/τ), one per head, and starts at head_dim^-0.5. The class token is masked like any other.

Differs from the official code: where a token has nothing else to attend to (a single token, or a mask that hides
all others), it attends to itself instead of giving NaN. `t` is kept out of weight decay: it is one-dimensional,
and timm's parameter groups exempt such parameters.

Axes: b batch, h heads, n tokens, d head width, c = h·d.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from timm.layers import Attention
from torch import Tensor, nn

from smallvit.plugins.attend import attend


def diagonal_bias(n: int, like: Tensor) -> Float[Tensor, "n n"] | None:
    """The bias that hides every token from itself: −∞ on the diagonal, 0 elsewhere; none for a single token."""
    if n == 1:
        return None
    return torch.zeros(n, n, device=like.device, dtype=like.dtype).fill_diagonal_(float("-inf"))


def merge_masks(
    bias: Float[Tensor, "n n"] | None, attn_mask: Bool[Tensor, ...] | Float[Tensor, ...]
) -> Float[Tensor, "#b #h n n"]:
    """Add a caller's mask (True = may attend, or an additive bias), keeping self-attention as the last resort."""
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=torch.float32).masked_fill_(~attn_mask, float("-inf"))
    attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    merged = attn_mask if bias is None else attn_mask + bias
    nothing_left = merged.isneginf().all(dim=-1, keepdim=True)
    itself = torch.eye(merged.shape[-1], dtype=torch.bool, device=merged.device)
    return merged.masked_fill(nothing_left & itself, 0.0)


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


class LocalitySelfAttention(nn.Module):
    """Multi-head locality self-attention with the parameter names of `timm.layers.Attention`.

    Tokens (b, n, dim) in, (b, n, dim) out. Beside `qkv` and `proj` it holds `temperature`, of shape (num_heads,).

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.full((num_heads,), (dim // num_heads) ** -0.5))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = nn.Identity()
        self.gate: nn.Module | None = None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Float[Tensor, "b n c"], attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Float[Tensor, "b n c"]:
        if is_causal:
            attn_mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril_()
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        dropout = self.attn_drop.p if self.training else 0.0
        y = locality_attention(self.q_norm(q), self.k_norm(k), v, self.temperature, attn_mask, dropout)
        y = self.norm(rearrange(y, "b h n d -> b n (h d)"))
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(y))

    @classmethod
    def from_timm(cls, attention: Attention) -> LocalitySelfAttention:
        """Take the place of a timm attention layer: its layers are shared, only the temperature is new."""
        with torch.device("meta"):  # only the structure: every layer below is replaced
            lsa = cls(attention.qkv.out_features // 3, attention.num_heads)
        start = torch.full((attention.num_heads,), attention.scale)
        lsa.temperature = nn.Parameter(start.to(attention.qkv.weight))
        for name, layer in attention.named_children():
            setattr(lsa, name, layer)
        return lsa.train(attention.training)

    def to_timm(self, attention: Attention) -> Attention:
        """Hand the layers back to the timm layer they came from."""
        for name, layer in self.named_children():
            if hasattr(attention, name):
                setattr(attention, name, layer)
        return attention.train(self.training)
