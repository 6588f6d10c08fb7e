"""What others have published: top-1 accuracies on the test, in per cent, with where each stands.

Columns are data sets by smallvit's names. Nothing here was measured by smallvit.
"""

from __future__ import annotations

from dataclasses import dataclass

DATA = ("cifar10", "cifar100", "svhn", "tiny-imagenet")
"""The columns of the tables that follow."""

LEE2021 = "Lee, Lee, Song 2021, arXiv:2112.13492"
LEE2021_CODE = f"{LEE2021}, the README of its code"
GANI2022 = "Gani et al. 2022, arXiv:2210.07240, the README of its code"
DHVT2022 = "Lu et al. 2022, arXiv:2210.05958, an early draft"
CCT2021 = "Hassani et al. 2021, arXiv:2104.05704, the README of its code"

# Lee, Lee, Song 2021, the README of its code; best test accuracy of 100 epochs of three passes each
MAIN: dict[str, tuple[float, float, float, float]] = {
    "vit": (93.58, 73.81, 97.82, 57.07),
    "vit+spt+lsa": (94.53, 76.92, 97.79, 61.07),
    "t2t": (95.30, 77.00, 97.90, 60.57),
    "t2t+spt+lsa": (95.57, 77.36, 97.91, 61.83),
    "cait": (94.91, 76.89, 98.13, 64.37),
    "cait+spt+lsa": (95.81, 80.32, 98.28, 67.18),
    "pit": (94.24, 74.99, 97.83, 60.25),
    "pit+spt+lsa": (95.88, 79.00, 97.93, 62.91),
    "swin": (94.46, 76.87, 97.72, 60.87),
    "swin+spt+lsa": (95.93, 79.99, 97.92, 64.95),
}

# Gani et al. 2022: CNNs trained beside the models of Lee, Lee, Song
CNNS: dict[str, tuple[float, float, float, float]] = {
    "resnet56": (94.65, 74.44, 97.61, 56.51),
    "resnet110": (95.27, 76.18, 97.82, 59.77),
    "efficientnet_b0": (88.38, 61.64, 96.06, 55.48),
    "resnet18": (90.44, 64.49, 96.78, 53.32),
}

# Lee, Lee, Song 2021, the ablation of ViT, by way of a summary of the paper
ABLATION: dict[str, dict[str, float]] = {
    "vit": {"cifar100": 73.81, "tiny-imagenet": 57.07},
    "vit+temperature": {"cifar100": 74.35, "tiny-imagenet": 57.95},
    "vit+mask": {"cifar100": 74.34, "tiny-imagenet": 58.29},
    "vit+lsa": {"cifar100": 74.87, "tiny-imagenet": 58.50},
    "vit+spt": {"cifar100": 76.29, "tiny-imagenet": 60.67},
    "vit+spt+lsa": {"cifar100": 76.92, "tiny-imagenet": 61.07},
}

# DeiT on CIFAR-100 from scratch with patches of 2 pixels, 300 epochs
DEIT: dict[str, float] = {"deit_tiny_patch16_224": 67.52, "deit_small_patch16_224": 69.78}


@dataclass(frozen=True, kw_only=True)
class FromScratch:
    """A model trained on a small data set alone, without other images."""

    model: str
    parameters: str
    epochs: str
    cifar10: float | None = None
    cifar100: float | None = None
    tiny: float | None = None
    source: str


FROM_SCRATCH = (
    FromScratch(model="CCT-7/3×1", parameters="3.7 M", epochs="300", cifar10=96.53, cifar100=80.92, source=CCT2021),
    FromScratch(
        model="CCT-7/3×1, sine", parameters="3.7 M", epochs="5000", cifar10=98.00, cifar100=82.87, source=CCT2021
    ),
    FromScratch(model="DHVT-T, patch 2, best of 5", parameters="5.8 M", epochs="300", cifar100=83.54, source=DHVT2022),
    FromScratch(model="DHVT-S, patch 2, best of 5", parameters="22.8 M", epochs="300", cifar100=85.68, source=DHVT2022),
    FromScratch(model="NesT-T", parameters="6.2 M", epochs="300", cifar100=78.69, source=DHVT2022),
    FromScratch(model="NesT-S", parameters="23.4 M", epochs="300", cifar100=81.70, source=DHVT2022),
    FromScratch(model="NesT-B", parameters="90.1 M", epochs="300", cifar100=82.56, source=DHVT2022),
    FromScratch(model="DeiT-T, patch 2", parameters="5.3 M", epochs="300", cifar100=67.52, source=DHVT2022),
    FromScratch(model="DeiT-S, patch 2", parameters="21.3 M", epochs="300", cifar100=69.78, source=DHVT2022),
    FromScratch(model="Swin-T", parameters="27.5 M", epochs="300", cifar100=78.07, source=DHVT2022),
    FromScratch(
        model="ViT, self-supervised first",
        parameters="2.8 M",
        epochs="SSL + 100",
        cifar10=96.41,
        cifar100=79.15,
        tiny=63.36,
        source=GANI2022,
    ),
    FromScratch(
        model="Swin, self-supervised first",
        parameters="7.1 M",
        epochs="SSL + 100",
        cifar10=96.18,
        cifar100=80.95,
        tiny=65.13,
        source=GANI2022,
    ),
    FromScratch(
        model="CaiT, self-supervised first",
        parameters="7.7 M",
        epochs="SSL + 100",
        cifar10=96.42,
        cifar100=80.79,
        tiny=67.46,
        source=GANI2022,
    ),
    FromScratch(
        model="DeiT-B, CNN teacher, 224 px",
        parameters="87 M",
        epochs="7200",
        cifar10=98.5,
        source="Touvron et al. 2021, arXiv:2012.12877",
    ),
)
"""Peers, to say where a figure stands; their epochs are passes, but for those of `GANI2022`, which are its code's."""
