"""How well a model does on a split."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smallvit.datasets.sampling import UNJUDGED
from smallvit.distributed import is_sharded
from smallvit.errors import InputError
from smallvit.hardware import autocast
from smallvit.plugins.distillation import mean_probabilities


def batch_size(device: torch.device) -> int:
    """Images that are judged at once; on CPUs the cache decides."""
    return 128 if device.type == "cpu" else 1024


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    flip: bool = False,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> dict[str, float]:
    """Top-1 accuracy in per cent and mean cross-entropy over batches of images (b, c, h, w) and labels (b,).

    With `flip`, of the mean probabilities for each image and its mirror image. `images` is how many were judged: all
    but those labelled `UNJUDGED`. `total` adds up sums over torchrun's processes.

    Raises:
        InputError: there are none.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(3, device=device)
    without_gradients = torch.no_grad if is_sharded(model) else torch.inference_mode  # what is gathered is kept
    for images, labels in batches:
        with without_gradients():
            logits = answer(model, images, device, dtype, flip=flip)
            loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=UNJUDGED)
            sums += torch.stack([(logits.argmax(dim=1) == labels).sum(), loss, (labels != UNJUDGED).sum()])
    model.train(training)
    correct, loss, count = total(sums).tolist()
    if not count:
        raise InputError("none of the images to be judged can be decoded")
    return {"top1": 100 * correct / count, "loss": loss / count, "images": int(count)}


def answer(
    model: nn.Module, images: Float[Tensor, "b c h w"], device: torch.device, dtype: torch.dtype, *, flip: bool = False
) -> Float[Tensor, "b k"]:
    """Logits in fp32; with `flip`, the logarithm of the mean probabilities for each image and its mirror image."""
    with autocast(device, dtype):
        logits = model(images).float()
        mirrored = model(images.flip(-1)).float() if flip else None
    return logits if mirrored is None else mean_probabilities(torch.stack([logits, mirrored]))
