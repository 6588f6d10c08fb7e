"""Named experiments: data set, models, training, seeds, and what was published. Needs no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from smallvit.errors import InputError, nearest
from smallvit.reproduction.literature import ABLATION, CNNS, DATA, DEIT, DHVT2022, GANI2022, LEE2021, LEE2021_CODE, MAIN
from smallvit.reproduction.trials import Experiment, Trial

POLICIES = {"svhn": "autoaugment-svhn", "tiny-imagenet": "autoaugment-imagenet"}
"""AutoAugment's policy by data set, where it is not CIFAR's; named, as a folder of the same images has another."""
HELD_OUT = {"val_fraction": 0.02}
"""Few images to choose the epoch by, as the papers learn from all."""
FLIPS = {"svhn": {"flip": 0.5}}
"""Mirroring by data set, where smallvit would not and the paper's code does."""
PARTS = {"vit+temperature": "vit+lsa,lsa-mask=false", "vit+mask": "vit+lsa,lsa-temperature=fixed"}
"""Rows of models that have one part of a plugin."""


def experiment(name: str) -> Experiment:
    """The experiment of a name.

    Raises:
        InputError: there is none; the line names the nearest.
    """
    if name not in EXPERIMENTS:
        raise InputError(f"{name}: no such experiment{nearest(name, EXPERIMENTS)}; see smallvit list experiments")
    return EXPERIMENTS[name]


def twins(name: str, trial: Trial) -> set[tuple[str, str]]:
    """Names of experiments and labels of trials that are the same runs as this trial of this experiment."""
    own = _identity(experiment(name), trial)
    return {
        (other, each.label)
        for other, candidate in EXPERIMENTS.items()
        for each in candidate.trials
        if _identity(candidate, each) == own
    }


def _identity(experiment: Experiment, trial: Trial) -> tuple[Any, ...]:
    """What makes a trial's runs: images, length, model, training, teacher."""
    teacher = next((each.row for each in experiment.trials if each.label == trial.teacher), None)
    return experiment.data, experiment.epochs, tuple(sorted(experiment.flags.items())), trial.row, teacher


def plain(label: str) -> str | None:
    """The label of a model without the plugins that this one has."""
    bare = label.partition("+")[0]
    return bare if bare != label else None


def paper(label: str, data: str, **more: Any) -> Trial:
    """A model of Lee, Lee, Song 2021 with their training."""
    policy = POLICIES.get(data, "autoaugment-cifar10")
    model = PARTS.get(label, label)
    return Trial(label=label, row=f"{model},recipe=paper,policy={policy}", against=plain(label), **more)


def cnn(label: str, **more: Any) -> Trial:
    """A CNN with a training of its own."""
    return Trial(label=label, row=f"{label},recipe=cnn", **more)


def lee2021(data: str) -> Experiment:
    """The main table for one of its data sets."""
    column = DATA.index(data)
    first = [f"{arch}{plugins}" for arch in ("vit", "swin", "pit", "cait", "t2t") for plugins in ("", "+spt+lsa")]
    ours = [paper(label, data, published=MAIN[label][column], source=LEE2021_CODE) for label in first]
    cnns = [cnn(label, published=figures[column], source=GANI2022) for label, figures in CNNS.items()]
    return Experiment(
        title=f"SPT and LSA in five architectures, and CNNs, on {data}",
        data=data,
        epochs=300,
        seeds=3,
        trials=(*ours, *cnns),
        flags=HELD_OUT | FLIPS.get(data, {}),
    )


def ablation(data: str) -> Experiment:
    """What SPT and LSA bring, each alone and part by part."""
    trials = [
        paper(label, data, published=figures[data], source=f"{LEE2021}, from a summary")
        for label, figures in ABLATION.items()
    ]
    baseline = cnn("resnet56", published=CNNS["resnet56"][DATA.index(data)], source=GANI2022)
    return Experiment(
        title=f"The parts of SPT and LSA in ViT on {data}",
        data=data,
        epochs=300,
        seeds=3,
        trials=(*trials, baseline),
        flags=HELD_OUT,
    )


DIGITS = Experiment(
    title="SPT and LSA in five architectures on 1,295 images of digits",
    data="digits",
    epochs=100,
    seeds=5,
    trials=(
        *(
            Trial(label=f"{arch}{plugins}", row=f"{arch}{plugins}", against=arch if plugins else None)
            for arch in ("vit", "swin", "pit", "t2t", "cait")
            for plugins in ("", "+spt+lsa")
        ),
        Trial(label="pit, patches of 2 px", row="pit,patch_size=2", against="pit"),
        cnn("resnet20"),
    ),
    flags={"batch_size": 32},
)


def distilled(label: str, settings: str) -> Trial:
    """A ViT with both plugins that a CNN teaches."""
    row = f"vit+spt+lsa,recipe=paper,policy=autoaugment-cifar10,{settings}"
    return Trial(label=label, row=row, teacher="resnet56", against="vit+spt+lsa")


DEIT_CIFAR100 = Experiment(
    title="DeiT's ways to learn from a CNN, and DeiT itself, on cifar100",
    data="cifar100",
    epochs=300,
    seeds=3,
    trials=(
        cnn("resnet56", published=CNNS["resnet56"][1], source=GANI2022),
        replace(paper("vit+spt+lsa", "cifar100", published=MAIN["vit+spt+lsa"][1], source=LEE2021_CODE), against=None),
        distilled("soft", "distill=soft"),
        distilled("hard", "distill=hard"),
        distilled("token", "distill=token"),
        *(
            Trial(label=arch, row=f"{arch},recipe=deit,patch_size=2", published=figure, source=DHVT2022)
            for arch, figure in DEIT.items()
        ),
    ),
    flags=HELD_OUT,
)

QUICK_CIFAR100 = Experiment(
    title="Short trainings on cifar100",
    data="cifar100",
    epochs=40,
    seeds=3,
    trials=(
        Trial(label="quick", row="vit+spt+lsa,recipe=quick", against="paper"),
        Trial(label="paper", row="vit+spt+lsa,recipe=paper,policy=autoaugment-cifar10"),
        cnn("resnet56"),
    ),
    flags=HELD_OUT,
)


LOW = "1e-3"
"""Label of the paper's training at the rate that its code has by default."""


def small(label: str, settings: str, plugins: str = "+spt+lsa", **more: Any) -> Trial:
    """A small ViT, by the paper's training unless another recipe is named."""
    recipe = "" if "recipe=" in settings else "recipe=paper,"
    policy = "" if "policy=" in settings else "policy=autoaugment-cifar10,"
    return Trial(label=label, row=f"vit96{plugins},{recipe}{policy}{settings}".rstrip(","), **more)


def low(change: str, settings: str, **more: Any) -> Trial:
    """One change of the paper's training at the lower rate."""
    return small(f"{LOW}, {change}", f"lr=1e-3,{settings}", against=LOW, **more)


CHANGES = Experiment(
    title="What changes the paper's training for the better: a small ViT with SPT and LSA on 29 images of each class",
    data="cifar100",
    epochs=30,
    seeds=2,
    trials=(
        small("paper", ""),
        small("best", "recipe=best", against="paper"),
        small("best without Muon", "recipe=best,opt=adamw", against="best"),
        small("best without small batches", "recipe=best,batch_size=128", against="best"),
        small("best without rising stochastic depth", "recipe=best,rising_drop_path=false", against="best"),
        small("best without sin-cos positions", "recipe=best,sincos=false", against="best"),
        small("best at a third of the rate", "recipe=best,lr=1e-3", against="best"),
        small("best with batches of 32", "recipe=best,batch_size=32", against="best"),
        small("best with a moving average", "recipe=best,ema=0.99", against="best"),
        small("best without SPT", "recipe=best", plugins="+lsa", against="best"),
        small("best without LSA", "recipe=best", plugins="+spt", against="best"),
        small("best without SPT and LSA", "recipe=best", plugins="", against="best"),
        small(LOW, "lr=1e-3", against="paper"),
        low("Muon", "opt=muon"),
        low("batches of 64", "batch_size=64"),
        low("no AutoAugment", "aug=mix,policy=none"),
        low("sin-cos positions", "sincos=true"),
        low("rising stochastic depth", "rising_drop_path=true"),
        low("longer warm-up", "warmup=0.2"),
        low("LayerScale", "layer_scale=0.1"),
        low("moving average", "ema=0.99"),
        low("decay of all weights", "decay_all=true"),
        low("TrivialAugment", "policy=trivial"),
        low("mixing per image", "mix_per=image"),
        low("RandAugment", "policy=rand-m9-n2-mstd0.5-inc1"),
        low("average pooling", "average_pool=true"),
        low("repeated augmentation", "repeats=3"),
        low("binary cross-entropy", "loss=bce"),
        cnn("resnet20"),
        low("CNN teacher", "distill=soft", teacher="resnet20"),
    ),
    flags=HELD_OUT | {"train_fraction": 0.06},
)

BEST = Experiment(
    title="The recipe best beside the paper's: no more parameters, as many images seen, on cifar100",
    data="cifar100",
    epochs=300,
    seeds=3,
    trials=(
        Trial(
            label="vit+spt+lsa, best", row="vit+spt+lsa,recipe=best,policy=autoaugment-cifar10", against="vit+spt+lsa"
        ),
        paper("vit+spt+lsa", "cifar100", published=MAIN["vit+spt+lsa"][1], source=LEE2021_CODE),
        paper("vit", "cifar100", published=MAIN["vit"][1], source=LEE2021_CODE),
        cnn("resnet56", published=CNNS["resnet56"][1], source=GANI2022),
    ),
    flags=HELD_OUT,
)

BINARY_RATE = "5e-3"
"""Ten times the published rate, as runs are short: the best of three on the digits' validation images."""
BINARY_ROWS = {
    "binary DeiT": "gap_head=false,pool_branches=false,residual_affine=false,pyramid=false",
    "with the pooling head": "pool_branches=false,residual_affine=false,pyramid=false",
    "and the branches": "residual_affine=false,pyramid=false",
    "and the affine": "pyramid=false",
    "and the pyramid: BinaryViT": "",
}
"""From DeiT to BinaryViT, each with the changes before it."""


def binary(label: str, settings: str, against: str | None) -> Trial:
    """A small BinaryViT, or a part of it, that a ViT in full precision teaches."""
    row = f"binaryvit_tiny,recipe=binaryvit,lr={BINARY_RATE},{settings}".rstrip(",")
    return Trial(label=label, row=row, teacher="teacher", against=against)


def binaryvit(data: str, teacher: str, **more: Any) -> Experiment:
    """What makes a binary DeiT a BinaryViT, one after the other, and what its bits cost."""
    labels = [*BINARY_ROWS]
    bits = "binary_weights=false,binary_activations=false,binary_attention=false"
    return Experiment(
        title=f"From a binary DeiT to BinaryViT, small ones, on {data}",
        data=data,
        trials=(
            Trial(label="teacher", row=teacher),
            *(
                binary(label, BINARY_ROWS[label], before)
                for label, before in zip(labels, [None, *labels], strict=False)
            ),
            binary("BinaryViT, downsampling in full precision", "binary_downsampling=false", labels[-1]),
            binary("BinaryViT in full precision", bits, labels[-1]),
            binary("binary DeiT in full precision", f"{BINARY_ROWS[labels[0]]},{bits}", labels[0]),
        ),
        **more,
    )


EXPERIMENTS: dict[str, Experiment] = {
    **{f"lee2021/{data}": lee2021(data) for data in DATA},
    "lee2021/ablation": ablation("cifar100"),
    "lee2021/ablation-tiny-imagenet": ablation("tiny-imagenet"),
    "lee2021/digits": DIGITS,
    "deit/cifar100": DEIT_CIFAR100,
    "quick/cifar100": QUICK_CIFAR100,
    "best/cifar100": BEST,
    "best/ablation": CHANGES,
    # the rate that it has anyway, so that the teacher's runs are not taken for those of lee2021/digits
    "binaryvit/digits": binaryvit("digits", "vit+spt+lsa,lr=1e-3", epochs=100, seeds=5, flags={"batch_size": 32}),
    "binaryvit/cifar100": binaryvit(
        "cifar100",
        "vit96+spt+lsa,recipe=best,policy=autoaugment-cifar10",
        epochs=300,
        seeds=3,
        flags=HELD_OUT | {"batch_size": 64},
    ),
}
"""What `smallvit reproduce` takes."""
