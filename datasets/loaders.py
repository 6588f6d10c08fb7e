"""Batches from images held in the training device's memory: no worker processes, no copies an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from smallvit.datasets.augment import normalise
from smallvit.datasets.batches import Batches, Pixels
from smallvit.datasets.images import ImageDataset, Images
from smallvit.datasets.streaming import Files, streamed_evaluation


class TrainingBatches(Batches):
    """Batches of a training split that lies on the device."""

    def __init__(self, dataset: ImageDataset, *arguments: Any, **options: Any) -> None:
        super().__init__(dataset, *arguments, **options)
        self.pixels, self.labels = dataset.train.pixels.to(self.device), dataset.train.labels.to(self.device)

    def read(self, epoch: int, batches: list[np.ndarray], parts: list[slice], start: int) -> Iterator[Pixels]:
        """Gathered from memory."""
        for batch, part in zip(batches[start:], parts[start:], strict=True):
            chosen = torch.from_numpy(batch[part]).to(self.device, non_blocking=True)
            yield self.pixels[chosen], self.labels[chosen]


def evaluation_batches(
    dataset: ImageDataset, split: str, device: torch.device, batch_size: int
) -> Iterator[tuple[Float[Tensor, "b c h w"], Int64[Tensor, " b"]]]:
    """Every image of a split (val or test) once, in order, normalised and otherwise as it is, with its label."""
    images: Images | Files = getattr(dataset, split)
    mean, std = dataset.statistics(device)
    if isinstance(images, Files):
        yield from streamed_evaluation(images, batch_size, device, mean, std)
        return
    for pixels, labels in zip(images.pixels.split(batch_size), images.labels.split(batch_size), strict=True):
        yield normalise(pixels.to(device), mean, std), labels.to(device)
