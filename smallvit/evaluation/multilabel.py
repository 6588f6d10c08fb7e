"""Evaluate models on images with several labels, or none: average precision, F1 and thresholds of each class.

Scores are in percent, and means over classes are over those with images. They equal scikit-learn's.

Axes: n images, k classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from sklearn.metrics import average_precision_score, f1_score, precision_recall_fscore_support
from torch import Tensor, nn

from smallvit.datasets.loader import IGNORED_LABEL
from smallvit.evaluation.evaluate import compute_logits
from smallvit.utils.distributed import is_sharded
from smallvit.utils.errors import InputError

DEFAULT_THRESHOLD = 0.5
"""Threshold of classes without validation images."""


def evaluate_multilabel(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    label_sets: Float[Tensor, "s k"],
    device: torch.device,
    dtype: torch.dtype,
    *,
    flip: bool = False,
    thresholds: Sequence[float] | None = None,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
) -> dict[str, Any]:
    """Compute mean average precision, F1 and mean binary cross-entropy over batches.

    Args:
        model: The model.
        batches: Normalized images (b, c, h, w) and labels (b,); images labeled `IGNORED_LABEL` are not counted.
        label_sets: Classes of each label as 0 and 1.
        device: The model's device.
        dtype: Precision of matrix products.
        flip: Average the probabilities over each image and its mirror image.
        thresholds: Probability of each class from which it is predicted; by default those with the highest F1 here.
        gather: Returns the values of torchrun's processes.

    Returns:
        `map`, `macro_f1`, `micro_f1`, `loss`, the number of `images`, and the `thresholds`.

    Raises:
        InputError: There are no images.
    """
    training, parts = model.training, []
    model.eval()
    without_gradients = torch.no_grad if is_sharded(model) else torch.inference_mode  # FSDP keeps gathered weights
    for images, labels in batches:
        with without_gradients():
            logits = compute_logits(model, images, device, dtype, flip=flip, multi_label=True)
            counted = labels != IGNORED_LABEL
            parts.append((logits[counted].cpu(), labels[counted].cpu()))
    model.train(training)
    logits, labels = (torch.cat(each) for each in zip(*(part for parts in gather(parts) for part in parts), strict=True))
    if not len(labels):
        raise InputError("none of the images can be decoded")
    targets, logits = label_sets[labels].double(), logits.double()
    scores = compute_scores(targets.bool().numpy(), logits.sigmoid().numpy(), thresholds)
    loss = F.binary_cross_entropy_with_logits(logits, targets).item()
    return {
        **{name: scores[name] for name in ("map", "macro_f1", "micro_f1")},
        "loss": loss,
        "images": len(labels),
        "thresholds": scores["thresholds"],
    }


def compute_scores(
    targets: Bool[np.ndarray, "n k"],
    probabilities: Float[np.ndarray, "n k"],
    thresholds: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Compute the scores of all classes and their means, with the thresholds that were used.

    Args:
        targets: Which classes each image has.
        probabilities: Their predicted probabilities.
        thresholds: Probability of each class from which it is predicted; by default those with the highest F1 here.
    """
    probabilities = np.nan_to_num(probabilities)
    if thresholds is None:
        thresholds = tune_thresholds(targets, probabilities)
    predicted, present = probabilities >= np.array(thresholds), targets.any(axis=0)
    precision, recall, f1, images = precision_recall_fscore_support(
        targets, predicted, average=None, labels=range(targets.shape[1]), zero_division=0
    )
    ap = np.array([average_precision_score(*pair) if pair[0].any() else 0.0 for pair in zip(targets.T, probabilities.T, strict=True)])
    return {
        "map": 100 * float(ap[present].mean()) if present.any() else 0.0,
        "macro_f1": 100 * float(f1[present].mean()) if present.any() else 0.0,
        "micro_f1": 100 * float(f1_score(targets, predicted, average="micro", zero_division=0)),
        "thresholds": [float(each) for each in thresholds],
        **{name: 100 * values for name, values in {"ap": ap, "precision": precision, "recall": recall, "f1": f1}.items()},
        "images": images,
    }


def tune_thresholds(
    targets: Bool[np.ndarray, "n k"], probabilities: Float[np.ndarray, "n k"]
) -> Float[np.ndarray, " k"]:
    """Return the threshold of each class with the highest F1, halfway between two probabilities.

    Classes without images have `DEFAULT_THRESHOLD`.
    """
    order = np.argsort(-probabilities, axis=0, kind="stable")
    sorted_p, hits = (np.take_along_axis(each, order, axis=0) for each in (probabilities, targets))
    following = np.vstack([sorted_p[1:], np.zeros_like(sorted_p[:1])])
    f1 = 2 * hits.cumsum(axis=0) / (np.arange(1, len(hits) + 1)[:, None] + hits.sum(axis=0))
    f1[:-1][sorted_p[:-1] == following[:-1]] = -1  # equal probabilities are predicted together
    best = f1.argmax(axis=0)[None]
    halfway = (np.take_along_axis(sorted_p, best, axis=0) + np.take_along_axis(following, best, axis=0))[0] / 2
    return np.where(targets.any(axis=0), halfway, DEFAULT_THRESHOLD)
