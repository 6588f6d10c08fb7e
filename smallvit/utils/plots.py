"""Draw contact sheets of pictures, and choose fonts that have the characters of a text."""

from __future__ import annotations

import textwrap
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Shaped, UInt8
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, findfont, fontManager, get_font
from matplotlib.text import Text
from PIL import Image, ImageDraw, ImageFont

from smallvit.utils.files import atomic_write
from smallvit.utils.terminal import create_console

if TYPE_CHECKING:
    from torch import Tensor

MIN_SIDE = 128
"""Approximate side in pixels to which small pictures are enlarged."""
MARGIN, LINE_HEIGHT, FONT_SIZE = 6, 14, 11

DEFAULT_FONT = "DejaVu Sans"
"""matplotlib's default font, which is installed with it."""
NO_GLYPH = {"Cc", "Cf", "Mn", "Me", "Zs", "Zl", "Zp", "Cs"}
"""Unicode categories of characters that have no visible glyph."""
LATIN = 256
"""Every font has the code points below."""

_reported: set[str] = set()


def draw_grid(
    pictures: Iterable[Float[np.ndarray | Tensor, "c h w"] | UInt8[np.ndarray, "c h w"]],
    captions: Sequence[str],
    columns: int,
    *,
    title: str | None = None,
) -> Image.Image:
    """Draw pictures in rows of `columns`, enlarged by a whole factor, with a caption below each.

    Args:
        pictures: Pictures of one size, see `view_colors`; floats in [0, 1], or bytes.
        captions: One for each picture. Lines that are too long are truncated.
        title: Text above the pictures, wrapped to the width of the sheet.
    """
    sheet = None
    caption_height = LINE_HEIGHT * max(caption.count("\n") + 1 for caption in captions)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        pixels = view_colors(np.asarray(picture)).transpose(1, 2, 0)
        if sheet is None:
            factor = max(1, round(MIN_SIDE / pixels.shape[1]))
            height, width = pixels.shape[0] * factor, pixels.shape[1] * factor
            row_height, sheet_width = height + MARGIN + caption_height, columns * (width + MARGIN) + MARGIN
            lines = _wrap(title, sheet_width - 2 * MARGIN) if title else []
            top_margin = MARGIN + (LINE_HEIGHT * len(lines) + MARGIN if lines else 0)
            sheet = Image.new("RGB", (sheet_width, -(-len(captions) // columns) * row_height + top_margin), "white")
            draw = ImageDraw.Draw(sheet)
            _write(draw, MARGIN, MARGIN, lines, sheet_width)
        left = MARGIN + index % columns * (width + MARGIN)
        top = top_margin + index // columns * row_height
        if pixels.dtype != np.uint8:
            pixels = (pixels * 255).round().astype(np.uint8)
        image = Image.fromarray(np.ascontiguousarray(pixels))
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top))
        _write(draw, left, top + height, caption.split("\n"), width)
    return sheet


def view_colors(pixels: Shaped[np.ndarray, "c h w"]) -> Shaped[np.ndarray, "3 h w"]:
    """Return the first three channels as colors, or the first as gray if there are fewer."""
    return np.broadcast_to(pixels[: 3 if len(pixels) >= 3 else 1], (3, *pixels.shape[1:]))


def _wrap(text: str, width: int) -> list[str]:
    """Break a text into lines that fit into `width` pixels, by the mean width of its characters."""
    mean = pillow_font(text).getlength(text.replace("\n", " ")) / len(text)
    return [part for line in text.split("\n") for part in textwrap.wrap(line, max(1, int(width / mean))) or [""]]


def _write(draw: ImageDraw.ImageDraw, left: int, top: int, lines: Sequence[str], width: int) -> None:
    """Write lines of text, each truncated to `width` pixels."""
    for number, line in enumerate(lines):
        font = pillow_font(line)
        while draw.textlength(line, font) > width and len(line) > 1:
            line = line[:-2] + "…"
        draw.text((left, top + number * LINE_HEIGHT), line, "black", font)


def fit_fonts(figure: Figure) -> None:
    """Set fonts that have the characters of all texts in a figure; report characters that no font has."""
    texts = figure.findobj(Text)
    families = font_families("".join(text.get_text() for text in texts))
    for text in texts:
        text.set_fontfamily(families)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure to a PNG file atomically, with fonts that have its characters."""
    fit_fonts(figure)  # has reported characters that no font has
    with atomic_write(path) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(partial, format="png", dpi=120)


def font_families(text: str) -> list[str]:
    """Return names of fonts that together have the characters of a text, matplotlib's default first.

    Characters that no font has are reported once on standard error.
    """
    return [DEFAULT_FONT, *(entry.name for entry in _find_fonts(_characters_to_draw(text)))]


def pillow_font(text: str) -> ImageFont.FreeTypeFont:
    """Return the font for Pillow that has most of the characters of a text."""
    needed = _characters_to_draw(text)
    files = [findfont(DEFAULT_FONT), *(entry.fname for entry in _find_fonts(needed))]
    return _load_font(max(files, key=lambda file: len(needed & _glyphs(file))), FONT_SIZE)


_load_font = lru_cache(maxsize=16)(ImageFont.truetype)


def _characters_to_draw(text: str) -> frozenset[str]:
    return frozenset(each for each in text if ord(each) >= LATIN and unicodedata.category(each) not in NO_GLYPH)


@lru_cache(maxsize=256)
def _find_fonts(needed: frozenset[str]) -> tuple[FontEntry, ...]:
    """Return few fonts that add what the default font lacks; report the characters that no font has."""
    missing, chosen = set(needed - _glyphs(findfont(DEFAULT_FONT))), []
    while missing:
        best = max(_regular_fonts(), key=lambda entry: len(missing & _glyphs(entry.fname)))
        if missing.isdisjoint(_glyphs(best.fname)):
            break
        chosen.append(best)
        missing -= _glyphs(best.fname)
    if new := sorted(missing - _reported):
        _reported.update(new)
        named = ", ".join(f"{each} (U+{ord(each):04X})" for each in new[:3])
        more = f" and {len(new) - 3:,} more" if len(new) > 3 else ""
        line = f"no installed font has {named}{more}: pictures show boxes; install one, e.g. Noto Sans CJK"
        create_console(stderr=True).print(line)
    return tuple(chosen)


@cache
def _regular_fonts() -> list[FontEntry]:
    """Return upright fonts of regular weight, sans serif first."""
    regular = [
        entry
        for entry in fontManager.ttflist
        if entry.style == "normal"
        and entry.weight in (400, "normal", "regular", "book")
        and not entry.name.replace(" ", "").startswith("LastResort")  # boxes for every character
    ]
    return sorted(regular, key=lambda entry: ("Sans" not in entry.name, entry.name))


@cache
def _glyphs(file: str) -> frozenset[str]:
    """Return the characters that a font file has; none if it cannot be scaled, as colored emoji cannot."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            font = get_font(file)
            return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
    except (OSError, RuntimeError, ValueError):
        return frozenset()
