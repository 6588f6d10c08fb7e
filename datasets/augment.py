"""Batched augmentation on the training device, drawn anew for each image.

Parameters are drawn on the host from a generator that a seed, an epoch and a step determine, so they are the same on
every device; applying them is a handful of whole-tensor operations, without a loop over images.

    crop, flip       a padded crop (black or mirrored border), or a rectangle resized as by RandomResizedCrop; mirrored
    policy, jitter   colours and shapes: `policies`
    normalise        (x / 255 − mean) / std
    random erasing   a rectangle set to 0, the mean colour, or to noise; Zhong et al. 2017, arXiv:1708.04896
    Mixup, CutMix    `mixing`

Axes: b batch, c channels, h w pixels, k classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from smallvit.datasets.boxes import Boxes, crop_boxes, erasing_boxes
from smallvit.datasets.mixing import Mix, Mixing, mix_pairs
from smallvit.datasets.noise import normal_noise
from smallvit.datasets.operations import fetch, perform, resized_crop
from smallvit.datasets.policies import Policy, Step, jitter, policy
from smallvit.datasets.presets import preset
from smallvit.errors import InputError
from smallvit.options import AugmentConfig

LEAST_ERASED = 0.02
"""Least share of an image's area that random erasing takes."""
GREY = 128
"""What policies fill with where an image has been moved away, as AutoAugment's own code."""


@dataclass(frozen=True)
class Draws:
    """What happens to each image of a batch."""

    crop: Boxes
    """In pixels of the image, or of the padded one."""
    flip: np.ndarray
    steps: tuple[Step, ...]
    erase: Boxes
    noise: np.ndarray
    """Keys of the noise in erased rectangles."""
    mix: Mix

    def part(self, chosen: slice) -> Draws:
        """The same for a part of the images."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        steps = tuple(step.part(chosen) for step in values.pop("steps"))
        flip, noise = values.pop("flip")[chosen], values.pop("noise")[chosen]
        return Draws(flip=flip, noise=noise, steps=steps, **{name: v.part(chosen) for name, v in values.items()})


@dataclass(frozen=True, kw_only=True)
class Augment:
    """The augmentation of one data set: draw parameters for a batch, then apply them."""

    crop: Literal["none", "pad", "reflect", "resized"] = "none"
    padding: int = 0
    crop_scale: float = 0.08
    flip: float = 0.0
    policies: tuple[Policy, ...] = ()
    erasing: float = 0.0
    erasing_fill: Literal["mean", "noise"] = "mean"
    erasing_area: float = 0.4
    mixing: Mixing = field(default_factory=Mixing)
    repeats: int = 1

    @classmethod
    def from_config(
        cls, config: AugmentConfig, img_size: int, may_flip: bool, auto: str = "mix", own_policy: str = "cifar10"
    ) -> Augment:
        """The preset (`auto` names the one that suits the data), with the options that were given in place of its own.

        Raises:
            InputError: a border wider than the image, an option that has no effect, or no such policy.
        """
        values = preset(auto if config.aug == "auto" else config.aug, img_size)
        values["flip"] *= may_flip
        values |= {name: given for name in values if (given := getattr(config, name, None)) not in (None, "auto")}
        padding = _padding(config, values, img_size)
        _require_effect(config, values)
        drawn = (policy(values["policy"], own_policy), jitter(values["jitter"]))
        return cls(
            crop=values["crop"],
            padding=padding,
            crop_scale=values["crop_scale"],
            flip=values["flip"],
            policies=tuple(each for each in drawn if each is not None),
            erasing=values["erasing"],
            erasing_fill=values["erasing_fill"],
            erasing_area=values["erasing_area"],
            mixing=Mixing(
                prob=values["mix_prob"],
                mixup=values["mixup"],
                cutmix=values["cutmix"],
                per=values["mix_per"],
                major=values["mix_major"],
            ),
            repeats=values["repeats"],
        )

    def draw(self, rng: np.random.Generator, b: int, h: int, w: int) -> Draws:
        """Draw parameters for `b` images of `h` × `w` pixels."""
        if self.crop == "resized":
            crop = crop_boxes(rng, b, h, w, (self.crop_scale, 1.0))
        else:
            top, left = rng.integers(0, 2 * self.padding + 1, (2, b))
            crop = Boxes(top, left, top + h, left + w)
        flip = rng.random(b) < self.flip
        steps = tuple(step for each in self.policies for step in each(rng, b, min(h, w)))
        erase = erasing_boxes(rng, rng.random(b) < self.erasing, h, w, (LEAST_ERASED, self.erasing_area))
        noise = rng.integers(-(2**63), 2**63, b)
        return Draws(crop, flip, steps, erase, noise, self.mixing.draw(rng, b, h, w))

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
        x = normalise(self.vary(images, draws), mean, std)
        if self.erasing:
            x = erase(x, draws.erase, draws.noise if self.erasing_fill == "noise" else None)
        targets = F.one_hot(labels, classes).to(x.dtype)
        return mix_pairs(x, targets, draws.mix) if self.mixing else (x, targets)

    def vary(self, images: UInt8[Tensor, "b c h w"], draws: Draws) -> UInt8[Tensor, "b c h w"]:
        """What happens to grey levels: crop, flip, policies."""
        flip = _to(images.device, draws.flip)
        top, left = _to(images.device, draws.crop.top), _to(images.device, draws.crop.left)
        if self.crop == "resized":
            height, width = draws.crop.bottom - draws.crop.top, draws.crop.right - draws.crop.left
            images = resized_crop(images, top, left, _to(images.device, height), _to(images.device, width))
            top, left = torch.zeros_like(top), torch.zeros_like(left)
        images = crop_and_flip(images, self.padding, top, left, flip, mirror=self.crop == "reflect")
        for step in draws.steps:
            images = perform(images, step.names, step.strengths, step.places, fill=GREY)
        return images


def _require_effect(config: AugmentConfig, values: dict[str, Any]) -> None:
    """Check that what was asked for on purpose happens.

    Raises:
        InputError: an option is of no use with the others.
    """
    if not values["mix_prob"] and (config.mixup or config.cutmix or config.mix_per != "auto"):
        raise InputError("--mixup, --cutmix and --mix-per are of no use here without --mix-prob: give it too, say 0.5")
    if config.mix_prob and not (values["mixup"] or values["cutmix"]):
        raise InputError("--mix-prob is of no use here without --mixup or --cutmix: give one too, say --cutmix 1")
    if config.erasing_fill != "auto" and not values["erasing"]:
        raise InputError("--erasing-fill is of no use here without --erasing: give it too, say 0.25")


def _padding(config: AugmentConfig, values: dict[str, Any], img_size: int) -> int:
    """Pixels of border for the crop that was chosen."""
    crop, padding = values["crop"], values["crop_padding"]
    if config.crop_scale is not None and crop != "resized":
        raise InputError(f"--crop-scale is of no use with the crop {crop}; give --crop resized")
    if crop not in ("pad", "reflect"):
        if config.crop_padding is not None:
            raise InputError(f"--crop-padding is of no use with the crop {crop}; give --crop pad or reflect")
        return 0
    most = img_size - (crop == "reflect")
    if config.crop_padding is None:
        return min(most, round(img_size / 8) if padding is None else padding)
    if padding > most:
        raise InputError(f"--crop-padding {padding}: expected at most {most} for images of {img_size} px")
    return padding


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
    mirror: bool = False,
) -> UInt8[Tensor, "b c h w"]:
    """Pad with black (or the mirrored edge), cut h × w at (top, left), mirror where `flip`."""
    h, w = images.shape[-2:]
    columns = torch.arange(w, device=images.device)
    rows = top[:, None] + torch.arange(h, device=images.device)
    columns = left[:, None] + torch.where(flip[:, None], w - 1 - columns, columns)
    if padding and mirror:
        rows = h - 1 - (h - 1 - (rows - padding).abs()).abs()
        columns = w - 1 - (w - 1 - (columns - padding).abs()).abs()
    elif padding:
        images = F.pad(images, (padding,) * 4)
    return fetch(images, rows[:, :, None] * images.shape[-1] + columns[:, None, :])


def erase(x: Float[Tensor, "b c h w"], boxes: Boxes, keys: np.ndarray | None = None) -> Float[Tensor, "b c h w"]:
    """Set each image's rectangle to 0, the mean colour, or to normal noise from its key. Changes `x`."""
    chosen = np.flatnonzero(boxes.bottom > boxes.top)
    if not len(chosen):
        return x
    where = _to(x.device, chosen)
    erased = x[where]
    fill = 0.0 if keys is None else normal_noise(_to(x.device, keys[chosen]), erased[0].numel()).view_as(erased)
    x[where] = torch.where(boxes.part(chosen).inside(*x.shape[-2:], x.device), fill, erased)
    return x


def _to(device: torch.device, array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
