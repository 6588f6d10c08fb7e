"""Verify that an exported model computes the logits of the original, and describe it in metadata.

Axes: b batch, c channels, h w pixels, k classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from jinja2 import Environment
from torch import Tensor, nn

import smallvit
from smallvit.datasets.decode import GRAY
from smallvit.datasets.gray import FULL, GrayRanges, takes_arrays
from smallvit.evaluation.predictor import Predictor
from smallvit.models.weights_info import ENTRY
from smallvit.plugins.binary_layers import BinaryAttending, BinaryProduct
from smallvit.utils.errors import first_line
from smallvit.utils.files import read_safetensors
from smallvit.utils.sizes import height_width

TEMPLATE = Path(__file__).with_name("preprocess.py.jinja")
TOLERANCE = 1e-4
"""Maximum difference of fp32 logits: absolute, or relative to the largest logit of a batch if that is above 1."""
BATCH_SIZES = (1, 5)
"""Sizes of the batches to compare."""
BINARY_BATCH_SIZES = (1, 15)
"""The same for models with one-bit activations."""
MIN_EQUAL_SHARE = 0.25
"""Minimum share of images with equal logits for models with one-bit activations; measured is 7 of 8 at 96 pixels."""


@torch.inference_mode()
def verify_logits(
    model: Predictor,
    exported: Callable[[Float[Tensor, "b c h w"]], Float[Tensor, "b k"]],
    program: str,
    *,
    tolerance: float = TOLERANCE,
) -> None:
    """Check that an exported model computes the logits of the original for batches of several sizes.

    One-bit activations flip where an input is within rounding error of its threshold, and programs round differently.
    For such models only a share of the images must have equal logits.

    Args:
        model: The original.
        exported: Computes logits from normalized images.
        program: Name of the program that runs `exported`, for messages.
        tolerance: Maximum difference; 0 compares all images of all models.

    Raises:
        InputError: the logits differ, are not finite, or cannot be computed.
    """
    is_binary = tolerance > 0 and has_binary_activations(model.model)
    differences, is_equal = [], []
    for batch in BINARY_BATCH_SIZES if is_binary else BATCH_SIZES:
        images = example_images(model, batch)
        expected = model.predict_logits(images)
        try:
            logits = exported(images)
        except Exception as error:  # programs raise errors of any type for graphs that they cannot run
            raise model.info.error(f"{program} cannot run the exported model ({first_line(error)})") from None
        if logits.shape != expected.shape:
            shapes = f"{list(logits.shape)}, expected {list(expected.shape)}"
            raise model.info.error(f"{program} returns logits of shape {shapes}")
        differences.append((logits - expected).abs().amax(1))
        is_equal.append(differences[-1] <= tolerance * max(1, float(expected.abs().max())))  # False for NaN
    worst, share = float(torch.cat(differences).max()), float(torch.cat(is_equal).float().mean())
    if share < (MIN_EQUAL_SHARE if is_binary else 1) or not math.isfinite(worst):
        raise model.info.error(f"the logits in {program} differ from the model's by up to {worst:.2g}")


def example_images(model: Predictor, batch: int) -> Float[Tensor, "b c h w"]:
    """Return reproducible random inputs."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, model.in_chans, *height_width(model.img_size), generator=generator)


def has_binary_activations(model: nn.Module) -> bool:
    """Return whether a model has one-bit activations or attention maps."""
    return any(
        isinstance(layer, BinaryAttending) or (isinstance(layer, BinaryProduct) and layer.move is not None)
        for layer in model.modules()
    )


def build_metadata(model: Predictor) -> dict[str, str]:
    """Return what a program needs to use a model, as strings; lists and numbers are JSON."""
    ranges = model.info.gray_ranges
    return ({"gray_ranges": json.dumps(ranges.to_json())} if ranges else {}) | {
        "arch": model.info.spec["arch"],
        "class_names": json.dumps(list(model.class_names)),
        "img_size": json.dumps(model.img_size),
        "in_chans": json.dumps(model.in_chans),
        "mean": json.dumps(model.info.mean),
        "std": json.dumps(model.info.std),
        "preprocessing": describe_preprocessing(model),
        **(
            {"activation": "sigmoid", "thresholds": json.dumps(model.info.thresholds)} if model.info.multi_label else {}
        ),
        "smallvit": smallvit.__version__,
    }


def describe_preprocessing(model: Predictor) -> str:
    """Describe in a sentence how images become inputs of a model."""
    mode = {1: "grayscale (ITU-R 601 luma)", 3: "RGB"}.get(model.in_chans, f"{model.in_chans} channels")
    (height, width), ranges = height_width(model.img_size), model.info.gray_ranges or GrayRanges()
    resized, crop_mode, interpolation = (
        _resized(model),
        *(model.info.resizing[name] for name in ("crop_mode", "interpolation")),
    )
    if crop_mode == "center" and resized[0] == resized[1]:
        sides = f"shorter side to {resized[0]} pixels"
    else:
        words = {"center": "to cover", "border": f"on level {GRAY} to fit into", "squash": "to"}
        sides = f"image {words[crop_mode]} {resized[0]} x {resized[1]} pixels"
    scaled = "".join(f"scale {line}; " for line in ranges.describe())
    probabilities = (
        "sigmoids of the logits are the probabilities of the classes, which are predicted from their thresholds on"
        if model.info.multi_label
        else "softmax of the logits gives the class probabilities"
    )
    return (
        f"Rotate the image by its EXIF orientation, {scaled}blend transparency onto white, convert to {mode}; resize "
        f"the {sides} ({interpolation}, antialiased) and crop the central {height} x {width}; then "
        f"(pixels / 255 - mean) / std per channel, as float32 (batch, {model.in_chans}, {height}, {width}). The "
        f"{probabilities}."
    )


def _resized(model: Predictor) -> tuple[int, int]:
    """Return the height and width before the crop."""
    height, width = (int(side / model.info.resizing["crop_pct"]) for side in height_width(model.img_size))
    return height, width


def render_preprocess(model: Predictor) -> str:
    """Return the source of a module that preprocesses images for a model with Pillow and NumPy alone."""
    resizing, ranges = model.info.resizing, model.info.gray_ranges or GrayRanges()
    return (
        Environment(trim_blocks=True, keep_trailing_newline=True)
        .from_string(TEMPLATE.read_text("utf-8"))
        .render(
            **dict(zip(("height", "width"), height_width(model.img_size), strict=True)),
            channels=model.in_chans,
            arrays=takes_arrays(model.in_chans, ranges),
            resized=_resized(model),
            crop_mode=resizing["crop_mode"],
            gray=GRAY,
            interpolation=resizing["interpolation"],
            mean=list(model.info.mean),
            std=list(model.info.std),
            channel_ranges=ranges.channels,
            integer=ranges.integer or FULL["integer"],
            floating=ranges.floating or FULL["floating"],
        )
    )


def read_own_metadata(model: Predictor) -> dict[str, Any] | None:
    """Return the smallvit metadata of a weights file with the current image size; None for files of other programs."""
    info = model.info
    if info.timm_name is not None or info.class_names is None:
        return None
    metadata = json.loads(read_safetensors(info.path)[0][ENTRY])
    metadata["model"]["img_size"] = model.img_size
    return metadata
