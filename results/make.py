"""Write RESULTS.md and its pictures from the records in this folder: python results/make.py"""

from __future__ import annotations

import json
import math
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined, TemplateError
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from smallvit import InputError
from smallvit.experiments import records, tables
from smallvit.experiments.catalog import DHVT2022, EXPERIMENTS, GANI2022, strip_plugins
from smallvit.experiments.records import Record
from smallvit.experiments.tables import COLUMNS, TrialResult, collect_results, unique
from smallvit.runs.aggregate import plot_comparison
from smallvit.utils.files import atomic_write, write_text
from smallvit.utils.tables import MISSING, Spread, binary_notes, markdown_table

HEAD = """\
# Results

All figures are computed from the records in [results/](results) by `python results/make.py`; a test compares the page
with them. A record is one run: its command, all options, seed, git revision, hardware, and metrics after each epoch.
`smallvit reproduce NAME` repeats an experiment ([docs/reproducing.md](docs/reproducing.md)).

Accuracies are test accuracies in per cent, mean ± standard deviation (n - 1) over seeds. The test split was used once
per run, with the weights that were best on validation images held out of the training images. Published figures are
from the cited sources, at their own training length; some of them select the best epoch on the test set.
"""
COSTS_NOTE = (
    "Seconds and images/s: mean over seeds, measured during each run on the hardware named below, so other load on the "
    "machine shows. TFLOP/s: matrix products of the model, six operations per multiply-accumulate. Overtakes after: "
    "share of its images, and seconds, after which its validation accuracy reaches the final one of its baseline."
)
LITERATURE = """\
## Published results

Models trained from scratch on the small data set; none of these figures was measured by smallvit.
"""
PEAK_TFLOPS = {"H200": 989.4, "H100": 989.4, "A100": 312.0, "L40S": 362.1, "RTX 4090": 165.2}
"""Dense bfloat16 matrix products by a part of the device's name, from NVIDIA's data sheets."""
FLOPS_PER_MAC = 6
"""In a training step, per multiply-accumulate of the forward pass: two forward, four backward."""
MEANS = ("test_top1", "test_images", "images_seen", "train_seconds")
"""Values of other records that are averaged over seeds."""
DPI = 110
CCT2021 = "Hassani et al. 2021, arXiv:2104.05704, the README of its code"


class Published(NamedTuple):
    """A model trained from scratch on a small data set, or first self-supervised on it."""

    model: str
    parameters: str
    epochs: str
    """Passes over the images; for `GANI2022` the epochs of its code."""
    source: str
    cifar10: float | None = None
    cifar100: float | None = None
    tiny: float | None = None


FROM_SCRATCH = (
    Published("CCT-7/3×1", "3.7 M", "300", CCT2021, 96.53, 80.92),
    Published("CCT-7/3×1, sine", "3.7 M", "5000", CCT2021, 98.00, 82.87),
    Published("DHVT-T, patch 2, best of 5", "5.8 M", "300", DHVT2022, None, 83.54),
    Published("DHVT-S, patch 2, best of 5", "22.8 M", "300", DHVT2022, None, 85.68),
    Published("NesT-T", "6.2 M", "300", DHVT2022, None, 78.69),
    Published("NesT-S", "23.4 M", "300", DHVT2022, None, 81.70),
    Published("NesT-B", "90.1 M", "300", DHVT2022, None, 82.56),
    Published("DeiT-T, patch 2", "5.3 M", "300", DHVT2022, None, 67.52),
    Published("DeiT-S, patch 2", "21.3 M", "300", DHVT2022, None, 69.78),
    Published("Swin-T", "27.5 M", "300", DHVT2022, None, 78.07),
    Published("ViT, self-supervised first", "2.8 M", "SSL + 100", GANI2022, 96.41, 79.15, 63.36),
    Published("Swin, self-supervised first", "7.1 M", "SSL + 100", GANI2022, 96.18, 80.95, 65.13),
    Published("CaiT, self-supervised first", "7.7 M", "SSL + 100", GANI2022, 96.42, 80.79, 67.46),
    Published("DeiT-B, CNN teacher, 224 px", "87 M", "7200", "Touvron et al. 2021, arXiv:2012.12877", 98.5),
)


def write(results: Path, page: Path) -> None:
    """Write the page, and its pictures next to the records.

    Raises:
        InputError: A record or a note is damaged.
    """
    collection = records.read_collection(results)
    for name in EXPERIMENTS:
        for budget in own_budgets(collection, name):
            measured = [result for result in collect_results(name, budget, collection) if result.runs]
            title = name if budget == 1 else f"{name} at a budget of {budget:g}"
            if len(measured) > 1:
                plot_speed(measured, results / f"{name}-{budget:g}-speed.png", title)
                plot_learning(measured, results / f"{name}-{budget:g}.png", title)
    write_text(page, render(results))


def render(results: Path) -> str:
    """Return the page's text."""
    collection = records.read_collection(results)
    links = [f"- [{name}](#{name.replace('/', '')}): {each.title}" for name, each in EXPERIMENTS.items()]
    links += ["- [Other records](#other-records)", "- [Published results](#published-results)", ""]
    sections = [format_experiment(name, collection, results) for name in EXPERIMENTS]
    return "\n".join([HEAD, *links, *sections, format_other_records(results), format_literature()])


def own_budgets(collection: Sequence[Record], name: str) -> list[float]:
    """Return the budgets at which an experiment has records under its own name."""
    own = {record.budget for record in collection if record.experiment == name}
    return [budget for budget in records.list_budgets(collection, name) if budget in own]


# Experiments


def format_experiment(name: str, collection: Sequence[Record], results: Path) -> str:
    """Return the section of an experiment."""
    budgets, own = records.list_budgets(collection, name), own_budgets(collection, name)
    by_budget = {budget: collect_results(name, budget, collection) for budget in dict.fromkeys((1.0, *budgets))}
    parts = [f"## {name}", EXPERIMENTS[name].title + ".", format_accuracies(by_budget)]
    for budget, shown in by_budget.items():
        note = results / "notes" / f"{name.replace('/', '-')}-{budget:g}.md"
        if note.is_file():
            parts.append(render_note(note, name, budget, collection))
        if budget in own:
            parts.append(format_costs(name, budget, shown))
        elif budget in budgets:
            others = unique(f"[{r.experiment}](#{r.experiment.replace('/', '')})" for each in shown for r in each.runs)
            parts.append(f"{tables.describe_length(name, budget)}. These runs are recorded under {', '.join(others)}.")
    return "\n\n".join(parts) + "\n"


def format_accuracies(by_budget: dict[float, list[TrialResult]]) -> str:
    """Return the table of published and measured accuracies at every budget."""
    first = by_budget[1.0]
    baselines = unique(result.trial.baseline for result in first if result.trial.baseline)
    are_plain = all(result.trial.baseline in (None, strip_plugins(result.trial.label)) for result in first)
    sources = tables.list_sources(first)
    columns = {"model": [result.trial.label for result in first]}
    if len(baselines) > 1 and not are_plain:
        columns["baseline"] = [result.trial.baseline or MISSING for result in first]
    if sources:
        columns["published"] = [COLUMNS["published"](result) for result in first]
    for budget, shown in by_budget.items():
        suffix = "" if budget == 1 else f" at a budget of {budget:g}"
        columns[f"measured{suffix}"] = [
            tables.format_accuracy(result.top1) + (f" ({len(result.runs)})" if result.runs else "") for result in shown
        ]
        if any(result.gain for result in shown):
            columns[f"gain{suffix}"] = [COLUMNS["gain"](result) for result in shown]
    lines = []
    if any(result.runs for shown in by_budget.values() for result in shown):
        lines.append("In parentheses after a measured accuracy: number of seeds.")
    if any(column.startswith("gain") for column in columns):
        over = "the model without plugins" if are_plain else baselines[0] if len(baselines) == 1 else "the baseline"
        lines.append(f"Gain: points of accuracy over {over}, paired by seed.")
    if sources:
        lines.append(f"Published: {'; '.join(sources)}; gain in parentheses.")
    return markdown_table([list(columns), *zip(*columns.values(), strict=True)]) + "\n\n" + " ".join(lines)


def format_costs(name: str, budget: float, shown: Sequence[TrialResult]) -> str:
    """Return length, speed and pictures of an experiment at a budget."""
    measured = [result for result in shown if result.runs]
    seeds = max(len(result.runs) for result in measured)
    flags = "" if budget == 1 else f" --budget {budget:g}"
    if len(measured) < len(shown):
        flags += "".join(f" --rows {shlex.quote(result.trial.label)}" for result in measured)
    names = ["model", "validation (%)", "parameters", *tables.BINARY_COLUMNS, "images seen", "seconds", "images/s"]
    rows = tables.table_rows(names, measured)
    extra = {
        "TFLOP/s": [format(teraflops(result), ".3g") for result in measured],
        "of peak": [MISSING if (share := share_of_peak(each)) is None else f"{share:.1%}" for each in measured],
        "overtakes after": [_format_overtaking(result) for result in measured],
    }
    if all(cell == MISSING for cell in extra["of peak"]):
        del extra["of peak"]
    rows = [[*row, *cells] for row, cells in zip(rows, [[*extra], *zip(*extra.values(), strict=True)], strict=True)]
    parts = [
        f"### {name} at a budget of {budget:g}" if budget != 1 else f"### {name}, whole",
        f"{tables.describe_length(name, budget)}. `smallvit reproduce {name}{flags} --seeds {seeds}`",
        "\n\n".join([markdown_table(rows), *(f"{line}." for line in binary_notes(tables.summaries(measured)))]),
        COSTS_NOTE,
        "\n".join(f"- {line}" for line in tables.describe_machines(measured)),
    ]
    if len(measured) > 1:
        parts.append(f"![{name}: accuracy over images seen](results/{name}-{budget:g}.png)")
        parts.append(f"![{name}: accuracy and speed](results/{name}-{budget:g}-speed.png)")
    return "\n\n".join(parts)


def _format_overtaking(result: TrialResult) -> str:
    share = overtaking(result)
    return MISSING if share is None else f"{share:.0%}, {share * result.seconds.mean:,.0f} s"


def teraflops(result: TrialResult) -> float:
    """Return 10¹² operations per second during training, counting the model's matrix products."""
    return FLOPS_PER_MAC * result.first("macs") * result.speed.mean / 1e12


def share_of_peak(result: TrialResult) -> float | None:
    """Return the share of the device's peak in bfloat16; None if the peak is unknown or for a part of a device."""
    hardware = result.first("hardware")
    peak = None if "MIG" in hardware else next((PEAK_TFLOPS[name] for name in PEAK_TFLOPS if name in hardware), None)
    return teraflops(result) / peak if peak and result.first("precision") == "bf16" else None


def mean_curve(runs: Sequence[Record]) -> list[float]:
    """Return the mean validation accuracy after each epoch; empty if it was not measured."""
    columns = [run.epochs["val_top1"] for run in runs]
    if not columns or any(None in column for column in columns):
        return []
    return [statistics.fmean(values) for values in zip(*columns, strict=True)]


def overtaking(result: TrialResult) -> float | None:
    """Return the share of its images after which the validation accuracy reaches the final one of the baseline.

    Means are over the seeds that both have.
    """
    seeds = {run.seed for run in result.runs} & {run.seed for run in result.baseline_runs}
    own, baseline = (mean_curve([r for r in runs if r.seed in seeds]) for runs in (result.runs, result.baseline_runs))
    if not own or not baseline:
        return None
    return next((number / len(own) for number, top1 in enumerate(own, 1) if top1 >= baseline[-1]), None)


# Notes


def render_note(note: Path, name: str, budget: float, collection: Sequence[Record]) -> str:
    """Render a note with its figures.

    Raises:
        InputError: It refers to something without a record.
    """
    try:
        environment = Environment(undefined=StrictUndefined, autoescape=False)
        template = environment.from_string(note.read_text(encoding="utf-8"))
        return template.render(note_functions(name, budget, collection)).strip()
    except (TemplateError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{note}: {type(error).__name__}: {error}") from None


def note_functions(name: str, budget: float, collection: Sequence[Record]) -> dict[str, Callable[..., str]]:
    """Return functions that format a figure of a model, by its label, at the note's budget."""

    def result(label: str, experiment: str | None = None) -> TrialResult:
        return {each.trial.label: each for each in collect_results(experiment or name, budget, collection)}[label]

    def temperature(each: TrialResult) -> Spread:
        return Spread.of([run.epochs["temperature"][-1] for run in each.runs])

    return {
        "top1": lambda label, **where: f"{result(label, **where).top1:.2f}",
        "gain": lambda label, **where: f"{result(label, **where).gain:+.2f}",
        "published": lambda label, **where: f"{result(label, **where).trial.published:.2f}",
        "published_gain": lambda label, **where: f"{result(label, **where).published_gain:+.2f}",
        "parameters": lambda label, **where: f"{result(label, **where).first('parameters'):,}",
        "overtaking": lambda label, **where: f"{overtaking(result(label, **where)):.0%}",
        "temperature": lambda label, **where: f"{temperature(result(label, **where)):.3f}",
    }


# Other records


def format_other_records(results: Path) -> str:
    """Return the table of runs that belong to no experiment, with one row per command."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for file in sorted(results.glob("*.jsonl")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            command, summary = _read_other(line, file, number)
            rows.setdefault((file.name, command), []).append(summary)
    head = ("command", "test top-1 (%)", "seeds", "parameters", "test images", "images seen", "seconds", "hardware")
    table = [[*head, "record"]]
    for (file, command), runs in rows.items():
        top1, *means = (Spread.of([run[name] for run in runs]) for name in MEANS)
        table.append(
            [
                *(f"`{command}`", f"{top1:.2f}", str(len(runs)), f"{runs[0]['parameters']:,}"),
                *(f"{spread.mean:,.0f}" for spread in means),
                "; ".join(unique(run["hardware"] for run in runs)),
                f"[{file}](results/{file})",
            ]
        )
    logs = ", ".join(f"[{file.name}](results/{file.name})" for file in sorted(results.glob("*.txt")))
    note = results / "notes" / "other.md"
    text = f"{note.read_text(encoding='utf-8')}\n" if note.is_file() else ""
    return f"## Other records\n\n{markdown_table(table)}\n\n{text}Output of the benchmarks: {logs}\n"


def _read_other(line: str, file: Path, number: int) -> tuple[str, dict[str, Any]]:
    """Return the command without its seed, and the summary of a run."""
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        run = json.loads(line)
        command, summary = run["command"].partition(" --seed")[0], run["summary"]
        numbers = all(records.is_number(summary[name]) for name in (*MEANS, "parameters"))
        if numbers and isinstance(summary["hardware"], str):
            return command, summary
    raise InputError(f"{file}, line {number}: not the record of a run; remove the line")


def format_literature() -> str:
    """Return the table of published results."""
    table = [["model", "parameters", "epochs", "CIFAR-10", "CIFAR-100", "Tiny-ImageNet", "source"]]
    for each in FROM_SCRATCH:
        figures = [MISSING if top1 is None else f"{top1:.2f}" for top1 in (each.cifar10, each.cifar100, each.tiny)]
        table.append([each.model, each.parameters, each.epochs, *figures, each.source])
    return f"{LITERATURE}\n{markdown_table(table)}\n"


# Pictures


def plot_speed(results: Sequence[TrialResult], path: Path, title: str) -> None:
    """Plot accuracy against training speed."""
    fields = [
        {
            "model": result.trial.label,
            "test_top1": result.top1.mean,
            "test_top1_std": result.top1.std,
            "parameters": result.first("parameters"),
            "train_images_per_second": result.speed.mean,
            "inference_images_per_second": None,
        }
        for result in results
    ]
    plot_comparison(fields, path, title)


def plot_learning(results: Sequence[TrialResult], path: Path, title: str) -> None:
    """Plot accuracy over images seen, and the gains over baselines."""
    curves = {result: curve for result in results if len(curve := mean_curve(result.runs)) > 1}
    gains = [result for result in results if result.gain is not None]
    if not curves:
        return
    figure = Figure(figsize=(12 if gains else 7, 4.6), layout="constrained", dpi=DPI)
    left, *right = figure.subplots(1, 2 if gains else 1, squeeze=False)[0]
    _draw_curves(left, curves)
    for axes in right:
        _draw_gains(axes, gains)
    figure.suptitle(title, fontsize=10)
    with atomic_write(path) as partial:  # without the version, so that the same records give the same file
        figure.savefig(partial, format="png", dpi=DPI, metadata={"Software": None})


def _draw_curves(axes: Axes, curves: dict[TrialResult, list[float]]) -> None:
    """Draw one line per model; pairs with and without plugins share a color, and the plain one is dashed."""
    families = Counter(result.trial.label.partition("+")[0] for result in curves)
    paired = max(families.values()) == 2 < len(curves)
    colors = colormaps["tab10" if len(curves) <= 10 else "tab20"].colors
    for number, (result, values) in enumerate(curves.items()):
        label = result.trial.label
        color = colors[([*families].index(label.partition("+")[0]) if paired else number) % len(colors)]
        dashed = paired and any(other.trial.baseline == label for other in curves)
        seen = [result.first("images_seen") * step / len(values) / 1000 for step in range(1, len(values) + 1)]
        axes.plot(seen, values, "--" if dashed else "-", color=color, label=label, linewidth=1.3)
    axes.set(xlabel="images seen (thousands)", ylabel="validation top-1 (%), mean over seeds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2 if len(curves) > 8 else 1)


def _draw_gains(axes: Axes, results: Sequence[TrialResult]) -> None:
    ordered = sorted(results, key=lambda result: result.gain.mean)
    gains = [result.gain.mean for result in ordered]
    errors = [math.nan if result.gain.std is None else result.gain.std for result in ordered]
    colors = ["C2" if gain > 0 else "C3" for gain in gains]
    labels = [result.trial.label for result in ordered]
    axes.barh(labels, gains, xerr=errors, color=colors, alpha=0.6, error_kw={"linewidth": 1, "capsize": 3})
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set(xlabel="gain in test top-1 (points); bars: standard deviation over seeds")
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(alpha=0.3, axis="x")


if __name__ == "__main__":
    folder = Path(__file__).parent
    try:
        write(folder, folder.parent / "RESULTS.md")
    except InputError as error:
        sys.exit(f"results/make.py: {error}")
