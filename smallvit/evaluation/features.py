"""Compute the features of images, the input of a model's classifier, and evaluate them without training one.

Axes: n images, d features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from smallvit.datasets.dataset import NO_LABEL, ImageDataset
from smallvit.datasets.loader import IGNORED_LABEL, evaluation_batches
from smallvit.evaluation.evaluate import BatchParts
from smallvit.models import weights
from smallvit.utils import hardware
from smallvit.utils.distributed import is_sharded

NEIGHBORS = 20
MAX_IMAGES = 10_000
"""Training images whose features are compared with others during training."""


class Features(NamedTuple):
    """The features and labels of a split's images."""

    values: Float[np.ndarray, "n d"]
    labels: Int64[np.ndarray, " n"]


@torch.inference_mode()
def extract_features(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    parts: BatchParts | None = None,
) -> Features:
    """Compute the features of batches of images, without those labeled `IGNORED_LABEL`.

    Args:
        model: The model.
        batches: Normalized images (b, c, h, w) and labels (b,).
        device: The model's device.
        dtype: Precision of matrix products.
        parts: Divides batches that do not fit into memory.

    Raises:
        TrainingError: Memory is exhausted.
    """
    parts, divisible = parts or BatchParts(), not is_sharded(model)
    values, labels, training = [], [], model.training
    model.eval()
    for images, numbers in batches:
        with hardware.autocast(device, dtype):
            batch = parts.compute(partial(weights.extract_features, model), images, divisible=divisible)
        kept = numbers != IGNORED_LABEL
        values.append(batch[kept].cpu().double())
        labels.append(numbers[kept].cpu())
    model.train(training)
    return Features(torch.cat(values).numpy(), torch.cat(labels).numpy())


def evaluate_features(
    model: nn.Module,
    dataset: ImageDataset,
    split: str,
    device: torch.device,
    dtype: torch.dtype,
    wrap: Callable[[Iterable[Any]], Iterator[Any]] = iter,
    *,
    batch_size: int,
    parts: BatchParts | None = None,
) -> dict[str, Any]:
    """Return the accuracy of nearest neighbors (%) on a split, and the effective rank of the training features.

    Both are of at most `MAX_IMAGES` training images, those with labels first. The accuracy is None without labels or
    images.
    """

    def features_of(part: str, images: ImageDataset) -> Features:
        batches = evaluation_batches(images, part, device, batch_size)
        return extract_features(model, wrap(batches), device, dtype, parts)

    labeled = dataset.train.labels.numpy() != NO_LABEL
    chosen = spread_evenly(np.flatnonzero(labeled), MAX_IMAGES)
    chosen = np.concatenate([chosen, spread_evenly(np.flatnonzero(~labeled), MAX_IMAGES - len(chosen))])
    train = features_of("train", replace(dataset, train=dataset.train.subset(chosen)))
    images, top1 = len(getattr(dataset, split)), None
    if images and len(dataset.class_names) > 1:
        known = train.labels != NO_LABEL
        top1, _ = neighbor_accuracy(Features(train.values[known], train.labels[known]), features_of(split, dataset))
    return {"knn_top1": top1, "rank": effective_rank(train.values), "loss": None, "images": images}


def spread_evenly(indices: Int64[np.ndarray, " n"], count: int) -> Int64[np.ndarray, " m"]:
    """Return at most `count` of some indices, evenly spread."""
    chosen = np.linspace(0, len(indices) - 1, min(len(indices), count)).round().astype(int)
    return indices[chosen]


def neighbor_accuracy(train: Features, test: Features) -> tuple[float, int]:
    """Return the accuracy in percent of nearest neighbors, weighted by 1 / cosine distance, and their number.

    There are no more neighbors than the average class has images.
    """
    k = max(1, min(NEIGHBORS, len(train.labels) // len(np.unique(train.labels))))
    nearest = KNeighborsClassifier(k, weights="distance", metric="cosine").fit(*train)
    return 100 * float(nearest.score(*test)), k


def effective_rank(features: Float[np.ndarray, "n d"]) -> float:
    """Return the exponential of the entropy of the normalized singular values of centered features.

    It is the number of dimensions that features use: 1 where they collapse to a line. Source: RankMe, Garrido et al.
    2023, arXiv:2210.02885, there without centering.
    """
    values = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)
    if not values.sum() > 0:
        return 0.0
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))
