"""The files that a judgement leaves: tables, pictures, and the record of it all."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from smallvit import learnt, trained
from smallvit.files import unshared_folder
from smallvit.judgement import pictures
from smallvit.judgement.case import Case
from smallvit.judgement.metrics import Answers
from smallvit.report import write_csv
from smallvit.runs import Run
from smallvit.sheet import grid
from smallvit.words import one_line

METRICS, CLASSES, CONFUSION, PREDICTIONS = "metrics.json", "classes.csv", "confusion.csv", "predictions.csv"
CONFUSION_PICTURE, RELIABILITY, MISTAKES = "confusion.png", "reliability.png", "mistakes.png"
FILES = (CLASSES, CONFUSION, CONFUSION_PICTURE, RELIABILITY, MISTAKES, PREDICTIONS, METRICS)
"""In the order in which they come into their folder: where the last is, all are."""
SHOWN, COLUMNS = 40, 8
"""Mistakes on the sheet, and how many are side by side."""


def destination(name: str, data: str, split: str, out: str | None) -> Path | None:
    """The folder of the files: `out`, or one in the run's; None for weights without a run.

    Data that the run has not learnt from is told by its name.
    """
    if out is not None:
        return Path(os.path.expanduser(out))
    if not trained.is_path(name) or not os.path.isdir(run := Path(os.path.expanduser(name))):
        return None
    own = learnt.is_learnt(data, learnt.learnt_data(name))
    place = os.path.expanduser(data)
    called = os.path.basename(os.path.realpath(place)) if os.path.exists(place) else data
    return run / Run.EVAL / (split if own else f"{called.replace(os.sep, '-')}-{split}")


def write(folder: Path, record: dict[str, Any], case: Case, answers: Answers) -> None:
    """Write all files, or none: they come into the folder when they are complete, the record last.

    Other files there are left alone; those of an earlier judgement are replaced.
    """
    called = os.path.basename(os.path.realpath(os.path.expanduser(record["name"])))
    title = f"{called} on {record['data']}, {record['split']}: {record['top1']:.2f} % of {record['images']:,} images"
    names, confusion = [each["name"] for each in record["classes"]], np.array(record["confusion"])
    with _together(folder) as aside:
        write_csv(record["classes"], aside / CLASSES)
        _write_rows(
            aside / CONFUSION, [["true", *names], *([n, *row] for n, row in zip(names, confusion, strict=True))]
        )
        _write_rows(aside / PREDICTIONS, _predictions(answers, names, case.paths))
        pictures.plot_confusion(confusion, names, aside / CONFUSION_PICTURE, title)
        pictures.plot_reliability(record["reliability"], record["ece"], aside / RELIABILITY, title)
        if (page := mistakes(case, answers)) is not None:
            page.save(aside / MISTAKES)
        lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
        (aside / METRICS).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def mistakes(case: Case, answers: Answers) -> Image.Image | None:
    """The mistakes that a model is surest of, the surest first; None where it makes none."""
    wrong = np.flatnonzero(~answers.correct)
    if not len(wrong):
        return None
    chosen = answers.take(wrong[np.argsort(-answers.probability[wrong], kind="stable")][:SHOWN])
    names = [one_line(name) for name in case.class_names]
    captions = [
        f"{names[label]}\n{100 * probability:.0f}% {names[predicted]}"
        for label, predicted, probability in zip(chosen.label, chosen.predicted, chosen.probability, strict=True)
    ]
    title = (
        f"{len(chosen):,} of {len(wrong):,} mistakes, the surest first: the true class, and the one predicted instead"
    )
    return grid(torch.from_numpy(case.at(chosen.index.tolist())) / 255, captions, COLUMNS, title=title)


def _predictions(answers: Answers, names: list[str], paths: list[str] | None) -> Iterator[list[Any]]:
    yield ["index", "label", "predicted", "probability", *(["path"] if paths is not None else [])]
    columns = (answers.index, answers.label, answers.predicted, answers.probability)
    for index, label, predicted, probability in zip(*(column.tolist() for column in columns), strict=True):
        row = [index, names[label], names[predicted], f"{probability:.6g}"]
        yield row if paths is None else [*row, paths[index]]


def _write_rows(path: Path, rows: Any) -> None:
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


@contextmanager
def _together(folder: Path) -> Iterator[Path]:
    """Give a folder to write to, from which `FILES` come into this one at the end; nothing is left of a failure."""
    made = [parent for parent in (folder, *folder.absolute().parents) if not os.path.exists(parent)]
    aside, done = None, False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = unshared_folder(folder)
        yield aside
        written = {*os.listdir(aside)}
        if missing := {*FILES} - {MISTAKES} - written:
            raise OSError(f"{folder}: {min(missing)} was removed while it was written; run it again")
        (folder / METRICS).unlink(missing_ok=True)
        for name in FILES:
            if name in written:
                os.replace(aside / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        done = True
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        for parent in made if not done else ():
            with suppress(OSError):  # others have put something there
                parent.rmdir()
