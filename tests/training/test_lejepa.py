"""Test SIGReg and the distance between views against NumPy, from the equations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from smallvit.training.lejepa import create_projector, draw_directions, invariance, sigreg


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(z: np.ndarray, directions: np.ndarray) -> float:
    """Return the Epps-Pulley statistic by complex characteristic functions over both halves of the integral."""
    t = np.linspace(-3, 3, 33)
    phi = np.exp(-(t**2) / 2)
    statistics = []
    for view in z.transpose(1, 0, 2):
        x = view @ directions  # (b, m)
        empirical = np.exp(1j * x[..., None] * t).mean(axis=0)
        statistics.append(len(x) * np.trapezoid(phi * np.abs(empirical - phi) ** 2, t, axis=-1))
    return float(np.mean(statistics))


def test_sigreg_equals_the_integral() -> None:
    for shape, scale in (((7, 3, 5), 1.0), ((64, 2, 16), 3.0), ((5, 1, 2), 0.1)):
        z, directions = scale * random(*shape), draw_directions(shape[2], seed=1)
        expected = reference(z.double().numpy(), directions.double().numpy())
        assert sigreg(z, directions).item() == pytest.approx(expected, rel=1e-4)


def test_gradients_of_sigreg_are_those_of_differences() -> None:
    z, directions = random(6, 2, 3).double().requires_grad_(), draw_directions(3, seed=0).double()
    sigreg(z.float(), directions.float()).backward()
    step = random(6, 2, 3, seed=1).double()
    before, after = (reference((z + sign * 1e-4 * step).detach().numpy(), directions.numpy()) for sign in (-1, 1))
    assert (z.grad * step).sum().item() == pytest.approx((after - before) / 2e-4, rel=1e-3)


def test_sigreg_is_least_for_isotropic_gaussians() -> None:
    directions = draw_directions(8, seed=0)
    gaussian = random(512, 1, 8)
    others = {
        "collapsed": torch.zeros_like(gaussian),
        "a line": gaussian[..., :1].expand(-1, -1, 8),
        "wide": 3 * gaussian,
        "shifted": gaussian + 1,
        "two points": gaussian.sign(),
    }
    least = sigreg(gaussian, directions)
    assert all(sigreg(z, directions) > 2 * least for z in others.values()), others.keys()


def test_directions_are_unit_vectors_that_follow_from_the_seed() -> None:
    one, same, other = (draw_directions(16, seed) for seed in (3, 3, 4))
    torch.testing.assert_close(one.norm(dim=0), torch.ones(256))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_invariance_is_the_variance_of_an_images_views() -> None:
    z = random(5, 4, 3)
    assert invariance(z).item() == pytest.approx(z.numpy().var(axis=1).mean(), rel=1e-5)
    assert invariance(z[:, :1].expand(-1, 4, -1)).item() == pytest.approx(0, abs=1e-12)


def test_the_projector_normalizes_its_hidden_features() -> None:
    projector = create_projector(6, 4)
    assert projector(random(32, 6)).shape == (32, 4)
    hidden = projector[:2](random(32, 6, seed=2))
    torch.testing.assert_close(hidden.mean(dim=0), torch.zeros(2048), atol=1e-5, rtol=0)
