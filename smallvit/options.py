"""The options of a training run, in groups of frozen dataclasses.

Each field's sentence is its documentation and the help of its flag. Option names are unique across the groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from smallvit.errors import InputError, nearest

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
LOGGERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""What `--log` takes; `smallvit.loggers` knows them."""


def flag(option: str) -> str:
    return "--" + option.replace("_", "-")


def require(holds: bool, option: str, value: object, expected: str) -> None:
    if not holds:
        raise InputError(f"{flag(option)} {value}: expected {expected}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network to train."""

    arch: str = "vit"
    """Architecture: vit, cait, pit, swin or t2t (the paper's), or any timm model name."""
    spt: bool = False
    """Shifted patch tokenization in the patch embedding and where patches are merged."""
    lsa: bool = False
    """Locality self-attention in every block."""
    plugin_init: Literal["paper", "exact"] = "paper"
    """How SPT and LSA begin: paper (as published), or exact (the model computes at first what it would without)."""
    spt_directions: Literal["diagonal", "cardinal", "all"] = "diagonal"
    """SPT's views beside the image: four diagonal ones (the paper's), four cardinal ones, or all eight."""
    spt_shift: float = 0.5
    """SPT: distance of the views as a share of the patch."""
    spt_norm: bool = True
    """SPT: normalise the views together before they are projected."""
    lsa_temperature: Literal["head", "layer", "fixed"] = "head"
    """LSA: one learnt temperature per head (the paper's), one per layer, or a fixed one."""
    lsa_mask: bool = True
    """LSA: keep tokens from attending to themselves."""
    patch_size: int | None = None
    """Patch size in pixels; by default it follows the image size (for a ViT 4 at 32 px, 8 at 64 px)."""
    dropout: float | None = None
    """Dropout after position embeddings, attention's projection and the layers of MLPs; by default none."""
    drop_path: float | None = None
    """Stochastic depth: probability of skipping a residual branch; by default 0.1 for transformers."""

    def __post_init__(self) -> None:
        if self.patch_size is not None:
            require(self.patch_size >= 1, "patch_size", self.patch_size, "at least 1 pixel")
        for name in ("dropout", "drop_path"):
            value = getattr(self, name)
            require(value is None or 0 <= value < 1, name, value, "a probability below 1")
        require(0 < self.spt_shift <= 1, "spt_shift", self.spt_shift, "a share of the patch above 0, at most 1")
        for field_ in fields(self):
            plugin = field_.name.partition("_")[0]
            if plugin in ("spt", "lsa") and getattr(self, field_.name) != field_.default and not getattr(self, plugin):
                raise InputError(f"{flag(field_.name)} is of no use without --{plugin}")
        if self.plugin_init == "exact" and not (self.spt or self.lsa):
            raise InputError("--plugin-init exact is of no use without --spt or --lsa")
        if self.lsa_temperature == "fixed" and not self.lsa_mask:
            raise InputError("--lsa-temperature fixed --no-lsa-mask would leave nothing of LSA: give up one of them")


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


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How the weights are fitted; the learning rate is set anew at every step."""

    epochs: int = 100
    """Passes over the training images."""
    batch_size: int = 128
    """Images in a step, at most; an epoch is cut into steps of equal size, for all torchrun's devices together."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other, to save memory."""
    loss: Literal["ce", "bce"] = "ce"
    """Cross-entropy, or a binary one for every class, where each label of a mixed image counts as whole."""
    opt: str = "adamw"
    """Optimiser, by timm's name: adamw, lamb, lion, muon, sgd, ..."""
    lr: float = 1e-3
    """Peak learning rate."""
    lr_batch: int | None = None
    """The batch size that --lr is meant for: it is scaled in proportion to --batch-size."""
    sched: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Course of the learning rate after the warm-up: half a cosine or a line down to --min-lr, constant, or wsd
    (constant, then a line down over the last fifth of the steps)."""
    layer_decay: float | None = None
    """Factor of the learning rate from each layer to the one below it; by default all have the same."""
    ema: float | None = None
    """Keep an average of the weights, with this decay from step to step, and judge and save it; by default none."""
    min_lr: float = 1e-6
    """Learning rate at the end."""
    reg: Literal[
        "auto",
        "none",
        "paper",
        "deit",
        "deit3",
        "augreg-none-0.03",
        "augreg-none-0.1",
        "augreg-0.03",
        "augreg-0.1",
    ] = "auto"
    """Preset of --dropout, --drop-path, --weight-decay and --smoothing; auto is the paper's, for transformers."""
    weight_decay: float | None = None
    """AdamW's decay, on matrices alone: norms, biases, tokens, position embeddings, temperatures have none; by default
    0.05."""
    warmup: float = 0.1
    """Share of the steps during which the learning rate rises from 0 to its peak."""
    smoothing: float | None = None
    """Label smoothing; by default 0.1."""
    diagonal_until: float = 0.5
    """With --plugin-init exact: share of the steps over which tokens' attention to themselves fades to none."""
    clip_grad: float | None = None
    """Largest allowed norm of the whole gradient; by default it is not clipped."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "lr_batch"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        for name in ("layer_decay", "ema"):
            value = getattr(self, name)
            require(value is None or 0 < value < 1, name, value, "a factor between 0 and 1")
        require(self.accumulate <= self.batch_size, "accumulate", self.accumulate, "at most --batch-size")
        if self.loss == "bce" and self.smoothing:
            raise InputError(f"--smoothing {self.smoothing} is of no use with --loss bce; leave it out")
        require(0 < self.lr < math.inf, "lr", self.lr, "a learning rate above 0")
        require(0 <= self.min_lr <= self.lr, "min_lr", self.min_lr, f"between 0 and --lr {self.lr}")
        decay, smoothing = self.weight_decay, self.smoothing
        require(decay is None or 0 <= decay < math.inf, "weight_decay", decay, "0 or more")
        require(0 <= self.warmup < 1, "warmup", self.warmup, "a share from 0 to below 1")
        require(smoothing is None or 0 <= smoothing < 1, "smoothing", smoothing, "a share from 0 to below 1")
        require(0 <= self.diagonal_until <= 1, "diagonal_until", self.diagonal_until, "a share from 0 to 1")
        require(self.clip_grad is None or self.clip_grad > 0, "clip_grad", self.clip_grad, "a norm above 0")


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the work is done: on what, and how fast; but for rounding and --sync-bn it changes no result."""

    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, mps."""
    amp: Literal["auto", "bf16", "off"] = "auto"
    """Mixed precision: auto uses bf16 where the hardware computes in it."""
    compile: Literal["auto", "on", "graphs", "off"] = "auto"
    """Compile the model by torch.compile; graphs also records CUDA graphs; auto: where a run is long enough to pay."""
    grad_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more work."""
    fsdp: bool = False
    """With torchrun: spread weights, gradients and optimiser state over the devices, for models that fit on none."""
    sync_bn: bool = False
    """With torchrun: batch norm over the images of all devices."""

    def __post_init__(self) -> None:
        if self.fsdp and self.sync_bn:
            raise InputError("--fsdp and --sync-bn do not go together: give up one of them")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where results go, and what is kept and shown."""

    seed: int = 0
    """Seed of the initial weights, the order of the images and every random draw."""
    out: str | None = None
    """Folder for the results; by default a new one, runs/<arch>-<plugins>-<data>."""
    overwrite: bool = False
    """Replace the run that is in --out."""
    resume: str | None = None
    """Folder of a run to continue, with the configuration it was started with."""
    auto_resume: bool = False
    """Continue the run in --out if there is one: for jobs that are started again after an interruption."""
    checkpoint_minutes: float = 10.0
    """Longest time between two checkpoints; the end of an epoch writes one too."""
    keep: int = 0
    """Keep the weights of this many checkpointed epochs, the latest, beside last and best."""
    log: str | None = None
    """Send metrics to these loggers too: tensorboard, wandb, mlflow, trackio, or several with commas between."""
    profile: bool = False
    """Write a trace of a few steps and a table of where their time goes."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 or more, below 2**63")
        require(self.out != "", "out", repr(self.out), "a folder")
        if self.overwrite and self.out is None:
            raise InputError("--overwrite needs --out DIR: which run to replace")
        if self.auto_resume and (self.out is None or self.overwrite):
            raise InputError("--auto-resume needs --out DIR, without --overwrite: which run to continue")
        if self.resume is not None and (self.out is not None or self.overwrite):
            raise InputError("--resume RUN goes on in RUN itself: leave out --out and --overwrite")
        require(
            0 < self.checkpoint_minutes < math.inf, "checkpoint_minutes", self.checkpoint_minutes, "more than 0 minutes"
        )
        require(self.keep >= 0, "keep", self.keep, "0 or more")
        require(self.log is None or bool(self.loggers), "log", repr(self.log), f"some of {', '.join(LOGGERS)}")
        for name in self.loggers:
            require(name in LOGGERS, "log", name, f"one of {', '.join(LOGGERS)}{nearest(name, LOGGERS)}")

    @property
    def loggers(self) -> tuple[str, ...]:
        """Names of the loggers asked for."""
        return tuple(dict.fromkeys(name.strip() for name in (self.log or "").split(",") if name.strip()))
