"""Define recipes, named training settings. Each is a function that returns a `Config`; given options take precedence.

    smallvit.config.recipes.lee2021(arch="vit", spt=True, lsa=True, data="cifar100")
    smallvit train --recipe lee2021 --arch vit --spt --lsa --data cifar100

Lengths that papers give in epochs, such as warmup, are shares of the steps here, so that shorter runs keep the
proportions. Batch sizes of 1024 and more apply to ImageNet (`data="imagenet"`, or a folder of its 1,000 classes); other
datasets use 128. `lr_base_size` scales the learning rate if the paper does.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smallvit.config.config import Config
from smallvit.config.model import expand_arch
from smallvit.utils.errors import InputError, suggest

SMALL_BATCH = 128
"""Batch size for datasets other than ImageNet."""


def _is_imagenet(options: dict[str, Any]) -> bool:
    """Return whether the data is ImageNet: by name, or a folder with the 1,000 classes, in train/ or not."""
    data = options.get("data")
    if data == "imagenet" or not data:
        return data == "imagenet"
    root = Path(os.path.expanduser(data))
    return any(
        folder.is_dir() and sum(re.fullmatch(r"n\d{8}", name) is not None for name in os.listdir(folder)) == 1000
        for folder in (root / "train", root)
    )


def recipe(values: Callable[..., dict[str, Any]]) -> Callable[..., Config]:
    """Turn a function that returns a recipe's values into one that returns its `Config`."""

    @functools.wraps(values, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    def build(**options: Any) -> Config:
        options = expand_arch(options)
        return Config.build(**(values(**options) | options))

    vars(build)["__signature__"] = inspect.signature(build, follow_wrapped=False)
    return build


def apply_recipe(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a recipe for these options, and the options: arguments of `Config.build`.

    Raises:
        InputError: No such recipe; the line names the closest.
    """
    if name not in RECIPES:
        raise InputError(f"--recipe {name}: no such recipe{suggest(name, RECIPES)}; see smallvit list recipes")
    values = inspect.unwrap(RECIPES[name])(**options)
    if options.get("batch_size") == "auto":
        values = {"lr_base_size": values["batch_size"]} | values
    return values | options


@recipe
def lee2021(**options: Any) -> dict[str, Any]:
    """Train as Lee, Lee, Song 2021, with and without SPT and LSA.

    arXiv:2112.13492, its code. Its 100 epochs are 300 passes over the images, since its sampler repeats every image
    three times per epoch. The learning rate is 3e-3 for ViTs and T2T, as in most of the authors'
    commands, and 1e-3 for the others, the code's default. SPT and LSA are off by default: add --spt --lsa.

    Command: smallvit train --recipe lee2021 --arch vit --spt --lsa --data cifar100 --val-fraction 0
    Hardware, duration, accuracy: not yet measured.

    Differs from the code: a tenth of the training images is held out to choose the epoch, while the code takes the
    best epoch on the test set (with --val-fraction 0 it is the last); norms, biases, positions and temperatures
    have no weight decay; augmentation as in docs/data.md, models as in docs/models.md.
    """
    return {
        "epochs": 300,
        "batch_size": 128,
        "loss": "ce",
        "opt": "adamw",
        "lr": 3e-3 if (options.get("arch") or "vit") in ("vit", "vit96", "t2t") else 1e-3,
        "sched": "cosine",
        "min_lr": 1e-6,
        "warmup_ratio": 0.1,
        "aug": "lee2021",
        "regularization": "lee2021",
    }


@recipe
def deit(**options: Any) -> dict[str, Any]:
    """Train as DeiT: data-efficient training on ImageNet, 300 epochs.

    Touvron et al. 2021, arXiv:2012.12877, table 9. 5e-4 for each 512 images of a batch: 1e-3 at the 1024 of ImageNet,
    1.25e-4 at the 128 of other data.

    Command: smallvit train --recipe deit --arch deit_tiny_patch16_224 --data imagenet
    Hardware, duration, accuracy: not yet measured.

    Differs from the code: no moving average of the weights. The code keeps one but reports the model itself; here an
    average would be evaluated and saved, and a decay of 0.99996 averages over 25,000 steps, more than many small runs
    have (--ema-decay 0.999 adds one). The warmup starts at 0 instead of 1e-6; the test shows the whole image instead
    of its middle 7/8; no distillation, unless --teacher names one.
    """
    return {
        "epochs": 300,
        "batch_size": 1024 if _is_imagenet(options) else SMALL_BATCH,
        "loss": "ce",
        "opt": "adamw",
        "lr": 5e-4,
        "lr_base_size": 512,
        "sched": "cosine",
        "min_lr": 1e-5,
        "warmup_ratio": 5 / 300,
        "aug": "deit",
        "regularization": "deit",
    }


@recipe
def deit3(**options: Any) -> dict[str, Any]:
    """Train as DeiT III: LAMB, binary cross-entropy and a simpler augmentation, 800 epochs.

    Touvron et al. 2022, arXiv:2204.07118, ViT-S on ImageNet. 4e-3 for each 2048 images of a batch: 2.5e-4 at the 128
    of data other than ImageNet.

    Command: smallvit train --recipe deit3 --arch deit3_small_patch16_224 --data imagenet
    Hardware, duration, accuracy: not yet measured.

    Differs from the paper: stochastic depth of 0.05 for every model, while larger ones have more; LayerScale depends on
    the model (deit3_... have it). A linear rule for LAMB's learning rate is DeiT's, and untested at small batches.
    """
    return {
        "epochs": 800,
        "batch_size": 2048 if _is_imagenet(options) else SMALL_BATCH,
        "loss": "bce",
        "opt": "lamb",
        "lr": 4e-3,
        "lr_base_size": 2048,
        "sched": "cosine",
        "min_lr": 1e-5,
        "warmup_ratio": 5 / 800,
        "aug": "deit3",
        "regularization": "deit3",
    }


@recipe
def augreg(**options: Any) -> dict[str, Any]:
    """Train as AugReg ("How to train your ViT?") on ImageNet, augmentation medium1, 300 epochs.

    Steiner et al. 2021, arXiv:2106.10270. Of its seven augmentations and four regularizations: the middle one, for
    models of ViT-S/32's size, with neither dropout nor stochastic depth (it advises augmentation first) and the weight
    decay of its ImageNet runs. Others: --aug augreg-light1 (Ti/16) or augreg-medium2 (S/16, B), --regularization
    augreg-0.1.

    Command: smallvit train --recipe augreg --arch vit_small_patch32_224 --data imagenet
    Hardware, duration, accuracy: not yet measured.

    Differs from the paper: a batch of 128 on data other than ImageNet, at the same learning rate, as it gives no rule
    for scaling it; the warmup is the same share of the run (10,000 of its 93,835 steps); the sigmoid loss counts every
    label of a mixed image as whole and is the mean over the classes; the head's bias is initialized by the model.
    """
    return {
        "epochs": 300,
        "batch_size": 4096 if _is_imagenet(options) else SMALL_BATCH,
        "loss": "bce",
        "opt": "adamw",
        "lr": 1e-3,
        "sched": "cosine",
        "min_lr": 0.0,
        "warmup_ratio": 0.1066,
        "clip_grad": 1.0,
        "aug": "augreg-medium1",
        "regularization": "augreg-none-0.1",
    }


@recipe
def cct(**options: Any) -> dict[str, Any]:
    """Train as Compact Transformers: CCT-7 on CIFAR from scratch, 300 epochs.

    Hassani et al. 2021, arXiv:2104.05704, the settings that its code has for CIFAR-100.

    Command: smallvit train --recipe cct --arch vit --spt --lsa --data cifar100
    Hardware, duration, accuracy: not yet measured.

    Differs from the code: the model is --arch's, not CCT; the code adds ten epochs at the lowest learning rate, and its
    warmup starts at 1e-6; a tenth of the training images is held out, unless --val-fraction 0. Erasing of 0.25 is in
    the code's settings for the data set, but not in those of its 300-epoch weights (--random-erasing 0).
    """
    return {
        "epochs": 300,
        "batch_size": 128,
        "loss": "ce",
        "opt": "adamw",
        "lr": 6e-4,
        "sched": "cosine",
        "min_lr": 1e-5,
        "warmup_ratio": 10 / 300,
        "aug": "deit",
        "aug_repeats": 1,
        "crop": "resized",
        "crop_scale": 0.8,
        "weight_decay": 0.06,
        "label_smoothing": 0.1,
    }


@recipe
def resnet(**options: Any) -> dict[str, Any]:
    """Train as the ResNets of CIFAR: SGD, a learning rate that drops twice, 182 epochs.

    He et al. 2016, arXiv:1512.03385, section 4.2. 64,000 steps of 128 images are 8.19 million: 182 passes over the
    45,000 images on which the paper chose these lengths, and which are left of CIFAR's 50,000 when a tenth is held out
    (352 steps an epoch, 64,064 in all). The learning rate drops after half of the steps and after three quarters, there
    32,000 and 48,000. The model is resnet56 unless --arch is given; resnet110 is warmed up over 400 of 64,000 steps.

    Command: smallvit train --recipe resnet --arch resnet110 --data cifar10
    Hardware, duration, accuracy: not yet measured.

    Differs from the paper: the images held out choose the epoch, where it takes the last (--val-fraction 0 --epochs 164
    does, after as many steps on all images); the warmup is a line, where it has 0.01 until the training error is below
    80 %; norms and biases have no weight decay; the crop's border is an eighth of the image, 4 px at 32.
    """
    return {
        "epochs": 182,
        "batch_size": 128,
        "loss": "ce",
        "opt": "momentum",
        "lr": 0.1,
        "sched": "step",
        "min_lr": 0.0,
        "warmup_ratio": 400 / 64_000 if options.get("arch") == "resnet110" else 0.0,
        "aug": "basic",
        "regularization": "none",
        "weight_decay": 1e-4,
    } | _baseline(options)


@recipe
def cnn(**options: Any) -> dict[str, Any]:
    """Train CNNs with SGD and a cosine schedule, 200 epochs.

    No single paper's. Small data: the values of Wide ResNets (Zagoruyko, Komodakis 2016, arXiv:1605.07146: Nesterov's
    momentum, batch 128, weight decay 5e-4, crop and flip) with the cosine of Loshchilov, Hutter 2017, arXiv:1608.03983,
    in place of steps, and a warmup of 5 epochs. ImageNet: those of Goyal et al. 2017, arXiv:1706.02677 (90 epochs, 0.1
    for 256 images, weight decay 1e-4, resized crop and flip, 5 epochs of warmup), with the cosine, the label smoothing
    and the plain biases and norms of He et al. 2019, arXiv:1812.01187. The model is resnet56 unless --arch is given.

    Command: smallvit train --recipe cnn --arch resnet18 --data cifar100
    Hardware, duration, accuracy: not yet measured.

    Differs from the papers: norms and biases have no weight decay on small data either; the crop's border is black,
    where that of Wide ResNets is mirrored; a tenth of the training images is held out to choose the epoch, unless
    --val-fraction 0.
    """
    large = _is_imagenet(options)
    epochs = 90 if large else 200
    return {
        "epochs": epochs,
        "batch_size": 256 if large else SMALL_BATCH,
        "loss": "ce",
        "opt": "sgd",
        "lr": 0.1,
        "sched": "cosine",
        "min_lr": 0.0,
        "warmup_ratio": 5 / epochs,
        "aug": "basic",
        **({"crop": "resized"} if large else {}),
        "regularization": "none",
        "weight_decay": 1e-4 if large else 5e-4,
        "label_smoothing": 0.1 if large else 0.0,
    } | _baseline(options)


def _baseline(options: dict[str, Any]) -> dict[str, str]:
    """Return the default architecture of recipes for CNNs."""
    return {} if options.get("arch") or options.get("init") else {"arch": "resnet56"}


@recipe
def best(**options: Any) -> dict[str, Any]:
    """Train with Muon, smaller batches, a convolutional stem, depthwise FFN and LSA.

    No paper's: the augmentation, length and rates of `lee2021`, with what gained most in measured ablations at equal
    images seen (`smallvit reproduce best/ablation` and `plugins/cifar100`; figures, failures too, in RESULTS.md). Muon
    is Jordan et al. 2024, https://kellerjordan.github.io/posts/muon, as timm has it: matrices by it, the rest by AdamW.
    `vit` and `vit96` have a convolutional stem and depthwise FFN next to LSA, fixed positions and linearly rising
    stochastic depth; other architectures, and these with --spt, have SPT and LSA.

    Command: smallvit train --recipe best --data cifar100
    Hardware: one thread of an AMD EPYC. Accuracy of `vit96` after 10 passes over 14,700 images of CIFAR-100 (`smallvit
    reproduce plugins/cifar100 --budget 0.1`): 38.97 ± 0.33 %, with --spt 29.50 ± 1.00 %. Of `vit` with --spt after 10
    passes over 7,400 images (`smallvit reproduce best/cifar100 --budget 0.005`): 27.37 ± 0.37 %, where `lee2021` has
    13.25 ± 0.20 %. Mean and standard deviation of seeds 0 to 2, of `best` for `vit` 0 and 1. At the paper's length: not
    yet measured.
    """
    plain = options.get("arch") in (None, "vit", "vit96") and not options.get("init")
    variants = {"pos_embed": "sincos", "linear_drop_path": True} if plain else {}
    convolutional = plain and not options.get("spt")
    return {
        **inspect.unwrap(lee2021)(**options),
        **({"stem": True, "ffn": True} if convolutional else {"spt": not options.get("stem")}),
        "lsa": True,
        "batch_size": 64,
        "opt": "muon",
        **variants,
    }


@recipe
def quick(**options: Any) -> dict[str, Any]:
    """Train a good model quickly: the recipe `best` with random crops and flips as its only augmentation, 20 epochs.

    No paper's. A run this short does not gain from strong augmentation.

    Command: smallvit train --recipe quick
    Hardware and duration: one thread of an AMD EPYC, next to other programs; 109 ± 12 s.
    Accuracy: digits 98.79 ± 0.89 % (validation 99.53 ± 0.81 %), mean and standard deviation of seeds 0 to 2. `vit96`
    after 2 passes over 14,700 images of CIFAR-100: 26.28 % (`smallvit reproduce quick/cifar100`, one seed). Other
    architectures and data: not yet measured.
    """
    return {**inspect.unwrap(best)(**options), "epochs": 20, "aug": "basic"}


@recipe
def pretrain(**options: Any) -> dict[str, Any]:
    """Train features without labels, 200 epochs.

    LeJEPA (Balestriero, LeCun 2025, arXiv:2511.08544): AdamW, 2e-3, weight decay 0.05, 256 images of 4 views. With
    --objective dino (Caron et al. 2021, arXiv:2104.14294), on small images as Gani et al. 2022, arXiv:2210.07240: 5e-4,
    10 views.

    Command: smallvit pretrain --recipe pretrain --arch vit --spt --lsa --data cifar100
    Hardware, duration, accuracy: not yet measured.

    Differs from the papers: colors keep their hue, and views are crops of the image in the size that training sees.
    """
    return {
        "objective": "lejepa",
        "epochs": 200,
        "batch_size": 256,
        "opt": "adamw",
        "lr": 5e-4 if options.get("objective") == "dino" else 2e-3,
        "sched": "cosine",
        "min_lr": 1e-6,
        "warmup_ratio": 0.1,
        "weight_decay": 0.05,
        "dropout": 0.0,
        "drop_path": 0.0,
        "val_interval": 10,
    }


@recipe
def finetune_ssl(**options: Any) -> dict[str, Any]:
    """Train with labels from features that were pretrained without: the recipe `lee2021`, 100 epochs at 1e-3.

    The length is that of Gani et al. 2022, arXiv:2210.07240; the rate is ours.

    Command: smallvit train --recipe finetune-ssl --init RUN --data cifar100
    Hardware, duration, accuracy: not yet measured.
    """
    return {**inspect.unwrap(lee2021)(**options), "epochs": 100, "lr": 1e-3}


@recipe
def binaryvit(**options: Any) -> dict[str, Any]:
    """Train as BinaryViT: from random weights, by a full-precision teacher's logits alone, 300 epochs.

    Le, Li 2023, arXiv:2306.16678, its code: cross-entropy against the teacher's probabilities at temperature 1, without
    labels, AdamW with no weight decay and no warmup, resized crops and mirroring alone. 5e-4 at 512 images, falling to
    1e-5; here the batch is 128 where the data is not ImageNet, at the same rate. Without --teacher
    the loss is that of the labels. The model is binaryvit_tiny (binaryvit for ImageNet) unless --arch is given.

    Command: smallvit train --recipe binaryvit --data cifar100 --teacher runs/vit-spt-lsa-cifar100
    Hardware, duration, accuracy: not yet measured.

    Differs from the code: images of up to 64 pixels are cropped after padding, since a crop of 8 % of a small image is
    a few pixels.
    """
    large = _is_imagenet(options)
    taught = {"distill": "soft", "distill_weight": 1.0, "distill_temperature": 1.0} if options.get("teacher") else {}
    own = {} if options.get("arch") or options.get("init") else {"arch": "binaryvit" if large else "binaryvit_tiny"}
    return {
        "epochs": 300,
        "batch_size": 512 if large else SMALL_BATCH,
        "loss": "ce",
        "opt": "adamw",
        "lr": 5e-4,
        "sched": "cosine",
        "min_lr": 1e-5,
        "warmup_ratio": 0.0,
        "aug": "basic",
        **({"crop": "resized"} if large else {}),
        "regularization": "none",
        **taught,
        **own,
    }


@recipe
def finetune(**options: Any) -> dict[str, Any]:
    """Fine-tune pretrained weights at any image size: a small learning rate with layer decay, 30 epochs.

    No paper's: AdamW with a learning rate that falls by 0.75 from each layer to the one below it, as is usual since
    BEiT (Bao et al. 2021, arXiv:2106.08254), little augmentation, and an average of the weights. With SPT or LSA the
    model's outputs do not change at first (--plugin-init preserve). Random weights, without --init, learn slowly.

    Command: smallvit train --recipe finetune --init runs/vit-cifar100 --data path/to/my/images --img-size 64
    Hardware, duration, accuracy: not yet measured.
    """
    plugins = options.get("spt") or options.get("lsa")
    return {
        "epochs": 30,
        "batch_size": 128,
        "loss": "ce",
        "opt": "adamw",
        "lr": 1e-4,
        "layer_decay": 0.75,
        "sched": "cosine",
        "min_lr": 1e-6,
        "warmup_ratio": 0.1,
        "ema_decay": 0.999,
        "aug": "basic",
        "regularization": "deit",
        **({"plugin_init": "preserve"} if plugins else {}),
    }


RECIPES: dict[str, Callable[..., Config]] = {
    "lee2021": lee2021,
    "deit": deit,
    "deit3": deit3,
    "augreg": augreg,
    "cct": cct,
    "resnet": resnet,
    "cnn": cnn,
    "quick": quick,
    "best": best,
    "binaryvit": binaryvit,
    "finetune": finetune,
    "pretrain": pretrain,
    "finetune-ssl": finetune_ssl,
}
"""All recipes by name: values of --recipe."""
