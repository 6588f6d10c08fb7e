"""Where trained models look: from names and images to a folder of pictures and figures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress

from smallvit import datasets, hardware, learnt, trained
from smallvit.attention import examples, folder, gaze
from smallvit.attention.examples import Example
from smallvit.attention.sight import Sight, require_attention, see
from smallvit.config import Config
from smallvit.datasets.listing import SPLITS
from smallvit.errors import InputError, nearest
from smallvit.files import require_free
from smallvit.options import require
from smallvit.ready import Ready, described, prepared
from smallvit.trained import Card

CLASSES = ("predicted", "label")
"""What relevance may be for."""


def attend(
    names: Sequence[str],
    images: Sequence[str | Path],
    config: Config,
    *,
    split: str = "test",
    count: int = 8,
    layers: int = gaze.MOST,
    classes_of: Literal["predicted", "label"] = "predicted",
    out: Path,
    overwrite: bool = False,
    console: Console | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Draw where the model `names[0]` looks, beside `names[1]` if there is one; returns what attention.json says.

    They are shown image files, or else `count` images of a split of the configuration's data. The picture of a single
    image has at most `layers` layers; relevance is that for the classes predicted, or the true ones. Files go to the
    folder `out`. What a person should know, and progress, goes to `console`, by default standard error; `command` is
    what the record is to say of how it was made.

    Raises:
        InputError: no such model, data, split or image, a model without attention, or files in `out` already.
    """
    for name, choices, given in (("split", SPLITS, split), ("classes_of", CLASSES, classes_of)):
        require(given in choices, name, given, f"one of {', '.join(choices)}{nearest(given, choices)}")
    for name, number in (("count", count), ("layers", layers)):
        require(number >= 1, name, number, "at least 1")
    require_free(out, "--out", overwrite=overwrite)
    console = console or Console(stderr=True)
    models = _models(names, config)
    for model in models:
        require_attention(model)
    told = [console, Console(quiet=True)]  # of what is left out, once
    paths = [str(path) for path in images]
    found = [_shown(model, paths, config, split, count, each) for model, each in zip(models, told, strict=False)]
    data, shown = zip(*found, strict=True)
    classes = [_labels(*pair) if classes_of == "label" else None for pair in zip(models, shown, strict=True)]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("looking", total=sum(map(len, shown)))
        seen = [see(*three, lambda done: bar.advance(task, done)) for three in zip(models, shown, classes, strict=True)]
        record = _record(seen) | {
            "data": data[0],
            "split": None if images else split,
            "classes_of": classes_of,
            "command": command,
        }
        folder.write(out, record, dict(zip(titles(names), seen, strict=True)), layers, bar)
    return record


def _record(seen: Sequence[Sight]) -> dict[str, Any]:
    """What there is to know of one model, or of two, and what made it."""
    return {
        **seen[0].record,
        "compared": seen[1].record if len(seen) > 1 else None,
        "hardware": hardware.describe_hardware(seen[0].model.device),
        "versions": hardware.versions(),
        "git_revision": hardware.git_revision(),
    }


def _models(names: Sequence[str], config: Config) -> list[Ready]:
    """The models, no two of which are the same."""
    cards = [described(names[0], "attend", config.model.arch)]
    cards += [described(name, "--compare", None) for name in names[1:]]
    if len(set(map(_weights, cards))) < len(cards):
        raise cards[1].error("the same model; name another")
    compute, size = config.compute, config.data.img_size
    hardware.pick_device(compute.device)
    return [prepared(card, size or card.spec["img_size"], compute.device, compute.amp) for card in cards]


def _weights(card: Card) -> str:
    """What tells a model from others, by whichever name or path."""
    return learnt.weights_sha256(card) or card.tagged


def _shown(
    model: Ready, paths: Sequence[str], config: Config, split: str, count: int, console: Console
) -> tuple[str | None, list[Example]]:
    """The name of the data, None for files, and the images that a model is shown, at its size."""
    if paths:
        return None, examples.of_files(paths, model.img_size, model.in_chans, console)
    dataset = datasets.load(replace(config.data, img_size=model.img_size))
    trained.require_channels(model.card, dataset)
    trained.require_same_test(model.card, dataset, config.data)
    if split != "train":
        trained.require_unchanged(model.card, dataset, config.data, split)
    return dataset.name, examples.of_split(dataset, split, count, console)


def _labels(model: Ready, shown: Sequence[Example]) -> list[int]:
    """The true classes, as the model numbers them."""
    for example in shown:
        if example.label is None:
            raise InputError("--classes-of label: nothing says the classes of image files; leave it out")
        if example.label not in model.class_names:
            raise model.card.error(f"--classes-of label: the model has no class {example.label!r}; leave it out")
    return [model.class_names.index(example.label) for example in shown]


def titles(names: Sequence[str]) -> list[str]:
    """Short names of models that tell them apart."""
    short = [
        os.path.basename(os.path.abspath(os.path.expanduser(name))) if trained.is_path(name) else name for name in names
    ]
    return short if len(set(short)) == len(names) else list(names)
