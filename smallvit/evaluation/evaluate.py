"""Compute a model's accuracy and loss over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smallvit.datasets.loader import IGNORED_LABEL
from smallvit.utils.distributed import is_sharded
from smallvit.utils.errors import InputError
from smallvit.utils.hardware import autocast


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    flip: bool = False,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> dict[str, float]:
    """Compute top-1 accuracy in percent and mean cross-entropy over batches.

    Args:
        model: The model.
        batches: Normalized images (b, c, h, w) and labels (b,); images labeled `IGNORED_LABEL` are not counted.
        device: The model's device.
        dtype: Precision of matrix products.
        flip: Average the probabilities over each image and its mirror image.
        total: Adds up sums over torchrun's processes.

    Returns:
        `top1`, `loss`, and the number of `images`.

    Raises:
        InputError: There are no images.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(3, device=device)
    without_gradients = torch.no_grad if is_sharded(model) else torch.inference_mode  # FSDP keeps gathered weights
    for images, labels in batches:
        with without_gradients():
            logits = compute_logits(model, images, device, dtype, flip=flip)
            loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED_LABEL)
            sums += torch.stack([(logits.argmax(dim=1) == labels).sum(), loss, (labels != IGNORED_LABEL).sum()])
    model.train(training)
    correct, loss, count = total(sums).tolist()
    if not count:
        raise InputError("none of the images can be decoded")
    return {"top1": 100 * correct / count, "loss": loss / count, "images": int(count)}


def compute_logits(
    model: nn.Module, images: Float[Tensor, "b c h w"], device: torch.device, dtype: torch.dtype, *, flip: bool = False
) -> Float[Tensor, "b k"]:
    """Compute logits in fp32; with `flip`, the log of the mean probabilities for each image and its mirror image.

    Raises:
        InputError: Logits are not finite in fp16.
    """
    with autocast(device, dtype):
        logits = model(images).float()
        mirrored = model(images.flip(-1)).float() if flip else None
    if dtype == torch.float16 and not logits.isfinite().all():
        raise InputError("--amp fp16: the model's logits are not finite in fp16; use --amp off")
    if mirrored is None:
        return logits
    from smallvit.plugins.distillation import average_probabilities

    return average_probabilities(torch.stack([logits, mirrored]))
