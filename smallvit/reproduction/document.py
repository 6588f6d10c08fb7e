"""RESULTS.md: every record of the project in tables and pictures, beside what was published. Needs no torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from smallvit.errors import InputError
from smallvit.files import write_text
from smallvit.report import markdown
from smallvit.reproduction import ledger
from smallvit.reproduction import records as recorded
from smallvit.reproduction.experiments import EXPERIMENTS, plain
from smallvit.reproduction.literature import FROM_SCRATCH
from smallvit.reproduction.notes import filled
from smallvit.reproduction.outcomes import Outcome, Spread, outcomes
from smallvit.reproduction.plots import plot_learning, plot_speed
from smallvit.reproduction.records import Record
from smallvit.reproduction.tables import COLUMNS, NONE, costs, distinct, in_words, machines, spread

HEAD = """\
# Results

Every figure here is computed from the records in [results/](results) by `python results/make.py`; a test holds the page
to them. A record is one run: its command, every option, seed, revision, hardware, and what was measured after every
epoch. `smallvit reproduce NAME` does an experiment again ([docs/reproducing.md](docs/reproducing.md)).

Accuracies are test accuracies in per cent, mean ± standard deviation (n - 1) over seeds. The test split was used once a
run, with the weights that were best on validation images held out of the training images. Published figures are other
people's, at their own length of training; their epoch is the one that is best on the test, where they took it so.
"""
MEANS = ("test_top1", "test_images", "images_seen", "train_seconds")
"""What is told of other records, as means over seeds."""
COSTS_SAID = (
    "Seconds and images/s: mean over seeds, each run at its own time on hardware named below, so other work shows, and "
    "so does the machine where several are named. TFLOP/s: of the model's matrix products, six for each of its "
    "multiply-accumulates. Overtakes after: share of its images, and seconds, after which its validation accuracy is "
    "what the model it is held against has in the end."
)


def write(results: Path, page: Path) -> None:
    """Write the page, and its pictures beside the records.

    Raises:
        InputError: a record or a note is damaged.
        OSError: something cannot be written.
    """
    found = ledger.gathered(results)
    for name in EXPERIMENTS:
        for budget in _own_budgets(found, name):
            measured = [outcome for outcome in outcomes(name, budget, found) if outcome.runs]
            stem, title = results / picture(name, budget), name if budget == 1 else f"{name} at a budget of {budget:g}"
            if len(measured) > 1:
                stem.parent.mkdir(exist_ok=True)
                plot_speed(measured, Path(f"{stem}-speed.png"), title)
                plot_learning(measured, Path(f"{stem}.png"), title)
    write_text(page, text(results))


def text(results: Path) -> str:
    """The page."""
    found = ledger.gathered(results)
    parts = [HEAD, _contents()]
    parts += [section(name, found, results) for name in EXPERIMENTS]
    parts += [_others(results), _literature()]
    return "\n".join(parts)


def picture(name: str, budget: float) -> str:
    """Beginning of the names of an experiment's pictures, below the folder of the records."""
    return f"{name}-{budget:g}"


def _contents() -> str:
    links = [f"- [{name}](#{name.replace('/', '')}): {each.title}" for name, each in EXPERIMENTS.items()]
    return "\n".join(
        [*links, "- [Other records](#other-records)", "- [What others published](#what-others-published)", ""]
    )


def section(name: str, found: Sequence[Record], results: Path) -> str:
    """An experiment's part of the page."""
    budgets = recorded.budgets(found, name)
    shown = {budget: outcomes(name, budget, found) for budget in (1.0, *[b for b in budgets if b != 1])}
    parts = [f"## {name}", EXPERIMENTS[name].title + ".", _accuracies(name, shown)]
    own = _own_budgets(found, name)
    for budget in shown:
        note = results / "notes" / f"{name.replace('/', '-')}-{budget:g}.md"
        if note.is_file():
            parts.append(filled(note, name, budget, found))
        if budget in budgets:
            parts.append((_costs if budget in own else _elsewhere)(name, budget, shown[budget]))
    return "\n\n".join(parts) + "\n"


def _accuracies(name: str, shown: dict[float, list[Outcome]]) -> str:
    """Published and measured accuracies of every model, at every budget."""
    first = shown[1.0]
    rivals = distinct(outcome.trial.against for outcome in first if outcome.trial.against)
    bare = all(outcome.trial.against in (None, plain(outcome.trial.label)) for outcome in first)
    columns = {"model": [outcome.trial.label for outcome in first]}
    if len(rivals) > 1 and not bare:
        columns["held against"] = [outcome.trial.against or NONE for outcome in first]
    if compared := any(outcome.trial.published for outcome in first):
        columns["published"] = [COLUMNS["published"](name, outcome) for outcome in first]
    for budget, outcomes_ in shown.items():
        scale = "" if budget == 1 else f" at a budget of {budget:g}"
        columns[f"measured{scale}"] = [_measured(outcome) for outcome in outcomes_]
        if any(outcome.gain for outcome in outcomes_):
            columns[f"gain{scale}"] = [COLUMNS["gain"](name, outcome) for outcome in outcomes_]
    lines = []
    if any(outcome.runs for outcomes_ in shown.values() for outcome in outcomes_):
        lines.append("In brackets behind a measured accuracy: seeds.")
    if any(column.startswith("gain") for column in columns):
        over = (
            "the model without plugins" if bare else rivals[0] if len(rivals) == 1 else "the model it is held against"
        )
        lines.append(f"Gain: points of accuracy over {over}, seed by seed.")
    if compared:
        sources = distinct(outcome.trial.source for outcome in first if outcome.trial.source)
        lines.append(f"Published: {'; '.join(sources)}; in brackets its gain.")
    return markdown([list(columns), *zip(*columns.values(), strict=True)]) + "\n\n" + " ".join(lines)


def _measured(outcome: Outcome) -> str:
    return spread(outcome.top1) + (f" ({len(outcome.runs)})" if outcome.runs else "")


def _own_budgets(found: Sequence[Record], name: str) -> list[float]:
    """The budgets at which it has records of its own, not those of a twin alone."""
    own = {record.budget for record in found if record.experiment == name}
    return [budget for budget in recorded.budgets(found, name) if budget in own]


def _elsewhere(name: str, budget: float, shown: Sequence[Outcome]) -> str:
    """Where the records are that others' runs have made."""
    others = distinct(f"[{r.experiment}](#{r.experiment.replace('/', '')})" for outcome in shown for r in outcome.runs)
    return f"{in_words(name, budget)}. These runs are on record under {', '.join(others)}."


def _costs(name: str, budget: float, shown: Sequence[Outcome]) -> str:
    """Length, speed and pictures at a budget."""
    measured = [outcome for outcome in shown if outcome.runs]
    seeds = max(len(outcome.runs) for outcome in measured)
    scale = "" if budget == 1 else f" --budget {budget:g}"
    some = len(measured) < len(shown)
    rows = "".join(f" --rows {shlex.quote(outcome.trial.label)}" for outcome in measured) * some
    pictures = {
        picture(name, budget): "accuracy over images seen",
        f"{picture(name, budget)}-speed": "accuracy and speed",
    }
    lines = [
        f"### {name} at a budget of {budget:g}" if budget != 1 else f"### {name}, whole",
        f"{in_words(name, budget)}. `smallvit reproduce {name}{scale}{rows} --seeds {seeds}`",
        costs(name, measured),
        COSTS_SAID,
        "\n".join(f"- {line}" for line in machines(measured)),
    ]
    lines += [f"![{name}: {what}](results/{stem}.png)" for stem, what in pictures.items()] * (len(measured) > 1)
    return "\n\n".join(lines)


def _others(results: Path) -> str:
    """Runs that belong to no experiment, those that differ in their seed alone in one row."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for file in sorted(results.glob("*.jsonl")):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            words, summary = _other(line, file, number)
            rows.setdefault((file.name, words), []).append(summary)
    head = ("command", "test top-1 (%)", "seeds", "parameters", "test images", "images seen", "seconds", "hardware")
    table = [[*head, "record"]]
    for (file, words), summaries in rows.items():
        means = {each: Spread.of([s[each] for s in summaries]) for each in MEANS}
        table.append(
            [
                f"`{words}`",
                f"{means['test_top1']:.2f}",
                str(len(summaries)),
                f"{summaries[0]['parameters']:,}",
                f"{means['test_images'].mean:,.0f}",
                f"{means['images_seen'].mean:,.0f}",
                f"{means['train_seconds'].mean:,.0f}",
                "; ".join(distinct(summary["hardware"] for summary in summaries)),
                f"[{file}](results/{file})",
            ]
        )
    logs = ", ".join(f"[{file.name}](results/{file.name})" for file in sorted(results.glob("*.txt")))
    return f"## Other records\n\n{markdown(table)}\n\nTimings, as the benchmarks printed them: {logs}\n"


def _other(line: str, file: Path, number: int) -> tuple[str, dict[str, Any]]:
    """Command, without its seed, and summary of a run that belongs to no experiment.

    Raises:
        InputError: the line is damaged.
    """
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        run = json.loads(line)
        words, summary = run["command"].partition(" --seed")[0], run["summary"]
        if all(recorded.is_number(summary[name]) for name in (*MEANS, "parameters")) and isinstance(
            summary["hardware"], str
        ):
            return words, summary
    raise InputError(f"{file}, line {number}: no record of a run; remove the line")


def _literature() -> str:
    table = [["model", "parameters", "epochs", "CIFAR-10", "CIFAR-100", "Tiny-ImageNet", "source"]]
    for each in FROM_SCRATCH:
        figures = [NONE if figure is None else f"{figure:.2f}" for figure in (each.cifar10, each.cifar100, each.tiny)]
        table.append([each.model, each.parameters, each.epochs, *figures, each.source])
    return (
        "## What others published\n\n"
        f"Models trained on the small data set alone; nothing here was measured by smallvit.\n\n{markdown(table)}\n"
    )
