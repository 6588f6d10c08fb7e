"""Predict the classes of images with a trained model.

Threads decode the next batch while the model computes one, as in training.

Axes: c channels, h w pixels, k classes.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from timm.data import ImageNetInfo
from torch import Tensor

from smallvit.config.options import MAX_MEGAPIXELS, Amp
from smallvit.datasets.decode import describe_decode_error, open_image, read_levels, resize, resize_channels, to_rgb
from smallvit.datasets.gray import GrayRanges, kind_of
from smallvit.datasets.listing import is_hidden, is_image
from smallvit.evaluation.predictor import Predictor, load_predictor
from smallvit.models import weights
from smallvit.utils.cores import usable_cores
from smallvit.utils.errors import escape_unprintable

WORDNET_ID = re.compile(r"n\d{8}")
"""Names of ImageNet's classes in files and in timm."""
SUBSETS = ("imagenet-1k", "imagenet-21k-goog")
"""Subsets in timm that together have all of ImageNet's classes."""
TOP = 5
"""Default number of classes per image, if images have one label."""
DIGITS = 6
"""Significant digits of probabilities in files."""

ImageInput = str | Path | Image.Image | np.ndarray
"""A file, or an image in memory. Arrays are (height, width) or (height, width, channels), also (channels, height,
width) if they are not gray or 8-bit colors; those for models trained on arrays are scaled as their files are."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The predicted classes of one image."""

    path: str
    """Its file; empty for images in memory."""
    classes: tuple[tuple[str, float], ...] = ()
    """Names (see `readable_names`) and probabilities, the most probable first; of several labels, perhaps none."""
    error: str | None = None
    """Why the image cannot be read."""
    note: str | None = None
    """How gray values of more than 8 bits were scaled."""


def predict(
    name: str | Path,
    images: ImageInput | Iterable[ImageInput],
    top: int | None = None,
    *,
    flip: bool = False,
    img_size: int | tuple[int, int] | None = None,
    device: str = "auto",
    amp: Amp = "auto",
) -> list[Prediction]:
    """Predict the classes of images with a trained model, in batches.

    Args:
        name: A run folder, a weights file, or a timm model with pretrained weights.
        images: One or several files, folders of files, Pillow images or arrays.
        top: Number of classes per image; by default 5, or those above their thresholds if images have several labels.
        flip: Average the probabilities over each image and its mirror image.
        img_size: Image size in pixels, or height and width; by default the model's.
        device: auto, cpu, cuda, cuda:1, mps.
        amp: Mixed precision: auto, bf16, fp16 or off.

    Raises:
        InputError: There are no such weights or device, or the model has no classifier.
    """
    model = load_predictor(str(name), "predict", img_size=img_size, device=device, amp=amp)
    inputs = list_images([images] if isinstance(images, ImageInput) else images)
    return list(predict_images(model, inputs, top=top, flip=flip))


def predict_images(
    model: Predictor,
    images: Sequence[ImageInput],
    *,
    top: int | None = None,
    flip: bool = False,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> Iterator[Prediction]:
    """Predict the classes of images, in their order.

    Args:
        model: The model.
        images: Image files, Pillow images or arrays.
        top: Number of classes per image, as for `predict`.
        flip: Average the probabilities over each image and its mirror image.
        max_megapixels: Largest file to decode.

    Raises:
        InputError: The model has no classifier, or its logits are not finite.
    """
    weights.check_classifier(model.info)
    model = model.fused()
    names = readable_names(model.class_names)
    for predictions, pixels in decode_batches(model, images, max_megapixels):
        classes = iter(() if pixels is None else _predict_batch(model, names, pixels, top, flip))
        for prediction in predictions:
            yield prediction if prediction.error is not None else replace(prediction, classes=next(classes))


def decode_batches(
    model: Predictor, images: Sequence[ImageInput], max_megapixels: float = MAX_MEGAPIXELS
) -> Iterator[tuple[list[Prediction], UInt8[Tensor, "b c h w"] | None]]:
    """Decode images in batches, the next one while the model computes.

    Yields:
        Predictions without classes for the images of a batch, and the pixels of those without an error; None if all
        have one.
    """
    batches = [images[start : start + model.batch_size] for start in range(0, len(images), model.batch_size)]
    decode_one = partial(try_decode, model, max_megapixels)
    with ThreadPoolExecutor(usable_cores()) as pool:
        ahead = pool.map(decode_one, batches[0] if batches else [])
        for following in [*batches[1:], []]:
            decoded, ahead = list(ahead), pool.map(decode_one, following)
            pixels = [each for _, each in decoded if each is not None]
            yield [each for each, _ in decoded], torch.from_numpy(np.stack(pixels)) if pixels else None


def list_images(images: Iterable[ImageInput], ignored: list[str] | None = None) -> list[ImageInput]:
    """Replace folders by the image files below them, sorted and without hidden ones.

    Folders without images, and those that cannot be listed, are kept, so that they are reported as unreadable.

    Args:
        images: Files, folders, Pillow images or arrays.
        ignored: Collects the files of folders that are no images.
    """
    listed: list[ImageInput] = []
    others: list[str] = [] if ignored is None else ignored
    for image in images:
        listed += _list_folder(image, others) if isinstance(image, str | Path) and os.path.isdir(image) else [image]
    return listed


def readable_names(names: Sequence[str]) -> tuple[str, ...]:
    """Replace WordNet ids among class names by their first words in timm; the id follows if a word is not unique."""
    if not any(map(WORDNET_ID.fullmatch, names)):
        return tuple(names)
    words = [_wordnet_words().get(name, name) for name in names]
    counts = Counter(words)
    return tuple(word if counts[word] == 1 else f"{word} ({name})" for name, word in zip(names, words, strict=True))


def decode(
    model: Predictor, image: ImageInput, max_megapixels: float = MAX_MEGAPIXELS
) -> tuple[UInt8[np.ndarray, "c h w"], str | None]:
    """Decode an image for a model, large JPEGs at their full size; one channel is the luma of the colors.

    Returns:
        The pixels, and how gray values of more than 8 bits were scaled, if the image has any.
    """
    ranges, channels = model.info.gray_ranges or GrayRanges(), model.in_chans
    if isinstance(image, Image.Image):
        opened = nullcontext(image.copy())
    else:
        source = image if isinstance(image, np.ndarray) else str(image)
        if (levels := read_levels(source, ranges, channels, max_megapixels)) is not None:
            return resize_channels(levels, model.img_size, **model.info.resizing), None
        opened = open_image(source, max_megapixels) if isinstance(source, str) else nullcontext(Image.fromarray(source))
    with opened as file:
        rgb, kind = to_rgb(ImageOps.exif_transpose(file), ranges), kind_of(file)
    if channels not in (1, 3):
        raise ValueError(f"a gray or color image, expected {channels} channels")
    pixels = resize(rgb.convert("L") if channels == 1 else rgb, model.img_size, **model.info.resizing)
    return np.atleast_3d(pixels).transpose(2, 0, 1), None if kind is None else ranges.note(kind)


def write_predictions(
    predictions: Iterable[Prediction], file: TextIO, form: str, class_names: Sequence[str], top: int | None
) -> None:
    """Write predictions as they come; only "jsonl" has the images that cannot be read.

    Args:
        predictions: The predictions.
        file: The file.
        form: "table" (a line for each image, and one for each class where a terminal is too narrow), "csv" (pairs of
            class and probability; without `top`, a cell with all classes and one with their probabilities) or "jsonl".
        class_names: All classes of the model.
        top: Number of classes per image; None if they are those above their thresholds.
    """
    writer, width = csv.writer(file, lineterminator="\n"), max(map(len, readable_names(class_names)), default=0)
    if form == "csv":
        numbers = range(1, min(top or 0, len(class_names)) + 1)
        columns = [f"{column}_{number}" for number in numbers for column in ("class", "probability")]
        writer.writerow(["path", *(columns or ("label", "probability"))])
    for each in predictions:
        if form == "jsonl":
            classes = [{"name": name, "probability": float(f"{p:.{DIGITS}g}")} for name, p in each.classes]
            result = {"classes": classes} if each.error is None else {"error": each.error}
            print(json.dumps({"path": each.path} | result), file=file)
        elif form == "csv" and each.error is None and top is None:
            names, probabilities = [name for name, _ in each.classes], [f"{p:.{DIGITS}g}" for _, p in each.classes]
            writer.writerow([each.path, ";".join(names), ";".join(probabilities)])
        elif form == "csv" and each.error is None:
            writer.writerow([each.path, *(cell for name, p in each.classes for cell in (name, f"{p:.{DIGITS}g}"))])
        elif each.error is None:
            cells = [f"{escape_unprintable(name):<{width}} {100 * p:5.1f} %" for name, p in each.classes]
            cells.insert(0, escape_unprintable(each.path))
            too_wide = file.isatty() and len("  ".join(cells)) > shutil.get_terminal_size().columns
            print(*cells, sep="\n    " if too_wide else "  ", file=file)


@lru_cache(maxsize=1)
def _wordnet_words() -> dict[str, str]:
    """Return the first word for each of ImageNet's classes, by its id."""
    subsets = map(ImageNetInfo, SUBSETS)
    pairs = [pair for subset in subsets for pair in subset.label_descriptions(as_dict=True).items()]
    return {name: words.partition(",")[0] for name, words in pairs}


def _list_folder(folder: str | Path, ignored: list[str]) -> list[str]:
    images: list[str] = []
    errors: list[OSError] = []
    for current, subfolders, names in os.walk(folder, onerror=errors.append):
        subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
        for name in sorted(names):
            if not is_hidden(name):
                (images if is_image(name) else ignored).append(os.path.join(current, name))
    return [*images, *(error.filename for error in errors)] or [str(folder)]


def try_decode(
    model: Predictor, max_megapixels: float, image: ImageInput
) -> tuple[Prediction, UInt8[np.ndarray, "c h w"] | None]:
    """Return a prediction without classes, and the pixels unless it has an error."""
    path = str(image) if isinstance(image, str | Path) else ""
    try:
        pixels, note = decode(model, image, max_megapixels)
        return Prediction(path=path, note=note), pixels
    except IsADirectoryError:
        return Prediction(path=path, error="a folder without images"), None
    except Exception as error:  # Pillow raises anything for damaged files
        reason = error.strerror if isinstance(error, OSError) else None
        return Prediction(path=path, error=reason or describe_decode_error(error, path)), None


def _predict_batch(
    model: Predictor, names: tuple[str, ...], pixels: UInt8[Tensor, "b c h w"], top: int | None, flip: bool
) -> list[tuple[tuple[str, float], ...]]:
    """Return the names and probabilities of each image's most probable classes, or of those above their thresholds."""
    logits = model.predict_logits(model.normalize(pixels), flip=flip).cpu()
    if not logits.isfinite().all():
        raise model.info.error("the logits are not finite, so these weights are unusable")
    several = model.info.multi_label and top is None
    thresholds = model.info.thresholds if several else [0.0] * len(names)
    probabilities, classes = model.probabilities(logits.double()).topk(
        len(names) if several else min(top or TOP, len(names))
    )
    return [
        tuple((names[number], p) for number, p in zip(*row, strict=True) if p >= thresholds[number])
        for row in zip(classes.tolist(), probabilities.tolist(), strict=True)
    ]
