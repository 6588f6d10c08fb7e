"""Scale gray values of more than 8 bits (16- and 32-bit integers, floats) to the levels 0 to 255.

Image files do not say which value is white: 12-bit cameras use a part of 16 bits, and floats have any unit. One linear
scale per data set keeps the order of gray values within and between images.

    floats within [0, 1]                0 to 1 become 0 to 255
    integers that use 16 bits           0 to 65,535 become 0 to 255
    others                              the smallest to the largest value become 0 to 255

Integers use 16 bits if the largest needs more than 14 bits and they span at least an eighth of the range. Cameras of 10
to 14 bits do not, nor do thermal images around a large offset, which would keep only a few levels.
The same holds for each channel of arrays (`channels`), with own ranges.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Real, UInt8

if TYPE_CHECKING:
    from PIL.Image import Image

Range = tuple[float, float]
"""Smallest and largest value."""

KINDS = ("integer", "floating")
FULL = {"integer": (0.0, 65535.0), "floating": (0.0, 1.0)}
"""Ranges that need no measurement."""
KIND_NAMES = {"integer": "integer gray values of more than 8 bits", "floating": "floating-point gray values"}
WHITE_IS_ZERO = "white_is_zero"
"""Entry of `Image.info` for TIFF files in which the smallest value is white."""
PHOTOMETRIC = 262
"""TIFF tag; 0 means that white is zero."""


@dataclass(frozen=True, kw_only=True)
class GrayRanges:
    """The values that become black and white, for each kind of gray value; None if no image was measured."""

    integer: Range | None = None
    floating: Range | None = None
    channels: tuple[Range, ...] | None = None
    """That of each channel of arrays of more than 8 bits, see `channels`."""

    def __bool__(self) -> bool:
        return any(asdict(self).values())

    @classmethod
    def measured(cls, extrema: Iterable[dict[str, Any]]) -> GrayRanges:
        """Return the ranges for the smallest and largest values of images, see `measure` and `measure_channels`."""
        extrema, channels = list(extrema), None
        for kind in KINDS:
            if arrays := [each[f"{kind} channels"] for each in extrema if f"{kind} channels" in each]:
                x = np.array([each for each in arrays if len(each) == len(arrays[0])])
                pairs = zip(x[..., 0].min(0).tolist(), x[..., 1].max(0).tolist(), strict=True)
                channels = tuple(_fit_range(kind, *pair) for pair in pairs)
        values = {kind: np.array([each[kind] for each in extrema if kind in each]) for kind in KINDS}
        ranges = {kind: _fit_range(kind, x.min().item(), x.max().item()) for kind, x in values.items() if x.size}
        return cls(**ranges, channels=channels)

    def filled(self, other: GrayRanges) -> GrayRanges:
        """Return these ranges, with those of `other` for kinds that have none."""
        return GrayRanges(**{kind: own or getattr(other, kind) for kind, own in vars(self).items()})

    def describe(self) -> list[str]:
        """Return a line for each kind that has a range."""
        lines = []
        for kind in KINDS:
            if (range_ := getattr(self, kind)) is not None:
                low, high = (f"{value:,.6g}" if abs(value) < 1e6 else f"{value:.6g}" for value in range_)
                source = "their full range" if range_ == FULL[kind] else "the range of the training images"
                lines.append(f"{KIND_NAMES[kind]}: {low} to {high} become 0 to 255 ({source})")
        if self.channels is not None:
            listed = ", ".join(f"{low:.6g} to {high:.6g}" for low, high in self.channels)
            lines.append(f"channels of more than 8 bits: {listed} become 0 to 255")
        return lines

    def note(self, kind: str) -> str:
        """Return a line on how a trained model's ranges scale an image of this kind of gray values."""
        (line,) = GrayRanges(**{kind: getattr(self, kind) or FULL[kind]}).describe()
        return line if getattr(self, kind) else f"{line}, as the model was not trained on such images"

    def to_json(self) -> dict[str, list[Any] | None]:
        """Return plain lists for weights files and caches."""
        ranges = asdict(self)
        if self.channels is None:
            del ranges["channels"]
        return {kind: range_ and list(range_) for kind, range_ in ranges.items()}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> GrayRanges:
        """Build ranges from the result of `to_json`.

        Raises:
            ValueError, TypeError, AttributeError: the entry has another form.
        """
        channels = entry.get("channels") and tuple((float(low), float(high)) for low, high in entry["channels"])
        ranges = {
            kind: tuple(map(float, entry[kind])) for kind in entry.keys() - {"channels"} if entry[kind] is not None
        }
        for low, high in (*ranges.values(), *(channels or ())):
            if not -math.inf < low < high < math.inf:
                raise ValueError(f"gray values from {low:g} to {high:g}")
        return cls(**ranges, channels=channels)


def takes_arrays(channels: int, ranges: GrayRanges | None) -> bool:
    """Return whether a model of so many channels, trained with these ranges, takes arrays rather than photos."""
    return channels not in (1, 3) or (ranges is not None and ranges.channels is not None)


def kind_of(image: Image) -> str | None:
    """Return the kind of gray values of more than 8 bits in an image; None for images of 8 bits."""
    return "floating" if image.mode == "F" else "integer" if image.mode.startswith("I") else None


def measure(image: Image) -> dict[str, Range]:
    """Return the smallest and largest gray value of an image of more than 8 bits, by their kind; {} for 8 bits.

    Raises:
        ValueError: values are infinite or NaN.
    """
    kind = kind_of(image)
    if kind is None:
        return {}
    values = _values(image)
    return {kind: (float(values.min()), float(values.max()))}


def to_levels(image: Image, ranges: GrayRanges) -> UInt8[np.ndarray, "h w"]:
    """Return the levels 0 to 255 of an image of more than 8 bits; values beyond the range become black or white.

    Raises:
        ValueError: values are infinite or NaN, or lie outside the full range if no range was measured.
    """
    kind = kind_of(image)
    low, high = getattr(ranges, kind) or _require_full_range(kind, image)
    return ((_values(image).astype(np.float64) - low) * (255 / (high - low))).clip(0, 255).round().astype(np.uint8)


def _values(image: Image) -> Real[np.ndarray, "h w"]:
    """Return the values, larger ones brighter."""
    values = np.asarray(image)
    if image.mode == "F" and not np.isfinite(values).all():
        raise ValueError("pixels that are infinite or NaN")
    return FULL[kind_of(image)][1] - values.astype(np.float64) if image.info.get(WHITE_IS_ZERO) else values


def _fit_range(kind: str, low: float, high: float) -> Range:
    """Return the full range if the values use it, else their own range."""
    black, white = FULL[kind]
    within = black <= low and high <= white
    uses_16_bits = high > white / 4 and high - low >= white / 8
    if within and (kind == "floating" or uses_16_bits or low == high):
        return black, white
    return (low, high) if high > low else (low, low + 1)


def _require_full_range(kind: str, image: Image) -> Range:
    """Return the full range, after a check that an image's values lie within it."""
    black, white = FULL[kind]
    low, high = measure(image).get(kind, (black, white))
    if low < black or high > white:
        raise ValueError(
            f"{KIND_NAMES[kind]} from {low:g} to {high:g}, but no training image has such values; convert it to 8 bits"
        )
    return black, white
