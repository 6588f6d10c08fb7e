"""Compute shifted patch tokenization (SPT): a token sees its patch and the image shifted by half a patch four ways.

    SPT(x) = LayerNorm(P([x s¹ s² s³ s⁴])) E,    P cuts patches, sᵏ = x shifted diagonally by half a patch

Source: Lee, Lee, Song 2021, "Vision Transformer for Small-Size Datasets", arXiv:2112.13492, §3.2: four diagonal
shifts in the order left-up, right-up, left-down, right-down, zero padding, LayerNorm over 5·C·p·q values, Linear.

A patch lies with its shifted copies in one window of (p + 2s) × (q + 2t) pixels, of which the views repeat the inner
ones. So windows are cut once (4/5 of the values of the five views at even patches), normalized in fp32 with every
pixel weighted by how often it occurs, and projected by one matrix product, whose weights are the views' added up at
their places, with LayerNorm's gain and bias folded in. The result is the equation's, and low contrast costs no
precision: what reaches the product, in bf16 too, is already normalized. Without the norm it is one convolution.

Feature maps (`features`) have many channels, and there the windows are never cut. The mean of a pixel over its
channels, its level, is taken off first: with the remaining detail d, the level l, and mean μ and deviation σ of a
window, y = (conv(d, Wγ) + (l − μ) ΣWγ) / σ + Wβ + b, the second sum over the channels. Windows are cut of the level
alone, which is one channel in fp32; what is rounded to half precision has no mean.

Differs from the official code: a shift is at least one pixel, so that patches of size 1 see their neighbors
(half of 1, rounded down, would be five identical copies); and features are ordered view, channel, row, column.

Axes: b batch, v views (the image first), c channels, h w image, p q patch height and width, i j token grid,
e token width, y z window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from timm.models import swin_transformer, swin_transformer_v2, swin_transformer_v2_cr
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from smallvit.plugins.leaf import Adapter, fx_leaf, is_plain, shared_constant
from smallvit.plugins.spt import SPTConfig

DIAGONAL = ((-1, -1), (-1, 1), (1, -1), (1, 1))
CARDINAL = ((-1, 0), (0, -1), (0, 1), (1, 0))
DIRECTIONS = {"diagonal": DIAGONAL, "cardinal": CARDINAL, "all": DIAGONAL + CARDINAL}
"""(down, right) in shifts: where each shifted view looks."""


@dataclass(frozen=True)
class Views:
    """Positions of the views of a patch in the window that contains all of them."""

    patch_size: tuple[int, int]
    config: SPTConfig

    @property
    def shift(self) -> tuple[int, int]:
        """Pixels that a view is shifted by, down and right."""
        p, q = self.patch_size
        return max(1, int(p * self.config.shift)), max(1, int(q * self.config.shift))

    @property
    def count(self) -> int:
        """Number of views, the image itself among them."""
        return 1 + len(self.corners)

    @property
    def window(self) -> tuple[int, int]:
        """Height and width in pixels of what one token sees."""
        (p, q), (s, t) = self.patch_size, self.shift
        return p + 2 * s, q + 2 * t

    @property
    def corners(self) -> list[tuple[int, int]]:
        """(row, column) at which each shifted view's patch begins in the window."""
        s, t = self.shift
        return [(s + down * s, t + right * t) for down, right in DIRECTIONS[self.config.directions]]

    def images(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b vc h w"]:
        """Return the image and its shifted views, padded with zeros."""
        (s, t), (h, w) = self.shift, x.shape[2:]
        around = F.pad(x, (t, t, s, s))
        return torch.cat([x, *(around[:, :, top : top + h, left : left + w] for top, left in self.corners)], dim=1)

    def fold(self, kernels: Float[Tensor, "e v c p q"], unshifted: bool = True) -> Float[Tensor, "e c y z"]:
        """Return one kernel for the whole window: the sum of the views' kernels, each at its position.

        With `unshifted` the first kernel is that of the image itself; else all are those of shifted views.
        """
        (p, q), (y, z) = self.patch_size, self.window
        if unshifted and self.fills_window:
            image, shifted = kernels.split([1, 4], dim=1)
            (s, t) = self.shift
            tiled = rearrange(shifted, "e (down right) c p q -> e c (down p) (right q)", down=2)
            return tiled + F.pad(image[:, 0], (t, t, s, s))
        views = kernels.unbind(dim=1)
        corners = [self.shift, *self.corners] if unshifted else self.corners
        return sum(
            F.pad(view, (left, z - q - left, top, y - p - top))
            for view, (top, left) in zip(views, corners, strict=True)
        )

    @property
    def fills_window(self) -> bool:
        """Whether the shifted views tile the window: half a patch, diagonally."""
        (p, q), (s, t) = self.patch_size, self.shift
        return self.config.directions == "diagonal" and (p, q) == (2 * s, 2 * t)


@fx_leaf
class ShiftedPatchTokenization(nn.Module):
    """Images (b, c, h, w) to patch tokens (b, e, i, j): a drop-in for a patch embedding's convolution.

    `in_chans` c, `dim` e, `patch_size` p or (p, q) in pixels. Patches lie side by side unless `stride` says else;
    `padding` adds zeros around the image. Pixels that fill no whole patch at the right and bottom make no token of
    their own, as with a convolution, unless `ceil_mode` has them padded. `features`: the input is no image but
    a feature map.

    Source: arXiv:2112.13492, §3.2.
    """

    irreversible: str | None = None
    """Why the layer cannot be unpatched: set where it is fused for inference."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        ceil_mode: bool = False,
        features: bool = False,
        config: SPTConfig | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not the next class's: a merging is one of timm's too
        self.config = config or SPTConfig()
        self.patch_size = p, q = _pair(patch_size)
        self.stride = _pair(patch_size if stride is None else stride)
        self.padding, self.ceil_mode, self.features = _pair(padding), ceil_mode, features
        self.in_channels, self.out_channels = in_chans, dim
        values = self.views.count * in_chans * p * q
        self.norm = nn.LayerNorm(values) if self.config.norm else nn.Identity()
        self.proj = nn.Linear(values, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as in the paper: Xavier-normal weights, zero bias."""
        if self.config.norm:
            self.norm.reset_parameters()
        nn.init.xavier_normal_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    @property
    def views(self) -> Views:
        """Positions of the views."""
        return Views(self.patch_size, self.config)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e i j"]:
        x = self._padded(x)
        if not self._is_plain():
            return rearrange(self.proj(self.norm(self._patches(x))), "b i j e -> b e i j")
        if not self.config.norm:
            kernels, bias, _ = self._folded()
            return F.conv2d(x, kernels, bias, self.stride)
        with torch.autocast(x.device.type, enabled=False):
            kernels, bias, share = self._folded()
            if not self.features:
                normal = self._normalized_windows(at_least_fp32(x), share.flatten())
        if self.features:
            return self._project_map(at_least_fp32(x), kernels, bias, share)
        dtype = self.dtype
        tokens = F.linear(normal.to(dtype), kernels.flatten(1).to(dtype), bias.to(dtype))
        return tokens.permute(0, 3, 1, 2)

    @torch.no_grad()
    def fuse(self) -> None:
        """Replace norm and projection by what they are folded to, for inference, where they are plain."""
        if self.proj is not None and self._is_plain():
            for name, value in zip(("kernels", "bias", "share"), self._folded(), strict=True):
                self.register_buffer(name, None if value is None else value.detach())
            self.proj, self.irreversible = None, "it is fused for inference"
            if self.config.norm:  # still has its epsilon
                self.norm = nn.LayerNorm(self.norm.normalized_shape, self.norm.eps, elementwise_affine=False)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return (self.kernels if self.proj is None else self.proj.weight).dtype

    def _is_plain(self) -> bool:
        """Return whether norm and projection are folded, or their weights may be used without calling the two."""
        if self.proj is None:
            return True
        weights = *self.norm._parameters.values(), *self.proj._parameters.values()
        norm = nn.LayerNorm if self.config.norm else nn.Identity
        return is_plain(self.norm, norm) and is_plain(self.proj) and not any(weight is None for weight in weights)

    def _padded(self, x: Float[Tensor, "b c h w"]) -> Tensor:
        """Return the image padded with zeros for windows at its border."""
        (s, t), (y, z), (p, q) = self.views.shift, self.padding, self.patch_size
        bottom = (p - 2 * y - x.shape[2]) % self.stride[0] if self.ceil_mode else 0
        right = (q - 2 * z - x.shape[3]) % self.stride[1] if self.ceil_mode else 0
        s, t = s + y, t + z
        return F.pad(x, (t, t + right, s, s + bottom))

    def _kernels(self, weight: Tensor) -> Float[Tensor, "e v c p q"]:
        p, q = self.patch_size
        return rearrange(weight, "e (v c p q) -> e v c p q", c=self.in_channels, p=p, q=q)

    def _windows(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b i j cyz"]:
        """Return the window of each token in a padded image."""
        y, z = self.views.window
        windows = x.unfold(2, y, self.stride[0]).unfold(3, z, self.stride[1])
        return windows.permute(0, 2, 3, 1, 4, 5).flatten(3)

    def _patches(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b i j vcpq"]:
        """Return the patches of all views of a padded image, view by view."""
        (y, z), (p, q) = self.views.window, self.patch_size
        windows = x.unfold(2, y, self.stride[0]).unfold(3, z, self.stride[1])
        corners = [self.views.shift, *self.views.corners]
        views = torch.stack([windows[..., top : top + p, left : left + q] for top, left in corners])
        return rearrange(views, "v b c i j p q -> b i j (v c p q)")

    def _normalized_windows(self, x: Tensor, share: Float[Tensor, " cyz"]) -> Float[Tensor, "b i j cyz"]:
        """Return the window of each token, normalized by the mean and variance of its views."""
        windows = self._windows(x)
        windows -= (windows * share).sum(dim=-1, keepdim=True)
        variance = windows.square().mul_(share).sum(dim=-1, keepdim=True)
        return windows * (variance + self.norm.eps).rsqrt()

    def _project_map(
        self,
        x: Tensor,
        kernels: Float[Tensor, "e c y z"],
        bias: Float[Tensor, " e"],
        share: Float[Tensor, "c y z"],
    ) -> Float[Tensor, "b e i j"]:
        """Return tokens of a feature map without cutting windows."""
        level = x.mean(dim=1, keepdim=True)
        detail = x - level
        dtype = self.dtype
        product = F.conv2d(detail.to(dtype), kernels.to(dtype), stride=self.stride)
        with torch.autocast(x.device.type, enabled=False):
            share = share.sum(dim=0)
            levels = self._windows(level)
            levels = levels - (levels @ share.flatten())[..., None]
            variance = F.conv2d(detail.square().mean(dim=1, keepdim=True), share[None, None], stride=self.stride)
            variance = variance + (levels.square() @ share.flatten())[:, None]
            levels = rearrange(F.linear(levels, kernels.sum(dim=1).flatten(1)), "b i j e -> b e i j")
            tokens = (product + levels) * (variance + self.norm.eps).rsqrt() + bias[:, None, None]
        return tokens.to(product.dtype)

    def _folded(self) -> tuple[Float[Tensor, "e c y z"], Float[Tensor, " e"], Float[Tensor, "c y z"] | None]:
        """Return weight and bias of a normalized window, and the share of each of its pixels in the views' values.

        The weights are the views' added up, with LayerNorm's gain and bias. The shares are for the values' mean.
        """
        if self.proj is None:
            return self.kernels, self.bias, self.share
        if not self.config.norm:
            return self.views.fold(self._kernels(self.proj.weight)), self.proj.bias, None
        weight, gain, bias, offset = map(
            at_least_fp32, (self.proj.weight, self.norm.weight, self.proj.bias, self.norm.bias)
        )
        share = shared_constant(pixel_shares, weight, self.views, self.in_channels)
        return self.views.fold(self._kernels(weight * gain)), torch.addmv(bias, weight, offset), share


def pixel_shares(views: Views, channels: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "c y z"]:
    """Return the share of each pixel of a window in the values of its views."""
    ones = torch.ones(1, views.count, channels, *views.patch_size, dtype=dtype, device=device)
    return views.fold(ones)[0] / ones.numel()


def at_least_fp32(x: Tensor) -> Tensor:
    """Return the tensor in fp32, or in its own dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@fx_leaf
class ShiftedPatchMerging(ShiftedPatchTokenization):
    """Feature maps (b, h, w, c) to (b, ⌈h/2⌉, ⌈w/2⌉, e): SPT with patches of 2 in place of Swin's patch merging.

    Source: arXiv:2112.13492, §3.2 and the official code.
    """

    def __init__(self, in_chans: int, dim: int, config: SPTConfig | None = None) -> None:
        super().__init__(in_chans, dim, 2, ceil_mode=True, features=True, config=config)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j e"]:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ShiftedViews(Adapter):
    """Mixin that adds shifted views to a trained layer of timm: its weights stay, those of the views start at zero.

        y = f(x) + Σₖ Wₖ P(sᵏ),    Wₖ = 0 at first

    `f` is the layer of timm's, and `shifted` holds the Wₖ of the shifted views alone. There is no norm over the views;
    Swin's merging, which normalizes patches before it projects them, does so with each view.
    """

    adapters: ClassVar[dict[type[nn.Module], type[ShiftedViews]]] = {}
    added = ("shifted", "config")

    config: SPTConfig | None = None
    """None where a library made a new layer of this class, as PEFT does for its convolutions: no views are added."""
    shifted: nn.Parameter
    """Weights of the views, (e, v·c, p, q)."""

    @classmethod
    def adopt(cls, layer: nn.Module, config: SPTConfig) -> None:
        """Turn a layer of the timm class into this one, in place; its weights and hooks stay."""
        weight = next(layer.parameters())
        layer.__class__ = cls
        layer.config = config
        views, (e, c) = len(layer.views.corners), layer.channels
        layer.shifted = nn.Parameter(weight.new_zeros(e, views * c, *layer.views.patch_size))

    @property
    def channels(self) -> tuple[int, int]:
        """Channels out and in."""
        return self.out_channels, self.in_channels

    @property
    def views(self) -> Views:
        """Positions of the views, of patches of 2 by default."""
        return Views((2, 2), self.config)

    @property
    def shifted_kernels(self) -> Float[Tensor, "e v c p q"]:
        """The weights view by view."""
        return self.shifted.unflatten(1, (len(self.views.corners), -1))


class ShiftedConv2d(ShiftedViews, nn.Conv2d):
    """A patch embedding's convolution that sees the shifted images too: one convolution with a larger kernel."""

    @property
    def views(self) -> Views:
        return Views(self.kernel_size, self.config)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e i j"]:
        if self.config is None:
            return super().forward(x)
        reach = [pad + shift for pad, shift in zip(self.padding, self.views.shift, strict=True)]
        if not is_plain(self, ShiftedConv2d):
            shifted = self.views.fold(self.shifted_kernels, unshifted=False)
            return super().forward(x) + F.conv2d(x, shifted, None, self.stride, reach)
        kernels = torch.cat([self.weight[:, None], self.shifted_kernels], dim=1)
        return F.conv2d(x, self.views.fold(kernels), self.bias, self.stride, reach)


class ShiftedPooling2d(ShiftedViews, nn.Conv2d):
    """PiT's pooling convolution, 3 × 3 of stride 2 and padding 1 in groups, plus shifted patches of 2."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e i j"]:
        if self.config is None:
            return super().forward(x)
        s, t = self.views.shift
        around = F.pad(x, (t, t + x.shape[3] % 2, s, s + x.shape[2] % 2))
        return super().forward(x) + F.conv2d(around, self.views.fold(self.shifted_kernels, unshifted=False), stride=2)


class ShiftedMerging(ShiftedViews):
    """Swin's patch merging, feature maps (b, h, w, c) to (b, ⌈h/2⌉, ⌈w/2⌉, e)."""

    @property
    def channels(self) -> tuple[int, int]:
        """Channels out and in."""
        return self.reduction.out_features, self.reduction.in_features // 4

    def shifted_patches(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j v qpc"]:
        """Return the patches of the shifted maps, with values in the order of timm's merging."""
        h, w = x.shape[1] + x.shape[1] % 2, x.shape[2] + x.shape[2] % 2
        s, t = self.views.shift
        around = F.pad(x, (0, 0, t, t + x.shape[2] % 2, s, s + x.shape[1] % 2))
        views = [around[:, top : top + h, left : left + w] for top, left in self.views.corners]
        return rearrange(torch.stack(views), "v b (i p) (j q) c -> b i j v (q p c)", p=2, q=2)

    def project_shifted(self, patches: Float[Tensor, "b i j v qpc"]) -> Float[Tensor, "b i j e"]:
        """Project the views' patches and add them up."""
        return F.linear(patches.flatten(3), rearrange(self.shifted_kernels, "e v c p q -> e (v q p c)"))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j e"]:
        return super().forward(x) + self.project_shifted(self.norm(self.shifted_patches(x)))


class ShiftedSwinMerging(ShiftedMerging, swin_transformer.PatchMerging):
    """Swin: each view's patches are normalized by the layer's own norm."""


class ShiftedSwinV2CrMerging(ShiftedMerging, swin_transformer_v2_cr.PatchMerging):
    """Swin V2 in timm's second implementation, which merges as Swin does."""


class ShiftedSwinV2Merging(ShiftedMerging, swin_transformer_v2.PatchMerging):
    """Swin V2, which normalizes after projecting."""

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j e"]:
        even = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        patches = rearrange(even, "b (i p) (j q) c -> b i j (q p c)", p=2, q=2)
        return self.norm(self.reduction(patches) + self.project_shifted(self.shifted_patches(x)))
