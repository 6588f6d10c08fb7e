"""bf16 where it is right, and nowhere else."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from smallvit import InputError, precision
from smallvit.precision import sound_dtype

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def a_cpu_with_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})


@pytest.mark.parametrize(("arch", "size", "sound"), [("resnet10t", 16, False), ("resnet10t", 32, True)])
def test_strided_convolutions_of_one_pixel_are_computed_in_fp32(arch: str, size: int, sound: bool) -> None:
    model = timm.create_model(arch, num_classes=3)
    assert sound_dtype(CPU, "auto", model, 3, size) == (torch.bfloat16 if sound else torch.float32)
    assert sound_dtype(CPU, "off", model, 3, size) == torch.float32
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_asking_for_wrong_gradients_is_refused_in_one_line() -> None:
    model = timm.create_model("resnet10t", num_classes=3)
    with pytest.raises(InputError, match="--amp bf16: this CPU computes ResNet wrongly at 16 pixels"):
        sound_dtype(CPU, "bf16", model, 3, 16)
    assert sound_dtype(CPU, "bf16", model, 3, 64) == torch.bfloat16


def test_a_vision_transformer_keeps_its_bf16() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=3)
    assert sound_dtype(CPU, "auto", model, 3, 16) == torch.bfloat16


class Functional(nn.Module):
    """A convolution that is no layer, with its kernel put together of two, as SPT does."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        half = self.conv.weight / 2
        return nn.functional.conv2d(x, half + half, self.conv.bias, self.conv.stride, self.conv.padding)


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize(("chans", "kernel", "stride", "padding"), [(8, 8, 4, 2), (16, 4, 4, 0), (3, 3, 1, 1)])
def test_bf16_is_taken_where_convolutions_are_right(
    chans: int, kernel: int, stride: int, padding: int, functional: bool
) -> None:
    """The first two are wrong on CPUs with AMX (PyTorch 2.15), and right on others."""
    conv = nn.Conv2d(chans, 16, kernel, stride, padding)
    images = torch.randn(4, chans, 32, 32).bfloat16()
    with torch.no_grad():
        exact, low = conv(images.float()), conv.bfloat16()(images)
    right = (low - exact).abs().max() < 0.1 * exact.abs().max()
    model = Functional(conv.float()) if functional else conv.float()
    assert sound_dtype(CPU, "auto", model, chans, 32) == (torch.bfloat16 if right else torch.float32)


def test_errors_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "TOLERANCE", 1e-5)  # finer than bf16
    precision._is_sound.cache_clear()
    assert sound_dtype(CPU, "auto", nn.Conv2d(3, 8, 3), 3, 32) == torch.float32
    precision._is_sound.cache_clear()


def test_random_numbers_stay_as_they_are() -> None:
    model = timm.create_model("resnet10t", num_classes=3)
    before = torch.get_rng_state()
    sound_dtype(CPU, "auto", model, 3, 48)
    assert torch.equal(torch.get_rng_state(), before)
