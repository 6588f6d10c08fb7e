"""A page of pictures and words at given places, pixel by pixel. Imports no torch.

Axes: y x pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from smallvit.files import replacing
from smallvit.words import one_line, printable

DPI = 120
LETTER = 7.7
"""Mean width of a letter of 8 points in pixels, and a little more."""

RAISED = 3
"""Pixels between words and the place that they end above."""
BAND, REACH = 512, 256
"""Height of what is drawn at once, and how far from their place words may reach, in pixels."""


class Mosaic:
    """A white page, in pixels; places are counted from its top left corner."""

    def __init__(self, width: int, height: int) -> None:
        self.picture = Image.new("RGB", (width, height), "white")
        self.words: list[tuple[float, float, str, dict[str, Any]]] = []

    @property
    def height(self) -> int:
        """In pixels."""
        return self.picture.height

    def paste(self, left: int, top: int, picture: Float[np.ndarray, "y x 3"]) -> None:
        """Put a picture of values in [0, 1] on the page."""
        self.picture.paste(Image.fromarray((255 * picture).round().astype(np.uint8)), (left, top))

    def write(self, left: float, top: float, text: str, size: float = 8, **style: Any) -> None:
        """Write words; by default they end above the place, and begin there."""
        style = {"fontsize": size, "va": "bottom", "parse_math": False} | style
        self.words.append((left, top - RAISED, printable(text), style))

    def save(self, path: Path) -> None:
        """Write the page as a PNG."""
        height = min(self.height, BAND)
        canvas = FigureCanvasAgg(Figure(figsize=(self.picture.width / DPI, height / DPI), dpi=DPI))
        for top in range(0, self.height, height):
            self._print(canvas, top, height)
        with replacing(path) as partial:
            self.picture.save(partial, format="png", dpi=(DPI, DPI))

    def _print(self, canvas: FigureCanvasAgg, top: int, height: int) -> None:
        """Put the words on a part of the page: matplotlib needs many times the memory of what it draws."""
        width, figure = self.picture.width, canvas.figure
        figure.clear()
        figure.figimage(np.asarray(self.picture.crop((0, top, width, top + height))))
        for left, place, text, style in self.words:
            if -REACH < place - top < height + REACH:
                figure.text(left / width, 1 - (place - top) / height, text, **style)
        canvas.draw()
        self.picture.paste(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]), (0, top))


def shortened(text: str, width: float) -> str:
    """One line of 8 points that fits into so many pixels."""
    text, most = one_line(printable(text)), int(width / LETTER)
    return text if len(text) <= most else text[: most - 1].rstrip(" ,") + "…"
