"""Pretrain by LeJEPA: views of an image have one embedding, and embeddings are isotropic Gaussian.

    L = λ SIGReg(z) + (1 − λ) mean((z − mean over views of z)²)

SIGReg compares the distribution of the embeddings along random directions with a standard normal one, by its
characteristic function φ(t) = exp(−t²/2): for the projections x of n embeddings on a direction,

    n ∫ w(t) ((mean cos(t x) − φ(t))² + (mean sin(t x))²) dt,  w = φ,

the Epps-Pulley statistic. There is no teacher, no stop-gradient and no centering. Source: Balestriero and LeCun 2025,
arXiv:2511.08544.

Axes: b images, v views, k dimensions, m directions, t knots.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smallvit.utils.distributed import World

DIRECTIONS, KNOTS, LAST_KNOT = 256, 17, 3.0
"""Random directions, and points at which characteristic functions are compared, from 0 to the last."""
HIDDEN = 2048
"""Width of the projector."""


def create_projector(dim: int, k: int) -> nn.Sequential:
    """Return an MLP that maps features (n, dim) to embeddings (n, k)."""
    layers: list[nn.Module] = []
    for before, after in ((dim, HIDDEN), (HIDDEN, HIDDEN)):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(HIDDEN, k))


def draw_directions(k: int, seed: int) -> Float[Tensor, "k m"]:
    """Draw random unit directions, the same on every device."""
    directions = torch.randn(k, DIRECTIONS, generator=torch.Generator().manual_seed(seed))
    return directions / directions.norm(dim=0)


def sigreg(
    z: Float[Tensor, "b v k"],
    directions: Float[Tensor, "k m"],
    world: World = World(),  # noqa: B008, it is frozen
) -> Float[Tensor, ""]:
    """Return the mean over views and directions of the statistic of the images' embeddings.

    Args:
        world: Processes that share the batch; the statistic is that of all its images.
    """
    t = torch.linspace(0, LAST_KNOT, KNOTS, device=z.device)
    phi = torch.exp(-(t**2) / 2)
    weights = torch.full_like(t, 2 * LAST_KNOT / (KNOTS - 1))  # both halves of the integral
    weights[0] = weights[-1] = LAST_KNOT / (KNOTS - 1)
    angles = (z.float() @ directions)[..., None] * t  # (b, v, m, t)
    sums = torch.stack([angles.cos().sum(dim=0), angles.sin().sum(dim=0)])
    n = world.total(torch.tensor(float(len(z))).to(z.device))
    cosine, sine = world.differentiable_total(sums) / n
    error = (cosine - phi) ** 2 + sine**2
    return n * (error @ (weights * phi)).mean()


def invariance(z: Float[Tensor, "b v k"]) -> Float[Tensor, ""]:
    """Return the mean squared distance of embeddings from the mean of their image's views."""
    return (z - z.mean(dim=1, keepdim=True)).square().mean()
