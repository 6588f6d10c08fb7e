"""Normal noise from keys: the same on every device, however the images are dealt out.

Each value is a hash of its key and position: the finaliser of SplitMix64 (Steele et al. 2014, "Fast splittable
pseudorandom number generators"), then the Box-Muller transform.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def normal_noise(keys: Int64[Tensor, " b"], n: int) -> Float[Tensor, "b n"]:
    """n standard normal values for each key."""
    half = -(-n // 2)
    bits = _mix(keys[:, None] + torch.arange(1, half + 1, device=keys.device) * _signed(0x9E3779B97F4A7C15))
    radius = (-2 * ((_shift(bits, 40) + 1).float() * 2.0**-24).log()).sqrt()  # of (0, 1]
    angle = (bits & 0xFFFFFF).float() * (2 * math.pi * 2.0**-24)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :n]


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in, as for unsigned numbers."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64)
