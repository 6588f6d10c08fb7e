"""Parameter groups, optimiser and schedule, all timm's."""

from __future__ import annotations

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from smallvit.config import OptimConfig


def create_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Fused AdamW. Vectors (norms, biases, temperatures) and what timm's models name have no weight decay."""
    return create_optimizer_v2(model, "adamw", lr=config.lr, weight_decay=config.weight_decay, fused=True)


def create_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> CosineLRScheduler:
    """Linear warm-up, then half a cosine down to `min_lr`, over `steps`; call `step_update(n)` before the n-th,
    counted from 1, so that no step is lost to a rate of 0."""
    warmup = round(steps * config.warmup)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(2, steps - warmup),
        lr_min=config.min_lr,
        warmup_t=warmup,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def openness(step: int, steps: int, until: float) -> float:
    """How open the diagonal of attention is at a step, counted from 1: from 1 down to 0.

    For models patched with init="exact". A token's own weight falls linearly until the share `until` of the steps;
    from then on it is none, and attention is the paper's LSA.
    """
    closing = until * steps
    return max(0.0, 1 - (step - 1) / closing) if closing else 0.0
