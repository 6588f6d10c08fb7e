"""What `smallvit eval` and `smallvit attend` found of a run, if it is whole and of this run. Imports no torch."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import Any

from smallvit.pages import forms
from smallvit.runs import Run
from smallvit.trained import Card
from smallvit.watching import View

METRICS, ATTENTION = f"{Run.EVAL}/test/metrics.json", f"{Run.ATTEND}/attention.json"
"""What `smallvit eval` and `smallvit attend` leave in a run's folder."""
VERBS = {METRICS: "eval", ATTENTION: "attend"}
WHATS = {METRICS: "Test results", ATTENTION: "Attention maps"}
FORMS = {METRICS: forms.METRICS, ATTENTION: forms.ATTENTION}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a verb has found, or why there is none."""

    record: dict[str, Any] | None = None
    why: str = ""
    lacking: bool = False
    """Whether it is to be computed: what is of other conditions somebody has asked for, and it stays."""


def read(view: View, card: Card, name: str, digest: str | None) -> Finding:
    """What a verb found of a run's best weights, whose SHA-256 is `digest`; METRICS: on the test as the run had it."""
    verb = again(view, name)
    try:
        found = json.loads((view.folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Finding(why=f"{shlex.join(verb)} computes them", lacking=True)
    except OSError as error:
        return Finding(why=f"{name} cannot be read ({error.strerror})", lacking=True)
    except (ValueError, RecursionError):
        found = None
    anew = shlex.join([*verb, "--overwrite"])
    if not isinstance(found, dict) or (wrong := _damage(found, name)):
        what = f" ({', '.join(map(repr, wrong))})" if isinstance(found, dict) else ""
        return Finding(why=f"{name} is damaged{what}; {anew} writes it anew", lacking=True)
    if found.get("weights_sha256") != digest:
        why = f"{name} is about other weights than {Run.BEST} holds now; {anew} writes it anew"
        return Finding(why=why, lacking=True)
    if name == METRICS and (others := _other_conditions(found, own_test(view, card))):
        why = f"{name} is of another test than the run's own ({others}); {anew} puts the run's own in its place"
        return Finding(why=why)
    return Finding(record=found)


def own_test(view: View, card: Card) -> dict[str, Any]:
    """What metrics.json says of the test of a finished run."""
    return {
        "split": "test",
        "data": card.data,
        "img_size": (card.spec or {}).get("img_size"),
        "flip": view.config.augment.test_flip,
        "images": view.summary["test_images"],
    }


def again(view: View, name: str) -> list[str]:
    """The command that finds it."""
    flip = ["--flip"] if name == METRICS and view.config.augment.test_flip else []
    return ["smallvit", VERBS[name], str(view.folder), *flip]


def _damage(found: dict[str, Any], name: str) -> list[str]:
    """The keys that are not as they should be."""
    wrong = forms.misfits(found, FORMS[name])
    return wrong or (forms.disagreement(found) if name == METRICS else [])


def _other_conditions(found: dict[str, Any], own: dict[str, Any]) -> str:
    """In what a test is another; empty where it is the same."""
    return ", ".join(f"{name} {found[name]}, not {value}" for name, value in own.items() if found[name] != value)
