"""Test pretraining without labels: through the loop of training, resumed, shared by processes, and fine-tuned."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from PIL import Image

import smallvit as package
from smallvit import Config, InputError
from smallvit.datasets import create_dataset, create_pool, factory
from smallvit.datasets.dataset import NO_LABEL
from smallvit.datasets.streaming import Decoder, Job
from smallvit.evaluation.features import effective_rank
from smallvit.models import checkpoint
from smallvit.models.factory import create_model
from smallvit.runs.curves import read_run
from smallvit.runs.run import Run
from smallvit.training import train
from smallvit.training.setup import Setup, create_setup

TINY = {"arch": "vit96", "epochs": 1, "batch_size": 32, "train_fraction": 0.1, "patch_size": 4, "amp": "off"}
OBJECTIVES = ("lejepa", "dino")
Command = Callable[..., tuple[int, str, str]]


def setup_of(out: Path, **options: object) -> Setup:
    return create_setup(Config.build(**TINY | options, out=str(out)))


def step(setup: Setup, number: int = 0) -> torch.Tensor:
    images, targets = list(setup.batches.epoch(0))[number]
    return train.train_step(setup, 0, number, images, targets)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_trains_model_and_head_whatever_the_labels_are(objective: str, tmp_path: Path) -> None:
    states = []
    for shift in (0, 3):
        setup = setup_of(tmp_path, objective=objective)
        before = copy.deepcopy(setup.trained.state_dict())
        for number in range(2):  # the first step has a learning rate near 0
            images, targets = list(setup.batches.epoch(0))[number]
            assert train.train_step(setup, 0, number, images, (targets + shift) % 10).isfinite()
        states.append(setup.trained.state_dict())
        for part in ("model.blocks.0.attn.qkv.weight", "projections."):
            assert any(not torch.equal(before[name], value) for name, value in states[-1].items() if part in name)
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_dinos_teacher_and_center_follow_the_student(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, objective="dino")
    teacher = setup.trained.teacher
    student = setup.model.blocks[0].mlp.fc1.weight
    before = teacher.model.model.blocks[0].mlp.fc1.weight.clone()
    assert torch.equal(before, student)
    step(setup)
    assert not torch.equal(before, student)
    share = 1 / setup.steps
    momentum = 1 - 0.004 * (np.cos(np.pi * share) + 1) / 2
    expected = momentum * before + (1 - momentum) * student
    torch.testing.assert_close(teacher.model.model.blocks[0].mlp.fc1.weight, expected)
    assert teacher.center.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weights_files_hold_the_model_alone_and_a_resumed_run_gives_the_same_bytes(
    objective: str, tmp_path: Path, interrupted: Callable[[int], AbstractContextManager[None]]
) -> None:
    options = TINY | {"objective": objective, "epochs": 2, "ema_decay": 0.9, "grad_accum_steps": 2}
    whole = train.train(Config.build(out=str(tmp_path / "whole"), **options))
    weights, _ = checkpoint.load_weights(whole.folder / Run.LAST)
    plain = create_model("vit96", img_size=8, in_chans=1, num_classes=0, patch_size=4)
    assert weights.keys() == plain.state_dict().keys()
    with interrupted(5):
        train.train(Config.build(out=str(tmp_path / "broken"), **options))
    resumed = train.train(Config.build(resume=str(tmp_path / "broken")))
    assert (resumed.folder / Run.LAST).read_bytes() == (whole.folder / Run.LAST).read_bytes()
    assert (resumed.folder / Run.BEST).read_bytes() == (whole.folder / Run.BEST).read_bytes()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pretrain for an epoch on the digits."""
    return train.train(Config.build(**TINY, objective="lejepa", out=str(tmp_path_factory.mktemp("pretrained")))).folder


def test_runs_record_neighbors_and_rank(pretrained: Path) -> None:
    summary = json.loads((pretrained / Run.SUMMARY).read_text())
    assert 0 <= summary["test_knn_top1"] <= 100
    assert 1 <= summary["rank"] <= 96
    assert summary["views"] == 4
    (line,) = read_run(pretrained).history
    assert line["val_knn_top1"] is not None
    assert line["rank"] > 1


def test_training_starts_from_the_features(pretrained: Path, tmp_path: Path) -> None:
    setup = setup_of(tmp_path, init=str(pretrained))
    weights, _ = checkpoint.load_weights(pretrained / Run.BEST)
    state = setup.model.state_dict()
    assert {*state} - {*weights} == {"head.weight", "head.bias"}
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    assert "new heads for 10 classes" in setup.initial.notes[0]


def test_verbs_that_need_a_classifier_say_so(pretrained: Path, smallvit: Command) -> None:
    for verb in ("eval", "predict"):
        code, _, err = smallvit(verb, pretrained, *(["x.png"] if verb == "predict" else []))
        assert code == 2
        assert "these weights have no classifier; smallvit probe evaluates their features" in err
    assert package.load_model(pretrained)(torch.zeros(1, 1, 8, 8)).shape == (1, 96)


def write_images(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for index in range(count):
        Image.fromarray(rng.integers(0, 256, (16 + index % 3, 20, 3), dtype=np.uint8)).save(folder / f"{index}.png")


def test_loose_and_nested_images_need_no_labels(tmp_path: Path, smallvit: Command) -> None:
    folder = tmp_path / "photos"
    write_images(folder, 10)
    write_images(folder / "more" / "of them", 3)
    (folder / "broken.jpg").write_text("no image")
    options = ("--arch", "vit96", "--img-size", "16", "--epochs", "1", "--batch-size", "8", "--device", "cpu")
    command = ("pretrain", "--data", folder, *options, "--out", tmp_path / "run")
    code, _, err = smallvit(*command)
    assert code == 2
    assert "broken.jpg" in err
    code, out, _ = smallvit(*command, "--skip-corrupt")
    assert code == 0
    assert "13 train, 0 val, 0 test" in out
    summary = json.loads((tmp_path / "run" / Run.SUMMARY).read_text())
    assert summary["test_knn_top1"] is None
    assert summary["rank"] > 0
    assert "smallvit train --init" in out


def test_bad_input_is_refused_in_one_line(tmp_path: Path, smallvit: Command) -> None:
    for arguments, message in (
        (("--objective", "supervised"), "--objective supervised: needs labels; use smallvit train"),
        (("--class-weights", "balanced"), "--class-weights cannot be combined with --objective lejepa"),
        (("--arch", "swin", "--img-size", "32", "--local-size", "16"), "swin takes images of 32 pixels only"),
        (("--arch", "vit96", "--local-size", "5"), "--local-size 5: expected a multiple of the patch size 2"),
        (("--local-views", "0", "--global-views", "1"), "expected at least 2 views"),
        (("--data", tmp_path), "holds no images"),
    ):
        code, _, err = smallvit("pretrain", *arguments, "--out", tmp_path / "run", "--device", "cpu")
        assert code == 2, arguments
        assert message in err, err


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """Write two class folders, loose images, a zip file of loose images, and a table without labels."""
    for name, count in (("labeled/cat", 10), ("labeled/dog", 10), ("loose", 12), ("packed", 5), ("listed", 4)):
        write_images(tmp_path / name, count)
    with ZipFile(tmp_path / "packed.zip", "w") as archive:
        for file in (tmp_path / "packed").iterdir():
            archive.write(file, file.name)
    table = tmp_path / "table.csv"
    table.write_text("path\n" + "".join(f"listed/{number}.png\n" for number in range(4)))
    return {name: tmp_path / name for name in ("labeled", "loose", "packed.zip", "table.csv")}


def test_training_images_of_several_sources_are_pooled(sources: dict[str, Path]) -> None:
    labeled, *others = map(str, sources.values())
    datasets = {}
    for streaming in ("off", "on"):
        config = Config.build(data=[labeled, *others], objective="lejepa", img_size=16, streaming=streaming)
        assert config.pretrain.more_data == tuple(others)
        dataset = datasets[streaming] = create_pool(config.data, config.pretrain.more_data)
        first = create_dataset(config.data)
        assert len(dataset.train) == len(first.train) + 12 + 5 + 4
        assert (dataset.train.labels == NO_LABEL).sum() == 21
        assert dataset.class_counts.tolist() == first.class_counts.tolist()
        assert (dataset.class_names, dataset.mean) == (first.class_names, first.mean)
        assert dataset.val.content() == first.val.content()
    assert not datasets["off"].train.on_disk
    assert datasets["on"].train.on_disk
    decoded = np.stack([datasets["on"].train.decode(index) for index in range(len(datasets["on"].train))])
    assert np.array_equal(decoded, datasets["off"].train.pixels.numpy())
    names = [Path(path).parts[-2] for path in datasets["on"].train.listing.paths[-21:]]
    assert names == ["loose"] * 12 + ["packed.zip"] * 5 + ["listed"] * 4


def test_arrays_are_pooled_with_streamed_files(sources: dict[str, Path]) -> None:
    config = Config.build(data="digits", img_size=8, streaming="on")
    digits = create_dataset(Config.build(data="digits", img_size=8).data)
    dataset = create_pool(config.data, [str(sources["loose"])])
    assert dataset.train.on_disk
    assert not dataset.flip
    assert len(dataset.train) == len(digits.train) + 12
    decoded = Decoder({"train": dataset.train})[Job("train", np.arange(len(dataset.train)))]
    assert decoded.pixels.shape == (len(dataset.train), 1, 8, 8)
    assert torch.equal(decoded.pixels[:-12], digits.train.pixels)
    assert decoded.labels == dataset.train.labels.tolist() == [*digits.train.labels.tolist(), *[NO_LABEL] * 12]


def test_data_sets_that_are_large_together_are_streamed(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.build(data=str(sources["labeled"]), img_size=16)
    monkeypatch.setattr(factory, "MAX_IN_MEMORY", 20 * 3 * 16 * 16)
    assert not create_pool(config.data).train.on_disk
    assert create_pool(config.data, [str(sources["loose"])]).train.on_disk


def test_a_pooled_run_is_resumed_on_the_same_images_only(
    sources: dict[str, Path],
    tmp_path: Path,
    smallvit: Command,
    interrupted: Callable[[int], AbstractContextManager[None]],
) -> None:
    data = [str(path) for path in sources.values()]
    options = TINY | {"train_fraction": 1.0, "objective": "lejepa", "img_size": 8, "batch_size": 12, "epochs": 2}
    whole = train.train(Config.build(out=str(tmp_path / "whole"), data=data, **options))
    with interrupted(3):
        train.train(Config.build(out=str(tmp_path / "broken"), data=data, **options))
    moved = shutil.copytree(sources["loose"], tmp_path / "moved")
    shutil.rmtree(sources["loose"])
    code, _, err = smallvit("pretrain", "--resume", tmp_path / "broken")
    assert code == 2
    assert "loose no longer exists; if it has moved, give its path by all --data again" in err
    again = [*("--data", data[0]), *("--data", moved), *("--data", data[2])]
    code, _, err = smallvit("pretrain", "--resume", tmp_path / "broken", *again)
    assert code == 2
    assert "not the images that the run was started with" in err
    code, out, err = smallvit("pretrain", "--resume", tmp_path / "broken", *again, "--data", data[3])
    assert code == 0, err
    assert (tmp_path / "broken" / Run.LAST).read_bytes() == (whole.folder / Run.LAST).read_bytes()
    assert "2 classes, 35 train, 2 val, 4 test" in out
    assert "moved: 12 more images to train on, without labels" in out
    assert whole.summary["test_knn_top1"] is not None
    stored = json.loads((whole.folder / Run.CONFIG).read_text())
    assert [stored["data"], *stored["more_data"]] == data


def test_a_second_data_set_is_refused_outside_pretraining(tmp_path: Path, trained_run: Path, smallvit: Command) -> None:
    for command, message in (
        (("train",), "--data mnist: training with labels takes one data set, and --data digits is given"),
        (("eval", trained_run), "--data mnist: smallvit eval takes one data set, and --data digits is given"),
    ):
        code, _, err = smallvit(*command, "--data", "digits", "--data", "mnist")
        assert code == 2
        assert message in err


def test_albums_and_loose_images_next_to_them_are_no_classes(tmp_path: Path) -> None:
    for name, count in (("albums/one", 5), ("albums/two", 2), ("mixed/one", 4), ("mixed/two", 4)):
        write_images(tmp_path / name, count)
    for number in range(9):
        shutil.copy(tmp_path / "albums/one/0.png", tmp_path / "mixed" / f"{number}.png")
    for name, count, note in (("albums", 7, "two/ has fewer than 3 images"), ("mixed", 17, "most images")):
        dataset = create_pool(Config.build(data=str(tmp_path / name), img_size=8).data)
        assert len(dataset.train) == count
        assert note in dataset.notes[0]


@pytest.mark.parametrize(("options", "flip"), [({}, 0), ({"flip": 0.3}, 0.3)])
def test_views_are_mirrored_as_the_option_says(options: dict, flip: float, tmp_path: Path) -> None:
    kinds = setup_of(tmp_path, objective="lejepa", **options).batches.augment.kinds
    assert [augment.flip for augment, _ in kinds] == [flip, flip]


@pytest.mark.slow
def test_all_families_pretrain(tmp_path: Path) -> None:
    failed = []
    for arch in ("vit96+stem+lsa+ffn", "deit_tiny_patch16_224", "cait", "pit+spt", "swin+spt+lsa", "t2t", "resnet20"):
        setup = setup_of(tmp_path, arch=arch, patch_size=None, objective="lejepa", train_fraction=0.05, batch_size=16)
        if not step(setup).isfinite():
            failed.append(arch)
    assert not failed


def test_effective_rank_counts_dimensions() -> None:
    rng = np.random.default_rng(0)
    line = np.outer(rng.normal(size=50), rng.normal(size=8))
    assert effective_rank(line) == pytest.approx(1)
    assert effective_rank(np.ones((50, 8))) == 0
    orthogonal = np.linalg.qr(rng.normal(size=(50, 5)) - 0)[0]
    centered = np.linalg.qr(orthogonal - orthogonal.mean(axis=0))[0]
    assert effective_rank(centered @ np.eye(5, 8) + 3) == pytest.approx(5)


def test_supervised_options_are_refused_by_the_python_interface(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--teacher cannot be combined with --objective lejepa"):
        setup_of(tmp_path, objective="lejepa", teacher="runs/none")
