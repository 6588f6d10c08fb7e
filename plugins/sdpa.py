"""Compute scaled dot-product attention by the fastest exact path.

In half precision on CPUs, at the head widths of small models, PyTorch's fused kernel is several times slower than two
batched matrix products. In fp32 on CPUs the two are level, and the fused kernel stores no scores, but it computes no
gradient of a bias. On GPUs it is the field's choice. `benchmarks/plugins.py` measures both paths side by side.

Axes: b batch, w windows of an image, h heads, n queries, m keys, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smallvit.plugins.leaf import is_plain

HALF = (torch.bfloat16, torch.float16)
SHORT_ROW = 32
"""Keys that fill a vector of half-precision numbers on the widest CPUs."""


def prefers_fused(device_type: str, dtype: torch.dtype, learned_bias: bool = False) -> bool:
    """Return whether `F.scaled_dot_product_attention` is the fast path for tensors of this device and dtype."""
    return device_type != "cpu" or not (learned_bias or dtype in HALF)


def attend(
    q: Float[Tensor, "*b n d"],
    k: Float[Tensor, "*b m d"],
    v: Float[Tensor, "*b m e"],
    bias: Float[Tensor, "n m"] | Float[Tensor, "#w #h n m"] | None = None,
    dropout: float = 0.0,
    scale: float = 1.0,
) -> Float[Tensor, "*b n e"]:
    """Return softmax(scale · q kᵀ + bias) v, with dropout on the probabilities.

    A bias of w windows serves a batch of images · w, the windows of an image side by side.
    """
    if bias is not None:
        bias = bias.to(q.dtype)
        if bias.ndim > q.ndim:  # a mask of four axes on scores of three, which the kernels of PyTorch 2.11 refuse
            bias = bias.flatten(0, bias.ndim - q.ndim)
    if prefers_fused(q.device.type, q.dtype, bias is not None and bias.requires_grad):
        if is_windowed(q, bias):
            bias = bias.repeat(q.shape[0] // bias.shape[0], 1, 1, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)
    if scale != 1:
        q = q * scale
    batch = q.shape[:-2]
    q, k, v = (tensor.flatten(0, -3) for tensor in (q, k, v))  # a compiler may lay out four axes as an image's
    if bias is not None and bias.ndim == 2:
        scores = torch.baddbmm(bias, q, k.transpose(1, 2))  # adds it for free
    else:
        scores = q @ k.transpose(1, 2)
        if bias is not None:
            scores = add_bias(scores.unflatten(0, batch), bias).flatten(0, -3)
    return (F.dropout(softmax(scores), dropout) @ v).unflatten(0, batch)


def attend_talking(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m d"],
    before: nn.Linear,
    after: nn.Linear,
    drop: nn.Module,
    bias: Float[Tensor, "n m"] | None = None,
) -> Float[Tensor, "b h n d"]:
    """Return attention whose heads are mixed before the softmax and after it (arXiv:2003.02436). Scale q beforehand.

    `drop` is the dropout of the probabilities; `bias` is added between the first mix and the softmax.
    """
    scores = mix_heads(before, q @ k.transpose(-2, -1), bias)
    return drop(mix_heads(after, softmax(scores))) @ v


def mix_heads(mix: nn.Linear, maps: Float[Tensor, "b h n m"], bias: Tensor | None = None) -> Float[Tensor, "b h n m"]:
    """Apply a linear layer over the heads and add a bias (n, m).

    A batched product is faster than moving the heads' axis.
    """
    if not is_plain(mix):
        return add_bias(mix(maps.movedim(1, -1)).movedim(-1, 1), bias)
    offset = maps.new_zeros(1, 1) if mix.bias is None else mix.bias[:, None]
    if bias is not None:
        offset = offset + bias.flatten()
    mixed = torch.baddbmm(
        offset.to(maps.dtype), mix.weight.expand(maps.shape[0], -1, -1).to(maps.dtype), maps.flatten(2)
    )
    return mixed.reshape(*mixed.shape[:2], *maps.shape[2:])  # older PyTorch cannot compile unflatten here


def softmax(scores: Float[Tensor, "*b n m"]) -> Float[Tensor, "*b n m"]:
    """Return the softmax over the keys. Short rows in half precision are computed in fp32, much faster on CPUs."""
    if scores.device.type == "cpu" and scores.shape[-1] < SHORT_ROW and scores.dtype in HALF:
        return scores.softmax(dim=-1, dtype=torch.float32).to(scores.dtype)
    return scores.softmax(dim=-1)


def add_bias(scores: Float[Tensor, "*b n m"], bias: Tensor | None) -> Float[Tensor, "*b n m"]:
    """Return scores plus a bias that broadcasts to them, or one of the windows of an image."""
    if bias is None:
        return scores
    if is_windowed(scores, bias):
        return (scores.unflatten(0, (-1, bias.shape[0])) + bias).flatten(0, 1)
    return scores + bias


def is_windowed(scores: Tensor, bias: Tensor | None) -> bool:
    """Return whether the first axis of a bias are windows, fewer than the batch."""
    return bias is not None and bias.ndim == 4 and 1 < bias.shape[0] < scores.shape[0]


def set_fused_attention(model: nn.Module, device_type: str, dtype: torch.dtype) -> None:
    """Let timm's attention layers use the same path as patched ones, for fair comparisons.

    `dtype` is that of the matrix products: bfloat16 under bf16 autocast. Layers with a learned bias on their scores
    (Swin, BEiT, relative positions) keep timm's setting, and patched layers choose the path themselves.
    """
    for module in model.modules():
        kept = getattr(module, "chooses_kernel", False) or hasattr(module, "relative_position_bias_table")
        if hasattr(module, "fused_attn") and not kept:
            module.fused_attn = prefers_fused(device_type, dtype)
