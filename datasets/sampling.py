"""Which images make up each batch of an epoch, on however many devices.

Axes: n images, b batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from smallvit.errors import InputError

ORDER, DRAWS, DECODING = 0, 1, 2
"""Streams of random numbers that one seed is split into; `engine` has more."""
UNJUDGED = -100
"""Label of an image that is there only to fill a batch; cross-entropy leaves it out."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an epoch is drawn from n images with their labels.

    An epoch holds every image, in batches of one size: no step is noisier than the others for having a handful of
    images, and a compiled model meets one shape. Where the images do not come out even, some, fewer than there are
    batches, are drawn twice. With `repeats` r an epoch is as long but holds a share 1/r of the images, each r times
    within a batch (Hoffer et al. 2020, arXiv:1901.09335; DeiT). `balanced` draws every class equally often: images of
    large classes are left out in turns, those of small ones repeated.

    Raises:
        InputError: more repeats than the batch holds.
    """

    labels: np.ndarray
    batch_size: int
    seed: int
    repeats: int = 1
    balanced: bool = False

    def __post_init__(self) -> None:
        if self.repeats > self.batch_size:
            raise InputError(f"--repeats {self.repeats}: expected at most --batch-size {self.batch_size}")

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-self._share // (self.batch_size // self.repeats))

    @property
    def _share(self) -> int:
        """Images that an epoch shows at least."""
        return -(-len(self.labels) // self.repeats)

    @property
    def size(self) -> int:
        """Images in each batch, repeated ones counted each time."""
        return -(-self._share // len(self)) * self.repeats

    @property
    def views(self) -> int:
        """Images in all batches of an epoch, repeated ones counted each time."""
        return len(self) * self.size

    def batches(self, epoch: int) -> list[np.ndarray]:
        """The positions of the images in each batch of an epoch."""
        rng = np.random.default_rng((self.seed, ORDER, epoch))
        draw = balanced_order if self.balanced else _any_order
        parts = np.split(draw(self.labels, self.views // self.repeats, rng), len(self))
        return [np.tile(part, self.repeats) for part in parts]  # copies lie apart: neighbours are mixed

    def generator(self, stream: int, epoch: int, position: int) -> np.random.Generator:
        """The random numbers of one step (or image) of one epoch."""
        return np.random.default_rng((self.seed, stream, epoch, position))


def _any_order(labels: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    return np.resize(rng.permutation(len(labels)), n)  # the first ones again where there are too few


def balanced_order(labels: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """n positions in random order, every class equally often, to one."""
    classes = np.unique(labels)
    each = -(-n // len(classes))
    drawn = []
    for label in classes:
        members = np.flatnonzero(labels == label)
        rounds = -(-each // len(members))
        drawn.append(np.concatenate([rng.permutation(members) for _ in range(rounds)])[:each])
    rows = rng.permuted(np.stack(drawn, axis=1), axis=1)  # what is cut off: any class
    return rng.permutation(rows.flatten()[:n])


def evaluation_parts(n: int, batch_size: int, rank: int, world: int) -> list[range]:
    """The images that one of `world` devices judges in each batch of its own, as many batches on each; some empty."""
    ends = [(at, min(n, at + batch_size * world)) for at in range(0, n, batch_size * world)]
    return [range(a + (b - a) * rank // world, a + (b - a) * (rank + 1) // world) for a, b in ends]


def share(b: int, rank: int, world: int) -> slice:
    """The part of a batch that one of `world` devices takes: whole pairs, so that each part mixes as in the whole."""
    pairs = (b + 1) // 2
    return slice(2 * (pairs * rank // world), min(b, 2 * (pairs * (rank + 1) // world)))
