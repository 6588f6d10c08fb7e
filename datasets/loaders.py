"""Batches from images held in the training device's memory: no worker processes, no copies an epoch.

Everything random follows from (seed, epoch, step), so an epoch can be entered anywhere and resumed exactly, and it is
the same however many devices share its batches.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from smallvit.datasets.augment import Augment, normalise
from smallvit.datasets.images import ImageDataset, Images
from smallvit.datasets.sampling import DRAWS, Sampling, share
from smallvit.datasets.streaming import Files, streamed_evaluation

Batch = tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k"]]
"""Images and label distributions."""


class TrainingBatches:
    """A training split on the device, cut into augmented, normalised batches; `rank` of `world` takes its part of each.

    Raises:
        InputError: `repeats` is larger than the batch.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        augment: Augment,
        seed: int,
        device: torch.device,
        *,
        balanced: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.augment, self.classes, self.rank, self.world = augment, len(dataset.class_names), rank, world
        self.pixels, self.labels = dataset.train.pixels.to(device), dataset.train.labels.to(device)
        self.mean, self.std = dataset.statistics(device)
        self.sampling = Sampling(
            labels=dataset.train.labels.numpy(),
            batch_size=batch_size,
            seed=seed,
            repeats=augment.repeats,
            balanced=balanced,
        )

    def __len__(self) -> int:
        return len(self.sampling)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The epoch's batches, from the step `start` on."""
        for step, whole in enumerate(self.sampling.batches(epoch)[start:], start):
            draws = self.augment.draw(self.sampling.generator(DRAWS, epoch, step), len(whole), *self.pixels.shape[-2:])
            part = share(len(whole), self.rank, self.world)
            chosen = torch.from_numpy(whole[part]).to(self.labels.device, non_blocking=True)
            images, labels = self.pixels[chosen], self.labels[chosen]
            yield self.augment.apply(images, labels, draws.part(part), self.mean, self.std, self.classes)


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
