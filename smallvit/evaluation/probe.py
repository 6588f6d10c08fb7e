"""Evaluate a trained model's features on a data set with a linear classifier and nearest neighbors.

The model stays unchanged. Images are not augmented. The linear classifier is multinomial logistic regression on
standardized features, with C chosen on the validation images; the nearest neighbors are weighted by 1 / cosine
distance. Each is evaluated once on the test images.

Axes: n images, d features.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import sklearn
from rich.progress import Progress
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from smallvit import datasets
from smallvit.config.config import Config
from smallvit.datasets.loader import evaluation_batches
from smallvit.evaluation.features import Features, extract_features, neighbor_accuracy
from smallvit.evaluation.predictor import Predictor, check_test_split, create_predictor, read_model_info
from smallvit.models import weights
from smallvit.models.weights_info import WeightsInfo
from smallvit.utils import hardware
from smallvit.utils.errors import InputError
from smallvit.utils.terminal import create_console, create_progress

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
"""Candidates of C, the inverse regularization strength of the linear classifier."""
DEFAULT_STRENGTH = 1.0
"""C without validation images."""
MAX_ITERATIONS = 1000


def probe(name: str, config: Config) -> dict[str, Any]:
    """Evaluate the features of a trained model on the data of a configuration.

    Args:
        name: A run folder, a weights file, or a timm model with pretrained weights.
        config: The data, and the device to use.

    Returns:
        Accuracies in percent, and what they depend on.

    Raises:
        InputError: There is no such model or data, or they do not fit each other.
    """
    info = read_model_info(name, "probe", config.model.arch)
    hardware.pick_device(config.compute.device)
    size = config.data.img_size or info.spec["img_size"]
    dataset = datasets.create_dataset(replace(config.data, img_size=size, **info.data_options), ranges=info.gray_ranges)
    weights.check_channels(info, dataset)
    if dataset.label_sets is not None:
        raise InputError(f"--data {dataset.name}: has several labels an image, which probe does not take")
    console = create_console(stderr=True)
    for warning in check_test_split(info, dataset, config.data):
        console.print(warning)
    compute = config.compute
    predictor = create_predictor(info, size, compute.device, compute.amp, compute.eval_batch_size)
    device = predictor.device
    with create_progress(console) as progress:
        splits = extract_splits(predictor, replace(dataset, mean=info.mean, std=info.std), progress)
        _check_features(info, splits)
        results = fit_classifiers(splits, progress, balanced=config.data.balanced)
    return {
        "name": name,
        "data": dataset.name,
        **results,
        "features": splits["train"].values.shape[1],
        "images": {"val": 0} | {split: len(features.labels) for split, features in splits.items()},
        "img_size": size,
        "precision": predictor.precision,
        "hardware": hardware.describe_hardware(device),
        "versions": hardware.versions() | {"scikit-learn": sklearn.__version__},
        "git_revision": hardware.git_revision(),
    }


def extract_splits(predictor: Predictor, dataset: datasets.ImageDataset, progress: Progress) -> dict[str, Features]:
    """Compute the features of train, val (if there are any) and test."""
    features = {}
    for split in ("train", "val", "test"):
        size = predictor.batch_size
        if count := -(-len(getattr(dataset, split)) // size):
            batches = evaluation_batches(dataset, split, predictor.device, size)
            tracked = progress.track(batches, count, description=f"features of {split}")
            features[split] = extract_features(
                predictor.model, tracked, predictor.device, predictor.dtype, predictor.parts
            )
    return features


def fit_classifiers(splits: dict[str, Features], progress: Progress, *, balanced: bool = False) -> dict[str, Any]:
    """Fit both classifiers to train, choose C on val if there is one, and evaluate on test.

    Args:
        splits: The features of each split.
        progress: Where to show a progress bar.
        balanced: Give every class the same weight in the linear classifier.
    """
    train, val, test = (splits.get(split) for split in ("train", "val", "test"))
    weight = "balanced" if balanced else None
    linear, scores = {}, {}
    for c in progress.track(STRENGTHS if val else (DEFAULT_STRENGTH,), description="linear classifiers"):
        regression = LogisticRegression(C=c, max_iter=MAX_ITERATIONS, class_weight=weight)
        linear[c] = make_pipeline(StandardScaler(), regression).fit(*train)
        scores[c] = linear[c].score(*val) if val else None
    best = max(scores, key=scores.get)  # ties: the strongest regularization
    knn_top1, k = neighbor_accuracy(train, test)
    return {
        "linear_top1": 100 * float(linear[best].score(*test)),
        "linear_val_top1": 100 * float(scores[best]) if val else None,
        "C": best,
        "knn_top1": knn_top1,
        "k": k,
    }


def _check_features(info: WeightsInfo, splits: dict[str, Features]) -> None:
    for split, features in splits.items():
        if not len(features.labels):
            raise InputError(f"none of the images of {split} can be decoded")
        if not np.isfinite(features.values).all():
            raise info.error("the features are not finite, so these weights are unusable")
