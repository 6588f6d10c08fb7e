"""Runs on one HTML page that needs nothing but itself: no network, no other file, hardly a script. Imports no torch."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from smallvit import __version__
from smallvit.comparison.standings import gathered, notes
from smallvit.costs import savings
from smallvit.errors import InputError
from smallvit.files import write_text
from smallvit.pages import charts, telling
from smallvit.pages.dossier import Dossier
from smallvit.pages.drawings import Chart
from smallvit.report import TITLES, cell

TEMPLATE = "page.html.jinja"
DASHES = {"-": "", "--": "6 3", ":": "2 3", "-.": "7 3 2 3"}
NOT_MEASURED = ("inference_images_per_second", "latency_ms")
"""Columns of a comparison that runs' folders do not fill."""
INFERENCE = "Inference: not measured here; smallvit compare RUN RUN ... does"


def write(runs: Sequence[Dossier], path: Path) -> None:
    """Write the page of one run, or of several side by side.

    Raises:
        OSError: the file cannot be written.
    """
    text = render(runs, datetime.date.today().isoformat())
    write_text(path, text.encode("utf-8", "backslashreplace").decode())  # names of files may be no UTF-8


def render(runs: Sequence[Dossier], day: str) -> str:
    """The page as text; `day` is when it was written."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("smallvit.pages", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    names = _names(runs)
    several = _several(names, runs) if len(runs) > 1 else {}
    seeds = several.pop("seeds", {})
    shown = [
        _run(run, name, f"run{number}", seeds.get(run.folder, 1))
        for number, (name, run) in enumerate(zip(names, runs, strict=True), 1)
    ]
    first = shown[0]
    heading = f"{len(runs)} runs side by side" if several else first["title"]
    top1 = first["headline"]["top1"]
    title = heading if several or top1 is None else f"{heading}: {top1:.2f} %"
    contents = _contents_of_several(shown, several) if several else _contents(first)
    page = environment.get_template(TEMPLATE).render(
        version=__version__, day=day, title=title, heading_text=heading, runs=shown, contents=contents, **several
    )
    return page.lstrip()


def _run(run: Dossier, name: str, key: str, seeds: int) -> dict[str, Any]:
    """What the template shows of a run."""
    differing, others = telling.options(run)
    unfinished = telling.state(run)
    return {
        "key": key,
        "name": name,
        "title": telling.title(run),
        "headline": telling.headline(run),
        "notes": [*([unfinished] if unfinished else []), *run.notes],
        "figures": telling.figures(run),
        "facts": telling.facts(run),
        "curves": [_chart(drawn) for drawn in charts.curves(run, key)],
        "attention": run.gallery.attention,
        "differing": differing,
        "others": others,
        "command": telling.command(run),
        "full_command": telling.command(run, full=True),
        "snippet": telling.snippet(run),
        "loadable": run.card is not None,
        "caveats": telling.caveats(run, seeds),
        "row": _row(run),
        **(_judged(run, key) if run.metrics is not None else {}),
    }


def _judged(run: Dossier, key: str) -> dict[str, Any]:
    """What the template shows of a run's test."""
    metrics = run.metrics
    spoilt = metrics.get("robustness") or {}
    return {
        "judged": {name: _chart(drawn) for name, drawn in charts.judged(metrics, key).items()},
        "confusions": charts.confusions(metrics),
        "classes": sorted(metrics["classes"], key=lambda each: (each["f1"] is None, each["f1"] or 0)),
        "robustness": spoilt,
        "severities": list(next(iter(spoilt.values()), ())),
        "clean": metrics["top1"],
        "mistakes": run.gallery.mistakes,
        "comparison": telling.comparison(run),
    }


def _several(names: Sequence[str], runs: Sequence[Dossier]) -> dict[str, Any]:
    """What the template shows of several runs at once: a comparison, where they can be compared."""
    together = [_chart(drawn) for drawn in charts.together(list(zip(names, runs, strict=True)))]
    try:
        standings = gathered(run.folder for run in runs)
    except InputError as error:
        return {"together": together, "notes": [f"No comparison over seeds: {error}"], "table": None, "lines": []}
    records = [standing.record(dict.fromkeys(NOT_MEASURED)) for standing in standings]
    titles = savings.joined({name: title for name, title in TITLES.items() if name not in NOT_MEASURED}, records)
    rows = [[cell(record, name) for name in titles] for record in records]
    table = {"titles": [*titles.values()], "rows": rows}
    return {
        "together": together,
        "notes": [],
        "table": table,
        "lines": notes(standings, {}, INFERENCE, "")[:-1],  # the last says the command
        "seeds": {view.folder: len(standing.runs) for standing in standings for view in standing.runs},
    }


def _row(run: Dossier) -> list[str]:
    """A run among others: seed, epochs, validation, test, interval, time."""
    summary, best = run.summary, run.best
    interval = telling.interval(run)
    done = len(run.view.history)
    return [
        str(run.view.config.run.seed),
        f"{done}" if summary else f"{done} of {run.view.config.optim.epochs}",
        "–" if best is None else f"{best['val_top1']:.2f}",
        f"{summary['test_top1']:.2f}" if summary else "–",
        "–" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}",
        telling.duration(run.view.history[-1]["seconds"]) if done else "–",
    ]


def _contents(run: dict[str, Any]) -> list[tuple[str, str]]:
    parts = (
        ("curves", "training", "Training"),
        ("judged", "test", "Test"),
        ("attention", "attention", "Where it looks"),
    )
    there = [(f"{run['key']}-{id}", text) for part, id, text in parts if run.get(part)]
    ends = (("setup", "Setup"), ("options", "Options"), ("again", "Do it again"), ("caveats", "Read with care"))
    return there + [(f"{run['key']}-{id}", text) for id, text in ends if id != "caveats" or run["caveats"]]


def _contents_of_several(runs: Sequence[dict[str, Any]], several: dict[str, Any]) -> list[tuple[str, str]]:
    first = [("comparison", "Comparison"), ("runs", "Runs"), *([("curves", "Curves")] if several["together"] else [])]
    last = [("how", "How the figures came about")] if several["lines"] else []
    return [*first, *((run["key"], run["name"]) for run in runs), *last]


def _names(runs: Sequence[Dossier]) -> list[str]:
    """What runs are called: by their folders' names, or by their paths where these are the same."""
    names = [run.folder.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _chart(drawn: Chart) -> dict[str, Any]:
    """A chart, its curves with what the page calls their colours and dashes."""
    legend = [
        {
            "label": curve.label,
            "variable": f"--series-{curve.colour % 8 + 1}",
            "alpha": f"{curve.alpha:.2f}",
            "dashes": DASHES[curve.dash],
        }
        for curve in drawn.legend
    ]
    return {"title": drawn.title, "svg": drawn.svg, "legend": legend}
