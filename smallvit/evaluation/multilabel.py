"""Evaluate models on images with several labels, or none: average precision, F1 and thresholds of each class.

Scores are in percent, and means over classes are over those with images. They equal scikit-learn's.

Axes: n images, k classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from scipy.special import expit
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from smallvit.datasets.loader import IGNORED_LABEL
from smallvit.evaluation.evaluate import BatchParts, predict_batches
from smallvit.utils.errors import InputError

MEANS, CLASS_SCORES = ("map", "macro_f1", "micro_f1"), ("ap", "precision", "recall", "f1")
"""Scores in percent, of all classes and of each."""
DEFAULT_THRESHOLD = 0.5
"""Threshold of classes without validation images."""


@dataclass(frozen=True)
class LabelOutputs:
    """A model's outputs for images with several labels."""

    index: Int64[np.ndarray, " n"]
    """Index of each image among those of its split."""
    targets: Bool[np.ndarray, "n k"]
    """Which classes each image has."""
    logits: Float[np.ndarray, "n k"]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def probabilities(self) -> Float[np.ndarray, "n k"]:
        """Probability of each class."""
        return expit(self.logits)

    @property
    def score(self) -> float:
        """The main metric: mean average precision in percent."""
        return compute_scores(self.targets, self.probabilities)["map"]


def evaluate_multilabel(
    models: Sequence[nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    label_sets: Float[Tensor, "s k"],
    device: torch.device,
    dtype: torch.dtype,
    *,
    flip: bool = False,
    thresholds: Sequence[float] | None = None,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
    parts: BatchParts | None = None,
) -> list[dict[str, Any]]:
    """Compute mean average precision, F1 and mean binary cross-entropy of models over batches.

    Args:
        models: Models of the same classes; each batch is read once for all of them.
        batches: Normalized images (b, c, h, w) and labels (b,); images labeled `IGNORED_LABEL` are not counted.
        label_sets: Classes of each label as 0 and 1.
        device: The models' device.
        dtype: Precision of matrix products.
        flip: Average the probabilities over each image and its mirror image.
        thresholds: Probability of each class from which it is predicted; by default those with the highest F1 here.
        gather: Returns the values of torchrun's processes.
        parts: Divides batches that do not fit into memory.

    Returns:
        `map`, `macro_f1`, `micro_f1`, `loss`, the number of `images`, and the `thresholds`, of each model.

    Raises:
        InputError: There are no images.
        TrainingError: Memory is exhausted.
    """
    seen = []
    for labels, outputs in predict_batches(models, batches, device, dtype, flip=flip, multi_label=True, parts=parts):
        counted = labels != IGNORED_LABEL
        seen.append((labels[counted].cpu(), *(logits[counted].cpu() for logits in outputs)))
    labels, *outputs = (
        torch.cat(each) for each in zip(*(batch for batches in gather(seen) for batch in batches), strict=True)
    )
    if not len(labels):
        raise InputError("none of the images can be decoded")
    return [_evaluate_logits(logits.double(), label_sets[labels].double(), thresholds) for logits in outputs]


def _evaluate_logits(
    logits: Float[Tensor, "n k"], targets: Float[Tensor, "n k"], thresholds: Sequence[float] | None
) -> dict[str, Any]:
    """Return what `evaluate_multilabel` does of one model."""
    scores = compute_scores(targets.bool().numpy(), logits.sigmoid().numpy(), thresholds)
    return {
        **{name: scores[name] for name in MEANS},
        "loss": F.binary_cross_entropy_with_logits(logits, targets).item(),
        "images": len(targets),
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
    hits, named, images = (each.sum(axis=0) for each in (targets & predicted, predicted, targets))
    pairs = zip(targets.T, probabilities.T, strict=True)
    scores = {
        "ap": np.array([average_precision_score(*pair) if pair[0].any() else 0.0 for pair in pairs]),
        "f1": 2 * hits / np.maximum(named + images, 1),
        "precision": hits / np.maximum(named, 1),
        "recall": hits / np.maximum(images, 1),
    }
    return {
        "map": 100 * float(scores["ap"][present].mean()) if present.any() else 0.0,
        "macro_f1": 100 * float(scores["f1"][present].mean()) if present.any() else 0.0,
        "micro_f1": 200 * float(hits.sum() / max(1, named.sum() + images.sum())),
        "thresholds": [float(each) for each in thresholds],
        **{name: 100 * values for name, values in scores.items()},
        "images": images,
    }


def compute_metrics(outputs: LabelOutputs, class_names: Sequence[str], thresholds: Sequence[float]) -> dict[str, Any]:
    """Compute all metrics, for the record of an evaluation; those of classes without images are None."""
    scores = compute_scores(outputs.targets, outputs.probabilities, thresholds)
    logits, targets = torch.from_numpy(outputs.logits), torch.from_numpy(outputs.targets)
    classes = [
        {"name": name}
        | {key: float(scores[key][number]) if scores["images"][number] else None for key in CLASS_SCORES}
        | {"threshold": scores["thresholds"][number], "images": int(scores["images"][number])}
        for number, name in enumerate(class_names)
    ]
    return {
        "images": len(outputs),
        **{name: scores[name] for name in MEANS},
        "loss": F.binary_cross_entropy_with_logits(logits, targets.double()).item(),
        "labels_per_image": float(outputs.targets.sum(axis=1).mean()),
        "classes": classes,
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
