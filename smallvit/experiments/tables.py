"""Compute means over seeds and gains from records, and format tables of results. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from smallvit.experiments.catalog import Trial, get_experiment
from smallvit.experiments.records import Record, group_by_trial
from smallvit.utils import tables
from smallvit.utils.tables import MISSING, Spread
from smallvit.utils.terminal import print_table

NOT_MEASURED = "not yet measured"


@dataclass(frozen=True, eq=False)
class TrialResult:
    """A trial with its records, and those of its baseline."""

    trial: Trial
    runs: tuple[Record, ...]
    baseline: Trial | None = None
    baseline_runs: tuple[Record, ...] = ()

    @property
    def top1(self) -> Spread | None:
        """Test accuracy in per cent."""
        return self._spread("test_top1", self.runs)

    @property
    def val_top1(self) -> Spread | None:
        """Validation accuracy of the selected epoch in per cent; None without validation images."""
        measured = all(run.summary["val_top1"] is not None for run in self.runs)
        return self._spread("val_top1", self.runs) if measured else None

    @property
    def gain(self) -> Spread | None:
        """Difference in test accuracy from the baseline in percentage points, paired by seed."""
        baseline = {run.seed: run.top1 for run in self.baseline_runs}
        gains = [run.top1 - baseline[run.seed] for run in self.runs if run.seed in baseline]
        return Spread.of(gains) if gains else None

    @property
    def published_gain(self) -> float | None:
        """Difference between the published accuracies of the trial and its baseline."""
        if self.baseline is None or None in (self.trial.published, self.baseline.published):
            return None
        return self.trial.published - self.baseline.published

    @property
    def seconds(self) -> Spread | None:
        """Training time of the runs on the first run's hardware."""
        return self._spread("train_seconds", self._on_one_machine)

    @property
    def speed(self) -> Spread | None:
        """Training images per second of the runs on the first run's hardware."""
        return self._spread("images_per_second", self._on_one_machine)

    def first(self, name: str) -> Any:
        """Return a value of the first run's summary; None without runs."""
        return self.runs[0].summary.get(name) if self.runs else None

    @property
    def _on_one_machine(self) -> list[Record]:
        return [run for run in self.runs if run.summary["hardware"] == self.first("hardware")]

    def _spread(self, name: str, runs: Sequence[Record]) -> Spread | None:
        return Spread.of([run.summary[name] for run in runs]) if runs else None


def collect_results(name: str, budget: float, records: Iterable[Record]) -> list[TrialResult]:
    """Return the result of each trial of an experiment at a budget, with or without records."""
    groups = group_by_trial(records, name, budget)
    trials = {trial.label: trial for trial in get_experiment(name).trials}
    return [
        TrialResult(
            trial,
            tuple(groups.get(label, ())),
            trials.get(trial.baseline),
            tuple(groups.get(trial.baseline, ())),
        )
        for label, trial in trials.items()
    ]


def describe_length(name: str, budget: float) -> str:
    """Return a sentence on the length of the training at a budget."""
    experiment = get_experiment(name)
    length = experiment.length(budget)
    share = length.get("train_fraction")
    images = "all training images" if share is None else f"{share:.4g} of each class's training images"
    text = f"{length['epochs']} passes over {images}"
    if budget == 1:
        return f"The whole experiment: {text}"
    text = f"Scaled down to a budget of {budget:g}: {text}, instead of {experiment.epochs} passes"
    published = any(trial.published for trial in experiment.trials)
    return text + "; compare the order with published figures, not the level" * published


def format_accuracy(value: Spread | None) -> str:
    """Format an accuracy and its deviation."""
    return NOT_MEASURED if value is None else format(value, ".2f")


def _format_gain(result: TrialResult) -> str:
    gain = result.gain
    if gain is None:
        return MISSING
    return f"{gain:+.2f}" + (f" ({gain.count} of {len(result.runs)} seeds)" if gain.count < len(result.runs) else "")


def _format_published(result: TrialResult) -> str:
    figure, gain = result.trial.published, result.published_gain
    return MISSING if figure is None else f"{figure:.2f}" + ("" if gain is None else f" ({gain:+.2f})")


def _format(value: float | None, spec: str = ",.0f", unit: float = 1) -> str:
    return MISSING if value is None else format(value / unit, spec)


COLUMNS: dict[str, Callable[[TrialResult], str]] = {
    "model": lambda result: result.trial.label,
    "published": _format_published,
    "test top-1 (%)": lambda result: format_accuracy(result.top1),
    "validation (%)": lambda result: MISSING if result.val_top1 is None else format_accuracy(result.val_top1),
    "seeds": lambda result: str(len(result.runs)),
    "gain": _format_gain,
    "parameters": lambda result: _format(result.first("parameters")),
    "OPs (M)": lambda result: _format(result.first("ops"), ",.1f", 1e6),
    "packed (MB)": lambda result: _format(result.first("packed_bytes"), ",.2f", 1e6),
    "images seen": lambda result: _format(result.first("images_seen")),
    "seconds": lambda result: _format(result.seconds and result.seconds.mean),
    "images/s": lambda result: _format(result.speed and result.speed.mean),
}
"""Title and cell of each column."""
BINARY_COLUMNS = ("OPs (M)", "packed (MB)")
"""Columns that are shown only if a model has one-bit layers."""
TERMINAL_COLUMNS = (
    *("model", "published", "test top-1 (%)", "seeds", "gain", "parameters", *BINARY_COLUMNS),
    *("images seen", "seconds", "images/s"),
)


def table_rows(columns: Sequence[str], results: Sequence[TrialResult]) -> list[list[str]]:
    """Return header and cells of a table, without the columns of one-bit layers if no model has any."""
    binary = any(map(tables.has_binary_savings, summaries(results)))
    columns = [column for column in columns if binary or column not in BINARY_COLUMNS]
    return [columns, *([COLUMNS[column](result) for column in columns] for result in results)]


def print_results(name: str, budget: float, labels: Sequence[str], records: Iterable[Record], console: Console) -> None:
    """Print the table of these trials, with notes on how it was measured."""
    results = [result for result in collect_results(name, budget, records) if result.trial.label in labels]
    published = any(result.trial.published for result in results)
    columns = [column for column in TERMINAL_COLUMNS if column != "published" or published]
    console.print()
    print_table(console, table_rows(columns, results))
    notes = ["Test top-1: mean ± standard deviation over seeds; gain: difference from the baseline in points"]
    if published:
        notes.append(f"Published: {'; '.join(list_sources(results))}; gain in parentheses")
    notes += [*tables.binary_notes(summaries(results)), *describe_machines(results)]
    for line in (describe_length(name, budget), *notes):
        console.print(line, markup=False)


def summaries(results: Sequence[TrialResult]) -> list[dict[str, Any]]:
    """Return the summary of each result's first run."""
    return [run.summary for result in results for run in result.runs[:1]]


def list_sources(results: Sequence[TrialResult]) -> list[str]:
    """Return the sources of the published accuracies."""
    return unique(result.trial.source for result in results if result.trial.source)


def describe_machines(results: Sequence[TrialResult]) -> list[str]:
    """Return lines with the hardware, the versions and the git revisions of the runs."""
    runs = [run.summary for result in results for run in result.runs]
    if not runs:
        return []
    hardware = unique(f"{run['hardware']}, {run['precision']}" for run in runs)
    versions = unique(", ".join(" ".join(item) for item in run["versions"].items()) for run in runs)
    revisions = unique(str(run["git_revision"])[:12] for run in runs)
    return [f"Hardware: {'; '.join(hardware)}", f"Versions: {'; '.join(versions)}", f"Revision: {', '.join(revisions)}"]


def unique(texts: Iterable[str]) -> list[str]:
    """Remove duplicates, keeping the order."""
    return list(dict.fromkeys(texts))
