"""Load augmented training batches and plain evaluation batches, from memory or from disk.

Images in memory need no worker processes: they lie on the training device, or in the machine's memory if they would
fill a GPU. All random numbers follow from (seed, epoch, step), so an epoch can be entered at any step, resumed
bit-exactly, and shared by any number of devices.

Axes: b batch, c channels, h w pixels, k classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from smallvit.datasets.augment import Augment, normalize
from smallvit.datasets.sampler import DRAWS, IGNORED_LABEL, Sampling, evaluation_parts, rank_slice
from smallvit.utils.errors import InputError, first_line

if TYPE_CHECKING:
    from smallvit.datasets.dataset import ImageDataset, Split

ON_DEVICE = 0.5
"""Share of a GPU's free memory that images may use."""

Pixels = tuple[UInt8[Tensor, "b c h w"], Int64[Tensor, " b"]]
"""Gray levels and class numbers, on the device."""
Batch = tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k"]]
"""Augmented, normalized images and label distributions."""


class TrainLoader:
    """Load the training split in augmented batches; `rank` of `world` loads its part of each batch.

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
            aug_repeats=augment.aug_repeats,
            balanced=balanced,
        )

    def __len__(self) -> int:
        """Return the number of steps in an epoch."""
        return len(self.sampling)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, from step `start` on."""
        batches = self.sampling.batches(epoch)
        parts = [rank_slice(len(batch), self.rank, self.world) for batch in batches]
        for step, (images, labels) in enumerate(self.read(epoch, batches, parts, start), start):
            rng = self.sampling.generator(DRAWS, epoch, step)
            flip = self.sampling.alternate_flips(batches[step], epoch) if self.augment.alternate_flip else None
            draws = self.augment.draw(rng, len(batches[step]), *images.shape[-2:], flip).part(parts[step])
            yield self.augment.apply(images, labels, draws, self.mean, self.std, self.classes)

    def read(self, epoch: int, batches: list[np.ndarray], parts: list[slice], start: int) -> Iterator[Pixels]:
        """Yield the images of each batch's part, from step `start` on; `batches` has indices in the split."""
        raise NotImplementedError


class InMemoryLoader(TrainLoader):
    """Load batches of a training split in memory, the device's if it fits there."""

    def __init__(self, dataset: ImageDataset, *arguments: Any, **options: Any) -> None:
        super().__init__(dataset, *arguments, **options)
        pixels = dataset.train.pixels
        memory = self.device if pixels.nbytes <= ON_DEVICE * free_memory(self.device) else torch.device("cpu")
        self.pixels, self.labels = pixels.to(memory), dataset.train.labels.to(memory)

    def read(self, epoch: int, batches: list[np.ndarray], parts: list[slice], start: int) -> Iterator[Pixels]:
        """Yield images gathered from memory."""
        for batch, part in zip(batches[start:], parts[start:], strict=True):
            chosen = torch.from_numpy(batch[part]).to(self.pixels.device, non_blocking=True)
            yield self.pixels[chosen].to(self.device), self.labels[chosen].to(self.device)


def create_train_loader(dataset: ImageDataset, *arguments: Any, **options: Any) -> TrainLoader:
    """Create the loader that fits the training split, in memory or on disk; arguments are those of `TrainLoader`."""
    if not dataset.train.on_disk:
        return InMemoryLoader(dataset, *arguments, **options)
    from smallvit.datasets.streaming import StreamingLoader

    return StreamingLoader(dataset, *arguments, **options)


def free_memory(device: torch.device) -> float:
    """Return the free bytes of a GPU; infinity for other devices, where the images are in memory already."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def evaluation_batches(
    dataset: ImageDataset, split: str, device: torch.device, batch_size: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[Float[Tensor, "b c h w"], Int64[Tensor, " b"]]]:
    """Yield the normalized images and labels of a split (val or test), each image once, in order.

    `rank` of `world` yields its share, in as many batches as the others. A batch that would be empty has one image with
    the label `IGNORED_LABEL`.
    """
    images: Split = getattr(dataset, split)
    mean, std = dataset.statistics(device)
    parts = evaluation_parts(len(images), batch_size, rank, world)
    if images.on_disk:
        from smallvit.datasets.streaming import Decoder, load_batches

        requests = ([(index, 0, index) for index in part or range(1)] for part in parts)
        batches = load_batches(Decoder(images), requests, device)
    else:
        chosen = (slice(part.start, part.stop) if part else slice(1) for part in parts)
        batches = ((images.pixels[each].to(device), images.labels[each].to(device)) for each in chosen)
    for part, (pixels, labels) in zip(parts, batches, strict=True):
        if not part or not len(labels):  # no share of this batch, or no image that can be decoded
            pixels, labels = pixels.new_zeros(1, *pixels.shape[1:]), labels.new_full((1,), IGNORED_LABEL)
        yield normalize(pixels, mean, std), labels


@contextmanager
def explain_worker_failures() -> Iterator[None]:
    """Suggest a remedy if a worker process died; PyTorch raises that error anywhere in the parent process.

    Raises:
        InputError: a worker process died.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            f"a process that decodes images died ({first_line(error)}): reduce --workers, or give the container more "
            "shared memory (--shm-size)"
        ) from None
