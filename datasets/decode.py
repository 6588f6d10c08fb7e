"""Image files of any size and mode to one uint8 tensor, decoded once, in parallel, and cached on disk.

Decoding: EXIF orientation is applied, 16-bit grey is scaled to 8, transparency is laid on white, every mode ends
as RGB; the shorter side is resized to the image size (bilinear, antialiased) and the centre is cut out. What Pillow
warns of is either harmless or an error a little later, so its warnings are silenced.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from smallvit.datasets.listing import Listing
from smallvit.datasets.memory import require_memory
from smallvit.errors import InputError, first_line

DECODER = 3
"""Raised when decoding changes, so that older caches are not used."""
warnings.filterwarnings("ignore", module=r"PIL\.")  # here, for all threads and worker processes


def default_size(files: Listing, largest: int = 64, sample: int = 512) -> int:
    """An image size for these files: the median shorter side, at most `largest`, fit for a ViT's patches.

    That is a multiple of 8 from 56 px upwards, else of 4, and at least 8.

    Looks at the headers of at most `sample` files, evenly spread.
    """
    sides = []
    for index in np.linspace(0, len(files) - 1, min(sample, len(files))).astype(int):
        try:
            with Image.open(files.open(index)) as image:
                sides.append(min(image.size))
        except Exception:
            continue  # damaged: decoding will name it
    size = min(int(np.median(sides)), largest) if sides else largest
    return max(8, size - size % (8 if size >= 56 else 4))


def decode_image(file: str | BinaryIO, size: int) -> UInt8[np.ndarray, "3 size size"]:
    """Decode one file; raises whatever Pillow raises for files that are damaged or no images."""
    with Image.open(file) as image:
        image.draft("RGB", (size, size))  # large JPEGs: decode at a fraction of the size
        return fit(to_rgb(ImageOps.exif_transpose(image)), size)


def fit(image: Image.Image, size: int) -> UInt8[np.ndarray, "3 size size"]:
    """Resize the shorter side to `size` and cut out the centre."""
    side = min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    return np.asarray(image).transpose(2, 0, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB.

    Raises:
        ValueError: pixels are infinite or no numbers.
    """
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("pixels that are infinite or no numbers")
        if image.mode != "F" and (values.max() > 255 or image.mode.startswith("I;16")):
            values = values / 257  # 16 bits to 8
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def decode_all(files: Listing, size: int) -> tuple[UInt8[Tensor, "n 3 size size"], dict[int, str]]:
    """Decode all files in parallel with a progress bar; returns the images and the reason for each bad file."""
    pixels = np.empty((len(files), 3, size, size), dtype=np.uint8)
    bad: dict[int, str] = {}

    def decode(chunk: range) -> None:
        for index in chunk:
            try:
                pixels[index] = decode_image(files.open(index), size)
            except Exception as error:  # whatever a damaged file provokes: the caller names it
                pixels[index] = 0
                bad[index] = reason(error, files.paths[index])

    chunks = [range(start, min(start + 64, len(files))) for start in range(0, len(files), 64)]
    with ThreadPoolExecutor(usable_cores()) as pool:
        for _ in track(pool.map(decode, chunks), f"decoding {len(files):,} images", total=len(chunks)):
            pass
    return torch.from_numpy(pixels), bad


def reason(error: Exception, path: str) -> str:
    """Why an image cannot be decoded, without what Pillow calls the file."""
    return re.sub(r"<_io\.BytesIO.*?>", "", first_line(error).replace(repr(path), "")).strip()


def describe_bad(files: Listing, bad: dict[int, str]) -> str:
    """One line that names the first few files that cannot be decoded."""
    named = [f"{repr(files.paths[index])[1:-1]} ({bad[index]})" for index in sorted(bad)[:3]]
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"{len(bad)} of {len(files)} images cannot be decoded: {', '.join(named)}{more}"


def cache_folder() -> Path:
    """Where decoded images are kept: $SMALLVIT_CACHE, else smallvit/ in the user's cache folder."""
    if given := os.environ.get("SMALLVIT_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "smallvit"


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode_cached(
    files: Listing, size: int, skip_corrupt: bool
) -> tuple[UInt8[Tensor, "n 3 size size"], dict[int, str], bool]:
    """`decode_all`, or what it returned before for the same files; the last value says which (True: cached).

    One cache file a folder and size, valid while the fingerprint is the same.

    Raises:
        InputError: files cannot be decoded and `skip_corrupt` is off, or the images do not fit into memory.
    """
    key = f"{DECODER}-{files.fingerprint}"
    name = hashlib.sha256(f"{files.root.resolve()}\0{size}".encode("utf-8", "replace")).hexdigest()[:16]
    file = cache_folder() / f"images-{name}.safetensors"
    require_memory(len(files), 3, size)
    found = _read_cache(file, key, (len(files), 3, size, size))
    pixels, bad = found or decode_all(files, size)
    if bad and not skip_corrupt:
        raise InputError(describe_bad(files, bad) + "; repair or remove, or leave out with --skip-corrupt")
    if not found:
        _write_cache(file, pixels, {"key": key, "bad": json.dumps(bad)})
    return pixels, bad, found is not None


def _read_cache(file: Path, key: str, shape: tuple[int, ...]) -> tuple[Tensor, dict[int, str]] | None:
    """What is cached under this key; nothing if there is no cache, another key's, or a broken one."""
    try:
        with safe_open(file, "pt") as cached:
            metadata = cached.metadata() or {}
            if metadata.get("key") != key:
                return None
            bad = {int(index): str(reason) for index, reason in json.loads(metadata["bad"]).items()}
            pixels = cached.get_tensor("pixels")
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError):
        return None
    return (pixels, bad) if pixels.shape == shape and pixels.dtype == torch.uint8 else None


def _write_cache(file: Path, pixels: Tensor, metadata: dict[str, str]) -> None:
    """Write whole or not at all; a cache that cannot be written is done without."""
    partial = file.with_suffix(".partial")  # one name, so that what a crash leaves is written over
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"pixels": pixels}, partial, metadata)
        partial.replace(file)
    except (OSError, SafetensorError):
        with suppress(OSError):
            partial.unlink()
