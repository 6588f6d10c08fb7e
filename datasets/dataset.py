"""Hold labeled images in memory or on disk, and split them.

Axes: n images, c channels, h w pixels, k classes.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from timm.data.transforms import center_crop_or_pad
from torch import Tensor

from smallvit.config.config import option_names
from smallvit.config.options import MAX_MEGAPIXELS, DataConfig
from smallvit.datasets.channels import measure_channels, read_channels
from smallvit.datasets.decode import GRAY, decode_image, open_image, run_in_threads
from smallvit.datasets.gray import GrayRanges, measure
from smallvit.datasets.listing import Archive, Listing
from smallvit.utils.errors import InputError
from smallvit.utils.hardware import require_memory
from smallvit.utils.sizes import ImageSize, fit_sides, height_width, image_size

if TYPE_CHECKING:
    from smallvit.datasets.streaming import DecodingPool


@dataclass(frozen=True)
class Images:
    """Labeled images in memory."""

    on_disk: ClassVar[bool] = False
    pixels: UInt8[Tensor, "n c h w"]
    labels: Int64[Tensor, " n"]
    """Class of each image; with several labels, an index into `ImageDataset.label_sets`."""
    paths: tuple[str, ...] | None = None
    """File of each image, relative to the data's folder or in its zip file; None if there are no files."""
    groups: np.ndarray | None = None
    """Group of each image; the images of a group are in one split."""
    weights: np.ndarray | None = None
    """Weight of each image's loss in training."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> ImageSize:
        """Height and width in pixels."""
        return image_size(*self.pixels.shape[-2:])

    @property
    def channels(self) -> int:
        """Number of channels: 1 gray, 3 color, others of arrays."""
        return self.pixels.shape[1]

    def subset(self, indices: np.ndarray) -> Images:
        """Return a copy of the images at these indices, or the same object if these are all."""
        if np.array_equal(indices, np.arange(len(self))):
            return self
        chosen = torch.from_numpy(indices)
        paths = None if self.paths is None else tuple(self.paths[index] for index in indices)
        groups, weights = (None if each is None else each[indices] for each in (self.groups, self.weights))
        return Images(self.pixels[chosen], self.labels[chosen], paths, groups, weights)

    def content(self) -> str:
        """Return a hash of the images and their labels."""
        digest = hashlib.sha256(self.pixels.contiguous().numpy())
        digest.update(self.labels.numpy())
        if self.groups is not None or self.weights is not None:
            digest.update(f"{self.groups is None or self.groups.tolist()}".encode("utf-8", "replace"))
            digest.update(f"{self.weights is None or self.weights.tolist()}".encode())
        return digest.hexdigest()

    def read(self, index: int) -> bytes:
        """Return a gray or color image as the bytes of an image file."""
        pixels, file = self.pixels[index].numpy().transpose(1, 2, 0), io.BytesIO()
        Image.fromarray(pixels[..., 0] if self.channels == 1 else pixels).save(file, "PPM")
        return file.getvalue()

    def hashes(self, side: int = 32) -> list[bytes]:
        """Return a hash of each image's pixels, for speed of every n-th if they are larger than `side`."""
        step = max(1, min(self.pixels.shape[-2:]) // side)
        rows = self.pixels[:, :, ::step, ::step].contiguous().numpy()
        return [hashlib.blake2b(row, digest_size=16).digest() for row in rows]

    def resize(self, size: ImageSize, crop_mode: str = "center") -> Images:
        """Resize images (bicubic, antialiased); `crop_mode` is that of `decode.resize`."""
        if size == self.size:
            return self
        require_memory(len(self), self.pixels.shape[1], size)
        sides = fit_sides(tuple(self.pixels.shape[-2:]), size, crop_mode)
        crop = partial(center_crop_or_pad, output_size=height_width(size), fill=GRAY)
        pixels = torch.empty(*self.pixels.shape[:2], *height_width(size), dtype=torch.uint8)
        for source, target in zip(self.pixels.split(1000), pixels.split(1000), strict=True):
            resized = F.interpolate(source.float(), sides, mode="bicubic", antialias=True)
            target.copy_(crop(resized.round_().clamp_(0, 255)))
        return replace(self, pixels=pixels)

    def channel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of each channel, with pixels in [0, 1]."""
        counts = torch.stack(
            [torch.bincount(channel.flatten(), minlength=256) for channel in self.pixels.unbind(1)]
        ).double()  # (c, 256): exact sums at any size, no float copy of the images
        levels = torch.arange(256, dtype=torch.float64) / 255
        shares = counts / counts.sum(dim=1, keepdim=True)
        mean = shares @ levels
        std = (shares @ levels.square() - mean.square()).clamp(min=0).sqrt()
        std = torch.where(std < 1 / 255, torch.ones_like(std), std)  # a constant channel stays finite
        return tuple(mean.tolist()), tuple(std.tolist())


@dataclass(frozen=True)
class Files:
    """Labeled images on disk, a subset of a listing."""

    on_disk: ClassVar[bool] = True
    listing: Listing
    positions: np.ndarray
    """Index in the listing of each image."""
    labels: Int64[Tensor, " n"]
    size: ImageSize
    """Height and width in pixels after decoding."""
    skip_corrupt: bool = False
    """Whether to skip images that cannot be decoded; in training, the next image replaces them."""
    workers: int | None = None
    ranges: GrayRanges = field(default_factory=GrayRanges)
    """Ranges of gray values of more than 8 bits."""
    max_megapixels: float = MAX_MEGAPIXELS
    crop_mode: str = "center"
    """How images are resized, see `decode.resize`."""
    channels: int = 3
    """Number of channels: 3 color, 1 gray, others of arrays."""

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def paths(self) -> tuple[str, ...]:
        """File of each image, relative to the data's folder or in its zip file."""
        return tuple(self.listing.relative_path(position) for position in self.positions)

    @property
    def groups(self) -> np.ndarray | None:
        """Group of each image; the images of a group are in one split."""
        return None if self.listing.groups is None else np.array(self.listing.groups)[self.positions]

    @property
    def weights(self) -> np.ndarray | None:
        """Weight of each image's loss in training."""
        return None if self.listing.weights is None else np.array(self.listing.weights)[self.positions]

    def content(self) -> str:
        """Return a hash of the names and sizes of the files, and of their weights."""
        weights = "" if self.weights is None else f" {hashlib.sha256(self.weights).hexdigest()}"
        return f"{self.listing.content} {hashlib.sha256(self.positions).hexdigest()}{weights}"

    def read(self, index: int) -> bytes:
        """Return the bytes of an image file."""
        file = self.listing.open(int(self.positions[index]))
        return Path(file).read_bytes() if isinstance(file, str) else file.read()

    def decode(self, index: int) -> UInt8[np.ndarray, "c h w"]:
        """Decode an image; Pillow's errors on damaged files pass through."""
        file = self.listing.open(int(self.positions[index]))
        return decode_image(file, self.size, self.ranges, self.max_megapixels, self.crop_mode, self.channels)

    def subset(self, indices: np.ndarray) -> Files:
        """Return the images at these indices."""
        return replace(self, positions=self.positions[indices], labels=self.labels[torch.from_numpy(indices)])

    def gray_ranges(self, count: int = 1000) -> GrayRanges:
        """Return the ranges of gray values of more than 8 bits, measured on at most `count` images."""
        positions = self.positions[self._spread(count)].tolist()
        extrema: list[dict[str, Any]] = []

        def measure_one(position: int) -> None:
            if (values := read_channels(self.listing.open(position), self.max_megapixels)) is not None:
                extrema.append(measure_channels(values))
                return
            with open_image(self.listing.open(position), self.max_megapixels) as image:
                extrema.append(measure(image))  # of images of 8 bits only the header is read

        run_in_threads(measure_one, positions, self.listing.paths, "measuring gray values")
        return GrayRanges.measured(extrema)

    def sample(self, count: int = 1000) -> Images:
        """Load at most `count` evenly spread images; skip those that cannot be decoded."""
        chosen = self._spread(count)
        require_memory(len(chosen), self.channels, self.size)
        pixels, labels = [], []
        for index in chosen:
            try:
                pixels.append(self.decode(index))
            except Exception:  # decoding it for training reports it
                continue
            labels.append(index)
        if not pixels:
            raise InputError(f"--data {self.listing.root}: none of {len(chosen)} images can be decoded")
        return Images(torch.from_numpy(np.stack(pixels)), self.labels[torch.tensor(labels)])

    def channel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Estimate mean and standard deviation of each channel from 1,000 images, with pixels in [0, 1]."""
        return self.sample().channel_statistics()

    def _spread(self, count: int) -> np.ndarray:
        """Return at most `count` evenly spread indices."""
        return np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).astype(int))


Split = Images | Files
NO_LABEL = -1
"""Label of training images without one."""


@dataclass(frozen=True, eq=False)
class Pool(Archive):
    """Images of several splits. A location is a split's number, and the index in it."""

    splits: tuple[Split, ...]

    def read(self, index: int, name: str) -> bytes:
        number, position = self.locations[index].tolist()
        return self.splits[number].read(position)


@dataclass(frozen=True)
class ImageDataset:
    """A data set ready for training: three splits, the class names, and statistics of the training split."""

    name: str
    source: str
    """Value of `DataConfig.data` that loads the data set from any working directory."""
    class_names: tuple[str, ...]
    train: Split
    val: Split
    """Empty if no validation images are held out."""
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    """Whether a mirrored image keeps its class."""
    aug: str
    """Augmentation preset that `--aug auto` selects."""
    policy: str
    """AutoAugment policy that `--policy autoaugment` selects: cifar10, svhn or imagenet."""
    fingerprint: str
    """Hash of the images, so that a run is resumed on the same ones."""
    content: str | None = None
    """Hash of the files, the same in any folder and at any image size; None for data sets known by name."""
    drew_test: bool = False
    """Whether the test split was held out here (--split-seed, --test-fraction)."""
    drew_val: bool = False
    """Whether the validation split was held out here (--split-seed, --val-fraction)."""
    gray_ranges: GrayRanges = field(default_factory=GrayRanges)
    """Ranges by which gray values of more than 8 bits were scaled."""
    notes: tuple[str, ...] = ()
    """Notes for the user on how the data was read and split."""
    label_sets: Float[Tensor, "s k"] | None = None
    """Classes of each label as 0 and 1, if images have several or none; None if a label is a class."""

    @property
    def targets(self) -> Float[Tensor, "s k"]:
        """Classes of each label as 0 and 1."""
        return torch.eye(len(self.class_names)) if self.label_sets is None else self.label_sets

    def label_name(self, label: int) -> str:
        """Return the class that a label stands for, or its classes."""
        if self.label_sets is None:
            return self.class_names[label]
        return "; ".join(self.class_names[number] for number in self.label_sets[label].nonzero().flatten().tolist())

    @property
    def img_size(self) -> ImageSize:
        """Height and width in pixels."""
        return self.train.size

    @property
    def in_chans(self) -> int:
        """Number of channels: 1 gray, 3 color, others of arrays."""
        return self.train.channels

    @cached_property
    def decoding_pool(self) -> DecodingPool:
        """Worker processes that decode the splits on disk."""
        from smallvit.datasets.streaming import DecodingPool

        splits = {"train": self.train, "val": self.val, "test": self.test}
        return DecodingPool({name: split for name, split in splits.items() if isinstance(split, Files)})

    @property
    def class_counts(self) -> Int64[Tensor, " k"]:
        """Number of training images of each class."""
        labels = self.train.labels[self.train.labels != NO_LABEL]
        if self.label_sets is not None:
            return self.label_sets[labels].sum(dim=0).long()
        return torch.bincount(labels, minlength=len(self.class_names))

    @property
    def imbalance_ratio(self) -> float:
        """Number of training images of the largest class divided by that of the smallest."""
        counts = self.class_counts
        return (counts.max() / counts[counts > 0].min()).item()

    @property
    def source_hash(self) -> str:
        """Hash of the names and sizes of the files, or of the name where that identifies the data."""
        return hashlib.sha256(os.fsencode(self.content or self.source)).hexdigest()[:16]

    def describe_training_data(self, config: DataConfig) -> dict[str, Any]:
        """Return what weights store about their training data: its hash, and how the test split was drawn, if so."""
        split = {name: getattr(config, name) for name in option_names("draws_test")} if self.drew_test else None
        return {"fingerprint": self.source_hash, "test_split": split}

    def statistics(self, device: torch.device) -> tuple[Float[Tensor, "c 1 1"], Float[Tensor, "c 1 1"]]:
        """Return mean and standard deviation per channel, as tensors that broadcast over images."""
        mean, std = torch.tensor([self.mean, self.std])[:, :, None, None].to(device)
        return mean, std


def hold_out(
    labels: np.ndarray,
    fraction: float,
    seed: int,
    purpose: str,
    class_names: tuple[str, ...],
    groups: np.ndarray | None = None,
    targets: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Split indices in two, with the same share held out of every class and at least one image of it in each part.

    scikit-learn's stratified splits may leave a part without images of a small class. With groups, the images of a
    group stay together: shares are as near as that allows, and the part held out may lack a class. With several labels
    an image, `targets` has the classes of each label as 0 and 1, and images are divided by `divide`.

    Returns:
        Indices that remain and indices that are held out; none are held out if `fraction` is 0.

    Raises:
        InputError: a class has only one image, or one group.
    """
    if not fraction:
        return np.arange(len(labels)), np.arange(0)
    if targets is not None:
        rest, out = divide(targets[labels], (1 - fraction, fraction), seed, groups)
        if not len(rest) or not len(out):
            raise InputError(
                f"too few images{'' if groups is None else ' or groups'} to hold out {purpose}; add images"
            )
        return rest, out
    if groups is not None:
        return _hold_out_groups(labels, fraction, seed, purpose, class_names, groups)
    rng = np.random.default_rng(seed)
    held_out: list[np.ndarray] = []
    for label, indices in _members(labels):
        members = rng.permutation(indices)
        if len(members) < 2:
            raise InputError(
                f"class {class_names[label]!r} has too few images to hold out {purpose}: 3 are needed, for train, "
                "val and test; add images, or provide train/, val/ and test/"
            )
        held_out.append(members[: min(max(1, round(len(members) * fraction)), len(members) - 1)])
    out = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), out), out


def _hold_out_groups(
    labels: np.ndarray, fraction: float, seed: int, purpose: str, class_names: tuple[str, ...], groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Hold out the fold of a `StratifiedGroupKFold` in which the fewest classes are missing."""
    per_class = [np.unique(groups[labels == label]) for label in np.unique(labels)]
    for label, own in zip(np.unique(labels), per_class, strict=True):
        if len(own) < 2:
            raise InputError(
                f"all images of class {class_names[label]!r} are in group {str(own[0])!r}, so none can be held out for "
                f"{purpose}; 3 groups are needed, for train, val and test: add images, or name the splits yourself"
            )
    most = min(round(1 / min(fraction, 1 - fraction)), len(np.unique(groups)), np.bincount(labels).max())
    best = None
    for folds in sorted({most, min(most, *map(len, per_class)), 2}, reverse=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of classes with fewer images than folds
            pairs = list(StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(labels, labels, groups))
        for rest, out in pairs if fraction <= 0.5 else [pair[::-1] for pair in pairs]:
            missing = [len(per_class) - len(np.unique(labels[part])) for part in (rest, out)]
            rank = (*missing, abs(len(out) - fraction * len(labels)))
            best = min(best or (rank, rest, out), (rank, rest, out), key=lambda each: each[0])
        if not any(best[0][:2]):
            break
    if best[0][0]:
        raise InputError(f"the groups are too large to hold out {purpose} and keep images of every class for training")
    return best[1:]


def take_fold(
    labels: np.ndarray,
    groups: np.ndarray | None,
    folds: int,
    fold: int,
    seed: int,
    targets: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices outside of a fold and those in it; folds are scikit-learn's, stratified and by groups if any.

    Args:
        fold: Number of the fold, from 1.
        targets: Classes of each label as 0 and 1, with several labels an image; folds are those of `divide` then.

    Raises:
        InputError: there are too few images or groups.
    """
    members = np.unique(groups) if groups is not None else labels
    if len(members) < folds:
        raise InputError(f"--folds {folds}: only {len(members)} {'images' if groups is None else 'groups'}; give fewer")
    if targets is not None:
        parts = divide(targets[labels], (1 / folds,) * folds, seed, groups)
        return np.setdiff1d(np.arange(len(labels)), parts[fold - 1]), parts[fold - 1]
    splitter = (StratifiedKFold if groups is None else StratifiedGroupKFold)(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with fewer images than folds
        try:
            return list(splitter.split(labels, labels, groups))[fold - 1]
        except ValueError:
            raise InputError(f"--folds {folds}: no class has so many images; give fewer folds") from None


def divide(
    targets: Float[np.ndarray, "n k"], shares: Sequence[float], seed: int, groups: np.ndarray | None = None
) -> list[np.ndarray]:
    """Divide images with several labels by iterative stratification: those of the rarest class first.

    Each image, or group of images, goes to the part that lacks most images of that class, then of all images.

    Source: Sechidis, Tsoumakas, Vlahavas 2011, doi:10.1007/978-3-642-23808-6_10.

    Args:
        targets: Classes of each image as 0 and 1.
        shares: Share of the images of each part.
        seed: Seed of the order of images.
        groups: Group of each image; the images of a group stay together.

    Returns:
        Indices of each part's images.
    """
    members = np.arange(len(targets)) if groups is None else np.unique(groups, return_inverse=True)[1]
    counts = np.zeros((members.max() + 1, targets.shape[1] + 1))  # the last column counts images
    np.add.at(counts, members, np.column_stack([targets, np.ones(len(targets))]))
    missing = np.maximum(np.outer(shares, counts.sum(axis=0)), 1)  # at least one image of a class in each part
    part, rng = np.full(len(counts), -1), np.random.default_rng(seed)
    while (left := part < 0).any():
        remaining = counts[left].sum(axis=0)
        rarest = np.where(remaining > 0, remaining, np.inf).argmin()
        for item in rng.permutation(np.flatnonzero(left & (counts[:, rarest] > 0))):
            part[item] = np.lexsort((missing[:, -1], missing[:, rarest]))[-1]
            missing[part[item]] -= counts[item]
    return [np.flatnonzero(part[members] == number) for number in range(len(shares))]


def join(first: Split, second: Split) -> Split:
    """Return the images of two parts of the same data."""
    labels = torch.cat([first.labels, second.labels])
    if isinstance(first, Files):
        return replace(first, positions=np.concatenate([first.positions, second.positions]), labels=labels)
    pixels, paths = torch.cat([first.pixels, second.pixels]), first.paths and (*first.paths, *second.paths)
    pairs = ((first.groups, second.groups), (first.weights, second.weights))
    return Images(pixels, labels, paths, *(None if pair[0] is None else np.concatenate(pair) for pair in pairs))


def pool(splits: Sequence[Split]) -> Split:
    """Return the images of splits of different data; those of all but the first have no labels.

    They are in memory if those of all splits are. The splits have one size and number of channels.
    """
    first, *others = splits
    labels = torch.cat([first.labels, *(torch.full_like(each.labels, NO_LABEL) for each in others)])
    files = [each for each in splits if isinstance(each, Files)]
    if not files:
        return Images(torch.cat([each.pixels for each in splits if isinstance(each, Images)]), labels)
    locations = [np.stack([np.full(len(each), number), np.arange(len(each))], 1) for number, each in enumerate(splits)]
    listing = Listing(
        root=files[0].listing.root,
        class_names=(),
        paths=tuple(path for each in splits for path in _full_paths(each)),
        labels=tuple(labels.tolist()),
        splits=("train",) * len(labels),
        fingerprint="",
        content=hashlib.sha256("\n".join(each.content() for each in splits).encode()).hexdigest(),
        archive=Pool(files[0].listing.root, (), np.concatenate(locations), tuple(splits)),
    )
    return replace(files[0], listing=listing, positions=np.arange(len(labels)), labels=labels)


def _full_paths(split: Split) -> Iterator[str]:
    """Yield the file of each image, in an archive with its path."""
    if isinstance(split, Images):
        yield from split.paths or (f"image {number}" for number in range(1, len(split) + 1))
        return
    for position in split.positions.tolist():
        path = split.listing.paths[position]
        yield path if split.listing.archive is None else os.path.join(split.listing.root, path)


def nested_share(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return indices of a share of every class, at least one image; smaller shares are subsets of larger ones."""
    rng = np.random.default_rng(seed)
    chosen = []
    for _, indices in _members(labels):
        members = rng.permutation(indices)
        chosen.append(members[: max(1, round(len(members) * fraction))])
    return np.sort(np.concatenate(chosen))


def _members(labels: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each label and the indices of its images, in ascending order."""
    order = np.argsort(labels, kind="stable")
    present, starts = np.unique(labels[order], return_index=True)
    yield from zip(present.tolist(), np.split(order, starts[1:]), strict=True)
