"""Draw images next to the training images with the most similar features, as `smallvit report` shows them.

Axes: n images, d features.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from smallvit import datasets
from smallvit.config.config import Config
from smallvit.datasets.dataset import NO_LABEL, ImageDataset, Images, Split
from smallvit.datasets.loader import evaluation_batches
from smallvit.evaluation.embed import Neighbors, find_neighbors
from smallvit.evaluation.features import extract_features, spread_evenly
from smallvit.evaluation.predictor import Predictor, load_predictor
from smallvit.models import weights_info
from smallvit.runs.run import NEIGHBORS
from smallvit.utils import files
from smallvit.utils.plots import draw_grid

QUERIES, COUNT = 10, 7
"""Rows, and neighbors in a row."""
CANDIDATES = 2_000
"""Training images, at most, among which neighbors are searched."""
PICTURE, RESULTS = Path(NEIGHBORS).with_suffix(".png").name, Path(NEIGHBORS).name


def write_neighbors(run: str, config: Config, out: Path) -> dict[str, Any]:
    """Draw validation images of a run, training images if there are none, with their nearest neighbors.

    Args:
        run: The run's folder.
        config: Its configuration: data and device.
        out: Folder for neighbors.png and neighbors.json.

    Returns:
        The contents of neighbors.json.

    Raises:
        InputError: The data cannot be read or does not fit the model, or the features are not finite.
    """
    compute = config.compute
    model = load_predictor(run, "report", device=compute.device, amp=compute.amp)
    data = replace(config.data, img_size=model.img_size, **model.info.data_options)
    dataset = datasets.create_pool(data, config.pretrain.more_data)
    split = "val" if len(dataset.val) else "train"
    candidates = _load(dataset.train, np.arange(len(dataset.train)), CANDIDATES)
    features = _extract(model, replace(dataset, train=candidates), "train")
    if split == "val":
        by_class = np.argsort(dataset.val.labels.numpy(), kind="stable")
        queries = _load(dataset.val, by_class, QUERIES)
        near = find_neighbors(features, COUNT, _extract(model, replace(dataset, val=queries), "val"))
    else:
        chosen = spread_evenly(np.arange(len(candidates)), QUERIES)
        queries, near = candidates.subset(chosen), find_neighbors(features, COUNT)
        near = Neighbors(indices=near.indices[chosen], similarities=near.similarities[chosen])
    rows = [
        {
            "label": _label(dataset, queries, row),
            "neighbors": [
                {"label": _label(dataset, candidates, index), "similarity": float(similarity)}
                for index, similarity in zip(near.indices[row], near.similarities[row], strict=True)
            ],
        }
        for row in range(len(queries))
    ]
    results = {
        "data": dataset.name,
        "split": split,
        "images": len(candidates),
        "queries": rows,
        "weights_sha256": weights_info.compute_sha256(model.info),
    }
    pictures, captions = [], []
    for row, described in enumerate(rows):
        pictures += [queries.pixels[row], *candidates.pixels[near.indices[row].tolist()]]
        captions.append(described["label"] or "image")
        captions += [f"{each['label'] or ''} {each['similarity']:.2f}".strip() for each in described["neighbors"]]
    with files.atomic_update(out, lambda folder: [folder / PICTURE, folder / RESULTS]) as partial:
        draw_grid(pictures, captions, near.indices.shape[1] + 1).save(partial / PICTURE)
        files.write_text(partial / RESULTS, json.dumps(results, indent=2) + "\n")
    return results


def _load(split: Split, indices: Int64[np.ndarray, " n"], count: int) -> Images:
    """Return at most `count` evenly spread images of a split in memory, without those that cannot be decoded."""
    chosen = split.subset(spread_evenly(indices, count))
    return chosen if isinstance(chosen, Images) else chosen.sample(count)


def _extract(model: Predictor, dataset: ImageDataset, split: str) -> Float[np.ndarray, "n d"]:
    """Compute the features of a split's images, normalized as in training."""
    dataset = replace(dataset, mean=model.info.mean, std=model.info.std)
    batches = evaluation_batches(dataset, split, model.device, model.batch_size)
    features = extract_features(model.model, batches, model.device, model.dtype, model.parts).values
    if not np.isfinite(features).all():
        raise model.info.error("the features are not finite, so these weights are unusable")
    return features


def _label(dataset: ImageDataset, images: Images, index: int) -> str | None:
    """Return the class of an image; None if it has none."""
    label = int(images.labels[index])
    return None if label == NO_LABEL or len(dataset.class_names) < 2 else dataset.label_name(label)
