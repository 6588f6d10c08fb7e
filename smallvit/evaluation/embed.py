"""Compute features of images with a trained model, and find the nearest neighbors of each image.

Axes: n images, m images whose neighbors are searched, d features, k neighbors.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from smallvit.config.options import MAX_MEGAPIXELS, Amp
from smallvit.datasets.manifest import PARQUET_REMEDY
from smallvit.evaluation.predict import ImageInput, Prediction, decode_batches, list_images
from smallvit.evaluation.predictor import Predictor, load_predictor
from smallvit.models import weights
from smallvit.utils.errors import InputError
from smallvit.utils.files import atomic_write
from smallvit.utils.hardware import autocast


@dataclass(frozen=True, kw_only=True)
class Neighbors:
    """The images with the most similar features, the most similar first."""

    indices: Int64[np.ndarray, "m k"]
    similarities: Float[np.ndarray, "m k"]
    """Cosine similarities, from -1 to 1."""


def embed(
    name: str | Path,
    images: ImageInput | Iterable[ImageInput],
    *,
    img_size: int | tuple[int, int] | None = None,
    device: str = "auto",
    amp: Amp = "auto",
) -> Float[np.ndarray, "n d"]:
    """Compute the features of images with a trained model: the input of its classifier, in fp32.

    Args:
        name: A run folder, a weights file, or a timm model with pretrained weights.
        images: One or several files, folders of files, Pillow images or arrays.
        img_size: Image size in pixels, or height and width; by default the model's.
        device: auto, cpu, cuda, cuda:1, mps.
        amp: Mixed precision: auto, bf16, fp16 or off.

    Raises:
        InputError: There are no such weights or device, or an image cannot be read.
    """
    model = load_predictor(str(name), "embed", img_size=img_size, device=device, amp=amp)
    inputs = list_images([images] if isinstance(images, ImageInput) else images)
    batches = []
    for predictions, features in embed_images(model, inputs):
        if failed := [each for each in predictions if each.error is not None]:
            raise InputError(f"{failed[0].path or 'image'}: {failed[0].error}")
        batches.append(features)
    return np.concatenate(batches)


def embed_images(
    model: Predictor, images: Sequence[ImageInput], max_megapixels: float = MAX_MEGAPIXELS
) -> Iterator[tuple[list[Prediction], Float[np.ndarray, "b d"]]]:
    """Compute the features of images, in batches and in their order.

    Yields:
        Predictions without classes for the images of a batch, and the features of those without an error.

    Raises:
        InputError: The features are not finite.
    """
    for predictions, pixels in decode_batches(model, images, max_megapixels):
        features = np.empty((0, 0), np.float32) if pixels is None else _compute(model, model.normalize(pixels))
        yield predictions, features


@torch.inference_mode()
def _compute(model: Predictor, images: Float[Tensor, "b c h w"]) -> Float[np.ndarray, "b d"]:
    with autocast(model.device, model.dtype):
        features = model.parts.compute(partial(weights.extract_features, model.model), images).float().cpu()
    if not features.isfinite().all():
        raise model.info.error("the features are not finite, so these weights are unusable")
    return features.numpy()


def find_neighbors(
    features: Float[np.ndarray, "n d"], count: int, queries: Float[np.ndarray, "m d"] | None = None
) -> Neighbors:
    """Find the nearest neighbors of each image among the others by cosine similarity.

    Args:
        features: The features.
        count: Neighbors per image; there are fewer if there are fewer other images.
        queries: Features of the images whose neighbors are returned, if these are not among the others.
    """
    count = min(count, len(features) - (queries is None))
    if count < 1:
        return Neighbors(indices=np.empty((len(features), 0), int), similarities=np.empty((len(features), 0)))
    distances, indices = NearestNeighbors(n_neighbors=count, metric="cosine").fit(features).kneighbors(queries)
    return Neighbors(indices=indices, similarities=1 - distances)


def write_embedding(
    path: Path, table: Path, names: Sequence[str], features: Float[np.ndarray, "n d"], near: Neighbors
) -> list[Path]:
    """Write features and neighbors, and return the files.

    Args:
        path: A .parquet file for all columns, or a .npy file for the features.
        table: File of the names and neighbors next to a .npy file.
        names: The image files.
        features: Their features, float32.
        near: Their neighbors.
    """
    if path.suffix.lower() == ".parquet":
        _write_parquet(path, names, features, near)
        return [path]
    with atomic_write(path) as partial, open(partial, "wb") as file:
        np.save(file, features, allow_pickle=False)
    with atomic_write(table) as partial, open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file, lineterminator="\n")
        numbers = range(1, near.indices.shape[1] + 1)
        writer.writerow(["path", *(f"{column}_{k}" for k in numbers for column in ("neighbor", "similarity"))])
        for name, indices, similarities in zip(names, near.indices, near.similarities, strict=True):
            pairs = zip(indices, similarities, strict=True)
            writer.writerow([name, *(cell for index, value in pairs for cell in (names[index], f"{value:.4f}"))])
    return [path, table]


def _write_parquet(path: Path, names: Sequence[str], features: Float[np.ndarray, "n d"], near: Neighbors) -> None:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    columns = {
        "path": pa.array(names),
        "features": pa.FixedSizeListArray.from_arrays(features.ravel(), features.shape[1]),
        "neighbors": pa.array([[names[index] for index in row] for row in near.indices], pa.list_(pa.string())),
        "similarities": pa.array(near.similarities.tolist(), pa.list_(pa.float32())),
    }
    with atomic_write(path) as partial:
        write_table(pa.table(columns), partial)


def require_parquet() -> None:
    """Check that the package for Parquet files is installed.

    Raises:
        InputError: It is missing.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise InputError(f"--out: Parquet needs a package: {PARQUET_REMEDY}; or end the name in .npy") from None
