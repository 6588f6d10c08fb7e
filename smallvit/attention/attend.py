"""Analyze the attention of a trained model over a few images, and write pictures and statistics: `smallvit attend`.

Axes: n images, h heads, i j rows and columns of tokens, c channels, s pixels.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from rich.console import Console
from rich.progress import Progress

from smallvit import datasets
from smallvit.attention import visualize
from smallvit.attention.maps import extract_attention
from smallvit.attention.rollout import relevance, rollout
from smallvit.attention.visualize import AttentionView
from smallvit.config.config import Config
from smallvit.datasets.dataset import Images
from smallvit.datasets.decode import describe_decode_error
from smallvit.datasets.listing import SPLITS
from smallvit.evaluation import artifacts
from smallvit.evaluation.predict import try_decode
from smallvit.evaluation.predictor import Predictor, check_test_split, load_predictor
from smallvit.models import weights, weights_info
from smallvit.plugins.lsa_layer import temperatures
from smallvit.runs.run import Run
from smallvit.utils import files, hardware
from smallvit.utils.errors import InputError, require, suggest
from smallvit.utils.files import atomic_update, check_output_folder
from smallvit.utils.hardware import autocast
from smallvit.utils.terminal import create_console, create_progress

STATISTICS = ("uniform_entropy", "uniform_distance", "entropy", "distance")
"""Statistics of each head of a layer; those of uniform attention are the same for all heads."""
OVERVIEW, HEADS, TEMPERATURES, RESULTS = "overview.png", "heads.png", "temperatures.png", "attention.json"
LAYERS = re.compile(r"layers-[0-9]+\.png")

Pixels = UInt8[np.ndarray, "c h w"]


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image to analyze."""

    pixels: Pixels
    source: str
    """File name, or data set, split and index."""
    label: str | None = None
    """Name of its class, if known."""


@dataclass(frozen=True, kw_only=True)
class AttentionAnalysis:
    """The attention of a model over some images."""

    layers: list[dict[str, Any]]
    """Statistics of each attention layer in the order of computation, averaged over images, as in attention.json.

    `keys` is the number of keys of a query, `grid` the rows and columns of image tokens among them. `uniform_entropy`
    and `uniform_distance` are the values of uniform attention to the same keys. Distances are None in class attention.
    """
    maps: list[dict[str, Float[np.ndarray, "h i j"]]]
    """For each image, the map of each layer, as returned by `AttentionMap.image`."""
    views: list[AttentionView]
    """Prediction and summary maps of each image."""


def attend(
    name: str,
    images: Sequence[str | Path],
    config: Config,
    *,
    split: str = "test",
    count: int = 8,
    out: Path,
    overwrite: bool = False,
    console: Console | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Draw the attention of a model and return the contents of attention.json.

    Args:
        name: Run folder, weights file or timm model.
        images: Image files; if empty, `count` images of a split of the configuration's data.
        config: Data and device.
        split: Split to select images from.
        count: Number of images to select.
        out: Folder to write to.
        overwrite: Replace earlier results in `out`.
        console: Where to print progress and skipped images; by default standard error.
        command: The command line to record in attention.json.

    Raises:
        InputError: the model, data set, split or image does not exist, the model has no attention, or `out` holds
            results.
    """
    require(split in SPLITS, "split", split, f"one of {', '.join(SPLITS)}{suggest(split, SPLITS)}")
    require(count >= 1, "count", count, "at least 1")
    check_output_folder(out, overwrite=overwrite)
    console = console or create_console(stderr=True)
    compute, size = config.compute, config.data.img_size
    model = load_predictor(
        name, "attend", arch=config.model.arch, img_size=size, device=compute.device, amp=compute.amp
    )
    if images:
        data, examples = None, [_read_file(model, str(path), config.data.max_megapixels, console) for path in images]
    else:
        data_config = replace(config.data, img_size=model.img_size, **model.info.data_options)
        dataset = datasets.create_dataset(data_config, ranges=model.info.gray_ranges)
        weights.check_channels(model.info, dataset)
        for warning in check_test_split(model.info, dataset, config.data, (split,)):
            console.print(warning)
        data, examples = dataset.name, examples_from_split(dataset, split, count, console)
    with create_progress(console) as bar:
        task = bar.add_task("analyzing", total=len(examples))
        analysis = analyze_attention(model, examples, lambda: bar.advance(task))
        results = {
            "name": model.info.name,
            "layers": analysis.layers,
            "images": [
                {
                    "source": example.source,
                    "predicted": view.predicted,
                    "probability": view.probability,
                    "label": example.label,
                }
                for example, view in zip(examples, analysis.views, strict=True)
            ],
            "weights_sha256": weights_info.compute_sha256(model.info),
            "img_size": model.img_size,
            "precision": model.precision,
            "hardware": hardware.describe_hardware(model.device),
            "versions": hardware.versions(),
            "git_revision": hardware.git_revision(),
            "data": data,
            "split": None if images else split,
            "command": command,
        }
        _write(out, results, analysis, examples, bar)
    return results


def analyze_attention(
    model: Predictor, examples: Sequence[Example], advance: Callable[[], Any] = lambda: None
) -> AttentionAnalysis:
    """Analyze the attention of a model over images.

    Args:
        model: The model.
        examples: The images, at the model's size.
        advance: Called after each image.

    Raises:
        InputError: the model has no classes or no attention that can be analyzed, or its logits are not finite.
    """
    weights.check_classifier(model.info)
    layers, maps, views = [], [], []
    for example in examples:
        try:
            of_image, view = _analyze_image(model, example.pixels)
        except InputError as error:
            raise model.info.error(str(error)) from None
        maps.append({layer["layer"]: layer.pop("map") for layer in of_image})
        layers.append(of_image)
        views.append(view)
        advance()
    learned = temperatures(model.model)
    for index, layer in enumerate(layers[0]):
        for name in STATISTICS:
            mean = np.mean([of_image[index][name] for of_image in layers], axis=0)
            layer[name] = None if np.isnan(mean).any() else mean.tolist()
        values = learned.get(layer["layer"])
        layer["temperature"] = None if values is None else values.tolist()
        layer["initial_temperature"] = None if values is None else model.model.get_submodule(layer["layer"]).constant
    return AttentionAnalysis(layers=layers[0], maps=maps, views=views)


def _analyze_image(model: Predictor, pixels: Pixels) -> tuple[list[dict[str, Any]], AttentionView]:
    """Return the statistics and the map of each layer, and the prediction and summary maps."""
    images = model.normalize(torch.tensor(pixels)[None])
    with autocast(model.device, model.dtype):
        with torch.no_grad():
            logits, maps = extract_attention(model.model, images)
            probabilities = model.probabilities(logits.float())[0]
            rolled, layers = rollout(maps)[0], []
            for each in maps:
                uniform = each.uniform()
                values = {
                    "uniform_entropy": uniform.entropy()[0, 0],
                    "uniform_distance": uniform.distance(model.img_size)[0, 0],
                    "entropy": each.entropy()[0],
                    "distance": each.distance(model.img_size)[0],
                    "map": each.image()[0],
                }
                layer = {"layer": each.layer, "heads": each.weights.shape[-3], "grid": list(each.grid)}
                layer |= {"keys": each.weights.shape[-1]}
                layers.append(layer | {name: value.float().cpu().numpy() for name, value in values.items()})
        if not logits.isfinite().all():
            raise InputError("the logits are not finite: these weights are unusable")
        del maps  # before relevance extracts its own
        summaries = [rolled, relevance(model.model, images)[0]]
    view = AttentionView(
        predicted=model.class_names[int(probabilities.argmax())],
        probability=float(probabilities.max()),
        maps=(np.mean(layers[-1]["map"], axis=0), *(each.float().cpu().numpy() for each in summaries)),
    )
    return layers, view


# Images


def examples_from_split(dataset: datasets.ImageDataset, split: str, count: int, console: Console) -> list[Example]:
    """Return up to `count` images of a split, evenly over its classes; report and skip those that cannot be decoded.

    Raises:
        InputError: no image can be decoded.
    """
    images = getattr(dataset, split)
    by_class, examples = np.argsort(images.labels.numpy(), kind="stable"), []
    for index in by_class[visualize.select_evenly(len(by_class), count)].tolist():
        if isinstance(images, Images):
            source, pixels = f"{dataset.name} {split} {index}", images.pixels[index].numpy()
        else:
            source = images.listing.paths[int(images.positions[index])]
            try:
                pixels = images.decode(index)
            except Exception as error:  # decoders raise errors of many types on damaged files
                console.print(f"skipped: {source} ({describe_decode_error(error, source)})")
                continue
        examples.append(Example(pixels=pixels, source=source, label=dataset.label_name(int(images.labels[index]))))
    if not examples:
        raise InputError(f"--split {split}: {dataset.name} has no images there that can be decoded")
    return examples


def _read_file(model: Predictor, path: str, max_megapixels: float, console: Console) -> Example:
    """Decode an image file as `predict` does."""
    prediction, pixels = try_decode(model, max_megapixels, path)
    if pixels is None:
        raise InputError(f"{path}: {prediction.error}")
    if prediction.note is not None:
        console.print(prediction.note)
    return Example(pixels=pixels, source=path)


# Files


def resolve_output(name: str, data: str | None, split: str, out: str | None) -> Path:
    """Return the folder to write to: `out`, or attend/ in the run folder `name`.

    Images other than those of the run's own test split go to attend-<split>, attend-<data>-<split> or attend-files.

    Args:
        name: The model.
        data: Data set of the images; None for image files.
        split: Split of the images.
        out: Folder given by the user.

    Raises:
        InputError: `out` is None and `name` is not a run folder.
    """
    if out is not None:
        return Path(os.path.expanduser(out))
    run = Path(os.path.expanduser(name))
    if not files.is_path(name) or not os.path.isdir(run):
        raise InputError(f"attend {name}: not a run folder, so there is no default output folder; add --out DIR")
    images = "files" if data is None else artifacts.resolve_output(name, data, split, None).name
    return run / (Run.ATTEND if images == "test" else f"{Run.ATTEND}-{images}")


def list_outputs(folder: Path) -> list[Path]:
    """Return the files in a folder that `attend` has written, attention.json last."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    layers = sorted(filter(LAYERS.fullmatch, names), key=lambda name: (len(name), name))
    return [folder / name for name in (OVERVIEW, HEADS, TEMPERATURES, *layers, RESULTS) if name in names]


def _write(
    folder: Path, results: dict[str, Any], analysis: AttentionAnalysis, examples: Sequence[Example], bar: Progress
) -> None:
    """Write all files, and replace earlier ones once all are complete."""
    labels = [example.label or os.path.basename(example.source) for example in examples]
    pixels = [example.pixels for example in examples]
    with atomic_update(folder, list_outputs) as partial:
        visualize.draw_overview(pixels, labels, analysis.views, partial / OVERVIEW)
        visualize.draw_heads(analysis.layers, partial / HEADS)
        visualize.draw_temperatures(analysis.layers, partial / TEMPERATURES)
        for index in bar.track(range(len(pixels)), description="drawing"):
            file = partial / f"layers-{index + 1}.png"
            visualize.draw_layers(pixels[index], labels[index], analysis.maps[index], file)
        (partial / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
