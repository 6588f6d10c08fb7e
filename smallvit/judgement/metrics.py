"""From logits and labels to numbers: accuracy, classes, calibration.

Of each image a few numbers are kept, not its logits, so that a million images of a thousand classes need little memory.
Accuracies, precision, recall, F1 and calibration are in per cent. The expected calibration error is that of Guo et al.
2017 (arXiv:1706.04599): how far, on average, the largest probability is from the accuracy of images that have about it.

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

from smallvit.errors import InputError
from smallvit.judgement.chance import accuracy_interval

BINS = 15
"""Of equal width, of the largest probability: as many as Guo et al. have."""
TOP = 5


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model answered to images of known classes."""

    index: Int64[np.ndarray, " n"]
    """Place of each image among those of its split."""
    label: Int64[np.ndarray, " n"]
    predicted: Int64[np.ndarray, " n"]
    """The likeliest class."""
    probability: Float[np.ndarray, " n"]
    """Of the likeliest class."""
    loss: Float[np.ndarray, " n"]
    """Cross-entropy with the true class, in nats."""
    rank: Int64[np.ndarray, " n"]
    """How many classes are likelier than the true one; of equals the first counts as likelier."""

    def __len__(self) -> int:
        return len(self.label)

    @property
    def correct(self) -> np.ndarray:
        """Whether the likeliest class is the true one."""
        return self.predicted == self.label

    @property
    def top1(self) -> float:
        """Accuracy in per cent."""
        return 100 * float(self.correct.mean())

    def take(self, chosen: np.ndarray) -> Answers:
        """Those at these positions."""
        return Answers(**{each.name: getattr(self, each.name)[chosen] for each in fields(self)})


def reduced(logits: Float[Tensor, "b k"], labels: Int64[Tensor, " b"], index: Int64[Tensor, " b"]) -> Answers:
    """What is kept of a batch's logits."""
    logits, labels = logits.cpu(), labels.cpu()  # not every device computes in double precision
    logarithms = logits.double().log_softmax(dim=1)
    own = logarithms.gather(1, labels[:, None])
    before = torch.arange(logits.shape[1]) < labels[:, None]
    likelier = (logarithms > own) | ((logarithms == own) & before)
    kept = {
        "index": index,
        "label": labels,
        "predicted": logits.argmax(dim=1),
        "probability": logarithms.amax(dim=1).exp(),
        "loss": -own[:, 0],
        "rank": likelier.sum(dim=1),
    }
    return Answers(**{name: values.cpu().numpy() for name, values in kept.items()})


def joined(batches: Sequence[Answers]) -> Answers:
    """The answers of all batches.

    Raises:
        InputError: there are none.
    """
    if not sum(map(len, batches)):
        raise InputError("none of the images to be judged can be decoded")
    return Answers(
        **{each.name: np.concatenate([getattr(batch, each.name) for batch in batches]) for each in fields(Answers)}
    )


def figures(answers: Answers, class_names: Sequence[str]) -> dict[str, Any]:
    """All that can be said of a model's answers; class numbers are places in `class_names`."""
    interval, method = accuracy_interval(int(answers.correct.sum()), len(answers))
    bins = reliability(answers.probability, answers.correct)
    confusion = confusion_matrix(answers.label, answers.predicted, labels=np.arange(len(class_names)))
    return {
        "images": len(answers),
        "top1": answers.top1,
        "top5": 100 * float((answers.rank < TOP).mean()),
        "loss": float(answers.loss.mean()),
        "interval": interval,
        "interval_method": method,
        "ece": calibration_error(bins),
        **per_class(answers, class_names),
        "confusion": confusion.tolist(),
        "reliability": bins,
    }


def per_class(answers: Answers, class_names: Sequence[str]) -> dict[str, Any]:
    """Precision, recall and F1 of each class, and their means over the classes that have images.

    They are None for a class without images; the precision of one that was never predicted is 0.
    """
    numbers = np.arange(len(class_names))
    *shares, images = precision_recall_fscore_support(answers.label, answers.predicted, labels=numbers, zero_division=0)
    percent = {name: 100 * values for name, values in zip(("precision", "recall", "f1"), shares, strict=True)}
    classes = [
        {"name": class_names[number]}
        | {name: float(values[number]) if images[number] else None for name, values in percent.items()}
        | {"images": int(images[number])}
        for number in numbers
    ]
    return {"macro": {name: float(values[images > 0].mean()) for name, values in percent.items()}, "classes": classes}


def reliability(probability: Float[np.ndarray, " n"], correct: np.ndarray) -> list[dict[str, Any]]:
    """For each bin of the largest probability, (low, high], its mean and the accuracy; None in a bin without images.

    Probabilities are shares of 1, accuracies in per cent.
    """
    place = np.clip(np.ceil(probability * BINS).astype(int) - 1, 0, BINS - 1)
    bins = []
    for number in range(BINS):
        here = place == number
        some = bool(here.any())
        bins.append(
            {
                "low": number / BINS,
                "high": (number + 1) / BINS,
                "confidence": float(probability[here].mean()) if some else None,
                "accuracy": 100 * float(correct[here].mean()) if some else None,
                "images": int(here.sum()),
            }
        )
    return bins


def calibration_error(bins: Sequence[dict[str, Any]]) -> float:
    """The gap between confidence and accuracy, in the mean over images."""
    filled = [each for each in bins if each["images"]]
    gaps = [each["images"] * abs(each["accuracy"] - 100 * each["confidence"]) for each in filled]
    return sum(gaps) / sum(each["images"] for each in filled)
