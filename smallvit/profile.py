"""What a model costs: parameters and multiply-accumulate operations."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from smallvit.errors import InputError, first_line


def count_parameters(model: nn.Module) -> int:
    """Number of trainable values."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_macs(model: nn.Module, in_chans: int, img_size: int) -> int:
    """Multiply-accumulates of one image's forward pass, by torch's FLOP counter (two FLOPs each).

    Raises:
        InputError: the model takes no such images.

    Counts what is computed: matrix products, convolutions and attention, not norms or activations.
    """
    return macs_by_layer(model, in_chans, img_size)[""]


@torch.no_grad()
def macs_by_layer(model: nn.Module, in_chans: int, img_size: int) -> dict[str, int]:
    """What `count_macs` counts, of every layer that computes any, by its name; the whole model's is ''.

    Raises:
        InputError: the model takes no such images.
    """
    weight = next(model.parameters())
    image = torch.zeros(1, in_chans, img_size, img_size, device=weight.device, dtype=weight.dtype)
    training, learnt = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)  # the counter's hooks meet views of parameters, which they cannot follow
    try:
        with FlopCounterMode(display=False) as counter:
            model(image)
    except Exception as error:  # whatever one of a thousand models raises at sizes not foreseen
        reason = first_line(error)
        raise InputError(f"{type(model).__name__} cannot take {img_size}-pixel images: {reason}") from error
    finally:
        model.train(training)
        for parameter in learnt:
            parameter.requires_grad_(True)
    root = type(model).__name__ + "."
    layers = {name.removeprefix(root): sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    return layers | {"": counter.get_total_flops() // 2}
