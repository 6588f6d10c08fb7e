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
    """Compute accuracy, macro F1 and balanced accuracy in percent, and mean cross-entropy over batches.

    Macro F1 and balanced accuracy are scikit-learn's for labels=classes with images, means over these.

    Args:
        model: The model.
        batches: Normalized images (b, c, h, w) and labels (b,); images labeled `IGNORED_LABEL` are not counted.
        device: The model's device.
        dtype: Precision of matrix products.
        flip: Average the probabilities over each image and its mirror image.
        total: Adds up sums over torchrun's processes.

    Returns:
        `top1`, `macro_f1`, `balanced_accuracy`, `loss`, and the number of `images`.

    Raises:
        InputError: There are no images.
    """
    training = model.training
    model.eval()
    sums: Tensor | float = 0.0
    without_gradients = torch.no_grad if is_sharded(model) else torch.inference_mode  # FSDP keeps gathered weights
    for images, labels in batches:
        with without_gradients():
            logits = compute_logits(model, images, device, dtype, flip=flip)
            loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED_LABEL)
            predicted, counted = logits.argmax(dim=1), labels != IGNORED_LABEL
            classes = torch.stack([labels, labels, predicted]).clamp(min=0)
            values = torch.stack([predicted == labels, counted, counted]).float()
            counts = logits.new_zeros(3, logits.shape[1]).scatter_add_(1, classes, values)
            sums += torch.cat([loss[None], counts.flatten()])
    model.train(training)
    loss, *counts = total(sums).cpu().double().split([1, *3 * [(len(sums) - 1) // 3]])
    correct, images, predicted = counts  # of each class
    if not (count := images.sum().item()):
        raise InputError("none of the images can be decoded")
    present = images > 0
    return {
        "top1": 100 * correct.sum().item() / count,
        "macro_f1": 100 * (2 * correct / (images + predicted))[present].mean().item(),
        "balanced_accuracy": 100 * (correct / images)[present].mean().item(),
        "loss": loss.item() / count,
        "images": int(count),
    }


def compute_logits(
    model: nn.Module,
    images: Float[Tensor, "b c h w"],
    device: torch.device,
    dtype: torch.dtype,
    *,
    flip: bool = False,
    multi_label: bool = False,
) -> Float[Tensor, "b k"]:
    """Compute logits in fp32; with `flip`, those of the mean probabilities for each image and its mirror image.

    Args:
        model: The model.
        images: Normalized images.
        device: The model's device.
        dtype: Precision of matrix products.
        flip: Average over each image and its mirror image.
        multi_label: Whether probabilities are sigmoids instead of a softmax.

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

    both = torch.stack([logits, mirrored])
    if multi_label:  # log p − log(1 − p) of the mean p
        return F.logsigmoid(both).logsumexp(0) - F.logsigmoid(-both).logsumexp(0)
    return average_probabilities(both)
