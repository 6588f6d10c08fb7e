"""Labelled images in memory, and how they are split.

Axes: n images, c channels, h w pixels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from smallvit.datasets.memory import require_memory
from smallvit.errors import InputError

if TYPE_CHECKING:
    from smallvit.datasets.streaming import Files


@dataclass(frozen=True)
class Images:
    """Decoded images with their class numbers."""

    pixels: UInt8[Tensor, "n c h w"]
    labels: Int64[Tensor, " n"]
    paths: tuple[str, ...] | None = None
    """The file of each, relative to the data's folder or in its zip file; None where they were not read from files."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> int:
        """Height and width in pixels."""
        return self.pixels.shape[-1]

    @property
    def channels(self) -> int:
        """1 grey, 3 colour."""
        return self.pixels.shape[1]

    def subset(self, indices: np.ndarray) -> Images:
        """The images at these positions, copied; in their order, where all are meant."""
        if np.array_equal(indices, np.arange(len(self))):
            return self
        chosen = torch.from_numpy(indices)
        paths = None if self.paths is None else tuple(self.paths[index] for index in indices)
        return Images(self.pixels[chosen], self.labels[chosen], paths)

    def content(self) -> str:
        """A hash of the images and their labels."""
        digest = hashlib.sha256(self.pixels.contiguous().numpy())
        digest.update(self.labels.numpy())
        return digest.hexdigest()

    def resize(self, size: int) -> Images:
        """The images at another size: bicubic, antialiased. Square images are expected."""
        if size == self.pixels.shape[-1]:
            return self
        require_memory(len(self), self.pixels.shape[1], size)
        pixels = torch.empty(*self.pixels.shape[:2], size, size, dtype=torch.uint8)
        for here, there in zip(self.pixels.split(1000), pixels.split(1000), strict=True):
            resized = F.interpolate(here.float(), (size, size), mode="bicubic", antialias=True)
            there.copy_(resized.round_().clamp_(0, 255))
        return Images(pixels, self.labels, self.paths)

    def channel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, of pixel values in [0, 1]."""
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
class ImageDataset:
    """A data set ready for training: three splits, their classes, and the training split's statistics."""

    name: str
    source: str
    """What `DataConfig.data` must say to read it again, from any working directory."""
    class_names: tuple[str, ...]
    train: Images | Files
    val: Images | Files
    """Without images, where none are to be held out."""
    test: Images | Files
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    """Whether a mirrored image keeps its class."""
    aug: str
    """The augmentation preset that suits it."""
    policy: str
    """AutoAugment's policy that suits it: cifar10, svhn or imagenet."""
    fingerprint: str
    """Changes when the files do: a run is resumed on the very images it was started with."""
    content: str | None = None
    """Tells the files from others, in any folder and at any image size; None where a name does."""
    drew_test: bool = False
    """Whether the test was held out here (--split-seed, --test-fraction), as the data brings none."""
    drew_val: bool = False
    """Whether the validation images were (--split-seed, --val-fraction)."""
    notes: tuple[str, ...] = ()
    """What a person should know about how the data was read and split."""

    @property
    def img_size(self) -> int:
        """Height and width in pixels."""
        return self.train.size

    @property
    def in_chans(self) -> int:
        """Channels: 1 grey, 3 colour."""
        return self.train.channels

    def statistics(self, device: torch.device) -> tuple[Float[Tensor, "c 1 1"], Float[Tensor, "c 1 1"]]:
        """Mean and standard deviation per channel, as tensors that broadcast over images."""
        mean, std = torch.tensor([self.mean, self.std])[:, :, None, None].to(device)
        return mean, std


def hold_out(
    labels: np.ndarray, fraction: float, seed: int, purpose: str, class_names: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Positions that stay and positions held out: of every class the same share, at least one in either part.

    scikit-learn's stratified splits may leave a small class out of a part; here none may.

    Nothing is held out of a `fraction` of 0.

    Raises:
        InputError: a class has a single image.
    """
    if not fraction:
        return np.arange(len(labels)), np.arange(0)
    rng = np.random.default_rng(seed)
    held: list[np.ndarray] = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) < 2:
            raise InputError(
                f"class {class_names[label]!r} has too few images to hold out {purpose}: add images, or bring train/, "
                "val/ and test/"
            )
        held.append(members[: min(max(1, round(len(members) * fraction)), len(members) - 1)])
    out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), out), out


def nested_share(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Positions of the same share of every class, at least one image; smaller shares are parts of larger ones."""
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen.append(members[: max(1, round(len(members) * fraction))])
    return np.sort(np.concatenate(chosen))
