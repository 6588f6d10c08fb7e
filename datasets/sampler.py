"""Choose the images of each batch of an epoch, on any number of devices.

Axes: n images, b batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from smallvit.utils.errors import InputError

ORDER, DRAWS, DECODING, FLIPS = 0, 1, 2, 4
"""Random number streams of one seed; `training.train` has 3."""
IGNORED_LABEL = -100
"""Label of an image that only fills a batch; cross-entropy ignores it."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Draw the batches of an epoch from n images.

    An epoch has every image, in batches of equal size, so that no step is noisier than the others and a compiled model
    sees one shape. If the images do not fill the last batch, some are drawn twice, fewer than there are batches.

    With `aug_repeats` r an epoch has as many batches, with a share 1/r of the images, each r times within a batch
    (Hoffer et al. 2020, arXiv:1901.09335; DeiT). With `balanced`, every class is drawn equally often: images of large
    classes are omitted in turns, those of small classes repeated.

    Raises:
        InputError: more repeats than images in a batch.
    """

    labels: np.ndarray
    batch_size: int
    seed: int
    aug_repeats: int = 1
    balanced: bool = False

    def __post_init__(self) -> None:
        if self.aug_repeats > self.batch_size:
            raise InputError(f"--aug-repeats {self.aug_repeats}: expected at most --batch-size {self.batch_size}")

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return -(-self._share // (self.batch_size // self.aug_repeats))

    @property
    def _share(self) -> int:
        """Minimum number of different images in an epoch."""
        return -(-len(self.labels) // self.aug_repeats)

    @property
    def size(self) -> int:
        """Number of images in each batch, repeated ones included."""
        return -(-self._share // len(self)) * self.aug_repeats

    @property
    def views(self) -> int:
        """Number of images in an epoch, repeated ones included."""
        return len(self) * self.size

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the indices of the images in each batch of an epoch."""
        rng = np.random.default_rng((self.seed, ORDER, epoch))
        draw = balanced_order if self.balanced else _random_order
        parts = np.split(draw(self.labels, self.views // self.aug_repeats, rng), len(self))
        return [np.tile(part, self.aug_repeats) for part in parts]  # copies lie apart: neighbors are mixed

    def alternate_flips(self, indices: np.ndarray, epoch: int) -> np.ndarray:
        """Return which images are mirrored: at random in the first epoch, then in every other epoch.

        Source: Jordan 2024, arXiv:2404.00498, section 3.6.
        """
        mirrored_first = np.random.default_rng((self.seed, FLIPS)).random(len(self.labels)) < 0.5
        return mirrored_first[indices] ^ bool(epoch % 2)

    def generator(self, stream: int, epoch: int, position: int) -> np.random.Generator:
        """Return the random number generator of a step (or image) of an epoch."""
        return np.random.default_rng((self.seed, stream, epoch, position))


def _random_order(labels: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    return np.resize(rng.permutation(len(labels)), n)  # the first ones again if there are too few


def balanced_order(labels: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Return n indices in random order; the numbers of images of any two classes differ by one at most."""
    classes = np.unique(labels)
    per_class = -(-n // len(classes))
    drawn = []
    for label in classes:
        members = np.flatnonzero(labels == label)
        rounds = -(-per_class // len(members))
        drawn.append(np.concatenate([rng.permutation(members) for _ in range(rounds)])[:per_class])
    rows = rng.permuted(np.stack(drawn, axis=1), axis=1)  # so that the rest that is dropped is of random classes
    return rng.permutation(rows.flatten()[:n])


def evaluation_parts(n: int, batch_size: int, rank: int, world: int) -> list[range]:
    """Return the indices that one of `world` devices evaluates in each batch; equally many batches, some empty."""
    ends = [(at, min(n, at + batch_size * world)) for at in range(0, n, batch_size * world)]
    return [range(a + (b - a) * rank // world, a + (b - a) * (rank + 1) // world) for a, b in ends]


def rank_slice(b: int, rank: int, world: int) -> slice:
    """Return the part of a batch for one of `world` devices: whole pairs, so that pairs are mixed as in the batch."""
    pairs = (b + 1) // 2
    return slice(2 * (pairs * rank // world), min(b, 2 * (pairs * (rank + 1) // world)))
