"""How well a model does on a split."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smallvit.hardware import autocast


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Top-1 accuracy in per cent and mean cross-entropy over batches of images (b, c, h, w) and labels (b,)."""
    training = model.training
    model.eval()
    correct, loss, count = torch.zeros((), device=device), torch.zeros((), device=device), 0
    for images, labels in batches:
        with autocast(device, dtype):
            logits = model(images).float()
        correct += (logits.argmax(dim=1) == labels).sum()
        loss += F.cross_entropy(logits, labels, reduction="sum")
        count += len(labels)
    model.train(training)
    return {"top1": 100 * correct.item() / count, "loss": loss.item() / count}
