"""All that a run's folder tells for its page: how it went, how it was judged, where it looks. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from smallvit import headers, learnt, trained, watching
from smallvit.errors import InputError
from smallvit.pages import findings, forms, illustrations
from smallvit.pages.findings import ATTENTION, METRICS, WHATS
from smallvit.pages.illustrations import Gallery
from smallvit.runs import Run, best_epoch
from smallvit.trained import Card
from smallvit.watching import View

QUERIES = re.compile(r"qkv|kqv|\bq_proj\b|\.q\.")
"""In the names of attention's weights."""


@dataclass(frozen=True)
class Dossier:
    """A run, and what other verbs have found of its best weights."""

    view: View
    card: Card | None
    """What these weights say about themselves; None before the first epoch is finished."""
    metrics: dict[str, Any] | None = None
    attention: dict[str, Any] | None = None
    missing: tuple[str, ...] = ()
    """What was not found, and why, a line each."""
    lacking: tuple[str, ...] = ()
    """The files that may be computed."""

    @property
    def folder(self) -> Path:
        """Where everything lies."""
        return self.view.folder

    @property
    def summary(self) -> dict[str, Any]:
        """The outcome; empty while there is none."""
        return self.view.summary or {}

    @cached_property
    def best(self) -> dict[str, Any] | None:
        """The epoch with the best validation accuracy; None where none was validated."""
        return best_epoch(self.view.history)

    @cached_property
    def gallery(self) -> Gallery:
        """Its pictures."""
        return illustrations.gathered(self.folder, self.metrics, self.attention, self.card)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is missing, and why, a line each."""
        return (*self.missing, *self.gallery.notes)


def read(folder: Path, reasons: dict[str, str] | None = None) -> Dossier:
    """What is there of a run; results of other weights than its present best are left out.

    `reasons` says why results could not be computed, by their file.

    Raises:
        InputError: there is no run in the folder, or one of its own files is damaged.
    """
    view = watching.read(folder)
    _require_whole(view)
    if not (folder / Run.BEST).exists():
        return Dossier(view, None)
    card = trained.card(str(folder), "report")
    names = [name for name, there in ((METRICS, view.summary is not None), (ATTENTION, attends(folder))) if there]
    digest = learnt.weights_sha256(card)
    found = {name: findings.read(view, card, name, digest) for name in names}
    absent = {name: (reasons or {}).get(name, each.why) for name, each in found.items() if each.record is None}
    if view.summary is None:
        absent = {METRICS: "the test is used once, when the run is finished"} | absent
    return Dossier(
        view,
        card,
        *(found[name].record if name in found else None for name in (METRICS, ATTENTION)),
        missing=tuple(f"{WHATS[name]} are missing: {why}" for name, why in absent.items()),
        lacking=tuple(name for name, each in found.items() if each.lacking),
    )


def attends(folder: Path) -> bool:
    """Whether a run's model has attention, as far as the names of its weights tell; CNNs have none."""
    return any(QUERIES.search(name) for name in headers.shapes(folder / Run.BEST))


def require_apart(folders: Sequence[Path]) -> None:
    """Check that no run is there twice.

    Raises:
        InputError: one is.
    """
    seen = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise InputError(f"{folder}: is there twice")
        seen.add(folder.resolve())


def _require_whole(view: View) -> None:
    """Check what the run itself has recorded.

    Raises:
        InputError: it is damaged.
    """
    for number, line in enumerate(view.history, 1):
        wrong = forms.misfits(line, forms.LINE)
        if wrong or (line["val_top1"] is None) != (line["val_loss"] is None):
            what = f" ({wrong[0]!r})" if wrong else ""
            raise InputError(f"{view.folder / Run.METRICS}: line {number} is damaged{what}; remove it")
    if view.summary is not None and (wrong := forms.misfits(view.summary, forms.SUMMARY)):
        file = view.folder / Run.SUMMARY
        raise InputError(f"{file}: it lacks {wrong[0]!r} (or it is damaged); remove it, and --resume evaluates again")
