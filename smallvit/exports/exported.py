"""What every exported model has: a description of itself, and the answers of the model that it was made of.

Axes: b batch, c channels, h w pixels, k classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

import smallvit
from smallvit.errors import first_line
from smallvit.ready import Ready

BATCHES = (1, 5)
"""Images in the batches that are compared."""
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


@torch.inference_mode()
def require_same(model: Ready, other: Callable[[Float[Tensor, "b c h w"]], Float[Tensor, "b k"]], program: str) -> None:
    """Check that what was exported answers as the model does, to batches of several sizes.

    Raises:
        InputError: it does not, or it answers nothing.
    """
    for batch in BATCHES:
        images = example(model, batch)
        expected = model.logits(images)
        try:
            found = other(images)
        except Exception as error:  # whatever another program raises at a graph that it cannot run
            raise model.card.error(f"{program} cannot run what was exported ({first_line(error)})") from None
        if found.shape != expected.shape:
            raise model.card.error(f"{program} gives {list(found.shape)}, where the model gives {list(expected.shape)}")
        worst = float((found - expected).abs().max())
        if not worst <= TOLERANCE * max(1, float(expected.abs().max())):  # nor where it is not a number
            raise model.card.error(f"{program} answers otherwise than the model: logits differ by up to {worst:.2g}")
