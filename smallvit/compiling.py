"""When and how a model is compiled by torch.compile.

Batches of training have one shape throughout, so there is one graph to compile; judging, with its shorter last batch,
runs uncompiled.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import nn

from smallvit.errors import InputError

PAYS_FROM = {"cpu": 4e14, "gpu": 1e16}
"""Floating-point operations of a run from which compiling costs less time than it saves: on CPUs per thread, measured
(results/train_step.txt); on GPUs not yet."""
IN_WORDS = {"off": "", "on": ", compiled at the first step", "graphs": ", compiled to CUDA graphs at the first steps"}
MODES = {"on": "default", "graphs": "reduce-overhead"}


def decide(wanted: Literal["auto", "on", "graphs", "off"], device: torch.device, macs: int, views: int) -> str:
    """on, graphs or off, for a run that sees so many images, of so many multiply-accumulates in a forward pass.

    Raises:
        InputError: CUDA graphs without CUDA.
    """
    if wanted == "graphs" and device.type != "cuda":
        raise InputError(f"--compile graphs: {device} has no CUDA graphs; give --compile on")
    if wanted != "auto":
        return wanted
    work = 6 * macs * views  # a multiply-accumulate is two operations, the backward pass twice the forward
    least = PAYS_FROM["cpu"] * torch.get_num_threads() if device.type == "cpu" else PAYS_FROM["gpu"]
    return "on" if work >= least else "off"


def compiled(model: nn.Module, how: str) -> nn.Module:
    """The model, compiled as decided."""
    for noisy in ("torch.utils.cpp_extension", "torch._logging._internal"):  # no CUDA, no profile: no news
        logging.getLogger(noisy).setLevel(logging.ERROR)
    return model if how == "off" else torch.compile(model, mode=MODES[how])


def is_convolutional(model: nn.Module) -> bool:
    """Whether most weights are those of two-dimensional convolutions, which gain from channels that lie together."""
    convolutions = (layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    inside = sum(parameter.numel() for layer in convolutions for parameter in layer.parameters(recurse=False))
    return 2 * inside > sum(parameter.numel() for parameter in model.parameters())
