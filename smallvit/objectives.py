"""What training minimises: functions (model, images, targets, ...) -> {"loss": ..., "logits": ...}, in fp32.

Distillation is DeiT's (Touvron et al. 2021, arXiv:2012.12877): with labels y, the teacher's logits t, weight λ and
temperature τ

    soft     (1 − λ) L(s, y) + λ τ² KL(softmax(t/τ) ‖ softmax(s/τ))
    hard     (1 − λ) L(s, y) + λ CE(s, argmax t)

where L is the loss without a teacher, and s the model's logits: one and the same in both terms, or the class head's in
the first and the distillation head's in the second, where the model gives two.

Axes: b batch, k classes.
"""

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
    """The labels' loss alone."""
    logits = model(images)
    return {"loss": label_loss(logits, targets, smoothing, loss), "logits": logits}


def distilled(
    model: nn.Module,
    images: Float[Tensor, "b c h w"],
    targets: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    *,
    smoothing: float,
    loss: Literal["ce", "bce"] = "ce",
    soft: bool,
    weight: float,
    temperature: float = 1.0,
    per_class: bool = False,
) -> dict[str, Tensor]:
    """The labels' loss and the teacher's, the latter with a share `weight`; `logits` are the class head's."""
    found = model(images)
    logits, pupil = found if isinstance(found, tuple) else (found, found)
    if soft:
        taught = divergence(pupil, teacher_logits, temperature, per_class)
    else:
        taught = F.cross_entropy(pupil.float(), teacher_logits.argmax(dim=1))
    return {"loss": (1 - weight) * label_loss(logits, targets, smoothing, loss) + weight * taught, "logits": logits}


def label_loss(
    logits: Float[Tensor, "b k"], targets: Float[Tensor, "b k"], smoothing: float, loss: Literal["ce", "bce"]
) -> Float[Tensor, ""]:
    """Cross-entropy against label distributions, smoothed, or the classes' mean binary cross-entropies.

    For the latter every label of a mixed image counts as whole, as in DeiT III (arXiv:2204.07118).
    """
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(logits.float(), targets.gt(0).float())
    return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)


def divergence(
    logits: Float[Tensor, "b k"], teacher_logits: Float[Tensor, "b k"], temperature: float, per_class: bool = False
) -> Float[Tensor, ""]:
    """τ² KL(softmax(t/τ) ‖ softmax(s/τ)), the mean over images; with `per_class` also divided by the classes, as in
    DeiT's code."""
    ours, theirs = ((each.float() / temperature).log_softmax(dim=1) for each in (logits, teacher_logits))
    total = F.kl_div(ours, theirs, reduction="sum", log_target=True) * temperature**2
    return total / (logits.numel() if per_class else len(logits))
