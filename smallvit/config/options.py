"""Define the options of data, optimization, hardware and the run; their metadata says what they affect."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from smallvit.utils.errors import InputError, require, suggest
from smallvit.utils.sizes import Rectangle, parse_size

TAGS = {
    "resumable": "A resumed run may change it: it affects no result.",
    "launch": "It says where a run is, or whether it is resumed; it is no part of the run.",
    "path": "Its value may be a path; a resumed run compares the contents of what is there.",
    "draws_test": "It decides which images are in the test split of data that has none.",
    "affects_test": "Runs with other values were evaluated on other images, or in another way.",
    "evaluation": "Verbs that evaluate a trained model take it too.",
    "shared": "All rows of a comparison share it.",
    "local": "It says nothing about the model that is trained.",
    "common": "The short help shows it.",
}
"""Tags in the metadata of options, with their meanings."""


BOUNDS = {
    "ge": ("at least", operator.ge),
    "gt": ("above", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("below", operator.lt),
}
"""Bounds of numbers, with their meanings; None is always allowed, infinity never."""


def option(default: Any, *tags: str, **bounds: float) -> Any:
    """Return the dataclass field of an option with these tags and bounds (see `BOUNDS`)."""
    assert set(tags) <= TAGS.keys(), tags
    return field(default=default, metadata=dict.fromkeys(tags, True) | {"bounds": bounds})


class Options:
    """A group of options, whose bounds are checked.

    Raises:
        InputError: A value is out of its bounds.
    """

    def __post_init__(self) -> None:
        for each in fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            value, bounds = getattr(self, each.name), each.metadata.get("bounds")
            if value is None or value == "auto" or not bounds:
                continue
            finite = not isinstance(value, float) or math.isfinite(value)
            expected = " and ".join(f"{BOUNDS[name][0]} {bound}" for name, bound in bounds.items())
            within = all(BOUNDS[name][1](value, bound) for name, bound in bounds.items())
            require(finite and within, each.name, value, expected if finite else "a finite number")


CROP_MODES = {"crop": "center", "pad": "border", "stretch": "squash"}
"""timm's name of each value of --resize."""
MAX_MEGAPIXELS = 500.0
"""Default size limit of an image."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Options):
    """Dataset and its splits."""

    data: str = option("digits", "common", "path", "evaluation", "shared", "affects_test")
    """Data set (see smallvit list data), folder or zip file of class folders, table of image files (.csv, .tsv or
    .parquet with columns path and label; optional: split, group, weight), or hfds/NAME of Hugging Face."""
    columns: str | None = option(None, "evaluation", "shared", "affects_test")
    """Columns of the table that have other names, e.g. path=file,label=species."""
    group_by: str | None = option(None, "evaluation", "shared", "affects_test", "draws_test")
    """Regular expression that finds the group of an image, such as a patient, in its relative path: the first group in
    parentheses, else the whole match. The images of a group are in one split."""
    data_dir: str | None = option(None, "resumable", "evaluation", "shared", "local")
    """Folder of downloaded data sets; by default $SMALLVIT_DATA, else data/ in smallvit's cache folder."""
    img_size: int | Rectangle | None = option(None, "common", "evaluation", "shared")  # noqa: RUF009, a tuple
    """Pixels, e.g. 64, or height x width, e.g. 48x64; by default those of the images, at most 64 for folders."""
    resize: Literal["crop", "pad", "stretch"] = option("crop", "shared", "affects_test")
    """How images of another aspect ratio get this size: cover it and crop the center (crop), fit into it on a gray
    border (pad), or change the aspect ratio (stretch)."""
    in_chans: int | Literal["auto"] = option("auto", "evaluation", "shared", "affects_test", ge=1)
    """Channels of the images; auto: 3, or those of the first file if it is a NumPy array (.npy) or a TIFF file of
    several bands; 1 converts color to gray."""
    streaming: Literal["auto", "on", "off"] = option("auto", "evaluation", "shared")
    """Decode images in worker processes every epoch instead of keeping them in memory; auto: above 4 GiB of pixels, or
    for --crop resized of larger images."""
    workers: int | None = option(None, "resumable", "evaluation", "shared", ge=0)
    """Number of worker processes for streaming; by default one per CPU core."""
    train_fraction: float = option(1.0, "evaluation", "shared", "affects_test", gt=0, le=1)
    """Share of each class's training images to train on; smaller shares are subsets of larger ones."""
    balanced: bool = option(False, "shared")
    """Sample every class equally often, regardless of its number of images."""
    val_fraction: float = option(0.1, "evaluation", "shared", "affects_test", ge=0, lt=1)
    """Share of the training images held out to choose the best epoch, if the dataset has no validation split; with 0
    the last epoch is used."""
    test_fraction: float = option(0.2, "evaluation", "shared", "affects_test", "draws_test", gt=0, lt=1)
    """Share of all images held out for the final test, if the dataset has no test split."""
    split_seed: int = option(0, "evaluation", "shared", "affects_test", "draws_test", ge=0)
    """Seed of these splits; runs with the same seed are evaluated on the same images."""
    folds: int = option(0, "evaluation", "shared", "affects_test", "draws_test", ge=0)
    """Divide the training and validation images into this many folds (smallvit crossval trains on all): --fold is the
    test split, --val-fraction of the others is held out to choose the best epoch, and a test split of the data is not
    used. Folds are stratified, and groups stay together."""
    fold: int = option(1, "evaluation", "affects_test", "draws_test", ge=1)
    """Fold that is the test split, from 1 to --folds."""
    fold_seed: int = option(0, "evaluation", "shared", "affects_test", "draws_test", ge=0)
    """Seed of the folds."""
    skip_corrupt: bool = option(False, "resumable", "evaluation", "shared")
    """Skip images that cannot be decoded instead of stopping."""
    max_megapixels: float = option(MAX_MEGAPIXELS, "resumable", "evaluation", "shared", gt=0, le=1000)
    """Size limit of an image in millions of pixels; a larger one counts as undecodable."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.img_size is not None:
            object.__setattr__(self, "img_size", parse_size(self.img_size))
        require(bool(self.data), "data", repr(self.data), "a data set or folder")
        require(self.folds != 1, "folds", 1, "at least 2")
        require(not self.folds or self.fold <= self.folds, "fold", self.fold, f"at most --folds {self.folds}")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Options):
    """Augmentation of training images, beyond the preset."""

    aug: Literal[
        "auto",
        "none",
        "basic",
        "mix",
        "lee2021",
        "deit",
        "deit3",
        "augreg-none",
        "augreg-light1",
        "augreg-light2",
        "augreg-medium1",
        "augreg-medium2",
        "augreg-strong1",
        "augreg-strong2",
    ] = option("auto", "common", "shared")
    """Preset: none, basic, mix, lee2021, ... (see smallvit list aug), or auto (by the data; mix for folders)."""
    crop: Literal["auto", "none", "pad", "reflect", "resized"] = option("auto", "shared")
    """Random crop: of the image padded with black (pad) or mirrored (reflect), or a resized rectangle (resized)."""
    crop_padding: int | None = option(None, "shared", ge=0)
    """Padding in pixels for pad and reflect; by default an eighth of the image size."""
    crop_scale: float | None = option(None, "shared", gt=0, le=1)
    """Minimum share of the image's area for the crop resized; by default 0.08."""
    flip: float | None = option(None, "shared", ge=0, le=1)
    """Probability of a horizontal flip; by default 0.5, and 0 for datasets such as digits."""
    alternate_flip: bool = option(False, "shared")
    """Mirror each image in every other epoch instead of at random, so that both sides are seen equally often."""
    auto_augment: str | None = option(None, "shared")
    """none, autoaugment, rand-m9-n2-mstd0.5-inc1 or the like (timm's RandAugment), trivial or 3augment."""
    color_jitter: float | None = option(None, "shared", ge=0)
    """Strength of random changes of brightness, contrast and saturation."""
    random_erasing: float | None = option(None, "shared", ge=0, le=1)
    """Probability of erasing a random rectangle."""
    random_erasing_fill: Literal["auto", "mean", "noise"] = option("auto", "shared")
    """Fill of erased rectangles: the mean color, or noise."""
    mixup_prob: float | None = option(None, "shared", ge=0, le=1)
    """Probability that an image is mixed with another, by Mixup or CutMix in equal shares."""
    mixup: float | None = option(None, "shared", ge=0)
    """Mixup's alpha, of Beta(alpha, alpha); 0 turns it off."""
    cutmix: float | None = option(None, "shared", ge=0)
    """CutMix's alpha, of Beta(alpha, alpha); 0 turns it off."""
    mixup_mode: Literal["auto", "elem", "batch"] = option("auto", "shared")
    """Draw Mixup and CutMix parameters per image (elem) or per batch (batch)."""
    aug_repeats: int | None = option(None, "shared", ge=1)
    """Repeated augmentation: copies of each image in a batch; an epoch has as many steps, with fewer images."""
    test_flip: bool = option(False, "shared", "affects_test")
    """Average the final test's predictions over each image and its mirror image."""


REGULARIZATION: dict[str, dict[str, float]] = {
    "none": {"dropout": 0.0, "drop_path": 0.0, "weight_decay": 0.0, "label_smoothing": 0.0},
    # Lee, Lee, Song 2021, arXiv:2112.13492, its code
    "lee2021": {"dropout": 0.0, "drop_path": 0.1, "weight_decay": 0.05, "label_smoothing": 0.1},
    # Touvron et al. 2021, arXiv:2012.12877, table 9
    "deit": {"dropout": 0.0, "drop_path": 0.1, "weight_decay": 0.05, "label_smoothing": 0.1},
    # Touvron et al. 2022, arXiv:2204.07118: the small model
    "deit3": {"dropout": 0.0, "drop_path": 0.05, "weight_decay": 0.05, "label_smoothing": 0.0},
    # Steiner et al. 2021, arXiv:2106.10270, section 3.3
    "augreg-none-0.03": {"dropout": 0.0, "drop_path": 0.0, "weight_decay": 0.03, "label_smoothing": 0.0},
    "augreg-none-0.1": {"dropout": 0.0, "drop_path": 0.0, "weight_decay": 0.1, "label_smoothing": 0.0},
    "augreg-0.03": {"dropout": 0.1, "drop_path": 0.1, "weight_decay": 0.03, "label_smoothing": 0.0},
    "augreg-0.1": {"dropout": 0.1, "drop_path": 0.1, "weight_decay": 0.1, "label_smoothing": 0.0},
}
"""Values of --regularization."""
AUTO_REGULARIZATION = {"weight_decay": 0.05, "label_smoothing": 0.1}
"""Values of the preset auto; dropout and stochastic depth depend on the architecture."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Options):
    """Loss, optimizer, schedule, regularization."""

    epochs: int = option(100, "common", "shared", ge=1)
    """Passes over the training images."""
    max_time: str | None = option(None, "common", "shared")
    """Time for the whole run instead of --epochs, e.g. 1h30m."""
    batch_size: int | Literal["auto"] = option(128, "common", "shared", ge=1)
    """Images per step, at most, over all devices; auto, on a GPU: the largest power of two that fits into memory."""
    grad_accum_steps: int = option(1, ge=1)
    """Parts that a batch is split into to save memory; gradients are accumulated."""
    loss: str = "ce"
    """Loss of the labels."""
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    """Own options of losses, by name: <loss>_<option>."""
    class_weights: str | None = option(None, "path")
    """Weights of the classes in the loss: balanced (in inverse proportion to their numbers of images), or a CSV file
    with the columns class and weight; none by default."""
    logit_adjustment: float = option(0.0, ge=0)
    """Factor of the log of the class frequencies, which is added to the logits in training; 1 aims at balanced
    accuracy, 0 adds nothing."""
    opt: str = "adamw"
    """Optimizer, by timm's name: adamw, lamb, lion, muon, sgd, ..."""
    lr: float = option(1e-3, "common", gt=0)
    """Peak learning rate."""
    lr_base_size: int | None = option(None, ge=1)
    """Batch size that --lr is meant for; it is scaled in proportion to --batch-size."""
    sched: Literal["cosine", "linear", "step", "wsd", "constant"] = "cosine"
    """Learning rate schedule after the warmup: cosine or linear decay to --min-lr, step (times 0.1 after half of the
    steps, 0.01 after three quarters), constant, or wsd (constant, then linear decay over the last fifth)."""
    sched_start_epoch: int = 0
    """Number of epochs before the schedule starts, without warmup; set where --resume RUN --epochs N extends a run."""
    layer_decay: float | None = option(None, gt=0, lt=1)
    """Factor of the learning rate from each layer to the one below it; by default all have the same."""
    ema_decay: float | None = option(None, gt=0, lt=1)
    """Decay per step of an exponential moving average of the weights, which is evaluated and saved; none by default."""
    min_lr: float = option(1e-6, ge=0)
    """Learning rate at the end."""
    regularization: str = "auto"
    """Preset of --dropout, --drop-path, --weight-decay and --label-smoothing: auto (lee2021 for transformers), none,
    lee2021, deit, deit3, augreg-none-0.03, augreg-none-0.1, augreg-0.03 or augreg-0.1."""
    weight_decay: float | None = option(None, ge=0)
    """Weight decay of matrices; norms, biases, tokens, position embeddings and temperatures have none; by default
    0.05."""
    weight_decay_all: bool = False
    """Apply weight decay to all parameters, as the code of SPT and LSA does."""
    warmup_ratio: float = option(0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from 0 to its peak."""
    label_smoothing: float | None = option(None, ge=0, lt=1)
    """Label smoothing of cross-entropy; by default 0.1."""
    plugin_warmup_ratio: float = option(0.5, ge=0, le=1)
    """Share of the steps over which plugins created with --plugin-init preserve reach their full strength."""
    patch_drop_rate: float = option(0.0, ge=0, lt=1)
    """Share of a ViT's patches that are dropped at random in each training step, which saves their computations."""
    patch_drop_ratio: float = option(0.8, ge=0, le=1)
    """Share of the steps after which no patches are dropped any more."""
    progressive_size: int | None = option(None, ge=1)
    """Image size in pixels for the first part of training, below --img-size: progressive resizing, which saves time."""
    progressive_ratio: float = option(0.7, ge=0, le=1)
    """Share of the steps after which images have their whole size."""
    val_interval: int = option(1, ge=1)
    """Epochs from one evaluation on validation images to the next; the last epoch is always evaluated."""
    clip_grad: float | None = option(None, gt=0)
    """Maximum norm of the whole gradient; not clipped by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight_decay_all and self.layer_decay is not None:
            raise InputError("--weight-decay-all and --layer-decay: give one of them")
        name, names = self.regularization, ("auto", *REGULARIZATION)
        require(name in names, "regularization", name, f"one of {', '.join(names)}{suggest(name, names)}")
        parts = self.grad_accum_steps
        fits = self.batch_size == "auto" or parts <= self.batch_size
        require(fits, "grad_accum_steps", parts, "at most --batch-size")
        require(self.max_seconds != 0, "max_time", self.max_time, "a time such as 90s, 30m or 1h30m")
        require(self.min_lr <= self.lr, "min_lr", self.min_lr, f"between 0 and --lr {self.lr}")

    @property
    def max_seconds(self) -> float | None:
        """The limit --max-time in seconds; 0 if it is no time."""
        if self.max_time is None:
            return None
        parts = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s)?", self.max_time)
        try:
            return sum(float(part or 0) * unit for part, unit in zip(parts.groups(), (3600, 60, 1), strict=True))
        except (AttributeError, ValueError):
            return 0.0


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Options):
    """Distillation from a teacher (DeiT, arXiv:2012.12877)."""

    teacher: str | None = option(None, "common", "path")
    """Teacher: a run folder, a weights file, or a timm model."""
    distill: str = "hard"
    """Loss of the teacher's outputs."""
    distill_values: Literal["paper", "official"] = "paper"
    """Defaults of soft distillation: the mean divergence per image with weight 0.1 at temperature 3 (paper), or divided
    by the number of classes too, with weight 0.5 at temperature 1 (official: DeiT's code)."""
    distill_weight: float | None = option(None, gt=0)
    """Weight of the teacher's loss; the labels' loss has the rest; by default 0.5 for hard and token. For features it
    multiplies a term that is added to the labels' loss, by default 2.5."""
    distill_temperature: float | None = option(None, gt=0)
    """Temperature that both models' logits are divided by, for soft."""
    teacher_views: int = option(0, ge=0)
    """Number of augmented epochs to cycle through so that the outputs of the teacher can be cached; 0 draws new
    augmentations every epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.teacher != "", "teacher", repr(self.teacher), "a run's folder, a weights file, or a timm model")
        share = self.distill_weight is None or self.distill_weight <= 1
        require(share or self.distill == "features", "distill_weight", self.distill_weight, "a share of at most 1")

    def find_ineffective(self) -> list[tuple[str, str]]:
        """Return the options that have no effect, each with what it would need."""
        changed = [each.name for each in fields(self) if getattr(self, each.name) != each.default]
        if self.teacher is None:
            return [(name, "--teacher; add e.g. --teacher runs/resnet56-cifar100") for name in changed]
        soft_only = [name for name in ("distill_values", "distill_temperature") if name in changed]
        return [(name, "--distill soft; add it") for name in soft_only] if self.distill != "soft" else []


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Options):
    """Pretraining without labels (smallvit pretrain)."""

    objective: Literal["supervised", "lejepa", "dino"] = option("supervised")
    """What is trained: supervised (labels), or features of views of unlabeled images: lejepa, dino."""
    more_data: tuple[str, ...] = ()
    """Data sets whose training images are added to those of --data, without their labels."""
    global_views: int = option(2, ge=1)
    """Views of each image that show most of it."""
    local_views: int | None = option(None, ge=0)
    """Views of each image that show a small part; by default 2 for lejepa, 8 for dino."""
    global_scale: float | None = option(None, gt=0, le=1)
    """Minimum share of the image's area in global views; by default 0.7 up to 32 pixels, 0.5 up to 64, else 0.3."""
    local_scale: float | None = option(None, gt=0, le=1)
    """Minimum share of the image's area in local views; by default 0.2 up to 64 pixels, else 0.05."""
    local_scale_max: float | None = option(None, gt=0, le=1)
    """Maximum share in local views; by default 0.5 up to 32 pixels, 0.4 up to 64, else 0.3."""
    local_size: int | None = option(None, ge=1)
    """Size of local views in pixels; by default half of the image's where the model takes such images, else all."""
    proj_dim: int | None = option(None, ge=2)
    """Dimensions of the embeddings that the loss compares; by default 16 for lejepa, 1024 for dino."""
    sigreg_weight: float = option(0.02, ge=0, le=1)
    """Weight of LeJEPA's regularization; the distance between views has the rest."""

    @property
    def labels(self) -> bool:
        """Whether training uses labels."""
        return self.objective == "supervised"


Amp = Literal["auto", "bf16", "fp16", "off"]
LOGGERS = ("tensorboard", "wandb")
"""What `--log` takes; `smallvit.runs.trackers` knows them."""


@dataclass(frozen=True, kw_only=True)
class ComputeConfig(Options):
    """Hardware, precision and speed."""

    device: str = option("auto", "common", "resumable", "evaluation", "shared", "local")
    """auto (a GPU if available), cpu, cuda, cuda:1, mps."""
    amp: Literal["auto", "bf16", "fp16", "off"] = option("auto", "evaluation", "shared")
    """Mixed precision: auto uses bf16 where it is faster, else fp16 on CUDA GPUs."""
    tf32: bool = option(True, "shared")
    """Multiply fp32 matrices in TF32 where the GPU has it (with --amp off); summary.json records the precision."""
    compile: Literal["auto", "on", "graphs", "off"] = option("auto", "resumable", "shared")
    """Compile the model by torch.compile; graphs also records CUDA graphs; auto: if the run is long enough to pay."""
    eval_batch_size: int | Literal["auto"] = option("auto", "resumable", "shared", ge=1)
    """Images per batch and device in evaluation; halved if memory runs out; auto: 1,024 on GPUs, 128 on CPUs."""
    grad_checkpointing: bool = option(False, "resumable")
    """Recompute activations in the backward pass: less memory, a third more computation."""
    fsdp: bool = option(False, "resumable")
    """With torchrun: shard weights, gradients and optimizer state over the devices (FSDP)."""
    sync_bn: bool = False
    """With torchrun: batch norm over the images of all devices."""
    processes: str = option("1", "resumable", "local")
    """Processes that share each batch on a CPU, with equal parts of the threads, or auto: one per thread."""

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = self.processes == "auto" or (self.processes.isdecimal() and int(self.processes) > 0)
        require(valid, "processes", self.processes, "auto or a number above 0")
        if self.fsdp and self.sync_bn:
            raise InputError("--fsdp and --sync-bn cannot be combined; remove one of them")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Options):
    """Run folder, checkpoints and logging."""

    seed: int = option(0, "common", "shared", ge=0, lt=2**63)
    """Seed of initial weights, image order and augmentation."""
    out: str | None = option(None, "common", "launch", "shared", "local")
    """Run folder; by default runs/<arch>-<plugins>-<data>."""
    overwrite: bool = option(False, "common", "launch", "local")
    """Replace the run in --out."""
    resume: str | None = option(None, "common", "launch", "local")
    """Run to resume with its options; --data, --init and --teacher may name moved files, and --epochs more
    epochs for a finished run (with --keep-resume)."""
    auto_resume: bool = option(False, "launch", "local")
    """Resume the run in --out if there is one, for jobs that are restarted after an interruption."""
    checkpoint_minutes: float = option(10.0, "resumable", "shared", "local", gt=0)
    """Maximum time between two checkpoints; one is written after each epoch too."""
    keep_resume: bool = option(False, "resumable", "local")
    """Keep resume.safetensors of a finished run, so that --resume RUN --epochs N can train it longer."""
    select_by: Literal["top1", "macro_f1", "balanced_accuracy", "map", "micro_f1", "loss", "last"] = option(
        "top1", "shared"
    )
    """Validation metric that chooses the best epoch, or last. With several labels an image: map (mean average
    precision, then the default), macro_f1, micro_f1 or loss."""
    patience: int | None = option(None, "shared", ge=1)
    """Epochs without improvement of this metric after which training stops; by default it does not."""
    keep: int = option(0, "resumable", ge=0)
    """Number of latest epochs whose weights are kept, in addition to last and best."""
    log: str | None = option(None, "resumable", "shared", "local")
    """Send metrics to trackers: tensorboard, wandb, or both, separated by a comma."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.out != "", "out", repr(self.out), "a folder")
        if self.overwrite and self.out is None:
            raise InputError("--overwrite needs --out DIR, the run to replace")
        if self.auto_resume and (self.out is None or self.overwrite):
            raise InputError("--auto-resume needs --out DIR, the run to resume, without --overwrite")
        if self.resume is not None and (self.out is not None or self.overwrite):
            raise InputError("--resume RUN continues in RUN; remove --out and --overwrite")
        require(self.log is None or bool(self.loggers), "log", repr(self.log), f"some of {', '.join(LOGGERS)}")
        for name in self.loggers:
            require(name in LOGGERS, "log", name, f"one of {', '.join(LOGGERS)}{suggest(name, LOGGERS)}")

    @property
    def loggers(self) -> tuple[str, ...]:
        """Names of the requested trackers."""
        return tuple(dict.fromkeys(name.strip() for name in (self.log or "").split(",") if name.strip()))
