"""Shifted views added to a layer that is trained already: its own weights stay, the views' begin at zero.

    y = f(x) + Σₖ Wₖ P(sᵏ),    Wₖ = 0 at first

so that the model computes at first what it did before, and learns to look around. `f` is the layer of timm's, its
parameters keep their names, and `shifted` holds the Wₖ. There is no norm over the views; Swin's merging, which
normalises patches before it projects them, does so with each view.

Axes: as in `spt`; v counts the shifted views alone.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from timm.layers import register_notrace_module
from timm.models import swin_transformer, swin_transformer_v2, swin_transformer_v2_cr
from torch import Tensor, nn

from smallvit.plugins.spt import SPTConfig, Views


class ShiftedViews:
    """What adds shifted views to a layer of timm's, in place; put before its class."""

    config: SPTConfig
    shifted: nn.Parameter
    """Weights of the views, (e, v·c, p, q)."""
    adapted: ClassVar[type[nn.Module]]
    """The class of timm's, or torch's, that this one adapts."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if len(cls.__bases__) > 1 and issubclass(cls.__bases__[0], ShiftedViews):  # not what others derive from it
            cls.adapted = cls.__bases__[1]
            register_notrace_module(cls)

    @classmethod
    def adopt(cls, layer: nn.Module, config: SPTConfig) -> None:
        """Turn a layer of the timm class into this one, in place; its weights and hooks stay."""
        weight = next(layer.parameters())
        layer.__class__ = cls
        layer.config = config
        views, (e, c) = len(layer.views.corners), layer.channels
        layer.shifted = nn.Parameter(weight.new_zeros(e, views * c, *layer.views.patch_size))

    def release(self) -> None:
        """Turn back into the layer of timm's, in place, with its weights as they are now."""
        del self.shifted, self.config
        self.__class__ = self.adapted

    @property
    def views(self) -> Views:
        """Where the views lie; patches of 2 unless the layer says else."""
        return Views((2, 2), self.config)

    @property
    def shifted_kernels(self) -> Float[Tensor, "e v c p q"]:
        """The weights view by view."""
        return self.shifted.unflatten(1, (len(self.views.corners), -1))

    @property
    def added_parameters(self) -> int:
        """Parameters that the layer has more than timm's."""
        return self.shifted.numel()


class ShiftedConv2d(ShiftedViews, nn.Conv2d):
    """A patch embedding's convolution that sees the shifted images too: one convolution with a larger kernel."""

    @property
    def channels(self) -> tuple[int, int]:
        """Channels out and in."""
        return self.out_channels, self.in_channels

    @property
    def views(self) -> Views:
        return Views(self.kernel_size, self.config)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e i j"]:
        kernels = torch.cat([self.weight[:, None], self.shifted_kernels], dim=1)
        reach = [pad + shift for pad, shift in zip(self.padding, self.views.shift, strict=True)]
        return F.conv2d(x, self.views.fold(kernels), self.bias, self.stride, reach)


class ShiftedPooling2d(ShiftedViews, nn.Conv2d):
    """PiT's pooling convolution, 3 × 3 of stride 2 and padding 1 in groups, beside shifted patches of 2."""

    @property
    def channels(self) -> tuple[int, int]:
        """Channels out and in."""
        return self.out_channels, self.in_channels

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e i j"]:
        s, t = self.views.shift
        around = F.pad(x, (t, t + x.shape[3] % 2, s, s + x.shape[2] % 2))
        return super().forward(x) + F.conv2d(around, self.views.fold(self.shifted_kernels, centre=False), stride=2)


class ShiftedMerging(ShiftedViews):
    """Swin's patch merging, feature maps (b, h, w, c) to (b, ⌈h/2⌉, ⌈w/2⌉, e)."""

    @property
    def channels(self) -> tuple[int, int]:
        """Channels out and in."""
        return self.reduction.out_features, self.reduction.in_features // 4

    def shifted_patches(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j v qpc"]:
        """The patches of the shifted maps, their values in the order of timm's merging."""
        h, w = x.shape[1] + x.shape[1] % 2, x.shape[2] + x.shape[2] % 2
        s, t = self.views.shift
        around = F.pad(x, (0, 0, t, t + x.shape[2] % 2, s, s + x.shape[1] % 2))
        views = [around[:, top : top + h, left : left + w] for top, left in self.views.corners]
        return rearrange(torch.stack(views), "v b (i p) (j q) c -> b i j v (q p c)", p=2, q=2)

    def project_shifted(self, patches: Float[Tensor, "b i j v qpc"]) -> Float[Tensor, "b i j e"]:
        """Project the views' patches and add them up."""
        return F.linear(patches.flatten(3), rearrange(self.shifted_kernels, "e v c p q -> e (v q p c)"))


class ShiftedSwinMerging(ShiftedMerging, swin_transformer.PatchMerging):
    """Swin: each view's patches are normalised by the layer's own norm."""

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j e"]:
        return super().forward(x) + self.project_shifted(self.norm(self.shifted_patches(x)))


class ShiftedSwinV2CrMerging(ShiftedMerging, swin_transformer_v2_cr.PatchMerging):
    """Swin V2 in timm's second implementation, which merges as Swin does."""

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j e"]:
        return super().forward(x) + self.project_shifted(self.norm(self.shifted_patches(x)))


class ShiftedSwinV2Merging(ShiftedMerging, swin_transformer_v2.PatchMerging):
    """Swin V2, which normalises what it has projected."""

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j e"]:
        even = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        patches = rearrange(even, "b (i p) (j q) c -> b i j (q p c)", p=2, q=2)
        return self.norm(self.reduction(patches) + self.project_shifted(self.shifted_patches(x)))
