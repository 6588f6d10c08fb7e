"""Apply image operations to a batch, each image with its own strength; equal to torchvision's image by image.

    tables      the new level of a pixel depends on its gray level: a table of 256 entries per image and channel
    blends      a mix of the image with a gray or smoothed version of itself
    geometry    affine maps: of the nearest pixel as in torchvision, or bicubic as in Pillow
    corruptions noise, blur, low contrast and JPEG artifacts, to evaluate robustness with

Strengths are torchvision's: brightness, contrast, saturation and sharpness are factors, with 1 the image itself;
posterize is the number of bits kept, solarize the gray level from which on the image is inverted.

Axes: b batch, c channels, h w pixels, n = h·w.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from smallvit.datasets.upload import upload

GRAY_WEIGHTS = (0.2989, 0.587, 0.114)
"""Shares of red, green and blue in the gray level, as in torchvision."""
BLUR_RADIUS = 8
"""Maximum half width of the Gaussian kernel in pixels: four standard deviations of 2."""


def brightness(levels: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Multiply gray levels by a factor."""
    return levels * factor[:, None]


def posterize(levels: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Keep only the highest bits (0 to 8) of each gray level."""
    step = np.ldexp(np.float32(1), 8 - bits[:, None].astype(np.int64))
    return np.floor(levels / step) * step


def solarize(levels: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """Invert gray levels from the threshold on."""
    return np.where(levels >= threshold[:, None], 255 - levels, levels)


def solarize_add(levels: np.ndarray, addition: np.ndarray) -> np.ndarray:
    """Increase gray levels below 128."""
    return np.where(levels < 128, levels + np.floor(addition[:, None]), levels)


def invert(levels: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Invert gray levels."""
    return np.tile(255 - levels, (len(strength), 1))


def contrast(levels: Tensor, factor: Tensor, images: Tensor) -> Tensor:
    """Scale the distance of the gray levels from the image's mean by a factor."""
    factor = factor[:, None, None]
    mean = to_gray(images).mean(dim=(1, 2, 3), keepdim=True)[:, 0]
    return levels * factor + mean * (1 - factor)


def autocontrast(levels: Tensor, _: Tensor, images: Tensor) -> Tensor:
    """Stretch each channel to the full range; a constant channel remains unchanged."""
    least, most = (extreme[..., None] for extreme in images.flatten(2).aminmax(dim=2))
    stretched = (levels - least) * 255 / (most - least).clamp(min=1)
    return torch.where(most > least, stretched, levels)


def equalize(levels: Tensor, _: Tensor, images: Tensor) -> Tensor:
    """Equalize each channel's histogram in integer arithmetic, as Pillow does."""
    b, c, h, w = images.shape
    pixels = images.flatten(2).long()
    counts = torch.zeros(b, c, 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, pixels, torch.ones_like(pixels))  # bincount would wait for the device
    before = counts.cumsum(-1) - counts  # pixels of lower levels: h·w beyond the brightest
    step = before.masked_fill(before == h * w, 0).amax(-1, keepdim=True) // 255
    table = (before + step // 2) // step.clamp(min=1)
    return torch.where(step > 0, table.float(), levels)


LEVEL_TABLES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "Brightness": brightness,
    "Invert": invert,
    "Posterize": posterize,
    "Solarize": solarize,
    "SolarizeAdd": solarize_add,
}
"""Map the gray levels (256) by a strength of each image to tables (b, 256), on the host."""
PIXEL_TABLES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "AutoContrast": autocontrast,
    "Contrast": contrast,
    "Equalize": equalize,
}
"""Map the gray levels (1 1 256) by a strength of each image, and its pixels, to tables (b, 1 or c, 256)."""
TABLES = (*LEVEL_TABLES, *PIXEL_TABLES)
"""Operations by tables, which are then clamped to 0 ... 255 and rounded down."""


def grayscale(x: Float[Tensor, "b c h w"], _: Tensor) -> Float[Tensor, "b 1 h w"]:
    """Return the gray levels."""
    return to_gray(x)


def smooth(x: Float[Tensor, "b c h w"], _: Tensor) -> Float[Tensor, "b c h w"]:
    """Return a smoothed version; border pixels remain unchanged."""
    if min(x.shape[-2:]) <= 2:
        return x
    across = x[..., :-2] + x[..., 1:-1] + x[..., 2:]
    sums = across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :]
    smoothed = x.clone()
    smoothed[..., 1:-1, 1:-1] = sums.add_(x[..., 1:-1, 1:-1], alpha=4).div_(13).round_()
    return smoothed


def blur(x: Float[Tensor, "b c h w"], sigma: Float[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
    """Blur with a Gaussian of standard deviation `sigma` in pixels, over at most 17 × 17 pixels, edges mirrored."""
    b, c, h, w = x.shape
    radius = min(BLUR_RADIUS, h - 1, w - 1)
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    x = F.pad(x, (radius,) * 4, mode="reflect").transpose(0, 1)  # one kernel per image for all channels
    x = F.conv2d(x, kernel[:, None, :, None], groups=b)
    return F.conv2d(x, kernel[:, None, None, :], groups=b).transpose(0, 1).round()


BLENDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Color": grayscale,
    "Sharpness": smooth,
    "Grayscale": grayscale,
    "GaussianBlur": blur,
}
"""Return the other image (b, 1 or c, h, w) that an image is blended with; arguments are the images and strengths."""
REPLACING = ("Grayscale", "GaussianBlur")
"""Operations of `BLENDS` that return the other image alone; the strengths of others are the image's own weight."""

OF_COLORS = ("Color", "Grayscale")
"""Operations that do nothing to images without colors, of 1, 2 or more than 3 channels."""

GEOMETRY: dict[str, Callable[[np.ndarray], tuple]] = {
    # rows of the map from a pixel's position in the result to its position in the image: x' = a·x + b·y + e, then y'
    # shears and translations are relative to the image's upper left corner, rotations to its center
    "ShearX": lambda m: ((1, m, 0), (0, 1, 0)),
    "ShearY": lambda m: ((1, 0, 0), (m, 1, 0)),
    "TranslateX": lambda m: ((1, 0, -m), (0, 1, 0)),
    "TranslateY": lambda m: ((1, 0, 0), (0, 1, -m)),
    "Rotate": lambda m: (
        (np.cos(np.deg2rad(m)), -np.sin(np.deg2rad(m)), 0),
        (np.sin(np.deg2rad(m)), np.cos(np.deg2rad(m)), 0),
    ),
}
FROM_CORNER = ("ShearX", "ShearY")


def affine_maps(
    name: str, strengths: Float[np.ndarray, " b"], h: int, w: int, *, whole_pixels: bool = True
) -> Float[np.ndarray, "b 2 3"]:
    """Return affine maps in pixels from the image's center: tangent for shears, pixels, degrees counter-clockwise.

    `whole_pixels` truncates translations, as torchvision does.
    """
    if whole_pixels and name.startswith("Translate"):
        strengths = np.trunc(strengths)
    rows = [[np.broadcast_to(value, strengths.shape) for value in row] for row in GEOMETRY[name](strengths)]
    maps = np.array(rows, dtype=np.float64).transpose(2, 0, 1).copy()
    if name in FROM_CORNER:
        corner = np.array([w / 2, h / 2])
        maps[:, :, 2] += maps[:, :, :2] @ corner - corner
    return maps


def map_positions(maps: Float[Tensor, "b 2 3"], h: int, w: int) -> tuple[Tensor, Tensor]:
    """Return the column and row (b h w) in the image of every pixel of the result."""
    x = torch.arange(-(w - 1) / 2, w / 2, device=maps.device)
    y = torch.arange(-(h - 1) / 2, h / 2, device=maps.device)
    of_x, of_y, start = maps[..., None, None].unbind(2)
    column, row = (of_x * x).add(of_y * y[:, None]).add_(start).unbind(1)
    return column, row


def warp(
    images: UInt8[Tensor, "b c h w"], maps: Float[Tensor, "b 2 3"], fill: int | UInt8[Tensor, "c 1 1"] = 0
) -> UInt8[Tensor, "b c h w"]:
    """Take every pixel from the nearest to its mapped position; `fill` pixels that are mapped outside.

    Maps give pixels from the image's upper left corner, of pixels from the result's center.
    """
    h, w = images.shape[-2:]
    column, row = (position.round_() for position in map_positions(maps, h, w))
    x, y = column.clamp(0, w - 1), row.clamp(0, h - 1)
    outside = ((x != column) | (y != row))[:, None]
    warped = gather_pixels(images, torch.add(x, y, alpha=w).long())
    return warped.masked_fill_(outside, fill) if isinstance(fill, int) else torch.where(outside, fill, warped)


def warp_bicubic(
    images: UInt8[Tensor, "b c h w"], maps: Float[Tensor, "b 2 3"], fill: int | UInt8[Tensor, "c 1 1"] = 0
) -> UInt8[Tensor, "b c h w"]:
    """Interpolate every pixel at its mapped position; `fill` pixels that are mapped outside. Maps are those of `warp`.

    Equals Pillow's `Image.transform(..., AFFINE, ..., BICUBIC)`: the cubic has a = -1, pixels beyond the edge repeat
    the edge, and results are truncated.
    """
    h, w = images.shape[-2:]
    column, row = map_positions(maps, h, w)
    inside = (column >= -0.5) & (column < w - 0.5) & (row >= -0.5) & (row < h - 0.5)
    left, top = column.floor(), row.floor()
    offsets = torch.arange(-1, 3, device=images.device)[:, None, None]
    columns = (left[:, None] + offsets).clamp_(0, w - 1).long()
    rows = (top[:, None] + offsets).clamp_(0, h - 1).long() * w
    across, down = (column - left)[:, None], (row - top)[:, None]
    lines = (
        cubic(*gather_pixels(images, start[:, None] + columns).float().unbind(2), d=across) for start in rows.unbind(1)
    )
    levels = cubic(*lines, d=down).clamp_(0, 255).byte()
    return torch.where(inside[:, None], levels, fill)


def cubic(p: Tensor, q: Tensor, r: Tensor, s: Tensor, *, d: Tensor) -> Tensor:
    """Interpolate between q and r, at a distance d from q, by Keys' cubic with a = -1, in Pillow's order of terms."""
    return q + d * (r - p + d * (2 * (p - q) + r - s + d * (q - p + s - r)))


def gather_pixels(images: UInt8[Tensor, "b c h w"], index: Int64[Tensor, "b ..."]) -> UInt8[Tensor, "b c ..."]:
    """Return pixels by their index in the flattened image, the same in all channels."""
    channels = images.shape[1]
    return images.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, channels, -1)).unflatten(2, index.shape[1:])


def look_up(images: UInt8[Tensor, "b c h w"], tables: UInt8[Tensor, "b c 256"]) -> UInt8[Tensor, "b c h w"]:
    """Replace each gray level by its entry in the table of the image and channel."""
    return tables.gather(2, images.flatten(2).long()).view(images.shape)


@dataclass(frozen=True)
class Operations:
    """One operation for each image of a batch, by kind: arrays, or after `upload` tensors."""

    warped: np.ndarray | Tensor
    """Images with a geometric operation."""
    maps: np.ndarray | Tensor
    """Their affine maps, for `warp`."""
    level_tables: np.ndarray | Tensor
    """Tables (n 1 256) that do not depend on pixels."""
    tables: dict[str, np.ndarray | Tensor]
    """Strengths of the images of each operation whose tables depend on pixels."""
    looked_up: np.ndarray | Tensor
    """Images of `level_tables` and of all `tables`, in their order."""
    blends: dict[str, np.ndarray | Tensor]
    """Strengths of the images of each operation."""
    blended: np.ndarray | Tensor
    """Images of all `blends`, in their order."""
    weights: np.ndarray | Tensor
    """Their own weights in the blends."""


def plan_operations(
    names: Sequence[str] | np.ndarray, strengths: Float[np.ndarray, " b"], c: int, h: int, w: int, *, bicubic: bool
) -> Operations:
    """Group the images of a batch by their operation; arguments are those of `apply_operations`."""
    which, strengths = np.asarray(names), np.asarray(strengths)
    which = which if c == 3 else np.where(np.isin(which, OF_COLORS), "Identity", which)
    chosen = {name: np.flatnonzero(which == name) for name in dict.fromkeys(which.tolist())}
    geometric = [name for name in chosen if name in GEOMETRY]
    maps = [affine_maps(name, strengths[chosen[name]], h, w, whole_pixels=not bicubic) for name in geometric]
    own = {name: strengths[indices].astype(np.float32) for name, indices in chosen.items()}
    fixed, tables, blends = (
        {name: own[name] for name in chosen if name in kind} for kind in (LEVEL_TABLES, PIXEL_TABLES, BLENDS)
    )
    levels, none = np.arange(256, dtype=np.float32), np.zeros(0, dtype=np.int64)
    level_tables = [LEVEL_TABLES[name](levels, values) for name, values in fixed.items()]
    weights = [values * (name not in REPLACING) for name, values in blends.items()]
    maps = np.concatenate([np.zeros((0, 2, 3)), *maps]).astype(np.float32)
    maps[:, :, 2] += np.array([(w - 1) / 2, (h - 1) / 2], dtype=np.float32)
    return Operations(
        warped=np.concatenate([none, *(chosen[name] for name in geometric)]),
        maps=maps,
        level_tables=np.concatenate([np.zeros((0, 256)), *level_tables]).clip(0, 255).astype(np.uint8)[:, None],
        tables=tables,
        looked_up=np.concatenate([none, *(chosen[name] for name in fixed | tables)]),
        blends=blends,
        blended=np.concatenate([none, *(chosen[name] for name in blends)]),
        weights=np.concatenate([np.zeros(0, np.float32), *weights])[:, None, None, None],
    )


def apply_operations(
    images: UInt8[Tensor, "b c h w"],
    names: Sequence[str] | np.ndarray,
    strengths: Float[np.ndarray, " b"],
    fill: int | UInt8[Tensor, "c 1 1"] = 0,
    *,
    bicubic: bool = False,
) -> UInt8[Tensor, "b c h w"]:
    """Apply one operation to each image, in place, and return the images.

    Each operation runs once, on all images that have drawn it.

    Args:
        names: Operation of each image: 'Identity', or one of `TABLES`, `BLENDS` and `GEOMETRY`.
        fill: Gray level of pixels from outside of the image, or that of each channel.
        bicubic: Whether geometry interpolates as Pillow does and translates by fractions of pixels.
    """
    planned = plan_operations(names, strengths, *images.shape[1:], bicubic=bicubic)
    return run_operations(images, upload(planned, images.device), fill, bicubic=bicubic)


def run_operations(
    images: UInt8[Tensor, "b c h w"],
    operations: Operations,
    fill: int | UInt8[Tensor, "c 1 1"] = 0,
    *,
    bicubic: bool = False,
) -> UInt8[Tensor, "b c h w"]:
    """Apply planned operations, whose tensors are on the device of the images, in place, and return the images."""
    if len(operations.warped):
        warp_images = warp_bicubic if bicubic else warp
        images[operations.warped] = warp_images(images[operations.warped], operations.maps, fill)
    if len(operations.looked_up):
        chosen, fixed = images[operations.looked_up], operations.level_tables
        table = fixed.expand(-1, images.shape[1], -1)
        if operations.tables:
            levels = torch.arange(256, dtype=torch.float32, device=images.device)[None, None]
            parts = chosen[len(fixed) :].split([len(strengths) for strengths in operations.tables.values()])
            tables = [
                PIXEL_TABLES[name](levels, strengths, part).expand(-1, images.shape[1], -1)
                for (name, strengths), part in zip(operations.tables.items(), parts, strict=True)
            ]
            table = torch.cat([table, torch.cat(tables).clamp_(0, 255).byte()])
        images[operations.looked_up] = look_up(chosen, table)
    if operations.blends:
        x = images[operations.blended].float()
        parts = x.split([len(strengths) for strengths in operations.blends.values()])
        others = [
            BLENDS[name](part, strengths).expand_as(part)
            for (name, strengths), part in zip(operations.blends.items(), parts, strict=True)
        ]
        images[operations.blended] = torch.lerp(torch.cat(others), x, operations.weights).clamp_(0, 255).byte()
    return images


def resize_weights(
    start: Float[Tensor, " b"], length: Float[Tensor, " b"], into: int, of: int, *, bicubic: bool = False
) -> Float[Tensor, "b into of"]:
    """Return weights that resize the pixels [start, start + length) of `of` to `into`, antialiased.

    Bilinear, or bicubic with Keys' cubic of a = -0.5, as in Pillow and torchvision.
    """
    scale = (length / into)[:, None, None]
    reach = scale.clamp(min=1)
    center = (torch.arange(into, device=start.device)[:, None] + 0.5) * scale
    pixel = torch.arange(of, device=start.device) - start[:, None, None]
    distance = (pixel + 0.5 - center).abs() / reach
    weights = _keys(distance) if bicubic else (1 - distance).clamp(min=0)
    weights = weights * ((pixel >= 0) & (pixel < length[:, None, None]))
    return weights / weights.sum(-1, keepdim=True)


def resized_crop(
    images: UInt8[Tensor, "b c h w"],
    top: Tensor,
    left: Tensor,
    height: Tensor,
    width: Tensor,
    *,
    size: tuple[int, int] | None = None,
    bicubic: bool = False,
) -> UInt8[Tensor, "b c y x"]:
    """Crop a rectangle of each image and resize it to `size`, or the image's size, bilinear or bicubic."""
    (h, w), (y, z) = images.shape[-2:], size or images.shape[-2:]
    rows = resize_weights(top.float(), height.float(), y, h, bicubic=bicubic)
    columns = resize_weights(left.float(), width.float(), z, w, bicubic=bicubic)
    x = (images.float().flatten(1, 2) @ columns.mT).unflatten(1, images.shape[1:3])
    if bicubic:  # a cubic overshoots: Pillow rounds and clips after each direction
        x = x.round_().clamp_(0, 255)
    x = rows @ x.transpose(1, 2).flatten(2)  # one product for all channels: weights are not copied for each
    return x.unflatten(2, (images.shape[1], z)).transpose(1, 2).round_().clamp_(0, 255).byte()


def _keys(distance: Tensor) -> Tensor:
    """Return Keys' cubic with a = -0.5 at distances of 0 and more."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def to_gray(images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
    """Return gray levels, rounded down as in torchvision; of images without colors the mean over the channels."""
    if images.shape[1] != 3:
        return images.float().mean(dim=1, keepdim=True)
    red, green, blue = images.unbind(1)
    r, g, b = GRAY_WEIGHTS  # numbers: a tensor would wait for the device
    return (r * red + g * green + b * blue).floor_()[:, None]


STRENGTHS = (1, 2, 3)
CORRUPTIONS: dict[str, tuple[float, float, float]] = {
    "noise": (0.04, 0.08, 0.16),  # standard deviation, as a share of the range from black to white
    "blur": (0.015, 0.03, 0.06),  # standard deviation of the Gaussian, as a share of the image's side
    "contrast": (0.5, 0.3, 0.15),  # factor of the distance from the mean gray level
    "jpeg": (50, 25, 10),  # quality
}
"""Corruptions to evaluate robustness with, and their parameter at each strength.

The kinds are from Hendrycks and Dietterich 2019 (arXiv:1903.12261). The strengths are our own, since theirs are for
images of 224 or 32 pixels.
"""


def corrupt(
    images: UInt8[Tensor, "b c h w"], kind: str, strength: int, keys: Int64[Tensor, " b"]
) -> UInt8[Tensor, "b c h w"]:
    """Corrupt images at strength 1, 2 or 3; random numbers follow from each image's key, the same on every device."""
    value = CORRUPTIONS[kind][strength - 1]
    if kind == "noise":
        noise = normal_noise(keys, images[0].numel()).view(images.shape)
        return (images + 255 * value * noise).round().clamp(0, 255).byte()
    if kind == "blur":
        side = images.shape[-1]
        radius = min(max(1, round(4 * value * side)), side - 1)
        return V.gaussian_blur(images, [2 * radius + 1] * 2, [value * side] * 2)
    if kind == "contrast":
        pixels = images if images.shape[1] in (1, 3) else images.flatten(1, 2)[:, None]  # torchvision takes no others
        return (255 * V.adjust_contrast(pixels / 255, value)).round().byte().view_as(images)
    return torch.stack([_recode_jpeg(image, int(value)) for image in images.cpu()]).to(images.device)


def _recode_jpeg(image: UInt8[Tensor, "c h w"], quality: int) -> UInt8[Tensor, "c h w"]:
    if len(image) not in (1, 3):
        return torch.cat([_recode_jpeg(channel[None], quality) for channel in image])
    file = io.BytesIO()
    V.to_pil_image(image).save(file, "JPEG", quality=quality)
    return V.pil_to_tensor(Image.open(file))


def normal_noise(keys: Int64[Tensor, " b"], n: int) -> Float[Tensor, "b n"]:
    """Return n standard normal values for each key, the same on every device (splitmix64 and Box-Muller)."""
    half = -(-n // 2)
    bits = _hash(keys[:, None] + torch.arange(1, half + 1, device=keys.device) * _signed(0x9E3779B97F4A7C15))
    radius = (-2 * ((_shift(bits, 40) + 1).float() * 2.0**-24).log()).sqrt()  # of (0, 1]
    angle = (bits & 0xFFFFFF).float() * (2 * math.pi * 2.0**-24)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :n]


def _hash(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift right with zeros, as for unsigned integers."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64)
