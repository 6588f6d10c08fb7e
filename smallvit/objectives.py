"""What training minimises: functions (model, images, targets) -> {"loss": ..., "logits": ...}."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def supervised(
    model: nn.Module, images: Float[Tensor, "b c h w"], targets: Float[Tensor, "b k"], *, smoothing: float
) -> dict[str, Tensor]:
    """Cross-entropy against label distributions, smoothed; the loss in fp32."""
    logits = model(images)
    return {"loss": F.cross_entropy(logits.float(), targets, label_smoothing=smoothing), "logits": logits}
