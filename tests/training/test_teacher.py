"""Teachers: what they see, that nothing of them changes, when they are asked, and who cannot teach whom."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import InterpolationMode, normalize, resize

import smallvit as package
from smallvit import Config
from smallvit.models import checkpoint
from smallvit.models import weights as trained
from smallvit.runs.run import Run
from smallvit.training import train
from smallvit.training.setup import create_setup
from smallvit.training.teacher import Teacher
from smallvit.training.train import train_step


def slow_except(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Mark values of a parametrized test as slow, except those in `kept`."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values]


Command = Callable[..., tuple[int, str, str]]
TINY = {"epochs": 2, "batch_size": 64, "train_fraction": 0.2, "lr": 3e-3, "aug": "mix", "amp": "off"}


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a small CNN on digits as a teacher."""
    folder = tmp_path_factory.mktemp("teachers") / "cnn"
    return train.train(Config.build(arch="resnet20", out=str(folder), **TINY)).folder


def student(folder: Path, teacher: object, **options: object) -> train.TrainResult:
    return train.train(Config.build(**{"arch": "vit", "out": str(folder), "teacher": str(teacher)} | TINY | options))


def teacher_of(forward: Callable[[Tensor], Tensor], **options: Any) -> Teacher:
    one = torch.ones(3, 1, 1)
    plain = {
        "card": None,
        "parameters": 0,
        "img_size": 8,
        "gain": one,
        "offset": 0 * one,
        "order": None,
        "fingerprint": "",
    }
    return Teacher(forward=forward, **plain | {"dtype": torch.float32, "cache": None} | options)


@pytest.mark.parametrize("size", [8, 20, 5])
def test_teacher_gets_the_view_at_its_own_size_and_normalization(size: int) -> None:
    pixels = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours, theirs = ([0.4, 0.5, 0.6], [0.2, 0.3, 0.1]), ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    (mean, std), (own_mean, own_std) = (
        [torch.tensor(values)[:, None, None] for values in each] for each in (ours, theirs)
    )
    teacher = teacher_of(nn.Identity(), img_size=size, gain=std / own_std, offset=(mean - own_mean) / own_std)
    expected = resize(pixels, [size, size], InterpolationMode.BICUBIC, antialias=size < 8)
    torch.testing.assert_close(teacher.adapt_images(normalize(pixels, *ours)), normalize(expected, *theirs))


def test_statistics_of_both_meet_in_what_the_teacher_sees(cnn: Path, tmp_path: Path) -> None:
    """Give a teacher that was trained with another normalization its own normalization."""
    weights, metadata = checkpoint.load_weights(cnn / Run.BEST)
    metadata["data"] |= {"mean": [0.1], "std": [2.0]}
    checkpoint.save_weights(tmp_path / "other.safetensors", weights, metadata)
    config = Config.build(arch="vit", teacher=str(tmp_path / "other.safetensors"), **TINY)
    setup = create_setup(config.replace(aug="none"))
    images, _ = next(setup.batches.epoch(0))
    mean, std = setup.dataset.statistics(setup.device)
    torch.testing.assert_close(setup.teacher.adapt_images(images), (images * std + mean - 0.1) / 2.0)


@pytest.mark.slow
def test_a_training_step_changes_nothing_of_the_teacher(cnn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, load = [], trained.load_trained_model
    monkeypatch.setattr(trained, "load_trained_model", lambda card: loaded.append(load(card)) or loaded[-1])
    setup = create_setup(Config.build(arch="vit", teacher=str(cnn), distill="soft", **TINY))
    (model,) = loaded
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes: list[tuple[bool, bool]] = []
    model.register_forward_hook(lambda *_: modes.append((torch.is_inference_mode_enabled(), model.training)))
    for step, (images, targets) in enumerate(setup.batches.epoch(0)):
        train_step(setup, 0, step, images, targets)
    assert any("running_mean" in name for name in before)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert set(modes) == {(True, False)}
    assert len(modes) == len(setup.batches)
    trained_names = {id(p) for group in setup.optimizer.param_groups for p in group["params"]}
    assert not trained_names & {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize("distill", slow_except(["soft", "hard", "token"], "token"))
def test_each_kind_of_distillation_trains_and_the_model_is_rebuilt(cnn: Path, tmp_path: Path, distill: str) -> None:
    result = student(tmp_path / "run", cnn, distill=distill)
    losses = [json.loads(line)["train_loss"] for line in (result.folder / Run.METRICS).read_text().splitlines()]
    assert losses[1] < losses[0]
    model = package.load_model(result.folder)
    assert (getattr(model, "head_dist", None) is not None) == (distill == "token")
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    assert json.loads((result.folder / "config.json").read_text())["teacher"] == str(cnn)


def test_step_minimizes_the_stated_loss(cnn: Path) -> None:
    """Compare the loss of a step with the equation, with logits of models called by hand."""
    options = {
        "distill": "soft",
        "drop_path": 0.0,
        "label_smoothing": 0.0,
        "distill_weight": 0.4,
        "distill_temperature": 2.0,
    }
    setup = create_setup(Config.build(arch="vit", teacher=str(cnn), **TINY | options))
    images, targets = next(setup.batches.epoch(0))
    with torch.no_grad():
        ours, theirs = setup.model(images), package.load_model(cnn)(images)
        labels = -(targets * ours.log_softmax(1)).sum(1).mean()
        p, q = (theirs / 2).softmax(1), (ours / 2).softmax(1)
        expected = 0.6 * labels + 0.4 * 4 * (p * (p / q).log()).sum(1).mean()
    assert train_step(setup, 0, 0, images, targets).item() == pytest.approx(expected.item(), rel=1e-4)


def turned(cnn: Path, file: Path) -> Path:
    """Write the teacher's weights with its last layer giving every class's logit to the next class."""
    weights, metadata = checkpoint.load_weights(cnn / Run.BEST)
    weights |= {name: weights[name].roll(1, 0).contiguous() for name in ("fc.weight", "fc.bias")}
    checkpoint.save_weights(file, weights, metadata)
    return file


@pytest.mark.slow
def test_with_all_of_the_weight_a_teacher_that_is_wrong_is_believed(tmp_path: Path) -> None:
    """Labels do not count then: the student learns to be wrong in the teacher's way."""
    options = {"aug": "none", "train_fraction": 1.0, "lr": 3e-3, "epochs": 5}
    good = train.train(Config.build(arch="resnet20", out=str(tmp_path / "good"), **TINY | options))
    assert good.summary["test_top1"] > 80
    wrong = turned(good.folder, tmp_path / "wrong.safetensors")
    own = {"arch": "resnet20", "distill": "hard", "distill_weight": 1.0, "seed": 1}
    result = student(tmp_path / "run", wrong, **options | own)
    assert result.summary["test_top1"] < 10
    x = next(create_setup(Config.build(arch="vit", **TINY | options)).batches.epoch(0))[0]
    agreement = (
        (package.load_model(result.folder)(x).argmax(1) == package.load_model(wrong)(x).argmax(1)).float().mean()
    )
    assert agreement > 0.6


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    ask = Teacher._compute_outputs

    def counted(self: Teacher, images: Tensor) -> list[Tensor]:
        calls.append(len(images))
        return ask(self, images)

    monkeypatch.setattr(Teacher, "_compute_outputs", counted)
    return calls


@pytest.mark.slow
def test_with_views_that_come_again_the_teacher_is_asked_once_for_each(
    cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch)
    student(tmp_path / "run", cnn, epochs=5, teacher_views=2, grad_accum_steps=2)
    steps = len(create_setup(Config.build(arch="vit", **TINY)).batches)
    assert len(calls) == 2 * steps * 2  # epochs drawn, steps, parts


def test_repeated_views_are_equal_and_their_cached_logits_right(cnn: Path) -> None:
    setup = create_setup(Config.build(arch="vit", teacher=str(cnn), teacher_views=2, **TINY))
    assert [setup.augmentation_epoch(epoch) for epoch in range(5)] == [0, 1, 0, 1, 0]
    first, again = (next(setup.batches.epoch(setup.augmentation_epoch(epoch)))[0] for epoch in (1, 3))
    torch.testing.assert_close(first, again)
    assert not torch.equal(first, next(setup.batches.epoch(0))[0])
    logits = [setup.teacher(first, (1, 0, 1)), setup.teacher(torch.zeros_like(first), (1, 0, 1))]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)  # the second logits come from the cache
    torch.testing.assert_close(logits[0], package.load_model(cnn)(first).detach(), rtol=2e-3, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("views", slow_except([0, 2], 2))
def test_resuming_a_student_gives_the_same_bytes(
    cnn: Path, tmp_path: Path, interrupted: Callable[[int], AbstractContextManager[None]], views: int
) -> None:
    """Resume without the cached logits, which are computed again and are the same."""
    options = {"epochs": 4, "teacher_views": views, "distill": "soft"}
    whole = student(tmp_path / "whole", cnn, **options)
    with interrupted(13):
        student(tmp_path / "broken", cnn, **options)
    resumed = train.train(Config.build(resume=str(tmp_path / "broken")))
    assert (resumed.folder / Run.LAST).read_bytes() == (whole.folder / Run.LAST).read_bytes()


def test_classes_in_another_order_are_put_in_ours(cnn: Path, tmp_path: Path) -> None:
    weights, metadata = checkpoint.load_weights(cnn / Run.BEST)
    turned = [*range(1, 10), 0]
    heads = {name for name in weights if name.startswith(("fc.", "head.", "linear."))}
    metadata["data"]["class_names"] = [metadata["data"]["class_names"][index] for index in turned]
    weights |= {name: weights[name][turned].contiguous() for name in heads}
    assert heads
    checkpoint.save_weights(tmp_path / "turned.safetensors", weights, metadata)
    setup, plain = (
        create_setup(Config.build(arch="vit", teacher=str(each), **TINY))
        for each in (tmp_path / "turned.safetensors", cnn)
    )
    images, _ = next(setup.batches.epoch(0))
    torch.testing.assert_close(setup.teacher(images), plain.teacher(images))


@pytest.mark.slow
def test_bfloat16_and_compiled_teachers_give_close_logits(cnn: Path) -> None:
    config = Config.build(arch="vit", teacher=str(cnn), **TINY)
    plain = create_setup(config)
    images, _ = next(plain.batches.epoch(0))
    logits = plain.teacher(images)
    compiled = create_setup(config.replace(compile="on")).teacher(images)
    torch.testing.assert_close(compiled, logits, rtol=1e-3, atol=1e-3)
    half = create_setup(config.replace(amp="bf16")).teacher
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half(images), logits, rtol=0.1, atol=0.1)


def test_relative_names_are_understood_from_elsewhere(
    cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smallvit: Command
) -> None:
    shutil.copytree(cnn, tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    result = student(tmp_path / "run", "teacher", init="teacher", arch=None, keep_resume=True)
    (result.folder / Run.SUMMARY).unlink()
    monkeypatch.chdir("/")
    assert smallvit("train", "--resume", result.folder)[0] == 0


@pytest.mark.slow
def test_a_teacher_that_has_changed_is_noticed(cnn: Path, tmp_path: Path, smallvit: Command) -> None:
    shutil.copytree(cnn, tmp_path / "teacher")
    result = student(tmp_path / "run", tmp_path / "teacher", keep_resume=True)
    (result.folder / Run.SUMMARY).unlink()
    turned(cnn, tmp_path / "teacher" / Run.BEST)
    code, _, err = smallvit("train", "--resume", result.folder)
    assert (code, err.count("\n")) == (2, 1)
    assert "not the teacher that the run was started with" in err


@pytest.mark.parametrize("option", ["--teacher", "--init"])
def test_a_run_does_not_replace_what_it_needs(cnn: Path, tmp_path: Path, smallvit: Command, option: str) -> None:
    shutil.copytree(cnn, tmp_path / "teacher")
    before = (tmp_path / "teacher" / Run.BEST).read_bytes()
    code, _, err = smallvit("train", option, tmp_path / "teacher", "--out", tmp_path / "teacher", "--overwrite")
    assert (code, err.count("\n")) == (2, 1)
    assert "choose another --out" in err
    assert (tmp_path / "teacher" / Run.BEST).read_bytes() == before


@pytest.mark.parametrize("option", ["--teacher", "--init"])
def test_weights_that_may_be_trained_on_the_test_split_are_refused(
    cnn: Path, tmp_path: Path, smallvit: Command, option: str
) -> None:
    """Refuse the run's folder and a copy of its file."""
    shutil.copy(cnn / Run.BEST, tmp_path / "copy.safetensors")
    for name in (cnn, tmp_path / "copy.safetensors"):
        code, _, err = smallvit("train", option, name, "--split-seed", 1, "--out", tmp_path / "run")
        assert (code, err.count("\n")) == (2, 1)
        assert "--split-seed 0" in err


@pytest.mark.slow
def test_data_with_their_own_test_split_may_have_another_split_seed(tmp_path: Path, image_folder: Path) -> None:
    for split in ("train", "test"):
        shutil.copytree(image_folder, tmp_path / "data" / split)
    common = {"data": str(tmp_path / "data"), "epochs": 1, "train_fraction": 1.0}
    first = train.train(Config.build(arch="resnet20", out=str(tmp_path / "a"), **TINY | common)).folder
    assert student(tmp_path / "b", first, split_seed=1, **common).summary["epochs"] == 1


ERRORS = {
    "a folder that is no run": (lambda cnn, tmp: ["--teacher", tmp], "--teacher"),
    "nothing there": (lambda cnn, tmp: ["--teacher", tmp / "nothing"], "--teacher"),
    "token on a CNN": (
        lambda cnn, tmp: ["--teacher", cnn, "--distill", "token", "--arch", "resnet20"],
        "--distill hard",
    ),
    "token on CaiT": (lambda cnn, tmp: ["--teacher", cnn, "--distill", "token", "--arch", "cait"], "--distill hard"),
    "token on Swin": (lambda cnn, tmp: ["--teacher", cnn, "--distill", "token", "--arch", "swin"], "--distill hard"),
    "another split": (lambda cnn, tmp: ["--teacher", cnn, "--split-seed", "1"], "--split-seed 0"),
    "too many views": (lambda cnn, tmp: ["--teacher", cnn, "--teacher-views", "100000000"], "GiB"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_teachers_are_one_line(smallvit: Command, cnn: Path, tmp_path: Path, case: str) -> None:
    arguments, expected = ERRORS[case]
    out = tmp_path / "run"
    code, _, err = smallvit(
        "train", "--train-fraction", "0.2", "--epochs", "1", "--out", out, *arguments(cnn, tmp_path)
    )
    assert code == 2
    assert err.count("\n") == 1
    assert expected in err
    assert not out.exists()


def test_classes_that_differ_are_named(smallvit: Command, cnn: Path, image_folder: Path, tmp_path: Path) -> None:
    colored = tmp_path / "colored"
    shutil.copytree(image_folder, colored)
    code, _, err = smallvit("train", "--data", colored, "--teacher", cnn, "--epochs", "1", "--out", tmp_path / "run")
    assert code == 2
    assert "takes images with 1 channels, those of colored have 3" in err
    other = train.train(Config.build(arch="resnet20", out=str(tmp_path / "three"), data=str(colored), epochs=1)).folder
    (colored / "light").rename(colored / "bright")
    code, _, err = smallvit("train", "--data", colored, "--teacher", other, "--epochs", "1", "--out", tmp_path / "run")
    assert code == 2
    assert "has other classes than colored, such as 'bright'" in err


@pytest.mark.slow
def test_a_deleted_teacher_is_missed_before_a_run_resumes(cnn: Path, tmp_path: Path, smallvit: Command) -> None:
    gone = tmp_path / "teacher"
    shutil.copytree(cnn, gone)
    result = student(tmp_path / "run", gone, keep_resume=True)
    (result.folder / Run.SUMMARY).unlink()
    shutil.rmtree(gone)
    code, _, err = smallvit("train", "--resume", result.folder)
    assert code == 2
    assert "--teacher" in err
