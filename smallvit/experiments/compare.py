"""Compare models: train missing runs, measure inference speed, and write tables and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from smallvit.config.options import ComputeConfig
from smallvit.experiments.grid import Grid, train_grid
from smallvit.models import checkpoint
from smallvit.profiling import benchmark
from smallvit.runs import aggregate
from smallvit.runs.aggregate import AggregatedRun
from smallvit.utils import hardware, tables
from smallvit.utils.errors import InputError
from smallvit.utils.files import write_text
from smallvit.utils.terminal import create_console, print_table

MARKDOWN, CSV, PICTURE = "compare.md", "compare.csv", "compare.png"


@dataclass(frozen=True)
class Output:
    """How a comparison is measured and where it is written."""

    command: str
    out: Path | None
    """Folder for the files; None writes no files."""
    _: KW_ONLY
    speed: bool
    """Whether to measure the speed of inference."""
    compute: ComputeConfig
    """Device and precision of inference."""


def compare_rows(grid: Grid, output: Output) -> bool:
    """Train the missing runs of a grid and compare its rows; return whether all runs are finished.

    Raises:
        InputError: Rows or data are invalid, or a folder holds another run; nothing has been trained.
        KeyboardInterrupt: A signal stopped a run, which has been saved.
        OSError: The files cannot be written.
    """
    planned, failed = train_grid(grid, output.compute.device)
    rows = []
    for row in grid.rows:
        finished = [run.folder for run in planned if run.row is row and run not in failed]
        rows.append(AggregatedRun(row.label, tuple(map(aggregate.read_finished_run, finished)), grid.runs_per_row))
    _report(rows, output, {run.row.label: run.recipe for run in planned if run.recipe is not None})
    return not failed


def compare_runs(folders: Sequence[Path], output: Output) -> None:
    """Compare finished runs; those that differ only in their seed are one row.

    Raises:
        InputError: A run is unfinished, or was trained or tested on other images than the first.
        OSError: The files cannot be written.
    """
    _report(aggregate.aggregate_runs(folders), output, {})


def _report(rows: Sequence[AggregatedRun], output: Output, recipes: dict[str, str]) -> None:
    """Measure the rows, print the comparison, and write the files."""
    finished = [row for row in rows if row.runs]
    speeds, note = _measure(finished, output) if output.speed and finished else ({}, "Inference: not measured")
    records = [row.record(speeds.get(row.label, {})) for row in rows]
    lines = [*aggregate.describe_conditions(rows, recipes, note), f"Command: {output.command}"]
    console = create_console()
    console.print()
    print_table(console, aggregate.comparison_rows(records), wrap_header=True)
    for line in lines:
        console.print(line)
    if output.out is not None:
        _write(output.out, records, lines, f"Models on {finished[0].data}" if finished else "Models")
        console.print(f"\nwritten: {', '.join(str(output.out / name) for name in (MARKDOWN, CSV, PICTURE))}")


def _measure(rows: Sequence[AggregatedRun], output: Output) -> tuple[dict[str, dict[str, float]], str]:
    """Return the speed of each row by its label, and a note on how it was measured."""
    device = hardware.pick_device(output.compute.device)
    models = [checkpoint.load_model(row.runs[0].folder) for row in rows]
    console = create_console(stderr=True)
    labels = ", ".join(row.label for row in rows)
    console.print(f"measuring inference speed of {labels}: up to about {len(rows) * benchmark.SECONDS:.0f} s")
    speeds = benchmark.measure_speed(models, device, output.compute.amp, benchmark.SECONDS)
    note = (
        f"Inference: {hardware.describe_hardware(device)}, {speeds.precision}, not compiled; batches of "
        f"{speeds.batch_size}, and single images for the latency; medians over {benchmark.ROUNDS} rounds in which the "
        f"models alternate, fewer if a model's {benchmark.SECONDS:g} s run out; weights of each row's first seed"
    )
    return {row.label: figures for row, figures in zip(rows, speeds.figures, strict=True)}, note


def _write(out: Path, records: list[dict[str, object]], lines: list[str], title: str) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from None
    tables.write_csv(records, out / CSV)
    (out / PICTURE).unlink(missing_ok=True)
    picture = PICTURE if aggregate.plot_comparison(records, out / PICTURE, title) else None
    write_text(out / MARKDOWN, aggregate.format_comparison(records, lines, title, picture))
