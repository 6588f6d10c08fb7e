"""Where half precision cannot be trusted."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from smallvit.errors import InputError
from smallvit.hardware import pick_dtype

TOLERANCE = 0.1
"""Largest error of a sound convolution as a share of its largest value; rounding makes 0.004 of it."""


def sound_dtype(
    device: torch.device, amp: Literal["auto", "bf16", "off"], model: nn.Module, in_chans: int, img_size: int
) -> torch.dtype:
    """The precision to compute in; on CPUs not bf16 where one of a model's convolutions comes out wrong.

    Two faults of oneDNN are known (PyTorch 2.15). Parts of the weight gradient of a convolution that steps over a map
    of one pixel stay as they were in memory (3 × 3, stride 2); CNNs have those whose images are smaller than what they
    shrink them by. And CPUs with AMX compute nonsense for kernels that are wide and deep enough, such as 8 × 8 of 8
    channels. So each of the model's convolutions is tried out.

    Raises:
        InputError: bf16 was asked for by name.
    """
    dtype = pick_dtype(device, amp)
    if device.type != "cpu" or dtype != torch.bfloat16 or all(map(_is_sound, _convolutions(model, in_chans, img_size))):
        return dtype
    if amp == "bf16":
        raise InputError(
            f"--amp bf16: this CPU computes {type(model).__name__} wrongly at {img_size} pixels; leave it out"
        )
    return torch.float32


Convolution = tuple[torch.Size, torch.Size, Any]
"""Shapes of what is convolved and of the kernels, and torch's other arguments."""


class _Convolutions(TorchDispatchMode):
    """Notes the convolutions in its context."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Convolution, None] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.convolution.default:
            x, weight, _, *others = args
            self.found[x.shape, weight.shape, tuple(tuple(o) if isinstance(o, list) else o for o in others)] = None
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def _convolutions(model: nn.Module, in_chans: int, img_size: int) -> list[Convolution]:
    """Those of one image's forward pass."""
    training = model.training
    with _Convolutions() as noted:
        model.eval()(torch.zeros(1, in_chans, img_size, img_size))
    model.train(training)
    return list(noted.found)


@cache
def _is_sound(convolution: Convolution) -> bool:
    """Whether bf16 gives what fp32 does, and the same gradients."""
    x_shape, weight_shape, others = convolution
    if x_shape[2:].numel() == 1 and max(others[0]) > 1 and max(weight_shape[2:]) > 1:
        return False  # what is left in memory may be right by chance
    noise = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=noise).bfloat16() for shape in (x_shape, weight_shape))
    low, exact = (_with_gradients(*inputs, others) for inputs in ((x, weight), (x.float(), weight.float())))
    return all((a - b).abs().max() < TOLERANCE * b.abs().max() for a, b in zip(low, exact, strict=True))


@torch.enable_grad()
def _with_gradients(x: Tensor, weight: Tensor, others: Any) -> list[Tensor]:
    """A convolution and the gradients of half the sum of its squares, in fp32."""
    inputs = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = torch.ops.aten.convolution(*inputs, None, *others)
    return [each.detach().float() for each in (y, *torch.autograd.grad(y, inputs, y.detach()))]
