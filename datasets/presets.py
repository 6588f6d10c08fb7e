"""List the published augmentation pipelines as presets, each with its source.

Values are those of `AugmentConfig`, `Augment` and `Mixing`, except `crop_small`, the crop for images of up to 32 px:
the sources resize random crops of 224 px images, but pad small ones. Without a `crop_padding`, the border is an eighth
of the image.
"""

from __future__ import annotations

from typing import Any

from smallvit.utils.sizes import ImageSize, height_width

SMALL = 32
"""Shorter side in pixels up to which DeiT's code pads images instead of resizing random crops."""

OFF: dict[str, Any] = {
    "crop": "none",
    "crop_padding": None,
    "crop_scale": 0.08,
    "flip": 0.0,
    "auto_augment": "none",
    "bicubic": False,
    "policy_fill": "gray",
    "color_jitter": 0.0,
    "random_erasing": 0.0,
    "random_erasing_fill": "mean",
    "erasing_area": 0.4,
    "mixup_prob": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "mixup_mode": "elem",
    "mix_major": False,
    "aug_repeats": 1,
}
RESIZED = {"crop": "resized", "crop_small": "pad", "flip": 0.5}
TIMM = {"bicubic": True, "policy_fill": "mean"}
"""Resampling and fill of timm's `create_transform` in DeiT's code."""


def augreg(layers: int, magnitude: int, mixup: float) -> dict[str, Any]:
    """Return a level of Steiner et al. 2021, "How to train your ViT?", arXiv:2106.10270.

    Crops of 5 % of the area or more, flip, RandAugment, and Mixup with one weight of at least a half per batch.
    RandAugment is timm's form that is closest to the TensorFlow code of the published runs: without Cutout, with the
    mean gray level in Contrast, and without the wrap-around of Solarize's thresholds above 255.
    """
    policy = f"rand-m{magnitude}-n{layers}-p1-mmax20" if layers else "none"
    mix = {"mixup_prob": 1.0, "mixup": mixup, "mixup_mode": "batch", "mix_major": True} if mixup else {}
    return RESIZED | {"crop_scale": 0.05, "auto_augment": policy} | mix


PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    # Krizhevsky 2009 and most after
    "basic": {"crop": "pad", "flip": 0.5},
    # Lee, Lee, Song 2021, arXiv:2112.13492, without AutoAugment, with parameters per image
    "mix": {"crop": "pad", "flip": 0.5, "random_erasing": 0.25, "mixup_prob": 0.5, "mixup": 1.0, "cutmix": 1.0},
    # Lee, Lee, Song 2021, arXiv:2112.13492, its code; erasing to the mean color (the code: mean/std above it)
    "lee2021": {
        "crop": "pad",
        "crop_padding": 4,
        "flip": 0.5,
        "auto_augment": "autoaugment",
        "random_erasing": 0.25,
        "mixup_prob": 0.5,
        "mixup": 1.0,
        "cutmix": 1.0,
        "mixup_mode": "batch",
    },
    # Touvron et al. 2021, arXiv:2012.12877, table 9; timm's erasing goes up to a third of the area
    "deit": RESIZED
    | TIMM
    | {
        "auto_augment": "rand-m9-n2-mstd0.5-inc1",
        "random_erasing": 0.25,
        "random_erasing_fill": "noise",
        "erasing_area": 1 / 3,
        "mixup_prob": 1.0,
        "mixup": 0.8,
        "cutmix": 1.0,
        "mixup_mode": "batch",
        "aug_repeats": 3,
    },
    # Touvron et al. 2022, DeiT III, arXiv:2204.07118; small images with its "simple random crop" (mirrored edges)
    "deit3": RESIZED
    | TIMM
    | {
        "crop_small": "reflect",
        "auto_augment": "3augment",
        "color_jitter": 0.3,
        "mixup_prob": 1.0,
        "mixup": 0.8,
        "cutmix": 1.0,
        "mixup_mode": "batch",
        "aug_repeats": 3,
    },
    "augreg-none": augreg(0, 0, 0.0),
    "augreg-light1": augreg(2, 0, 0.0),
    "augreg-light2": augreg(2, 10, 0.2),
    "augreg-medium1": augreg(2, 15, 0.2),
    "augreg-medium2": augreg(2, 15, 0.5),
    "augreg-strong1": augreg(2, 20, 0.5),
    "augreg-strong2": augreg(2, 20, 0.8),
}


def preset(name: str, img_size: ImageSize) -> dict[str, Any]:
    """Return all values of a preset for images of this size."""
    values = OFF | PRESETS[name]
    small = values.pop("crop_small", None)
    if small and min(height_width(img_size)) <= SMALL:
        values["crop"] = small
    return values
