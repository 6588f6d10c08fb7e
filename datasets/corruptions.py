"""Corrupt batches of images: noise, blur, low contrast and JPEG artifacts at three strengths.

The kinds are from Hendrycks and Dietterich 2019 (arXiv:1903.12261). The strengths are our own, since theirs are for
images of 224 or 32 pixels: the width of the blur grows with the image here.

Axes: b batch, c channels, h w pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from smallvit.datasets.functional import normal_noise

STRENGTHS = (1, 2, 3)
Pixels = UInt8[Tensor, "b c h w"]


def add_noise(pixels: Pixels, std: float, keys: Int64[Tensor, " b"]) -> Pixels:
    """Add normal noise; `std` is a share of the range from black to white."""
    noise = normal_noise(keys, pixels[0].numel()).view(pixels.shape)
    return (pixels + 255 * std * noise).round().clamp(0, 255).byte()


def blur(pixels: Pixels, width: float, keys: Int64[Tensor, " b"]) -> Pixels:
    """Blur with a Gaussian; its standard deviation is `width` times the image's side."""
    side = pixels.shape[-1]
    radius = min(max(1, round(4 * width * side)), side - 1)
    return F.gaussian_blur(pixels, [2 * radius + 1] * 2, [width * side] * 2)


def reduce_contrast(pixels: Pixels, factor: float, keys: Int64[Tensor, " b"]) -> Pixels:
    """Scale the distance of all values from the image's mean gray level."""
    return (255 * F.adjust_contrast(pixels / 255, factor)).round().byte()


def compress(pixels: Pixels, quality: int, keys: Int64[Tensor, " b"]) -> Pixels:
    """Encode as JPEG and decode again."""
    recoded = []
    for image in pixels.cpu():
        file = io.BytesIO()
        F.to_pil_image(image).save(file, "JPEG", quality=quality)
        recoded.append(F.pil_to_tensor(Image.open(file)))
    return torch.stack(recoded).to(pixels.device)


CORRUPTIONS: dict[str, tuple[Callable[[Pixels, float, Tensor], Pixels], tuple[float, ...]]] = {
    "noise": (add_noise, (0.04, 0.08, 0.16)),
    "blur": (blur, (0.015, 0.03, 0.06)),
    "contrast": (reduce_contrast, (0.5, 0.3, 0.15)),
    "jpeg": (compress, (50, 25, 10)),
}
"""Function of each kind, with its argument at each of the three strengths."""


def corrupt(pixels: Pixels, kind: str, strength: int, keys: Int64[Tensor, " b"]) -> Pixels:
    """Corrupt images at strength 1, 2 or 3; random numbers follow from each image's key, the same on every device."""
    function, values = CORRUPTIONS[kind]
    return function(pixels, values[strength - 1], keys)
