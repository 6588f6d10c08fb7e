"""Decode image files of any size and mode to one uint8 tensor, in parallel and cached on disk.

EXIF orientation is applied, gray values of more than 8 bits are scaled (see `gray`), transparent pixels become white,
and every mode becomes RGB. Images are resized to cover the image size (bilinear, antialiased), then the center is
cropped; --resize selects other ways. For speed, JPEG files of at least four times the image size are decoded at a
fraction of their size; `smallvit predict` decodes them whole.
Warnings of Pillow are harmless or followed by an error, so they are silenced.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from smallvit.config.options import MAX_MEGAPIXELS
from smallvit.datasets.channels import order_axes, read_channels, scale_channels, view_channels
from smallvit.datasets.gray import PHOTOMETRIC, WHITE_IS_ZERO, GrayRanges, kind_of, takes_arrays, to_levels
from smallvit.datasets.listing import HEIF_REMEDY, HEIF_SUFFIXES, Listing, image_suffixes, register_heif
from smallvit.utils.cores import usable_cores
from smallvit.utils.errors import InputError, first_line, group_errors
from smallvit.utils.files import atomic_write
from smallvit.utils.hardware import require_memory
from smallvit.utils.sizes import ImageSize, fit_sides, height_width
from smallvit.utils.terminal import track

CACHE_VERSION = 7
"""Increased when decoding changes, so that older caches are not used."""
Image.MAX_IMAGE_PIXELS = int(1e6 * MAX_MEGAPIXELS)  # Pillow opens images of up to twice this size
NO_RANGES = GrayRanges()
JPEG_FORMATS = ("JPEG", "MPO")
"""Pillow's names of JPEG files; MPO has several images."""
GRAY = 128
"""Level of the border that --resize pad adds."""
warnings.filterwarnings("ignore", module=r"PIL\.")  # here, for all threads and worker processes


@contextmanager
def open_image(file: str | BinaryIO, max_megapixels: float) -> Iterator[Image.Image]:
    """Open an image file and check its size; Pillow's errors on damaged files pass through.

    Of a file with its own number of channels this is a view of them, see `view_channels`.

    Raises:
        ValueError: the image has more megapixels than `max_megapixels`.
    """
    register_heif()  # here too, for files that were not listed and for worker processes
    if (values := read_channels(file, max_megapixels)) is not None:
        yield view_channels(values)
        return
    with Image.open(file) as image:
        width, height = image.size
        if width * height > 1e6 * max_megapixels:
            raise ValueError(
                f"{width:,} x {height:,} pixels are {width * height / 1e6:,.4g} megapixels, --max-megapixels allows "
                f"{max_megapixels:,g}: raise it, or shrink the image"
            )
        if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0 and kind_of(image) is not None:
            image.info[WHITE_IS_ZERO] = True  # Pillow inverts images of 8 bits only
        yield image


def decode_image(
    file: str | BinaryIO,
    size: ImageSize,
    ranges: GrayRanges = NO_RANGES,
    max_megapixels: float = MAX_MEGAPIXELS,
    crop_mode: str = "center",
    channels: int = 3,
) -> UInt8[np.ndarray, "c h w"]:
    """Decode one file; Pillow's errors on damaged files pass through.

    Args:
        ranges: Ranges of gray values of more than 8 bits.
        max_megapixels: Larger images raise a ValueError.
        crop_mode: see `resize`.
        channels: Number of channels, which only color images can change: to 1, gray.
    """
    if (levels := read_levels(file, ranges, channels, max_megapixels)) is not None:
        return resize_channels(levels, size, crop_mode=crop_mode)
    with open_image(file, max_megapixels) as image:
        pixels = convert_image(image, size, ranges, crop_mode)
    return select_channels(pixels, channels)


def read_levels(
    source: str | BinaryIO | np.ndarray, ranges: GrayRanges, channels: int, max_megapixels: float
) -> UInt8[np.ndarray, "c h w"] | None:
    """Return the levels of a file or array with its own channels; None for gray and color images, which Pillow reads.

    Unless the model takes arrays, those that Pillow reads are gray (height, width) or 8-bit colors.

    Raises:
        ValueError: there are more or fewer channels, or they cannot be scaled.
    """
    if not isinstance(source, np.ndarray):
        values = read_channels(source, max_megapixels)
    elif takes_arrays(channels, ranges) or not (
        source.ndim == 2 or (source.dtype == np.uint8 and source.shape[2:] in ((2,), (3,), (4,)))
    ):
        values = order_axes(source, max_megapixels)
    else:
        values = None
    return None if values is None else scale_channels(values, ranges, channels)


def resize_channels(levels: UInt8[np.ndarray, "c h w"], size: ImageSize, **options: Any) -> UInt8[np.ndarray, "c y x"]:
    """Resize the channels of an image one by one."""
    return np.stack([np.asarray(resize(Image.fromarray(level), size, **options)) for level in levels])


def select_channels(rgb: UInt8[np.ndarray, "3 h w"], channels: int) -> UInt8[np.ndarray, "c h w"]:
    """Return colors, or for one channel their luma.

    Raises:
        ValueError: another number of channels is expected.
    """
    if channels not in (1, 3):
        raise ValueError(f"a gray or color image, expected {channels} channels")
    return rgb if channels == 3 else np.asarray(Image.fromarray(rgb.transpose(1, 2, 0)).convert("L"))[None]


def convert_image(
    image: Image.Image, size: ImageSize, ranges: GrayRanges = NO_RANGES, crop_mode: str = "center"
) -> UInt8[np.ndarray, "3 h w"]:
    """Convert an image of any mode and orientation to RGB and resize it."""
    least = 2 * max(height_width(size))  # either side, as the image may have to be rotated
    image.draft("RGB", (least, least))  # large JPEGs: decode at a fraction of the size; at less it is too sharp
    rgb = to_rgb(upright(image), ranges)
    return np.asarray(resize(rgb, size, crop_mode=crop_mode)).transpose(2, 0, 1)


def resize(
    image: Image.Image,
    size: ImageSize,
    *,
    interpolation: str = "bilinear",
    crop_pct: float = 1.0,
    crop_mode: str = "center",
) -> Image.Image:
    """Resize an image and crop the center exactly as timm's transform for evaluation does, except the gray border.

    Args:
        size: Size of the result.
        interpolation: Name of a Pillow filter.
        crop_pct: `size` divided by that before the crop.
        crop_mode: "center" and "border" keep the aspect ratio, "squash" does not; see `fit_sides`.
    """
    (h, w), resampling = height_width(size), Image.Resampling[interpolation.upper()]
    height, width = fit_sides((image.height, image.width), size, crop_mode, crop_pct)
    left, top = (_offset(whole, side) for whole, side in ((width, w), (height, h)))
    if width * height > 100 * w * h:  # a thin line, too large when resized: equal but for rounding
        x, y = image.width / width, image.height / height
        return image.resize((w, h), resampling, box=(left * x, top * y, (left + w) * x, (top + h) * y))
    resized = image.resize((width, height), resampling)
    if crop_mode != "border":
        return resized.crop((left, top, left + w, top + h))
    canvas = Image.new(image.mode, (w, h), (GRAY,) * len(image.getbands()))
    canvas.paste(resized, (-left, -top))
    return canvas


def _offset(whole: int, side: int) -> int:
    """Return where the center begins that timm crops, or the negative width of the border that it adds."""
    return round((whole - side) / 2) if whole >= side else -((side - whole) // 2)


def to_rgb(image: Image.Image, ranges: GrayRanges = NO_RANGES) -> Image.Image:
    """Convert any Pillow mode to RGB.

    Raises:
        ValueError: gray values of more than 8 bits cannot be scaled.
    """
    if kind_of(image) is not None:
        image = Image.fromarray(to_levels(image, ranges))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_rgb(image: Image.Image, stream: io.BytesIO, ranges: GrayRanges = NO_RANGES) -> UInt8[Tensor, "3 h w"]:
    """Return the upright RGB pixels of an image that was opened from `stream`; errors on damaged files pass through.

    JPEG files that need no conversion are decoded by simplejpeg where it is installed, which returns the same pixels as
    Pillow and is faster.
    """
    pixels = None
    if image.format in JPEG_FORMATS and image.mode in ("L", "RGB") and not orientation(image):
        with suppress(ImportError, ValueError):  # Pillow decides whether the file is damaged
            from simplejpeg import decode_jpeg

            pixels = decode_jpeg(stream.getbuffer())
    if pixels is None:
        pixels = np.array(to_rgb(upright(image), ranges))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 2 to 8; 0 for images that are upright."""
    value = image.getexif().get(ExifTags.Base.Orientation)
    return value if value in range(2, 9) else 0


def upright(image: Image.Image) -> Image.Image:
    """Return an image with its EXIF orientation applied, itself if it is upright."""
    image.load()  # TIFF files are transposed here
    return ImageOps.exif_transpose(image) if orientation(image) else image


def describe_decode_error(error: Exception, path: str) -> str:
    """Return why an image cannot be decoded, without Pillow's name of the file."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in HEIF_SUFFIXES - image_suffixes():
        return f"{suffix[1:].upper()}; to read it: {HEIF_REMEDY}"
    return re.sub(r"<_io\.BytesIO.*?>", "", first_line(error).replace(repr(path), "")).strip()


def median_side(files: Listing) -> int | None:
    """Return the median shorter side of the images in pixels, from the headers of some files."""
    sides = [min(sides) for sides in _sample_sides(files)]
    return int(np.median(sides)) if sides else None


def is_reduced(files: Listing, size: ImageSize) -> bool:
    """Return whether images lose pixels when they are resized to `size` and cropped, from the headers of some files."""
    h, w = height_width(size)
    return any(height > h or width > w or height * w != width * h for height, width in _sample_sides(files))


def _sample_sides(files: Listing, sample: int = 512) -> list[tuple[int, int]]:
    """Return height and width of at most `sample` images, without their EXIF orientation."""
    sides = []
    for index in np.linspace(0, len(files) - 1, min(sample, len(files))).astype(int):
        with suppress(Exception), open_image(files.open(index), math.inf) as image:  # damaged: decoding reports it
            sides.append((image.height, image.width))
    return sides


def detect_channels(files: Listing) -> int:
    """Return the number of channels of the first file that can be read: that of its array, else 3."""
    for index in range(min(len(files), 64)):
        try:
            values = read_channels(files.open(index), math.inf)
        except Exception:  # decoding reports it
            continue
        return 3 if values is None else len(values)
    return 3


def default_size(side: int | None, largest: int = 64) -> int:
    """Return an image size for images of this shorter side: at most `largest`, and such that ViT patches divide it.

    It is a multiple of 8 from 56 px upwards, else of 4, and at least 8.
    """
    size = largest if side is None else min(side, largest)
    return max(8, size - size % (8 if size >= 56 else 4))


@dataclass(frozen=True)
class Decoded:
    """The decoded images of a listing."""

    pixels: UInt8[Tensor, "n c h w"]
    errors: dict[int, str]
    """Error message for each file that cannot be decoded."""
    cached: bool = False
    """Whether the pixels were read from the cache."""


def decode_cached(
    files: Listing,
    size: ImageSize,
    skip_corrupt: bool,
    max_megapixels: float = MAX_MEGAPIXELS,
    ranges: GrayRanges = NO_RANGES,
    crop_mode: str = "center",
    channels: int = 3,
) -> Decoded:
    """Decode all files, or read them from the cache.

    There is one cache file per folder, size and crop mode, valid while the listing's fingerprint and the ranges are the
    same.

    Raises:
        InputError: files cannot be decoded and `skip_corrupt` is off, or the images do not fit into memory.
    """
    require_memory(len(files), channels, size, "choose a smaller --img-size, or add --streaming on")
    heif = "".join(sorted(HEIF_SUFFIXES & image_suffixes()))  # their errors are cached, too
    key = f"{CACHE_VERSION}-{files.fingerprint}-{max_megapixels:g}-{ranges.to_json()}{heif}-{channels}"
    identity = f"{files.root.resolve()}\0{size}" + f"\0{crop_mode}" * (crop_mode != "center")
    name = hashlib.sha256(identity.encode("utf-8", "replace")).hexdigest()[:16]
    cache = cache_folder() / f"images-{name}.safetensors"
    cached = _read_cache(cache, key)
    decoded = cached or _decode_all(files, size, max_megapixels, ranges, crop_mode, channels)
    if decoded.errors and not skip_corrupt:
        raise InputError(describe_errors(files, decoded.errors) + "; repair or remove them, or add --skip-corrupt")
    if not cached:
        _write_cache(cache, decoded, key)
    return decoded


def _decode_all(
    files: Listing, size: ImageSize, max_megapixels: float, ranges: GrayRanges, crop_mode: str, channels: int
) -> Decoded:
    pixels = np.empty((len(files), channels, *height_width(size)), dtype=np.uint8)

    def decode(index: int) -> None:
        pixels[index] = decode_image(files.open(index), size, ranges, max_megapixels, crop_mode, channels)

    errors = run_in_threads(decode, range(len(files)), files.paths, f"decoding {len(files):,} images")
    pixels[list(errors)] = 0
    return Decoded(torch.from_numpy(pixels), errors)


def run_in_threads(
    function: Callable[[int], None], indices: Sequence[int], paths: Sequence[str], description: str
) -> dict[int, str]:
    """Call a function for each file in parallel, with a progress bar; return the errors by index."""
    errors: dict[int, str] = {}

    def run(chunk: Sequence[int]) -> None:
        for index in chunk:
            try:
                function(index)
            except Exception as error:  # libraries raise anything on damaged files
                errors[index] = describe_decode_error(error, paths[index])

    chunks = [indices[start : start + 64] for start in range(0, len(indices), 64)]
    with ThreadPoolExecutor(usable_cores()) as pool:
        for _ in track(pool.map(run, chunks), description, len(chunks)):
            pass
    return errors


def describe_errors(files: Listing, errors: dict[int, str]) -> str:
    """Return a line that names the first files that cannot be decoded."""
    named = group_errors((files.paths[index], errors[index]) for index in sorted(errors))
    return f"{len(errors)} of {len(files)} images cannot be decoded: {named}"


def cache_folder() -> Path:
    """Return the folder of cached files: $SMALLVIT_CACHE, else smallvit/ in the user's cache folder."""
    if folder := os.environ.get("SMALLVIT_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "smallvit"


def _read_cache(file: Path, key: str) -> Decoded | None:
    """Return the entry cached under this key; None if it is missing, stale or damaged."""
    try:
        with safe_open(file, "pt") as cached:
            metadata = cached.metadata() or {}
            if metadata.get("key") != key:
                return None
            errors = {int(index): reason for index, reason in json.loads(metadata["bad"]).items()}
            return Decoded(cached.get_tensor("pixels"), errors, cached=True)
    except (OSError, SafetensorError):
        return None


def _write_cache(file: Path, decoded: Decoded, key: str) -> None:
    """Write the cache; continue without a cache if that fails."""
    with suppress(OSError, SafetensorError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as partial:
            save_file({"pixels": decoded.pixels}, partial, {"key": key, "bad": json.dumps(decoded.errors)})
