"""Load augmented training batches and plain evaluation batches, from memory or from disk.

Images in memory need no worker processes: they lie on the training device, or in the machine's memory if they would
fill a GPU. All random numbers follow from (seed, epoch, step), so an epoch can be entered at any step, resumed
bit-exactly, and shared by any number of devices.

Axes: n images, b batch, c channels, h w pixels, k classes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from smallvit.datasets.augment import Augment, normalize
from smallvit.utils.errors import InputError, first_line

if TYPE_CHECKING:
    from smallvit.config.config import Config
    from smallvit.datasets.dataset import ImageDataset, Split

ORDER, DRAWS, DECODING, FLIPS = 0, 1, 2, 4
"""Random number streams of one seed; `training.train` has 3."""
IGNORED_LABEL = -100
"""Label of an image that only fills a batch; cross-entropy ignores it."""
ROWS, VIEWS = 8, 7
"""Images and augmented views of each that `draw_augmented` draws."""
ON_DEVICE = 0.5
"""Share of a GPU's free memory that images may use."""

Pixels = tuple[UInt8[Tensor, "b c h w"], Int64[Tensor, " b"]]
"""Gray levels and class numbers, on the device."""
Batch = tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k"]]
"""Augmented, normalized images and label distributions, which sum to the images' weights."""


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
        return [repeat_pairs(part, self.aug_repeats) for part in parts]

    def alternate_flips(self, indices: np.ndarray, epoch: int) -> np.ndarray:
        """Return which images are mirrored: at random in the first epoch, then in every other epoch.

        Source: Jordan 2024, arXiv:2404.00498, section 3.6.
        """
        mirrored_first = np.random.default_rng((self.seed, FLIPS)).random(len(self.labels)) < 0.5
        return mirrored_first[indices] ^ bool(epoch % 2)

    def generator(self, stream: int, epoch: int, position: int) -> np.random.Generator:
        """Return the random number generator of a step (or image) of an epoch."""
        return np.random.default_rng((self.seed, stream, epoch, position))


class TrainLoader:
    """Load the training split in augmented batches; `rank` of `world` loads its part of each batch.

    Raises:
        InputError: more views of an image than a batch holds.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        augment: Augment,
        seed: int,
        device: torch.device,
        *,
        balanced: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.augment, self.device, self.rank, self.world = augment, device, rank, world
        sets = dataset.label_sets
        self.classes = len(dataset.class_names) if sets is None else sets.to(device)
        self.mean, self.std = dataset.statistics(device)
        weights = dataset.train.weights
        self.weights = None if weights is None else torch.from_numpy(weights).float()
        self.sampling = Sampling(
            labels=dataset.train.labels.numpy(),
            batch_size=batch_size,
            seed=seed,
            aug_repeats=augment.aug_repeats,
            balanced=balanced,
        )

    def __len__(self) -> int:
        """Return the number of steps in an epoch."""
        return len(self.sampling)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, from step `start` on."""
        batches = self.sampling.batches(epoch)
        parts = [rank_slice(len(batch), self.rank, self.world) for batch in batches]
        for step, (images, labels) in enumerate(self.read(epoch, batches, parts, start), start):
            rng = self.sampling.generator(DRAWS, epoch, step)
            flip = self.sampling.alternate_flips(batches[step], epoch) if self.augment.alternate_flip else None
            draws = self.augment.draw(rng, len(batches[step]), *images.shape[-2:], flip=flip).part(parts[step])
            weights = None if self.weights is None else self.weights[batches[step][parts[step]]].to(self.device)
            yield self.augment.apply(images, labels, draws, self.mean, self.std, self.classes, weights)

    def read(self, epoch: int, batches: list[np.ndarray], parts: list[slice], start: int) -> Iterator[Pixels]:
        """Yield the images of each batch's part, from step `start` on; `batches` has indices in the split."""
        raise NotImplementedError


class InMemoryLoader(TrainLoader):
    """Load batches of a training split in memory, the device's if it fits there."""

    def __init__(self, dataset: ImageDataset, *arguments: Any, **options: Any) -> None:
        super().__init__(dataset, *arguments, **options)
        pixels = dataset.train.pixels
        memory = self.device if pixels.nbytes <= ON_DEVICE * free_memory(self.device) else torch.device("cpu")
        self.pixels, self.labels = pixels.to(memory), dataset.train.labels.to(memory)

    def read(self, epoch: int, batches: list[np.ndarray], parts: list[slice], start: int) -> Iterator[Pixels]:
        """Yield images gathered from memory."""
        for batch, part in zip(batches[start:], parts[start:], strict=True):
            chosen = torch.from_numpy(batch[part]).to(self.pixels.device, non_blocking=True)
            yield self.pixels[chosen].to(self.device), self.labels[chosen].to(self.device)


def create_train_loader(dataset: ImageDataset, *arguments: Any, **options: Any) -> TrainLoader:
    """Create the loader that fits the training split, in memory or on disk; arguments are those of `TrainLoader`."""
    if not dataset.train.on_disk:
        return InMemoryLoader(dataset, *arguments, **options)
    from smallvit.datasets.streaming import StreamingLoader

    return StreamingLoader(dataset, *arguments, **options)


def free_memory(device: torch.device) -> float:
    """Return the free bytes of a GPU; infinity for other devices, where the images are in memory already."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def evaluation_batches(
    dataset: ImageDataset, split: str, device: torch.device, batch_size: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[Float[Tensor, "b c h w"], Int64[Tensor, " b"]]]:
    """Yield the normalized images and labels of a split (val or test), each image once, in order.

    `rank` of `world` yields its share, in as many batches as the others. A batch that would be empty has one image with
    the label `IGNORED_LABEL`.
    """
    images: Split = getattr(dataset, split)
    mean, std = dataset.statistics(device)
    parts = evaluation_parts(len(images), batch_size, rank, world)
    if images.on_disk:
        from smallvit.datasets.streaming import load_split

        batches = load_split(dataset, split, [part or range(1) for part in parts], device)
    else:
        chosen = (slice(part.start, part.stop) if part else slice(1) for part in parts)
        batches = ((images.pixels[each].to(device), images.labels[each].to(device)) for each in chosen)
    for part, (pixels, labels) in zip(parts, batches, strict=True):
        if not part or not len(labels):  # no share of this batch, or no image that can be decoded
            pixels, labels = pixels.new_zeros(1, *pixels.shape[1:]), labels.new_full((1,), IGNORED_LABEL)
        yield normalize(pixels, mean, std), labels


def repeat_pairs(indices: np.ndarray, repeats: int) -> np.ndarray:
    """Repeat images within blocks of two, and the last three if their number is odd.

    So a worker decodes an image once for its views, also where devices share the batch, while neighbors, which are
    mixed, differ.
    """
    rest = len(indices) % 2 and min(3, len(indices))
    pairs, last = np.split(indices, [len(indices) - rest])
    return np.concatenate([np.tile(pairs.reshape(-1, 2), (1, repeats)).ravel(), np.tile(last, repeats)])


def _random_order(labels: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    return np.resize(rng.permutation(len(labels)), n)  # the first ones again if there are too few


def balanced_order(labels: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Return n indices in random order; the numbers of images of any two classes differ by one at most."""
    sizes = np.unique(labels, return_counts=True)[1]
    per_class = -(-n // len(sizes))
    drawn = []
    for members in np.split(np.argsort(labels, kind="stable"), sizes.cumsum()[:-1]):
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


@contextmanager
def explain_worker_failures() -> Iterator[None]:
    """Suggest a remedy if a worker process died; PyTorch raises that error anywhere in the parent process.

    Raises:
        InputError: a worker process died.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            f"a process that decodes images died ({first_line(error)}): reduce --workers, or give the container more "
            "shared memory (--shm-size)"
        ) from None


def draw_augmented(config: Config) -> Image.Image:
    """Draw eight training images with seven augmented views each; captions are the labels and their weights.

    Notes on the data are printed to standard error.

    Raises:
        InputError: the data or the augmentation is unusable.
    """
    from smallvit.datasets.factory import create_dataset
    from smallvit.utils.plots import draw_grid  # imports matplotlib

    dataset = create_dataset(config.data)
    augment = Augment.from_config(config.augment, dataset.img_size, dataset.flip, dataset.aug, dataset.policy)
    for note in dataset.notes:
        print(note, file=sys.stderr)
    order = np.random.default_rng(config.run.seed).permutation(len(dataset.train))[:ROWS]
    images = dataset.train.subset(order)
    images = images.sample(ROWS) if images.on_disk else images
    mean, std = dataset.statistics(torch.device("cpu"))
    classes = len(dataset.class_names) if dataset.label_sets is None else dataset.label_sets
    views, captions = [images.pixels / 255], [[*map(dataset.label_name, images.labels.tolist())]]
    for view in range(VIEWS):
        rng = np.random.default_rng((config.run.seed, DRAWS, view))
        draws = augment.draw(rng, len(images), *images.pixels.shape[-2:])
        x, targets = augment.apply(images.pixels, images.labels, draws, mean, std, classes)
        views.append((x * std + mean).clamp(0, 1))
        captions.append([format_caption(target, dataset.class_names) for target in targets])
    rows = torch.stack(views, dim=1).flatten(0, 1)
    return draw_grid(rows, [line for row in zip(*captions, strict=True) for line in row], VIEWS + 1)


def format_caption(target: Float[Tensor, " k"], class_names: tuple[str, ...]) -> str:
    """Return the classes of a target, with their weights if they are below 1."""
    weights, labels = target.sort(descending=True)
    return "\n".join(
        class_names[label] + (f" {100 * weight:.0f}%" if weight <= 0.995 else "")
        for weight, label in zip(weights, labels, strict=True)
        if weight >= 0.005
    )
