"""bf16 where its gradients are right, and nowhere else."""

from __future__ import annotations

import pytest
import timm
import torch

from smallvit import InputError
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
    with pytest.raises(InputError, match="--amp bf16: this CPU computes wrong gradients for ResNet at 16 pixels"):
        sound_dtype(CPU, "bf16", model, 3, 16)
    assert sound_dtype(CPU, "bf16", model, 3, 64) == torch.bfloat16


def test_a_vision_transformer_keeps_its_bf16() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=3)
    assert sound_dtype(CPU, "auto", model, 3, 16) == torch.bfloat16
