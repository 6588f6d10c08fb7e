"""Labelled images in memory, and how they are split.

Axes: n images, c channels, h w pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from smallvit.config import InputError


@dataclass(frozen=True)
class Images:
    """Decoded images with their class numbers."""

    pixels: UInt8[Tensor, "n c h w"]
    labels: Int64[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray) -> Images:
        """The images at these positions, copied."""
        chosen = torch.from_numpy(indices)
        return Images(self.pixels[chosen], self.labels[chosen])

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
    train: Images
    val: Images
    test: Images
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    """Whether a mirrored image keeps its class."""
    aug: str
    """The augmentation preset that suits it."""
    fingerprint: str
    """Changes when the files do: a run is resumed on the very images it was started with."""
    notes: tuple[str, ...] = ()
    """What a person should know about how the data was read and split."""

    @property
    def img_size(self) -> int:
        """Height and width in pixels."""
        return self.train.pixels.shape[-1]

    @property
    def in_chans(self) -> int:
        """Channels: 1 grey, 3 colour."""
        return self.train.pixels.shape[1]

    def statistics(self, device: torch.device) -> tuple[Float[Tensor, "c 1 1"], Float[Tensor, "c 1 1"]]:
        """Mean and standard deviation per channel, as tensors that broadcast over images."""
        mean, std = torch.tensor([self.mean, self.std])[:, :, None, None].to(device)
        return mean, std


def hold_out(labels: np.ndarray, fraction: float, seed: int, purpose: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions that stay and positions held out: of every class the same share, at least one in either part.

    scikit-learn's stratified splits may leave a small class out of a part; here none may.

    Raises:
        InputError: a class has a single image.
    """
    rng = np.random.default_rng(seed)
    held: list[np.ndarray] = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) < 2:
            raise InputError(
                f"a class has too few images to hold out {purpose}: add images, or bring train/, val/ and test/"
            )
        held.append(members[: min(max(1, round(len(members) * fraction)), len(members) - 1)])
    out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), out), out
