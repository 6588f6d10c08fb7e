"""Guide a student by the feature maps of a CNN: locality guidance (Li et al. 2022, arXiv:2207.10026).

Three maps of the student, after its first, middle and last block, imitate the last three stages of the teacher:

    Σ_t mean((up(F_t) − up(A_t F_s))²)

A_t is a 1×1 convolution to the teacher's channels, which is trained with the student and dropped afterwards; `up`
resizes the smaller grid of the two to the larger one, bilinearly.

Axes: b batch, c channels, d channels of the teacher, h w image, i j grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smallvit.utils.errors import InputError

STAGES = 3


class FeatureExtractor(nn.Module):
    """Return the feature maps of a model's last three stages, or of three of its blocks.

    Args:
        spread: Take the first, middle and last block instead of the last three stages.

    Raises:
        InputError: The model does not have `forward_intermediates` as timm's models do, or fewer than three stages.
    """

    def __init__(self, model: nn.Module, img_size: int, in_chans: int, name: str, *, spread: bool) -> None:
        super().__init__()
        self.model = model
        if not hasattr(model, "forward_intermediates"):
            raise InputError(f"--distill features: {name} has no feature maps (no forward_intermediates)")
        training = model.training
        with torch.no_grad():
            parameter = next(model.parameters())
            images = parameter.new_zeros(2, in_chans, img_size, img_size)
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

    def __init__(self, model: nn.Module, img_size: int, in_chans: int, name: str, channels: Sequence[int]) -> None:
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
