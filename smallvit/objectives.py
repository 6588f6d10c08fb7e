"""What training minimises: functions (model, images, targets) -> {"loss": ..., "logits": ...}."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def supervised(
    model: nn.Module,
    images: Float[Tensor, "b c h w"],
    targets: Float[Tensor, "b k"],
    *,
    smoothing: float,
    loss: Literal["ce", "bce"] = "ce",
) -> dict[str, Tensor]:
    """Cross-entropy against label distributions, smoothed, or the classes' binary cross-entropies; in fp32.

    For the latter every label of a mixed image counts as whole, as in DeiT III (arXiv:2204.07118).
    """
    logits = model(images)
    if loss == "bce":
        value = F.binary_cross_entropy_with_logits(logits.float(), targets.gt(0).float())
    else:
        value = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
    return {"loss": value, "logits": logits}
