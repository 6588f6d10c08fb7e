"""Batched augmentation on the training device, every parameter drawn anew for each image.

Drawing and applying are two steps. The draws are a few numbers per image from a NumPy generator, so they are the
same on every device; applying them is a handful of whole-tensor operations, without a loop over images.

    crop, flip        one gather from the padded uint8 images (black border, as torchvision's RandomCrop)
    normalise         (x / 255 − mean) / std
    random erasing    a rectangle set to 0, the mean colour; Zhong et al. 2017, arXiv:1708.04896
    Mixup, CutMix     x ← w·x + (1 − w)·partner with a weight per pixel: constant for Mixup (Zhang et al. 2017,
                      arXiv:1710.09412), 0 in a rectangle and 1 elsewhere for CutMix (Yun et al. 2019,
                      arXiv:1905.04899); the label's weight is the mean of w. The partner is the previous image.

Axes: b batch, c channels, h w pixels, k classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from smallvit.config import AugmentConfig, InputError

PRESETS: dict[str, dict[str, float]] = {
    "none": {"crop": 0, "flip": 0, "erasing": 0, "mix_prob": 0, "mixup": 0, "cutmix": 0},
    "basic": {"crop": 1 / 8, "flip": 0.5, "erasing": 0, "mix_prob": 0, "mixup": 0, "cutmix": 0},
    "mix": {"crop": 1 / 8, "flip": 0.5, "erasing": 0.25, "mix_prob": 0.5, "mixup": 1, "cutmix": 1},
}
ERASED_AREA = (0.02, 0.4)
ERASED_RATIO = (0.3, 1 / 0.3)
ERASING_ATTEMPTS = 10


@dataclass(frozen=True)
class Boxes:
    """A rectangle per image in pixels, bottom and right exclusive; empty where nothing is to happen."""

    top: np.ndarray
    left: np.ndarray
    bottom: np.ndarray
    right: np.ndarray


@dataclass(frozen=True)
class Draws:
    """What happens to each image of a batch."""

    top: np.ndarray
    """Row of the padded image at which the crop begins."""
    left: np.ndarray
    flip: np.ndarray
    erase: Boxes
    mixup: np.ndarray
    """Weight of the image against its partner; 1 where Mixup is not applied."""
    cutmix: Boxes


@dataclass(frozen=True, kw_only=True)
class Augment:
    """The augmentation of one data set: draw parameters for a batch, then apply them."""

    padding: int
    flip: float
    erasing: float
    mix_prob: float
    mixup: float
    cutmix: float

    @classmethod
    def from_config(cls, config: AugmentConfig, img_size: int, may_flip: bool, auto: str = "mix") -> Augment:
        """The preset (`auto` names the one that suits the data), with the options that were given in place of its own.

        Raises:
            InputError: a padding wider than the image.
        """
        preset = dict(PRESETS[auto if config.aug == "auto" else config.aug])
        preset["padding"] = round(preset.pop("crop") * img_size)
        preset["flip"] *= may_flip
        given = {
            "padding": config.crop_padding,
            "flip": config.flip,
            "erasing": config.erasing,
            "mix_prob": config.mix_prob,
            "mixup": config.mixup,
            "cutmix": config.cutmix,
        }
        chosen = preset | {name: value for name, value in given.items() if value is not None}
        if chosen["padding"] > img_size:
            raise InputError(f"--crop-padding {chosen['padding']}: expected at most the image size, {img_size}")
        return cls(**chosen)

    def draw(self, rng: np.random.Generator, b: int, h: int, w: int) -> Draws:
        """Draw parameters for `b` images of `h` × `w` pixels."""
        offsets = rng.integers(0, 2 * self.padding + 1, (2, b))
        flip = rng.random(b) < self.flip
        erase = erasing_boxes(rng, rng.random(b) < self.erasing, h, w)
        mixed = rng.random(b) < self.mix_prob
        share = 0.5 if self.mixup and self.cutmix else float(self.mixup > 0)
        by_mixup = rng.random(b) < share
        cut = mixed & ~by_mixup & (self.cutmix > 0)
        mixup = np.where(mixed & by_mixup, _beta(rng, self.mixup, b), 1.0)
        return Draws(*offsets, flip, erase, mixup, cutmix_boxes(rng, cut, _beta(rng, self.cutmix, b), h, w))

    def apply(
        self,
        images: UInt8[Tensor, "b c h w"],
        labels: Int64[Tensor, " b"],
        draws: Draws,
        mean: Float[Tensor, "c 1 1"],
        std: Float[Tensor, "c 1 1"],
        classes: int,
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k"]]:
        """Normalised images and label distributions."""
        device, (h, w) = images.device, images.shape[-2:]
        cropped = crop_and_flip(images, self.padding, *_to(device, draws.top, draws.left, draws.flip))
        x = normalise(cropped, mean, std)
        if self.erasing:
            x = x.masked_fill(inside(draws.erase, h, w, device), 0.0)
        targets = F.one_hot(labels, classes).to(x.dtype)
        if self.mix_prob:
            (kept,) = _to(device, draws.mixup.astype(np.float32))
            weight = torch.where(inside(draws.cutmix, h, w, device), 0.0, kept[:, None, None, None])
            x = torch.lerp(x.roll(1, 0), x, weight)
            targets = torch.lerp(targets.roll(1, 0), targets, weight.mean(dim=(1, 2, 3))[:, None])
        return x, targets


def normalise(
    images: UInt8[Tensor, "b c h w"], mean: Float[Tensor, "c 1 1"], std: Float[Tensor, "c 1 1"]
) -> Float[Tensor, "b c h w"]:
    """Grey levels 0 to 255 to zero mean and unit variance per channel; mean and std of values in [0, 1]."""
    return images.float().div_(255).sub_(mean).div_(std)


def crop_and_flip(
    images: UInt8[Tensor, "b c h w"],
    padding: int,
    top: Int64[Tensor, " b"],
    left: Int64[Tensor, " b"],
    flip: Tensor,
) -> UInt8[Tensor, "b c h w"]:
    """Pad with black, cut h × w at (top, left), mirror where `flip`."""
    b, c, h, w = images.shape
    if padding:
        images = F.pad(images, (padding,) * 4)
    rows = top[:, None] + torch.arange(h, device=images.device)
    columns = torch.arange(w, device=images.device)
    columns = left[:, None] + torch.where(flip[:, None], w - 1 - columns, columns)
    each = torch.arange(b, device=images.device)[:, None, None, None]
    channel = torch.arange(c, device=images.device)[:, None, None]
    return images[each, channel, rows[:, None, :, None], columns[:, None, None, :]]


def inside(boxes: Boxes, h: int, w: int, device: torch.device) -> Tensor:
    """Mask (b, 1, h, w) of the pixels within each image's rectangle."""
    top, left, bottom, right = _to(device, boxes.top, boxes.left, boxes.bottom, boxes.right)
    y, x = torch.arange(h, device=device), torch.arange(w, device=device)
    rows = (y >= top[:, None]) & (y < bottom[:, None])
    columns = (x >= left[:, None]) & (x < right[:, None])
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def erasing_boxes(rng: np.random.Generator, chosen: np.ndarray, h: int, w: int) -> Boxes:
    """Rectangles after torchvision's RandomErasing: area uniform, ratio log-uniform, the first of 10 that fits."""
    shape = (len(chosen), ERASING_ATTEMPTS)
    area = rng.uniform(*ERASED_AREA, shape) * h * w
    ratio = np.exp(rng.uniform(*np.log(ERASED_RATIO), shape))
    height, width = np.round(np.sqrt(area * ratio)), np.round(np.sqrt(area / ratio))
    fits = (height < h) & (width < w)
    first = (np.arange(len(chosen)), fits.argmax(axis=1))
    happens = chosen & fits.any(axis=1)
    height, width = height[first] * happens, width[first] * happens
    top = np.floor(rng.random(len(chosen)) * (h - height + 1))
    left = np.floor(rng.random(len(chosen)) * (w - width + 1))
    return _boxes(top, left, top + height, left + width)


def cutmix_boxes(rng: np.random.Generator, chosen: np.ndarray, kept: np.ndarray, h: int, w: int) -> Boxes:
    """CutMix's rectangles: share 1 − kept of the area, centre uniform, cut off at the image's border."""
    side = np.sqrt(1 - kept)
    height, width = np.floor(h * side), np.floor(w * side)
    y, x = rng.integers(0, h, len(chosen)), rng.integers(0, w, len(chosen))
    top, bottom = np.clip(y - height // 2, 0, h), np.clip(y - height // 2 + height, 0, h)
    left, right = np.clip(x - width // 2, 0, w), np.clip(x - width // 2 + width, 0, w)
    return _boxes(top, left, np.where(chosen, bottom, top), right)


def _boxes(*edges: np.ndarray) -> Boxes:
    return Boxes(*(edge.astype(np.int64) for edge in edges))


def _beta(rng: np.random.Generator, alpha: float, b: int) -> np.ndarray:
    return rng.beta(alpha, alpha, b) if alpha else np.ones(b)


def _to(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(array).to(device, non_blocking=True) for array in arrays]
