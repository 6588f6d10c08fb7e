"""Models side by side: trains what is missing, measures, and writes tables and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from smallvit import checkpoint, hardware, report, speed
from smallvit.comparison import scatter
from smallvit.comparison.contest import Contest, entries
from smallvit.comparison.standings import Standing, finished, gathered, notes
from smallvit.errors import InputError
from smallvit.files import write_text

MARKDOWN, CSV, PICTURE = "compare.md", "compare.csv", "compare.png"


@dataclass(frozen=True, kw_only=True)
class Showing:
    """How an outcome is measured and shown."""

    console: Console
    command: str
    out: Path | None
    """Where files are written; nothing for none."""
    device: str = "auto"
    amp: str = "auto"
    measured: bool = True
    """Whether the speed of inference is measured."""


def compare_rows(contest: Contest, showing: Showing) -> bool:
    """Train the runs of a contest that are missing, and compare its rows; returns whether all runs are finished.

    Raises:
        InputError: bad rows or data, or a folder that holds another run; nothing has been trained then.
        KeyboardInterrupt: a signal ended a run, which is saved.
        OSError: the files cannot be written.
    """
    hardware.pick_device(showing.device)
    runs = entries(contest)
    missing = [entry for entry in runs if not entry.is_finished]
    for entry in {entry.row.label: entry for entry in missing}.values():
        entry.check()
    failed = [
        entry for number, entry in enumerate(runs, 1) if not entry.train(f"[{number}/{len(runs)}]", showing.console)
    ]
    standings = []
    for row in contest.rows:
        done = [finished(entry.folder) for entry in runs if entry.row is row and entry not in failed]
        standings.append(Standing(row.label, tuple(done), len(contest.seeds)))
    show(standings, showing, {entry.row.label: entry.recipe for entry in runs if entry.recipe is not None})
    return not failed


def compare_runs(folders: Sequence[Path], showing: Showing) -> None:
    """Compare runs that are there, those that differ only in their seed in one row.

    Raises:
        InputError: a run is not finished, or has other images than the first.
        OSError: the files cannot be written.
    """
    show(gathered(folders), showing, {})


def show(standings: Sequence[Standing], showing: Showing, recipes: dict[str, str]) -> None:
    """Measure the rows, print them, and write the files; `recipes` are those of rows that have one, by label."""
    ran = [standing for standing in standings if standing.runs]
    figures, how = _measured(ran, showing) if showing.measured and ran else ({}, "Inference: not measured")
    records = [standing.record(figures.get(standing.label, {})) for standing in standings]
    lines = notes(standings, recipes, how, showing.command)
    console, table = showing.console, report.comparison_table(records)
    console.print()
    report.widen(console, table)
    console.print(table)
    for line in lines:
        console.print(line)
    if showing.out is not None:
        _write(showing.out, records, lines, f"Models on {ran[0].data}" if ran else "Models")
        console.print(f"\nwritten {', '.join(str(showing.out / name) for name in (MARKDOWN, CSV, PICTURE))}")


def _measured(ran: Sequence[Standing], showing: Showing) -> tuple[dict[str, dict[str, float]], str]:
    """Every row's speeds by its label, and a line that says how they were measured."""
    device = hardware.pick_device(showing.device)
    loaded = [checkpoint.load(standing.runs[0].folder) for standing in ran]
    with Console(stderr=True).status("measuring the speed of inference"):
        speeds = speed.measure(loaded, device, showing.amp)
    line = (
        f"Inference: {hardware.describe_hardware(device)}, {speeds.precision}, not compiled; batches of "
        f"{speeds.batch_size} and, for the latency, single images; medians over {speed.ROUNDS} rounds in which the "
        "models take turns; weights of each row's first seed"
    )
    return {standing.label: figures for standing, figures in zip(ran, speeds.figures, strict=True)}, line


def _write(out: Path, records: list[dict[str, object]], lines: list[str], title: str) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from None
    report.write_csv(records, out / CSV)
    (out / PICTURE).unlink(missing_ok=True)
    pictured = scatter.plot_comparison(records, out / PICTURE, title)
    write_text(out / MARKDOWN, report.comparison_page(records, lines, title, PICTURE if pictured else None))
