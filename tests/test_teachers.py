"""Teachers: what they see, that nothing of them changes, when they are asked, and who cannot teach whom."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import InterpolationMode, normalize, resize

import smallvit as package
from smallvit import Config, checkpoint, engine, teachers, trained
from smallvit.engine import train_step
from smallvit.runs import Run
from smallvit.setup import prepare
from smallvit.teachers import Teacher

Command = Callable[..., tuple[int, str, str]]
TINY = {"epochs": 2, "batch_size": 64, "train_fraction": 0.2, "lr": 3e-3, "aug": "mix", "amp": "off"}


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small CNN on digits, to be a teacher."""
    folder = tmp_path_factory.mktemp("teachers") / "cnn"
    return engine.train(Config.build(arch="resnet20", out=str(folder), **TINY)).folder


def student(folder: Path, teacher: object, **options: object) -> engine.Result:
    return engine.train(Config.build(**{"arch": "vit", "out": str(folder), "teacher": str(teacher)} | TINY | options))


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
    return Teacher(forward=forward, **plain | {"dtype": torch.float32, "memory": None} | options)


@pytest.mark.parametrize("size", [8, 20, 5])
def test_the_teacher_sees_the_view_at_its_own_size_and_normalisation(size: int) -> None:
    pixels = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours, theirs = ([0.4, 0.5, 0.6], [0.2, 0.3, 0.1]), ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    (mean, std), (own_mean, own_std) = (
        [torch.tensor(values)[:, None, None] for values in each] for each in (ours, theirs)
    )
    teacher = teacher_of(nn.Identity(), img_size=size, gain=std / own_std, offset=(mean - own_mean) / own_std)
    expected = resize(pixels, [size, size], InterpolationMode.BICUBIC, antialias=size < 8)
    torch.testing.assert_close(teacher.view(normalize(pixels, *ours)), normalize(expected, *theirs))


def test_statistics_of_both_meet_in_what_the_teacher_sees(cnn: Path, tmp_path: Path) -> None:
    """A teacher that was trained on images normalised otherwise sees its own normalisation."""
    weights, metadata = checkpoint.load_weights(cnn / Run.BEST)
    metadata["data"] |= {"mean": [0.1], "std": [2.0]}
    checkpoint.save_weights(tmp_path / "other.safetensors", weights, metadata)
    config = Config.build(arch="vit", teacher=str(tmp_path / "other.safetensors"), **TINY)
    setup = prepare(config.replace(aug="none"))
    images, _ = next(setup.batches.epoch(0))
    mean, std = setup.dataset.statistics(setup.device)
    torch.testing.assert_close(setup.teacher.view(images), (images * std + mean - 0.1) / 2.0)


def test_a_training_step_changes_nothing_of_the_teacher(cnn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, load = [], trained.load
    monkeypatch.setattr(trained, "load", lambda card: found.append(load(card)) or found[-1])
    setup = prepare(Config.build(arch="vit", teacher=str(cnn), distill="soft", **TINY))
    (model,) = found
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


@pytest.mark.parametrize("distill", ["soft", "hard", "token"])
def test_each_kind_of_distillation_trains_and_the_model_is_rebuilt(cnn: Path, tmp_path: Path, distill: str) -> None:
    result = student(tmp_path / "run", cnn, distill=distill)
    losses = [json.loads(line)["train_loss"] for line in (result.folder / Run.METRICS).read_text().splitlines()]
    assert losses[1] < losses[0]
    model = package.load(result.folder)
    assert (getattr(model, "head_dist", None) is not None) == (distill == "token")
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    assert json.loads((result.folder / "config.json").read_text())["teacher"] == str(cnn)


def test_the_step_minimises_the_stated_loss(cnn: Path) -> None:
    """The loss that a step reports equals the equation, with logits of models called by hand."""
    options = {"distill": "soft", "drop_path": 0.0, "smoothing": 0.0, "distill_weight": 0.4, "distill_temperature": 2.0}
    setup = prepare(Config.build(arch="vit", teacher=str(cnn), **TINY | options))
    images, targets = next(setup.batches.epoch(0))
    with torch.no_grad():
        ours, theirs = setup.model(images), package.load(cnn)(images)
        labels = -(targets * ours.log_softmax(1)).sum(1).mean()
        p, q = (theirs / 2).softmax(1), (ours / 2).softmax(1)
        expected = 0.6 * labels + 0.4 * 4 * (p * (p / q).log()).sum(1).mean()
    assert train_step(setup, 0, 0, images, targets).item() == pytest.approx(expected.item(), rel=1e-4)


def turned(cnn: Path, file: Path) -> Path:
    """The teacher's weights, its last layer giving every class's logit to the next one."""
    weights, metadata = checkpoint.load_weights(cnn / Run.BEST)
    weights |= {name: weights[name].roll(1, 0).contiguous() for name in ("fc.weight", "fc.bias")}
    checkpoint.save_weights(file, weights, metadata)
    return file


def test_with_all_of_the_weight_a_teacher_that_is_wrong_is_believed(tmp_path: Path) -> None:
    """Labels do not count then: the student learns to be wrong in the teacher's way."""
    options = {"aug": "none", "train_fraction": 1.0, "lr": 3e-3, "epochs": 8}
    good = engine.train(Config.build(arch="resnet20", out=str(tmp_path / "good"), **TINY | options))
    assert good.summary["test_top1"] > 80
    wrong = turned(good.folder, tmp_path / "wrong.safetensors")
    own = {"arch": "resnet20", "distill": "hard", "distill_weight": 1.0, "seed": 1}
    found = student(tmp_path / "run", wrong, **options | own)
    assert found.summary["test_top1"] < 10
    x = next(prepare(Config.build(arch="vit", **TINY | options)).batches.epoch(0))[0]
    agreement = (package.load(found.folder)(x).argmax(1) == package.load(wrong)(x).argmax(1)).float().mean()
    assert agreement > 0.6


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    ask = Teacher._ask

    def counted(self: Teacher, images: Tensor) -> Tensor:
        calls.append(len(images))
        return ask(self, images)

    monkeypatch.setattr(Teacher, "_ask", counted)
    return calls


def test_with_views_that_come_again_the_teacher_is_asked_once_for_each(
    cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch)
    student(tmp_path / "run", cnn, epochs=5, teacher_views=2, accumulate=2)
    steps = len(prepare(Config.build(arch="vit", **TINY)).batches)
    assert len(calls) == 1 + 2 * steps * 2  # to see that it answers; epochs drawn, steps, parts


def test_views_that_come_again_are_the_same_and_their_answers_right(cnn: Path) -> None:
    setup = prepare(Config.build(arch="vit", teacher=str(cnn), teacher_views=2, **TINY))
    assert [setup.views(epoch) for epoch in range(5)] == [0, 1, 0, 1, 0]
    first, again = (next(setup.batches.epoch(setup.views(epoch)))[0] for epoch in (1, 3))
    torch.testing.assert_close(first, again)
    assert not torch.equal(first, next(setup.batches.epoch(0))[0])
    answers = [setup.teacher(first, (1, 0, 1)), setup.teacher(torch.zeros_like(first), (1, 0, 1))]
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=0)  # the second time, nobody looks
    torch.testing.assert_close(answers[0], package.load(cnn)(first).detach(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("views", [0, 2])
def test_resuming_a_student_gives_the_same_bytes(
    cnn: Path, tmp_path: Path, interrupted: Callable[[int], AbstractContextManager[None]], views: int
) -> None:
    """Answers that were remembered are asked for again, and are the same."""
    options = {"epochs": 4, "teacher_views": views, "distill": "soft"}
    whole = student(tmp_path / "whole", cnn, **options)
    with interrupted(13):
        student(tmp_path / "broken", cnn, **options)
    resumed = engine.train(Config.build(resume=str(tmp_path / "broken")))
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
        prepare(Config.build(arch="vit", teacher=str(each), **TINY)) for each in (tmp_path / "turned.safetensors", cnn)
    )
    images, _ = next(setup.batches.epoch(0))
    torch.testing.assert_close(setup.teacher(images), plain.teacher(images))


def test_bfloat16_and_compiled_teachers_answer_alike(cnn: Path) -> None:
    config = Config.build(arch="vit", teacher=str(cnn), **TINY)
    plain = prepare(config)
    images, _ = next(plain.batches.epoch(0))
    answers = plain.teacher(images)
    compiled = prepare(config.replace(compile="on")).teacher(images)
    torch.testing.assert_close(compiled, answers, rtol=1e-3, atol=1e-3)
    half = prepare(config.replace(amp="bf16")).teacher
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half(images), answers, rtol=0.1, atol=0.1)


def test_relative_names_are_understood_from_elsewhere(
    cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smallvit: Command
) -> None:
    shutil.copytree(cnn, tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    result = student(tmp_path / "run", "teacher", init="teacher", arch=None)
    (result.folder / Run.SUMMARY).unlink()
    monkeypatch.chdir("/")
    assert smallvit("train", "--resume", result.folder)[0] == 0


def test_a_teacher_that_has_changed_is_noticed(cnn: Path, tmp_path: Path, smallvit: Command) -> None:
    shutil.copytree(cnn, tmp_path / "teacher")
    result = student(tmp_path / "run", tmp_path / "teacher")
    (result.folder / Run.SUMMARY).unlink()
    turned(cnn, tmp_path / "teacher" / Run.BEST)
    code, _, err = smallvit("train", "--resume", result.folder)
    assert (code, err.count("\n")) == (2, 1)
    assert "not the one it began with" in err


@pytest.mark.parametrize("option", ["--teacher", "--init"])
def test_a_run_does_not_replace_what_it_needs(cnn: Path, tmp_path: Path, smallvit: Command, option: str) -> None:
    shutil.copytree(cnn, tmp_path / "teacher")
    before = (tmp_path / "teacher" / Run.BEST).read_bytes()
    code, _, err = smallvit("train", option, tmp_path / "teacher", "--out", tmp_path / "teacher", "--overwrite")
    assert (code, err.count("\n")) == (2, 1)
    assert "choose another --out" in err
    assert (tmp_path / "teacher" / Run.BEST).read_bytes() == before


@pytest.mark.parametrize("name", ["fc.weight", "fc.bias"])
def test_a_teacher_without_finite_answers_is_refused(cnn: Path, tmp_path: Path, smallvit: Command, name: str) -> None:
    weights, metadata = checkpoint.load_weights(cnn / Run.BEST)
    weights[name].fill_(float("nan"))
    checkpoint.save_weights(tmp_path / "bad.safetensors", weights, metadata)
    code, _, err = smallvit("train", "--teacher", tmp_path / "bad.safetensors", "--out", tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "not finite" in err


@pytest.mark.parametrize("option", ["--teacher", "--init"])
def test_weights_that_may_have_learnt_the_test_are_refused(
    cnn: Path, tmp_path: Path, smallvit: Command, option: str
) -> None:
    """From the run's folder, and from a copy of its file."""
    shutil.copy(cnn / Run.BEST, tmp_path / "copy.safetensors")
    for name in (cnn, tmp_path / "copy.safetensors"):
        code, _, err = smallvit("train", option, name, "--split-seed", 1, "--out", tmp_path / "run")
        assert (code, err.count("\n")) == (2, 1)
        assert "--split-seed 0" in err


def test_data_that_bring_their_own_test_may_be_split_anew(tmp_path: Path, image_folder: Path) -> None:
    for split in ("train", "test"):
        shutil.copytree(image_folder, tmp_path / "data" / split)
    common = {"data": str(tmp_path / "data"), "epochs": 1, "train_fraction": 1.0}
    first = engine.train(Config.build(arch="resnet20", out=str(tmp_path / "a"), **TINY | common)).folder
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
    "no teacher": (lambda cnn, tmp: ["--distill", "soft"], "--teacher"),
    "a temperature for hard": (lambda cnn, tmp: ["--teacher", cnn, "--distill-temperature", "3"], "--distill soft"),
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
    grey = tmp_path / "grey"
    shutil.copytree(image_folder, grey)
    code, _, err = smallvit("train", "--data", grey, "--teacher", cnn, "--epochs", "1", "--out", tmp_path / "run")
    assert code == 2
    assert "takes images of 1 channels, those of grey have 3" in err
    other = engine.train(Config.build(arch="resnet20", out=str(tmp_path / "three"), data=str(grey), epochs=1)).folder
    (grey / "light").rename(grey / "bright")
    code, _, err = smallvit("train", "--data", grey, "--teacher", other, "--epochs", "1", "--out", tmp_path / "run")
    assert code == 2
    assert "knows 'light' and does not know 'bright'" in err
    assert teachers._difference("abcde", "ax") == "knows 'b', 'c', 'd' and 1 more and does not know 'x'"


def test_a_deleted_teacher_is_missed_before_a_run_goes_on(cnn: Path, tmp_path: Path, smallvit: Command) -> None:
    gone = tmp_path / "teacher"
    shutil.copytree(cnn, gone)
    result = student(tmp_path / "run", gone)
    (result.folder / Run.SUMMARY).unlink()
    shutil.rmtree(gone)
    code, _, err = smallvit("train", "--resume", result.folder)
    assert code == 2
    assert "--teacher" in err
