"""Where half precision cannot be trusted."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from smallvit.errors import InputError
from smallvit.hardware import pick_dtype


def sound_dtype(
    device: torch.device, amp: Literal["auto", "bf16", "off"], model: nn.Module, in_chans: int, img_size: int
) -> torch.dtype:
    """The precision to compute in; on CPUs not bf16 for convolutions that step over a map of one pixel.

    oneDNN leaves parts of such a convolution's bf16 weight gradient as they were in memory (PyTorch 2.15: 3 × 3, stride
    2, 1 × 1 pixel). They meet CNNs whose images are smaller than what they shrink them by.

    Raises:
        InputError: bf16 was asked for by name.
    """
    dtype = pick_dtype(device, amp)
    if device.type != "cpu" or dtype != torch.bfloat16 or not _steps_over_one_pixel(model, in_chans, img_size):
        return dtype
    if amp == "bf16":
        raise InputError(
            f"--amp bf16: this CPU computes wrong gradients for {type(model).__name__} at {img_size} pixels; give "
            "--amp off, or a larger --img-size"
        )
    return torch.float32


@torch.no_grad()
def _steps_over_one_pixel(model: nn.Module, in_chans: int, img_size: int) -> bool:
    found = []

    def look(layer: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0].shape[-2:].numel() == 1 and max(layer.stride) > 1 and max(layer.kernel_size) > 1)

    hooks = [layer.register_forward_pre_hook(look) for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    training = model.training
    model.eval()(torch.zeros(1, in_chans, img_size, img_size))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return any(found)
