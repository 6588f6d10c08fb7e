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

from smallvit.pages.dossier import ATTENTION, METRICS, Dossier

MISTAKES, PREDICTIONS = (Path(METRICS).with_name(name) for name in ("mistakes.png", "predictions.csv"))
QUALITY = 88
"""Of WebP: a tenth of the PNG's bytes, and no difference that is seen."""
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


def mistakes(run: Dossier) -> Picture | None:
    """The most confident mistakes of the test; None where there are none, or no picture of them."""
    wrong = run.metrics["images"] - sum(row[number] for number, row in enumerate(run.metrics["confusion"]))
    alt = f"Test images that were judged wrong, the most confident first; {wrong:,} of {run.metrics['images']:,} were."
    if told := _surest(run.folder / PREDICTIONS):
        alt += f" Among them {'; '.join(told)}."
    caption = "Test images, the most confident mistakes first: what they are, what they were taken for, how surely."
    return _picture(run.folder / MISTAKES, "Most confident mistakes", caption, alt)


def attention(run: Dossier) -> list[Picture]:
    """The pictures of a run's attention that are there."""
    if run.attention is None:
        return []
    folder, images, layers = (run.folder / ATTENTION).parent, run.attention["images"], run.attention["layers"]
    words = [_answer(image) for image in images]
    alt = f"{len(images)} images, and heat over each: {'; '.join(words)}."
    overview = "Attention of the last layer, rollout through all layers, and relevance for the class."
    entropy, distance = (_across(layers, name) for name in ("entropy", "distance"))
    heads = f"Mean over heads, from the first layer to the last: entropy {entropy} nats, distance {distance} pixels."
    shown = [
        _picture(folder / "overview.png", "Images, and what is looked at", overview, alt),
        _picture(folder / "heads.png", "Heads", "How widely and how far each head looks, layer by layer.", heads),
    ]
    if any(layer.get("temperature") for layer in layers):
        alt = f"What scores are multiplied by, mean over heads, layer by layer: {_across(layers, 'temperature')}."
        shown.append(_picture(folder / "temperatures.png", "Temperatures", "Of each head, as learnt (LSA).", alt))
    for number, image in enumerate(words, 1):
        caption = f"{image}, in every layer and head."
        alt = f"Attention of {len(layers)} layers over one image: {image}."
        shown.append(_picture(folder / f"layers-{number}.png", f"Layers, image {number}", caption, alt, folded=True))
    return [each for each in shown if each is not None]


def _picture(path: Path, title: str, caption: str, alt: str, *, folded: bool = False) -> Picture | None:
    """A picture from its file; None where there is none."""
    if not path.exists():
        return None
    file = io.BytesIO()
    with Image.open(path) as image:
        ground = Image.new("RGB", image.size, "white")
        ground.paste(image, mask=image.getchannel("A") if "A" in image.getbands() else None)
        ground.save(file, "WEBP", quality=QUALITY)
    source = f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
    width, height = ground.size
    return Picture(title=title, caption=caption, alt=alt, source=source, width=width, height=height, folded=folded)


def _surest(path: Path) -> list[str]:
    """The most confident mistakes in words; none where no file says them."""
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
