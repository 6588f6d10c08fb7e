"""Scaled dot-product attention by the fastest exact path, chosen here and nowhere else.

In half precision on CPUs, at the head widths of small models, PyTorch's fused kernel is several times slower than two
batched matrix products. In fp32 on CPUs the two are level, and the fused kernel stores no scores; on GPUs it is the
field's choice. `benchmarks/plugins.py` measures both paths side by side.

Axes: b batch, h heads, n queries, m keys, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def prefers_fused(device_type: str, dtype: torch.dtype) -> bool:
    """Whether `F.scaled_dot_product_attention` is the fast path for tensors of this device and dtype."""
    return device_type != "cpu" or dtype not in (torch.bfloat16, torch.float16)


def attend(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m d"],
    bias: Float[Tensor, "n m"] | Float[Tensor, "#b #h n m"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "b h n d"]:
    """softmax(q kᵀ + bias) v, with dropout on the probabilities. Scale q beforehand."""
    if bias is not None:
        bias = bias.to(q.dtype)
    if prefers_fused(q.device.type, q.dtype):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=1.0)
    if bias is not None and bias.ndim == 2:
        product = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))  # adds it for free
        scores = product.unflatten(0, q.shape[:2])
    else:
        scores = q @ k.transpose(-2, -1)
        scores = scores if bias is None else scores + bias
    return F.dropout(scores.softmax(dim=-1), dropout) @ v


def set_fused_attention(model: nn.Module, device_type: str, dtype: torch.dtype) -> None:
    """Put timm's own attention layers on the same path, so that plain and patched models compare fairly.

    `dtype` is what the matrix products run in: bfloat16 under bf16 autocast.
    """
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = prefers_fused(device_type, dtype)
