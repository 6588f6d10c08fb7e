"""What every exported model has: a description of itself, and the answers of the model that it was made of.

Axes: b batch, c channels, h w pixels, k classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

import smallvit
from smallvit.errors import first_line
from smallvit.headers import header
from smallvit.plugins.binary import BinaryAttending, BinaryProduct
from smallvit.ready import Ready
from smallvit.trained import ENTRY

BATCHES = (1, 5)
"""Images in the batches that are compared."""
MORE_BATCHES = (1, 15)
"""Where answers jump."""
ENOUGH = 0.25
"""Share of images that must have the same answer there; one in eight has another at 96 pixels."""
TOLERANCE = 1e-4
"""Largest difference of logits in fp32: absolute, or as a share of the largest where that is above 1."""


def description(model: Ready) -> dict[str, str]:
    """What a program must know to ask the model, as texts; lists and numbers in JSON."""
    return {
        "arch": model.card.spec["arch"],
        "class_names": json.dumps(list(model.class_names)),
        "img_size": json.dumps(model.img_size),
        "in_chans": json.dumps(model.in_chans),
        "mean": json.dumps(model.card.mean),
        "std": json.dumps(model.card.std),
        "preprocessing": preprocessing(model),
        "smallvit": smallvit.__version__,
    }


def own_metadata(model: Ready) -> dict[str, Any] | None:
    """What the weights file says of itself, at the model's image size now; None where smallvit did not write it."""
    card = model.card
    if card.tagged is not None or card.class_names is None:
        return None
    metadata = json.loads(header(card.path)["__metadata__"][ENTRY])
    metadata["model"]["img_size"] = model.img_size
    return metadata


def preprocessing(model: Ready) -> str:
    """How images become what the model takes, in words."""
    mode = "RGB" if model.in_chans == 3 else "grey (ITU-R 601 luma)"
    size = model.img_size
    return (
        f"Turn the image as its EXIF orientation says, lay transparency on white, convert to {mode}; resize the "
        f"shorter side to {size} pixels (bilinear, antialiased) and cut out the central {size} x {size}; then (pixels "
        f"/ 255 - mean) / std per channel, as float32 (batch, {model.in_chans}, {size}, {size}). The softmax of the "
        "logits are the classes' probabilities."
    )


def example(model: Ready, batch: int) -> Float[Tensor, "b c h w"]:
    """Images of noise, the same each time."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, model.in_chans, model.img_size, model.img_size, generator=generator)


def has_jumps(model: nn.Module) -> bool:
    """Whether answers jump where a number lies within rounding of a threshold: activations or maps have one bit."""
    layers = list(model.modules())
    return any(
        isinstance(layer, BinaryAttending) or (isinstance(layer, BinaryProduct) and layer.move is not None)
        for layer in layers
    )


@torch.inference_mode()
def require_same(
    model: Ready,
    other: Callable[[Float[Tensor, "b c h w"]], Float[Tensor, "b k"]],
    program: str,
    *,
    tolerance: float = TOLERANCE,
) -> None:
    """Check that what was exported answers as the model does, to batches of several sizes.

    Answers of one-bit activations jump, and no two programs round alike: there, not all images need the same answer.

    Raises:
        InputError: it does not, or it answers nothing.
    """
    jumps = tolerance > 0 and has_jumps(model.model)
    differences, same = [], []
    for batch in MORE_BATCHES if jumps else BATCHES:
        images = example(model, batch)
        expected = model.logits(images)
        try:
            found = other(images)
        except Exception as error:  # whatever another program raises at a graph that it cannot run
            raise model.card.error(f"{program} cannot run what was exported ({first_line(error)})") from None
        if found.shape != expected.shape:
            raise model.card.error(f"{program} gives {list(found.shape)}, where the model gives {list(expected.shape)}")
        differences.append((found - expected).abs().amax(1))
        same.append(differences[-1] <= tolerance * max(1, float(expected.abs().max())))  # nor where it is no number
    worst, share = float(torch.cat(differences).max()), float(torch.cat(same).float().mean())
    if share < (ENOUGH if jumps else 1) or not math.isfinite(worst):
        raise model.card.error(f"{program} answers otherwise than the model: logits differ by up to {worst:.2g}")
