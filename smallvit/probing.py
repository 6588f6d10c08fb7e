"""What a trained model's features are worth for other data, the model itself left alone.

A linear classifier (multinomial logistic regression on standardised features, its C chosen on the validation images)
and the nearest neighbours among the training images (by cosine, weighted by 1 / distance) are given the pooled
features of images that are not augmented; each is judged once on the test images.

Axes: n images, d features.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sklearn
import torch
from jaxtyping import Float, Int64
from rich.console import Console
from rich.progress import Progress
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from smallvit import datasets, hardware, trained
from smallvit.config import Config
from smallvit.datasets.loaders import evaluation_batches
from smallvit.datasets.sampling import UNJUDGED
from smallvit.errors import InputError
from smallvit.evaluate import batch_size
from smallvit.ready import described, prepared
from smallvit.trained import Card

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
"""Values of C, the inverse strength of the linear classifier's regularisation."""
UNCHOSEN = 1.0
"""C without validation images."""
ITERATIONS = 1000
NEIGHBOURS = 20


@dataclass(frozen=True)
class Features:
    """The features of a split's images, and their class numbers."""

    values: Float[np.ndarray, "n d"]
    labels: Int64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.labels)


def probe(name: str, config: Config) -> dict[str, Any]:
    """Judge the features of the trained model `name` on the data of a configuration; accuracies are in per cent.

    Raises:
        InputError: there is no such model or data, or they do not fit each other.
    """
    card = described(name, "probe", config.model.arch)
    hardware.pick_device(config.compute.device)
    size = config.data.img_size or card.spec["img_size"]
    dataset = datasets.load(replace(config.data, img_size=size))
    _require_fit(card, config, dataset)
    answering = prepared(card, size, config.compute.device, config.compute.amp)
    device, dtype = answering.device, answering.dtype
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        splits = extract(answering.model, replace(dataset, mean=card.mean, std=card.std), device, dtype, bar)
        _require_sound(card, splits)
        judged = classify(splits, bar, balanced=config.data.balanced)
    return {
        "name": name,
        "data": dataset.name,
        **judged,
        "features": splits["train"].values.shape[1],
        "images": {"val": 0} | {split: len(found) for split, found in splits.items()},
        "img_size": size,
        "precision": answering.precision,
        "hardware": hardware.describe_hardware(device),
        "versions": hardware.versions() | {"scikit-learn": sklearn.__version__},
        "git_revision": hardware.git_revision(),
    }


def extract(
    model: nn.Module, dataset: datasets.ImageDataset, device: torch.device, dtype: torch.dtype, bar: Progress
) -> dict[str, Features]:
    """The features of the images of train, val (where there are any) and test, normalised as the data set says."""
    size, found = batch_size(device), {}
    for split in ("train", "val", "test"):
        if count := -(-len(getattr(dataset, split)) // size):
            batches = evaluation_batches(dataset, split, device, size)
            found[split] = compute(model, bar.track(batches, count, description=f"features of {split}"), device, dtype)
    return found


@torch.inference_mode()
def compute(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, dtype: torch.dtype
) -> Features:
    """The features of batches of images, but for those that are not to be judged."""
    values, labels = [], []
    model.eval()
    for images, numbers in batches:
        with hardware.autocast(device, dtype):
            batch = trained.features(model, images)
        judged = numbers != UNJUDGED
        values.append(batch[judged].cpu().double())
        labels.append(numbers[judged].cpu())
    return Features(torch.cat(values).numpy(), torch.cat(labels).numpy())


def classify(splits: dict[str, Features], bar: Progress, *, balanced: bool = False) -> dict[str, Any]:
    """Fit both classifiers to the features of train; C is chosen on val, where there is one, and test judges.

    `balanced` gives every class the same weight in the linear classifier.
    """
    train, val, test = (splits.get(split) for split in ("train", "val", "test"))
    fitted = {
        strength: linear_classifier(strength, balanced).fit(train.values, train.labels)
        for strength in bar.track(STRENGTHS if val else (UNCHOSEN,), description="linear classifiers")
    }
    chosen = {strength: top1(classifier, val) for strength, classifier in fitted.items()} if val else {UNCHOSEN: None}
    best = max(chosen, key=chosen.get)  # of equals the strongest regularisation
    k = max(1, min(NEIGHBOURS, len(train) // len(np.unique(train.labels))))
    nearest = KNeighborsClassifier(k, weights="distance", metric="cosine").fit(train.values, train.labels)
    return {
        "linear_top1": top1(fitted[best], test),
        "linear_val_top1": chosen[best],
        "C": best,
        "knn_top1": top1(nearest, test),
        "k": k,
    }


def linear_classifier(strength: float, balanced: bool) -> Pipeline:
    """Standardised features to logistic regression."""
    weights = "balanced" if balanced else None
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=ITERATIONS, class_weight=weights))


def top1(classifier: Pipeline | KNeighborsClassifier, images: Features) -> float:
    """Accuracy in per cent."""
    return 100 * float(classifier.score(images.values, images.labels))


def _require_fit(card: Card, config: Config, dataset: datasets.ImageDataset) -> None:
    trained.require_channels(card, dataset)
    trained.require_same_test(card, dataset, config.data)


def _require_sound(card: Card, splits: dict[str, Features]) -> None:
    for split, found in splits.items():
        if not len(found):
            raise InputError(f"none of the images of {split} can be decoded")
        if not np.isfinite(found.values).all():
            raise card.error("its features are not finite: these weights are of no use")
