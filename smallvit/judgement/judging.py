"""Judging a trained model: from a name and a configuration to a record, and to the files that show it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import scipy
import sklearn
from rich.console import Console
from rich.progress import Progress

from smallvit import datasets, hardware, learnt, trained
from smallvit.config import Config
from smallvit.datasets.corruptions import CORRUPTIONS, STRENGTHS
from smallvit.datasets.images import ImageDataset
from smallvit.datasets.listing import SPLITS
from smallvit.datasets.streaming import Files
from smallvit.errors import InputError, nearest
from smallvit.files import require_free
from smallvit.judgement import chance, evidence, metrics
from smallvit.judgement.case import Case, Condition, matched
from smallvit.judgement.metrics import Answers
from smallvit.options import require
from smallvit.ready import Ready, described, prepared
from smallvit.runs import Run
from smallvit.trained import Card
from smallvit.words import printable

CHOICES = (*SPLITS, "all")
"""What --split takes."""


def judge(
    name: str,
    config: Config,
    *,
    split: str = "test",
    flip: bool = False,
    robustness: bool = False,
    compare: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Judge the trained model `name` on a split of the configuration's data; returns what metrics.json says.

    Files go to `out`, by default into the run's folder, and nowhere for weights without a run. `compare` names a
    second model for the same images. Notes and progress go to `console`, by default standard error; `command` is what
    the record says of how it was made.

    Raises:
        InputError: no such model, data or split; they do not fit each other; there are files in `out` already; or the
            weights have changed meanwhile.
    """
    require(split in CHOICES, "split", split, f"one of {', '.join(CHOICES)}{nearest(split, CHOICES)}")
    folder = evidence.destination(name, config.data.data, split, out)
    cards = [described(name, "eval", config.model.arch)]
    cards += [described(compare, "--compare", None)] if compare is not None else []
    if folder is not None:
        require_free(folder, "--out", overwrite=overwrite)
    hardware.pick_device(config.compute.device)
    digests = [learnt.weights_sha256(card) for card in cards]
    console = console or Console(stderr=True)
    own = learnt.is_learnt(config.data.data, learnt.learnt_data(name))
    cases = _cases(cards, config, SPLITS if split == "all" else (split,), draw=own or split != "all")
    for note in _notes(cases):
        console.print(printable(note), markup=False, highlight=False, emoji=False, soft_wrap=True)
    spoilt: list[Condition] = [(kind, strength) for kind in CORRUPTIONS for strength in STRENGTHS]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        found = cases[0].ask([None, *spoilt] if robustness else [None], bar, flip=flip)
        others = [case.ask([None], bar, flip=flip)[None] for case in cases[1:]]
    if digests != [learnt.weights_sha256(card) for card in cards]:
        raise InputError(f"eval {name}: weights have changed while they were judged; judge them again")
    answers = found[None]
    record = {
        "name": printable(name),
        "data": printable(cases[0].dataset.name),
        "split": split,
        **metrics.figures(answers, cases[0].class_names),
        "left_out": len(cases[0].labels) - len(answers),
        "flip": flip,
        "robustness": _robustness(found) if robustness else None,
        "comparison": {"name": printable(compare), **compared(answers, others[0])} if others else None,
        "weights_sha256": digests[0],
        **_made_by(cases[0].model),
        "command": command,
    }
    if folder is not None:
        evidence.write(folder, record, cases[0], answers)
    return record


def _cases(cards: list[Card], config: Config, splits: tuple[str, ...], *, draw: bool) -> list[Case]:
    """Each model before the same images, at its own size unless the first is asked for another."""
    sizes = [config.data.img_size or cards[0].spec["img_size"], *(card.spec["img_size"] for card in cards[1:])]
    data = _read(config, sizes, draw)
    dataset = data[sizes[0]]
    if empty := [split for split in splits if not len(getattr(dataset, split))]:
        if len(splits) == 1:
            raise InputError(f"--split {empty[0]}: {dataset.name} has no such images; choose another split")
        splits = tuple(split for split in splits if split not in empty)
    known = [matched(card, data[size], config.data, splits) for card, size in zip(cards, sizes, strict=True)]
    if len(cards) > 1:
        _require_same_classes(cards[1], known[0][1], known[1][1])
    return [
        Case(
            model=prepared(card, size, config.compute.device, config.compute.amp),
            dataset=data[size],
            splits=splits,
            numbers=numbers,
            class_names=tuple(map(printable, class_names)),
        )
        for card, size, (numbers, class_names) in zip(cards, sizes, known, strict=True)
    ]


def _read(config: Config, sizes: Sequence[int], draw: bool) -> dict[int, ImageDataset]:
    """The same images at each size: all in memory, or all streamed, as the largest has to be."""
    found: dict[int, ImageDataset] = {}
    for size in sorted(set(sizes), reverse=True):
        options = {"img_size": size}
        if found:
            options["streaming"] = "on" if isinstance(found[max(sizes)].train, Files) else "off"
        found[size] = datasets.load(replace(config.data, **options), draw=draw)
    return found


def _require_same_classes(other: Card, ours: tuple[str, ...], theirs: tuple[str, ...]) -> None:
    if odd := sorted(set(ours) ^ set(theirs)):
        who = "only it knows" if odd[0] in theirs else "it does not know"
        raise other.error(f"the models have other classes ({who} {odd[0]!r}), so their answers cannot be compared")


def _notes(cases: Sequence[Case]) -> Iterator[str]:
    """What a person should know about the images."""
    case, dataset = cases[0], cases[0].dataset
    yield from dataset.notes
    for each in cases:
        yield from _learnt(each.model.card, each)
    if not trained.has_learnt_from(case.model.card, dataset) and dataset.drew_test and case.splits == ("test",):
        yield f"only a test split of {dataset.name} is judged; --split all judges all of it"
    present, known = len(dataset.class_names), len(case.class_names)
    if present < known:
        yield f"{present} of the model's {known} classes are in {dataset.name}; the others are not judged"


def _learnt(card: Card, case: Case) -> Iterator[str]:
    """Which of the images a model knows from its training."""
    if not trained.has_learnt_from(card, case.dataset):
        return
    if "train" in case.splits:
        yield f"{card.name} has learnt from images of train: this says nothing of others"
    elif case.splits == ("val",) and card.learnt is None:
        yield f"{card.name} may have learnt from these images: its weights do not say which it left out"
    elif case.splits == ("val",) and card.path.name == Run.BEST:
        yield f"the weights of {card.name} were chosen by these images: its accuracy is a little flattered"


def _made_by(model: Ready) -> dict[str, Any]:
    """Weights and machine that decide the figures."""
    return {
        "img_size": model.img_size,
        "precision": model.precision,
        "hardware": hardware.describe_hardware(model.device),
        "versions": hardware.versions() | {"scikit-learn": sklearn.__version__, "scipy": scipy.__version__},
        "git_revision": hardware.git_revision(),
    }


def _robustness(found: dict[Condition, Answers]) -> dict[str, dict[str, float]]:
    """Top-1 in per cent under each corruption, by its strength."""
    return {kind: {str(strength): found[kind, strength].top1 for strength in STRENGTHS} for kind in CORRUPTIONS}


def compared(answers: Answers, others: Answers) -> dict[str, Any]:
    """Two models on the images that both could be shown."""
    _, ours, theirs = np.intersect1d(answers.index, others.index, return_indices=True)
    return chance.paired(answers.correct[ours], others.correct[theirs])
