"""Cross-validate a model: train a run for each fold, and predict every image by the run that has not seen it.

Axes: n images, k classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.progress import Progress

from smallvit.config.config import Config, option_names
from smallvit.config.options import ComputeConfig
from smallvit.evaluation import artifacts, metrics, stats
from smallvit.evaluation.evaluator import predict_test
from smallvit.evaluation.metrics import Outputs
from smallvit.experiments.grid import Grid, PlannedRun, train_grid
from smallvit.utils.errors import InputError, escape_undecodable
from smallvit.utils.files import atomic_update
from smallvit.utils.tables import Spread, write_csv
from smallvit.utils.terminal import create_console, create_progress, print_table

RECORD = "crossval.json"
FILES = (artifacts.PREDICTIONS, artifacts.CLASSES, artifacts.CONFUSION, artifacts.CONFUSION_FIGURE, RECORD)
"""In the order of writing: if the last exists, all do."""
SCORES = {"top1": "top-1", "macro_f1": "macro F1", "balanced_accuracy": "balanced accuracy"}
"""Results of a fold, with their titles; all in per cent."""


@dataclass(frozen=True, kw_only=True)
class FoldResult:
    """Predictions of a run for its fold."""

    run: PlannedRun
    data: str
    source_hash: str
    class_names: tuple[str, ...]
    paths: Sequence[str] | None
    train_images: int
    outputs: Outputs
    probabilities: Float[np.ndarray, "n k"]

    def scores(self) -> dict[str, Any]:
        """Return the fold's entry in crossval.json."""
        macro = metrics.compute_class_metrics(self.outputs, self.class_names)["macro"]
        return {
            **{name: self.run.options[name] for name in ("fold_seed", "fold", "seed")},
            "run": self.run.folder.name,
            "train_images": self.train_images,
            "images": len(self.outputs),
            "top1": self.outputs.top1,
            "macro_f1": macro["f1"],
            "balanced_accuracy": macro["recall"],
        }


def cross_validate(
    grid: Grid, compute: ComputeConfig, command: str, other: Path | None = None
) -> dict[str, Any] | None:
    """Train the missing runs of one or two rows, and write and return the results; None if a training failed.

    Args:
        grid: The model, and perhaps a second one to compare it with.
        compute: Device and precision of inference.
        command: The command to record.
        other: Folder of another cross-validation to compare with.

    Raises:
        InputError: Options or data are invalid, or the other cross-validation is of other images or folds.
        KeyboardInterrupt: A signal stopped a run, which has been saved.
        OSError: The files cannot be written.
    """
    compared = None if other is None else read_record(other)
    planned, failed = train_grid(grid, compute.device)
    if failed:
        return None
    with create_progress(create_console(stderr=True)) as progress:
        results = [predict_fold(run, compute, progress) for run in planned]
    first, *rest = ([each for each in results if each.run.row is row] for row in grid.rows)
    record = summarize(first, command)
    for each in rest:
        compared = summarize(each, command)
    if compared is not None:
        record["comparison"] = {"name": compared["model"], **compare_records(record, compared, other)}
    _write(grid.out, record, first)
    return record


def predict_fold(run: PlannedRun, compute: ComputeConfig, progress: Progress) -> FoldResult:
    """Predict the images of a run's fold with its best weights."""
    flip = run.options.get("test_flip", False)
    task, outputs, probabilities = predict_test(str(run.folder), "crossval", compute, progress, flip=flip)
    dataset = task.dataset
    return FoldResult(
        run=run,
        data=dataset.name,
        source_hash=dataset.source_hash,
        class_names=task.class_names,
        paths=task.paths,
        train_images=len(dataset.train) + len(dataset.val),
        outputs=outputs,
        probabilities=probabilities,
    )


def summarize(results: Sequence[FoldResult], command: str) -> dict[str, Any]:
    """Return the contents of crossval.json: scores of each fold, their means, and results by class of all folds.

    With several repeats each image counts in each of them.
    """
    run, class_names = results[0].run, results[0].class_names
    folds = [each.scores() for each in results]
    spreads = {name: Spread.of([fold[name] for fold in folds]) for name in SCORES}
    pooled = metrics.compute_metrics(metrics.concatenate([each.outputs for each in results]), class_names)
    config = Config.build(**run.options)
    options = config.to_dict()
    return {
        "model": escape_undecodable(run.row.label),
        "data": escape_undecodable(results[0].data),
        "images": sum(fold["images"] for fold in folds if fold["fold_seed"] == folds[0]["fold_seed"]),
        "folds": config.data.folds,
        "repeats": len(folds) // config.data.folds,
        "mean": {name: spread.mean for name, spread in spreads.items()},
        "std": {name: spread.std for name, spread in spreads.items()},
        "runs": folds,
        "conditions": {
            "images": results[0].source_hash,
            "classes": list(class_names),
            **{name: options[name] for name in option_names("affects_test") if name not in ("data", "fold")},
        },
        **{name: pooled[name] for name in ("classes", "confusion")},
        "command": command,
        "comparison": None,
    }


def compare_records(record: dict[str, Any], other: dict[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """Compare two cross-validations by the corrected resampled t-test of their accuracies in each fold.

    Raises:
        InputError: They have other images, classes, folds or splits.
    """
    conditions, others = ({**each["conditions"], "repeats": each["repeats"]} for each in (record, other))
    for name, value in conditions.items():
        if others.get(name) != value:
            raise InputError(
                f"--compare {folder or other['model']}: {name.replace('_', '-')} {others.get(name)}, not {value}; "
                "cross-validate it again with the same data and folds"
            )
    pairs = list(zip(record["runs"], other["runs"], strict=True))
    share = float(np.mean([fold["images"] / fold["train_images"] for fold in record["runs"]]))
    differences = [fold["top1"] - each["top1"] for fold, each in pairs]
    return {"mean": other["mean"], "std": other["std"], **stats.corrected_t_test(differences, share)}


def read_record(folder: Path) -> dict[str, Any]:
    """Read the results of a cross-validation.

    Raises:
        InputError: The folder holds none, or they are damaged.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if not record.keys() >= {"model", "mean", "std", "runs", "conditions", "repeats"}:
            raise ValueError
    except (OSError, ValueError, AttributeError):
        raise InputError(
            f"--compare {folder}: no {RECORD} of a finished cross-validation; give its folder, or a row"
        ) from None
    return record


def _write(out: Path, record: dict[str, Any], results: Sequence[FoldResult]) -> None:
    names, confusion = list(results[0].class_names), np.array(record["confusion"])
    mean, std = record["mean"]["top1"], record["std"]["top1"]
    title = f"{record['model']} on {record['data']}: {mean:.2f} ± {std:.2f} % over {len(results)} folds"
    with atomic_update(out, lambda folder: [folder / name for name in FILES if (folder / name).exists()]) as partial:
        artifacts.write_rows(partial / artifacts.PREDICTIONS, _prediction_rows(results, names))
        write_csv(record["classes"], partial / artifacts.CLASSES)
        rows = [[name, *row] for name, row in zip(names, record["confusion"], strict=True)]
        artifacts.write_rows(partial / artifacts.CONFUSION, [["true", *names], *rows])
        artifacts.plot_confusion(confusion, names, partial / artifacts.CONFUSION_FIGURE, title)
        (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _prediction_rows(results: Sequence[FoldResult], names: list[str]) -> list[list[Any]]:
    """Return the predictions of all folds, with the probabilities of all classes."""
    rows: list[list[Any]] = [["fold_seed", "fold", "path", "label", "predicted", *(f"p({name})" for name in names)]]
    for each in results:
        paths, outputs = each.paths, each.outputs
        start = [each.run.options["fold_seed"], each.run.options["fold"]]
        for index, label, predicted, p in zip(
            outputs.index.tolist(), outputs.label, outputs.predicted, each.probabilities.tolist(), strict=True
        ):
            path = index if paths is None else paths[index]
            rows.append([*start, path, names[label], names[predicted], *(f"{value:.6g}" for value in p)])
    return rows


def print_record(record: dict[str, Any]) -> None:
    """Print means, classes and the comparison."""
    console = create_console()
    console.print()
    print_table(console, score_rows(record))
    console.print()
    print_table(console, class_rows(record))
    if comparison := record["comparison"]:
        text = f"\n{record['model']} and {comparison['name']}: {stats.format_t_test(comparison)}"
        console.print(text, markup=False, highlight=False)


def score_rows(record: dict[str, Any]) -> list[list[str]]:
    """Return the scores of each fold, and their mean and standard deviation."""
    rows = [["fold", *(f"{title} %" for title in SCORES.values()), "images"]]
    for fold in record["runs"]:
        label = f"{fold['fold']}, seed {fold['fold_seed']}" if record["repeats"] > 1 else str(fold["fold"])
        rows.append([label, *(f"{fold[name]:.2f}" for name in SCORES), f"{fold['images']:,}"])
    means = [f"{record['mean'][name]:.2f} ± {record['std'][name]:.2f}" for name in SCORES]
    return [*rows, ["mean ± sd", *means, f"{record['images']:,}"]]


def class_rows(record: dict[str, Any]) -> list[list[str]]:
    """Return precision, recall and F1 of each class over all folds."""
    rows = [["class", "precision %", "recall %", "F1 %", "images"]]
    for each in record["classes"]:
        scores = ("–" if each[name] is None else f"{each[name]:.1f}" for name in ("precision", "recall", "f1"))
        rows.append([each["name"], *scores, f"{each['images']:,}"])
    return rows
