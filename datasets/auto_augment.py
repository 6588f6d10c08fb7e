"""Draw operations and their magnitudes for each image of a batch: AutoAugment, RandAugment and other policies.

    autoaugment-cifar10, -svhn, -imagenet   learned pairs of operations; Cubuk et al. 2019, arXiv:1805.09501; the pairs
                                            and their magnitudes are torchvision's
    rand-m9-n2-mstd0.5-inc1                 RandAugment in timm and DeiT: n operations, each applied with probability
                                            0.5, of magnitude m ± mstd of 10, all stronger with larger m
    tf-rand-m15-n2                          RandAugment as AugReg's published runs computed it in TensorFlow: always
                                            applied, magnitude m of 10
    trivial                                 one operation of any magnitude; Müller, Hutter 2021, arXiv:2103.10158
    3augment                                grayscale, solarize or blur; DeiT III, arXiv:2204.07118

A policy draws steps; a step is one operation of `functional` per image with its strength. Lengths that the sources
state in pixels of a 224 px image are scaled with the image here.

Axes: b images, s steps.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from smallvit.utils.errors import InputError

Level = Callable[[np.ndarray, int], np.ndarray]
"""Map a level (0 to 1, larger in some sources) and the image's size to the strength of an operation."""


@dataclass(frozen=True)
class Step:
    """An operation for each image."""

    names: np.ndarray
    strengths: np.ndarray
    centers: np.ndarray | None = None
    """Relative row and column (2, b) of Cutout's center."""

    def part(self, chosen: slice) -> Step:
        """Return the operations of some of the images."""
        centers = None if self.centers is None else self.centers[:, chosen]
        return Step(self.names[chosen], self.strengths[chosen], centers)


Policy = Callable[[np.random.Generator, int, int], list[Step]]
"""Draws the steps for b images of a size in pixels."""


def _zero(f: np.ndarray, size: int) -> np.ndarray:
    return np.zeros_like(f)


TORCHVISION: dict[str, Level] = {
    "ShearX": lambda f, size: 0.3 * f,
    "ShearY": lambda f, size: 0.3 * f,
    "TranslateX": lambda f, size: 150 / 331 * size * f,
    "TranslateY": lambda f, size: 150 / 331 * size * f,
    "Rotate": lambda f, size: 30 * f,
    "Brightness": lambda f, size: 0.9 * f,
    "Color": lambda f, size: 0.9 * f,
    "Contrast": lambda f, size: 0.9 * f,
    "Sharpness": lambda f, size: 0.9 * f,
    "Posterize": lambda f, size: 8 - np.round(4 * f),
    "Solarize": lambda f, size: 255 * (1 - f),
    "AutoContrast": _zero,
    "Equalize": _zero,
    "Invert": _zero,
}
TRIVIAL: dict[str, Level] = {
    "Identity": _zero,
    "ShearX": lambda f, size: 0.99 * f,
    "ShearY": lambda f, size: 0.99 * f,
    "TranslateX": lambda f, size: 32 * f,
    "TranslateY": lambda f, size: 32 * f,
    "Rotate": lambda f, size: 135 * f,
    "Brightness": lambda f, size: 0.99 * f,
    "Color": lambda f, size: 0.99 * f,
    "Contrast": lambda f, size: 0.99 * f,
    "Sharpness": lambda f, size: 0.99 * f,
    "Posterize": lambda f, size: 8 - np.round(6 * f),
    "Solarize": lambda f, size: 255 * (1 - f),
    "AutoContrast": _zero,
    "Equalize": _zero,
}
TIMM: dict[str, Level] = TORCHVISION | {
    "TranslateX": lambda f, size: 0.45 * size * f,
    "TranslateY": lambda f, size: 0.45 * size * f,
    "Posterize": lambda f, size: 4 - np.floor(4 * f),
    "Solarize": lambda f, size: 256 - np.floor(256 * f),
    "SolarizeAdd": lambda f, size: np.floor(110 * f),
}
TENSORFLOW: dict[str, Level] = {name: level for name, level in TORCHVISION.items() if name != "Contrast"} | {
    "TranslateX": lambda f, size: 100 / 224 * size * f,
    "TranslateY": lambda f, size: 100 / 224 * size * f,
    "Brightness": lambda f, size: 1.8 * f + 0.1 - 1,
    "Color": lambda f, size: 1.8 * f + 0.1 - 1,
    "PixelCountContrast": lambda f, size: 1.8 * f + 0.1 - 1,
    "Sharpness": lambda f, size: 1.8 * f + 0.1 - 1,
    "Posterize": lambda f, size: np.clip(np.floor(4 * f), 1, 8),
    "Solarize": lambda f, size: np.floor(256 * f) % 256,
    "SolarizeAdd": lambda f, size: np.floor(110 * f),
    "Cutout": lambda f, size: np.floor(40 / 224 * size * f),
}
"""Strengths that big_vision's code computes, which differ from its intention in three operations:

- Solarize compares uint8 images with thresholds of 256 and more, which wrap around: 256, 384, 512 become 0, 128, 0.
- Contrast blends with the number of pixels / 256 instead of the mean gray level; see `pixel_count_contrast`.
- Posterize keeps one bit instead of none, because shifts are limited to the 7 bits of a uint8.
"""
ENHANCE = ("Brightness", "Color", "Contrast", "PixelCountContrast", "Sharpness")
"""Operations whose strength is a factor: 1 plus or minus the value of the table."""
SIGNED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", *ENHANCE)
TENSORFLOW_SIGNED = tuple(name for name in SIGNED if name not in ENHANCE)


def compute_strengths(
    rng: np.random.Generator,
    names: np.ndarray,
    levels: np.ndarray,
    size: int,
    table: dict[str, Level],
    signed: tuple[str, ...] = SIGNED,
) -> np.ndarray:
    """Return the strengths of operations at levels; both signs are equally likely for signed operations."""
    values = np.zeros(len(names))
    for name in dict.fromkeys(names.tolist()):
        if name in table:
            values[names == name] = table[name](levels[names == name], size)
    flipped = np.isin(names, signed) & (rng.random(len(names)) < 0.5)
    return np.where(flipped, -values, values) + np.isin(names, ENHANCE)


def autoaugment(kind: str) -> Policy:
    """Return AutoAugment's policy for cifar10, svhn or imagenet."""
    pairs = AutoAugment(AutoAugmentPolicy(kind)).policies
    names = np.array([[name for name, _, _ in pair] for pair in pairs])
    odds = np.array([[probability for _, probability, _ in pair] for pair in pairs])
    levels = np.array([[(level or 0) / 9 for _, _, level in pair] for pair in pairs])

    def draw(rng: np.random.Generator, b: int, size: int) -> list[Step]:
        chosen = rng.integers(len(pairs), size=b)
        steps = []
        for position in range(2):
            happens = rng.random(b) < odds[chosen, position]
            drawn = np.where(happens, names[chosen, position], "Identity")
            steps.append(Step(drawn, compute_strengths(rng, drawn, levels[chosen, position], size, TORCHVISION)))
        return steps

    return draw


def randaugment(magnitude: float, layers: int, deviation: float) -> Policy:
    """Return RandAugment as in timm's `rand-m…-mstd…-inc1`."""
    operations = np.array(list(TIMM))

    def draw(rng: np.random.Generator, b: int, size: int) -> list[Step]:
        steps = []
        for _ in range(layers):
            drawn = np.where(rng.random(b) < 0.5, rng.choice(operations, b), "Identity")
            level = np.clip(rng.normal(magnitude, deviation, b), 0, 10) / 10
            amounts = compute_strengths(rng, drawn, level, size, TIMM)
            steps.append(Step(drawn, np.where(np.isin(drawn, ENHANCE), np.maximum(0.1, amounts), amounts)))
        return steps

    return draw


def tensorflow_randaugment(magnitude: float, layers: int) -> Policy:
    """Return RandAugment as AugReg's published runs computed it, with TensorFlow's EfficientNet code."""
    operations = np.array(list(TENSORFLOW))

    def draw(rng: np.random.Generator, b: int, size: int) -> list[Step]:
        steps = []
        for _ in range(layers):
            drawn = rng.choice(operations, b)
            amounts = compute_strengths(rng, drawn, np.full(b, magnitude / 10), size, TENSORFLOW, TENSORFLOW_SIGNED)
            steps.append(Step(drawn, amounts, rng.random((2, b))))
        return steps

    return draw


def trivial(rng: np.random.Generator, b: int, size: int) -> list[Step]:
    """Draw TrivialAugment (wide) with its 31 levels."""
    drawn = rng.choice(np.array(list(TRIVIAL)), b)
    return [Step(drawn, compute_strengths(rng, drawn, rng.integers(31, size=b) / 30, size, TRIVIAL))]


def three_augment(rng: np.random.Generator, b: int, size: int) -> list[Step]:
    """Draw 3-Augment: grayscale, solarize at 128, or a Gaussian blur of 0.1 to 2 pixels."""
    drawn = rng.choice(np.array(["Grayscale", "Solarize", "GaussianBlur"]), b)
    return [Step(drawn, np.where(drawn == "Solarize", 128.0, rng.uniform(0.1, 2, b)))]


def jitter_colors(strength: float, rng: np.random.Generator, b: int, size: int) -> list[Step]:
    """Draw brightness, contrast and saturation factors of 1 ± strength in random order, as ColorJitter does."""
    order = rng.permuted(np.tile(np.array(["Brightness", "Contrast", "Color"]), (b, 1)), axis=1)
    return [Step(names, rng.uniform(max(0, 1 - strength), 1 + strength, b)) for names in order.T]


def create_policy(spec: str, default: str) -> Policy | None:
    """Create the policy that a specification names, or None; `default` is the data set's AutoAugment policy.

    Raises:
        InputError: no such policy.
    """
    if spec == "none":
        return None
    if spec == "autoaugment":
        spec = f"autoaugment-{default}"
    if match := re.fullmatch("autoaugment-(cifar10|svhn|imagenet)", spec):
        return autoaugment(match[1])
    if match := re.fullmatch(r"rand((?:-(?:n\d+|(?:m|mstd)\d+(?:\.\d+)?))*)-inc1", spec):
        options = _parse_numbers(match[1])
        return randaugment(options.get("m", 10), int(options.get("n", 2)), options.get("mstd", 0))
    if match := re.fullmatch(r"tf-rand((?:-(?:n\d+|m\d+(?:\.\d+)?))*)", spec):
        options = _parse_numbers(match[1])
        return tensorflow_randaugment(options.get("m", 10), int(options.get("n", 2)))
    if spec in ("trivial", "3augment"):
        return {"trivial": trivial, "3augment": three_augment}[spec]
    raise InputError(
        f"--auto-augment {spec}: expected none, autoaugment, autoaugment-cifar10, -svhn or -imagenet, "
        "rand-m9-n2-mstd0.5-inc1, tf-rand-m15-n2, trivial or 3augment"
    )


def _parse_numbers(options: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"-([a-z]+)([\d.]+)", options)}
