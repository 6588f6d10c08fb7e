"""A teacher: a trained model that answers to what the student sees.

It sees the student's very views, augmented and mixed, at its own image size and by its own normalisation, in evaluation
mode and without gradients, so neither its weights nor its batch norm's statistics change.

Axes: b batch, c channels, h w image, k classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from smallvit import compiling, trained
from smallvit.config import Config
from smallvit.datasets.images import ImageDataset
from smallvit.datasets.memory import free_memory
from smallvit.errors import InputError
from smallvit.hardware import autocast
from smallvit.options import DistillConfig
from smallvit.precision import sound_dtype
from smallvit.profile import count_parameters
from smallvit.ready import settled
from smallvit.trained import Card

KEPT = torch.float16
"""What answers are remembered in."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A trained model on the training device, ready to be asked."""

    card: Card
    forward: Callable[[Tensor], Tensor]
    """The model, compiled where the student is."""
    parameters: int
    img_size: int
    gain: Float[Tensor, "c 1 1"]
    """With `offset`, what makes images normalised for the student those normalised for the teacher."""
    offset: Float[Tensor, "c 1 1"]
    order: Tensor | None
    """The student's classes among the teacher's, where these stand in another order."""
    dtype: torch.dtype
    memory: dict[tuple[int, ...], Tensor] | None
    """Answers by place, where views come again."""
    fingerprint: str
    """Of the weights: a student is resumed with the teacher that it began with."""

    def __call__(self, images: Float[Tensor, "b c h w"], place: tuple[int, ...] = ()) -> Float[Tensor, "b k"]:
        """Logits for the student's images; `place` tells views apart, where they come again."""
        if self.memory is None:
            return self._ask(images)
        if place not in self.memory:
            self.memory[place] = self._ask(images).to("cpu", KEPT)
        return self.memory[place].to(images.device, torch.float32)

    def _ask(self, images: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(images.device, self.dtype):
            logits = self.forward(self.view(images)).float()
            logits = logits if self.order is None else logits[:, self.order]
        return logits.clone()  # no inference tensor: the loss's gradient keeps it

    def view(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c y z"]:
        """The student's images as the teacher wants them."""
        if images.shape[-1] != self.img_size:
            smaller = self.img_size < images.shape[-1]
            images = F.interpolate(images, (self.img_size, self.img_size), mode="bicubic", antialias=smaller)
        return images * self.gain + self.offset

    def describe(self) -> str:
        """One line about it."""
        arch = self.card.spec["arch"]
        again = ", asked once for each view" if self.memory is not None else ""
        return f"{self.card.name}: {arch}, {self.parameters:,} parameters, sees {self.img_size} pixels{again}"


def engage(config: Config, dataset: ImageDataset, device: torch.device, how: str, views: int) -> Teacher | None:
    """The teacher that a configuration names, if any; `views` are what it may have to remember for each process.

    Raises:
        InputError: no such model, or one that knows other classes, takes other channels or has seen test images.
    """
    distill = config.distill
    if distill.teacher is None:
        return None
    card = trained.card(distill.teacher, "--teacher")
    order = _require_fit(card, config, dataset)
    _require_memory(distill.teacher_views, views, len(dataset.class_names))
    model = trained.load(card)
    parameters = count_parameters(model)
    size = card.spec["img_size"]
    dtype = sound_dtype(device, config.compute.amp, model, card.spec["in_chans"], size)
    model = settled(model.requires_grad_(False), device, dtype)
    mean, std = dataset.statistics(device)
    own_mean, own_std = (torch.tensor(values, device=device)[:, None, None] for values in (card.mean, card.std))
    teacher = Teacher(
        card=card,
        forward=compiling.compiled(model, how),
        parameters=parameters,
        img_size=size,
        gain=std / own_std,
        offset=(mean - own_mean) / own_std,
        order=None if order == list(range(len(order))) else torch.tensor(order, device=device),
        dtype=dtype,
        memory={} if distill.teacher_views else None,
        fingerprint=_fingerprint(card),
    )
    grey = torch.zeros(2, dataset.in_chans, dataset.img_size, dataset.img_size, device=device)
    if not replace(teacher, forward=model, memory=None)(grey).isfinite().all():
        raise card.error("its answers are not finite: these weights are of no use")
    return teacher


def _fingerprint(card: Card) -> str:
    """Changes when the weights do."""
    if card.path is None:
        return str(card.tagged)
    with open(card.path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_fit(card: Card, config: Config, dataset: ImageDataset) -> list[int]:
    """Check that a teacher can teach this data; returns where the student's classes are among its own."""
    if card.spec is None:
        raise card.error("its file does not say which model it holds; give a run's folder or weights")
    trained.require_channels(card, dataset)
    trained.require_same_test(card, dataset, config.data)
    classes = card.class_names or ()
    if set(classes) != set(dataset.class_names):
        raise card.error(
            f"{_difference(classes, dataset.class_names)}, unlike {dataset.name}; a teacher for it is made by "
            f"smallvit train --init {card.name}"
        )
    return [classes.index(name) for name in dataset.class_names]


def _difference(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """What a teacher's classes have and lack, in words."""
    more, less = ([name for name in a if name not in b] for a, b in ((theirs, ours), (ours, theirs)))
    parts = [
        f"{what} {', '.join(repr(name) for name in names[:3])}" + (f" and {len(names) - 3} more" if names[3:] else "")
        for what, names in (("knows", more), ("does not know", less))
        if names
    ]
    return " and ".join(parts)


def _require_memory(epochs: int, views: int, classes: int) -> None:
    needed = epochs * views * classes * KEPT.itemsize
    if needed > free_memory() / 2:
        raise InputError(
            f"--teacher-views {epochs}: remembering the answers needs {needed / 2**30:.1f} GiB; give fewer views"
        )


def distillation(distill: DistillConfig) -> dict[str, Any]:
    """What `objectives.distilled` needs to know, with what is left open as published."""
    official = distill.distill_values == "official"
    soft = distill.distill == "soft"
    weight, temperature = ((0.5, 1.0) if official else (0.1, 3.0)) if soft else (0.5, 1.0)
    return {
        "soft": soft,
        "weight": distill.distill_weight or weight,
        "temperature": distill.distill_temperature or temperature,
        "per_class": soft and official,
    }
