"""The folder of files that `attend` leaves: pictures, and the record of them."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.progress import Progress

from smallvit import trained
from smallvit.attention import gaze, heads
from smallvit.attention.sight import Sight
from smallvit.errors import InputError
from smallvit.files import partial_name
from smallvit.judgement import evidence
from smallvit.runs import Run

OVERVIEW, HEADS, TEMPERATURES, FIGURES = "overview.png", "heads.png", "temperatures.png", "attention.json"
LAYERS, LAYERS_FORM = "layers-{}.png", re.compile(r"layers-[0-9]+\.png")
"""The picture of an image, by its number."""
ASIDE = partial_name("files")
"""Of the folder in which they are written."""


def destination(name: str, data: str | None, split: str, out: str | None) -> Path:
    """Where files go: to `out`, or into the run's folder; `data` is None for image files.

    attend/ is that of the run's own test; other splits, data and files have folders of other names beside it.

    Raises:
        InputError: `name` is no run's folder, and there is no `out`.
    """
    if out is not None:
        return Path(os.path.expanduser(out))
    run = Path(os.path.expanduser(name))
    if not trained.is_path(name) or not os.path.isdir(run):
        raise InputError(f"attend {name}: not the folder of a run, in which the files could lie; give --out DIR")
    shown = "files" if data is None else evidence.destination(name, data, split, None).name
    return run / (Run.ATTEND if shown == "test" else f"{Run.ATTEND}-{shown}")


def written(folder: Path) -> list[Path]:
    """The files of ours that are in a folder, pictures of single images by their numbers, the record last."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    single = sorted(filter(LAYERS_FORM.fullmatch, names), key=lambda name: (len(name), name))
    return [folder / name for name in (OVERVIEW, HEADS, TEMPERATURES, *single, FIGURES) if name in names]


def write(folder: Path, record: dict[str, Any], models: Mapping[str, Sight], layers: int, bar: Progress) -> None:
    """Draw everything, and put it, when it is whole, in place of what was drawn before; other files stay."""
    first, *_ = models.values()
    pictures = [example.pixels for example in first.shown]
    captions = [example.label or os.path.basename(example.source) for example in first.shown]
    views = {title: sight.views for title, sight in models.items()}
    records = {title: sight.layers for title, sight in models.items()}
    courses = {title: sight.course for title, sight in models.items()}
    kinds = (*gaze.KINDS[:-1], gaze.TRUE) if record["classes_of"] == "label" else gaze.KINDS
    with _together(folder) as aside:
        gaze.draw_overview(pictures, captions, views, aside / OVERVIEW, kinds)
        heads.draw_heads(records, aside / HEADS)
        heads.draw_temperatures(records, courses, aside / TEMPERATURES)
        for index in bar.track(range(len(pictures)), description="drawing"):
            maps = {layer: each[index] for layer, each in first.maps.items()}
            gaze.draw_layers(pictures[index], captions[index], maps, aside / LAYERS.format(index + 1), layers)
        (aside / FIGURES).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _together(folder: Path) -> Iterator[Path]:
    """Give a folder to write to, from which files come into this one at the end; nothing is left of a failure."""
    made = [parent for parent in (folder, *folder.absolute().parents) if not os.path.exists(parent)]
    aside = folder / ASIDE
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        for old in reversed(written(folder)):  # the record first: where it is, all are
            old.unlink()
        for new in written(aside):
            os.replace(new, folder / new.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # no longer empty
                parent.rmdir()
