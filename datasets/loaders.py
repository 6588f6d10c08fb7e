"""Batches from images held in the training device's memory: no worker processes, no copies an epoch.

Everything random follows from (seed, epoch, step), so an epoch can be entered anywhere and resumed exactly.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from smallvit.datasets.augment import Augment, normalise
from smallvit.datasets.images import ImageDataset, Images

ORDER, DRAWS = 0, 1
"""Streams of random numbers that one seed is split into."""


class TrainingBatches:
    """A training split on the device, cut into augmented, normalised batches.

    An epoch holds every image once, in `ceil(n / batch_size)` batches whose sizes differ by at most one, so that
    no step is noisier than the others for having a handful of images.
    """

    def __init__(
        self, dataset: ImageDataset, batch_size: int, augment: Augment, seed: int, device: torch.device
    ) -> None:
        self.augment, self.seed, self.classes = augment, seed, len(dataset.class_names)
        self.pixels, self.labels = dataset.train.pixels.to(device), dataset.train.labels.to(device)
        self.mean, self.std = dataset.statistics(device)
        self.steps = -(-len(dataset.train) // batch_size)

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int) -> Iterator[tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k"]]]:
        """The epoch's batches: images and label distributions."""
        order = np.random.default_rng((self.seed, ORDER, epoch)).permutation(len(self.labels))
        for step, indices in enumerate(np.array_split(order, self.steps)):
            chosen = torch.from_numpy(indices).to(self.labels.device, non_blocking=True)
            rng = np.random.default_rng((self.seed, DRAWS, epoch, step))
            draws = self.augment.draw(rng, len(indices), *self.pixels.shape[-2:])
            images, labels = self.pixels[chosen], self.labels[chosen]
            yield self.augment.apply(images, labels, draws, self.mean, self.std, self.classes)


def evaluation_batches(
    dataset: ImageDataset, split: str, device: torch.device, batch_size: int
) -> Iterator[tuple[Float[Tensor, "b c h w"], Int64[Tensor, " b"]]]:
    """Every image of a split (val or test) once, in order, normalised and otherwise as it is, with its label."""
    images: Images = getattr(dataset, split)
    mean, std = dataset.statistics(device)
    for pixels, labels in zip(images.pixels.split(batch_size), images.labels.split(batch_size), strict=True):
        yield normalise(pixels.to(device), mean, std), labels.to(device)
