"""Detect test images that a model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from smallvit.models.weights_info import WeightsInfo
from smallvit.utils.errors import flag

if TYPE_CHECKING:
    from smallvit.config.options import DataConfig
    from smallvit.datasets.dataset import ImageDataset


def is_trained_on(info: WeightsInfo, dataset: ImageDataset) -> bool:
    """Return whether a model is known to be trained on a data set, or on a copy of it."""
    if info.training_data is None:
        return info.data == dataset.source  # only the data set's name is known of timm's weights
    return info.training_data["fingerprint"] == dataset.source_hash


def check_test_split(
    info: WeightsInfo, dataset: ImageDataset, config: DataConfig, splits: Sequence[str] = ("test",)
) -> list[str]:
    """Check that the images to evaluate a model on were not used to train it.

    Returns:
        Warnings about images that were or may have been used in training.

    Raises:
        InputError: Only the test split is evaluated, and it is known to contain training images.
    """
    if not is_trained_on(info, dataset):
        if info.training_data is not None and info.data == dataset.name and dataset.drew_test:
            return [f"{dataset.name} has changed since {info.name} was trained on it; test may contain training images"]
        return []
    if tuple(splits) == ("test",):
        now = dataset.describe_training_data(config)["test_split"]
        then = (info.training_data or {}).get("test_split")
        if now is not None and then is not None and now != then:
            remedy = " ".join(f"{flag(name)} {value}" for name, value in then.items() if value != now[name])
            raise info.error(f"the test split contains images that it was trained on; add {remedy} as in training")
        return []
    if "train" in splits:
        return [f"{info.name} was trained on images of train; accuracy on other images may be lower"]
    return [f"validation images helped to choose the weights of {info.name}; accuracy on other images may be lower"]
