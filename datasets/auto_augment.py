"""Draw operations and their magnitudes for each image of a batch: AutoAugment, RandAugment and other policies.

    autoaugment-cifar10, -svhn, -imagenet   learned pairs of operations; Cubuk et al. 2019, arXiv:1805.09501; the pairs
                                            and their magnitudes are torchvision's
    rand-m9-n2-p0.5-mstd0.5-mmax10-inc1     RandAugment in timm and DeiT: n operations, each applied with probability
                                            p, of magnitude m ± mstd of 10, at most mmax; with inc1 all are stronger
                                            with larger m, without it as in TensorFlow's EfficientNet code
    trivial                                 one operation of any magnitude; Müller, Hutter 2021, arXiv:2103.10158
    3augment                                grayscale, solarize or blur; DeiT III, arXiv:2204.07118

A policy draws steps; a step is one operation of `functional` per image with its strength.

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

    def part(self, chosen: slice) -> Step:
        """Return the operations of some of the images."""
        return Step(self.names[chosen], self.strengths[chosen])


Policy = Callable[[np.random.Generator, int, int], list[Step]]
"""Draws the steps for b images of a size in pixels."""


def _zero(f: np.ndarray, size: int) -> np.ndarray:
    return np.zeros_like(f)


ENHANCE = ("Brightness", "Color", "Contrast", "Sharpness")
"""Operations whose strength is a factor: 1 plus or minus the value of the table."""
GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")

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
TIMM_INCREASING: dict[str, Level] = TORCHVISION | {
    "TranslateX": lambda f, size: 0.45 * size * f,
    "TranslateY": lambda f, size: 0.45 * size * f,
    "Posterize": lambda f, size: 4 - np.floor(4 * f),
    "Solarize": lambda f, size: 256 - np.floor(256 * f),
    "SolarizeAdd": lambda f, size: np.minimum(128, np.floor(110 * f)),
}
TIMM: dict[str, Level] = TIMM_INCREASING | {
    **dict.fromkeys(ENHANCE, lambda f, size: 1.8 * f - 0.9),
    "Posterize": lambda f, size: np.floor(4 * f),
    "Solarize": lambda f, size: np.minimum(256, np.floor(256 * f)),
}


def compute_strengths(
    rng: np.random.Generator,
    names: np.ndarray,
    levels: np.ndarray,
    size: int,
    table: dict[str, Level],
    signed: tuple[str, ...] = (*GEOMETRIC, *ENHANCE),
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


def randaugment(
    m: float = 10, n: int = 2, p: float = 0.5, mstd: float = 0, mmax: float = 10, *, increasing: bool
) -> Policy:
    """Return RandAugment as timm creates it from `rand-m…-n…-p…-mstd…-mmax…`, with `-inc1` if `increasing`."""
    table = TIMM_INCREASING if increasing else TIMM
    signed = (*GEOMETRIC, *ENHANCE) if increasing else GEOMETRIC
    operations = np.array(list(table))

    def draw(rng: np.random.Generator, b: int, size: int) -> list[Step]:
        steps = []
        for _ in range(n):
            drawn = np.where(rng.random(b) < p, rng.choice(operations, b), "Identity")
            level = np.clip(rng.normal(m, mstd, b), 0, mmax) / 10
            amounts = compute_strengths(rng, drawn, level, size, table, signed)
            steps.append(Step(drawn, np.where(np.isin(drawn, ENHANCE), np.maximum(0.1, amounts), amounts)))
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
    if match := re.fullmatch(r"rand((?:-(?:n\d+|(?:m|p|mstd|mmax)\d+(?:\.\d+)?))*)(-inc1)?", spec):
        options = {name: float(value) for name, value in re.findall(r"-([a-z]+)([\d.]+)", match[1])}
        return randaugment(**options | {"n": int(options.get("n", 2))}, increasing=match[2] is not None)
    if spec in ("trivial", "3augment"):
        return {"trivial": trivial, "3augment": three_augment}[spec]
    raise InputError(
        f"--auto-augment {spec}: expected none, autoaugment, autoaugment-cifar10, -svhn or -imagenet, "
        "rand-m9-n2-mstd0.5-inc1, trivial or 3augment"
    )
