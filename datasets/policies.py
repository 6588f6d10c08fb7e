"""Augmentation policies: which operations, how strong, for each image of a batch.

    autoaugment-cifar10, -svhn, -imagenet   learnt pairs of operations; Cubuk et al. 2019, arXiv:1805.09501; the pairs
                                            and their strengths are torchvision's
    rand-m9-n2-mstd0.5-inc1                 RandAugment as timm and DeiT have it: n operations, each done with
                                            probability 0.5, of strength m ± mstd of 10, all growing with m
    tf-rand-m15-n2                          RandAugment as AugReg has it (TensorFlow's): always done, strength m of 10
    trivial                                 one operation of any strength; Müller, Hutter 2021, arXiv:2103.10158
    3augment                                grey, solarised or blurred; DeiT III, arXiv:2204.07118

A policy draws steps; every step is one operation per image, by its name in `operations`, with its strength. Lengths
that the sources give in pixels of a 224 px image are scaled with the image here.

Axes: b images, s steps.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from smallvit.errors import InputError

Level = Callable[[np.ndarray, int], np.ndarray]
"""From a level (0 to 1, above 1 too where the source has such) and the image's size to the operation's strength."""


@dataclass(frozen=True)
class Step:
    """One operation per image."""

    names: np.ndarray
    strengths: np.ndarray
    places: np.ndarray | None = None
    """Where in the image, from 0 to 1, down and across (2, b); only Cutout asks."""

    def part(self, chosen: slice) -> Step:
        """The same for a part of the images."""
        places = None if self.places is None else self.places[:, chosen]
        return Step(self.names[chosen], self.strengths[chosen], places)


Policy = Callable[[np.random.Generator, int, int], list[Step]]
"""Draws the steps of b images of a size in pixels."""


def _none(f: np.ndarray, size: int) -> np.ndarray:
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
    "AutoContrast": _none,
    "Equalize": _none,
    "Invert": _none,
}
TRIVIAL: dict[str, Level] = {
    "Identity": _none,
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
    "AutoContrast": _none,
    "Equalize": _none,
}
TIMM: dict[str, Level] = TORCHVISION | {
    "TranslateX": lambda f, size: 0.45 * size * f,
    "TranslateY": lambda f, size: 0.45 * size * f,
    "Posterize": lambda f, size: 4 - np.floor(4 * f),
    "Solarize": lambda f, size: 256 - np.floor(256 * f),
    "SolarizeAdd": lambda f, size: np.floor(110 * f),
}
TENSORFLOW: dict[str, Level] = TORCHVISION | {
    "TranslateX": lambda f, size: 100 / 224 * size * f,
    "TranslateY": lambda f, size: 100 / 224 * size * f,
    "Brightness": lambda f, size: 1.8 * f + 0.1 - 1,
    "Color": lambda f, size: 1.8 * f + 0.1 - 1,
    "Contrast": lambda f, size: 1.8 * f + 0.1 - 1,
    "Sharpness": lambda f, size: 1.8 * f + 0.1 - 1,
    "Posterize": lambda f, size: np.minimum(8, np.floor(4 * f)),
    "Solarize": lambda f, size: np.floor(256 * f),
    "SolarizeAdd": lambda f, size: np.floor(110 * f),
    "Cutout": lambda f, size: np.floor(40 / 224 * size * f),
}
ENHANCE = ("Brightness", "Color", "Contrast", "Sharpness")
"""Their strength is a factor: 1 and what the table says, more or less."""
SIGNED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", *ENHANCE)
TENSORFLOW_SIGNED = tuple(name for name in SIGNED if name not in ENHANCE)


def strengths(
    rng: np.random.Generator,
    names: np.ndarray,
    levels: np.ndarray,
    size: int,
    table: dict[str, Level],
    signed: tuple[str, ...] = SIGNED,
) -> np.ndarray:
    """The strengths of these operations at these levels, either sign equally likely where there are two."""
    values = np.zeros(len(names))
    for name in dict.fromkeys(names.tolist()):
        if name in table:
            values[names == name] = table[name](levels[names == name], size)
    flipped = np.isin(names, signed) & (rng.random(len(names)) < 0.5)
    return np.where(flipped, -values, values) + np.isin(names, ENHANCE)


def autoaugment(kind: str) -> Policy:
    """AutoAugment's policy for cifar10, svhn or imagenet."""
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
            steps.append(Step(drawn, strengths(rng, drawn, levels[chosen, position], size, TORCHVISION)))
        return steps

    return draw


def randaugment(magnitude: float, layers: int, deviation: float) -> Policy:
    """RandAugment as timm's `rand-m…-mstd…-inc1`."""
    operations = np.array(list(TIMM))

    def draw(rng: np.random.Generator, b: int, size: int) -> list[Step]:
        steps = []
        for _ in range(layers):
            drawn = np.where(rng.random(b) < 0.5, rng.choice(operations, b), "Identity")
            level = np.clip(rng.normal(magnitude, deviation, b), 0, 10) / 10
            amounts = strengths(rng, drawn, level, size, TIMM)
            steps.append(Step(drawn, np.where(np.isin(drawn, ENHANCE), np.maximum(0.1, amounts), amounts)))
        return steps

    return draw


def tensorflow_randaugment(magnitude: float, layers: int) -> Policy:
    """RandAugment as AugReg used it, from TensorFlow's EfficientNet code."""
    operations = np.array(list(TENSORFLOW))

    def draw(rng: np.random.Generator, b: int, size: int) -> list[Step]:
        steps = []
        for _ in range(layers):
            drawn = rng.choice(operations, b)
            amounts = strengths(rng, drawn, np.full(b, magnitude / 10), size, TENSORFLOW, TENSORFLOW_SIGNED)
            steps.append(Step(drawn, amounts, rng.random((2, b))))
        return steps

    return draw


def trivial(rng: np.random.Generator, b: int, size: int) -> list[Step]:
    """TrivialAugment (wide), its 31 levels."""
    drawn = rng.choice(np.array(list(TRIVIAL)), b)
    return [Step(drawn, strengths(rng, drawn, rng.integers(31, size=b) / 30, size, TRIVIAL))]


def three_augment(rng: np.random.Generator, b: int, size: int) -> list[Step]:
    """Grey, solarised at 128, or blurred by a Gaussian of 0.1 to 2 pixels."""
    drawn = rng.choice(np.array(["Grayscale", "Solarize", "GaussianBlur"]), b)
    return [Step(drawn, np.where(drawn == "Solarize", 128.0, rng.uniform(0.1, 2, b)))]


def colour_jitter(strength: float, rng: np.random.Generator, b: int, size: int) -> list[Step]:
    """Brightness, contrast and saturation by factors of 1 ± strength, in any order, as torchvision's ColorJitter."""
    order = rng.permuted(np.tile(np.array(["Brightness", "Contrast", "Color"]), (b, 1)), axis=1)
    return [Step(names, rng.uniform(max(0, 1 - strength), 1 + strength, b)) for names in order.T]


def policy(spec: str, own: str) -> Policy | None:
    """The policy that a specification names; `own` is the AutoAugment policy that suits the data.

    Raises:
        InputError: no such policy.
    """
    if spec == "none":
        return None
    if spec == "autoaugment":
        spec = f"autoaugment-{own}"
    if found := re.fullmatch("autoaugment-(cifar10|svhn|imagenet)", spec):
        return autoaugment(found[1])
    if found := re.fullmatch(r"rand((?:-(?:n\d+|(?:m|mstd)\d+(?:\.\d+)?))*)-inc1", spec):
        given = _numbers(found[1])
        return randaugment(given.get("m", 10), int(given.get("n", 2)), given.get("mstd", 0))
    if found := re.fullmatch(r"tf-rand((?:-(?:n\d+|m\d+(?:\.\d+)?))*)", spec):
        given = _numbers(found[1])
        return tensorflow_randaugment(given.get("m", 10), int(given.get("n", 2)))
    if spec in ("trivial", "3augment"):
        return {"trivial": trivial, "3augment": three_augment}[spec]
    raise InputError(
        f"--policy {spec}: expected none, autoaugment, autoaugment-cifar10, -svhn or -imagenet, "
        "rand-m9-n2-mstd0.5-inc1, tf-rand-m15-n2, trivial or 3augment"
    )


def jitter(strength: float) -> Policy | None:
    """Colour jitter of this strength; none for 0."""
    return partial(colour_jitter, strength) if strength else None


def _numbers(options: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"-([a-z]+)([\d.]+)", options)}
