"""Pretrain by DINO: views of an image have the same distribution over prototypes as its global views in a teacher.

    L = mean over pairs (g, s) of a global view and another one of −Σ_k p_k(g) log q_k(s)
    p = softmax((teacher(g) − center) / τ_t),  q = softmax(student(s) / τ_s)

The teacher is a moving average of the student, and the center one of the teacher's outputs. Source: Caron et al. 2021,
arXiv:2104.14294.

Axes: b images, v views, g global views, k prototypes, d features.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

HIDDEN, BOTTLENECK = 2048, 256
"""Widths of the head."""
STUDENT_TEMPERATURE = 0.1
TEACHER_TEMPERATURES, TEACHER_WARMUP = (0.04, 0.07), 0.1
"""The teacher's temperature at the start and after this share of the steps; it rises linearly."""
MOMENTUM = 0.996
"""Momentum of the teacher at the start; it rises to 1 by a cosine."""
CENTER_MOMENTUM = 0.9


class Head(nn.Module):
    """Map features (n, d) to outputs for k prototypes (n, k): an MLP, and cosines with the prototypes."""

    def __init__(self, dim: int, k: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, BOTTLENECK)
        )
        self.prototypes = nn.Parameter(torch.empty(k, BOTTLENECK))
        nn.init.trunc_normal_(self.prototypes, std=0.02)

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        return F.normalize(self.mlp(x), dim=-1) @ F.normalize(self.prototypes, dim=-1).mT


class Teacher(nn.Module):
    """A moving average of a student, and the center of its outputs.

    Args:
        student: Module whose outputs for global views are imitated; the teacher starts as its copy.
        k: Number of its outputs.
    """

    def __init__(self, student: nn.Module, k: int) -> None:
        super().__init__()
        self.model = copy.deepcopy(student).requires_grad_(False)
        self.register_buffer("center", torch.zeros(k))
        self.center: Tensor

    @torch.no_grad()
    def update(self, student: nn.Module, share: float) -> None:
        """Move the weights toward the student's, after a share of all steps; copy its buffers."""
        momentum = 1 - (1 - MOMENTUM) * (math.cos(math.pi * share) + 1) / 2
        own, others = ([*each.parameters()] for each in (self.model, student))
        torch._foreach_lerp_(own, others, 1 - momentum)
        for buffer, other in zip(self.model.buffers(), student.buffers(), strict=True):
            buffer.copy_(other)

    @torch.no_grad()
    def move_center(self, mean: Float[Tensor, " k"]) -> None:
        """Move the center toward the mean of a batch's outputs."""
        self.center.lerp_(mean, 1 - CENTER_MOMENTUM)


def teacher_temperature(share: float) -> float:
    """Return the teacher's temperature after a share of all steps."""
    start, end = TEACHER_TEMPERATURES
    return start + (end - start) * min(1.0, share / TEACHER_WARMUP)


def dino_loss(
    student: Float[Tensor, "b v k"], teacher: Float[Tensor, "b g k"], center: Float[Tensor, " k"], temperature: float
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of all pairs of a teacher's view and another view of the student.

    Args:
        student: Outputs for all views, the global ones first.
        teacher: Outputs for the global views.
        center: Subtracted from the teacher's outputs.
        temperature: The teacher's.
    """
    p = ((teacher.float() - center) / temperature).softmax(dim=-1)
    log_q = (student.float() / STUDENT_TEMPERATURE).log_softmax(dim=-1)
    pairs = -torch.einsum("bgk,bvk->gv", p, log_q) / len(student)
    g, v = pairs.shape
    same = pairs.diagonal().sum()  # a view is not compared with itself
    return (pairs.sum() - same) / (g * v - min(g, v))
