"""Compute accuracy, per-class metrics and calibration from logits and labels.

Of each image a few values are kept instead of its logits, so that a million images of a thousand classes need little
memory. Accuracy, precision, recall, F1 and calibration error are in percent. The expected calibration error is that of
Guo et al. 2017 (arXiv:1706.04599): the mean gap between confidence and accuracy over bins of confidence.

Axes: b batch, n images, k classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch import Tensor

from smallvit.evaluation.stats import accuracy_interval
from smallvit.utils.errors import InputError

BINS = 15
"""Bins of confidence, of equal width, as in Guo et al."""
TOP = 5


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """A model's outputs for labeled images."""

    index: Int64[np.ndarray, " n"]
    """Index of each image among those of its split."""
    label: Int64[np.ndarray, " n"]
    predicted: Int64[np.ndarray, " n"]
    """The most probable class."""
    probability: Float[np.ndarray, " n"]
    """Probability of the predicted class."""
    loss: Float[np.ndarray, " n"]
    """Cross-entropy with the label, in nats."""
    rank: Int64[np.ndarray, " n"]
    """Number of classes more probable than the true class; ties count in the order of classes."""

    def __len__(self) -> int:
        return len(self.label)

    @property
    def correct(self) -> np.ndarray:
        """Whether each prediction is correct."""
        return self.predicted == self.label

    @property
    def top1(self) -> float:
        """Accuracy in percent."""
        return 100 * float(self.correct.mean())

    score = top1
    """The main metric."""

    def select(self, positions: np.ndarray) -> Outputs:
        """Return the outputs at some positions."""
        return Outputs(**{each.name: getattr(self, each.name)[positions] for each in fields(self)})


def reduce_logits(logits: Float[Tensor, "b k"], labels: Int64[Tensor, " b"], index: Int64[Tensor, " b"]) -> Outputs:
    """Reduce a batch's logits to a few values per image."""
    logits, labels = logits.cpu(), labels.cpu()  # not every device computes in double precision
    log_probs = logits.double().log_softmax(dim=1)
    true = log_probs.gather(1, labels[:, None])
    before = torch.arange(logits.shape[1]) < labels[:, None]
    greater = (log_probs > true) | ((log_probs == true) & before)
    values = {
        "index": index,
        "label": labels,
        "predicted": logits.argmax(dim=1),
        "probability": log_probs.amax(dim=1).exp(),
        "loss": -true[:, 0],
        "rank": greater.sum(dim=1),
    }
    return Outputs(**{name: value.cpu().numpy() for name, value in values.items()})


def concatenate(batches: Sequence[Any]) -> Any:
    """Concatenate the outputs of all batches, which are instances of one dataclass of arrays.

    Raises:
        InputError: There are none.
    """
    if not sum(map(len, batches)):
        raise InputError("none of the images can be decoded")
    names = [each.name for each in fields(batches[0])]
    return type(batches[0])(**{name: np.concatenate([getattr(each, name) for each in batches]) for name in names})


def compute_metrics(outputs: Outputs, class_names: Sequence[str]) -> dict[str, Any]:
    """Compute all metrics; classes are indices into `class_names`."""
    interval, method = accuracy_interval(int(outputs.correct.sum()), len(outputs))
    bins = bin_confidence(outputs.probability, outputs.correct)
    by_class = compute_class_metrics(outputs, class_names)
    confusion = confusion_matrix(outputs.label, outputs.predicted, labels=np.arange(len(class_names)))
    return {
        "images": len(outputs),
        "top1": outputs.top1,
        "top5": 100 * float((outputs.rank < TOP).mean()),
        "loss": float(outputs.loss.mean()),
        "interval": interval,
        "interval_method": method,
        "ece": compute_calibration_error(bins),
        "macro_f1": by_class["macro"]["f1"],
        "balanced_accuracy": by_class["macro"]["recall"],
        **by_class,
        "confusion": confusion.tolist(),
        "reliability": bins,
    }


def compute_class_metrics(outputs: Outputs, class_names: Sequence[str]) -> dict[str, Any]:
    """Compute precision, recall and F1 of each class, and their means over classes with images.

    They are None for classes without images. The precision of a class that is never predicted is 0.
    """
    numbers = np.arange(len(class_names))
    *scores, images = precision_recall_fscore_support(outputs.label, outputs.predicted, labels=numbers, zero_division=0)
    percent = {name: 100 * values for name, values in zip(("precision", "recall", "f1"), scores, strict=True)}
    classes = [
        {"name": class_names[number]}
        | {name: float(values[number]) if images[number] else None for name, values in percent.items()}
        | {"images": int(images[number])}
        for number in numbers
    ]
    return {"macro": {name: float(values[images > 0].mean()) for name, values in percent.items()}, "classes": classes}


def bin_confidence(probability: Float[np.ndarray, " n"], correct: np.ndarray) -> list[dict[str, Any]]:
    """Compute mean confidence and accuracy in each bin (low, high] of confidence; None in empty bins.

    Confidence is between 0 and 1, accuracy in percent.
    """
    position = np.clip(np.ceil(probability * BINS).astype(int) - 1, 0, BINS - 1)
    bins = [{"low": number / BINS, "high": (number + 1) / BINS} for number in range(BINS)]
    for number, each in enumerate(bins):
        inside = position == number
        filled = bool(inside.any())
        each["confidence"] = float(probability[inside].mean()) if filled else None
        each["accuracy"] = 100 * float(correct[inside].mean()) if filled else None
        each["images"] = int(inside.sum())
    return bins


def compute_calibration_error(bins: Sequence[dict[str, Any]]) -> float:
    """Compute the mean gap between confidence and accuracy over images, in percent."""
    filled = [each for each in bins if each["images"]]
    gaps = [each["images"] * abs(each["accuracy"] - 100 * each["confidence"]) for each in filled]
    return sum(gaps) / sum(each["images"] for each in filled)
