"""All that a run's folder tells for its page: how it went, how it was judged, where it looks. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from smallvit import headers, learnt, trained, watching
from smallvit.comparison import standings
from smallvit.errors import InputError
from smallvit.runs import Run, best_epoch
from smallvit.trained import Card
from smallvit.watching import View

METRICS, ATTENTION = f"{Run.EVAL}/test/metrics.json", f"{Run.ATTEND}/attention.json"
"""What `smallvit eval` and `smallvit attend` leave in a run's folder."""
VERBS = {METRICS: "eval", ATTENTION: "attend"}
WHATS = {METRICS: "Test results", ATTENTION: "Attention maps"}
QUERIES = re.compile(r"qkv|kqv|\bq_proj\b|\.q\.")
"""In the names of attention's weights."""
JUDGED = ("top1", "images", "interval", "classes", "confusion", "reliability", "ece")
"""Of metrics.json, what is shown."""


@dataclass(frozen=True)
class Dossier:
    """A run, and what other verbs have found of its best weights."""

    view: View
    card: Card | None
    """What these weights say about themselves; None before the first epoch is finished."""
    metrics: dict[str, Any] | None = None
    attention: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    """What is missing, and why, a line each."""

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


def read(folder: Path, reasons: dict[str, str] | None = None) -> Dossier:
    """What is there of a run; results of other weights than its present best are left out.

    `reasons` says why results could not be computed, by their file.

    Raises:
        InputError: there is no run in the folder, or one of its own files is damaged.
    """
    view = watching.read(folder)
    if view.summary is not None:
        view = standings.finished(folder)
    if not (folder / Run.BEST).exists():
        return Dossier(view, None)
    card = trained.card(str(folder), "report")
    digest, found, notes = learnt.weights_sha256(card), {}, []
    for name in VERBS if attends(folder) else (METRICS,):
        found[name], why = result(folder, name, digest)
        if name == METRICS and view.summary is None:
            why = "the test is used once, when the run is finished"
        why = (reasons or {}).get(name, why)
        if found[name] is None:
            notes.append(f"{WHATS[name]} are missing: {why}")
    return Dossier(view, card, found[METRICS], found.get(ATTENTION), tuple(notes))


def result(folder: Path, name: str, digest: str) -> tuple[dict[str, Any] | None, str]:
    """What a verb found of the weights with this SHA-256; or nothing, and why."""
    again = f"smallvit {VERBS[name]} {folder}"
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, f"{again} computes them"
    except ValueError:
        return None, f"{name} is damaged; {again} --overwrite writes it anew"
    if not isinstance(found, dict) or (name == METRICS and any(key not in found for key in JUDGED)):
        return None, f"{name} is damaged; {again} --overwrite writes it anew"
    if found.get("weights_sha256") != digest:
        return None, f"{name} is about other weights than {Run.BEST} holds now; {again} --overwrite writes it anew"
    return found, ""


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
