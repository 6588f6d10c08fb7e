"""How well a model does on a split."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smallvit.errors import InputError
from smallvit.hardware import autocast


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    flip: bool = False,
) -> dict[str, float]:
    """Top-1 accuracy in per cent and mean cross-entropy over batches of images (b, c, h, w) and labels (b,).

    With `flip`, of the mean probabilities for each image and its mirror image. `images` is how many were judged.

    Raises:
        InputError: there are none.
    """
    training = model.training
    model.eval()
    correct, loss, count = torch.zeros((), device=device), torch.zeros((), device=device), 0
    for images, labels in batches:
        with autocast(device, dtype):
            logits = model(images).float()
            if flip:
                both = torch.stack([logits, model(images.flip(-1)).float()])
                logits = both.log_softmax(-1).logsumexp(0) - math.log(2)  # of the mean probabilities
        correct += (logits.argmax(dim=1) == labels).sum()
        loss += F.cross_entropy(logits, labels, reduction="sum")
        count += len(labels)
    model.train(training)
    if not count:
        raise InputError("none of the images to be judged can be decoded")
    return {"top1": 100 * correct.item() / count, "loss": loss.item() / count, "images": count}
