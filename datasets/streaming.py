"""Decode images that do not fit into memory in worker processes, ahead of their use.

Workers decode, crop (a random rectangle for the crop `resized`, else the center) and resize to gray levels; all other
augmentation runs on the device, as for images in memory. The random numbers follow from (seed, epoch, position), so
the images are the same with any number of workers and devices, and an epoch can be entered at any step.

Axes: b batch, c channels, h w pixels, k classes.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from smallvit.config.options import MAX_MEGAPIXELS
from smallvit.datasets.augment import Augment, crop_boxes
from smallvit.datasets.dataset import Files, ImageDataset
from smallvit.datasets.decode import NO_RANGES, describe_decode_error, open_image, read_levels, select_channels, to_rgb
from smallvit.datasets.gray import GrayRanges
from smallvit.datasets.loader import DECODING, Pixels, Sampling, TrainLoader, explain_worker_failures
from smallvit.utils.cores import usable_cores
from smallvit.utils.errors import InputError
from smallvit.utils.sizes import ImageSize, height_width

PREFETCH_BYTES = 2**30
"""Approximate size of decoded images that may wait for the device."""
TYPICAL_BATCH = 512
"""Batch size to estimate the size of prefetched batches with."""
MAX_SUBSTITUTES = 32
"""Number of images tried in a row to replace one that cannot be decoded."""

Request = tuple[int, int, int]
"""Index of an image among the files, with epoch and position in it, from which its crop is drawn."""


class Decoder(Dataset):
    """Decode single images within a worker process.

    Args:
        sampling: Random numbers of training; None for evaluation.
        min_area: Minimum share of an image's area in random crops; None for center crops.
    """

    def __init__(
        self,
        files: Files,
        sampling: Sampling | None = None,
        min_area: float | None = None,
        resampling: Image.Resampling = Image.Resampling.BILINEAR,
    ) -> None:
        self.files, self.sampling, self.min_area, self.resampling = files, sampling, min_area, resampling

    def __getitem__(self, request: Request) -> tuple[np.ndarray | None, int, str]:
        """Return gray levels (c, h, w), the class number, and the error if the file cannot be decoded."""
        index, epoch, position = request
        replaceable = self.files.skip_corrupt and self.sampling is not None
        for offset in range(MAX_SUBSTITUTES if replaceable else 1):
            chosen = (index + offset) % len(self.files)
            label = int(self.files.labels[chosen])
            try:
                return self._decode(chosen, epoch, position), label, ""
            except Exception as error:  # libraries raise anything on damaged files
                path = self.files.listing.paths[int(self.files.positions[chosen])]
                message = f"{path} ({describe_decode_error(error, path)})"
        return None, label, message

    def _decode(self, index: int, epoch: int, position: int) -> UInt8[np.ndarray, "c h w"]:
        files = self.files
        if self.sampling is None or self.min_area is None:
            return files.decode(index)
        rng = self.sampling.generator(DECODING, epoch, position)
        file = files.listing.open(int(files.positions[index]))
        options = files.ranges, files.max_megapixels, files.channels
        return decode_crop(file, files.size, rng, self.min_area, self.resampling, *options)


def decode_crop(
    file: str | BinaryIO,
    size: ImageSize,
    rng: np.random.Generator,
    min_area: float,
    resampling: Image.Resampling = Image.Resampling.BILINEAR,
    ranges: GrayRanges = NO_RANGES,
    max_megapixels: float = MAX_MEGAPIXELS,
    channels: int = 3,
) -> UInt8[np.ndarray, "c h w"]:
    """Decode one file and resize a random rectangle of it, as torchvision's RandomResizedCrop does."""
    height, width = height_width(size)

    def draw_edges(h: int, w: int) -> np.ndarray:
        box = crop_boxes(rng, 1, h, w, (min_area, 1.0), height / width)
        return np.array([box.left[0], box.top[0], box.right[0], box.bottom[0]], dtype=np.float64)

    def crop(image: Image.Image, edges: np.ndarray) -> np.ndarray:
        outer = np.concatenate([np.floor(edges[:2]), np.ceil(edges[2:])]).astype(int)
        image = image.crop(tuple(outer))  # first: resizing reads pixels around its box
        return np.asarray(image.resize((width, height), resampling, box=tuple(edges - np.tile(outer[:2], 2))))

    if (levels := read_levels(file, ranges, channels, max_megapixels)) is not None:
        edges = draw_edges(*levels.shape[1:])
        return np.stack([crop(Image.fromarray(level), edges) for level in levels])
    with open_image(file, max_megapixels) as image:
        if image.format not in ("JPEG", "MPO"):  # the others are decoded whole; TIFFs are transposed when loaded
            image = ImageOps.exif_transpose(image)
        is_rotated = image.getexif().get(0x0112) in (5, 6, 7, 8)
        w, h = reversed(image.size) if is_rotated else image.size
        edges = draw_edges(h, w)
        # decode no finer than necessary
        scale = max(1, min((edges[2] - edges[0]) // width, (edges[3] - edges[1]) // height))
        image.draft("RGB", (int(image.size[0] // scale), int(image.size[1] // scale)))
        image = to_rgb(ImageOps.exif_transpose(image), ranges)
        edges *= np.tile([image.size[0] / w, image.size[1] / h], 2)
        return select_channels(crop(image, edges).transpose(2, 0, 1), channels)


class StreamingLoader(TrainLoader):
    """Load batches of a training split on disk, decoded by worker processes."""

    def __init__(
        self, dataset: ImageDataset, batch_size: int, augment: Augment, seed: int, device: torch.device, **options: Any
    ) -> None:
        resized = augment.crop == "resized" and dataset.train.crop_mode == "center"
        # done by the workers, on the whole image
        on_device = replace(augment, crop="none") if resized else augment
        super().__init__(dataset, batch_size, on_device, seed, device, **options)
        resampling = Image.Resampling.BICUBIC if augment.bicubic else Image.Resampling.BILINEAR
        self.decoder = Decoder(dataset.train, self.sampling, augment.crop_scale if resized else None, resampling)

    def read(self, epoch: int, batches: list[np.ndarray], parts: list[slice], start: int) -> Iterator[Pixels]:
        """Yield decoded images.

        Raises:
            InputError: an image cannot be decoded, and such images are not skipped.
        """
        first = np.cumsum([0, *map(len, batches)])
        requests = (
            [(index, epoch, position) for position, index in enumerate(batch.tolist(), int(first[step]))][parts[step]]
            for step, batch in enumerate(batches[start:], start)
        )
        return load_batches(self.decoder, requests, self.device)


def load_batches(decoder: Decoder, batches: Iterable[list[Request]], device: torch.device) -> Iterator[Pixels]:
    """Decode batches ahead in worker processes and move them to the device.

    Raises:
        InputError: an image cannot be decoded, and such images are not skipped.
    """
    workers = decoder.files.workers
    if workers is None:
        workers = min(16, max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    bytes_ahead = decoder.files.channels * math.prod(height_width(decoder.files.size)) * TYPICAL_BATCH * max(1, workers)
    loader = DataLoader(
        decoder,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=partial(_collate, shape=(decoder.files.channels, *height_width(decoder.files.size))),
        pin_memory=device.type == "cuda",
        prefetch_factor=max(1, min(4, PREFETCH_BYTES // bytes_ahead)) if workers else None,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # so that nothing is drawn from the global one
    )
    with explain_worker_failures():
        for images, labels, errors in loader:
            if errors and not decoder.files.skip_corrupt:
                raise InputError(f"cannot be decoded: {errors[0]}; repair or remove it, or add --skip-corrupt")
            if errors and decoder.sampling is not None:
                raise InputError(f"cannot be decoded, nor the {MAX_SUBSTITUTES - 1} images after it: {errors[0]}")
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _ignore_signals(worker: int) -> None:
    """Leave SIGINT and SIGTERM to the training process, which finishes its step first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _collate(
    items: list[tuple[np.ndarray | None, int, str]], shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, list[str]]:
    """Return a batch without the images that cannot be decoded, and their errors."""
    errors = [message for _, _, message in items if message]
    good = [(pixels, label) for pixels, label, _ in items if pixels is not None]
    if not good:
        return torch.empty(0, *shape, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), errors
    pixels, labels = zip(*good, strict=True)
    return torch.from_numpy(np.stack(pixels)), torch.tensor(labels), errors
