"""Test feature guidance against its equation, with feature maps recorded by hooks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torchvision.transforms.v2.functional import InterpolationMode, resize

import smallvit as package
from smallvit import Config, create_model
from smallvit.models import checkpoint
from smallvit.runs.run import Run
from smallvit.training import train
from smallvit.training.losses import feature_guidance
from smallvit.training.setup import Setup, create_setup
from smallvit.training.train import train_step

Command = Callable[..., tuple[int, str, str]]
TINY = {"epochs": 2, "batch_size": 64, "train_fraction": 0.2, "lr": 3e-3, "aug": "mix", "amp": "off"}


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a small CNN on digits as a teacher."""
    folder = tmp_path_factory.mktemp("teachers") / "cnn"
    return train.train(Config.build(arch="resnet20", out=str(folder), **TINY)).folder


def guided(cnn: Path, **options: Any) -> Setup:
    config = Config.build(**{"arch": "vit96", "teacher": str(cnn), "distill": "features"} | TINY | options)
    return create_setup(config)


def record(layers: list[nn.Module], call: Callable[[], Any]) -> list[Tensor]:
    """Return the outputs of layers during a call."""
    outputs: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda *args: outputs.append(args[2])) for layer in layers]
    call()
    for hook in hooks:
        hook.remove()
    return outputs


def equation(maps: list[Tensor], teacher_maps: list[Tensor]) -> Tensor:
    """Return the sum of the mean squared differences at the larger grid, with torchvision's resizing."""
    total = torch.zeros(())
    for student, teacher in zip(maps, teacher_maps, strict=True):
        side = max(student.shape[-1], teacher.shape[-1])
        both = [resize(each, [side, side], InterpolationMode.BILINEAR, antialias=False) for each in (student, teacher)]
        total = total + (both[0] - both[1]).square().mean()
    return total


def test_loss_equals_the_equation() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [((2, 5, 4, 4), (2, 5, 8, 8)), ((2, 3, 6, 6), (2, 3, 4, 4)), ((2, 7, 3, 3), (2, 7, 3, 3))]
    ours, theirs = ([torch.randn(pair[i], generator=generator) for pair in shapes] for i in (0, 1))
    torch.testing.assert_close(feature_guidance(ours, theirs), equation(ours, theirs))
    assert feature_guidance(ours, ours).item() == 0


def test_a_step_minimizes_the_stated_loss(cnn: Path) -> None:
    setup = guided(cnn, drop_path=0.0, label_smoothing=0.0, distill_weight=1.5)
    images, targets = next(setup.batches.epoch(0))
    student, teacher = setup.model, package.load_model(cnn)
    blocks = [student.blocks[index] for index in (0, 3, 5)]
    with torch.no_grad():
        tokens = record(blocks, lambda: student(images))
        theirs = record([teacher.layer1, teacher.layer2, teacher.layer3], lambda: teacher(images))
        grids = [rearrange(each[:, 1:], "b (i j) c -> b c i j", i=4) for each in tokens]
        ours = [project(grid) for project, grid in zip(setup.trained.projections, grids, strict=True)]
        labels = -(targets * student(images).log_softmax(1)).sum(1).mean()
        expected = labels + 1.5 * equation(ours, theirs)
    before = {name: value.clone() for name, value in setup.trained.projections.state_dict().items()}
    assert train_step(setup, 0, 0, images, targets).item() == pytest.approx(expected.item(), rel=1e-4)
    for name, value in setup.trained.projections.state_dict().items():
        assert not torch.equal(value, before[name]), name


def test_the_published_weight_is_the_default(cnn: Path) -> None:
    objective = guided(cnn).objective
    assert objective.weight == 2.5


@pytest.mark.parametrize("arch", ["t2t", "resnet20"])
def test_feature_maps_are_those_of_the_layers(arch: str) -> None:
    model = create_model(arch, img_size=32, num_classes=10).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    layers = [model.layer1, model.layer3] if arch == "resnet20" else [model.blocks[0], model.blocks[2]]
    expected = record(layers, lambda: model(images))
    if arch == "t2t":
        expected = [rearrange(each[:, 1:], "b (i j) c -> b c i j", i=8) for each in expected]
    features, maps = model.forward_intermediates(images, indices=[0, 2])
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(model.forward_head(features), model(images))
    torch.testing.assert_close(model.forward_intermediates(images, [0, 2], intermediates_only=True), expected)


@pytest.mark.slow
def test_weights_files_hold_the_student_alone_and_a_resumed_run_gives_the_same_bytes(
    cnn: Path, tmp_path: Path, interrupted: Callable[[int], AbstractContextManager[None]]
) -> None:
    options = {"arch": "vit96", "teacher": str(cnn), "distill": "features", "teacher_views": 2, "ema_decay": 0.9} | TINY
    whole = train.train(Config.build(out=str(tmp_path / "whole"), **options))
    weights, _ = checkpoint.load_weights(whole.folder / Run.LAST)
    plain = create_model("vit96", img_size=8, in_chans=1, num_classes=10)
    assert weights.keys() == plain.state_dict().keys()
    assert package.load_model(whole.folder)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    with interrupted(5):
        train.train(Config.build(out=str(tmp_path / "broken"), **options))
    resumed = train.train(Config.build(resume=str(tmp_path / "broken")))
    assert (resumed.folder / Run.LAST).read_bytes() == (whole.folder / Run.LAST).read_bytes()


@pytest.mark.slow
def test_students_of_all_families_learn_from_a_timm_cnn(tmp_path: Path) -> None:
    options = TINY | {"batch_size": 16, "train_fraction": 0.05}
    folder = train.train(Config.build(arch="test_resnet", out=str(tmp_path / "cnn"), **options)).folder
    failed = []
    for arch in ("vit96+spt+lsa", "deit_tiny_patch16_224", "cait", "pit+spt", "swin", "t2t", "resnet20"):
        setup = guided(folder, arch=arch, **options)
        before = {name: value.clone() for name, value in setup.trained.projections.state_dict().items()}
        images, targets = next(setup.batches.epoch(0))
        loss = train_step(setup, 0, 0, images, targets)
        after = setup.trained.projections.state_dict()
        if not loss.isfinite() or any(torch.equal(value, before[name]) for name, value in after.items()):
            failed.append(arch)
    assert not failed


def test_a_teacher_of_other_classes_is_accepted(cnn: Path, tmp_path: Path) -> None:
    weights, metadata = checkpoint.load_weights(cnn / Run.BEST)
    metadata["data"]["class_names"] = [f"other {name}" for name in metadata["data"]["class_names"]]
    checkpoint.save_weights(tmp_path / "other.safetensors", weights, metadata)
    setup = guided(tmp_path / "other.safetensors")
    images, _ = next(setup.batches.epoch(0))
    assert [tuple(each.shape[1:]) for each in setup.teacher(images)] == [(16, 8, 8), (32, 4, 4), (64, 2, 2)]


def test_cached_feature_maps_are_right(cnn: Path) -> None:
    setup = guided(cnn, teacher_views=1)
    images, _ = next(setup.batches.epoch(0))
    computed = guided(cnn).teacher(images)
    for _ in range(2):
        for cached, expected in zip(setup.teacher(images, (0, 0, 1)), computed, strict=True):
            torch.testing.assert_close(cached, expected, rtol=2e-3, atol=2e-3)


def test_errors_are_one_line(smallvit: Command, cnn: Path, tmp_path: Path) -> None:
    shutil.copytree(cnn, tmp_path / "cnn")
    cases = {
        ("--arch", "binaryvit"): "binaryvit has no feature maps",
        ("--fsdp",): "--fsdp",
        ("--distill-weight", "0"): "above 0",
        ("--teacher-views", "100000000"): "GiB",
    }
    for options, expected in cases.items():
        arguments = ("--teacher", tmp_path / "cnn", "--distill", "features", "--out", tmp_path / "run", *options)
        code, _, err = smallvit("train", "--train-fraction", "0.2", "--epochs", "1", *arguments)
        assert (code, err.count("\n"), expected in err) == (2, 1, True), err
