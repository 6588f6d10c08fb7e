"""Notes beside the tables of RESULTS.md, in which figures are computed from the records. Needs no torch.

They stand in results/notes/NAME-BUDGET.md (with - for the / of an experiment's name); figures are expressions:

    With both plugins {{ top1("vit+spt+lsa") }}, which is {{ gain("vit+spt+lsa") }} points more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined, TemplateError

from smallvit.errors import InputError
from smallvit.reproduction.outcomes import Outcome, outcomes, published_gain
from smallvit.reproduction.records import Record


def filled(note: Path, name: str, budget: float, found: Sequence[Record]) -> str:
    """A note with its figures.

    Raises:
        InputError: it asks for what no record has.
    """
    try:
        template = Environment(undefined=StrictUndefined, autoescape=False).from_string(note.read_text())
        return template.render(figures(name, budget, found)).strip()
    except (TemplateError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{note}: {type(error).__name__}: {error}") from None


def figures(name: str, budget: float, found: Sequence[Record]) -> dict[str, Callable[..., str]]:
    """What notes may ask for: figures of a model (by its label) at the note's budget, of this experiment or another."""

    def outcome(label: str, experiment: str | None = None) -> Outcome:
        return {each.trial.label: each for each in outcomes(experiment or name, budget, found)}[label]

    return {
        "top1": lambda label, **where: f"{outcome(label, **where).top1:.2f}",
        "gain": lambda label, **where: f"{outcome(label, **where).gain:+.2f}",
        "published": lambda label, **where: f"{outcome(label, **where).trial.published:.2f}",
        "published_gain": lambda label, **where: (
            f"{published_gain(where.get('experiment', name), outcome(label, **where).trial):+.2f}"
        ),
        "parameters": lambda label, **where: f"{outcome(label, **where).first('parameters'):,}",
        "overtaking": lambda label, **where: f"{outcome(label, **where).overtaking:.0%}",
        "temperature": lambda label, **where: f"{outcome(label, **where).temperature:.3f}",
    }
