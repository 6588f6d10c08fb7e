"""An epoch's augmented batches, wherever their images come from.

Everything random follows from (seed, epoch, step), so an epoch can be entered anywhere and resumed exactly, and it is
the same however many devices share its batches.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from smallvit.datasets.augment import Augment
from smallvit.datasets.images import ImageDataset
from smallvit.datasets.sampling import DRAWS, Sampling, share

Pixels = tuple[UInt8[Tensor, "b c h w"], Int64[Tensor, " b"]]
"""Grey levels and class numbers, on the device."""
Batch = tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k"]]
"""Augmented, normalised images and label distributions."""


class Batches:
    """A training split cut into augmented batches; `rank` of `world` takes its part of each.

    Raises:
        InputError: more views of an image than a batch holds.
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
        self.augment, self.device, self.rank, self.world = augment, device, rank, world
        self.classes = len(dataset.class_names)
        self.mean, self.std = dataset.statistics(device)
        self.sampling = Sampling(
            labels=dataset.train.labels.numpy(),
            batch_size=batch_size,
            seed=seed,
            repeats=augment.repeats,
            balanced=balanced,
        )

    def __len__(self) -> int:
        """Steps in an epoch."""
        return len(self.sampling)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The epoch's batches, from the step `start` on."""
        batches = self.sampling.batches(epoch)
        parts = [share(len(batch), self.rank, self.world) for batch in batches]
        for step, (images, labels) in enumerate(self.read(epoch, batches, parts, start), start):
            rng = self.sampling.generator(DRAWS, epoch, step)
            draws = self.augment.draw(rng, len(batches[step]), *images.shape[-2:]).part(parts[step])
            yield self.augment.apply(images, labels, draws, self.mean, self.std, self.classes)

    def read(self, epoch: int, batches: list[np.ndarray], parts: list[slice], start: int) -> Iterator[Pixels]:
        """The images of each batch's part, from the step `start` on; `batches` are positions in the split."""
        raise NotImplementedError
