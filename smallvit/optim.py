"""Parameter groups, optimisers, schedules and the weights' moving average, timm's."""

from __future__ import annotations

import math

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from smallvit.errors import InputError, first_line, nearest
from smallvit.options import OptimConfig

FUSED = ("adamw", "adam", "sgd", "nesterov", "momentum")
"""Optimisers that torch runs over all parameters at once."""
UNSAVED = ("adahessian", "kron", "kronc", "kronw")
"""timm's optimisers that need a second gradient, or keep lists of tensors."""
FALLING = 0.2
"""Share of the steps over which the schedule wsd falls."""
DROPS, DROP = (0.5, 0.75), 0.1
"""Shares of the steps after which the schedule step drops, and to what share of the rate before: He et al. 2016,
arXiv:1512.03385, on CIFAR."""


def create_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """timm's optimiser of this name. Vectors (norms, biases, temperatures) and what timm's models name have no weight
    decay, unless all have; with `layer_decay` every layer has a smaller learning rate than the one above it.

    Raises:
        InputError: no such optimiser, or one that this model cannot be fitted with.
    """
    if config.opt not in list_optimizers():
        hint = nearest(config.opt, list_optimizers())
        raise InputError(f"--opt {config.opt}: no such optimiser{hint}; see timm.optim.list_optimizers()")
    if config.opt in UNSAVED:
        raise InputError(f"--opt {config.opt}: cannot be used here (a run with it could not be resumed)")
    rate = config.lr * config.batch_size / config.lr_batch if config.lr_batch else config.lr
    options = {"fused": True} if config.opt in FUSED else {}
    fitted = [each for each in model.parameters() if each.requires_grad] if config.decay_all else model
    try:
        return create_optimizer_v2(
            fitted,
            config.opt,
            lr=rate,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            **options,
        )
    except Exception as error:  # a package that is missing, a model without a list of its layers
        layers = f" --layer-decay {config.layer_decay}" if config.layer_decay else ""
        raise InputError(f"--opt {config.opt}{layers}: cannot be used here ({first_line(error)})") from None


def create_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> Scheduler:
    """Linear warm-up, then the schedule that `config` names, over `steps`; call `step_update(n)` before the n-th,
    counted from 1, so that no step is lost to a rate of 0."""
    warmup = round(steps * config.warmup)
    least = min(config.min_lr, max(group["lr"] for group in optimizer.param_groups))  # the peak may be scaled down
    common = {"warmup_t": warmup, "warmup_lr_init": 0.0, "t_in_epochs": False}
    if config.sched == "step":
        behind = [math.ceil(share * steps) + 2 for share in DROPS]  # timm's rate of step n is that of milestone n + 1
        return MultiStepLRScheduler(optimizer, behind, DROP, warmup_prefix=False, **common)
    rest = max(2, steps - warmup)
    if config.sched == "cosine":
        return CosineLRScheduler(optimizer, t_initial=rest, lr_min=least, warmup_prefix=True, **common)
    if config.sched == "linear":
        return PolyLRScheduler(optimizer, rest, power=1.0, lr_min=least, warmup_prefix=True, **common)
    falling = round(FALLING * steps) if config.sched == "wsd" else 0
    return Plateau(optimizer, steps, warmup, falling, least)


class Plateau(Scheduler):
    """Warm-up, constant, and a line down over the last steps (Hu et al. 2024, arXiv:2404.06395)."""

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int, warmup: int, falling: int, lr_min: float) -> None:
        super().__init__(optimizer, "lr", t_in_epochs=False)
        self.steps, self.warmup, self.falling, self.lr_min = steps, warmup, falling, lr_min

    def _get_lr(self, t: int) -> list[float]:
        rising = min(1.0, t / self.warmup) if self.warmup else 1.0
        left = min(1.0, (self.steps - t) / self.falling) if self.falling else 1.0
        return [self.lr_min * (1 - left) + peak * rising * left for peak in self.base_values]


def create_average(model: nn.Module, config: OptimConfig) -> ModelEmaV3 | None:
    """The weights' moving average, if one is wanted; it follows closely at first, so that short runs profit."""
    return None if config.ema is None else ModelEmaV3(model, decay=config.ema, use_warmup=True)


def openness(step: int, steps: int, until: float) -> float:
    """How open the diagonal of attention is at a step, counted from 1: from 1 down to 0.

    For models patched with init="exact". A token's own weight falls linearly until the share `until` of the steps;
    from then on it is none, and attention is the paper's LSA.
    """
    closing = until * steps
    return max(0.0, 1 - (step - 1) / closing) if closing else 0.0
