"""What is trained on, and how it is varied."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from smallvit.options.checks import require

DATA_NAMES = (
    "digits",
    "cifar10",
    "cifar100",
    "cifar100-coarse",
    "svhn",
    "svhn-extra",
    "tiny-imagenet",
    "mnist",
    "fashion-mnist",
    "imagenet",
)
"""Data sets known by name; `smallvit.datasets.DATASETS` describes them."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images to train on, and how they are split."""

    data: str = "digits"
    """Data set by name (see smallvit list data), a folder or zip file of class folders, or a source of timm's readers
    (hfds/..., wds/..., tfds/...)."""
    data_dir: str | None = None
    """Folder of downloaded data sets; by default $SMALLVIT_DATA, else data/ in smallvit's cache folder."""
    data_url: str | None = None
    """Address to download from instead: of a folder with the data set's files, or of its one file."""
    img_size: int | None = None
    """Image height and width in pixels; by default the images' own, at most 64 for folders."""
    streaming: Literal["auto", "on", "off"] = "auto"
    """Decode images anew each epoch, in worker processes, instead of keeping them in memory; auto: if they do not fit
    there."""
    workers: int | None = None
    """Processes that decode while streaming; by default one per CPU core, at most 16."""
    train_fraction: float = 1.0
    """Share of each class's training images to train on; smaller shares are parts of larger ones."""
    balanced: bool = False
    """Draw every class equally often, however many images it has."""
    val_fraction: float = 0.1
    """Share of the training images held out to choose the best epoch, where the data brings no such split; with 0 the
    last epoch is taken."""
    test_fraction: float = 0.2
    """Share of all images held out for the final test, where the data brings no such split."""
    split_seed: int = 0
    """Seed of these splits; runs with the same one are judged on the same images."""
    skip_corrupt: bool = False
    """Leave out images that cannot be decoded, instead of stopping."""

    def __post_init__(self) -> None:
        require(bool(self.data), "data", repr(self.data), "a data set or folder")
        if self.img_size is not None:
            require(self.img_size >= 1, "img_size", self.img_size, "at least 1 pixel")
        require(0 <= self.val_fraction < 1, "val_fraction", self.val_fraction, "a share from 0 to below 1")
        require(0 < self.train_fraction <= 1, "train_fraction", self.train_fraction, "a share above 0, at most 1")
        require(self.workers is None or self.workers >= 0, "workers", self.workers, "0 or more")
        require(0 < self.test_fraction < 1, "test_fraction", self.test_fraction, "a share between 0 and 1")
        require(self.split_seed >= 0, "split_seed", self.split_seed, "0 or more")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How training images are varied: a preset, and options that take the place of its own values."""

    aug: Literal[
        "auto",
        "none",
        "basic",
        "mix",
        "paper",
        "deit",
        "deit3",
        "augreg-none",
        "augreg-light1",
        "augreg-light2",
        "augreg-medium1",
        "augreg-medium2",
        "augreg-strong1",
        "augreg-strong2",
    ] = "auto"
    """Preset: none, basic (crop, flip), mix (also erasing, Mixup or CutMix), paper (also AutoAugment), deit, deit3,
    augreg-none to augreg-strong2, or auto (what suits the data; mix for folders)."""
    crop: Literal["auto", "none", "pad", "reflect", "resized"] = "auto"
    """Random crop: of the image with a black border (pad) or a mirrored one (reflect), or a rectangle, resized."""
    crop_padding: int | None = None
    """Pixels of border around the image for pad and reflect; by default an eighth of the image size."""
    crop_scale: float | None = None
    """Least share of the image's area that resized cuts out; by default 0.08."""
    flip: float | None = None
    """Probability of mirroring left to right; by default 0.5, and 0 where mirrored images change meaning."""
    policy: str | None = None
    """none, autoaugment, rand-m9-n2-mstd0.5-inc1 (timm's), tf-rand-m15-n2 (AugReg's), trivial or 3augment."""
    jitter: float | None = None
    """Brightness, contrast and saturation vary by this share."""
    erasing: float | None = None
    """Probability of erasing a random rectangle."""
    erasing_fill: Literal["auto", "mean", "noise"] = "auto"
    """What erased rectangles show: the mean colour, or noise."""
    mix_prob: float | None = None
    """Probability that an image is mixed with another, by Mixup or CutMix in equal shares."""
    mixup: float | None = None
    """Mixup's alpha, of Beta(alpha, alpha); 0 turns it off."""
    cutmix: float | None = None
    """CutMix's alpha, of Beta(alpha, alpha); 0 turns it off."""
    mix_per: Literal["auto", "image", "batch"] = "auto"
    """Whether every image is mixed in its own way, or all of a batch in the same."""
    repeats: int | None = None
    """Repeated augmentation: views of each image in a batch; an epoch is as long, of fewer images."""
    test_flip: bool = False
    """Average the final test's predictions over each image and its mirror image."""

    def __post_init__(self) -> None:
        for name in ("flip", "erasing", "mix_prob"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, name, value, "a probability")
        for name in ("crop_padding", "jitter", "mixup", "cutmix"):
            value = getattr(self, name)
            require(value is None or 0 <= value < math.inf, name, value, "0 or more")
        if self.crop_scale is not None:
            require(0 < self.crop_scale <= 1, "crop_scale", self.crop_scale, "a share above 0, at most 1")
        if self.repeats is not None:
            require(self.repeats >= 1, "repeats", self.repeats, "at least 1")
