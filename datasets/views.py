"""Make several augmented views of each image, for pretraining without labels.

Global views show most of an image, local ones a small part of it (multi-crop; Caron et al. 2020, arXiv:2006.09882).
Colors, contrast, gray, blur and inversion follow DINO (Caron et al. 2021, arXiv:2104.14294), without changes of hue;
images of at most 32 pixels are not blurred.

Axes: b images, v views, c channels, h w pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from smallvit.config.options import PretrainConfig
from smallvit.datasets.augment import Augment, Draws, normalize
from smallvit.datasets.auto_augment import Step, jitter_colors
from smallvit.utils.errors import InputError
from smallvit.utils.sizes import ImageSize, height_width

JITTER, JITTER_PROB = 0.4, 0.8
"""Strength and probability of changes of brightness, contrast and saturation."""
GRAY_PROB, SOLARIZE_PROB, BLUR_PROB = 0.2, 0.1, 0.5
BLUR_SIDE = 32
"""Largest images in pixels that are not blurred."""
SCALES = {32: (0.7, 0.2, 0.5), 64: (0.5, 0.2, 0.4)}
"""Smallest global, smallest local and largest local share of the area, by the largest image size.

Source: Gani et al. 2022, arXiv:2210.07240.
"""
LARGE_SCALES = (0.3, 0.05, 0.3)
"""The same for larger images."""
LOCAL_VIEWS = {"lejepa": 2, "dino": 8}
"""Default of --local-views by objective."""


@dataclass(frozen=True)
class Views:
    """Views of b images, the global ones first; those of one size are one tensor."""

    groups: tuple[Float[Tensor, "b v c h w"], ...]
    seed: int
    """Seed of the objective's random numbers, the same for all parts of a batch."""

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.groups[0])

    def tensor_split(self, parts: int) -> list[Views]:
        """Return the views of equal parts of the images, as `Tensor.tensor_split` divides them."""
        split = (group.tensor_split(parts) for group in self.groups)
        return [Views(groups, self.seed) for groups in zip(*split, strict=True)]


@dataclass(frozen=True)
class ViewDraws:
    """Augmentation parameters of each view of a batch."""

    views: tuple[tuple[Draws, ...], ...]
    """By size, then by view."""
    seed: int

    def part(self, chosen: slice) -> ViewDraws:
        """Return the parameters of some of the images."""
        return ViewDraws(tuple(tuple(draws.part(chosen) for draws in group) for group in self.views), self.seed)


@dataclass(frozen=True, kw_only=True)
class ViewMaker:
    """Draw and make the views of a batch; takes the place of `Augment` in a `TrainLoader`."""

    kinds: tuple[tuple[Augment, int], ...]
    """Augmentation and number of the views of each size."""
    aug_repeats: int = 1
    alternate_flip: bool = False
    crop: str = "none"
    """Files are decoded whole, and views are crops of them."""

    @classmethod
    def from_config(cls, config: PretrainConfig, img_size: ImageSize, flip: float, local_size: ImageSize) -> ViewMaker:
        """Create the views of `config`.

        Args:
            flip: Probability of mirroring a view.
            local_size: Size of local views in pixels.

        Raises:
            InputError: The scales of local views are reversed, or there is only one view.
        """
        side = max(height_width(img_size))
        scales = next((each for size, each in SCALES.items() if side <= size), LARGE_SCALES)
        given = (config.global_scale, config.local_scale, config.local_scale_max)
        smallest, local, largest = (new or default for new, default in zip(given, scales, strict=True))
        if local > largest:
            raise InputError(f"--local-scale {local:g}: expected at most --local-scale-max {largest:g}")
        local_views = config.local_views if config.local_views is not None else LOCAL_VIEWS[config.objective]
        if config.global_views + local_views < 2:
            raise InputError("--global-views 1: expected at least 2 views of an image; add --local-views")
        augment = partial(
            Augment,
            crop="resized",
            flip=flip,
            policies=(partial(alter_colors, blur=side > BLUR_SIDE),),
            bicubic=True,
        )
        kinds = [(augment(crop_scale=smallest), config.global_views)]
        if local_views:
            options = {"crop_scale": local, "crop_scale_max": largest, "crop_size": local_size}
            kinds.append((augment(**options), local_views))
        return cls(kinds=tuple(kinds))

    def describe(self) -> str:
        """Return number, size and scale of the views in one line."""
        names = ("global", "local")
        return ", ".join(
            f"{count} {name} of {augment.crop_scale:.0%} to {augment.crop_scale_max:.0%} of the image"
            + (f" at {augment.crop_size} px" if augment.crop_size else "")
            for name, (augment, count) in zip(names, self.kinds, strict=False)
        )

    @property
    def count(self) -> int:
        """Number of views of an image."""
        return sum(count for _, count in self.kinds)

    @property
    def policies(self) -> tuple[object, ...]:
        """Changes of colors of all views."""
        return self.kinds[0][0].policies

    def draw(self, rng: np.random.Generator, b: int, h: int, w: int, flip: None = None) -> ViewDraws:
        """Draw parameters for the views of `b` images of `h` × `w` pixels."""
        return ViewDraws(
            tuple(tuple(augment.draw(rng, b, h, w) for _ in range(count)) for augment, count in self.kinds),
            int(rng.integers(2**63)),
        )

    def apply(
        self,
        images: UInt8[Tensor, "b c h w"],
        labels: Int64[Tensor, " b"],
        draws: ViewDraws,
        mean: Float[Tensor, "c 1 1"],
        std: Float[Tensor, "c 1 1"],
        classes: object = None,
        weights: object = None,
    ) -> tuple[Views, Int64[Tensor, " b"]]:
        """Return normalized views, and the labels, which pretraining does not use."""
        groups = []
        for (augment, _), drawn in zip(self.kinds, draws.views, strict=True):
            views = (augment.transform(images, augment.plan(each, images)) for each in drawn)
            groups.append(torch.stack([normalize(view, mean, std) for view in views], dim=1))
        return Views(tuple(groups), draws.seed), labels


def alter_colors(rng: np.random.Generator, b: int, size: int, *, blur: bool) -> list[Step]:
    """Draw changes of colors, then gray, solarized and blurred images."""
    return [*_happening(rng, JITTER_PROB, jitter_colors(JITTER, rng, b, size)), *_odd_steps(rng, b, blur)]


def _odd_steps(rng: np.random.Generator, b: int, blur: bool) -> Iterator[Step]:
    for name, probability, strengths in (
        ("Grayscale", GRAY_PROB, np.zeros(b)),
        ("Solarize", SOLARIZE_PROB, np.full(b, 128.0)),
        ("GaussianBlur", BLUR_PROB * blur, rng.uniform(0.1, 2, b)),
    ):
        yield Step(np.where(rng.random(b) < probability, name, "Identity"), strengths)


def _happening(rng: np.random.Generator, probability: float, steps: list[Step]) -> list[Step]:
    """Return steps that change only a share of the images."""
    happens = rng.random(len(steps[0].names)) < probability
    return [Step(np.where(happens, step.names, "Identity"), step.strengths) for step in steps]
