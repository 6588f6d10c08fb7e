"""Pretrain a model without labels: the layers that only its pretraining needs, and the loss of an image's views.

Objectives are LeJEPA (`lejepa`) and DINO (`dino`). Only the model is kept after training.

Axes: b images, v views, c channels, h w pixels, d features, k dimensions of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from timm.models import VisionTransformer
from torch import Tensor, nn

from smallvit.config.config import Config
from smallvit.datasets.dataset import ImageDataset
from smallvit.datasets.views import Views
from smallvit.models.weights import extract_features
from smallvit.training import dino, lejepa
from smallvit.training.token_saving import set_dynamic_size
from smallvit.utils import distributed
from smallvit.utils.distributed import World
from smallvit.utils.errors import InputError, flag
from smallvit.utils.hardware import is_convolutional
from smallvit.utils.sizes import ImageSize, height_width

PROJ_DIM = {"lejepa": 16, "dino": 1024}
"""Default of --proj-dim by objective."""
SUPERVISED_ONLY = (
    *("class_weights", "logit_adjustment", "balanced", "teacher", "dist_token", "patch_drop_rate"),
    *("progressive_size", "max_time", "patience", "mixup_prob", "auto_augment", "random_erasing"),
)
"""Options that cannot be combined with an objective without labels."""


class EmbeddingModel(nn.Module):
    """A model and the projector of its features.

    Args:
        projections: Map features (n, d) to embeddings (n, k).
    """

    def __init__(self, model: nn.Module, projections: nn.Module) -> None:
        super().__init__()
        self.model, self.projections = model, projections

    def forward(self, *groups: Float[Tensor, "b _ c _ _"]) -> Float[Tensor, "b v k"]:
        """Return the embeddings of the views of `Views.groups`."""
        features = torch.cat([view_features(self.model, views) for views in groups], dim=1)
        return self.projections(features.flatten(0, 1)).unflatten(0, features.shape[:2])


def view_features(model: nn.Module, views: Float[Tensor, "b v c h w"]) -> Float[Tensor, "b v d"]:
    """Return the features of views of one size."""
    return extract_features(model, views.flatten(0, 1)).unflatten(0, views.shape[:2])


class TeacherModel(EmbeddingModel):
    """A model and its head, next to their moving average, which is the teacher.

    Args:
        k: Number of the head's outputs.
    """

    def __init__(self, model: nn.Module, projections: nn.Module, k: int) -> None:
        super().__init__(model, projections)
        self.teacher = dino.Teacher(EmbeddingModel(model, projections), k)

    def forward(self, *groups: Float[Tensor, "b _ c _ _"]) -> tuple[Float[Tensor, "b v k"], Float[Tensor, "b g k"]]:
        """Return the outputs for all views, and the teacher's for the global ones."""
        with torch.no_grad():
            expected = self.teacher.model(groups[0])
        return super().forward(*groups), expected


class LeJEPA:
    """The loss of LeJEPA; takes the place of `losses.Objective`.

    Args:
        weight: Weight λ of SIGReg.
    """

    class_weights = None

    def __init__(self, weight: float, world: World) -> None:
        self.weight, self.world = weight, world

    def begin_step(self, share: float) -> None:
        """Do nothing: the loss is the same in all steps."""

    def end_step(self) -> None:
        """Do nothing: there is no teacher."""

    def __call__(
        self, model: Callable[..., Any], views: Views, targets: object = None, teacher_outputs: object = None
    ) -> dict[str, Tensor]:
        """Return the loss of a batch's views."""
        z = model(*views.groups).float()
        directions = lejepa.draw_directions(z.shape[-1], views.seed).to(z.device, non_blocking=True)
        regularization = lejepa.sigreg(z, directions, self.world)
        return {"loss": self.weight * regularization + (1 - self.weight) * lejepa.invariance(z)}


class DINO:
    """The loss of DINO; takes the place of `losses.Objective`.

    Args:
        trained: The student and the teacher, which is updated after each step.
    """

    class_weights = None

    def __init__(self, trained: TeacherModel, world: World) -> None:
        self.trained, self.world = trained, world
        self.share = 0.0
        """Share of all steps up to the end of this one."""

    def begin_step(self, share: float) -> None:
        """Set the place of a step in the schedules of the teacher."""
        self.share = share

    def end_step(self) -> None:
        """Update the teacher after the student's step."""
        self.trained.teacher.update(EmbeddingModel(self.trained.model, self.trained.projections), self.share)

    def __call__(
        self, model: Callable[..., Any], views: Views, targets: object = None, teacher_outputs: object = None
    ) -> dict[str, Tensor]:
        """Return the loss of a batch's views; move the center toward the teacher's outputs."""
        student, expected = model(*views.groups)
        teacher, temperature = self.trained.teacher, dino.teacher_temperature(self.share)
        loss = dino.dino_loss(student, expected, teacher.center.clone(), temperature)
        outputs = expected.detach().float().flatten(0, 1)
        sums = self.world.total(torch.cat([outputs.sum(dim=0), outputs.new_tensor([len(outputs)])]))
        teacher.move_center(sums[:-1] / sums[-1])
        return {"loss": loss}


def create_pretraining(
    model: nn.Module, config: Config, dataset: ImageDataset, world: World
) -> tuple[EmbeddingModel, LeJEPA | DINO]:
    """Return the model within the layers that only its pretraining needs, and the loss of its embeddings."""
    pretrain, device = config.pretrain, next(model.parameters()).device
    k, dim = pretrain.proj_dim or PROJ_DIM[pretrain.objective], _count_features(model, dataset)
    if pretrain.objective == "dino":
        trained = TeacherModel(model, dino.Head(dim, k).to(device), k).to(device)
        return trained, DINO(trained, world)
    projector = lejepa.create_projector(dim, k).to(device)
    if world.size > 1:
        projector = distributed.convert_sync_bn(projector, world, device)
    return EmbeddingModel(model, projector), LeJEPA(pretrain.sigreg_weight, world)


@torch.no_grad()
def _count_features(model: nn.Module, dataset: ImageDataset) -> int:
    training, parameter = model.training, next(model.parameters())
    images = parameter.new_zeros(1, dataset.in_chans, *height_width(dataset.img_size))
    count = extract_features(model.eval(), images).shape[1]
    model.train(training)
    return count


def local_size(model: nn.Module, config: Config, img_size: ImageSize) -> ImageSize:
    """Return the size of local views in pixels; a ViT is changed to take smaller images too.

    Raises:
        InputError: The model cannot take images of the size that --local-size asks for.
    """
    asked, patch = config.pretrain.local_size, 1
    if isinstance(model, VisionTransformer):
        patch = model.patch_embed.patch_size[0]
    elif not is_convolutional(model):
        if asked not in (None, img_size):
            raise InputError(f"--local-size {asked}: {config.model.arch} takes images of {img_size} pixels only")
        return img_size
    half = asked or round(min(height_width(img_size)) / 2 / patch) * patch
    if half % patch or half > min(height_width(img_size)):
        raise InputError(f"--local-size {half}: expected a multiple of the patch size {patch}, at most {img_size}")
    if isinstance(model, VisionTransformer):
        set_dynamic_size(model, True)
    return half


def refuse_labels(config: Config) -> Config:
    """Return the configuration of a run without labels, whose last epoch is kept.

    Raises:
        InputError: An option cannot be combined with pretraining.
    """
    options = config.to_dict()
    for name in SUPERVISED_ONLY:
        if name in config.given and options[name] not in (None, False, 0, "none"):
            raise InputError(f"{flag(name)} cannot be combined with --objective {config.pretrain.objective}; remove it")
    return config.replace(select_by="last")
