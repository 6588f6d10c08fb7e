"""Check labeled images before training: unreadable files, duplicates, unusual classes, likely wrong labels.

Axes: n images, k classes, d values of a descriptor, e pairs of images.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8
from PIL import Image, ImageOps
from rich.console import Console
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from smallvit.config.config import Config
from smallvit.config.options import ComputeConfig, DataConfig
from smallvit.datasets.catalog import is_hub_source, is_manifest
from smallvit.datasets.dataset import Images
from smallvit.datasets.decode import convert_image, open_image, run_in_threads, to_rgb
from smallvit.datasets.factory import create_dataset, read_source
from smallvit.datasets.gray import GrayRanges, measure
from smallvit.datasets.listing import Listing
from smallvit.evaluation.artifacts import PREDICTIONS
from smallvit.evaluation.evaluator import predict_test
from smallvit.utils.errors import InputError, first_line
from smallvit.utils.plots import draw_grid
from smallvit.utils.terminal import create_console, create_progress, print_indented, print_table, track

FEW_IMAGES = 5
"""Number of training images below which a class is reported."""
SIDE = 12
"""Height and width of the reduced images that are compared, in pixels."""
DECODED_SIDE = 64
"""Large JPEG files are decoded at a fraction of their size, at least this."""
SIMILARITY = 0.97
"""Correlation from which two reduced images are near duplicates."""
MATCHING_STEPS = 20
"""Steps in which mean probabilities are matched to the frequencies of classes."""
CHUNK = 512
"""Images that are compared with all others at a time."""
SHEET_COLUMNS, SHEET_IMAGES, SHEET_SIDE = 8, 120, 64
MAX_LISTED, MAX_MEMBERS = 10, 3
"""Findings of a kind that are printed, and images of a group of duplicates."""
MAX_CLASSES, MAX_KINDS = 20, 4
"""Classes, and sizes or modes of images, that are printed."""
FINDINGS = {
    "unreadable": "unreadable files",
    "duplicates": "groups of duplicates",
    "similar_names": "class names that differ by case or space only",
    "small_classes": f"classes with fewer than {FEW_IMAGES} training images",
    "wrong_labels": "likely wrong labels",
}
"""Lists in the results of a check, with their titles."""


@dataclass(frozen=True)
class Source:
    """Labeled images, as they are stored."""

    name: str
    class_names: tuple[str, ...]
    labels: Int64[np.ndarray, " n"]
    splits: tuple[str, ...]
    paths: tuple[str, ...]
    """Relative path of each image; split and number of those that are no files."""
    open: Callable[[int], AbstractContextManager[Image.Image]]
    notes: tuple[str, ...] = ()
    label_sets: tuple[tuple[int, ...], ...] | None = None
    """Classes of each label, if images have several."""

    def classes(self, label: int) -> tuple[int, ...]:
        """Return the classes that a label stands for."""
        return (label,) if self.label_sets is None else self.label_sets[label]

    def describe(self, index: int) -> dict[str, Any]:
        """Return number, path, class and split of an image."""
        name = "; ".join(self.class_names[number] for number in self.classes(self.labels[index]))
        return {"index": int(index), "path": self.paths[index], "label": name, "split": self.splits[index]}

    def read(self, index: int, side: int) -> UInt8[np.ndarray, "3 side side"]:
        """Decode an image for display."""
        with self.open(index) as image:
            return convert_image(image, side, GrayRanges.measured([measure(image)]))


@dataclass(frozen=True)
class ImageFacts:
    """Properties of a decoded image."""

    size: str
    mode: str
    digest: bytes
    """Hash of the pixels."""
    descriptor: Float[np.ndarray, " d"]
    """Pixels of the reduced image, with mean 0 in each channel and norm 1: scalar products are correlations."""


def read_images(config: DataConfig) -> Source:
    """List the images that `config` names, without decoding files.

    Raises:
        InputError: The data cannot be read, see `create_dataset`.
    """
    if is_hub_source(config.data):
        dataset = create_dataset(config, draw=False)
        parts = {split: getattr(dataset, split) for split in ("train", "val", "test")}
        return _from_memory(config.data, dataset.class_names, parts)
    images = read_source(config, 1 if is_manifest(config.data) else 2)
    if not isinstance(images, Listing):
        return _from_memory(config.data, images.class_names, images.splits)
    return Source(
        config.data,
        images.class_names,
        np.array(images.labels),
        images.splits,
        tuple(images.relative_path(index) for index in range(len(images))),
        lambda index: open_image(images.open(index), config.max_megapixels),
        images.notes,
        images.label_sets,
    )


def _from_memory(name: str, class_names: tuple[str, ...], parts: dict[str, Images]) -> Source:
    positions = [(split, index) for split, part in parts.items() for index in range(len(part))]

    def open_pixels(index: int) -> AbstractContextManager[Image.Image]:
        split, position = positions[index]
        pixels = parts[split].pixels[position].numpy().transpose(1, 2, 0)
        return nullcontext(Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels))

    labels = np.concatenate([part.labels.numpy() for part in parts.values()])
    paths = tuple(f"{split}/{index}" for split, index in positions)
    return Source(name, class_names, labels, tuple(split for split, _ in positions), paths, open_pixels)


def check_images(source: Source, similarity: float = SIMILARITY) -> dict[str, Any]:
    """Decode all images and return the results of all checks, as plain values.

    Args:
        source: The images.
        similarity: Correlation from which two images are near duplicates.
    """
    facts: dict[int, ImageFacts] = {}

    def inspect(index: int) -> None:
        with source.open(index) as image:
            facts[index] = inspect_image(image)

    total = len(source.paths)
    errors = run_in_threads(inspect, range(total), source.paths, f"reading {total:,} images")
    indices = np.array(sorted(facts), dtype=int)
    read = [facts[index] for index in indices]
    groups = find_duplicates([each.digest for each in read], [each.descriptor for each in read], similarity)
    names, splits = source.class_names, sorted(set(source.splits), key=("all", "train", "val", "test").index)
    pairs = zip(source.splits, source.labels.tolist(), strict=True)
    counts = Counter((split, number) for split, label in pairs for number in source.classes(label))
    training = splits[0]
    return {
        "data": source.name,
        "images": total,
        "classes": [
            {"name": name, **{split: counts[split, number] for split in splits}} for number, name in enumerate(names)
        ],
        "sizes": dict(Counter(each.size for each in read).most_common()),
        "modes": dict(Counter(each.mode for each in read).most_common()),
        "notes": list(source.notes),
        "similarity": similarity,
        "unreadable": [source.describe(index) | {"error": errors[index]} for index in sorted(errors)],
        "duplicates": _describe_groups(source, [indices[group].tolist() for group in groups], facts),
        "similar_names": find_similar_names(names),
        "small_classes": [
            {"name": name, "images": counts[training, number]}
            for number, name in enumerate(names)
            if counts[training, number] < FEW_IMAGES
        ],
        "wrong_labels": [],
    }


def inspect_image(image: Image.Image) -> ImageFacts:
    """Decode an opened image, and return its size, mode, hash and descriptor."""
    size, mode = f"{image.width} x {image.height}", image.mode
    ranges = GrayRanges.measured([measure(image)])
    image.draft("RGB", (DECODED_SIDE, DECODED_SIDE))
    rgb = to_rgb(ImageOps.exif_transpose(image), ranges)
    digest = hashlib.blake2b(f"{rgb.size} {ranges}".encode() + rgb.tobytes(), digest_size=16).digest()
    reduced = np.asarray(rgb.resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.float32).reshape(-1, 3)
    reduced = reduced - reduced.mean(axis=0)
    norm = np.linalg.norm(reduced)
    return ImageFacts(size, mode, digest, (reduced / norm if norm > SIDE else 0 * reduced).ravel())  # 0: one color


def find_duplicates(
    digests: Sequence[bytes], descriptors: Sequence[Float[np.ndarray, " d"]], similarity: float
) -> list[Int64[np.ndarray, " m"]]:
    """Return groups of duplicate images: equal hashes, or descriptors with at least this scalar product.

    All pairs are compared by matrix products: a tree of descriptors with hundreds of values would be slower. The graph
    of pairs is reduced to its components after each chunk, so that its size stays that of the images.
    """
    if not digests:
        return []
    first: dict[bytes, int] = {}
    groups = np.array([first.setdefault(digest, index) for index, digest in enumerate(digests)])
    distinct = np.unique(groups)  # one image of each hash
    values = np.stack(descriptors)[distinct]
    everything = np.arange(len(digests))
    for start in track(range(0, len(values), CHUNK), "comparing images"):
        rows, columns = np.nonzero(values[start : start + CHUNK] @ values[start:].T >= similarity)
        later = columns > rows
        if later.any():
            pairs = distinct[start + np.stack([rows[later], columns[later]])]
            edges = np.concatenate([pairs, np.stack([everything, groups])], axis=1)
            graph = coo_array((np.ones(edges.shape[1]), tuple(edges)), shape=(len(digests),) * 2)
            component = connected_components(graph, directed=False)[1]
            groups = np.unique(component, return_index=True)[1][component]
    order = np.argsort(groups, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    return [part for part in parts if len(part) > 1]


def _describe_groups(source: Source, groups: list[list[int]], facts: dict[int, ImageFacts]) -> list[dict[str, Any]]:
    """Describe groups of duplicates, those across splits and with several labels first."""
    described = []
    for group in groups:
        images = [source.describe(index) for index in group]
        described.append(
            {
                "kind": "exact" if len({facts[index].digest for index in group}) == 1 else "near",
                "across_splits": len({each["split"] for each in images}) > 1,
                "labels_differ": len({each["label"] for each in images}) > 1,
                "images": images,
            }
        )
    return sorted(described, key=lambda each: (not each["across_splits"], not each["labels_differ"], each["kind"]))


def find_similar_names(names: Sequence[str]) -> list[list[str]]:
    """Return class names that are equal but for case and spaces."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(" ".join(name.split()).casefold(), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


# Likely wrong labels


def find_wrong_labels(
    labels: Int64[np.ndarray, " n"], probabilities: Float[np.ndarray, "n k"]
) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]:
    """Find labels that are likely wrong by confident learning (Northcutt, Jiang, Chuang 2021, arXiv:1911.00068).

    The threshold of a class is the mean probability of the class over the images with its label. An image is counted
    for the most likely class among those that reach their threshold (the confident joint); off the diagonal, its label
    is likely wrong. As in cleanlab, labels that are also the most likely class are kept.

    Args:
        labels: Given labels.
        probabilities: Predictions of models that have not seen the image.

    Returns:
        Images with likely wrong labels, lowest normalized margin first (the probability of the label minus the largest
        of another class), and the classes that they are counted for.
    """
    n, k = probabilities.shape
    own = probabilities[np.arange(n), labels]
    counts = np.bincount(labels, minlength=k)
    thresholds = np.where(counts > 0, np.bincount(labels, own, k) / np.maximum(counts, 1), np.inf)
    confident: Bool[np.ndarray, "n k"] = probabilities >= thresholds - 1e-6  # rounding
    counted = np.where(confident, probabilities, -1).argmax(axis=1)
    others = probabilities.copy()
    others[np.arange(n), labels] = -1
    margins = own - others.max(axis=1)
    wrong = np.flatnonzero(confident.any(axis=1) & (counted != labels) & (margins < 0))
    wrong = wrong[np.argsort(margins[wrong], kind="stable")]
    return wrong, counted[wrong]


def match_frequencies(
    labels: Int64[np.ndarray, " n"], probabilities: Float[np.ndarray, "n k"]
) -> Float[np.ndarray, "n k"]:
    """Weigh the classes so that their mean probabilities are their frequencies among the labels (Sinkhorn's iteration).

    Models that are trained with logit adjustment, class weights or balanced batches give small classes more
    probability. Probabilities that have the frequencies already do not change.
    """
    frequencies = np.bincount(labels, minlength=probabilities.shape[1]) / len(labels)
    for _ in range(MATCHING_STEPS):
        means = probabilities.mean(axis=0)
        weighted = probabilities * np.divide(frequencies, means, out=np.zeros_like(means), where=means > 0)
        sums = weighted.sum(axis=1, keepdims=True)
        probabilities = np.where(sums > 0, weighted / np.where(sums > 0, sums, 1), probabilities)
    return probabilities


def check_labels(source: Source, run: str, compute: ComputeConfig) -> list[dict[str, Any]]:
    """Return the likely wrong labels by the predictions of a cross-validation, or of a run for its test images.

    Raises:
        InputError: There is no such run, its predictions are damaged, or of other images or classes.
    """
    if source.label_sets is not None:
        raise InputError(f"--run {run}: likely wrong labels are not found among several labels an image; remove --run")
    folder = Path(run).expanduser()
    if (folder / PREDICTIONS).is_file():
        paths, names, predicted = _read_predictions(folder / PREDICTIONS, run)
    else:
        with create_progress(create_console(stderr=True)) as progress:
            task, outputs, predicted = predict_test(run, "--run", compute, progress)
        known = task.paths or [f"test/{number}" for number in range(len(task.labels))]
        paths, names = [known[index] for index in outputs.index], list(task.class_names)
    if missing := [name for name in source.class_names if name not in names]:
        raise InputError(f"--run {run}: it does not know class {missing[0]!r} of {source.name}; train it on this data")
    position = {path: index for index, path in enumerate(source.paths)}
    sums: dict[int, Float[np.ndarray, " k"]] = {}
    for path, row in zip(paths, predicted, strict=True):  # repeats of a cross-validation are averaged
        if path in position:
            sums[position[path]] = sums.get(position[path], 0) + row
    if not sums:
        raise InputError(f"--run {run}: none of its predictions is of an image file of {source.name}; give a run on it")
    indices, totals = np.array(list(sums)), np.stack(list(sums.values()))
    probabilities = (totals / totals.sum(axis=1, keepdims=True))[:, [names.index(each) for each in source.class_names]]
    probabilities = match_frequencies(source.labels[indices], probabilities)
    wrong, classes = find_wrong_labels(source.labels[indices], probabilities)
    return [
        source.describe(indices[row])
        | {
            "likely": source.class_names[number],
            "p_label": float(probabilities[row, source.labels[indices[row]]]),
            "p_likely": float(probabilities[row, number]),
        }
        for row, number in zip(wrong, classes, strict=True)
    ]


def _read_predictions(file: Path, run: str) -> tuple[list[str], list[str], Float[np.ndarray, "n k"]]:
    """Return paths, class names and probabilities of the file that a cross-validation writes."""
    try:
        with open(file, encoding="utf-8", newline="") as lines:
            header, *rows = csv.reader(lines)
        columns = [number for number, title in enumerate(header) if title.startswith("p(") and title.endswith(")")]
        probabilities = np.array([[float(row[number]) for number in columns] for row in rows])
        path = header.index("path")
        if probabilities.size == 0 or not np.isfinite(probabilities).all() or (probabilities.sum(axis=1) <= 0).any():
            raise ValueError("no probabilities")
        return [row[path] for row in rows], [header[number][2:-1] for number in columns], probabilities
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise InputError(
            f"--run {run}: {PREDICTIONS} cannot be used ({first_line(error)}); cross-validate again"
        ) from None


# Output


def run_check(config: Config, run: str | None, similarity: float) -> tuple[Source, dict[str, Any]]:
    """Check the images that `config` names, and their labels by the predictions of `run` if given.

    Raises:
        InputError: The data or the run cannot be used.
    """
    source = read_images(config.data)
    wrong = [] if run is None else check_labels(source, run, config.compute)
    return source, check_images(source, similarity) | {"wrong_labels": wrong}


def draw_sheet(source: Source) -> Image.Image | None:
    """Draw some images of each class; None if none can be decoded."""
    each = int(np.clip(SHEET_IMAGES // len(source.class_names), 1, SHEET_COLUMNS))
    pictures, captions = [], []
    for number, name in enumerate(source.class_names[:SHEET_IMAGES]):
        members = np.array([n for n, label in enumerate(source.labels) if number in source.classes(label)], dtype=int)
        for index in members[np.unique(np.linspace(0, len(members) - 1, min(each, len(members))).astype(int))]:
            try:
                pictures.append(source.read(index, SHEET_SIDE))
            except Exception:  # listed as unreadable
                continue
            captions.append(" ".join(name.split()))
    return draw_grid(pictures, captions, SHEET_COLUMNS) if pictures else None


def print_results(results: dict[str, Any], console: Console) -> None:
    """Print classes, findings, and the first of each kind."""
    classes = results["classes"]
    console.print(f"{results['data']}: {results['images']:,} images of {len(classes):,} classes")
    for name in ("sizes", "modes"):
        kinds = [f"{kind} ({count:,})" for kind, count in results[name].items()]
        more = f", {len(kinds) - MAX_KINDS:,} more" if len(kinds) > MAX_KINDS else ""
        console.print(f"{name}: {', '.join(kinds[:MAX_KINDS])}{more}")
    for note in results["notes"]:
        console.print(note)
    console.print()
    print_table(console, class_rows(classes))
    console.print()
    print_table(
        console, [["finding", "count"], *([title, f"{len(results[key]):,}"] for key, title in FINDINGS.items())]
    )
    for title, findings in describe_findings(results).items():
        console.print(f"\n{title}:")
        for line, _ in findings[:MAX_LISTED]:
            print_indented(console, f"  {line}")
        if (more := len(findings) - MAX_LISTED) > 0:
            console.print(f"  and {more:,} more: --out lists all")


def describe_findings(results: dict[str, Any]) -> dict[str, list[tuple[str, list[int]]]]:
    """Return a line for each finding and the numbers of its readable images, by the titles of the kinds."""
    described = {}
    for key, title in FINDINGS.items():
        lines = []
        for finding in results[key]:
            images = finding["images"] if key == "duplicates" else [finding] if key == "wrong_labels" else []
            lines.append((format_finding(key, finding), [each["index"] for each in images]))
        if lines:
            described[title] = lines
    return described


def class_rows(classes: Sequence[dict[str, Any]], limit: int = MAX_CLASSES) -> list[list[str]]:
    """Return a table of the images of each class by split; of more classes than `limit`, the smallest."""
    splits = [name for name in classes[0] if name != "name"]
    if len(classes) > limit:
        classes = sorted(classes, key=lambda row: row[splits[0]])
    else:
        limit = len(classes)
    shown, rest = classes[:limit], classes[limit:]
    sums = {f"{len(rest):,} larger classes": rest, "total": classes}
    rows = [[row["name"], *(f"{row[split]:,}" for split in splits)] for row in shown]
    rows += [
        [name, *(f"{sum(row[split] for row in part):,}" for split in splits)] for name, part in sums.items() if part
    ]
    return [["class", *splits], *rows]


def format_finding(key: str, finding: Any) -> str:
    """Describe a finding in a line."""
    if key == "unreadable":
        return f"{finding['path']}: {finding['error']}"
    if key == "similar_names":
        return ", ".join(map(repr, finding))
    if key == "small_classes":
        return f"{finding['name']}: {finding['images']}"
    if key == "wrong_labels":
        p, q = finding["p_label"], finding["p_likely"]
        return f"{finding['path']}: {finding['label']} ({100 * p:.0f} %), likely {finding['likely']} ({100 * q:.0f} %)"
    images = [f"{each['path']} ({each['label']})" for each in finding["images"]]
    more = f" and {len(images) - MAX_MEMBERS:,} more" if len(images) > MAX_MEMBERS else ""
    marks = [finding["kind"], *(name.replace("_", " ") for name in ("across_splits", "labels_differ") if finding[name])]
    return f"{', '.join(marks)}: {', '.join(images[:MAX_MEMBERS])}{more}"
