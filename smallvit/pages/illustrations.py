"""Pictures that a run's folder holds, for its page, each with what is seen there in words. Imports no torch."""

from __future__ import annotations

import base64
import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from smallvit.errors import first_line
from smallvit.pages.findings import ATTENTION, METRICS
from smallvit.trained import Card

MISTAKES, PREDICTIONS = (Path(METRICS).with_name(name) for name in ("mistakes.png", "predictions.csv"))
QUALITY = 88
"""Of WebP: a tenth of the PNG's bytes, and no difference that is seen."""
LARGEST = 16_383
"""Pixels of a side that WebP can have."""
TOLD = 3
"""Mistakes that are told one by one."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture of the page."""

    title: str
    caption: str
    alt: str
    source: str
    """The picture itself, as an address."""
    width: int
    height: int
    folded: bool = False
    """Whether it is shown only to those who ask."""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """The pictures of a run's page that are there."""

    mistakes: Picture | None
    attention: tuple[Picture, ...]
    notes: tuple[str, ...]
    """What is damaged, a line each."""


class _Wall:
    """Pictures of a run's folder; what is damaged there is noted instead."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pictures: list[Picture] = []
        self.notes: list[str] = []

    def hang(self, name: Path, title: str, caption: str, alt: str, *, folded: bool = False) -> None:
        """Add the picture in a file, no larger than WebP can have it, if the file is there."""
        file = io.BytesIO()
        try:
            with Image.open(self.folder / name) as image:
                ground = Image.new("RGB", image.size, "white")
                ground.paste(image, mask=image.getchannel("A") if "A" in image.getbands() else None)
        except FileNotFoundError:
            return
        except Exception as error:  # whatever a damaged file provokes
            self.note(name, error)
            return
        if (whole := max(ground.size)) > LARGEST:
            ground.thumbnail((LARGEST, LARGEST))
            caption += f" Shrunk to {100 * LARGEST / whole:.0f} %; whole, it is {name} in the run's folder."
        ground.save(file, "WEBP", quality=QUALITY)
        source = f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
        sides = dict(zip(("width", "height"), ground.size, strict=True))
        self.pictures.append(Picture(title=title, caption=caption, alt=alt, source=source, folded=folded, **sides))

    def note(self, name: Path, error: Exception) -> None:
        """Say that a file is damaged."""
        self.notes.append(f"{name} is missing here, since it is damaged ({first_line(error)})")


def gathered(
    folder: Path, metrics: dict[str, Any] | None, attention: dict[str, Any] | None, card: Card | None
) -> Gallery:
    """The pictures of the test and of the attention that were found in a run's folder."""
    tested, looked = _Wall(folder), _Wall(folder)
    if metrics is not None:
        _hang_mistakes(tested, metrics)
    if attention is not None:
        _hang_attention(looked, attention, card)
    return Gallery(
        mistakes=next(iter(tested.pictures), None),
        attention=tuple(looked.pictures),
        notes=(*tested.notes, *looked.notes),
    )


def _hang_mistakes(wall: _Wall, metrics: dict[str, Any]) -> None:
    """The most confident mistakes of the test."""
    wrong = metrics["images"] - sum(row[number] for number, row in enumerate(metrics["confusion"]))
    alt = f"Test images that were judged wrong, the most confident first; {wrong:,} of {metrics['images']:,} were."
    try:
        if told := _surest(wall.folder / PREDICTIONS):
            alt += f" Among them {'; '.join(told)}."
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        wall.note(PREDICTIONS, error)
    caption = "Test images, the most confident mistakes first: what they are, what they were taken for, how surely."
    wall.hang(MISTAKES, "Most confident mistakes", caption, alt)


def _hang_attention(wall: _Wall, found: dict[str, Any], card: Card | None) -> None:
    """Where the model looks: all images, then heads, temperatures, and every layer over each image."""
    folder, images, layers = Path(ATTENTION).parent, found["images"], found["layers"]
    words = [_answer(image) for image in images]
    alt = f"{len(images)} images, and heat over each: {'; '.join(words)}."
    caption = f"{_shown(found, card)} Attention of the last layer, rollout through all layers, relevance for the class."
    wall.hang(folder / "overview.png", "Images, and what is looked at", caption, alt)
    entropy, distance = (_across(layers, name) for name in ("entropy", "distance"))
    alt = f"Mean over heads, from the first layer to the last: entropy {entropy} nats, distance {distance} pixels."
    wall.hang(folder / "heads.png", "Heads", "How widely and how far each head looks, layer by layer.", alt)
    if any(layer.get("temperature") for layer in layers):
        alt = f"What scores are multiplied by, mean over heads, layer by layer: {_across(layers, 'temperature')}."
        wall.hang(folder / "temperatures.png", "Temperatures", "Of each head, as learnt (LSA).", alt)
    for number, image in enumerate(words, 1):
        caption = f"{image}, in every layer and head."
        alt = f"Attention of {len(layers)} layers over one image: {image}."
        wall.hang(folder / f"layers-{number}.png", f"Layers, image {number}", caption, alt, folded=True)


def _shown(found: dict[str, Any], card: Card | None) -> str:
    """Which images the model was shown, in a sentence."""
    count, data, split = len(found["images"]), found.get("data"), found.get("split")
    if "split" not in found:
        return f"{count} images."
    if data is None or split is None:
        return f"{count} image files that somebody chose, not images of the run's own test."
    spread = "evenly spread over the classes"
    if card is None or data != card.data:
        return f"{count} images of other data ({data}, {split}), {spread}."
    own = {"test": "the run's own test", "val": "its validation", "train": "those that it learnt from"}
    return f"{count} images of {own.get(split, split)}, {spread}."


def _surest(path: Path) -> list[str]:
    """The most confident mistakes in words; none where no file says them.

    Raises:
        OSError, ValueError, KeyError, TypeError, csv.Error: the file is damaged.
    """
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        wrong = [row for row in csv.DictReader(file) if row["label"] != row["predicted"]]
    wrong.sort(key=lambda row: -float(row["probability"]))
    return [
        f"{row['label']} taken for {row['predicted']} ({100 * float(row['probability']):.0f} %)" for row in wrong[:TOLD]
    ]


def _answer(image: dict[str, Any]) -> str:
    """What an image is, and what it was taken for."""
    sure = f"{100 * image['probability']:.0f} %"
    if image.get("label") in (None, image["predicted"]):
        return f"{image['predicted']} ({sure})"
    return f"{image['label']}, taken for {image['predicted']} ({sure})"


def _across(layers: Sequence[dict[str, Any]], name: str) -> str:
    """A figure's mean over heads, in every layer that has it."""
    return ", ".join(f"{statistics.fmean(layer[name]):.3g}" for layer in layers if layer.get(name))
