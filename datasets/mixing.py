"""Mixup and CutMix: two images and their labels in one.

    x ← w·x + (1 − w)·partner, with a weight w per pixel: constant for Mixup (Zhang et al. 2017, arXiv:1710.09412), 0 in
    a rectangle and 1 elsewhere for CutMix (Yun et al. 2019, arXiv:1905.04899); the label's weight is the mean of w.

The partner is the neighbour, in pairs: a batch can be cut between pairs, and each part mixes as in the whole. An odd
one out stays as it is.

Axes: b batch, c channels, h w pixels, k classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from smallvit.datasets.boxes import Boxes, cutmix_boxes


@dataclass(frozen=True)
class Mix:
    """How each image of a batch is mixed with its partner."""

    kept: np.ndarray
    """Mixup's weight of the image itself; 1 where Mixup is not applied."""
    cut: Boxes
    """What CutMix takes from the partner."""

    def part(self, chosen: slice) -> Mix:
        """The same for a part of the images."""
        return Mix(self.kept[chosen], self.cut.part(chosen))


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """The distribution of mixtures."""

    prob: float = 0.0
    """Probability that an image (or a batch) is mixed at all, by Mixup or CutMix in equal shares."""
    mixup: float = 0.0
    """Alpha of Beta(alpha, alpha), of which the image's own weight is drawn; 0: no Mixup."""
    cutmix: float = 0.0
    """Alpha of Beta(alpha, alpha), of which the share of the area kept is drawn; 0: no CutMix."""
    per: Literal["image", "batch"] = "image"
    """Whether every image is mixed in its own way, or all of a batch in the same."""
    major: bool = False
    """Whether Mixup's own weight is at least a half."""

    def __bool__(self) -> bool:
        return bool(self.prob and (self.mixup or self.cutmix))

    def draw(self, rng: np.random.Generator, b: int, h: int, w: int) -> Mix:
        """Draw the mixtures of `b` images of `h` × `w` pixels."""
        n = b if self.per == "image" else 1
        mixed = rng.random(n) < self.prob
        share = 0.5 if self.mixup and self.cutmix else float(self.mixup > 0)
        by_mixup = rng.random(n) < share
        weight = _beta(rng, self.mixup, n)
        weight = np.maximum(weight, 1 - weight) if self.major else weight
        kept = np.where(mixed & by_mixup, weight, 1.0)
        cut = cutmix_boxes(rng, mixed & ~by_mixup & (self.cutmix > 0), _beta(rng, self.cutmix, n), h, w)
        return Mix(kept, cut) if n == b else Mix(np.repeat(kept, b), cut.repeat(b))


def mix_pairs(
    x: Float[Tensor, "b c h w"], targets: Float[Tensor, "b k"], mix: Mix
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k"]]:
    """Mix images and label distributions as drawn."""
    h, w = x.shape[-2:]
    kept = torch.from_numpy(mix.kept.astype(np.float32)).to(x.device, non_blocking=True)
    weight = torch.where(mix.cut.inside(h, w, x.device), 0.0, kept[:, None, None, None])
    share = weight.mean(dim=(1, 2, 3))[:, None]
    return torch.lerp(partners(x), x, weight), torch.lerp(partners(targets), targets, share)


def partners(x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
    """Each one's neighbour: two and two change places."""
    even = len(x) // 2 * 2
    swapped = x[:even].unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return swapped if even == len(x) else torch.cat([swapped, x[even:]])


def _beta(rng: np.random.Generator, alpha: float, b: int) -> np.ndarray:
    return rng.beta(alpha, alpha, b) if alpha else np.ones(b)
