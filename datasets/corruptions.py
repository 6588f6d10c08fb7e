"""Common corruptions of images at three strengths, in batches, drawn anew from keys: the same on every device.

In kind those of Hendrycks and Dietterich 2019 (arXiv:1903.12261): noise, blur, contrast, jpeg. Strengths are our own,
since theirs are made for images of 224 or 32 pixels: a blur's width grows with the image here.

Axes: b batch, c channels, h w pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from smallvit.datasets.noise import normal_noise

STRENGTHS = (1, 2, 3)
Pixels = UInt8[Tensor, "b c h w"]


def add_noise(pixels: Pixels, deviation: float, keys: Int64[Tensor, " b"]) -> Pixels:
    """Normal noise on every value, its standard deviation a share of the range from black to white."""
    noise = normal_noise(keys, pixels[0].numel()).view(pixels.shape)
    return _levels(pixels + 255 * deviation * noise)


def blur(pixels: Pixels, width: float, keys: Int64[Tensor, " b"]) -> Pixels:
    """Means by a Gaussian whose standard deviation is a share of the image's side; it is mirrored at its borders."""
    images = pixels.float()
    for axis in (2, 3):
        images = _smoothed(images, width * pixels.shape[3], axis)
    return _levels(images)


def fade(pixels: Pixels, share: float, keys: Int64[Tensor, " b"]) -> Pixels:
    """Less contrast: this share of every value's distance from its channel's mean in the image is left."""
    images = pixels.float()
    mean = images.mean(dim=(2, 3), keepdim=True)
    return _levels(mean + share * (images - mean))


def compress(pixels: Pixels, quality: int, keys: Int64[Tensor, " b"]) -> Pixels:
    """To JPEG of this quality and back, by Pillow."""
    images = pixels.cpu().permute(0, 2, 3, 1).squeeze(-1).numpy()
    back = np.stack([_recoded(image, quality) for image in images])
    return torch.from_numpy(back).view(len(pixels), *pixels.shape[2:], -1).permute(0, 3, 1, 2).to(pixels.device)


CORRUPTIONS: dict[str, tuple[Callable[[Pixels, float, Tensor], Pixels], tuple[float, ...]]] = {
    "noise": (add_noise, (0.04, 0.08, 0.16)),
    "blur": (blur, (0.015, 0.03, 0.06)),
    "contrast": (fade, (0.5, 0.3, 0.15)),
    "jpeg": (compress, (50, 25, 10)),
}
"""Of each kind its function, and what that takes at each of the three strengths."""


def corrupt(pixels: Pixels, kind: str, strength: int, keys: Int64[Tensor, " b"]) -> Pixels:
    """Images with one kind of corruption at a strength of 1, 2 or 3; what is random follows from each image's key."""
    function, values = CORRUPTIONS[kind]
    return function(pixels, values[strength - 1], keys)


def _levels(images: Float[Tensor, "b c h w"]) -> Pixels:
    return images.round().clamp(0, 255).byte()


def _smoothed(images: Float[Tensor, "b c h w"], sigma: float, axis: int) -> Float[Tensor, "b c h w"]:
    """Along an axis the mean with weights of a Gaussian, cut off at four standard deviations or the image's side."""
    side = images.shape[axis]
    reach = min(max(1, round(4 * sigma)), side - 1)
    places = torch.arange(-reach, reach + 1, device=images.device)
    weights = (-places.square() / (2 * sigma**2)).exp()
    mirrored = (torch.arange(-reach, side + reach, device=images.device) % (2 * side)).to(torch.int64)
    mirrored = torch.minimum(mirrored, 2 * side - 1 - mirrored)
    padded = images.index_select(axis, mirrored).movedim(axis, -1)
    kernel = (weights / weights.sum())[None, None]
    smooth = F.conv1d(padded.reshape(-1, 1, padded.shape[-1]), kernel)
    return smooth.view(*padded.shape[:-1], side).movedim(-1, axis)


def _recoded(image: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))
