"""Write runs as a self-contained HTML page. Imports no torch."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import UInt8
from matplotlib.ticker import EngFormatter
from PIL import Image

from smallvit import __version__
from smallvit.config.config import default_options, format_train_command, option_names, option_types
from smallvit.config.spec import format_value
from smallvit.evaluation.stats import format_comparison, format_t_test, has_unequal_classes, list_confusions
from smallvit.plugins import PLUGINS
from smallvit.report import pictures
from smallvit.report.run_summary import RunSummary
from smallvit.runs.aggregate import aggregate_runs, comparison_rows, describe_conditions
from smallvit.utils.errors import InputError, escape_undecodable, flag, format_duration
from smallvit.utils.files import write_text

TEMPLATE = "page.html.jinja"
NOT_MEASURED = ("inference_images_per_second", "latency_ms")
"""Columns of a comparison that run folders do not fill."""
INFERENCE = "Inference: not measured here; use smallvit compare RUN RUN ..."
THUMBNAIL, MAX_THUMBNAILS, MAX_PICTURED = 96, 8, 300
"""Of findings: side of a picture in pixels, pictures of a finding, and findings of a kind with pictures."""
MAX_CONFUSIONS = 8
"""Pairs of classes in the table of frequent confusions."""


METRIC_TITLES = {
    "map": "mAP (mean average precision)",
    "knn_top1": "accuracy of nearest neighbors",
    "top1": "accuracy (top-1)",
}
"""Main metrics in headlines."""


def write_crossval(record: dict[str, Any], scores: list[list[str]], classes: list[list[str]], path: Path) -> None:
    """Write the page of a cross-validation.

    Args:
        record: The contents of crossval.json.
        scores: Table of the folds.
        classes: Table of the classes.
        path: The page, next to the files of the cross-validation.

    Raises:
        OSError: The file cannot be written.
    """
    _write_page(
        path,
        "crossval.html.jinja",
        record=record,
        tables={"Folds": scores, "Classes": classes},
        confusions=list_confusions(record)[:MAX_CONFUSIONS],
        picture=pictures.read_confusion(path.parent, record),
    )


def write_check(
    results: dict[str, Any],
    findings: dict[str, list[tuple[str, list[int]]]],
    classes: list[list[str]],
    read: Callable[[int, int], UInt8[np.ndarray, "c h w"]],
    sheet: Image.Image | None,
    path: Path,
) -> None:
    """Write the page of a check of images.

    Args:
        results: The results of the check.
        findings: A line and the numbers of the images for each finding, by the titles of the kinds.
        classes: Table of the classes.
        read: Return the pixels of an image by its number, for a side in pixels.
        sheet: Some images of each class.
        path: The page.

    Raises:
        OSError: The file cannot be written.
    """

    def embed(index: int) -> str:
        return pictures.embed(Image.fromarray(read(index, THUMBNAIL).transpose(1, 2, 0)))

    pictured = {
        title: [
            (line, [embed(index) for index in indices[:MAX_THUMBNAILS]] if number < MAX_PICTURED else [])
            for number, (line, indices) in enumerate(lines)
        ]
        for title, lines in findings.items()
    }
    picture = None if sheet is None else pictures.embed(sheet)
    _write_page(path, "check.html.jinja", results=results, findings=pictured, classes=classes, sheet=picture)


def _write_page(path: Path, template: str, **values: Any) -> None:
    """Write the page of a template."""
    page = (
        _environment()
        .get_template(template)
        .render(version=__version__, day=datetime.date.today().isoformat(), **values)
    )
    write_text(path, escape_undecodable(page.lstrip()))


def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("smallvit.report", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "short": EngFormatter(places=1),
        "duration": format_duration,
        "comparison": format_comparison,
        "t_test": format_t_test,
    }
    return environment


def write_report(runs: Sequence[RunSummary], path: Path) -> None:
    """Write the page of one or several runs.

    Raises:
        OSError: The file cannot be written.
    """
    names = [run.folder.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    comparison = _compare(dict(zip(names, runs, strict=True))) if len(runs) > 1 else {}
    seeds = comparison.get("seeds", {})
    _write_page(
        path,
        TEMPLATE,
        title=f"{len(runs)} runs" if comparison else runs[0].title,
        runs=[
            _describe(run) | {"name": name, "key": f"run{number}", "seeds": seeds.get(run.folder, 1)}
            for number, (name, run) in enumerate(zip(names, runs, strict=True), 1)
        ],
        comparison=comparison,
    )


def _describe(run: RunSummary) -> dict[str, Any]:
    """Return the template's variables for a run."""
    config, metrics = run.view.config, run.metrics
    changed, others = list_options(run)
    return {
        **{name: getattr(run, name) for name in ("folder", "title", "arch", "spec", "summary", "best", "interval")},
        "score": run.score,
        "several": run.metric == "map",
        "metric": run.metric,
        "metric_title": METRIC_TITLES[run.metric],
        "takes_arrays": run.takes_arrays,
        "notes": run.notes,
        "metrics": metrics,
        "config": config,
        "history": run.view.history,
        "plugins": [PLUGINS[name].label for name in run.plugins],
        "unequal": has_unequal_classes(run.summary),
        "weights_sha256": (metrics or run.attention or run.neighbors or {}).get("weights_sha256"),
        "curves": pictures.plot_training(run.view.history, run.best),
        "pictures": run.gallery.test,
        "attention": run.gallery.attention,
        "pretrained": run.pretrained,
        "neighbors": run.gallery.neighbors,
        "data": [config.data.data, *config.pretrain.more_data],
        "confusions": list_confusions(metrics)[:MAX_CONFUSIONS] if metrics and "confusion" in metrics else [],
        "classes": sorted(metrics["classes"] if metrics else (), key=lambda e: (e["f1"] is None, e["f1"] or 0)),
        "changed": changed,
        "others": others,
        "command": format_train_command(config, option_names("launch")),
        "full_command": format_train_command(config, option_names("launch"), full=True),
    }


def _compare(runs: dict[str, RunSummary]) -> dict[str, Any]:
    """Return the template's variables for several runs, with a table over seeds if they can be compared."""
    overlay = pictures.plot_overlay({name: run.view.history for name, run in runs.items()})
    try:
        rows = aggregate_runs(run.folder for run in runs.values())
    except InputError as error:
        return {"overlay": overlay, "notes": [f"No comparison over seeds: {error}"]}
    return {
        "overlay": overlay,
        "table": comparison_rows([row.record(dict.fromkeys(NOT_MEASURED)) for row in rows], NOT_MEASURED),
        "lines": describe_conditions(rows, {}, INFERENCE),
        "seeds": {view.folder: len(row.runs) for row in rows for view in row.runs},
    }


def list_options(run: RunSummary) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """Return the changed options as flag, value and default, and all others as flag, value and group."""
    values, defaults, types = run.view.config.to_dict(), default_options(), option_types()
    changed, others = [], []
    for name, value in values.items():
        if name == "more_data":
            changed += [("--data", each, "none") for each in value]
        elif value != defaults[name]:
            changed.append((flag(name), format_value(value), format_value(defaults[name])))
        elif name not in option_names("launch"):
            others.append((flag(name), format_value(value), types[name][0]))
    return changed, others
