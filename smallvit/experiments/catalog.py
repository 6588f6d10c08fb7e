"""Define experiments: named sets of models trained on the same images, with published accuracies. Imports no torch.

A budget below 1 shows each model that share of the images that the whole experiment shows: in fewer epochs, down to
ten; below that, on a subset of each class's training images.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from smallvit.config.config import Config
from smallvit.config.options import DataConfig
from smallvit.config.spec import RowSpec, parse_spec
from smallvit.datasets.catalog import DATASETS
from smallvit.training.launch import resolve
from smallvit.utils.errors import InputError, suggest

MIN_EPOCHS = 10
"""Smaller budgets use fewer images instead of fewer epochs."""

# Published test accuracies in per cent; tuples hold one for each of these data sets
DATA = ("cifar10", "cifar100", "svhn", "tiny-imagenet")

LEE2021 = "Lee, Lee, Song 2021, arXiv:2112.13492"
LEE2021_CODE = f"{LEE2021}, the README of its code"
GANI2022 = "Gani et al. 2022, arXiv:2210.07240, the README of its code"
DHVT2022 = "Lu et al. 2022, arXiv:2210.05958, an early draft"

# Lee, Lee, Song 2021, the README of its code; best test accuracy of 100 epochs of three passes each
MAIN = {
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

# Gani et al. 2022: CNNs trained along with the models of Lee, Lee, Song
CNNS = {
    "resnet56": (94.65, 74.44, 97.61, 56.51),
    "resnet110": (95.27, 76.18, 97.82, 59.77),
    "efficientnet_b0": (88.38, 61.64, 96.06, 55.48),
    "resnet18": (90.44, 64.49, 96.78, 53.32),
}

# Lee, Lee, Song 2021, the ablation of ViT, taken from a summary of the paper
ABLATION = {
    "vit": {"cifar100": 73.81, "tiny-imagenet": 57.07},
    "vit+temperature": {"cifar100": 74.35, "tiny-imagenet": 57.95},
    "vit+mask": {"cifar100": 74.34, "tiny-imagenet": 58.29},
    "vit+lsa": {"cifar100": 74.87, "tiny-imagenet": 58.50},
    "vit+spt": {"cifar100": 76.29, "tiny-imagenet": 60.67},
    "vit+spt+lsa": {"cifar100": 76.92, "tiny-imagenet": 61.07},
}

# DeiT on CIFAR-100 from scratch with patches of 2 pixels, 300 epochs
DEIT = {"deit_tiny_patch16_224": 67.52, "deit_small_patch16_224": 69.78}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One model of an experiment."""

    label: str
    """Name of the model, as --rows takes it and records hold it."""
    spec: str
    """Model and training, as `smallvit compare --arch` takes them."""
    published: float | None = None
    """Published test accuracy in per cent."""
    source: str | None = None
    """Source of the published accuracy."""
    teacher: str | None = None
    """Label of the trial whose model of the same seed is the distillation teacher."""
    baseline: str | None = None
    """Label of the trial that gains are relative to."""

    @property
    def full_spec(self) -> str:
        """The spec including the teacher, without which there is no distillation."""
        return f"{self.spec},teacher={self.teacher}" if self.teacher else self.spec

    def parse(self) -> RowSpec:
        """Parse the spec."""
        return parse_spec(self.full_spec)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Models trained on the same images for the same number of epochs."""

    title: str
    data: str
    """Name of the data set."""
    epochs: int
    seeds: int
    """Runs per model."""
    trials: tuple[Trial, ...]
    flags: dict[str, Any] = field(default_factory=dict)
    """Options of all models."""

    def options(self, budget: float) -> dict[str, Any]:
        """Return the options of all models at a budget, for `Config.build`."""
        return self.flags | {"data": self.data} | self.length(budget)

    def length(self, budget: float) -> dict[str, Any]:
        """Return epochs and share of the images, whose product is the budget's share of the whole experiment."""
        epochs = max(min(MIN_EPOCHS, self.epochs), round(self.epochs * budget))
        share = self.flags.get("train_fraction", 1.0)
        if round(self.epochs * budget) < epochs:
            share = round(share * self.epochs * budget / epochs, 6)
        return {"epochs": epochs} | ({"train_fraction": share} if share < 1 else {})

    def effective_budget(self, budget: float) -> float:
        """Return the budget, or 1 where it changes nothing.

        Raises:
            InputError: It leaves less than one training image per class.
        """
        if (images := self._images_per_class(budget)) < 1:
            raise InputError(
                f"--budget {budget:g}: leaves {images:.2g} training images per class, expected at least one; use a "
                "larger budget"
            )
        return 1.0 if self.length(budget) == self.length(1.0) else budget

    def _images_per_class(self, budget: float) -> float:
        """Return the average number of training images per class."""
        entry, options = DATASETS[self.data], self.options(budget)
        train = entry.num_train * options.get("train_fraction", 1.0) / entry.num_classes
        test_fraction = 0 if entry.num_test else DataConfig.test_fraction
        return train * (1 - options.get("val_fraction", DataConfig.val_fraction)) * (1 - test_fraction)

    def select(self, labels: list[str]) -> tuple[Trial, ...]:
        """Return the trials with these labels and their teachers, or all trials if there are no labels.

        Raises:
            InputError: There is no such trial; the message names the closest match.
        """
        known = {trial.label: trial for trial in self.trials}
        for label in labels:
            if label not in known:
                raise InputError(f"--rows {label}: expected one of {'; '.join(known)}{suggest(label, known)}")
        selected = {*labels} | {known[label].teacher for label in labels} if labels else {*known}
        return tuple(trial for trial in self.trials if trial.label in selected)


def get_experiment(name: str) -> Experiment:
    """Return an experiment by name.

    Raises:
        InputError: There is no such experiment; the message names the closest match.
    """
    if name not in EXPERIMENTS:
        raise InputError(f"{name}: no such experiment{suggest(name, EXPERIMENTS)}; see smallvit list experiments")
    return EXPERIMENTS[name]


def required_options(experiment: Experiment, trial: Trial, budget: float) -> dict[str, Any]:
    """Return all options of a trial's runs at a budget; machine, seed and the teacher's path may differ."""
    return _resolve_options(trial.full_spec, tuple(sorted(experiment.options(budget).items())))


@functools.cache
def _resolve_options(text: str, flags: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    row = parse_spec(text)
    return resolve(Config.build(**row.given(dict(flags), row.recipe))).to_dict()


def find_equivalent(name: str, trial: Trial) -> set[tuple[str, str]]:
    """Return the experiments and labels of all trials that train the same models as this one."""
    own = _identity(get_experiment(name), trial)
    return {
        (other, each.label)
        for other, experiment in EXPERIMENTS.items()
        for each in experiment.trials
        if _identity(experiment, each) == own
    }


def _identity(experiment: Experiment, trial: Trial) -> tuple[Any, ...]:
    teacher = next((each.spec for each in experiment.trials if each.label == trial.teacher), None)
    return experiment.data, experiment.epochs, tuple(sorted(experiment.flags.items())), trial.spec, teacher


def strip_plugins(label: str) -> str | None:
    """Return the label of the same model without plugins; None if it has none."""
    arch, plus, _ = label.partition("+")
    return arch if plus else None


POLICIES = {"svhn": "autoaugment-svhn", "tiny-imagenet": "autoaugment-imagenet"}
"""AutoAugment policy by data set, where it is not CIFAR's; named, because --data DIR would select another."""
HELD_OUT = {"val_fraction": 0.02}
"""Few validation images, since the papers train on all images."""
FLIPS = {"svhn": {"flip": 0.5}}
"""Horizontal flips by data set, where the paper's code flips and smallvit by default does not."""
PARTS = {"vit+temperature": "vit+lsa,lsa-mask=false", "vit+mask": "vit+lsa,lsa-temperature=fixed"}
"""Specs of models with one part of a plugin."""


def paper(label: str, data: str, **more: Any) -> Trial:
    """Return a model of Lee, Lee, Song 2021 with their training."""
    policy = POLICIES.get(data, "autoaugment-cifar10")
    model = PARTS.get(label, label)
    return Trial(
        label=label, spec=f"{model},recipe=lee2021,auto_augment={policy}", baseline=strip_plugins(label), **more
    )


def cnn(label: str, **more: Any) -> Trial:
    """Return a CNN with the recipe `cnn`."""
    return Trial(label=label, spec=f"{label},recipe=cnn", **more)


def lee2021(data: str) -> Experiment:
    """Return the main table of Lee, Lee, Song 2021 for one data set."""
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
    """Return the ablation of SPT, LSA and their parts in ViT."""
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
            Trial(label=f"{arch}{plugins}", spec=f"{arch}{plugins}", baseline=arch if plugins else None)
            for arch in ("vit", "swin", "pit", "t2t", "cait")
            for plugins in ("", "+spt+lsa")
        ),
        Trial(label="pit, patches of 2 px", spec="pit,patch_size=2", baseline="pit"),
        cnn("resnet20"),
    ),
    flags={"batch_size": 32},
)


def distilled(label: str, settings: str) -> Trial:
    """Return a ViT with both plugins and a CNN as distillation teacher."""
    row = f"vit+spt+lsa,recipe=lee2021,auto_augment=autoaugment-cifar10,{settings}"
    return Trial(label=label, spec=row, teacher="resnet56", baseline="vit+spt+lsa")


DEIT_CIFAR100 = Experiment(
    title="Distillation from a CNN as in DeiT, and DeiT from scratch, on cifar100",
    data="cifar100",
    epochs=300,
    seeds=3,
    trials=(
        cnn("resnet56", published=CNNS["resnet56"][1], source=GANI2022),
        replace(paper("vit+spt+lsa", "cifar100", published=MAIN["vit+spt+lsa"][1], source=LEE2021_CODE), baseline=None),
        distilled("soft", "distill=soft"),
        distilled("hard", "distill=hard"),
        distilled("token", "distill=token"),
        *(
            Trial(label=arch, spec=f"{arch},recipe=deit,patch_size=2", published=figure, source=DHVT2022)
            for arch, figure in DEIT.items()
        ),
    ),
    flags=HELD_OUT,
)

BASIC = "best, basic augmentation"
"""Label of the recipe best with crops and flips alone, which is the recipe quick."""
SHORT_BEST = "vit96+stem+lsa+ffn,recipe=best"
QUICK_CIFAR100 = Experiment(
    title="Short trainings of a small ViT: 2 passes over 30% of the images of cifar100",
    data="cifar100",
    epochs=2,
    seeds=3,
    trials=(
        Trial(label="lee2021", spec="vit96,recipe=lee2021,auto_augment=autoaugment-cifar10"),
        Trial(label="best", spec=f"{SHORT_BEST},auto_augment=autoaugment-cifar10", baseline="lee2021"),
        Trial(label=BASIC, spec=f"{SHORT_BEST},aug=basic", baseline="best"),
        Trial(label="24 px at first", spec=f"{SHORT_BEST},aug=basic,progressive_size=24", baseline=BASIC),
        Trial(label="alternating flip", spec=f"{SHORT_BEST},aug=basic,alternate_flip=true", baseline=BASIC),
        Trial(label="batches of 32", spec=f"{SHORT_BEST},aug=basic,batch_size=32", baseline=BASIC),
        Trial(label="AdamW", spec=f"{SHORT_BEST},aug=basic,opt=adamw", baseline=BASIC),
        Trial(label="SPT and LSA", spec="vit96+spt+lsa,recipe=best,aug=basic", baseline=BASIC),
        Trial(
            label="half of the patches dropped",
            spec="vit96+spt+lsa,recipe=best,aug=basic,patch_drop_rate=0.5",
            baseline="SPT and LSA",
        ),
        cnn("resnet32"),
    ),
    flags=HELD_OUT | {"train_fraction": 0.3},
)


LOW = "1e-3"
"""Label of the paper's training at the default learning rate of its code."""


def small(label: str, settings: str, plugins: str = "+spt+lsa", **more: Any) -> Trial:
    """Return a small ViT with the paper's training unless another recipe is named."""
    recipe = "" if "recipe=" in settings else "recipe=lee2021,"
    policy = "" if "auto_augment=" in settings else "auto_augment=autoaugment-cifar10,"
    return Trial(label=label, spec=f"vit96{plugins},{recipe}{policy}{settings}".rstrip(","), **more)


def low(change: str, settings: str, **more: Any) -> Trial:
    """Return one change of the paper's training at the lower learning rate."""
    return small(f"{LOW}, {change}", f"lr=1e-3,{settings}", baseline=LOW, **more)


CHANGES = Experiment(
    title="Changes of the paper's training: a small ViT with SPT and LSA on 29 images of each class",
    data="cifar100",
    epochs=30,
    seeds=2,
    trials=(
        small("lee2021", ""),
        small("best", "recipe=best", baseline="lee2021"),
        small("best without Muon", "recipe=best,opt=adamw", baseline="best"),
        small("best without small batches", "recipe=best,batch_size=128", baseline="best"),
        small("best without rising stochastic depth", "recipe=best,linear_drop_path=false", baseline="best"),
        small("best without sin-cos positions", "recipe=best,pos_embed=learned", baseline="best"),
        small("best at a third of the rate", "recipe=best,lr=1e-3", baseline="best"),
        small("best with batches of 32", "recipe=best,batch_size=32", baseline="best"),
        small("best with a moving average", "recipe=best,ema_decay=0.99", baseline="best"),
        small("best without SPT", "recipe=best", plugins="+lsa", baseline="best"),
        small("best without LSA", "recipe=best", plugins="+spt", baseline="best"),
        small("best without SPT and LSA", "recipe=best", plugins="", baseline="best"),
        small(LOW, "lr=1e-3", baseline="lee2021"),
        low("Muon", "opt=muon"),
        low("batches of 64", "batch_size=64"),
        low("no AutoAugment", "aug=mix,auto_augment=none"),
        low("sin-cos positions", "pos_embed=sincos"),
        low("rising stochastic depth", "linear_drop_path=true"),
        low("longer warm-up", "warmup_ratio=0.2"),
        low("LayerScale", "init_values=0.1"),
        low("moving average", "ema_decay=0.99"),
        low("decay of all weights", "weight_decay_all=true"),
        low("TrivialAugment", "auto_augment=trivial"),
        low("mixing per image", "mixup_mode=elem"),
        low("RandAugment", "auto_augment=rand-m9-n2-mstd0.5-inc1"),
        low("average pooling", "global_pool=avg"),
        low("repeated augmentation", "aug_repeats=3"),
        low("binary cross-entropy", "loss=bce"),
        cnn("resnet20"),
        low("CNN teacher", "distill=soft", teacher="resnet20"),
    ),
    flags=HELD_OUT | {"train_fraction": 0.06},
)

BEST = Experiment(
    title="The recipe best compared with the paper's: same images seen, on cifar100",
    data="cifar100",
    epochs=300,
    seeds=3,
    trials=(
        Trial(
            label="vit+spt+lsa, best",
            spec="vit+spt+lsa,recipe=best,auto_augment=autoaugment-cifar10",
            baseline="vit+spt+lsa",
        ),
        Trial(
            label="vit+stem+lsa+ffn, best",
            spec="vit+stem+lsa+ffn,recipe=best,auto_augment=autoaugment-cifar10",
            baseline="vit+spt+lsa, best",
        ),
        paper("vit+spt+lsa", "cifar100", published=MAIN["vit+spt+lsa"][1], source=LEE2021_CODE),
        paper("vit", "cifar100", published=MAIN["vit"][1], source=LEE2021_CODE),
        cnn("resnet56", published=CNNS["resnet56"][1], source=GANI2022),
    ),
    flags=HELD_OUT,
)

OPTIMIZER_ROWS = {
    "Muon": "",
    "Muon, half the rate": ",lr=1.5e-3",
    "Muon, twice the rate": ",lr=6e-3",
    "Muon with Nesterov": ",opt=nmuon",
    "AdaMuon": ",opt=adamuon",
    "NAdaMuon": ",opt=nadamuon",
    "alternating flip": ",alternate_flip=true",
}
"""The recipe best for a small ViT, and changes of its optimizer and flips."""


def optimizers(passes: int, share: float) -> Experiment:
    """Return `OPTIMIZER_ROWS` at a length; share is that of each class's training images."""
    model = "vit96+stem+lsa+ffn,recipe=best,auto_augment=autoaugment-cifar10"
    return Experiment(
        title=f"Optimizer and flips of the recipe best: {passes} passes over {share:.0%} of the images of cifar100",
        data="cifar100",
        epochs=passes,
        seeds=1,
        trials=tuple(
            Trial(label=label, spec=model + change, baseline="Muon" if change else None)
            for label, change in OPTIMIZER_ROWS.items()
        ),
        flags=HELD_OUT | {"train_fraction": share},
    )


PLUGIN_ROWS = {
    "plain": "vit96",
    "SPT": "vit96+spt",
    "LSA": "vit96+lsa",
    "FFN": "vit96+ffn",
    "stem": "vit96+stem",
    "XSA": "vit96+xsa",
    "mimetic": "vit96,weight_init=mimetic",
    "impulse": "vit96,weight_init=impulse",
    "SPT, LSA": "vit96+spt+lsa",
    "SPT, LSA, FFN": "vit96+spt+lsa+ffn",
    "SPT, LSA, FFN from zero": "vit96+spt+lsa+ffn,ffn_zero=true",
    "SPT, LSA, FFN without batch norm": "vit96+spt+lsa+ffn,ffn_norm=false",
    "SPT, LSA, FFN without residual": "vit96+spt+lsa+ffn,ffn_residual=false",
    "SPT, LSA, FFN, class token reweighted": "vit96+spt+lsa+ffn,ffn_class_token=reweight",
    "stem, LSA, FFN without batch norm": "vit96+stem+lsa+ffn,ffn_norm=false",
    "SPT, LSA, XSA": "vit96+spt+lsa+xsa",
    "SPT, LSA, mimetic": "vit96+spt+lsa,weight_init=mimetic",
    "SPT, LSA, impulse": "vit96+spt+lsa,weight_init=impulse",
    "stem, LSA": "vit96+stem+lsa",
    "stem, FFN": "vit96+stem+ffn",
    "stem, LSA, FFN": "vit96+stem+lsa+ffn",
    "stem, LSA, FFN, XSA": "vit96+stem+lsa+ffn+xsa",
    "stem, LSA, FFN, mimetic": "vit96+stem+lsa+ffn,weight_init=mimetic",
    "stem, LSA, FFN, impulse": "vit96+stem+lsa+ffn,weight_init=impulse",
}
"""A small ViT with plugins and initializations: each alone, on top of SPT and LSA, and in pairs."""
GUIDED_ROWS = {
    "feature guidance": "vit96,distill=features",
    "SPT, LSA, feature guidance": "vit96+spt+lsa,distill=features",
}
"""The same with the CNN as teacher."""


def plugin_trials(data: str) -> tuple[Trial, ...]:
    """Return `PLUGIN_ROWS` by the recipes of Lee et al. and `best`, and a CNN of equal size."""
    more = {"cifar100": ",auto_augment=autoaugment-cifar10"}.get(data, "")
    trials = [cnn("resnet32")]
    for recipe in ("lee2021", "best"):
        for label, model in (PLUGIN_ROWS | GUIDED_ROWS).items():
            off = "".join(f",{name}=false" for name in ("spt", "lsa") if f"+{name}" not in model)
            trials.append(
                Trial(
                    label=f"{recipe}: {label}",
                    spec=f"{model},recipe={recipe}{off}{more}",
                    baseline=None if label == "plain" else f"{recipe}: plain",
                    teacher="resnet32" if label in GUIDED_ROWS else None,
                )
            )
    return tuple(trials)


PLUGIN_EXPERIMENTS = {
    "plugins/cifar100": Experiment(
        title="Plugins and initializations in a small ViT, and a CNN of equal size, on cifar100",
        data="cifar100",
        epochs=30,
        seeds=1,
        trials=plugin_trials("cifar100"),
        flags=HELD_OUT,
    ),
    "plugins/digits": Experiment(
        title="Plugins and initializations in a small ViT, and a CNN of equal size, on digits",
        data="digits",
        epochs=100,
        seeds=3,
        trials=plugin_trials("digits"),
        flags={"batch_size": 32},
    ),
}


SMALL_ROWS = ("lee2021: plain", "lee2021: SPT", "lee2021: LSA", "lee2021: SPT, LSA", "best: stem, LSA, FFN", "resnet32")
FEW_ROWS = ("lee2021: plain", "lee2021: SPT, LSA", "best: stem, LSA, FFN", "resnet32")
"""Rows of `plugin_trials` of the experiments small/cifar100 and small/few, the one they are compared with first."""


def small_models(title: str, rows: Sequence[str], **more: Any) -> Experiment:
    """Return rows of `plugin_trials` on cifar100, compared with the model without plugins by the paper's recipe."""
    base, *_ = rows
    trials = {trial.label: trial for trial in plugin_trials("cifar100")}
    return Experiment(
        title=title,
        data="cifar100",
        trials=tuple(replace(trials[label], baseline=None if label in (base, "resnet32") else base) for label in rows),
        **more,
    )


def few(percent: int, passes: int) -> Experiment:
    """Return a point of the data-efficiency curve: every point shows 300,000 images."""
    return small_models(
        f"Small models on {percent}% of the images of cifar100: {passes} passes, 300,000 images seen",
        FEW_ROWS,
        epochs=passes,
        seeds=3,
        flags=HELD_OUT | {"train_fraction": percent / 100, "val_interval": max(1, passes // 30)},
    )


BINARY_RATE = "5e-3"
"""Ten times the published learning rate, since runs are short: the best of three on the digits' validation images."""
BINARY_ROWS = {
    "binary DeiT": "avg_pool_head=false,pool_branches=false,residual_affine=false,pyramid=false",
    "with the pooling head": "pool_branches=false,residual_affine=false,pyramid=false",
    "and the branches": "residual_affine=false,pyramid=false",
    "and the affine": "pyramid=false",
    "and the pyramid: BinaryViT": "",
}
"""From binary DeiT to BinaryViT; each includes the changes before it."""


def binary(label: str, settings: str, baseline: str | None) -> Trial:
    """Return a small BinaryViT, or a reduced one, with a full-precision ViT as teacher."""
    row = f"binaryvit_tiny,recipe=binaryvit,lr={BINARY_RATE},{settings}".rstrip(",")
    return Trial(label=label, spec=row, teacher="teacher", baseline=baseline)


def binaryvit(data: str, teacher: str, **more: Any) -> Experiment:
    """Return the steps from a binary DeiT to BinaryViT, and the same models in full precision."""
    labels = [*BINARY_ROWS]
    bits = "binary_weights=false,binary_activations=false,binary_attention=false"
    return Experiment(
        title=f"From a binary DeiT to BinaryViT, small ones, on {data}",
        data=data,
        trials=(
            Trial(label="teacher", spec=teacher),
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
    "best/optimizer-10": optimizers(10, 0.3),
    "best/optimizer-60": optimizers(60, 0.05),
    **PLUGIN_EXPERIMENTS,
    "small/cifar100": small_models(
        "Small models on cifar100: 30 passes over all images", SMALL_ROWS, epochs=30, seeds=3, flags=HELD_OUT
    ),
    "small/few-1": few(1, 600),
    "small/few-10": few(10, 60),
    "small/few-100": few(100, 6),
    # names the default rate, so that the teacher's runs are not taken for those of lee2021/digits
    "binaryvit/digits": binaryvit("digits", "vit+spt+lsa,lr=1e-3", epochs=100, seeds=5, flags={"batch_size": 32}),
    "binaryvit/cifar100": binaryvit(
        "cifar100",
        "vit96+spt+lsa,recipe=best,auto_augment=autoaugment-cifar10",
        epochs=300,
        seeds=3,
        flags=HELD_OUT | {"batch_size": 64},
    ),
}
"""Experiments that `smallvit reproduce` knows, by name."""
