"""Test on fake GPU tensors that nothing of a step or an evaluation mixes devices or waits for the device.

Fake tensors have shapes, types and devices but no values: an operation on tensors of two devices raises, and so does a
value that is read, as by `.item()`. The backward pass needs a build of torch with CUDA, and timm's moving average a
GPU; both are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from smallvit.attention.maps import extract_attention
from smallvit.config.options import AugmentConfig, DistillConfig, OptimConfig
from smallvit.datasets.augment import Augment
from smallvit.datasets.presets import PRESETS
from smallvit.evaluation.evaluate import evaluate
from smallvit.models.factory import create_model
from smallvit.plugins.distillation import add_distillation_token
from smallvit.training.losses import LOSSES, create_objective

CUDA, CLASSES = torch.device("cuda", 0), 10
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit", {"spt": True, "lsa": True}),
    "stem": ("vit", {"stem": True, "lsa": True, "ffn": True, "xsa": True}),
    "cait": ("cait", {"spt": True, "lsa": True, "ffn": True}),
    "pit": ("pit", {"spt": True, "lsa": True}),
    "swin": ("swin", {"spt": True, "lsa": True}),
    "t2t": ("t2t", {"lsa": True}),
    "binary": ("vit96", {"binary": True}),
    "resnet": ("resnet20", {}),
}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    return FakeTensorMode(allow_non_fake_inputs=True)  # numbers drawn by NumPy are real, on the CPU


def create(name: str, fake: FakeTensorMode) -> nn.Module:
    """Create a model, and replace its parameters and buffers by fake ones on a GPU."""
    arch, plugins = MODELS[name]
    model = create_model(arch=arch, img_size=32, in_chans=3, num_classes=CLASSES, plugins=plugins)
    return move(model, fake)


def move(model: nn.Module, fake: FakeTensorMode) -> nn.Module:
    with fake:
        for module in model.modules():
            for key, value in module._parameters.items():
                if value is not None:
                    module._parameters[key] = nn.Parameter(fake.from_tensor(value.detach()).to(CUDA))
            for key, value in module._buffers.items():
                if value is not None:
                    module._buffers[key] = fake.from_tensor(value).to(CUDA)
    return model


def images(b: int = 4) -> Tensor:
    return torch.empty(b, 3, 32, 32, device=CUDA)


def targets(b: int = 4) -> Tensor:
    return torch.empty(b, CLASSES, device=CUDA)


class Summed(Exception):
    """All batches are evaluated without a value read."""


def reach_total(sums: Tensor) -> Tensor:
    assert sums.device == CUDA
    raise Summed


@pytest.mark.slow
def test_models_stay_on_the_device(fake: FakeTensorMode) -> None:
    for name in MODELS:
        model = create(name, fake)
        with fake:
            for training in (True, False):
                model.train(training)
                assert model(images()).device == CUDA, name
            batches = [(images(), torch.empty(4, dtype=torch.int64, device=CUDA))]
            with pytest.raises(Summed):
                evaluate(model, batches, CUDA, torch.float32, flip=True, total=reach_total)
            if name != "resnet":
                _, maps = extract_attention(model, images())
                assert all(each.full().device == CUDA for each in maps), name


@pytest.mark.slow
def test_augmentation_stays_on_the_device(fake: FakeTensorMode) -> None:
    for name in PRESETS:
        augment = Augment.from_config(AugmentConfig(aug=name), 32, flip=True)
        draws = augment.draw(np.random.default_rng(0), 8, 32, 32)
        with fake:
            pixels = torch.empty(8, 3, 32, 32, dtype=torch.uint8, device=CUDA)
            labels, weights = torch.empty(8, dtype=torch.int64, device=CUDA), torch.empty(8, device=CUDA)
            mean, std = (torch.empty(3, 1, 1, device=CUDA) for _ in range(2))
            x, y = augment.apply(pixels, labels, draws, mean, std, CLASSES, weights)
        assert (x.device, x.shape, y.device, y.shape) == (CUDA, (8, 3, 32, 32), CUDA, (8, CLASSES)), name


@pytest.mark.slow
def test_losses_stay_on_the_device(fake: FakeTensorMode) -> None:
    plain, distilled = create("vit", fake), create_model(arch="vit96", img_size=32, in_chans=3, num_classes=CLASSES)
    distilled = move(add_distillation_token(distilled), fake)
    with fake:
        frequencies = torch.empty(CLASSES, device=CUDA)
        for name, loss in LOSSES.items():
            if loss.features:
                continue
            if loss.distillation:
                objective = create_objective(OptimConfig(), DistillConfig(teacher="run", distill=name))
                model, outputs = distilled, targets()
            else:
                weighted = {"class_weights": "balanced", "logit_adjustment": 1.0} if loss.softmax else {}
                objective = create_objective(OptimConfig(loss=name, **weighted), frequencies=frequencies)
                model, outputs = plain, None
            assert objective(model.train(), images(), targets(), outputs)["loss"].device == CUDA, name


class Faulty(nn.Module):
    """A layer with a fault."""

    def __init__(self, fault: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, x: Tensor) -> Tensor:
        return self.fault(x)


def test_planted_faults_raise(fake: FakeTensorMode) -> None:
    constant = torch.ones(3, 1, 1)
    for fault, expected in (
        (lambda x: x * x.mean().item(), DataDependentOutputException),
        (lambda x: x if (x > 0).any() else -x, DataDependentOutputException),
        (partial(torch.mul, constant), RuntimeError),
    ):
        model = create("resnet", fake)
        with fake, pytest.raises(expected):
            nn.Sequential(Faulty(fault), model)(images())
