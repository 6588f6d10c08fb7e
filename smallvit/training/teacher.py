"""Compute the logits of a teacher for the augmented and mixed images of its student.

Images are resized and normalized for the teacher. It runs in evaluation mode without gradients.

Axes: b batch, c channels, h w image, k classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from smallvit.config.config import Config
from smallvit.datasets.dataset import ImageDataset
from smallvit.evaluation import leakage
from smallvit.models import weights, weights_info
from smallvit.models.factory import prepare_for_inference
from smallvit.models.weights_info import WeightsInfo
from smallvit.profiling.flops import count_parameters
from smallvit.utils.errors import InputError
from smallvit.utils.hardware import Compilation, autocast, choose_dtype, free_memory

CACHE_DTYPE = torch.float16
"""Dtype of cached logits."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A trained model on the training device."""

    card: WeightsInfo
    forward: Callable[[Tensor], Tensor]
    """The model, compiled if the student is."""
    parameters: int
    img_size: int
    gain: Float[Tensor, "c 1 1"]
    """Factor that, with `offset`, converts the student's normalization to the teacher's."""
    offset: Float[Tensor, "c 1 1"]
    order: Tensor | None
    """Indices of the student's classes among the teacher's, if in another order."""
    dtype: torch.dtype
    cache: dict[tuple[int, ...], Tensor] | None
    """Logits by batch position, with --teacher-views."""
    fingerprint: str
    """Fingerprint of the weights: a student is resumed with the same teacher."""

    def __call__(self, images: Float[Tensor, "b c h w"], position: tuple[int, ...] = ()) -> Float[Tensor, "b k"]:
        """Return logits for the student's images; `position` identifies a batch that is repeated."""
        if self.cache is None:
            return self._compute_logits(images)
        if position not in self.cache:
            self.cache[position] = self._compute_logits(images).to("cpu", CACHE_DTYPE)
        return self.cache[position].to(images.device, torch.float32)

    def _compute_logits(self, images: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(images.device, self.dtype):
            logits = self.forward(self.adapt_images(images)).float()
            logits = logits if self.order is None else logits[:, self.order]
        return logits.clone()  # not an inference tensor: the loss's graph keeps it

    def adapt_images(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c y z"]:
        """Resize and normalize the student's images for the teacher."""
        if images.shape[-1] != self.img_size:
            smaller = self.img_size < images.shape[-1]
            images = F.interpolate(images, (self.img_size, self.img_size), mode="bicubic", antialias=smaller)
        return images * self.gain + self.offset

    def describe(self) -> str:
        """Return a one-line description."""
        arch = self.card.spec["arch"]
        cached = ", logits cached" if self.cache is not None else ""
        return f"{self.card.name}: {arch}, {self.parameters:,} parameters, sees {self.img_size} pixels{cached}"


def create_teacher(
    config: Config, dataset: ImageDataset, device: torch.device, compilation: Compilation, views: int
) -> Teacher:
    """Create the teacher that a configuration names.

    Args:
        views: Images per epoch and process, of which logits may be cached.

    Raises:
        InputError: No such model, or one with other classes or channels, or that has seen test images.
    """
    distill = config.distill
    card = weights_info.read_weights_info(distill.teacher, "--teacher")
    order = _require_fit(card, config, dataset)
    _require_memory(distill.teacher_views, views, len(dataset.class_names))
    model = weights.load_trained_model(card)
    parameters = count_parameters(model)
    size = card.spec["img_size"]
    dtype = choose_dtype(device, config.compute.amp, model, card.spec["in_chans"], size)
    model = prepare_for_inference(model.requires_grad_(False), device, dtype)
    mean, std = dataset.statistics(device)
    teacher_mean, teacher_std = (torch.tensor(values, device=device)[:, None, None] for values in (card.mean, card.std))
    return Teacher(
        card=card,
        forward=compilation.wrap(model),
        parameters=parameters,
        img_size=size,
        gain=std / teacher_std,
        offset=(mean - teacher_mean) / teacher_std,
        order=None if order == list(range(len(order))) else torch.tensor(order, device=device),
        dtype=dtype,
        cache={} if distill.teacher_views else None,
        fingerprint=weights_info.compute_fingerprint(card),
    )


def _require_fit(card: WeightsInfo, config: Config, dataset: ImageDataset) -> list[int]:
    """Check that a teacher fits the dataset; return the indices of the student's classes among its own."""
    if card.spec is None:
        raise card.error("its file does not name the model; give a run's folder or weights")
    weights.check_channels(card, dataset)
    leakage.check_test_split(card, dataset, config.data)
    classes = card.class_names or ()
    if odd := set(classes) ^ set(dataset.class_names):
        raise card.error(
            f"has other classes than {dataset.name}, such as {min(odd)!r}; train a teacher by smallvit train --init "
            f"{card.name}"
        )
    return [classes.index(name) for name in dataset.class_names]


def _require_memory(epochs: int, views: int, classes: int) -> None:
    needed = epochs * views * classes * CACHE_DTYPE.itemsize
    if needed > free_memory() / 2:
        raise InputError(
            f"--teacher-views {epochs}: caching the logits needs {needed / 2**30:.1f} GiB; give fewer views"
        )
