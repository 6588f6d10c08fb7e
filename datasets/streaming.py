"""Decode images that are not kept in memory in worker processes, ahead of their use.

Workers decode, crop (a random rectangle for the crop `resized`, else the center) and resize to gray levels; all other
augmentation runs on the device, as for images in memory. The random numbers follow from (seed, epoch, step), so the
images are the same with any number of workers and devices, and an epoch can be entered at any step.

A batch is decoded in parts, so that all workers decode the first batch. The workers of a data set are started once and
decode all its splits.

Axes: b batch, c channels, h w pixels, v views of one image.
"""

from __future__ import annotations

import atexit
import io
import math
import signal
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from smallvit.config.options import MAX_MEGAPIXELS
from smallvit.datasets.augment import Augment, RectangleDraws, crop_boxes
from smallvit.datasets.dataset import Files, ImageDataset
from smallvit.datasets.decode import (
    JPEG_FORMATS,
    NO_RANGES,
    decode_rgb,
    describe_decode_error,
    open_image,
    orientation,
    read_levels,
    select_channels,
    to_rgb,
    upright,
)
from smallvit.datasets.gray import GrayRanges
from smallvit.datasets.loader import DECODING, Pixels, TrainLoader, explain_worker_failures
from smallvit.utils.cores import local_processes, usable_cores
from smallvit.utils.errors import InputError
from smallvit.utils.sizes import ImageSize, height_width

PART = 32
"""Approximate number of images that a worker decodes at a time."""
PREFETCH_BYTES = 2**30
"""Approximate size of decoded images on this machine that may wait for the devices."""
MAX_PARTS_AHEAD = 256
"""Number of decoded parts that may wait for a device; each needs a file descriptor."""
MAX_SUBSTITUTES = 32
"""Number of images tried in a row to replace one that cannot be decoded."""
DRAFT_SCALES = (8, 4, 2)
"""Factors by which the JPEG decoder can reduce an image."""


@dataclass(frozen=True)
class Crops:
    """Random crops of some images, as torchvision's RandomResizedCrop makes them."""

    draws: RectangleDraws
    area: tuple[float, float]
    """Minimum and maximum share of an image's area."""
    resampling: Image.Resampling = Image.Resampling.BILINEAR

    def part(self, chosen: slice | np.ndarray) -> Crops:
        """Return the crops of some of the images."""
        return replace(self, draws=self.draws.part(chosen))

    def edges(self, h: int, w: int, size: ImageSize) -> Float[np.ndarray, "v 4"]:
        """Return left, top, right and bottom of each crop in images of h × w pixels, for results of this size."""
        height, width = height_width(size)
        box = crop_boxes(self.draws, h, w, self.area, height / width)
        return np.stack([box.left, box.top, box.right, box.bottom], axis=1).astype(np.float64)


class Job(NamedTuple):
    """Part of a batch that a worker decodes."""

    split: str
    indices: np.ndarray
    crops: Crops | None = None
    """None for center crops."""
    substitute: bool = False
    """Whether an image that cannot be decoded is replaced by the next one, as in training, rather than left out."""
    last: bool = True
    """Whether the part is the last of its batch."""


class Decoded(NamedTuple):
    """Result of a job."""

    pixels: UInt8[Tensor, "b c h w"]
    labels: list[int]
    error: str
    """Why the job failed: the first image that cannot be decoded, and is not skipped."""
    last: bool


class Decoder(Dataset):
    """Decode parts of batches within a worker process."""

    def __init__(self, splits: Mapping[str, Files]) -> None:
        self.splits = splits

    def __getitem__(self, job: Job) -> Decoded:
        """Return the images that can be decoded; of an image that the part has several times, the file is read once."""
        files = self.splits[job.split]
        pixels = np.empty((len(job.indices), files.channels, *height_width(files.size)), dtype=np.uint8)
        labels, kept, errors = np.empty(len(job.indices), int), np.zeros(len(job.indices), bool), []
        for index in dict.fromkeys(job.indices.tolist()):
            positions = np.flatnonzero(job.indices == index)
            substitutes = MAX_SUBSTITUTES if job.substitute and files.skip_corrupt else 1
            for chosen in (np.arange(index, index + substitutes) % len(files)).tolist():
                try:
                    pixels[positions] = self._decode(files, chosen, job.crops and job.crops.part(positions))
                    labels[positions], kept[positions] = int(files.labels[chosen]), True
                    break
                except Exception as error:  # libraries raise anything on damaged files
                    path = files.listing.paths[int(files.positions[chosen])]
                    message = f"{path} ({describe_decode_error(error, path)})"
            else:
                errors.append(message)
        if kept.all():
            return Decoded(torch.from_numpy(pixels), labels.tolist(), "", job.last)
        error = ""
        if not files.skip_corrupt:
            error = f": {errors[0]}; repair or remove it, or add --skip-corrupt"
        elif job.substitute:
            error = f", nor the {MAX_SUBSTITUTES - 1} images after it: {errors[0]}"
        return Decoded(torch.from_numpy(pixels[kept]), labels[kept].tolist(), error, job.last)

    @staticmethod
    def _decode(files: Files, index: int, crops: Crops | None) -> UInt8[np.ndarray, "#v c h w"]:
        if crops is None:
            return files.decode(index)[None]
        options = files.ranges, files.max_megapixels, files.channels
        return decode_crops(files.listing.open(int(files.positions[index])), files.size, crops, *options).numpy()


def decode_crops(
    file: str | BinaryIO,
    size: ImageSize,
    crops: Crops,
    ranges: GrayRanges = NO_RANGES,
    max_megapixels: float = MAX_MEGAPIXELS,
    channels: int = 3,
) -> UInt8[Tensor, "v c h w"]:
    """Decode one file and resize random rectangles of it; errors on damaged files pass through.

    JPEG files are decoded at a fraction of their size if a rectangle remains at least as large as the result. The other
    rectangles are resized by torch, whose levels differ from Pillow's by one at most.
    """
    with open(file, "rb") if isinstance(file, str) else nullcontext(file) as source:
        stream = io.BytesIO(source.read())
    if (levels := read_levels(stream, ranges, channels, max_megapixels)) is not None:
        pixels = torch.from_numpy(np.ascontiguousarray(levels))
        return _crop(pixels, crops.edges(pixels.shape[1], pixels.shape[2], size), size, crops.resampling)
    with open_image(stream, max_megapixels) as image:
        if image.format not in JPEG_FORMATS:
            pixels = decode_rgb(image, stream, ranges)
            edges = crops.edges(pixels.shape[1], pixels.shape[2], size)
            views = _crop(pixels, edges, size, crops.resampling)
        else:
            w, h = reversed(image.size) if orientation(image) >= 5 else image.size
            edges = crops.edges(h, w, size)
            scales = _draft_scales(edges, size)
            if (scales == 1).all():
                views = _crop(decode_rgb(image, stream, ranges), edges, size, crops.resampling)
            else:
                views = _crop_drafts(image, stream, edges, scales, size, crops.resampling)
    return views if channels == 3 else torch.from_numpy(np.stack([select_channels(v.numpy(), channels) for v in views]))


def _crop(
    pixels: UInt8[Tensor, "c y x"], edges: Float[np.ndarray, "v 4"], size: ImageSize, resampling: Image.Resampling
) -> UInt8[Tensor, "v c h w"]:
    """Resize rectangles of whole pixels."""
    options = {"size": height_width(size), "mode": resampling.name.lower(), "antialias": True}
    rectangles = (pixels[None, :, top:bottom, left:right] for left, top, right, bottom in edges.astype(int).tolist())
    views = [F.interpolate(rectangle, **options) for rectangle in rectangles]
    return views[0] if len(views) == 1 else torch.cat(views)


def _draft_scales(edges: Float[np.ndarray, "v 4"], size: ImageSize) -> Int64[np.ndarray, " v"]:
    """Return the largest factor by which a JPEG may be reduced for each rectangle without enlarging it afterwards."""
    height, width = height_width(size)
    most = np.minimum((edges[:, 2] - edges[:, 0]) // width, (edges[:, 3] - edges[:, 1]) // height)
    return np.array([next(scale for scale in (*DRAFT_SCALES, 1) if scale <= max(1, ratio)) for ratio in most.tolist()])


def _crop_drafts(
    image: Image.Image,
    stream: io.BytesIO,
    edges: Float[np.ndarray, "v 4"],
    scales: Int64[np.ndarray, " v"],
    size: ImageSize,
    resampling: Image.Resampling,
) -> UInt8[Tensor, "v 3 h w"]:
    """Resize rectangles of a JPEG file, each of the image decoded at the fraction that its scale allows."""
    views = torch.empty(len(edges), 3, *height_width(size), dtype=torch.uint8)
    if (whole := scales == 1).any():
        views[whole] = _crop(decode_rgb(image, stream), edges[whole], size, resampling)
    for scale in np.unique(scales[~whole]).tolist():
        stream.seek(0)
        with Image.open(stream) as reduced:
            w, h = reversed(reduced.size) if orientation(reduced) >= 5 else reduced.size
            reduced.draft("RGB", (reduced.width // scale, reduced.height // scale))
            rgb = to_rgb(upright(reduced))
        for view in np.flatnonzero(scales == scale).tolist():
            box = edges[view] * np.tile([rgb.width / w, rgb.height / h], 2)
            views[view] = _resize_box(rgb, box, size, resampling)
    return views


def _resize_box(
    image: Image.Image, box: Float[np.ndarray, " edges"], size: ImageSize, resampling: Image.Resampling
) -> UInt8[Tensor, "3 h w"]:
    """Resize a rectangle whose edges lie between pixels."""
    outer = np.concatenate([np.floor(box[:2]), np.ceil(box[2:])]).astype(int)
    image = image.crop(tuple(outer))  # first: resizing reads pixels around its box
    resized = image.resize(height_width(size)[::-1], resampling, box=tuple(box - np.tile(outer[:2], 2)))
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


class DecodingPool:
    """Worker processes that decode the splits of a data set, started at their first use and kept for later passes.

    They end with the pool, and at the exit of the program. A pass that begins while another is unfinished has its own
    workers, which end with it.
    """

    def __init__(self, splits: Mapping[str, Files]) -> None:
        self.decoder = Decoder(splits)
        self.jobs: list[Iterator[Job]] = []
        """The jobs of the current pass: read by the loader's sampler."""
        self.loader: DataLoader | None = None
        self.busy = False

    def run(self, jobs: Generator[Job], device: torch.device) -> Iterator[Decoded]:
        """Yield the results of jobs in their order, decoded ahead.

        Raises:
            InputError: a worker process died.
        """
        if self.busy:
            yield from DecodingPool(self.decoder.splits).run(jobs, device)
            return
        if self.loader is None:
            self.loader = self._create_loader(device)
        self.jobs[:], self.busy = [jobs], True
        try:
            with explain_worker_failures():
                yield from self.loader
        finally:
            jobs.close()  # the loader keeps it until the next pass, and it keeps its caller
            self.jobs.clear()
            self.busy = False

    def close(self) -> None:
        """End the worker processes."""
        loader, self.loader = self.loader, None
        iterator = None if loader is None else loader._iterator
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()

    def _create_loader(self, device: torch.device) -> DataLoader:
        first = next(iter(self.decoder.splits.values()))
        part_bytes = PART * first.channels * math.prod(height_width(first.size))
        parts = sum(-(-len(files) // PART) for files in self.decoder.splits.values())
        workers = first.workers
        if workers is None:
            workers = min(parts, max(1, usable_cores() // local_processes()))
        ahead = min(MAX_PARTS_AHEAD, PREFETCH_BYTES // (local_processes() * part_bytes))
        if workers:
            atexit.register(_close, weakref.ref(self))
        return DataLoader(
            self.decoder,
            batch_size=None,
            sampler=_Jobs(self.jobs),
            num_workers=workers,
            pin_memory=device.type == "cuda",
            prefetch_factor=min(8, max(2, ahead // workers)) if workers else None,
            persistent_workers=workers > 0,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # so that nothing is drawn from the global one
        )


def _close(pool: weakref.ref[DecodingPool]) -> None:
    """End the workers of a pool at the exit of the program; they ignore the SIGTERM that ends other processes."""
    if (alive := pool()) is not None:
        alive.close()


class _Jobs(Sampler[Job]):
    """Yield the jobs of the current pass."""

    def __init__(self, jobs: list[Iterator[Job]]) -> None:
        self.jobs = jobs

    def __iter__(self) -> Iterator[Job]:
        return self.jobs[0]


class StreamingLoader(TrainLoader):
    """Load batches of a training split on disk, decoded by worker processes."""

    def __init__(
        self, dataset: ImageDataset, batch_size: int, augment: Augment, seed: int, device: torch.device, **options: Any
    ) -> None:
        self.crops: Callable[[RectangleDraws], Crops] | None = None
        on_device = augment
        if augment.crop == "resized" and dataset.train.crop_mode == "center":  # done by the workers, on the whole image
            on_device = replace(augment, crop="none")
            resampling = Image.Resampling.BICUBIC if augment.bicubic else Image.Resampling.BILINEAR
            self.crops = partial(Crops, area=(augment.crop_scale, augment.crop_scale_max), resampling=resampling)
        super().__init__(dataset, batch_size, on_device, seed, device, **options)
        self.pool = dataset.decoding_pool

    def read(self, epoch: int, batches: list[np.ndarray], parts: list[slice], start: int) -> Iterator[Pixels]:
        """Yield decoded images.

        Raises:
            InputError: an image cannot be decoded, and such images are not skipped.
        """
        steps = range(start, len(batches))
        jobs = (job for step in steps for job in self._jobs(epoch, step, batches[step], parts[step]))
        return load_batches(self.pool, jobs, self.device)

    def _jobs(self, epoch: int, step: int, batch: np.ndarray, part: slice) -> Iterator[Job]:
        """Yield the jobs of a step; views of one image, which lie within blocks, are in one job."""
        draws = RectangleDraws.draw(self.sampling.generator(DECODING, epoch, step), len(batch))
        crops = self.crops and self.crops(draws)
        block = 2 * self.sampling.aug_repeats
        for chosen, last in split_part(part, block * max(1, PART // block)):
            yield Job("train", batch[chosen], crops and crops.part(chosen), substitute=True, last=last)


def split_part(part: slice, size: int) -> Iterator[tuple[slice, bool]]:
    """Yield slices of a part of a batch, cut at multiples of `size`, and whether each is the last; at least one."""
    cuts = [part.start, *range((part.start // size + 1) * size, part.stop, size), part.stop]
    for start, stop in pairwise(cuts):
        yield slice(start, stop), stop == part.stop


def load_split(dataset: ImageDataset, split: str, parts: Sequence[range], device: torch.device) -> Iterator[Pixels]:
    """Yield images of a split in batches: those of each range of indices, without those that cannot be decoded.

    Raises:
        InputError: an image cannot be decoded, and such images are not skipped.
    """
    jobs = (
        Job(split, np.arange(part.start, part.stop)[chosen], last=last)
        for part in parts
        for chosen, last in split_part(slice(0, len(part)), PART)
    )
    return load_batches(dataset.decoding_pool, jobs, device)


def load_batches(pool: DecodingPool, jobs: Generator[Job], device: torch.device) -> Iterator[Pixels]:
    """Decode the parts of batches ahead in worker processes, move them to the device and join them.

    Raises:
        InputError: an image cannot be decoded, and such images are not skipped.
    """
    images: list[Tensor] = []
    labels: list[int] = []
    for part in pool.run(jobs, device):
        if part.error:
            raise InputError(f"cannot be decoded{part.error}")
        images.append(part.pixels.to(device, non_blocking=True))
        labels += part.labels
        if part.last:
            classes = torch.tensor(labels, dtype=torch.int64)
            yield images[0] if len(images) == 1 else torch.cat(images), classes.to(device, non_blocking=True)
            images, labels = [], []


def _ignore_signals(worker: int) -> None:
    """Leave SIGINT and SIGTERM to the training process, which finishes its step first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
