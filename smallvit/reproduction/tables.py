"""Tables of an experiment: in the terminal, and in Markdown. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from smallvit.costs import savings
from smallvit.report import markdown, widen
from smallvit.reproduction.experiments import experiment
from smallvit.reproduction.outcomes import Outcome, Spread, outcomes, published_gain
from smallvit.reproduction.records import Record

MISSING = "not yet measured"
NONE = "–"


def announcement(name: str, budget: float) -> list[str]:
    """What an experiment is about, and how much of it a budget is."""
    return [f"{name}: {experiment(name).title}", in_words(name, budget)]


def in_words(name: str, budget: float) -> str:
    """How long the training is at a budget."""
    whole, length = experiment(name), experiment(name).length(budget)
    part = length.get("train_fraction")
    images = "all training images" if part is None else f"{part:.4g} of each class's training images"
    told = f"{length['epochs']} passes over {images}"
    if budget == 1:
        return f"The whole experiment: {told}"
    scaled = f"Scaled down to a budget of {budget:g}: {told}, where the whole experiment has {whole.epochs}"
    compared = any(trial.published for trial in whole.trials)
    return scaled + "; beside published figures it shows an order, not their level" * compared


def terminal(name: str, budget: float, labels: Sequence[str], records: Iterable[Record], console: Console) -> list:
    """What to print in the end: the table of these trials, then how it came about."""
    records = list(records)
    shown = [outcome for outcome in outcomes(name, budget, records) if outcome.trial.label in labels]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    columns = [column for column in TERMINAL if column != "published" or any(o.trial.published for o in shown)]
    columns = with_savings(columns, shown)
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for outcome in shown:
        table.add_row(*(Text(COLUMNS[column](name, outcome)) for column in columns))
    widen(console, table)
    return ["", table, *(Text(line) for line in [in_words(name, budget), *notes(shown)])]


def spread(value: Spread | None, form: str = ".2f") -> str:
    """A mean and its deviation."""
    return MISSING if value is None else format(value, form)


def _gain(name: str, outcome: Outcome) -> str:
    gain = outcome.gain
    if gain is None:
        return NONE
    return f"{gain:+.2f}" + (f" ({gain.count} of {len(outcome.runs)} seeds)" if gain.count < len(outcome.runs) else "")


def _published(name: str, outcome: Outcome) -> str:
    figure, gain = outcome.trial.published, published_gain(name, outcome.trial)
    return NONE if figure is None else f"{figure:.2f}" + (f" ({gain:+.2f})" if gain is not None else "")


def with_savings(columns: Sequence[str], shown: Sequence[Outcome]) -> list[str]:
    """Columns, without those of one-bit layers where no model has any."""
    some = any(map(savings.has_bits, summaries(shown)))
    return [column for column in columns if some or column not in SAVINGS]


def summaries(shown: Sequence[Outcome]) -> list[dict[str, Any]]:
    """What the first run of each trial says of its model."""
    return [run.summary for outcome in shown for run in outcome.runs[:1]]


def _number(figure: Callable[[Outcome], float | None], form: str = ",.0f") -> Callable[[str, Outcome], str]:
    def cell(name: str, outcome: Outcome) -> str:
        value = figure(outcome)
        return NONE if value is None else format(value, form)

    return cell


def _millions(name: str, form: str) -> Callable[[str, Outcome], str]:
    def figure(outcome: Outcome) -> float | None:
        value = outcome.first(name)
        return None if value is None else value / 1e6

    return _number(figure, form)


def _overtaking(name: str, outcome: Outcome) -> str:
    share = outcome.overtaking
    return NONE if share is None else f"{share:.0%}, {share * outcome.seconds.mean:,.0f} s"


COLUMNS: dict[str, Callable[[str, Outcome], str]] = {
    "model": lambda name, outcome: outcome.trial.label,
    "published": _published,
    "test top-1 (%)": lambda name, outcome: spread(outcome.top1),
    "validation (%)": lambda name, outcome: NONE if outcome.val_top1 is None else spread(outcome.val_top1),
    "seeds": lambda name, outcome: str(len(outcome.runs)),
    "gain": _gain,
    "parameters": _number(lambda outcome: outcome.first("parameters")),
    "OPs (M)": _millions("ops", ",.1f"),
    "packed (MB)": _millions("packed_bytes", ",.2f"),
    "images seen": _number(lambda outcome: outcome.first("images_seen")),
    "seconds": _number(lambda outcome: outcome.seconds and outcome.seconds.mean),
    "images/s": _number(lambda outcome: outcome.rate and outcome.rate.mean),
    "TFLOP/s": _number(lambda outcome: outcome.teraflops, ".3g"),
    "of the peak": _number(lambda outcome: outcome.share_of_peak, ".1%"),
    "overtakes after": _overtaking,
}
"""What a table can say of an outcome: title and cell."""
SAVINGS = ("OPs (M)", "packed (MB)")
"""Columns that are told only where some model has one-bit layers."""
TERMINAL = (
    *("model", "published", "test top-1 (%)", "seeds", "gain", "parameters", *SAVINGS),
    *("images seen", "seconds", "images/s"),
)
COSTS = (
    *("model", "validation (%)", "parameters", *SAVINGS, "images seen", "seconds", "images/s"),
    *("TFLOP/s", "of the peak", "overtakes after"),
)


def costs(name: str, measured: Sequence[Outcome]) -> str:
    """What models cost at a budget, in Markdown."""
    known = any(outcome.share_of_peak is not None for outcome in measured)
    columns = with_savings([column for column in COSTS if known or column != "of the peak"], measured)
    table = markdown([columns, *([COLUMNS[column](name, outcome) for column in columns] for outcome in measured)])
    return "\n\n".join([table, *(f"{line}." for line in savings.notes(summaries(measured)))])


def notes(shown: Sequence[Outcome]) -> list[str]:
    """How the figures came about, a line each."""
    lines = ["Test top-1: mean ± standard deviation over seeds; gain: points over the model it is held against"]
    if any(outcome.trial.published for outcome in shown):
        sources = distinct(outcome.trial.source for outcome in shown if outcome.trial.source)
        lines.append(f"Published: {'; '.join(sources)}; in brackets its gain")
    return lines + savings.notes(summaries(shown)) + machines(shown)


def machines(shown: Sequence[Outcome]) -> list[str]:
    """On what it was measured, and with which code."""
    runs = [run for outcome in shown for run in outcome.runs]
    if not runs:
        return []
    hardware = distinct(f"{run.summary['hardware']}, {run.summary['precision']}" for run in runs)
    versions = distinct(", ".join(" ".join(item) for item in run.summary["versions"].items()) for run in runs)
    revisions = distinct(str(run.summary["git_revision"])[:12] for run in runs)
    return [f"Hardware: {'; '.join(hardware)}", f"Versions: {'; '.join(versions)}", f"Revision: {', '.join(revisions)}"]


def distinct(texts: Iterable[str]) -> list[str]:
    """Each once, in the order in which it comes."""
    return list(dict.fromkeys(texts))
