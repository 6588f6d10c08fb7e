"""Evaluate a trained model on a split of a data set, and write the results.

Axes: b batch, c channels, h w pixels, m classes of the data, n images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import sklearn
import torch
from jaxtyping import Float, Int64, UInt8
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from smallvit import datasets
from smallvit.config.config import Config
from smallvit.config.options import ComputeConfig, DataConfig
from smallvit.datasets.dataset import Files, ImageDataset, Images
from smallvit.datasets.functional import CORRUPTIONS, STRENGTHS, corrupt
from smallvit.datasets.gray import GrayRanges
from smallvit.datasets.listing import SPLITS
from smallvit.datasets.loader import IGNORED_LABEL, evaluation_batches
from smallvit.evaluation import artifacts, metrics, multilabel, stats
from smallvit.evaluation.metrics import Outputs
from smallvit.evaluation.multilabel import LabelOutputs
from smallvit.evaluation.predictor import Predictor, check_test_split, create_predictor, is_trained_on, read_model_info
from smallvit.models import weights, weights_info
from smallvit.models.weights_info import WeightsInfo
from smallvit.utils import hardware
from smallvit.utils.errors import InputError, escape_undecodable, require, suggest
from smallvit.utils.files import check_output_folder
from smallvit.utils.sizes import ImageSize, height_width
from smallvit.utils.terminal import create_console, create_progress

CHOICES = (*SPLITS, "all")
"""Values of --split."""
MAX_NAMED = 3
"""Classes named in an error message."""
Condition = tuple[str, int] | None
"""A kind of corruption and its strength; None for unchanged images."""


@dataclass(frozen=True, kw_only=True)
class EvaluationTask:
    """A model and the images to evaluate it on. Image indices count through all splits."""

    predictor: Predictor
    dataset: ImageDataset
    splits: tuple[str, ...]
    class_indices: Int64[np.ndarray, " m"]
    """The model's index of each class of the data."""
    class_names: tuple[str, ...]
    """Names of the model's classes, printable."""

    @property
    def parts(self) -> list[Images | Files]:
        """The images of each split."""
        return [getattr(self.dataset, split) for split in self.splits]

    @property
    def labels(self) -> Int64[np.ndarray, " n"]:
        """The true class of each image, as the model's index.

        Raises:
            InputError: Images have several labels.
        """
        if self.dataset.label_sets is not None:
            raise InputError(f"--data {self.dataset.name}: several labels an image; only one is supported here")
        return self.class_indices[np.concatenate([part.labels.numpy() for part in self.parts])]

    @property
    def paths(self) -> list[str] | None:
        """The file of each image; None unless all images are read from files."""
        parts = [part.paths for part in self.parts]
        return None if None in parts else [path for part in parts for path in part]

    def __len__(self) -> int:
        """Return the number of batches."""
        return sum(-(-len(part) // self.predictor.batch_size) for part in self.parts)

    def batches(self) -> Iterator[tuple[UInt8[Tensor, "b c h w"], Int64[Tensor, " b"]]]:
        """Yield pixels and indices of all images, except those that cannot be decoded."""
        black, white = (0.0,) * self.dataset.in_chans, (1.0,) * self.dataset.in_chans
        first = 0
        for split, part in zip(self.splits, self.parts, strict=True):
            indexed = replace(part, labels=torch.arange(first, first + len(part)))  # indices instead of classes
            dataset = replace(self.dataset, mean=black, std=white, **{split: indexed})
            for images, indices in evaluation_batches(dataset, split, self.predictor.device, self.predictor.batch_size):
                if (decoded := indices != IGNORED_LABEL).any():
                    yield (255 * images[decoded]).round().byte(), indices[decoded]
            first += len(part)

    def read_images(self, indices: Sequence[int]) -> UInt8[np.ndarray, "b c h w"]:
        """Return the pixels of some images."""
        firsts = np.cumsum([0, *map(len, self.parts)])
        images = []
        for index in indices:
            number = int(np.searchsorted(firsts, index, side="right")) - 1
            part, position = self.parts[number], index - firsts[number]
            images.append(part.pixels[position].numpy() if isinstance(part, Images) else part.decode(position))
        return np.stack(images)

    def compute_logits(
        self, conditions: Sequence[Condition], progress: Progress, *, flip: bool, description: str = "images"
    ) -> Iterator[tuple[Condition, Float[Tensor, "b k"], Int64[Tensor, " b"]]]:
        """Yield the logits of batches of images under each condition, and the images' indices, on the CPU.

        Args:
            conditions: Corruptions to apply.
            progress: Where to show a progress bar.
            flip: Average the probabilities over each image and its mirror image.
            description: What the progress bar counts.

        Raises:
            InputError: The logits are not finite.
        """
        for pixels, indices in progress.track(self.batches(), len(self), description=description):
            for condition in conditions:
                images = pixels if condition is None else corrupt(pixels, *condition, indices)
                logits = self.predictor.predict_logits(self.predictor.normalize(images), flip=flip)
                if not logits.isfinite().all():
                    raise self.predictor.info.error("the logits are not finite, so these weights are unusable")
                yield condition, logits.cpu(), indices.cpu()

    def collect_outputs(self, logits: Float[Tensor, "b k"], indices: Int64[Tensor, " b"]) -> Outputs | LabelOutputs:
        """Return what is kept of a model's logits for some images, with the images' labels."""
        labels = torch.cat([part.labels for part in self.parts])[indices]
        if self.dataset.label_sets is None:
            return metrics.reduce_logits(logits, torch.from_numpy(self.class_indices)[labels], indices)
        targets = self.dataset.targets[labels].bool()
        return LabelOutputs(indices.numpy(), targets.numpy(), logits[:, self.class_indices].double().numpy())

    def compute_outputs(
        self, conditions: Sequence[Condition], progress: Progress, *, flip: bool
    ) -> dict[Condition, Any]:
        """Compute the model's outputs (see `collect_outputs`) under each condition, as `compute_logits` does.

        Raises:
            InputError: The logits are not finite, or no image can be decoded.
        """
        batches: dict[Condition, list[Any]] = {condition: [] for condition in conditions}
        for condition, logits, indices in self.compute_logits(conditions, progress, flip=flip):
            batches[condition].append(self.collect_outputs(logits, indices))
        return {condition: metrics.concatenate(outputs) for condition, outputs in batches.items()}


def evaluate_run(
    name: str,
    config: Config,
    *,
    split: str = "test",
    flip: bool = False,
    robustness: bool = False,
    compare: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Evaluate a trained model on a split of the configuration's data.

    Args:
        name: A run folder, a weights file, or a timm model with pretrained weights.
        config: The data, and the device to use.
        split: train, val, test or all.
        flip: Average the probabilities over each image and its mirror image.
        robustness: Also evaluate on corrupted images.
        compare: A second model to evaluate on the same images.
        out: Output folder; by default one in the run folder, and none for weights without a run.
        overwrite: Replace earlier results.
        console: Where to print warnings and progress; by default standard error.
        command: The command to record.

    Returns:
        The contents of metrics.json.

    Raises:
        InputError: There is no such model, data or split, they do not fit each other, the test split contains training
            images, or the output folder holds results.
    """
    require(split in CHOICES, "split", split, f"one of {', '.join(CHOICES)}{suggest(split, CHOICES)}")
    folder = artifacts.resolve_output(name, config.data.data, split, out)
    infos = [read_model_info(name, "eval", config.model.arch)]
    infos += [read_model_info(compare, "--compare", None)] if compare is not None else []
    several = infos[0].multi_label
    if several and compare is not None:
        raise InputError(f"--compare {compare}: models of several labels an image cannot be compared yet; remove it")
    if folder is not None:
        check_output_folder(folder, "--out", overwrite=overwrite)
    hardware.pick_device(config.compute.device)
    digest = weights_info.compute_sha256(infos[0])
    console = console or create_console(stderr=True)
    tasks = create_tasks(name, infos, config, split)
    for note in list(_list_notes(tasks, config)):  # all checks come before the first line
        console.print(escape_undecodable(note), markup=False, highlight=False, emoji=False)
    corruptions: list[Condition] = [(kind, strength) for kind in CORRUPTIONS for strength in STRENGTHS]
    with create_progress(console) as progress:
        conditions = [None, *corruptions] if robustness else [None]
        results = tasks[0].compute_outputs(conditions, progress, flip=flip)
        others = [task.compute_outputs([None], progress, flip=flip)[None] for task in tasks[1:]]
    outputs, dataset, predictor = results[None], tasks[0].dataset, tasks[0].predictor
    robust = {
        kind: {str(strength): results[kind, strength].score for strength in STRENGTHS if robustness}
        for kind in CORRUPTIONS
    }
    names = tasks[0].class_names
    if several:
        indices = tasks[0].class_indices
        thresholds = np.array(infos[0].thresholds)[indices]
        measured = multilabel.compute_metrics(outputs, [names[index] for index in indices], thresholds)
    else:
        measured = metrics.compute_metrics(outputs, names)
    record = {
        "name": escape_undecodable(name),
        "data": escape_undecodable(infos[0].data if is_trained_on(infos[0], dataset) else dataset.name),
        "split": split,
        **measured,
        "imbalance_ratio": dataset.imbalance_ratio,
        "skipped_images": sum(map(len, tasks[0].parts)) - len(outputs),
        "flip": flip,
        "robustness": robust if robustness else None,
        "comparison": {"name": escape_undecodable(compare), **compare_outputs(outputs, others[0])} if others else None,
        "weights_sha256": digest,
        "img_size": predictor.img_size,
        "precision": predictor.precision,
        "hardware": hardware.describe_hardware(predictor.device),
        "versions": hardware.versions() | {"scikit-learn": sklearn.__version__, "scipy": scipy.__version__},
        "git_revision": hardware.git_revision(),
        "command": command,
    }
    if folder is not None and several:
        artifacts.write_label_artifacts(folder, record, outputs, tasks[0].paths)
    elif folder is not None:
        artifacts.write_artifacts(folder, record, outputs, tasks[0].paths, tasks[0].read_images)
    return record


def predict_test(
    name: str, verb: str, compute: ComputeConfig, progress: Progress, *, flip: bool = False
) -> tuple[EvaluationTask, Outputs, Float[np.ndarray, "n k"]]:
    """Predict the test split of a run's own data with its best weights.

    Returns:
        The model and its images, its outputs, and the probabilities of all classes.

    Raises:
        InputError: There is no such run, its data has moved, or the logits are not finite.
    """
    info = weights_info.read_weights_info(name, verb)
    config = replace(Config.build(**weights_info.add_data_options(info, {})), compute=compute)
    if info.multi_label:
        raise info.error("its images have several labels, which this verb does not take")
    (task,) = create_tasks(name, [info], config, "test")
    batches, probabilities = [], []
    for _, logits, indices in task.compute_logits([None], progress, flip=flip, description=Path(name).name):
        labels = task.dataset.test.labels[indices]
        batches.append(metrics.reduce_logits(logits, labels, indices))
        probabilities.append(logits.double().softmax(dim=1).numpy())
    return task, metrics.concatenate(batches), np.concatenate(probabilities)


def compare_outputs(outputs: Outputs, others: Outputs) -> dict[str, Any]:
    """Compare two models on the images that both were evaluated on."""
    _, first, second = np.intersect1d(outputs.index, others.index, return_indices=True)
    return stats.compare_paired(outputs.correct[first], others.correct[second])


def create_tasks(name: str, infos: list[WeightsInfo], config: Config, split: str) -> list[EvaluationTask]:
    """Pair each model with the same images at its own size, or the first at the size of `config`."""
    own = weights_info.is_training_data(config.data.data, weights_info.read_data_options(name))
    sizes = [config.data.img_size or infos[0].spec["img_size"], *(info.spec["img_size"] for info in infos[1:])]
    data = _read_data(config, sizes, infos, draw=own or split != "all")
    splits = SPLITS if split == "all" else (split,)
    if not any(len(getattr(data[0], each)) for each in splits):
        raise InputError(f"--split {split}: {data[0].name} has no such images; choose another split")
    splits = tuple(each for each in splits if len(getattr(data[0], each)))
    matches = [match_classes(info, dataset) for info, dataset in zip(infos, data, strict=True)]
    if differing := sorted({*matches[0][1]} ^ {*matches[-1][1]}):
        which = "only it has" if differing[0] in matches[-1][1] else "it lacks"
        raise infos[-1].error(f"the models have different classes ({which} {differing[0]!r}) and cannot be compared")
    compute = config.compute
    return [
        EvaluationTask(
            predictor=create_predictor(info, size, compute.device, compute.amp, compute.eval_batch_size).fused(),
            dataset=dataset,
            splits=splits,
            class_indices=indices,
            class_names=tuple(map(escape_undecodable, class_names)),
        )
        for info, size, dataset, (indices, class_names) in zip(infos, sizes, data, matches, strict=True)
    ]


def _read_data(
    config: Config, sizes: Sequence[ImageSize], infos: Sequence[WeightsInfo], *, draw: bool
) -> list[ImageDataset]:
    """Read the same images for each model: all in memory, or all streamed if the largest do not fit."""
    read: dict[tuple[DataConfig, GrayRanges | None], ImageDataset] = {}
    keys = [
        (replace(config.data, img_size=size, **info.data_options), info.gray_ranges)
        for size, info in zip(sizes, infos, strict=True)
    ]
    for key in sorted(set(keys), key=lambda key: -math.prod(height_width(key[0].img_size))):
        streaming = {"streaming": "on" if next(iter(read.values())).train.on_disk else "off"} if read else {}
        read[key] = datasets.create_dataset(replace(key[0], **streaming), draw=draw, ranges=key[1])
    return [read[key] for key in keys]


def _list_notes(tasks: Sequence[EvaluationTask], config: Config) -> Iterator[str]:
    """Yield notes and warnings about the images.

    Raises:
        InputError: The test split contains images that a model was trained on.
    """
    first, dataset = tasks[0], tasks[0].dataset
    yield from dataset.notes
    for task in tasks:
        yield from check_test_split(task.predictor.info, task.dataset, config.data, task.splits)
    if not is_trained_on(first.predictor.info, dataset) and dataset.drew_test and first.splits == ("test",):
        yield f"only a test split of {dataset.name} is evaluated; --split all evaluates all images"
    present, total = len(dataset.class_names), len(first.class_names)
    if present < total:
        yield f"{dataset.name} has {present} of the model's {total} classes; the others are not evaluated"


def match_classes(info: WeightsInfo, dataset: ImageDataset) -> tuple[Int64[np.ndarray, " m"], tuple[str, ...]]:
    """Match the classes of the data to the model's by name, or by order if the weights name no classes.

    Returns:
        The model's index of each class of the data, and the names of the model's classes.

    Raises:
        InputError: The model takes other channels, has no classifier, or lacks a class of the data.
    """
    weights.check_channels(info, dataset)
    weights.check_classifier(info)
    if dataset.label_sets is not None and not info.multi_label:
        raise info.error(f"it was trained on one label an image, but {dataset.name} has several")
    count = info.spec["num_classes"]
    names = info.class_names or (dataset.class_names if count == len(dataset.class_names) else None)
    if names is None:
        actual = len(dataset.class_names)
        raise info.error(f"the model has {count} classes without names, {dataset.name} has {actual} classes")
    index = {name: number for number, name in enumerate(names)}
    if unknown := [name for name in dataset.class_names if name not in index]:
        more = f" and {len(unknown) - MAX_NAMED:,} more" if unknown[MAX_NAMED:] else ""
        listed = ", ".join(map(repr, unknown[:MAX_NAMED])) + more
        raise info.error(f"the model lacks the classes {listed} of {dataset.name}{suggest(unknown[0], names)}")
    return np.array([index[name] for name in dataset.class_names]), names
