"""Shifted patch tokenization (SPT): each token sees its patch and the image shifted by half a patch four ways.

    SPT(x) = LayerNorm(P([x s¹ s² s³ s⁴])) E,    P cuts patches, sᵏ = x shifted diagonally by half a patch

Source: Lee, Lee, Song 2021, "Vision Transformer for Small-Size Datasets", arXiv:2112.13492, §3.2: four diagonal
shifts in the order left-up, right-up, left-down, right-down, zero padding, LayerNorm over 5·C·p·q values, Linear.

A patch lies with its shifted copies in one window of (p + 2s) × (q + 2t) pixels, of which the views repeat the inner
ones. So windows are cut once (4/5 of the values of the five views at even patches), normalised in fp32 with every
pixel weighted by how often it occurs, and projected by one matrix product, whose weights are the views' added up at
their places, with LayerNorm's gain and bias folded in. The result is the equation's, and low contrast costs no
precision: what reaches the product, in bf16 too, is already normalised. Without the norm it is one convolution.

Feature maps (`features`) have many channels, and there the windows are never cut. The mean of a pixel over its
channels, its level, is taken off first: with the remaining detail d, the level l, and mean μ and deviation σ of a
window, y = (conv(d, Wγ) + (l − μ) ΣWγ) / σ + Wβ + b, the second sum over the channels. Windows are cut of the level
alone, which is one channel in fp32; what is rounded to half precision has no mean.

Differs from the official code: a shift is at least one pixel, so that patches of size 1 see their neighbours
(half of 1, rounded down, would be five identical copies); and features are ordered view, channel, row, column.

Axes: b batch, v views (the image first), c channels, h w image, p q patch height and width, i j token grid,
e token width, y z window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

DIAGONAL = ((-1, -1), (-1, 1), (1, -1), (1, 1))
CARDINAL = ((-1, 0), (0, -1), (0, 1), (1, 0))
DIRECTIONS = {"diagonal": DIAGONAL, "cardinal": CARDINAL, "all": DIAGONAL + CARDINAL}
"""(down, right) in shifts: where each shifted view looks."""


@dataclass(frozen=True, kw_only=True)
class SPTConfig:
    """The variants of shifted patch tokenization; the defaults are the paper's."""

    directions: Literal["diagonal", "cardinal", "all"] = "diagonal"
    """Four diagonal views beside the image itself, four cardinal ones, or all eight."""
    shift: float = 0.5
    """Distance of the views as a share of the patch, rounded down, at least one pixel."""
    norm: bool = True
    """Whether the views are normalised together before they are projected."""

    def __post_init__(self) -> None:
        if self.directions not in DIRECTIONS:
            raise ValueError(f"directions {self.directions!r}: expected one of {', '.join(DIRECTIONS)}")
        if not 0 < self.shift <= 1:
            raise ValueError(f"shift {self.shift}: expected a share of the patch above 0, at most 1")


@dataclass(frozen=True)
class Views:
    """Where the views of a patch lie in the window that holds them all."""

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
        """The image and its shifted views, zeros where they reach beyond it."""
        (s, t), (h, w) = self.shift, x.shape[2:]
        around = F.pad(x, (t, t, s, s))
        return torch.cat([x, *(around[:, :, top : top + h, left : left + w] for top, left in self.corners)], dim=1)

    def fold(self, kernels: Float[Tensor, "e v c p q"], centre: bool = True) -> Float[Tensor, "e c y z"]:
        """One kernel for the whole window: the views' kernels added up, each at its place.

        With `centre` the first is the image's own; without, there are only the shifted views'.
        """
        (p, q), (y, z) = self.patch_size, self.window
        views = kernels.unbind(dim=1)
        if centre and self.fills_window:
            *_, left_up, right_up, left_down, right_down = views
            shifted = torch.cat([torch.cat([left_up, right_up], 3), torch.cat([left_down, right_down], 3)], 2)
            (s, t) = self.shift
            return shifted + F.pad(views[0], (t, t, s, s))
        corners = [self.shift, *self.corners] if centre else self.corners
        return sum(
            F.pad(view, (left, z - q - left, top, y - p - top))
            for view, (top, left) in zip(views, corners, strict=True)
        )

    @property
    def fills_window(self) -> bool:
        """Whether the shifted views lie side by side and fill the window: half a patch, diagonally."""
        (p, q), (s, t) = self.patch_size, self.shift
        return self.config.directions == "diagonal" and (p, q) == (2 * s, 2 * t)


@register_notrace_module
class ShiftedPatchTokenization(nn.Module):
    """Images (b, c, h, w) to patch tokens (b, e, i, j): a drop-in for a patch embedding's convolution.

    `in_chans` c, `dim` e, `patch_size` p or (p, q) in pixels. Patches lie side by side unless `stride` says else;
    `padding` adds zeros around the image. Pixels that fill no whole patch at the right and bottom make no token of
    their own, as with a convolution, unless `ceil_mode` has them padded. `features`: the input is no image but
    a feature map.

    Source: arXiv:2112.13492, §3.2.
    """

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
        """The paper's initial values: Xavier-normal weights, zero bias."""
        if self.config.norm:
            self.norm.reset_parameters()
        nn.init.xavier_normal_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    @property
    def views(self) -> Views:
        """Where the views lie."""
        return Views(self.patch_size, self.config)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e i j"]:
        x = self._padded(x)
        if not self.config.norm:
            return F.conv2d(x, self.views.fold(self._kernels(self.proj.weight)), self.proj.bias, self.stride)
        with torch.autocast(x.device.type, enabled=False):
            kernels, bias = self._folded()
        if self.features:
            return self._project_map(at_least_fp32(x), kernels, bias)
        with torch.autocast(x.device.type, enabled=False):
            normal = self._normalised_windows(at_least_fp32(x))
        dtype = self.proj.weight.dtype
        tokens = F.linear(normal.to(dtype), kernels.flatten(1).to(dtype), bias.to(dtype))
        return rearrange(tokens, "b i j e -> b e i j")

    def _padded(self, x: Float[Tensor, "b c h w"]) -> Tensor:
        """The image with zeros where windows reach beyond it."""
        (s, t), (y, z), (p, q) = self.views.shift, self.padding, self.patch_size
        bottom = (p - 2 * y - x.shape[2]) % self.stride[0] if self.ceil_mode else 0
        right = (q - 2 * z - x.shape[3]) % self.stride[1] if self.ceil_mode else 0
        s, t = s + y, t + z
        return F.pad(x, (t, t + right, s, s + bottom))

    def _kernels(self, weight: Tensor) -> Float[Tensor, "e v c p q"]:
        p, q = self.patch_size
        return rearrange(weight, "e (v c p q) -> e v c p q", c=self.in_channels, p=p, q=q)

    def _share(self, like: Tensor) -> Float[Tensor, "c y z"]:
        """How much of the views' values each pixel of a window makes up."""
        ones = self._kernels(like.new_ones(1, self.proj.in_features))
        return self.views.fold(ones)[0] / self.proj.in_features

    def _windows(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b i j cyz"]:
        """What each token sees of a padded image."""
        y, z = self.views.window
        windows = x.unfold(2, y, self.stride[0]).unfold(3, z, self.stride[1])
        return rearrange(windows, "b c i j y z -> b i j (c y z)")

    def _normalised_windows(self, x: Tensor) -> Float[Tensor, "b i j cyz"]:
        """What each token sees, with the mean and variance of its views removed."""
        windows, share = self._windows(x), self._share(x).flatten()
        centred = windows - (windows * share).sum(dim=-1, keepdim=True)
        variance = (centred.square() * share).sum(dim=-1, keepdim=True)
        return centred * (variance + self.norm.eps).rsqrt()

    def _project_map(
        self, x: Tensor, kernels: Float[Tensor, "e c y z"], bias: Float[Tensor, " e"]
    ) -> Float[Tensor, "b e i j"]:
        """Tokens of a feature map, whose windows are not cut."""
        level = x.mean(dim=1, keepdim=True)
        detail = x - level
        dtype = self.proj.weight.dtype
        product = F.conv2d(detail.to(dtype), kernels.to(dtype), stride=self.stride)
        with torch.autocast(x.device.type, enabled=False):
            share = self._share(x).sum(dim=0)
            levels = self._windows(level)
            levels = levels - (levels @ share.flatten())[..., None]
            variance = F.conv2d(detail.square().mean(dim=1, keepdim=True), share[None, None], stride=self.stride)
            variance = variance + (levels.square() @ share.flatten())[:, None]
            levels = rearrange(F.linear(levels, kernels.sum(dim=1).flatten(1)), "b i j e -> b e i j")
            tokens = (product + levels) * (variance + self.norm.eps).rsqrt() + bias[:, None, None]
        return tokens.to(product.dtype)

    def _folded(self) -> tuple[Float[Tensor, "e c y z"], Float[Tensor, " e"]]:
        """Projection of a normalised window: the views' weights added up, LayerNorm's gain and bias within."""
        weight, gain, bias, offset = map(
            at_least_fp32, (self.proj.weight, self.norm.weight, self.proj.bias, self.norm.bias)
        )
        return self.views.fold(self._kernels(weight * gain)), bias + weight @ offset


def at_least_fp32(x: Tensor) -> Tensor:
    """The tensor in fp32, or as it is if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@register_notrace_module
class ShiftedPatchMerging(ShiftedPatchTokenization):
    """Feature maps (b, h, w, c) to (b, ⌈h/2⌉, ⌈w/2⌉, e): SPT with patches of 2 in place of Swin's patch merging.

    Source: arXiv:2112.13492, §3.2 and the official code.
    """

    def __init__(self, in_chans: int, dim: int, config: SPTConfig | None = None) -> None:
        super().__init__(in_chans, dim, 2, ceil_mode=True, features=True, config=config)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j e"]:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
