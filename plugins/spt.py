"""Shifted patch tokenization (SPT): each token sees its patch and the image shifted by half a patch four ways.

    SPT(x) = LayerNorm(P([x s¹ s² s³ s⁴])) E,    P cuts patches, sᵏ = x shifted diagonally by half a patch

Source: Lee, Lee, Song 2021, "Vision Transformer for Small-Size Datasets", arXiv:2112.13492, §3.2: four diagonal
shifts in the order left-up, right-up, left-down, right-down, zero padding, LayerNorm over 5·C·p·q values, Linear.

A patch lies with its shifted copies in one window of (p + 2s) × (q + 2t) pixels, of which the five views repeat the
inner ones. So windows are cut once (4/5 of the values of the five views at even patches), normalised in fp32 with
every pixel weighted by how often it occurs, and projected by one matrix product, whose weights are the five views'
added up at their places, with LayerNorm's gain and bias folded in. The result is the equation's, and low contrast
costs no precision: what reaches the product, in bf16 too, is already normalised.

Differs from the official code: a shift is at least one pixel, so that patches of size 1 see their neighbours
(half of 1, rounded down, would be five identical copies); and features are ordered view, channel, row, column.

Axes: b batch, v the five views, c channels, h w image, p q patch height and width, i j patch grid, e token width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

VIEWS = 5


def half_patch(patch_size: tuple[int, int]) -> tuple[int, int]:
    """Pixels to shift by, down and right: half the patch, rounded down, at least 1."""
    return max(1, patch_size[0] // 2), max(1, patch_size[1] // 2)


def view_corners(shift: tuple[int, int]) -> list[tuple[int, int]]:
    """(row, column) at which each view's patch begins in its window: the image itself, then the four shifts."""
    s, t = shift
    return [(s, t), (0, 0), (0, 2 * t), (2 * s, 0), (2 * s, 2 * t)]


def fold_views(kernels: Float[Tensor, "e v c p q"], shift: tuple[int, int]) -> Float[Tensor, "e c window_h window_w"]:
    """One kernel for the window of all five views: their kernels added up, each at its place."""
    p, q = kernels.shape[-2:]
    s, t = shift
    return torch.stack(
        [
            F.pad(kernels[:, view], (left, 2 * t - left, top, 2 * s - top))
            for view, (top, left) in enumerate(view_corners(shift))
        ]
    ).sum(dim=0)


class ShiftedPatchTokenization(nn.Module):
    """Images (b, c, h, w) to patch tokens (b, e, h/p, w/q): a drop-in for a patch embedding's convolution.

    `in_chans` c, `dim` e, `patch_size` p or (p, q) in pixels. Pixels that fill no whole patch at the right and
    bottom make no token of their own, as with a convolution.

    Source: arXiv:2112.13492, §3.2.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int | tuple[int, int]) -> None:
        super().__init__()
        p, q = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        self.in_channels, self.out_channels = in_chans, dim
        self.patch_size = (p, q)
        self.norm = nn.LayerNorm(VIEWS * in_chans * p * q)
        self.proj = nn.Linear(VIEWS * in_chans * p * q, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's initial values: Xavier-normal weights, zero bias."""
        self.norm.reset_parameters()
        nn.init.xavier_normal_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    @property
    def window(self) -> tuple[int, int]:
        """Height and width in pixels of what one token sees."""
        shift = half_patch(self.patch_size)
        return self.patch_size[0] + 2 * shift[0], self.patch_size[1] + 2 * shift[1]

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e i j"]:
        with torch.autocast(x.device.type, enabled=False):
            normal = self._normalised_windows(x.float())
            weight, bias = self._folded()
        dtype = self.proj.weight.dtype
        tokens = F.linear(normal.to(dtype), weight.to(dtype), bias.to(dtype))
        return rearrange(tokens, "b i j e -> b e i j")

    def _normalised_windows(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b i j cyx"]:
        """What each token sees, with the mean and variance of its five views removed."""
        (s, t), (p, q), (y, z) = half_patch(self.patch_size), self.patch_size, self.window
        windows = F.pad(x, (t, t, s, s)).unfold(2, y, p).unfold(3, z, q)
        windows = rearrange(windows, "b c i j y z -> b i j (c y z)")
        ones = x.new_ones(1, VIEWS, self.in_channels, p, q)
        share = fold_views(ones, (s, t)).flatten() / self.norm.weight.numel()  # of each pixel in the five views
        centred = windows - (windows * share).sum(dim=-1, keepdim=True)
        variance = (centred.square() * share).sum(dim=-1, keepdim=True)
        return centred * (variance + self.norm.eps).rsqrt()

    def _folded(self) -> tuple[Float[Tensor, "e cyx"], Float[Tensor, " e"]]:
        """Projection of a normalised window: the views' weights added up, LayerNorm's gain and bias within."""
        weight = self.proj.weight.float()
        p, q = self.patch_size
        gained = rearrange(weight * self.norm.weight.float(), "e (v c p q) -> e v c p q", v=VIEWS, p=p, q=q)
        folded = fold_views(gained, half_patch(self.patch_size)).flatten(1)
        return folded, self.proj.bias.float() + weight @ self.norm.bias.float()

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> ShiftedPatchTokenization:
        """A fresh layer of a patchify convolution's channels, width, patch, device and dtype.

        Raises:
            ValueError: the convolution's patches overlap, are dilated, padded or grouped.
        """
        plain = conv.padding == (0, 0) and conv.dilation == (1, 1) and conv.groups == 1
        if conv.kernel_size != conv.stride or not plain:
            raise ValueError(f"shifted patch tokenization replaces convolutions that cut patches, not {conv}")
        spt = cls(conv.in_channels, conv.out_channels, conv.kernel_size)
        return spt.to(conv.weight.device, conv.weight.dtype).train(conv.training)
