"""Train on fewer tokens at first: drop a ViT's patches at random, or show smaller images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import Format, PatchDropout
from timm.models import VisionTransformer
from torch import Tensor, nn

from smallvit.config.config import Config
from smallvit.plugins import PLUGINS
from smallvit.utils.errors import InputError
from smallvit.utils.hardware import is_convolutional


class TokenSaving:
    """Reduce the tokens of the first training steps, as --patch-drop-rate and --progressive-size say.

    Sources: Liu et al. 2022, arXiv:2208.07220 (patches); Tan and Le 2021, arXiv:2104.00298 (image sizes).

    Args:
        model: Model to train; a ViT gets a layer that drops patches.
        spec: Arguments of `create_model`.

    Raises:
        InputError: The model needs all patches, or images of one size.
    """

    def __init__(self, model: nn.Module, config: Config, spec: Mapping[str, Any]) -> None:
        self.optim, self.model = config.optim, model
        self.size: int | None = None
        """Image size of the current step in pixels; None if it is the whole one."""
        if self.optim.patch_drop_rate:
            _refuse_patch_drop(model, config, spec)
            model.patch_drop = PatchDropout(self.optim.patch_drop_rate, num_prefix_tokens=model.num_prefix_tokens)
        if self.optim.progressive_size:
            _refuse_progressive_size(model, config, spec)

    def step(self, share: float) -> None:
        """Set what the next step saves.

        Args:
            share: Share of all steps up to the end of this one.
        """
        optim, model = self.optim, self.model
        if optim.patch_drop_rate:
            model.patch_drop.prob = optim.patch_drop_rate if share <= optim.patch_drop_ratio else 0.0
        if optim.progressive_size:
            self.size = optim.progressive_size if share <= optim.progressive_ratio else None
            if isinstance(model, VisionTransformer):
                set_dynamic_size(model, self.size is not None)

    def shrink(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c y x"]:
        """Return the images in the size of this step."""
        if self.size is None:
            return images
        return F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)


def set_dynamic_size(model: nn.Module, dynamic: bool) -> None:
    """Let timm's `VisionTransformer` take images of other sizes and interpolate its position embeddings for them."""
    model.dynamic_img_size = dynamic
    embedding = model.patch_embed
    embedding.strict_img_size = embedding.flatten = not dynamic
    embedding.output_fmt = Format.NHWC if dynamic else Format.NCHW


def _refuse_patch_drop(model: nn.Module, config: Config, spec: Mapping[str, Any]) -> None:
    grids = [f"--{name}" for name in spec["plugins"] if PLUGINS[name].whole_grid]
    if not isinstance(model, VisionTransformer):
        grids.append(f"--arch {config.model.arch}")
    if config.distill.teacher and config.distill.distill == "features":
        grids.append("--distill features")
    if grids:
        raise InputError(
            f"--patch-drop-rate {config.optim.patch_drop_rate}: cannot be combined with {grids[0]}, which needs all "
            "patches"
        )


def _refuse_progressive_size(model: nn.Module, config: Config, spec: Mapping[str, Any]) -> None:
    size, full = config.optim.progressive_size, spec["img_size"]
    if not isinstance(full, int):
        raise InputError(f"--progressive-size {size}: only for square images, and --img-size is {full}; remove it")
    patch = 1
    if isinstance(model, VisionTransformer):
        patch = model.patch_embed.patch_size[0]
    elif not is_convolutional(model):
        raise InputError(f"--progressive-size {size}: not for --arch {config.model.arch}, only for ViT, DeiT and CNNs")
    if config.distill.teacher and config.distill.distill == "features":
        raise InputError(f"--progressive-size {size}: cannot be combined with --distill features, which compares grids")
    if size >= full or size % patch:
        multiple = f"a multiple of the patch size {patch} " if patch > 1 else ""
        raise InputError(f"--progressive-size {size}: expected {multiple}below the image size {full}")
