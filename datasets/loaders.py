"""Batches from images held in the training device's memory: no worker processes, no copies an epoch.

Images that would fill a GPU's memory stay in the machine's, and are copied batch by batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from smallvit.datasets.augment import normalise
from smallvit.datasets.batches import Batches, Pixels
from smallvit.datasets.images import ImageDataset, Images
from smallvit.datasets.sampling import UNJUDGED, evaluation_parts
from smallvit.datasets.streaming import Files, streamed_evaluation

ON_DEVICE = 0.5
"""Share of a GPU's free memory that images may take."""


class TrainingBatches(Batches):
    """Batches of a training split that lies in memory, the device's where it fits there."""

    def __init__(self, dataset: ImageDataset, *arguments: Any, **options: Any) -> None:
        super().__init__(dataset, *arguments, **options)
        pixels = dataset.train.pixels
        place = self.device if pixels.nbytes <= ON_DEVICE * device_memory(self.device) else torch.device("cpu")
        self.pixels, self.labels = pixels.to(place), dataset.train.labels.to(place)

    def read(self, epoch: int, batches: list[np.ndarray], parts: list[slice], start: int) -> Iterator[Pixels]:
        """Gathered from memory."""
        for batch, part in zip(batches[start:], parts[start:], strict=True):
            chosen = torch.from_numpy(batch[part]).to(self.pixels.device, non_blocking=True)
            yield self.pixels[chosen].to(self.device), self.labels[chosen].to(self.device)


def device_memory(device: torch.device) -> float:
    """Free bytes of a GPU; without bound elsewhere, where images are in memory already."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def evaluation_batches(
    dataset: ImageDataset, split: str, device: torch.device, batch_size: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[Float[Tensor, "b c h w"], Int64[Tensor, " b"]]]:
    """Every image of a split (val or test) once, in order, normalised and otherwise as it is, with its label.

    `rank` of `world` gets its share, in as many batches as the others; one that would be empty holds an image that is
    not to be judged, with the label `UNJUDGED`.
    """
    images: Images | Files = getattr(dataset, split)
    mean, std = dataset.statistics(device)
    parts = evaluation_parts(len(images), batch_size, rank, world)
    if isinstance(images, Files):
        yield from streamed_evaluation(images, parts, device, mean, std)
        return
    for part in parts:
        chosen = slice(part.start, part.stop) if part else slice(1)
        labels = images.labels[chosen] if part else torch.tensor([UNJUDGED])
        yield normalise(images.pixels[chosen].to(device), mean, std), labels.to(device)
