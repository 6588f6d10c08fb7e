"""Read images of any number of channels from NumPy files and TIFF, and scale them to the levels 0 to 255.

    .npy     (height, width), (height, width, channels) or (channels, height, width): the shorter of first and last axis
             are the channels, the last if they are equally long; integers or floats, never pickled objects
    TIFF     several pages of one band each, which are the channels, or more bands than color and transparency

8-bit values remain unchanged. Others are scaled linearly, each channel by its own range: see `gray`.

Axes: c channels, h w pixels.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import BinaryIO

import numpy as np
from jaxtyping import Real, UInt8
from PIL import Image, ImageSequence, UnidentifiedImageError

from smallvit.datasets.gray import FULL, KIND_NAMES, GrayRanges, Range

NUMPY, TIFF = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of NumPy files, and of TIFF and BigTIFF."""
BAND_MODES = ("L", "F", "I", "I;16", "I;16L", "I;16B")
"""Pillow's modes of a page that is one band."""
EXTRA_SAMPLES, UNSPECIFIED = 338, 0
"""TIFF tag of bands beyond color, and its value for those that are no transparency."""
REMEDY = "pip install 'smallvit[tiff]'"


def read_channels(file: str | BinaryIO, max_megapixels: float) -> Real[np.ndarray, "c h w"] | None:
    """Return the values of a file with its own number of channels; None for gray and color images, which Pillow reads.

    Raises:
        ValueError: the array has another form, or the image has too many pixels.
    """
    with open(file, "rb") if isinstance(file, str | os.PathLike) else nullcontext(file) as stream:
        start = stream.read(len(NUMPY))
        stream.seek(0)
        values = None
        if start == NUMPY:
            values = np.load(stream, allow_pickle=False)
        elif start.startswith(TIFF):
            values = _read_tiff(stream)
        stream.seek(0)
    return None if values is None else order_axes(values, max_megapixels)


def order_axes(values: np.ndarray, max_megapixels: float) -> Real[np.ndarray, "c h w"]:
    """Return an array with the channels first.

    Raises:
        ValueError: it is no image, or has too many pixels.
    """
    if values.ndim not in (2, 3) or 0 in values.shape or values.dtype.kind not in "iuf":
        raise ValueError(
            f"{values.dtype} array of shape {values.shape}: expected integers or floats (height, width), "
            "(height, width, channels) or (channels, height, width)"
        )
    if values.ndim == 2:
        values = values[None]
    elif values.shape[2] <= values.shape[0]:
        values = values.transpose(2, 0, 1)
    height, width = values.shape[1:]
    if height * width > 1e6 * max_megapixels:
        raise ValueError(f"{width:,} x {height:,} pixels, --max-megapixels allows {max_megapixels:,g}: raise it")
    return values


def _read_tiff(stream: BinaryIO) -> np.ndarray | None:
    """Return the pages or bands of a TIFF file; None for a gray or color image."""
    try:
        with Image.open(stream) as image:
            size, bands = image.size, []
            for page in ImageSequence.Iterator(image) if getattr(image, "n_frames", 1) > 1 else ():
                if page.size != size or page.mode not in BAND_MODES:
                    break
                bands.append(np.asarray(page))
            else:
                if bands:
                    return np.stack(bands)
            image.seek(0)
            if UNSPECIFIED not in getattr(image, "tag_v2", {}).get(EXTRA_SAMPLES, ()):
                return None
    except UnidentifiedImageError:
        pass  # more bands than Pillow has modes for, or damaged
    try:
        from tifffile import imread
    except ImportError:
        raise ValueError(
            f"more bands than color and transparency, or damaged: to read it {REMEDY}, or save it as .npy"
        ) from None
    stream.seek(0)
    return imread(stream)


def measure_channels(values: Real[np.ndarray, "c h w"]) -> dict[str, list[Range]]:
    """Return the smallest and largest value of each channel, by the kind of value (`GrayRanges.measured`).

    Raises:
        ValueError: values are infinite or NaN.
    """
    if values.dtype == np.uint8:
        return {}
    if not np.isfinite(values).all():
        raise ValueError("pixels that are infinite or NaN")
    low, high = (extreme(values, axis=(1, 2)).astype(float).tolist() for extreme in (np.min, np.max))
    return {f"{_kind(values)} channels": list(zip(low, high, strict=True))}


def scale_channels(values: Real[np.ndarray, "c h w"], ranges: GrayRanges, channels: int) -> UInt8[np.ndarray, "c h w"]:
    """Return the levels 0 to 255; values beyond a channel's range become 0 or 255.

    Args:
        ranges: Those of the training images; without any, values must be within 0 to 65,535, or floats within 0 to 1.
        channels: Expected number of channels.

    Raises:
        ValueError: there are more or fewer channels, values are infinite or NaN, or outside the full range.
    """
    if len(values) != channels:
        raise ValueError(f"{len(values)} channels, expected {channels}")
    if values.dtype == np.uint8:
        return values
    (extrema,) = map(np.array, measure_channels(values).values())
    scale = ranges.channels or (FULL[_kind(values)],) * channels
    if ranges.channels is None and (extrema.min() < scale[0][0] or extrema.max() > scale[0][1]):
        raise ValueError(f"{KIND_NAMES[_kind(values)]} beyond {scale[0]}, but no training image has such values")
    low, high = np.array(scale)[:, :, None, None].transpose(1, 0, 2, 3)
    return ((values.astype(np.float64) - low) * (255 / (high - low))).clip(0, 255).round().astype(np.uint8)


def view_channels(values: Real[np.ndarray, "c h w"]) -> Image.Image:
    """Return an image to look at: the first three channels as red, green and blue, or the first as gray."""
    values = values[: 3 if len(values) >= 3 else 1]
    levels = scale_channels(values, GrayRanges.measured([measure_channels(values)]), len(values))
    return Image.fromarray(np.ascontiguousarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0)))


def _kind(values: np.ndarray) -> str:
    return "floating" if values.dtype.kind == "f" else "integer"
