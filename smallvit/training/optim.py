"""Freeze parameters, and create timm's optimizer, schedule and moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from smallvit.config.options import OptimConfig
from smallvit.models import factory
from smallvit.utils.distributed import is_sharded
from smallvit.utils.errors import InputError, first_line, suggest

FUSED = ("adamw", "adam", "sgd", "nesterov", "momentum")
"""Optimizers with fused implementations in torch."""
UNSAVED = ("adahessian", "kron", "kronc", "kronw")
"""timm's optimizers that need second gradients, or whose state has lists of tensors."""
WSD_DECAY = 0.2
"""Share of the steps over which the schedule wsd decays."""
DROPS, DROP = (0.5, 0.75), 0.1
"""Shares of the steps after which the schedule step drops, and the factor: He et al. 2016, arXiv:1512.03385, CIFAR."""
BACKBONE = "backbone"
"""Value of --freeze for all parameters but the heads."""


@dataclass(frozen=True)
class InitialWeights:
    """The weights that a run started from."""

    notes: tuple[str, ...] = ()
    """What was changed in them, a line each."""
    fingerprint: str | None = None
    new: tuple[str, ...] = ()
    """Parameters that they did not contain; these are never frozen."""


def freeze(model: nn.Module, patterns: tuple[str, ...], new: Collection[str] = ()) -> None:
    """Freeze the parameters whose names match, except those that the initial weights did not contain.

    Raises:
        InputError: a pattern matches none, or all are frozen.
    """
    heads = factory.classifier_parameter_names(model)
    for pattern in patterns:
        matched = {
            name: parameter
            for name, parameter in model.named_parameters()
            if (name not in heads if pattern == BACKBONE else fnmatchcase(name, pattern))
        }
        if not matched:
            names = ", ".join(name for name, _ in model.named_children())
            raise InputError(f"--freeze {pattern}: the model has no such parameters; it consists of {names}")
        if matched.keys() <= {*new}:
            raise InputError(f"--freeze {pattern}: all of it, or a part, is new to --init, so it is trained; remove it")
        for name in matched.keys() - {*new}:
            matched[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"--freeze {','.join(patterns)}: nothing is left to train")


def find_frozen_norms(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the frozen batch norms, whose statistics must not change either."""
    norms = [norm for norm in model.modules() if isinstance(norm, _BatchNorm) and norm.affine]
    return tuple(norm for norm in norms if not any(each.requires_grad for each in norm.parameters()))


def create_optimizer(
    model: nn.Module, config: OptimConfig, dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """Create timm's optimizer of this name; Muon's matrix products have the precision of the training, `dtype`.

    Instead of float16, in which small gradients become 0, they have float32.

    Vectors (norms, biases, temperatures) and parameters that timm's models name have no weight decay, except with
    `weight_decay_all`. With `layer_decay` each layer has a smaller learning rate than the one above it.

    Raises:
        InputError: No such optimizer, or one that cannot train this model.
    """
    if config.opt not in list_optimizers():
        hint = suggest(config.opt, list_optimizers())
        raise InputError(f"--opt {config.opt}: no such optimizer{hint}; see timm.optim.list_optimizers()")
    if config.opt in UNSAVED:
        raise InputError(f"--opt {config.opt}: cannot be used here (a run with it could not be resumed)")
    rate = config.lr * int(config.batch_size) / config.lr_base_size if config.lr_base_size else config.lr
    options = {"fused": True} if config.opt in FUSED else {}
    parameters = [each for each in model.parameters() if each.requires_grad] if config.weight_decay_all else model
    try:
        optimizer = create_optimizer_v2(
            parameters,
            config.opt,
            lr=rate,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            **options,
        )
    except Exception as error:  # a missing package, a model without layer groups
        layers = f" --layer-decay {config.layer_decay}" if config.layer_decay else ""
        raise InputError(f"--opt {config.opt}{layers}: cannot be used here ({first_line(error)})") from None
    if "muon" in config.opt and not is_sharded(model):
        from smallvit.training.muon import BatchedMuon

        return BatchedMuon(optimizer, torch.float32 if dtype == torch.float16 else dtype)
    return optimizer


def create_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> Scheduler:
    """Create a schedule with linear warmup over `steps` steps; there is no warmup where it extends a finished run.

    Call `step_update(n)` before the n-th step, counted from 1, so that no step has a rate of 0.
    """
    warmup = 0 if config.sched_start_epoch else round(steps * config.warmup_ratio)
    least = min(config.min_lr, max(group["lr"] for group in optimizer.param_groups))  # the peak may be scaled down
    common = {"warmup_t": warmup, "warmup_lr_init": 0.0, "t_in_epochs": False}
    if config.sched == "step":
        milestones = [
            math.ceil(share * steps) + 2 for share in DROPS
        ]  # timm's rate of step n is that of milestone n + 1
        return MultiStepLRScheduler(optimizer, milestones, DROP, warmup_prefix=False, **common)
    rest = max(2, steps - warmup)
    if config.sched == "cosine":
        return CosineLRScheduler(optimizer, t_initial=rest, lr_min=least, warmup_prefix=True, **common)
    if config.sched == "linear":
        return PolyLRScheduler(optimizer, rest, power=1.0, lr_min=least, warmup_prefix=True, **common)
    decay_steps = round(WSD_DECAY * steps) if config.sched == "wsd" else 0
    return Plateau(optimizer, steps, warmup, decay_steps, least)


class Plateau(Scheduler):
    """Warmup, constant, and linear decay over the last steps (Hu et al. 2024, arXiv:2404.06395)."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, steps: int, warmup: int, decay_steps: int, lr_min: float
    ) -> None:
        super().__init__(optimizer, "lr", t_in_epochs=False)
        self.steps, self.warmup, self.decay_steps, self.lr_min = steps, warmup, decay_steps, lr_min

    def _get_lr(self, t: int) -> list[float]:
        warm = min(1.0, t / self.warmup) if self.warmup else 1.0
        left = min(1.0, (self.steps - t) / self.decay_steps) if self.decay_steps else 1.0
        return [self.lr_min * (1 - left) + peak * warm * left for peak in self.base_values]


def create_average(model: nn.Module, config: OptimConfig) -> ModelEmaV3 | None:
    """Create the moving average of the weights, if enabled; its decay is smaller at first, for short runs."""
    return None if config.ema_decay is None else ModelEmaV3(model, decay=config.ema_decay, use_warmup=True)


def plugin_strength(step: int, steps: int, until: float) -> float:
    """Return the strength of plugins at a step, counted from 1, for models patched with init="preserve".

    It rises linearly from 0 (the model without them) to 1 at the fraction `until` of the steps.
    """
    ramp = until * steps
    return min(1.0, (step - 1) / ramp) if ramp else 1.0
