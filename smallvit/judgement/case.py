"""A trained model before the images that it is judged on.

Axes: b batch, c channels, s image size, m classes of the data, k of the model, n images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from rich.progress import Progress
from torch import Tensor

from smallvit import trained
from smallvit.datasets.corruptions import corrupt
from smallvit.datasets.decode import decode_image
from smallvit.datasets.images import ImageDataset, Images
from smallvit.datasets.loaders import evaluation_batches
from smallvit.datasets.sampling import UNJUDGED
from smallvit.datasets.streaming import Files
from smallvit.errors import nearest
from smallvit.judgement import metrics
from smallvit.judgement.metrics import Answers
from smallvit.options import DataConfig
from smallvit.ready import Ready
from smallvit.trained import Card

NAMED = 3
"""Classes that are named among those that a model does not know."""
Condition = tuple[str, int] | None
"""A kind of corruption and its strength; None: images as they are."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and the images of one or several splits in a row; places count through all of them."""

    model: Ready
    dataset: ImageDataset
    splits: tuple[str, ...]
    numbers: Int64[np.ndarray, " m"]
    """Of each class of the data, which of the model's it is."""
    class_names: tuple[str, ...]
    """The model's, printable."""

    @property
    def parts(self) -> list[Images | Files]:
        """The images of each split."""
        return [getattr(self.dataset, split) for split in self.splits]

    @property
    def labels(self) -> Int64[np.ndarray, " n"]:
        """The true class of every image, as the model numbers them."""
        return self.numbers[np.concatenate([part.labels.numpy() for part in self.parts])]

    @property
    def paths(self) -> list[str] | None:
        """The file of every image, where all were read from files."""
        parts = [part.paths for part in self.parts]
        return None if None in parts else [path for part in parts for path in part]

    def batches(self) -> Iterator[tuple[UInt8[Tensor, "b c s s"], Int64[Tensor, " b"]]]:
        """Grey levels of every image, once, and its place; without the images that cannot be decoded."""
        black, white = (0.0,) * self.dataset.in_chans, (1.0,) * self.dataset.in_chans
        first = 0
        for split, part in zip(self.splits, self.parts, strict=True):
            numbered = replace(part, labels=torch.arange(first, first + len(part)))  # places in place of classes
            dataset = replace(self.dataset, mean=black, std=white, **{split: numbered})
            for images, places in evaluation_batches(dataset, split, self.model.device, self.model.batch_size):
                if (judged := places != UNJUDGED).any():
                    yield (255 * images[judged]).round().byte(), places[judged]
            first += len(part)

    def __len__(self) -> int:
        """Of batches."""
        return sum(-(-len(part) // self.model.batch_size) for part in self.parts)

    def at(self, places: Sequence[int]) -> UInt8[np.ndarray, "b c s s"]:
        """Grey levels of the images at some places; white where a file can be decoded no more."""
        firsts = np.cumsum([0, *map(len, self.parts)])
        found = []
        for place in places:
            number = int(np.searchsorted(firsts, place, side="right")) - 1
            part, index = self.parts[number], place - firsts[number]
            if isinstance(part, Images):
                found.append(part.pixels[index].numpy())
            else:
                found.append(_decoded(part, index))
        return np.stack(found)

    def ask(self, conditions: Sequence[Condition], bar: Progress, *, flip: bool) -> dict[Condition, Answers]:
        """What the model answers to the images under each condition; with `flip`, to them and their mirror images.

        Raises:
            InputError: its answers are not finite, or no image can be decoded.
        """
        found: dict[Condition, list[Answers]] = {condition: [] for condition in conditions}
        labels = torch.from_numpy(self.labels)
        for pixels, places in bar.track(self.batches(), len(self), description="images"):
            own = labels[places.cpu()]
            for condition in conditions:
                shown = pixels if condition is None else corrupt(pixels, *condition, places)
                logits = self.model.logits(self.model.normalised(shown), flip=flip)
                if not logits.isfinite().all():
                    raise self.model.card.error("its answers are not finite: these weights are of no use")
                found[condition].append(metrics.reduced(logits, own, places))
        return {condition: metrics.joined(batches) for condition, batches in found.items()}


def _decoded(part: Files, index: int) -> UInt8[np.ndarray, "c s s"]:
    try:
        return decode_image(part.listing.open(part.positions[index]), part.size)
    except Exception:  # whatever a file that was damaged meanwhile provokes
        return np.full((part.channels, part.size, part.size), 255, np.uint8)


def matched(
    card: Card, dataset: ImageDataset, config: DataConfig, splits: Sequence[str]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Where the data's classes are among the model's, by name, and the names of the model's.

    Where the weights tell no names, as many classes in the same order are taken for the same.

    Raises:
        InputError: the model takes other channels, has no classifier, does not know a class, or may have learnt images
            of the one split that is judged.
    """
    trained.require_channels(card, dataset)
    if len(splits) == 1:  # of all images together a model has learnt some in any case
        for drawn in ("test", "val") if "val" in splits else ("test",):
            trained.require_unchanged(card, dataset, config, drawn)
            trained.require_same_test(card, dataset, config, drawn)
    trained.require_classifier(card)
    count = card.spec["num_classes"]
    known = card.class_names or (dataset.class_names if count == len(dataset.class_names) else None)
    if known is None:
        has = len(dataset.class_names)
        raise card.error(f"it tells {count} classes apart and has no names for them, {dataset.name} has {has} classes")
    if known == dataset.class_names:
        return np.arange(count), known
    order = {name: number for number, name in enumerate(known)}
    if unknown := [name for name in dataset.class_names if name not in order]:
        named = ", ".join(map(repr, unknown[:NAMED])) + (
            f" and {len(unknown) - NAMED:,} more" if unknown[NAMED:] else ""
        )
        raise card.error(f"does not know the classes {named} of {dataset.name}{nearest(unknown[0], known)}")
    return np.array([order[name] for name in dataset.class_names]), known
