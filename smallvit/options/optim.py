"""How the weights are fitted, and to whose answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from smallvit.errors import InputError
from smallvit.options.checks import flag, require


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
    sched: Literal["cosine", "linear", "step", "wsd", "constant"] = "cosine"
    """Course of the learning rate after the warm-up: half a cosine or a line down to --min-lr, step (a tenth after half
    of the steps, a hundredth after three quarters), constant, or wsd (constant, then a line down over the last fifth of
    the steps)."""
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
    decay_all: bool = False
    """Let weight decay act on those too, as the code of SPT and LSA has it."""
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
        if self.decay_all and self.layer_decay is not None:
            raise InputError("--decay-all and --layer-decay: give one of them")
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
class DistillConfig:
    """A trained model whose answers are learnt beside the labels (DeiT, arXiv:2012.12877)."""

    teacher: str | None = None
    """A run's folder, a weights file (.safetensors), or a timm model with pretrained weights."""
    distill: Literal["soft", "hard", "token"] = "hard"
    """Learn the teacher's probabilities (soft), its first choice (hard), or its first choice by a distillation token
    with a head of its own (token)."""
    distill_values: Literal["paper", "official"] = "paper"
    """What soft means unless given: the images' mean divergence, with a weight of 0.1 at temperature 3 (paper), or
    divided by the number of classes too, with 0.5 at temperature 1 (official: DeiT's code)."""
    distill_weight: float | None = None
    """Share of the loss that the teacher has; by default 0.5 for hard and token."""
    distill_temperature: float | None = None
    """What both models' logits are divided by for soft."""
    teacher_views: int = 0
    """Draw the views of so many epochs only, and show them again and again, so that the teacher is asked but once for
    each; 0: new views every epoch, the teacher is asked for each."""

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if self.teacher is None and given:
            raise InputError(f"{flag(given[0])} is of no use without --teacher")
        require(self.teacher != "", "teacher", repr(self.teacher), "a run's folder, a weights file, or a timm model")
        weight, temperature = self.distill_weight, self.distill_temperature
        require(weight is None or 0 < weight <= 1, "distill_weight", weight, "a share above 0, at most 1")
        if temperature is not None:
            require(0 < temperature < math.inf, "distill_temperature", temperature, "a temperature above 0")
        soft_only = [name for name in ("distill_values", "distill_temperature") if name in given]
        if soft_only and self.distill != "soft":
            raise InputError(f"{flag(soft_only[0])} is of no use with --distill {self.distill}; give --distill soft")
        require(self.teacher_views >= 0, "teacher_views", self.teacher_views, "0 or more")
