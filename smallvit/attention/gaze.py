"""Pictures of where models look: heat over images. Takes plain arrays, imports no torch.

A map is enlarged to the side of the drawn image, token by token or smoothly (bilinear), put on a perceptually uniform
colour scale, and laid over the image in grey. Values are told in multiples of an even share: what each token would
have if all had the same.

Axes: h heads, i j rows and columns of tokens, c channels, y x pixels, a pixels of a drawn side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import colormaps
from PIL import Image

from smallvit.attention.mosaic import LETTER, Mosaic, shortened

COLOURS, SHARE = "inferno", 0.65
"""The scale, and its share in what is seen; the image has the rest."""
LARGE, SMALL = 192, 128
"""Sides of drawn images in pixels, at most."""
GAP, LINE = 8, 18
MOST = 12
"""Rows of layers, and columns of heads, in a picture."""
KINDS = ("attention, last layer,\nmean over heads", "rollout", "relevance for\nthe class predicted")
TRUE = "relevance for\nthe true class"

Pixels = UInt8[np.ndarray, "c y x"]


@dataclass(frozen=True, kw_only=True)
class View:
    """What a model makes of an image."""

    predicted: str
    probability: float
    maps: tuple[Float[np.ndarray, "i j"], ...]
    """One for each of `KINDS`."""


def heat(
    pixels: Pixels, weights: Float[np.ndarray, "i j"], low: float, high: float, side: int, *, smooth: bool
) -> Float[np.ndarray, "a a 3"]:
    """The image in grey under a map's colours, from the darkest at `low` to the brightest at `high`."""
    grey = natural(pixels, side).mean(axis=2, keepdims=True)
    scaled = ((weights - low) / max(high - low, 1e-12)).clip(0, 1)
    how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    values = np.asarray(Image.fromarray(scaled.astype(np.float32)).resize((side, side), how))
    return SHARE * colormaps[COLOURS](values)[..., :3] + (1 - SHARE) * grey


def natural(pixels: Pixels, side: int) -> Float[np.ndarray, "a a 3"]:
    """The image as it is."""
    colours = np.ascontiguousarray(np.broadcast_to(pixels.transpose(1, 2, 0), (*pixels.shape[1:], 3)))
    how = Image.Resampling.BILINEAR if side % len(colours) else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(colours).resize((side, side), how)) / 255


def drawn_side(size: int, most: int) -> int:
    """How large an image is drawn: by a whole factor where it is enlarged, at most `most` pixels."""
    return max(1, most // size) * size if size <= most else most


def in_even_shares(weights: Float[np.ndarray, "i j"]) -> Float[np.ndarray, "i j"]:
    """A map in multiples of what each token would have if all had the same."""
    return weights / max(float(weights.mean()), 1e-12)


def evenly(number: int, most: int) -> list[int]:
    """At most `most` of so many positions, evenly spread, the first and the last among them."""
    return np.linspace(0, number - 1, min(number, most)).round().astype(int).tolist()


def draw_overview(
    pictures: Sequence[Pixels],
    captions: Sequence[str],
    views: Mapping[str, Sequence[View]],
    path: Path,
    kinds: Sequence[str] = KINDS,
) -> None:
    """Draw a row for each image: itself, and for each model, by its name, its maps, whose headings are `kinds`."""
    side = drawn_side(pictures[0].shape[-1], LARGE)
    top, first, block = 5 * LINE, side + 4 * GAP, len(KINDS) * (side + GAP)
    rows = [top + index * (side + 2 * LINE + GAP) for index in range(len(pictures))]
    page = Mosaic(first + len(views) * (block + 2 * GAP) - 2 * GAP, rows[-1] + side + 4 * LINE)
    for y, pixels, caption in zip(rows, pictures, captions, strict=True):
        page.write(GAP + side / 2, y, shortened(caption, side), ha="center")
        page.paste(GAP, y, natural(pixels, side))
    for number, (name, seen) in enumerate(views.items()):
        left = first + number * (block + 2 * GAP)
        middle = left + (block - GAP) / 2
        page.write(middle, 2 * LINE, shortened(name, 0.8 * block), size=10, ha="center", weight="bold")
        for column, kind in enumerate(kinds):
            page.write(left + column * (side + GAP) + side / 2, top - LINE - GAP, kind, ha="center")
        for y, pixels, view in zip(rows, pictures, seen, strict=True):
            answer = f"{shortened(view.predicted, block - 8 * LETTER)}  {100 * view.probability:.0f} %"
            page.write(middle, y, answer, ha="center")
            _put_view(page, left, y, pixels, view, side)
    told = (
        "Colours run from the least to the largest value of each panel. Both stand below it,",
        "in multiples of an even share. Tokens are enlarged smoothly (bilinear).",
    )
    page.write(GAP, page.height - GAP, (" " if len(views) > 1 else "\n").join(told))
    page.save(path)


def draw_layers(
    pixels: Pixels, caption: str, maps: Mapping[str, Float[np.ndarray, "h i j"]], path: Path, most: int = MOST
) -> None:
    """Draw an image, and for each layer, by its name, a row of its heads' maps: of `most` layers, evenly chosen."""
    names, heads = list(maps), max(len(each) for each in maps.values())
    chosen, columns = evenly(len(names), most), min(heads, MOST)
    side = drawn_side(pixels.shape[-1], SMALL)
    first, top = 2 * side + 3 * GAP + 2 * LINE, LINE + GAP
    told = _told(len(chosen), len(names), columns, heads)
    rows = [top + place * (side + LINE + GAP) for place in range(len(chosen))]
    bottom = max(rows[-1] + side, top + 2 * side) + GAP + LINE * len(told)
    page = Mosaic(max(first + columns * (side + GAP), int(max(map(len, told)) * LETTER)), bottom + GAP)
    page.write(GAP + side, top, shortened(caption, 2 * side), ha="center")
    page.paste(GAP, top, natural(pixels, 2 * side))
    for y, index in zip(rows, chosen, strict=True):
        page.write(first - GAP, y + side / 2, _folded(names[index], side), ha="right", va="center", rotation=90)
        _put_heads(page, first, y, pixels, maps[names[index]], evenly(len(maps[names[index]]), columns), side)
    page.write(GAP, bottom, "\n".join(told))
    page.save(path)


def _put_view(page: Mosaic, left: int, top: int, pixels: Pixels, view: View, side: int) -> None:
    """A model's maps of an image, from their least values on, and what these and the largest are."""
    for column, weights in enumerate(view.maps):
        shares, x = in_even_shares(weights), left + column * (side + GAP)
        low, high = float(shares.min()), float(shares.max())
        page.paste(x, top, heat(pixels, shares, low, high, side, smooth=True))
        page.write(x + side / 2, top + side + LINE, f"{low:.2g} – {high:.2g}", size=7, ha="center", color="0.3")


def _put_heads(
    page: Mosaic, left: int, top: int, pixels: Pixels, maps: Float[np.ndarray, "h i j"], heads: Sequence[int], side: int
) -> None:
    """Maps of a layer's heads, from 0 on, and what their largest values are."""
    for column, head in enumerate(heads):
        shares, x = in_even_shares(maps[head]), left + column * (side + GAP)
        page.paste(x, top, heat(pixels, shares, 0, float(shares.max()), side, smooth=False))
        page.write(x, top, f"head {head}", size=7)
        page.write(x + side, top, f"{shares.max():.2g}", size=7, ha="right", color="0.3")


def _told(rows: int, layers: int, columns: int, heads: int) -> list[str]:
    """Lines that say what is drawn."""
    told = [
        "What the tokens attend to that the classifier reads: the class token, or the mean of those of the image.",
        "Colours run from 0 to the largest value, above each panel in multiples of an even share. Squares are tokens.",
    ]
    thinned = [f"{n} of {m} {what}" for n, m, what in ((rows, layers, "layers"), (columns, heads, "heads")) if n < m]
    return told + ([f"Shown are {' and '.join(thinned)}, evenly chosen."] if thinned else [])


def _folded(name: str, width: int) -> str:
    """A layer's name in two lines, where it is long."""
    parts = name.split(".")
    half = len(parts) // 2
    return name if len(name) * LETTER <= width else f"{'.'.join(parts[:half])}.\n{'.'.join(parts[half:])}"
