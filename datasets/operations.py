"""Image operations on a batch, each image with a strength of its own, equal to torchvision's one by one.

    tables      what happens to a pixel depends on its own grey level: a table of 256 entries per image and channel
    blends      a mix of the image with a grey or smoothed version of itself
    geometry    every pixel is fetched from another place, the nearest one (an affine map)

Strengths are torchvision's: brightness, contrast, saturation and sharpness are factors, 1 the image itself;
posterize is the bits kept, solarize the grey level from which on the image is inverted.

Axes: b batch, c channels, h w pixels, n = h·w.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

GREY_WEIGHTS = (0.2989, 0.587, 0.114)
"""Shares of red, green and blue in the grey level, as torchvision has them."""
BLUR_RADIUS = 8
"""Half the width of the Gaussian's kernel in pixels, at most: four standard deviations of 2."""


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Grey levels times a factor."""
    return _levels(images) * factor[:, None, None]


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Distance of the grey levels from the image's mean, times a factor."""
    factor = factor[:, None, None]
    mean = grey(images).mean(dim=(1, 2, 3), keepdim=True)[:, 0]
    return _levels(images) * factor + mean * (1 - factor)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Only the highest bits of each grey level; bits 0 to 8."""
    step = 2.0 ** (8 - bits[:, None, None].floor())
    return (_levels(images) / step).floor() * step


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Grey levels from the threshold on are inverted."""
    levels = _levels(images)
    return torch.where(levels >= threshold[:, None, None], 255 - levels, levels)


def solarize_add(images: Tensor, addition: Tensor) -> Tensor:
    """Grey levels below 128 are raised."""
    levels = _levels(images)
    return torch.where(levels < 128, levels + addition[:, None, None].floor(), levels)


def invert(images: Tensor, _: Tensor) -> Tensor:
    """The negative."""
    return (255 - _levels(images)).expand(len(images), -1, -1)


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Each channel stretched to the whole range; a constant one stays."""
    pixels = images.flatten(2)
    least, most = (extreme.float()[..., None] for extreme in (pixels.amin(2), pixels.amax(2)))
    stretched = (_levels(images) - least) * 255 / (most - least).clamp(min=1)
    return torch.where(most > least, stretched, _levels(images))


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Each channel's histogram made flat, in whole numbers as Pillow does."""
    b, c, h, w = images.shape
    levels = images.flatten(2).long()
    counts = torch.zeros(b, c, 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, levels, torch.ones_like(levels))  # bincount would wait for the device
    brightest = torch.where(counts > 0, torch.arange(256, device=images.device), -1).amax(-1, keepdim=True)
    step = (h * w - counts.gather(-1, brightest)) // 255
    before = counts.cumsum(-1) - counts
    table = (before + step // 2) // step.clamp(min=1)
    return torch.where(step > 0, table.float(), _levels(images))


Operation = Callable[[Tensor, Tensor], Tensor]
"""Of a batch of images and a strength for each."""
TABLES: dict[str, Operation] = {  # these give tables (b, #c, 256), to be clamped to 0 ... 255 and rounded down
    "AutoContrast": autocontrast,
    "Brightness": brightness,
    "Contrast": contrast,
    "Equalize": equalize,
    "Invert": invert,
    "Posterize": posterize,
    "Solarize": solarize,
    "SolarizeAdd": solarize_add,
}


def saturation(images: UInt8[Tensor, "b c h w"], factor: Float[Tensor, " b"]) -> UInt8[Tensor, "b c h w"]:
    """Distance of the colours from grey, times a factor."""
    return _blend(images, grey(images), factor)


def sharpness(images: UInt8[Tensor, "b c h w"], factor: Float[Tensor, " b"]) -> UInt8[Tensor, "b c h w"]:
    """Distance from a smoothed version, times a factor; the outermost pixels stay."""
    if min(images.shape[-2:]) <= 2:
        return images
    x = images.float()
    middle = x[..., 1:-1, 1:-1]
    across = x[..., :-2] + x[..., 1:-1] + x[..., 2:]
    smooth = x.clone()
    smooth[..., 1:-1, 1:-1] = (
        (across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :] + 4 * middle) / 13
    ).round()
    return _blend(images, smooth, factor)


def greyscale(images: UInt8[Tensor, "b c h w"], _: Tensor) -> UInt8[Tensor, "b c h w"]:
    """All channels the grey level."""
    return grey(images).expand_as(images).byte()


def blur(images: UInt8[Tensor, "b c h w"], sigma: Float[Tensor, " b"]) -> UInt8[Tensor, "b c h w"]:
    """A Gaussian of this standard deviation in pixels, over 17 × 17 pixels (less in small images), edges mirrored."""
    b, c, h, w = images.shape
    radius = min(BLUR_RADIUS, h - 1, w - 1)
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    x = F.pad(images.float(), (radius,) * 4, mode="reflect").transpose(0, 1)  # an image's kernel serves its channels
    x = F.conv2d(x, kernel[:, None, :, None], groups=b)
    return F.conv2d(x, kernel[:, None, None, :], groups=b).transpose(0, 1).round().byte()


BLENDS: dict[str, Operation] = {
    "Color": saturation,
    "Sharpness": sharpness,
    "Grayscale": greyscale,
    "GaussianBlur": blur,
}

GEOMETRY: dict[str, Callable[[np.ndarray], tuple]] = {
    # rows of the map from a pixel's place in the result to its place in the image: x' = a·x + b·y + e, then y'
    # shears and translations start at the image's upper left corner, rotations at its centre
    "ShearX": lambda m: ((1, m, 0), (0, 1, 0)),
    "ShearY": lambda m: ((1, 0, 0), (m, 1, 0)),
    "TranslateX": lambda m: ((1, 0, -np.trunc(m)), (0, 1, 0)),
    "TranslateY": lambda m: ((1, 0, 0), (0, 1, -np.trunc(m))),
    "Rotate": lambda m: (
        (np.cos(np.deg2rad(m)), -np.sin(np.deg2rad(m)), 0),
        (np.sin(np.deg2rad(m)), np.cos(np.deg2rad(m)), 0),
    ),
}
FROM_CORNER = ("ShearX", "ShearY")


def matrices(name: str, strengths: Float[np.ndarray, " b"], h: int, w: int) -> Float[np.ndarray, "b 2 3"]:
    """Affine maps in pixels from the image's centre: tangent for shears, pixels, degrees counter-clockwise."""
    rows = [[np.broadcast_to(value, strengths.shape) for value in row] for row in GEOMETRY[name](strengths)]
    maps = np.array(rows, dtype=np.float64).transpose(2, 0, 1).copy()
    if name in FROM_CORNER:
        corner = np.array([w / 2, h / 2])
        maps[:, :, 2] += maps[:, :, :2] @ corner - corner
    return maps


def warp(images: UInt8[Tensor, "b c h w"], maps: Float[Tensor, "b 2 3"], fill: int = 0) -> UInt8[Tensor, "b c h w"]:
    """Fetch every pixel from the nearest to its mapped place; `fill` where that is outside."""
    b, c, h, w = images.shape
    x = torch.arange(w, device=images.device) - (w - 1) / 2
    y = torch.arange(h, device=images.device) - (h - 1) / 2
    maps = maps.to(torch.float32)[..., None, None]
    column = (maps[:, 0, 0] * x + maps[:, 0, 1] * y[:, None] + (maps[:, 0, 2] + (w - 1) / 2)).round_()
    row = (maps[:, 1, 0] * x + maps[:, 1, 1] * y[:, None] + (maps[:, 1, 2] + (h - 1) / 2)).round_()
    valid = (column >= 0) & (column < w) & (row >= 0) & (row < h)
    place = torch.where(valid, row * w + column, h * w).long()  # one more pixel, of the fill's colour
    return fetch(F.pad(images.flatten(2), (0, 1), value=fill), place)


def fetch(pixels: UInt8[Tensor, "b c ..."], place: Int64[Tensor, "b h w"]) -> UInt8[Tensor, "b c h w"]:
    """Pixels by their places in the flattened image, the same in all channels."""
    channels = pixels.shape[1]
    return pixels.flatten(2).gather(2, place.flatten(1)[:, None].expand(-1, channels, -1)).unflatten(2, place.shape[1:])


def look_up(images: UInt8[Tensor, "b c h w"], tables: UInt8[Tensor, "b c 256"]) -> UInt8[Tensor, "b c h w"]:
    """Replace each grey level by its entry in the image's and channel's table."""
    return tables.gather(2, images.flatten(2).long()).view(images.shape)


def cut_out(
    images: UInt8[Tensor, "b c h w"], half: Tensor, place: Float[Tensor, "2 b"], fill: int
) -> UInt8[Tensor, "b c h w"]:
    """Lay a square of twice `half` pixels of the fill's colour around a place (shares of height and width)."""
    h, w = images.shape[-2:]
    rows, columns = torch.arange(h, device=images.device), torch.arange(w, device=images.device)
    row, column = (place[0] * h).floor()[:, None], (place[1] * w).floor()[:, None]
    down = (rows >= row - half[:, None]) & (rows < row + half[:, None])
    across = (columns >= column - half[:, None]) & (columns < column + half[:, None])
    return images.masked_fill((down[:, :, None] & across[:, None, :])[:, None], fill)


def perform(
    images: UInt8[Tensor, "b c h w"],
    names: Sequence[str] | np.ndarray,
    strengths: Float[np.ndarray, " b"],
    places: Float[np.ndarray, "2 b"] | None = None,
    fill: int = 0,
) -> UInt8[Tensor, "b c h w"]:
    """One operation on each image: 'Identity', 'Cutout', or one of `TABLES`, `BLENDS` and `GEOMETRY`.

    Changes `images` in place and returns them. Each operation runs once, on all images that have drawn it.
    `places` is where Cutout happens; `fill` is the grey level of what comes from outside the image.
    """
    b, c, h, w = images.shape
    which, strengths = np.asarray(names), np.asarray(strengths)
    amounts = _move(strengths.astype(np.float32), images)
    groups = {name: np.flatnonzero(which == name) for name in dict.fromkeys(which.tolist())}

    moved = [name for name in groups if name in GEOMETRY]
    if moved:
        maps = np.concatenate([matrices(name, strengths[groups[name]], h, w) for name in moved])
        chosen = _move(np.concatenate([groups[name] for name in moved]), images)
        images[chosen] = warp(images[chosen], _move(maps.astype(np.float32), images), fill)

    mapped = [name for name in groups if name in TABLES]
    if mapped:
        tables = []
        for name in mapped:
            chosen = _move(groups[name], images)
            table = TABLES[name](images[chosen], amounts[chosen])
            tables.append(table.clamp(0, 255).byte().expand(len(chosen), c, 256))
        chosen = _move(np.concatenate([groups[name] for name in mapped]), images)
        images[chosen] = look_up(images[chosen], torch.cat(tables))

    for name in groups:
        if name in BLENDS:
            chosen = _move(groups[name], images)
            images[chosen] = BLENDS[name](images[chosen], amounts[chosen])
    if places is not None and "Cutout" in groups:
        chosen = _move(groups["Cutout"], images)
        place = _move(places[:, groups["Cutout"]].astype(np.float32), images)
        images[chosen] = cut_out(images[chosen], amounts[chosen], place, fill)
    return images


def resize_weights(
    start: Float[Tensor, " b"], length: Float[Tensor, " b"], into: int, of: int
) -> Float[Tensor, "b into of"]:
    """Weights that resize the pixels [start, start + length) of `of` to `into`: bilinear, antialiased."""
    scale = (length / into)[:, None, None]
    reach = scale.clamp(min=1)
    centre = (torch.arange(into, device=start.device)[:, None] + 0.5) * scale
    pixel = torch.arange(of, device=start.device) - start[:, None, None]
    weights = (1 - (pixel + 0.5 - centre).abs() / reach).clamp(min=0)
    weights = weights * ((pixel >= 0) & (pixel < length[:, None, None]))
    return weights / weights.sum(-1, keepdim=True)


def resized_crop(
    images: UInt8[Tensor, "b c h w"], top: Tensor, left: Tensor, height: Tensor, width: Tensor
) -> UInt8[Tensor, "b c h w"]:
    """Cut a rectangle out of each image and resize it to the image's own size."""
    h, w = images.shape[-2:]
    rows = resize_weights(top.float(), height.float(), h, h)
    columns = resize_weights(left.float(), width.float(), w, w)
    x = (images.float().flatten(1, 2) @ columns.mT).unflatten(1, images.shape[1:3])
    x = rows @ x.transpose(1, 2).flatten(2)  # one product for all channels: weights are not copied for each
    return x.unflatten(2, (images.shape[1], w)).transpose(1, 2).round_().clamp_(0, 255).byte()


def grey(images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
    """Whole grey levels, rounded down as torchvision does; of one channel, itself."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.float().unbind(1)
    r, g, b = GREY_WEIGHTS  # numbers, not a tensor: that would wait for the device
    return (r * red + g * green + b * blue).floor_()[:, None]


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor · images + (1 − factor) · other, within the range of grey levels."""
    return torch.lerp(other.expand(images.shape), images.float(), factor[:, None, None, None]).clamp_(0, 255).byte()


def _levels(images: Tensor) -> Float[Tensor, "1 1 256"]:
    return torch.arange(256, dtype=torch.float32, device=images.device)[None, None]


def _move(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like.device, non_blocking=True)
