"""Compute the logits or feature maps of a teacher for the augmented and mixed images of its student.

Images are resized and normalized for the teacher. It runs in evaluation mode without gradients.

Feature maps guide a student by a CNN: locality guidance (Li et al. 2022, arXiv:2207.10026). Three maps of the student,
after its first, middle and last block, imitate the last three stages of the teacher:

    Σ_t mean((up(F_t) − up(A_t F_s))²)

A_t is a 1×1 convolution to the teacher's channels, which is trained with the student and dropped afterwards; `up`
resizes the smaller grid of the two to the larger one, bilinearly.

Axes: b batch, c channels, d channels of the teacher, h w image, i j grid, k classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import lt

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smallvit.config.config import Config
from smallvit.datasets.dataset import ImageDataset
from smallvit.evaluation.predictor import check_test_split
from smallvit.models import weights, weights_info
from smallvit.models.factory import prepare_for_inference
from smallvit.models.weights_info import WeightsInfo
from smallvit.profiling.flops import count_parameters
from smallvit.training.losses import LOSSES
from smallvit.utils.errors import InputError
from smallvit.utils.hardware import Compilation, autocast, choose_dtype, free_memory
from smallvit.utils.sizes import ImageSize, height_width

CACHE_DTYPE = torch.float16
"""Dtype of cached logits and feature maps."""
Outputs = Tensor | list[Tensor]
STAGES = 3
"""Feature maps that are compared."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A trained model on the training device."""

    card: WeightsInfo
    forward: Callable[[Tensor], Outputs]
    """The model, or what extracts its feature maps; compiled if the student is."""
    parameters: int
    img_size: ImageSize
    gain: Float[Tensor, "c 1 1"]
    """Factor that, with `offset`, converts the student's normalization to the teacher's."""
    offset: Float[Tensor, "c 1 1"]
    order: Tensor | None
    """Indices of the student's classes among the teacher's, if in another order."""
    dtype: torch.dtype
    cache: dict[tuple[int, ...], list[Tensor]] | None
    """Outputs by batch position, with --teacher-views."""
    fingerprint: str
    """Fingerprint of the weights: a student is resumed with the same teacher."""
    channels: tuple[int, ...] = ()
    """Channels of the feature maps; without any, the teacher gives logits."""

    def __call__(self, images: Float[Tensor, "b c h w"], position: tuple[int, ...] = ()) -> Outputs:
        """Return logits or feature maps for the student's images; `position` identifies a batch that is repeated."""
        if self.cache is None:
            outputs = self._compute_outputs(images)
        else:
            if position not in self.cache:
                self.cache[position] = [each.to("cpu", CACHE_DTYPE) for each in self._compute_outputs(images)]
            outputs = [each.to(images.device, torch.float32) for each in self.cache[position]]
        return outputs if self.channels else outputs[0]

    def _compute_outputs(self, images: Tensor) -> list[Tensor]:
        with torch.inference_mode(), autocast(images.device, self.dtype):
            outputs = self.forward(self.adapt_images(images))
            outputs = [each.float() for each in (outputs if self.channels else [outputs])]
            if self.order is not None:
                outputs = [logits[:, self.order] for logits in outputs]
        return [each.clone() for each in outputs]  # not inference tensors: the loss's graph keeps them

    def adapt_images(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c y z"]:
        """Resize and normalize the student's images for the teacher."""
        sides = height_width(self.img_size)
        if images.shape[-2:] != sides:
            smaller = any(map(lt, sides, images.shape[-2:]))
            images = F.interpolate(images, sides, mode="bicubic", antialias=smaller)
        return images * self.gain + self.offset

    def describe(self) -> str:
        """Return a one-line description."""
        arch = self.card.spec["arch"]
        what = "feature maps" if self.channels else "logits"
        cached = f", {what} cached" if self.cache is not None else ""
        return f"{self.card.name}: {arch}, {self.parameters:,} parameters, sees {self.img_size} pixels{cached}"


def create_teacher(
    config: Config, dataset: ImageDataset, device: torch.device, compilation: Compilation, views: int
) -> Teacher:
    """Create the teacher that a configuration names.

    Args:
        views: Images per epoch and process, of which outputs may be cached.

    Raises:
        InputError: No such model, or one with other channels, that has seen test images, or does not have the same
            classes (for logits) or three feature maps.
    """
    distill = config.distill
    card = weights_info.read_weights_info(distill.teacher, "--teacher")
    features = LOSSES[distill.distill].features
    order = _require_fit(card, config, dataset, same_classes=not features)
    model = weights.load_trained_model(card)
    parameters = count_parameters(model)
    size, in_chans = card.spec["img_size"], card.spec["in_chans"]
    dtype = choose_dtype(device, config.compute.amp, model, in_chans, size)
    shapes: Sequence[tuple[int, ...]] = [(len(dataset.class_names),)]
    if features:
        model = FeatureExtractor(model, size, in_chans, f"--teacher {card.name}", spread=False)
        shapes = model.shapes
    _require_memory(distill.teacher_views, views, sum(math.prod(shape) for shape in shapes))
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
        channels=tuple(shape[0] for shape in shapes) if features else (),
        dtype=dtype,
        cache={} if distill.teacher_views else None,
        fingerprint=weights_info.compute_fingerprint(card),
    )


def _require_fit(card: WeightsInfo, config: Config, dataset: ImageDataset, *, same_classes: bool) -> list[int]:
    """Check that a teacher fits the dataset; return the indices of the student's classes among its own, if the same."""
    if card.spec is None:
        raise card.error("its file does not name the model; give a run's folder or weights")
    weights.check_channels(card, dataset)
    check_test_split(card, dataset, config.data)
    if not same_classes:
        return []
    classes = card.class_names or ()
    if odd := set(classes) ^ set(dataset.class_names):
        raise card.error(
            f"has other classes than {dataset.name}, such as {min(odd)!r}; train a teacher by smallvit train --init "
            f"{card.name}"
        )
    return [classes.index(name) for name in dataset.class_names]


def _require_memory(epochs: int, views: int, values: int) -> None:
    needed = epochs * views * values * CACHE_DTYPE.itemsize
    if needed > free_memory() / 2:
        raise InputError(
            f"--teacher-views {epochs}: caching the teacher's outputs needs {needed / 2**30:.1f} GiB; give fewer views"
        )


class FeatureExtractor(nn.Module):
    """Return the feature maps of a model's last three stages, or of three of its blocks.

    Args:
        spread: Take the first, middle and last block instead of the last three stages.

    Raises:
        InputError: The model does not have `forward_intermediates` as timm's models do, or fewer than three stages.
    """

    def __init__(self, model: nn.Module, img_size: ImageSize, in_chans: int, name: str, *, spread: bool) -> None:
        super().__init__()
        self.model = model
        if not hasattr(model, "forward_intermediates"):
            raise InputError(f"--distill features: {name} has no feature maps (no forward_intermediates)")
        training = model.training
        with torch.no_grad():
            parameter = next(model.parameters())
            images = parameter.new_zeros(2, in_chans, *height_width(img_size))
            maps = model.eval().forward_intermediates(images, intermediates_only=True)
        model.train(training)
        count = len(maps)
        if count < STAGES:
            raise InputError(f"--distill features: {name} has {count} feature maps, which is fewer than {STAGES}")
        self.indices = [0, count // 2, count - 1] if spread else [*range(count - STAGES, count)]
        self.shapes = [tuple(maps[index].shape[1:]) for index in self.indices]
        """Channels, rows and columns of each map."""

    def forward(self, images: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b d i j"]]:
        return self.model.forward_intermediates(images, indices=self.indices, intermediates_only=True)


class GuidedModel(FeatureExtractor):
    """A student and its 1×1 convolutions A_t; returns its logits and the maps A_t F_s.

    Args:
        channels: Channels of the teacher's maps.
    """

    def __init__(
        self, model: nn.Module, img_size: ImageSize, in_chans: int, name: str, channels: Sequence[int]
    ) -> None:
        super().__init__(model, img_size, in_chans, name, spread=True)
        self.projections = nn.ModuleList(
            nn.Conv2d(shape[0], own, 1) for shape, own in zip(self.shapes, channels, strict=True)
        )

    def forward(
        self, images: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b classes"], list[Float[Tensor, "b d i j"]]]:
        features, maps = self.model.forward_intermediates(images, indices=self.indices)
        projected = [project(each) for project, each in zip(self.projections, maps, strict=True)]
        return self.model.forward_head(features), projected
