"""Recipes: named experiments. Each is a function that returns a `Config`; options given to it win over its values.

    smallvit.recipes.paper(arch="vit", spt=True, lsa=True, data="cifar100")
    smallvit train --recipe paper --arch vit --spt --lsa --data cifar100

What a paper says of lengths in epochs is a share of the steps here, so that a shorter run keeps its proportions. The
batch sizes of ImageNet (1024 and more) hold for `data="imagenet"`; elsewhere it is 128, of which some hundred thousand
small images make a few hundred steps an epoch, and `lr_batch` scales the learning rate where the paper says so.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from smallvit.config import Config
from smallvit.errors import InputError, nearest

SMALL_BATCH = 128
"""Images in a step where the data is not ImageNet."""


def recipe(values: Callable[..., dict[str, Any]]) -> Callable[..., Config]:
    """A function of options that returns the values of a recipe, made one that returns its `Config`."""

    @functools.wraps(values, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    def build(**options: Any) -> Config:
        return Config.build(**(values(**options) | options))

    build.__signature__ = inspect.signature(build, follow_wrapped=False)
    return build


def chosen(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """What a recipe sets for these options, and the options: what `Config.build` takes, the rest left to defaults.

    Raises:
        InputError: there is no such recipe; the line names the nearest.
    """
    if name not in RECIPES:
        raise InputError(f"--recipe {name}: no such recipe{nearest(name, RECIPES)}; see smallvit list recipes")
    return inspect.unwrap(RECIPES[name])(**options) | options


@recipe
def paper(**options: Any) -> dict[str, Any]:
    """The training of Lee, Lee, Song 2021, for rows with and without SPT and LSA.

    arXiv:2112.13492, its code. The 100 epochs there are 300 passes over the images: the sampler hands out every image
    three times an epoch. So they are 300 here. The learning rate is 3e-3 for ViTs and T2T, as in most of the authors'
    commands, and 1e-3 for the others, the code's default. SPT and LSA are not switched on: add --spt --lsa.

    Command: smallvit train --recipe paper --arch vit --spt --lsa --data cifar100 --val-fraction 0
    Hardware, duration, accuracy: not yet measured.

    Differs from the code: a tenth of the training images is held out to choose the epoch, where the code takes the
    epoch that is best on the test (with --val-fraction 0 it is the last); norms, biases, positions and temperatures
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
        "warmup": 0.1,
        "aug": "paper",
        "reg": "paper",
    }


@recipe
def deit(**options: Any) -> dict[str, Any]:
    """DeiT: data-efficient training on ImageNet, 300 epochs.

    Touvron et al. 2021, arXiv:2012.12877, table 9. 5e-4 for each 512 images of a batch: 1e-3 at the 1024 of ImageNet,
    1.25e-4 at the 128 of other data.

    Command: smallvit train --recipe deit --arch deit_tiny_patch16_224 --data imagenet
    Hardware, duration, accuracy: not yet measured.

    Differs from the code: no moving average of the weights. The code keeps one but reports the model itself; here an
    average would be what is judged and saved, and a decay of 0.99996 remembers 25,000 steps, more than many small runs
    have (--ema 0.999 adds one). The warm-up begins at 0 instead of 1e-6; the test shows the whole image instead of
    its middle 7/8; no distillation, unless --teacher names one.
    """
    return {
        "epochs": 300,
        "batch_size": 1024 if options.get("data") == "imagenet" else SMALL_BATCH,
        "loss": "ce",
        "opt": "adamw",
        "lr": 5e-4,
        "lr_batch": 512,
        "sched": "cosine",
        "min_lr": 1e-5,
        "warmup": 5 / 300,
        "aug": "deit",
        "reg": "deit",
    }


@recipe
def deit3(**options: Any) -> dict[str, Any]:
    """DeiT III: LAMB, binary cross-entropy and a simpler augmentation, 800 epochs.

    Touvron et al. 2022, arXiv:2204.07118, ViT-S on ImageNet. 4e-3 for each 2048 images of a batch: 2.5e-4 at the 128
    of data other than ImageNet.

    Command: smallvit train --recipe deit3 --arch deit3_small_patch16_224 --data imagenet
    Hardware, duration, accuracy: not yet measured.

    Differs from the paper: stochastic depth of 0.05 for every model, where larger ones have more; LayerScale is up to
    the model (deit3_... have it). A linear rule for LAMB's learning rate is DeiT's, and untested at small batches.
    """
    return {
        "epochs": 800,
        "batch_size": 2048 if options.get("data") == "imagenet" else SMALL_BATCH,
        "loss": "bce",
        "opt": "lamb",
        "lr": 4e-3,
        "lr_batch": 2048,
        "sched": "cosine",
        "min_lr": 1e-5,
        "warmup": 5 / 800,
        "aug": "deit3",
        "reg": "deit3",
    }


@recipe
def augreg(**options: Any) -> dict[str, Any]:
    """AugReg: "How to train your ViT?" on ImageNet, augmentation medium1, 300 epochs.

    Steiner et al. 2021, arXiv:2106.10270. Of its seven augmentations and four regularisations: the middle one, for
    models of ViT-S/32's size, with neither dropout nor stochastic depth (it advises augmentation first) and the weight
    decay of its ImageNet runs. Others: --aug augreg-light1 (Ti/16) or augreg-medium2 (S/16, B), --reg augreg-0.1.

    Command: smallvit train --recipe augreg --arch vit_small_patch32_224 --data imagenet
    Hardware, duration, accuracy: not yet measured.

    Differs from the paper: a batch of 128 on data other than ImageNet, at the same learning rate, as it gives no rule
    for scaling it; the warm-up is the same share of the run (10,000 of its 93,835 steps); the sigmoid loss counts every
    label of a mixed image as whole and is the mean over the classes; the head's bias begins as the model has it.
    """
    return {
        "epochs": 300,
        "batch_size": 4096 if options.get("data") == "imagenet" else SMALL_BATCH,
        "loss": "bce",
        "opt": "adamw",
        "lr": 1e-3,
        "sched": "cosine",
        "min_lr": 0.0,
        "warmup": 0.1066,
        "clip_grad": 1.0,
        "aug": "augreg-medium1",
        "reg": "augreg-none-0.1",
    }


@recipe
def cct(**options: Any) -> dict[str, Any]:
    """Compact transformers: CCT-7 on CIFAR from scratch, 300 epochs.

    Hassani et al. 2021, arXiv:2104.05704, the settings that its code has for CIFAR-100.

    Command: smallvit train --recipe cct --arch vit --spt --lsa --data cifar100
    Hardware, duration, accuracy: not yet measured.

    Differs from the code: the model is --arch's, not CCT; the code adds ten epochs at the lowest learning rate, and its
    warm-up begins at 1e-6; a tenth of the training images is held out, unless --val-fraction 0. Erasing of 0.25 is in
    the code's settings for the data set, but not in those of its 300-epoch weights (--erasing 0).
    """
    return {
        "epochs": 300,
        "batch_size": 128,
        "loss": "ce",
        "opt": "adamw",
        "lr": 6e-4,
        "sched": "cosine",
        "min_lr": 1e-5,
        "warmup": 10 / 300,
        "aug": "deit",
        "repeats": 1,
        "crop": "resized",
        "crop_scale": 0.8,
        "weight_decay": 0.06,
        "smoothing": 0.1,
    }


@recipe
def resnet(**options: Any) -> dict[str, Any]:
    """The training of CIFAR's ResNets: SGD, a rate that drops twice, 182 epochs.

    He et al. 2016, arXiv:1512.03385, section 4.2. 64,000 steps of 128 images are 8.19 million: 182 passes over the
    45,000 images on which the paper chose these lengths, and which are left of CIFAR's 50,000 when a tenth is held out
    (352 steps an epoch, 64,064 in all). The learning rate drops after half of the steps and after three quarters, there
    32,000 and 48,000. The model is resnet56 unless --arch is given; resnet110 is warmed up over 400 of 64,000 steps.

    Command: smallvit train --recipe resnet --arch resnet110 --data cifar10
    Hardware, duration, accuracy: not yet measured.

    Differs from the paper: the images held out choose the epoch, where it takes the last (--val-fraction 0 --epochs 164
    does, after as many steps on all images); the warm-up is a line, where it has 0.01 until the training error is below
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
        "warmup": 400 / 64_000 if options.get("arch") == "resnet110" else 0.0,
        "aug": "basic",
        "reg": "none",
        "weight_decay": 1e-4,
    } | _baseline(options)


@recipe
def cnn(**options: Any) -> dict[str, Any]:
    """CNNs as they are trained today: SGD and a cosine, 200 epochs.

    No single paper's. Small data: the values of Wide ResNets (Zagoruyko, Komodakis 2016, arXiv:1605.07146: Nesterov's
    momentum, batch 128, weight decay 5e-4, crop and flip) with the cosine of Loshchilov, Hutter 2017, arXiv:1608.03983,
    in place of steps, and a warm-up of 5 epochs. ImageNet: those of Goyal et al. 2017, arXiv:1706.02677 (90 epochs, 0.1
    for 256 images, weight decay 1e-4, resized crop and flip, 5 epochs of warm-up), with the cosine, the label smoothing
    and the plain biases and norms of He et al. 2019, arXiv:1812.01187. The model is resnet56 unless --arch is given.

    Command: smallvit train --recipe cnn --arch resnet18 --data cifar100
    Hardware, duration, accuracy: not yet measured.

    Differs from the papers: norms and biases have no weight decay on small data either; the crop's border is black,
    where that of Wide ResNets is mirrored; a tenth of the training images is held out to choose the epoch, unless
    --val-fraction 0.
    """
    large = options.get("data") == "imagenet"
    epochs = 90 if large else 200
    return {
        "epochs": epochs,
        "batch_size": 256 if large else SMALL_BATCH,
        "loss": "ce",
        "opt": "sgd",
        "lr": 0.1,
        "sched": "cosine",
        "min_lr": 0.0,
        "warmup": 5 / epochs,
        "aug": "basic",
        **({"crop": "resized"} if large else {}),
        "reg": "none",
        "weight_decay": 1e-4 if large else 5e-4,
        "smoothing": 0.1 if large else 0.0,
    } | _baseline(options)


def _baseline(options: dict[str, Any]) -> dict[str, str]:
    """The architecture of recipes for CNNs, where none is given."""
    return {} if options.get("arch") or options.get("init") else {"arch": "resnet56"}


@recipe
def quick(**options: Any) -> dict[str, Any]:
    """A good model soon: SPT and LSA, little augmentation, 40 epochs with a learning rate that rises and falls.

    No paper's. A run this short has no use for strong augmentation. The learning rate rises over a fifth of the steps
    and falls in a line, as in one-cycle schedules (Smith, Topin 2017, arXiv:1708.07120).

    Command: smallvit train --recipe quick
    Hardware and duration: 21 s on two threads of an AMD EPYC.
    Accuracy: digits 98.42 ± 0.32 % (validation 98.60 ± 0.70 %), mean and standard deviation of seeds 0 to 2.
    Chosen on the digits' validation accuracies alone, where most choices made no difference beyond chance; other data
    is not yet measured.
    """
    return {
        "spt": True,
        "lsa": True,
        "epochs": 40,
        "batch_size": 64,
        "loss": "ce",
        "opt": "adamw",
        "lr": 3e-3,
        "sched": "linear",
        "min_lr": 1e-6,
        "warmup": 0.2,
        "ema": 0.999,
        "aug": "basic",
        "reg": "paper",
    }


@recipe
def best(**options: Any) -> dict[str, Any]:
    """The paper's models as we train them: Muon, smaller batches, fixed positions, stochastic depth that grows.

    No paper's: the augmentation, length and rates of `paper`, with what gained most in measured ablations at equal
    images seen and parameters (`smallvit reproduce best/ablation`; figures, failures too, in RESULTS.md). Muon is
    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon, as timm has it: matrices by it, the rest by AdamW.
    Positions and stochastic depth are changed in `vit` and `vit96` alone.

    Command: smallvit train --recipe best --data cifar100
    Hardware: one thread of an AMD EPYC. Accuracy after 10 passes over 7,400 images of CIFAR-100 (`smallvit reproduce
    best/cifar100 --budget 0.005`): 27.37 ± 0.37 %, where `paper` has 13.25 ± 0.20 %, mean and standard deviation of
    seeds 0 and 1, and 0 to 2. At the paper's length: not yet measured.
    """
    variants = {"sincos": True, "rising_drop_path": True}
    plain = options.get("arch") in (None, "vit", "vit96") and not options.get("init")
    return {
        **inspect.unwrap(paper)(**options),
        "spt": True,
        "lsa": True,
        "batch_size": 64,
        "opt": "muon",
        **(variants if plain else {}),
    }


@recipe
def binaryvit(**options: Any) -> dict[str, Any]:
    """BinaryViT: one step from random weights, taught by a full-precision teacher's logits alone, 300 epochs.

    Le, Li 2023, arXiv:2306.16678, its code: cross-entropy against the teacher's probabilities at temperature 1, without
    labels, AdamW with no weight decay and no warm-up, resized crops and mirroring alone. 5e-4 at 512 images; here the
    batch is 128 where the data is not ImageNet, at the same rate. Without --teacher it is the labels' loss. The model
    is binaryvit_tiny (binaryvit for ImageNet) unless --arch is given.

    Command: smallvit train --recipe binaryvit --data cifar100 --teacher runs/vit-spt-lsa-cifar100
    Hardware, duration, accuracy: not yet measured.

    Differs from the code: images of up to 64 pixels are cropped after padding, since a crop of 8 % of a small image is
    a few pixels.
    """
    large = options.get("data") == "imagenet"
    taught = {"distill": "soft", "distill_weight": 1.0, "distill_temperature": 1.0} if options.get("teacher") else {}
    own = {} if options.get("arch") or options.get("init") else {"arch": "binaryvit" if large else "binaryvit_tiny"}
    return {
        "epochs": 300,
        "batch_size": 512 if large else SMALL_BATCH,
        "loss": "ce",
        "opt": "adamw",
        "lr": 5e-4,
        "sched": "cosine",
        "min_lr": 0.0,
        "warmup": 0.0,
        "aug": "basic",
        **({"crop": "resized"} if large else {}),
        "reg": "none",
        **taught,
        **own,
    }


@recipe
def finetune(**options: Any) -> dict[str, Any]:
    """For models that begin with trained weights, at any image size: a small learning rate, smaller below, 30 epochs.

    No paper's: AdamW with a learning rate that falls by 0.75 from each layer to the one below it, as is usual since
    BEiT (Bao et al. 2021, arXiv:2106.08254), little augmentation, and an average of the weights. With SPT or LSA the
    model computes at first what it did without them (--plugin-init exact). A model that begins with random weights,
    without --init, learns slowly by it.

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
        "warmup": 0.1,
        "ema": 0.999,
        "aug": "basic",
        "reg": "deit",
        **({"plugin_init": "exact"} if plugins else {}),
    }


RECIPES: dict[str, Callable[..., Config]] = {
    "paper": paper,
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
}
"""What `--recipe` takes."""
