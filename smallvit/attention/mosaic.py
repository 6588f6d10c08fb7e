"""A page of pictures and words at given places, pixel by pixel. Imports no torch.

Axes: y x pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from smallvit.files import replacing

DPI = 120
LETTER = 7.7
"""Mean width of a letter of 8 points in pixels, and a little more."""

RAISED = 3
"""Pixels between words and the place that they end above."""


class Mosaic:
    """A white page, in pixels; places are counted from its top left corner."""

    def __init__(self, width: int, height: int) -> None:
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
        self.pixels = np.ones((height, width, 3))

    @property
    def height(self) -> int:
        """In pixels."""
        return len(self.pixels)

    def paste(self, left: int, top: int, picture: Float[np.ndarray, "y x 3"]) -> None:
        """Put a picture of values in [0, 1] on the page."""
        height, width = picture.shape[:2]
        self.pixels[top : top + height, left : left + width] = picture

    def write(self, left: float, top: float, text: str, size: float = 8, **style: Any) -> None:
        """Write words; by default they end above the place, and begin there."""
        width = self.pixels.shape[1]
        style = {"va": "bottom", "parse_math": False} | style
        self.figure.text(left / width, 1 - (top - RAISED) / self.height, text, fontsize=size, **style)

    def save(self, path: Path) -> None:
        """Write the page as a PNG."""
        self.figure.figimage(self.pixels)
        with replacing(path) as partial:
            self.figure.savefig(partial, format="png", dpi=DPI)


def shortened(text: str, width: float) -> str:
    """One line of 8 points that fits into so many pixels."""
    text, most = " ".join(text.split()), int(width / LETTER)
    return text if len(text) <= most else text[: most - 1].rstrip(" ,") + "…"
