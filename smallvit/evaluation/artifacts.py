"""Write and print the results of an evaluation: tables, figures and metrics."""

from __future__ import annotations

import csv
import json
import os
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from smallvit.evaluation.metrics import Outputs
from smallvit.evaluation.multilabel import LabelOutputs
from smallvit.evaluation.stats import METHODS, format_class_means, format_comparison, list_confusions
from smallvit.models import weights_info
from smallvit.runs.run import Run
from smallvit.utils.errors import collapse_whitespace
from smallvit.utils.files import atomic_update, is_path
from smallvit.utils.plots import draw_grid, save_figure
from smallvit.utils.tables import write_csv
from smallvit.utils.terminal import print_table

METRICS, CLASSES, CONFUSION, PREDICTIONS = "metrics.json", "classes.csv", "confusion.csv", "predictions.csv"
CONFUSION_FIGURE, RELIABILITY, MISTAKES = "confusion.png", "reliability.png", "mistakes.png"
FILES = (CLASSES, CONFUSION, CONFUSION_FIGURE, RELIABILITY, MISTAKES, PREDICTIONS, METRICS)
"""In the order of writing: if the last exists, all do."""
MAX_MISTAKES, COLUMNS = 40, 8
"""Images in mistakes.png, and how many in a row."""
MAX_CLASSES = 20
"""Most classes that are all printed; of more, only the worst."""
WORST_CLASSES, TOP_CONFUSIONS = 10, 5
"""Classes and confusions that are printed."""
MAX_NUMBERED, MAX_LABELS, MAX_LENGTH = 20, 60, 24
"""In confusion.png: most classes for which cells contain numbers, most labels along an axis, and their length."""
MARGIN, CHARACTERS_PER_INCH = 2.2, 11
"""Inches for labels next to a matrix; characters of a title per inch."""

ReadImages = Callable[[Sequence[int]], UInt8[np.ndarray, "b c h w"]]
"""Return the pixels of the images at these indices."""


# Files


def resolve_output(name: str, data: str, split: str, out: str | None) -> Path | None:
    """Return the output folder: `out`, or one in the run folder; None for weights without a run.

    Results on other data than the run's have the data's name in the folder's.
    """
    if out is not None:
        return Path(os.path.expanduser(out))
    if not is_path(name) or not os.path.isdir(run := Path(os.path.expanduser(name))):
        return None
    if weights_info.is_training_data(data, weights_info.read_data_options(name)):
        return run / Run.EVAL / split
    path = os.path.expanduser(data)
    title = os.path.basename(os.path.realpath(path)) if os.path.exists(path) else data.replace(os.sep, "-")
    return run / Run.EVAL / f"{title}-{split}"


def list_outputs(folder: Path) -> list[Path]:
    """List the output files in a folder, the metrics last."""
    return [folder / name for name in FILES if (folder / name).exists()]


def write_artifacts(
    folder: Path, record: dict[str, Any], outputs: Outputs, paths: list[str] | None, read_images: ReadImages
) -> None:
    """Write all output files atomically; other files in the folder stay."""
    name = os.path.basename(os.path.realpath(os.path.expanduser(record["name"])))
    title = f"{name} on {record['data']}, {record['split']}: {record['top1']:.2f} % of {record['images']:,} images"
    names, confusion = [each["name"] for each in record["classes"]], np.array(record["confusion"])
    with atomic_update(folder, list_outputs) as partial_folder:
        write_csv(record["classes"], partial_folder / CLASSES)
        rows = [[name, *row] for name, row in zip(names, confusion, strict=True)]
        write_rows(partial_folder / CONFUSION, [["true", *names], *rows])
        write_rows(partial_folder / PREDICTIONS, _prediction_rows(outputs, names, paths))
        plot_confusion(confusion, names, partial_folder / CONFUSION_FIGURE, title)
        plot_reliability(record["reliability"], record["ece"], partial_folder / RELIABILITY, title)
        if (sheet := draw_mistakes(outputs, names, read_images)) is not None:
            sheet.save(partial_folder / MISTAKES)
        _write_record(record, partial_folder / METRICS)


def write_label_artifacts(folder: Path, record: dict[str, Any], outputs: LabelOutputs, paths: list[str] | None) -> None:
    """Write the output files of an evaluation on images with several labels: classes, predictions and metrics."""
    names, thresholds = ([each[key] for each in record["classes"]] for key in ("name", "threshold"))
    predicted = outputs.probabilities >= np.array(thresholds)

    def rows() -> Iterator[list[Any]]:
        yield ["index", "label", "predicted", *(f"p({name})" for name in names), *(["path"] if paths else [])]
        columns = (outputs.index, outputs.targets, predicted, outputs.probabilities)
        for index, *sets, probabilities in zip(*columns, strict=True):
            labels = (";".join(names[number] for number in np.flatnonzero(each)) for each in sets)
            yield [index, *labels, *(f"{p:.6g}" for p in probabilities), *([paths[index]] if paths else [])]

    with atomic_update(folder, list_outputs) as partial_folder:
        write_csv(record["classes"], partial_folder / CLASSES)
        write_rows(partial_folder / PREDICTIONS, rows())
        _write_record(record, partial_folder / METRICS)


def _write_record(record: dict[str, Any], path: Path) -> None:
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def draw_mistakes(outputs: Outputs, names: Sequence[str], read_images: ReadImages) -> Image.Image | None:
    """Draw the most confident mistakes, the most confident first; None if there are none."""
    wrong = np.flatnonzero(~outputs.correct)
    if not len(wrong):
        return None
    shown = outputs.select(wrong[np.argsort(-outputs.probability[wrong], kind="stable")][:MAX_MISTAKES])
    names = [collapse_whitespace(name) for name in names]
    captions = [
        f"{names[label]}\n{100 * probability:.0f}% {names[predicted]}"
        for label, predicted, probability in zip(shown.label, shown.predicted, shown.probability, strict=True)
    ]
    title = f"The {len(shown):,} most confident of {len(wrong):,} mistakes: true class, and predicted class"
    return draw_grid(read_images(shown.index.tolist()), captions, COLUMNS, title=title)


def plot_confusion(confusion: Int64[np.ndarray, "k k"], class_names: Sequence[str], path: Path, title: str) -> None:
    """Plot a confusion matrix as a PNG, rows true and columns predicted; classes in neither are omitted."""
    present = np.flatnonzero(confusion.sum(axis=0) + confusion.sum(axis=1))
    counts, names = confusion[np.ix_(present, present)], [_shorten(class_names[number]) for number in present]
    k, side = len(counts), min(12.0, MARGIN + max(3.2, 0.42 * len(counts)))
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axes = figure.subplots()
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    norm = PowerNorm(0.5, 0, 100)  # so that rare confusions are visible
    image = axes.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[0, 2, 10, 25, 50, 100])
    bar.set_label("share of the true class (%)")
    shown = range(0, k, -(-k // MAX_LABELS))
    size = min(9.0, 50 * (side - MARGIN) / len(shown))
    axes.set_xticks(shown, [names[number] for number in shown], rotation=90, fontsize=size)
    axes.set_yticks(shown, [names[number] for number in shown], fontsize=size)
    axes.set(xlabel="predicted", ylabel="true")
    for row, column in zip(*np.nonzero(counts), strict=True) if k <= MAX_NUMBERED else ():
        color = "white" if shares[row, column] > 35 else "black"
        axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=color, fontsize=8)
    _set_title(figure, title)
    save_figure(figure, path)


def plot_reliability(bins: Sequence[dict[str, Any]], ece: float, path: Path, title: str) -> None:
    """Plot accuracy and number of images by confidence as a PNG; see `metrics.bin_confidence`."""
    figure = Figure(figsize=(5.6, 5.6), layout="constrained")
    accuracy, images = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    filled = [each for each in bins if each["images"]]
    style = {"width": 100 / len(bins), "align": "edge", "edgecolor": "white"}
    heights = [each["accuracy"] for each in filled]
    accuracy.plot([0, 100], [0, 100], "--", color="0.5", linewidth=1, label="calibrated")
    accuracy.bar([100 * each["low"] for each in filled], heights, label="accuracy", **style)
    confidence = [100 * each["confidence"] for each in filled]
    accuracy.plot(confidence, confidence, "k.", label="mean confidence")
    accuracy.set(ylabel="accuracy (%)", ylim=(0, 102), xlim=(0, 100))
    accuracy.legend(loc="upper left")
    total = sum(each["images"] for each in bins)
    images.bar([100 * each["low"] for each in bins], [100 * b["images"] / total for b in bins], color="0.6", **style)
    images.set(xlabel="confidence: probability of the predicted class (%)", ylabel="images (%)")
    for axes in (accuracy, images):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    _set_title(figure, title, f"expected calibration error {ece:.2f} %")
    save_figure(figure, path)


def _set_title(figure: Figure, *lines: str) -> None:
    """Wrap a title to the figure's width."""
    width = int(CHARACTERS_PER_INCH * figure.get_figwidth())
    text = "\n".join(part for line in lines for part in textwrap.wrap(line, width))
    figure.suptitle(text.replace("$", r"\$"), fontsize=11)


def _shorten(name: str) -> str:
    """Shorten a name to one line that fits next to a figure."""
    line = collapse_whitespace(name).replace("$", r"\$")
    return line if len(line) <= MAX_LENGTH else line[: MAX_LENGTH - 1] + "…"


def _prediction_rows(outputs: Outputs, names: list[str], paths: list[str] | None) -> Iterator[list[Any]]:
    yield ["index", "label", "predicted", "probability", *(["path"] if paths is not None else [])]
    columns = (outputs.index, outputs.label, outputs.predicted, outputs.probability)
    for index, label, predicted, probability in zip(*(column.tolist() for column in columns), strict=True):
        row = [index, names[label], names[predicted], f"{probability:.6g}"]
        yield row if paths is None else [*row, paths[index]]


def write_rows(path: Path, rows: Iterable[list[Any]]) -> None:
    """Write rows as CSV."""
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


# Terminal


def print_metrics(record: dict[str, Any], console: Console) -> None:
    """Print the record of `evaluate_run`."""
    show = partial(console.print, markup=False, highlight=False, emoji=False)
    for line in _format_headline(record):
        show(line)
    console.print()
    print_table(console, _class_rows(record["classes"]))
    for line in _format_confusions(record) if "confusion" in record else ():
        show(line)
    if record["robustness"] is not None:
        console.print()
        print_table(console, _robustness_rows(record["robustness"], record.get("map", record.get("top1"))))
    if (comparison := record["comparison"]) is not None:
        console.print()
        accuracies = (
            f"{record['name']} {comparison['top1']:.2f} %, {comparison['name']} {comparison['other_top1']:.2f} %"
        )
        show(f"{accuracies}: {format_comparison(comparison)}")


def _format_headline(record: dict[str, Any]) -> Iterator[str]:
    flipped = ", each with its mirror image" if record["flip"] else ""
    skipped = f" ({record['skipped_images']:,} more cannot be decoded)" if record["skipped_images"] else ""
    images = f"{record['images']:,} images{skipped} at {record['img_size']} pixels{flipped}"
    yield f"{record['name']} on {record['data']}, {record['split']}: {images}"
    if "map" in record:
        yield f"mAP {record['map']:.2f} %   {format_class_means(record)}   loss {record['loss']:.4f}"
        return
    low, high = record["interval"]
    top5 = f"   top-5 {record['top5']:.2f} %" if len(record["classes"]) > 5 else ""
    yield (
        f"top-1 {record['top1']:.2f} % ({METHODS[record['interval_method']]} {low:.2f} to {high:.2f}){top5}   "
        f"loss {record['loss']:.4f}   calibration error {record['ece']:.2f} %"
    )
    if means := format_class_means(record):
        yield means


def _class_rows(classes: list[dict[str, Any]]) -> list[list[str]]:
    """Return precision, recall and F1 of all classes with images, or of the worst by F1; also AP and threshold."""
    present = [each for each in classes if each["images"]]
    title = "class"
    if len(present) > MAX_CLASSES:
        title = f"worst {WORST_CLASSES} of {len(present)} classes"
        present = sorted(present, key=lambda each: each["f1"])[:WORST_CLASSES]
    several = "threshold" in classes[0]
    columns = ("ap", "precision", "recall", "f1") if several else ("precision", "recall", "f1")
    titles = {"ap": "AP %", "precision": "precision %", "recall": "recall %", "f1": "F1 %"}
    rows = [[title, *(titles[name] for name in columns), *["threshold"] * several, "images"]]
    for each in present:
        scores = [f"{each[name]:.1f}" for name in columns]
        scores += [f"{each['threshold']:.3f}"] if several else []
        rows.append([collapse_whitespace(each["name"]), *scores, f"{each['images']:,}"])
    return rows


def _format_confusions(record: dict[str, Any]) -> Iterator[str]:
    """Yield the most frequent confusions, if there are any."""
    images = {each["name"]: each["images"] for each in record["classes"]}
    confusions = list_confusions(record)[:TOP_CONFUSIONS]
    if confusions:
        yield ""
        yield "most frequent confusions (true class → predicted class)"
    for each in confusions:
        names = " → ".join(collapse_whitespace(each[name]) for name in ("true", "predicted"))
        yield f"  {names}: {each['images']:,} of {images[each['true']]:,}"


def _robustness_rows(robustness: dict[str, dict[str, float]], top1: float) -> list[list[str]]:
    """Return the accuracy under each corruption at each strength, and the change."""
    rows = [["corruption", *(f"strength {strength}" for strength in next(iter(robustness.values())))]]
    for kind, levels in robustness.items():
        rows.append([kind, *(f"{each:.2f} ({each - top1:+.2f})".replace("-", "−") for each in levels.values())])
    return rows
