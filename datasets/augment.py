"""Augment batches on the training device, with parameters drawn for each image.

Parameters are drawn on the CPU from a generator that depends on seed, epoch and step, so they are the same on every
device. They are applied in a few whole-tensor operations, without a loop over images.

    crop, flip       a padded crop (black or mirrored border) or RandomResizedCrop, and a horizontal flip
    policies         AutoAugment and others, color jitter: `auto_augment`
    normalize        (x / 255 − mean) / std
    random erasing   a rectangle set to 0, the mean color, or to noise; Zhong et al. 2017, arXiv:1708.04896
    Mixup, CutMix    x ← w·x + (1 − w)·partner, with a weight w per pixel

Mixup's weight is constant (Zhang et al. 2017, arXiv:1710.09412); CutMix's is 0 in a rectangle and 1 elsewhere (Yun et
al. 2019, arXiv:1905.04899). The weight of the label is the mean of w. The partner is the neighbor, in pairs: a batch
can be split between pairs, and each part is mixed as in the batch. An image without a neighbor remains unchanged.

Axes: b batch, c channels, h w pixels, k classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from smallvit.config.options import AugmentConfig
from smallvit.datasets.functional import (
    Operations,
    gather_pixels,
    normal_noise,
    plan_operations,
    resized_crop,
    run_operations,
)
from smallvit.datasets.presets import preset
from smallvit.datasets.upload import upload
from smallvit.utils.errors import InputError, warn
from smallvit.utils.sizes import ImageSize, height_width

if TYPE_CHECKING:
    from smallvit.datasets.auto_augment import Policy, Step

ATTEMPTS = 10
"""Number of rectangles drawn to find one that fits into the image."""
MIN_ERASED = 0.02
"""Minimum share of an image's area for random erasing."""
GRAY = 128
"""Fill for pixels outside of the image in geometric operations, as in AutoAugment's code."""


@dataclass(frozen=True)
class Boxes:
    """A rectangle per image in pixels, bottom and right exclusive; empty for images without one."""

    top: np.ndarray
    left: np.ndarray
    bottom: np.ndarray
    right: np.ndarray

    def part(self, chosen: slice | np.ndarray) -> Boxes:
        """Return the rectangles of some of the images."""
        return Boxes(self.top[chosen], self.left[chosen], self.bottom[chosen], self.right[chosen])

    def repeat(self, b: int) -> Boxes:
        """Return the first rectangle for b images."""
        return self.part(np.zeros(b, dtype=np.int64))

    def spans(self, h: int, w: int) -> Spans:
        """Return the rows and columns of each image's rectangle."""
        top, left, bottom, right = (edge[:, None] for edge in (self.top, self.left, self.bottom, self.right))
        y, x = np.arange(h), np.arange(w)
        return Spans((y >= top) & (y < bottom), (x >= left) & (x < right))


@dataclass(frozen=True)
class Spans:
    """Whether rows and columns belong to a rectangle, for each image: arrays, or after `upload` tensors."""

    rows: Bool[np.ndarray, "b h"] | Bool[Tensor, "b h"]
    columns: Bool[np.ndarray, "b w"] | Bool[Tensor, "b w"]

    @property
    def mask(self) -> Bool[Tensor, "b 1 h w"]:
        """Which pixels lie within each image's rectangle."""
        return self.rows[:, None, :, None] & self.columns[:, None, None, :]


@dataclass(frozen=True)
class RectangleDraws:
    """Random numbers in [0, 1) that a rectangle per image follows from, for images of any size."""

    area: Float[np.ndarray, "b attempts"]
    ratio: Float[np.ndarray, "b attempts"]
    top: Float[np.ndarray, " b"]
    left: Float[np.ndarray, " b"]

    @classmethod
    def draw(cls, rng: np.random.Generator, b: int) -> RectangleDraws:
        """Draw the numbers for b images."""
        return cls(rng.random((b, ATTEMPTS)), rng.random((b, ATTEMPTS)), rng.random(b), rng.random(b))

    def part(self, chosen: slice | np.ndarray) -> RectangleDraws:
        """Return the numbers of some of the images."""
        return RectangleDraws(self.area[chosen], self.ratio[chosen], self.top[chosen], self.left[chosen])

    def sides(
        self,
        h: int,
        w: int,
        area: tuple[float, float],
        ratio: tuple[float, float],
        shape: float,
        smaller: bool,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return heights and widths, and whether they fit; `ratio`, symmetric in its logarithm, is that to `shape`."""
        least, most = np.log(ratio)
        pixels = (area[0] + (area[1] - area[0]) * self.area) * h * w
        slant = shape * np.exp(least + (most - least) * self.ratio)
        height, width = np.round(np.sqrt(pixels * slant)), np.round(np.sqrt(pixels / slant))
        fits = (height < h) & (width < w) if smaller else (height <= h) & (width <= w) & (height > 0) & (width > 0)
        first = (np.arange(len(fits)), fits.argmax(axis=1))
        return height[first], width[first], fits.any(axis=1)

    def position(self, height: np.ndarray, width: np.ndarray, h: int, w: int) -> Boxes:
        """Return rectangles with these sides within images of h × w pixels."""
        top, left = np.floor(self.top * (h - height + 1)), np.floor(self.left * (w - width + 1))
        return _integer_boxes(top, left, top + height, left + width)


@dataclass(frozen=True)
class Mix:
    """Parameters of Mixup and CutMix for each image of a batch."""

    kept: np.ndarray
    """Mixup's weight of the image; 1 without Mixup."""
    cut: Boxes
    """CutMix's rectangle of the partner; empty without CutMix."""

    def part(self, chosen: slice) -> Mix:
        """Return the parameters of some of the images."""
        return Mix(self.kept[chosen], self.cut.part(chosen))

    def weights(self, h: int, w: int) -> PairWeights:
        """Return the weights in images of h × w pixels."""
        area = (self.cut.bottom - self.cut.top) * (self.cut.right - self.cut.left)
        kept, share = (each.astype(np.float32) for each in (self.kept, self.kept * (1 - area / (h * w))))
        return PairWeights(kept[:, None, None, None], self.cut.spans(h, w), share[:, None])


@dataclass(frozen=True)
class PairWeights:
    """Weights of images against their neighbors: arrays, or after `upload` tensors."""

    kept: Float[np.ndarray, "b 1 1 1"] | Float[Tensor, "b 1 1 1"]
    """Weight of a pixel outside of the rectangle, within which it is 0."""
    cut: Spans
    share: Float[np.ndarray, "b 1"] | Float[Tensor, "b 1"]
    """Weight of the label: the mean over all pixels."""


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Distribution of Mixup's and CutMix's parameters."""

    mixup_prob: float = 0.0
    """Probability that an image (or a batch) is mixed, by Mixup or CutMix in equal shares."""
    mixup: float = 0.0
    """Alpha of Beta(alpha, alpha), from which Mixup's weight is drawn; 0: no Mixup."""
    cutmix: float = 0.0
    """Alpha of Beta(alpha, alpha), from which CutMix's remaining area is drawn; 0: no CutMix."""
    mixup_mode: Literal["elem", "batch"] = "elem"
    """Whether parameters are drawn for each image or once for a batch."""
    mix_major: bool = False
    """Whether Mixup's weight is at least a half."""

    def __bool__(self) -> bool:
        return bool(self.mixup_prob and (self.mixup or self.cutmix))

    def draw(self, rng: np.random.Generator, b: int, h: int, w: int) -> Mix:
        """Draw the parameters of `b` images of `h` × `w` pixels."""
        n = b if self.mixup_mode == "elem" else 1
        mixed = rng.random(n) < self.mixup_prob
        share = 0.5 if self.mixup and self.cutmix else float(self.mixup > 0)
        by_mixup = rng.random(n) < share
        weight = _draw_beta(rng, self.mixup, n)
        weight = np.maximum(weight, 1 - weight) if self.mix_major else weight
        kept = np.where(mixed & by_mixup, weight, 1.0)
        cut = cutmix_boxes(rng, mixed & ~by_mixup & (self.cutmix > 0), _draw_beta(rng, self.cutmix, n), h, w)
        return Mix(kept, cut) if n == b else Mix(np.repeat(kept, b), cut.repeat(b))


@dataclass(frozen=True)
class Draws:
    """Augmentation parameters of each image of a batch."""

    crop: Boxes
    """In pixels of the image, or of the padded image."""
    flip: np.ndarray
    steps: tuple[Step, ...]
    erase: Boxes
    noise: np.ndarray
    """Keys of the random noise in erased rectangles."""
    mix: Mix

    def part(self, chosen: slice) -> Draws:
        """Return the parameters of some of the images."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        steps = tuple(step.part(chosen) for step in values.pop("steps"))
        flip, noise = values.pop("flip")[chosen], values.pop("noise")[chosen]
        return Draws(flip=flip, noise=noise, steps=steps, **{name: v.part(chosen) for name, v in values.items()})


@dataclass(frozen=True)
class CropIndices:
    """Positions in the flattened image of the pixels of a crop, row + column: arrays, or after `upload` tensors."""

    rows: Int64[np.ndarray, "b h 1"] | Int64[Tensor, "b h 1"]
    columns: Int64[np.ndarray, "b 1 w"] | Int64[Tensor, "b 1 w"]
    border: int
    """Width of the black border in pixels."""


@dataclass(frozen=True)
class Plan:
    """What to do with a batch on its device, from `Draws`."""

    resized: tuple[Tensor, Tensor, Tensor, Tensor] | None
    """Top, left, height and width of the rectangles of resized crops."""
    crop: CropIndices
    steps: tuple[Operations, ...]
    erased: Tensor
    """Indices of the images of which a rectangle is set to noise."""
    erase: Spans | None
    """Their rectangles; those of all images if they are set to the mean color; None without any."""
    noise: Tensor
    """Their keys of random noise."""
    mix: PairWeights | None


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Augmentation of a data set: draw parameters for a batch, then apply them."""

    crop: Literal["none", "pad", "reflect", "resized"] = "none"
    padding: int = 0
    crop_scale: float = 0.08
    crop_scale_max: float = 1.0
    crop_size: ImageSize | None = None
    """Size of resized crops in pixels; by default that of the images."""
    flip: float = 0.0
    alternate_flip: bool = False
    """Whether the caller of `draw` chooses which images are mirrored, as `Sampling.alternate_flips` does."""
    policies: tuple[Policy, ...] = ()
    bicubic: bool = False
    """Resample crops and geometric operations bicubically instead of bilinear crops and nearest pixels."""
    policy_fill: Literal["gray", "mean"] = "gray"
    """Fill of geometric operations: 128, or the data set's mean."""
    random_erasing: float = 0.0
    random_erasing_fill: Literal["mean", "noise"] = "mean"
    erasing_area: float = 0.4
    mixing: Mixing = field(default_factory=Mixing)
    aug_repeats: int = 1

    @classmethod
    def from_config(
        cls, config: AugmentConfig, img_size: ImageSize, flip: bool, aug: str = "mix", policy: str = "cifar10"
    ) -> Augment:
        """Create the augmentation of a preset, with the options of `config` instead of the preset's values.

        Args:
            flip: Whether mirrored images keep their class.
            aug: Preset for `--aug auto`.
            policy: AutoAugment policy for `--auto-augment autoaugment`.

        Raises:
            InputError: a border wider than the image, or an unknown policy.
        """
        values = preset(aug if config.aug == "auto" else config.aug, img_size)
        values["flip"] *= flip
        values |= {name: value for name in values if (value := getattr(config, name, None)) not in (None, "auto")}
        padding = _padding(config, values, img_size)
        _warn_ineffective(config, values)
        return cls(
            padding=padding,
            alternate_flip=config.alternate_flip and values["flip"] > 0,
            policies=_create_policies(values["auto_augment"], values["color_jitter"], policy),
            mixing=Mixing(**_own_values(Mixing, values)),
            **_own_values(cls, values),
        )

    def draw(self, rng: np.random.Generator, b: int, h: int, w: int, flip: np.ndarray | None = None) -> Draws:
        """Draw parameters for `b` images of `h` × `w` pixels; `flip` replaces random flips."""
        if self.crop == "resized":
            crop = crop_boxes(RectangleDraws.draw(rng, b), h, w, (self.crop_scale, self.crop_scale_max), h / w)
        else:
            top, left = rng.integers(0, 2 * self.padding + 1, (2, b))
            crop = Boxes(top, left, top + h, left + w)
        random_flip = rng.random(b) < self.flip
        steps = tuple(step for each in self.policies for step in each(rng, b, min(h, w)))
        erase = erasing_boxes(rng, rng.random(b) < self.random_erasing, h, w, (MIN_ERASED, self.erasing_area))
        noise = rng.integers(-(2**63), 2**63, b)
        return Draws(crop, random_flip if flip is None else flip, steps, erase, noise, self.mixing.draw(rng, b, h, w))

    def apply(
        self,
        images: UInt8[Tensor, "b c h w"],
        labels: Int64[Tensor, " b"],
        draws: Draws,
        mean: Float[Tensor, "c 1 1"],
        std: Float[Tensor, "c 1 1"],
        classes: int | Float[Tensor, "s k"],
        weights: Float[Tensor, " b"] | None = None,
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k"]]:
        """Return augmented, normalized images and label distributions, multiplied by the images' weights.

        Of two mixed images each label so has its share times the weight of that label's image.

        Args:
            classes: Number of classes, or the classes of each label as 0 and 1.
        """
        fill = (255 * mean).round_().clamp_(max=255).byte() if self.policy_fill == "mean" else GRAY
        plan = self.plan(draws, images)
        x = normalize(self.transform(images, plan, fill), mean, std)
        if plan.erase is not None and self.random_erasing_fill == "noise":
            x = erase(x, plan.erased, plan.erase, plan.noise)
        elif plan.erase is not None:
            x.masked_fill_(plan.erase.mask, 0.0)
        targets = F.one_hot(labels, classes).to(x.dtype) if isinstance(classes, int) else classes[labels]
        if weights is not None:
            targets = targets * weights[:, None]
        return (x, targets) if plan.mix is None else mix_pairs(x, targets, plan.mix)

    def plan(self, draws: Draws, images: UInt8[Tensor, "b c h w"]) -> Plan:
        """Copy what the images need of the parameters to their device, in one transfer."""
        h, w = self._size(images)
        top, left, resized = draws.crop.top, draws.crop.left, None
        if self.crop == "resized":
            sides = draws.crop.bottom - top, draws.crop.right - left
            resized = tuple(each.astype(np.float32) for each in (top, left, *sides))
            top = left = np.zeros_like(top)
        erased = np.flatnonzero(draws.erase.bottom > draws.erase.top)
        rectangles = draws.erase.part(erased) if self.random_erasing_fill == "noise" else draws.erase
        operations = (
            plan_operations(s.names, s.strengths, images.shape[1], h, w, bicubic=self.bicubic) for s in draws.steps
        )
        plan = Plan(
            resized,
            crop_indices(h, w, self.padding, top, left, draws.flip, mirror=self.crop == "reflect"),
            tuple(operations),
            erased,
            rectangles.spans(h, w) if len(erased) else None,
            draws.noise[erased],
            draws.mix.weights(h, w) if self.mixing else None,
        )
        return upload(plan, images.device)

    def _size(self, images: UInt8[Tensor, "b c h w"]) -> tuple[int, int]:
        """Return height and width of the crops."""
        resizes = self.crop == "resized" and self.crop_size is not None
        return height_width(self.crop_size) if resizes else tuple(images.shape[-2:])

    def transform(
        self, images: UInt8[Tensor, "b c h w"], plan: Plan, fill: int | UInt8[Tensor, "c 1 1"] = GRAY
    ) -> UInt8[Tensor, "b c h w"]:
        """Apply crop, flip and policies to gray levels; `fill` is for pixels from outside of the image."""
        if plan.resized is not None:
            images = resized_crop(images, *plan.resized, size=self._size(images), bicubic=self.bicubic)
        images = crop_and_flip(images, plan.crop)
        for operations in plan.steps:
            images = run_operations(images, operations, fill, bicubic=self.bicubic)
        return images


def _own_values(kind: type[Augment | Mixing], values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a preset that are fields of a class."""
    return {each.name: values[each.name] for each in fields(kind) if each.name in values}


def _warn_ineffective(config: AugmentConfig, values: dict[str, Any]) -> None:
    """Warn of options that have no effect with the others."""
    if not values["mixup_prob"] and (config.mixup or config.cutmix or config.mixup_mode != "auto"):
        warn("--mixup, --cutmix and --mixup-mode have no effect without --mixup-prob; add e.g. --mixup-prob 0.5")
    if config.mixup_prob and not (values["mixup"] or values["cutmix"]):
        warn("--mixup-prob has no effect without --mixup or --cutmix; add e.g. --cutmix 1")
    if config.alternate_flip and not values["flip"]:
        warn("--alternate-flip has no effect without --flip; add --flip 0.5 if mirrored images keep their class")
    if config.random_erasing_fill != "auto" and not values["random_erasing"]:
        warn("--random-erasing-fill has no effect without --random-erasing; add e.g. --random-erasing 0.25")


def _create_policies(auto_augment: str, color_jitter: float, policy: str) -> tuple[Policy, ...]:
    """Return AutoAugment or the like, and color jitter, as far as they are switched on."""
    if auto_augment == "none" and not color_jitter:
        return ()
    from smallvit.datasets.auto_augment import create_policy, jitter_colors

    jitter = partial(jitter_colors, color_jitter) if color_jitter else None
    return tuple(each for each in (create_policy(auto_augment, policy), jitter) if each is not None)


def _padding(config: AugmentConfig, values: dict[str, Any], img_size: ImageSize) -> int:
    """Return the border of the selected crop in pixels."""
    crop, padding = values["crop"], values["crop_padding"]
    if config.crop_scale is not None and crop != "resized":
        warn(f"--crop-scale has no effect with --crop {crop}; add --crop resized")
    if crop not in ("pad", "reflect"):
        if config.crop_padding is not None:
            warn(f"--crop-padding has no effect with --crop {crop}; add --crop pad or reflect")
        return 0
    side = min(height_width(img_size))
    largest = side - (crop == "reflect")
    if config.crop_padding is None:
        return min(largest, round(side / 8) if padding is None else padding)
    if padding > largest:
        raise InputError(f"--crop-padding {padding}: expected at most {largest} for images of {img_size} px")
    return padding


def normalize(
    images: UInt8[Tensor, "b c h w"], mean: Float[Tensor, "c 1 1"], std: Float[Tensor, "c 1 1"]
) -> Float[Tensor, "b c h w"]:
    """Normalize gray levels 0 to 255 per channel; `mean` and `std` are those of values in [0, 1]."""
    return images.float().div_(255).sub_(mean).div_(std)


def crop_indices(
    h: int,
    w: int,
    padding: int,
    top: Int64[np.ndarray, " b"],
    left: Int64[np.ndarray, " b"],
    flip: Bool[np.ndarray, " b"],
    *,
    mirror: bool = False,
) -> CropIndices:
    """Return the pixels of crops of h × w at (top, left) from the padded image, mirrored where `flip` is set.

    Args:
        mirror: Pad with the mirrored edge instead of black.
    """
    columns = np.arange(w)
    rows = top[:, None] + np.arange(h)
    columns = left[:, None] + np.where(flip[:, None], w - 1 - columns, columns)
    if mirror:
        rows = h - 1 - np.abs(h - 1 - np.abs(rows - padding))
        columns = w - 1 - np.abs(w - 1 - np.abs(columns - padding))
    border = 0 if mirror else padding
    return CropIndices((rows * (w + 2 * border))[:, :, None], columns[:, None, :], border)


def crop_and_flip(images: UInt8[Tensor, "b c h w"], crop: CropIndices) -> UInt8[Tensor, "b c h w"]:
    """Take the pixels of a crop of each image; `crop` has tensors."""
    if crop.border:
        images = F.pad(images, (crop.border,) * 4)
    return gather_pixels(images, crop.rows + crop.columns)


def erase(
    x: Float[Tensor, "b c h w"], erased: Int64[Tensor, " n"], rectangles: Spans, keys: Int64[Tensor, " n"]
) -> Float[Tensor, "b c h w"]:
    """Set a rectangle of each of n images in `x` to normal noise from its key, in place."""
    before = x[erased]
    noise = normal_noise(keys, before[0].numel()).view_as(before)
    x[erased] = torch.where(rectangles.mask, noise, before)
    return x


def mix_pairs(
    x: Float[Tensor, "b c h w"], targets: Float[Tensor, "b k"], weights: PairWeights
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k"]]:
    """Mix images and label distributions with their neighbors."""
    weight = weights.kept.masked_fill(weights.cut.mask, 0.0)
    return torch.lerp(swap_pairs(x), x, weight), torch.lerp(swap_pairs(targets), targets, weights.share)


def swap_pairs(x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
    """Swap each entry with its neighbor."""
    even = len(x) // 2 * 2
    swapped = x[:even].unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return swapped if even == len(x) else torch.cat([swapped, x[even:]])


def erasing_boxes(rng: np.random.Generator, chosen: np.ndarray, h: int, w: int, area: tuple[float, float]) -> Boxes:
    """Draw rectangles as torchvision's RandomErasing: area uniform, ratio log-uniform, the first of 10 that fits."""
    draws = RectangleDraws.draw(rng, len(chosen))
    height, width, fits = draws.sides(h, w, area, (0.3, 1 / 0.3), 1.0, smaller=True)
    happens = chosen & fits
    return draws.position(height * happens, width * happens, h, w)


def crop_boxes(draws: RectangleDraws, h: int, w: int, area: tuple[float, float], shape: float = 1.0) -> Boxes:
    """Return rectangles as torchvision's RandomResizedCrop: as for erasing, from 3:4 to 4:3, or else the whole image.

    Args:
        shape: Height divided by width of the result, to which these ratios are relative.
    """
    height, width, fits = draws.sides(h, w, area, (3 / 4, 4 / 3), shape, smaller=False)
    return draws.position(np.where(fits, height, h), np.where(fits, width, w), h, w)


def cutmix_boxes(rng: np.random.Generator, chosen: np.ndarray, kept: np.ndarray, h: int, w: int) -> Boxes:
    """Draw CutMix's rectangles: a share 1 − kept of the area, uniform center, clipped at the image's border."""
    side = np.sqrt(1 - kept)
    height, width = np.floor(h * side), np.floor(w * side)
    y, x = rng.integers(0, h, len(chosen)), rng.integers(0, w, len(chosen))
    top, bottom = np.clip(y - height // 2, 0, h), np.clip(y - height // 2 + height, 0, h)
    left, right = np.clip(x - width // 2, 0, w), np.clip(x - width // 2 + width, 0, w)
    return _integer_boxes(top, left, np.where(chosen, bottom, top), right)


def _integer_boxes(*edges: np.ndarray) -> Boxes:
    return Boxes(*(edge.astype(np.int64) for edge in edges))


def _draw_beta(rng: np.random.Generator, alpha: float, b: int) -> np.ndarray:
    return rng.beta(alpha, alpha, b) if alpha else np.ones(b)
