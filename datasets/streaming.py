"""Batches of images that do not fit into memory: decoded anew each epoch by worker processes, ahead of their use.

Workers decode, cut (a random rectangle for the crop `resized`, else the centre) and resize to grey levels; all other
augmentation runs on the device, as for images in memory. What is drawn follows from (seed, epoch, position), so the
batches are the same however many workers and devices share them, and an epoch can be entered anywhere.

Axes: b batch, c channels, s image size, k classes.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from smallvit.datasets.augment import Augment, normalise
from smallvit.datasets.batches import Batches, Pixels
from smallvit.datasets.boxes import crop_boxes
from smallvit.datasets.decode import decode_image, reason, to_rgb, usable_cores
from smallvit.datasets.images import ImageDataset, Images
from smallvit.datasets.listing import Listing
from smallvit.datasets.memory import require_memory
from smallvit.datasets.sampling import DECODING, UNJUDGED, Sampling
from smallvit.errors import InputError, first_line

AHEAD = 2**30
"""Bytes of decoded images that may wait for the device, about."""
BATCH_GUESS = 512
"""Images in a batch, to reckon with."""
SUBSTITUTES = 32
"""Images tried, one after the other, where one that cannot be decoded is to be passed over."""
Request = tuple[int, int, int]
"""Position of an image among the files, and epoch and position in it from which its rectangle is drawn."""


@dataclass(frozen=True)
class Files:
    """Labelled images on disk, some of those of a listing."""

    listing: Listing
    positions: np.ndarray
    labels: Int64[Tensor, " n"]
    size: int
    """Side in pixels that they are decoded to."""
    skip_corrupt: bool = False
    """In training, put the next image in the place of one that cannot be decoded; elsewhere, leave it out."""
    workers: int | None = None

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def channels(self) -> int:
        """Always colour."""
        return 3

    @property
    def paths(self) -> tuple[str, ...]:
        """The file of each, relative to the data's folder or in its zip file."""
        return tuple(self.listing.named(position) for position in self.positions)

    def content(self) -> str:
        """A hash of the files' names and sizes, and which of them are meant."""
        return f"{self.listing.content} {hashlib.sha256(self.positions).hexdigest()}"

    def subset(self, indices: np.ndarray) -> Files:
        """The images at these positions."""
        return replace(self, positions=self.positions[indices], labels=self.labels[torch.from_numpy(indices)])

    def sample(self, count: int = 1000) -> Images:
        """Some images, evenly spread, in memory; those that cannot be decoded are left out."""
        chosen = np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).astype(int))
        require_memory(len(chosen), 3, self.size)
        pixels, labels = [], []
        for index in chosen:
            try:
                pixels.append(decode_image(self.listing.open(self.positions[index]), self.size))
                labels.append(index)
            except Exception:  # decoding it in its turn names it
                continue
        if not pixels:
            raise InputError(f"--data {self.listing.root}: none of {len(chosen)} images can be decoded")
        return Images(torch.from_numpy(np.stack(pixels)), self.labels[torch.tensor(labels)])

    def channel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, of pixel values in [0, 1], estimated from 1,000 images."""
        return self.sample().channel_statistics()


class Decoder(Dataset):
    """Decodes one image at a time, within a worker process."""

    def __init__(self, files: Files, sampling: Sampling | None = None, least_area: float | None = None) -> None:
        self.files, self.sampling, self.least_area = files, sampling, least_area

    def __getitem__(self, request: Request) -> tuple[np.ndarray | None, int, str]:
        """Grey levels (3, s, s), class number, and what is wrong with the file."""
        index, epoch, position = request
        replaceable = self.files.skip_corrupt and self.sampling is not None
        for offset in range(SUBSTITUTES if replaceable else 1):
            chosen = (index + offset) % len(self.files)
            label, place = int(self.files.labels[chosen]), int(self.files.positions[chosen])
            try:
                return self._decode(self.files.listing.open(place), epoch, position), label, ""
            except Exception as error:  # whatever a damaged file provokes
                path = self.files.listing.paths[place]
                wrong = f"{path} ({reason(error, path)})"
        return None, label, wrong

    def _decode(self, file: str | BinaryIO, epoch: int, position: int) -> UInt8[np.ndarray, "3 s s"]:
        if self.sampling is None or self.least_area is None:
            return decode_image(file, self.files.size)
        rng = self.sampling.generator(DECODING, epoch, position)
        return decode_crop(file, self.files.size, rng, self.least_area)


def decode_crop(
    file: str | BinaryIO, size: int, rng: np.random.Generator, least_area: float
) -> UInt8[np.ndarray, "3 size size"]:
    """Decode one file and resize a random rectangle of it, as torchvision's RandomResizedCrop does."""
    with Image.open(file) as image:
        if image.format not in ("JPEG", "MPO"):  # the others are decoded whole; TIFFs turn themselves when loaded
            image = ImageOps.exif_transpose(image)
        turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
        w, h = reversed(image.size) if turned else image.size
        box = crop_boxes(rng, 1, h, w, (least_area, 1.0))
        edges = np.array([box.left[0], box.top[0], box.right[0], box.bottom[0]], dtype=np.float64)
        finest = max(1, min(edges[2] - edges[0], edges[3] - edges[1]) // size)  # decode no finer than is needed
        image.draft("RGB", (int(image.size[0] // finest), int(image.size[1] // finest)))
        image = to_rgb(ImageOps.exif_transpose(image))
    edges *= np.tile([image.size[0] / w, image.size[1] / h], 2)
    outer = np.concatenate([np.floor(edges[:2]), np.ceil(edges[2:])]).astype(int)
    image = image.crop(tuple(outer))  # first: resizing looks at pixels around its box
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=tuple(edges - np.tile(outer[:2], 2)))
    return np.asarray(image).transpose(2, 0, 1)


class StreamedBatches(Batches):
    """Batches of a training split on disk."""

    def __init__(
        self, dataset: ImageDataset, batch_size: int, augment: Augment, seed: int, device: torch.device, **options: Any
    ) -> None:
        resized = augment.crop == "resized"  # by the workers, of the whole image
        on_device = replace(augment, crop="none") if resized else augment
        super().__init__(dataset, batch_size, on_device, seed, device, **options)
        self.decoder = Decoder(dataset.train, self.sampling, augment.crop_scale if resized else None)

    def read(self, epoch: int, batches: list[np.ndarray], parts: list[slice], start: int) -> Iterator[Pixels]:
        """Decoded by worker processes.

        Raises:
            InputError: an image cannot be decoded, and such images are not to be skipped.
        """
        first = np.cumsum([0, *map(len, batches)])
        requests = (
            [(index, epoch, place) for place, index in enumerate(batch.tolist(), int(first[step]))][parts[step]]
            for step, batch in enumerate(batches[start:], start)
        )
        return load_batches(self.decoder, requests, self.device)


def streamed_evaluation(
    files: Files, parts: list[range], device: torch.device, mean: Tensor, std: Tensor
) -> Iterator[tuple[Float[Tensor, "b c s s"], Int64[Tensor, " b"]]]:
    """The images of each part, normalised and otherwise as they are, with their labels; see `evaluation_batches`."""
    requests = ([(index, 0, index) for index in part or range(1)] for part in parts)
    for part, (images, labels) in zip(parts, load_batches(Decoder(files), requests, device), strict=True):
        if not part or not len(labels):
            images, labels = images.new_zeros(1, *images.shape[1:]), labels.new_full((1,), UNJUDGED)
        yield normalise(images, mean, std), labels


def load_batches(decoder: Decoder, batches: Iterable[list[Request]], device: torch.device) -> Iterator[Pixels]:
    """Decode batches ahead in worker processes and move them to the device.

    Raises:
        InputError: an image cannot be decoded, and such images are not to be skipped.
    """
    workers = decoder.files.workers
    if workers is None:
        workers = min(16, max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    bytes_ahead = 3 * decoder.files.size**2 * BATCH_GUESS * max(1, workers)
    loader = DataLoader(
        decoder,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=partial(_collate, size=decoder.files.size),
        pin_memory=device.type == "cuda",
        prefetch_factor=max(1, min(4, AHEAD // bytes_ahead)) if workers else None,
        generator=torch.Generator(),  # of its own: nothing is drawn from the global one
    )
    for images, labels, bad in _received(loader):
        if bad and not decoder.files.skip_corrupt:
            raise InputError(f"cannot be decoded: {bad[0]}; repair or remove, or pass over with --skip-corrupt")
        if bad and decoder.sampling is not None:
            raise InputError(f"cannot be decoded, nor the {SUBSTITUTES - 1} images after it: {bad[0]}")
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Start processes that leave SIGINT and SIGTERM to the training process: it finishes its step first."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _received(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    with explained_workers():
        with _signals_held():
            batches = iter(loader)
        yield from batches


@contextmanager
def explained_workers() -> Iterator[None]:
    """Say what to try where a process that decodes images dies; PyTorch says so wherever its parent happens to be.

    Raises:
        InputError: one has died.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            f"a process that decodes images died ({first_line(error)}): give fewer --workers, or the container more "
            "shared memory (--shm-size)"
        ) from None


def _collate(items: list[tuple[np.ndarray | None, int, str]], size: int) -> tuple[Tensor, Tensor, list[str]]:
    """A batch as tensors, without the images that cannot be decoded, and what is wrong with those."""
    bad = [wrong for _, _, wrong in items if wrong]
    good = [(pixels, label) for pixels, label, _ in items if pixels is not None]
    if not good:
        return torch.empty(0, 3, size, size, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), bad
    pixels, labels = zip(*good, strict=True)
    return torch.from_numpy(np.stack(pixels)), torch.tensor(labels), bad
