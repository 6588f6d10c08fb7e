"""Judging trained models from the command line: figures, files, other data, other models."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import smallvit as package
from smallvit import checkpoint, datasets, files, trained
from smallvit.cli import eval as verb
from smallvit.cli import main
from smallvit.config import Config
from smallvit.datasets.corruptions import corrupt
from smallvit.judgement import evidence, judging, pictures
from smallvit.judgement.case import Case
from smallvit.judgement.metrics import Answers
from smallvit.learnt import learnt_data
from smallvit.options import DataConfig

Command = Callable[..., tuple[int, str, str]]
Judge = Callable[..., dict]
KEYS = {
    *("name", "data", "split", "images", "top1", "top5", "loss", "interval", "ece", "classes", "confusion"),
    *("reliability", "flip", "robustness", "comparison", "weights_sha256", "img_size", "precision", "hardware"),
    *("versions", "git_revision", "command", "interval_method", "macro", "left_out"),
}
PLACE = ["--amp", "off", "--device", "cpu"]
SHARES = {"split_seed": 3, "test_fraction": 0.1, "train_fraction": 0.5}
"""How the digits are split for the runs."""
LEVELS = {"dark": 40, "grey": 128, "light": 220, "white": 250}


def train(folder: Path, *options: object) -> Path:
    quick = ["--epochs", 4, "--batch-size", 32, "--aug", "none", *PLACE, "--out", folder]
    quick += [word for name, value in SHARES.items() for word in ("--" + name.replace("_", "-"), value)]
    assert main(["train", *map(str, [*quick, *options])]) == 0
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few epochs on the digits, with a split of its own."""
    return train(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A worse one, of larger images."""
    return train(tmp_path_factory.mktemp("runs") / "other", "--img-size", 12, "--epochs", 2, "--seed", 1)


@pytest.fixture
def judge(smallvit: Command, tmp_path: Path) -> Judge:
    """Judge on a CPU in fp32; returns what metrics.json says."""

    def judged(*arguments: object, out: Path = tmp_path / "judged") -> dict:
        code, _, err = smallvit("eval", *arguments, *PLACE, "--out", out, "--overwrite")
        assert code == 0, err
        return json.loads((out / "metrics.json").read_text())

    return judged


@pytest.fixture
def levels(tmp_path: Path) -> Path:
    """Weights that tell images by their brightness: dark, grey, light."""
    return bright(tmp_path / "levels.safetensors", ("dark", "grey", "light"))


def bright(path: Path, class_names: tuple[str, ...], size: int = 16, **data: object) -> Path:
    """Weights of a CNN that is as it came, but for a head fitted to images of noise around the classes' grey levels.

    `data` is what else they say of the data that they learnt.
    """
    torch.manual_seed(0)
    spec = {"arch": "resnet20", "img_size": size, "in_chans": 3, "num_classes": len(class_names)}
    model, number = package.create_model(**spec).eval(), torch.arange(len(class_names)).repeat_interleave(50)
    means = torch.tensor([LEVELS[name] for name in class_names])[number]
    images = (means[:, None, None, None] + 20 * torch.randn(len(number), 3, size, size)).clamp(0, 255) / 255
    with torch.no_grad():
        features = model.forward_head(model.forward_features((images - 0.5) / 0.25), pre_logits=True)
        known = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
        fitted = torch.linalg.pinv(known) @ torch.eye(len(class_names), dtype=torch.float64)[number]
        model.get_classifier().weight.copy_(20 * fitted[:-1].T)
        model.get_classifier().bias.copy_(20 * fitted[-1])
    data |= {"name": "levels", "class_names": class_names, "mean": [0.5] * 3, "std": [0.25] * 3}
    checkpoint.save_weights(path, checkpoint.snapshot(model), {"model": spec, "data": data})
    return path


def learnt(path: Path, folder: Path, **options: object) -> Path:
    """Such weights, which say that they learnt from the images of a folder."""
    config = DataConfig(data=str(folder), **options)
    dataset = datasets.load(config)
    drawn = {split: trained.held_out(dataset, config, split) for split in ("test", "val")}
    return bright(path, dataset.class_names, learnt=trained.identity(dataset), **drawn)


def rows(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


def changed(run: Path, path: Path, change: Callable[[dict, dict], None]) -> Path:
    """A run's weights file, with something else in it."""
    weights, metadata = checkpoint.load_weights(run / "best.safetensors")
    change(weights, metadata)
    checkpoint.save_weights(path, weights, metadata)
    return path


def by_hand(run: Path, split: str = "test") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels and grey levels of a split, by the model as it is loaded."""
    dataset = datasets.load(DataConfig(**SHARES))
    part = getattr(dataset, split)
    return logits_of(run, part.pixels), part.labels, part.pixels


def logits_of(run: Path, pixels: torch.Tensor) -> torch.Tensor:
    dataset = datasets.load(DataConfig(**SHARES))
    mean, std = (torch.tensor(values)[:, None, None] for values in (dataset.mean, dataset.std))
    with torch.no_grad():
        return package.load(run)((pixels / 255 - mean) / std)


def test_the_runs_own_test_is_judged_as_training_did(run: Path, judge: Judge) -> None:
    found, summary = judge(run), json.loads((run / "summary.json").read_text())
    assert set(found) == KEYS
    assert (found["top1"], found["images"]) == (summary["test_top1"], summary["test_images"])
    assert found["loss"] == pytest.approx(summary["test_loss"], rel=1e-5)
    assert (found["data"], found["split"], found["img_size"], found["left_out"]) == ("digits", "test", 8, 0)
    assert found["interval"][0] < found["top1"] < found["interval"][1]
    weights = (run / "best.safetensors").read_bytes()
    assert found["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert found["command"].startswith(f"smallvit eval {run} --amp off")


def test_the_files_agree_with_the_record_and_with_each_other(run: Path, judge: Judge, tmp_path: Path) -> None:
    found, folder = judge(run), tmp_path / "judged"
    assert {file.name for file in folder.iterdir()} == set(evidence.FILES)
    logits, labels, _ = by_hand(run)
    header, *predictions = rows(folder / "predictions.csv")
    assert header == ["index", "label", "predicted", "probability"]
    assert [int(row[0]) for row in predictions] == list(range(found["images"]))
    assert [int(row[1]) for row in predictions] == labels.tolist()
    assert [int(row[2]) for row in predictions] == logits.argmax(1).tolist()
    probabilities = torch.tensor([float(row[3]) for row in predictions])
    torch.testing.assert_close(probabilities, logits.softmax(1).amax(1), rtol=1e-4, atol=1e-5)
    header, *confusion = rows(folder / "confusion.csv")
    assert header == ["true", *"0123456789"]
    counts = np.array([row[1:] for row in confusion], dtype=int)
    assert counts.tolist() == found["confusion"]
    assert counts.sum() == found["images"]
    header, *classes = rows(folder / "classes.csv")
    assert header == ["name", "precision", "recall", "f1", "images"]
    assert [int(row[-1]) for row in classes] == counts.sum(axis=1).tolist()
    assert 100 * np.trace(counts) / counts.sum() == pytest.approx(found["top1"])


def test_the_pictures_are_pictures(run: Path, judge: Judge, tmp_path: Path) -> None:
    found = judge(run)
    sizes = {name: Image.open(tmp_path / "judged" / name).size for name in evidence.FILES if name.endswith(".png")}
    assert min(sizes["confusion.png"]) > 400
    assert min(sizes["reliability.png"]) > 400
    wrong = found["images"] - sum(found["confusion"][k][k] for k in range(10))
    assert wrong > 8
    cell = 128 + 6
    assert sizes["mistakes.png"] == (8 * cell + 6, -(-min(wrong, 40) // 8) * (cell + 28) + 6 + 14 + 6)


def test_the_sheet_shows_the_surest_mistakes_first(run: Path, judge: Judge, tmp_path: Path) -> None:
    judge(run)
    logits, labels, pixels = by_hand(run)
    surest, predicted = logits.softmax(1).max(1)
    first = int((surest * (predicted != labels)).argmax())
    page = np.asarray(Image.open(tmp_path / "judged" / "mistakes.png"))
    expected = pixels[first, 0].numpy().repeat(16, axis=0).repeat(16, axis=1)
    assert np.array_equal(page[26 : 26 + 128, 6 : 6 + 128, 0], expected)


@pytest.mark.parametrize("classes", [2, 20, 45, 200])
def test_a_confusion_matrix_of_any_size_is_drawn(classes: int, tmp_path: Path) -> None:
    names = [f"class {number} of $many, with a name that is long" for number in range(classes)]
    pictures.plot_confusion(np.eye(classes, dtype=int) * 9, names, tmp_path / "c.png", "a $title " * 20)
    width, height = Image.open(tmp_path / "c.png").size
    assert 600 < height < width < 1700


def test_results_lie_in_the_run_and_are_replaced_only_if_asked(run: Path, smallvit: Command, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    code, out, _ = smallvit("eval", copy, *PLACE)
    folder = copy / "eval" / "test"
    assert code == 0
    assert str(folder / "metrics.json") in out
    before = (folder / "metrics.json").read_bytes()
    code, out, err = smallvit("eval", copy, *PLACE, "--flip")
    assert (code, out) == (2, "")
    assert (
        err == f"smallvit: {folder}: holds results already; choose another folder by --out, or replace by --overwrite\n"
    )
    assert (folder / "metrics.json").read_bytes() == before
    (folder / "mine.txt").write_text("kept")
    assert smallvit("eval", copy, *PLACE, "--flip", "--overwrite")[0] == 0
    assert json.loads((folder / "metrics.json").read_text())["flip"] is True
    assert (folder / "mine.txt").read_text() == "kept"


def test_an_interruption_leaves_what_was_there(
    run: Path, judge: Judge, smallvit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge(run)
    before = {file.name: file.read_bytes() for file in (tmp_path / "judged").iterdir()}

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pictures, "plot_reliability", interrupt)
    assert smallvit("eval", run, *PLACE, "--out", tmp_path / "judged", "--overwrite")[0] == 130
    assert {file.name: file.read_bytes() for file in (tmp_path / "judged").iterdir()} == before
    assert smallvit("eval", run, *PLACE, "--out", tmp_path / "new" / "folder")[0] == 130
    assert not (tmp_path / "new").exists()


def test_mirror_images_are_averaged(run: Path, judge: Judge) -> None:
    logits, labels, pixels = by_hand(run)
    mean = (logits.softmax(1) + logits_of(run, pixels.flip(-1)).softmax(1)) / 2
    found = judge(run, "--flip")
    assert found["top1"] == pytest.approx(100 * float((mean.argmax(1) == labels).double().mean()))
    assert found["loss"] == pytest.approx(float(-mean.log()[torch.arange(len(labels)), labels].mean()), rel=1e-4)


def test_robustness_is_the_accuracy_on_spoilt_images(run: Path, judge: Judge) -> None:
    found = judge(run, "--robustness")
    assert list(found["robustness"]) == ["noise", "blur", "contrast", "jpeg"]
    assert found["robustness"] == judge(run, "--robustness")["robustness"]
    _, labels, pixels = by_hand(run)
    for kind, strength in (("noise", 3), ("jpeg", 1)):
        spoilt = corrupt(pixels, kind, strength, torch.arange(len(pixels)))
        expected = 100 * float((logits_of(run, spoilt).argmax(1) == labels).double().mean())
        assert found["robustness"][kind][str(strength)] == pytest.approx(expected, abs=0.3)  # a near tie
    assert found["robustness"]["noise"]["3"] < found["top1"]


@pytest.mark.parametrize(("split", "said"), [("val", "chosen by these images"), ("train", "has learnt from")])
def test_other_splits_are_judged_and_what_that_is_worth_is_said(
    run: Path, smallvit: Command, tmp_path: Path, split: str, said: str
) -> None:
    code, out, err = smallvit("eval", run, "--split", split, *PLACE, "--out", tmp_path / split)
    assert code == 0
    assert said in err
    logits, labels, _ = by_hand(run, split)
    found = json.loads((tmp_path / split / "metrics.json").read_text())
    assert found["top1"] == pytest.approx(100 * float((logits.argmax(1) == labels).double().mean()))


def test_all_images_are_train_val_and_test(run: Path, judge: Judge, tmp_path: Path) -> None:
    found = judge(run, "--split", "all")
    predictions = rows(tmp_path / "judged" / "predictions.csv")[1:]
    labels = torch.cat([by_hand(run, split)[1] for split in ("train", "val", "test")])
    assert [int(row[1]) for row in predictions] == labels.tolist()
    assert found["images"] == len(labels) > 800


def test_a_model_does_not_differ_from_itself(run: Path, judge: Judge) -> None:
    found = judge(run, "--compare", run)["comparison"]
    assert (found["p"], found["difference"], found["only_one"], found["only_other"]) == (1, 0, 0, 0)


def test_another_model_sees_the_same_images_at_its_own_size(
    run: Path, other: Path, judge: Judge, smallvit: Command, tmp_path: Path
) -> None:
    found = judge(run, "--compare", other)
    compared, summary = found["comparison"], json.loads((other / "summary.json").read_text())
    assert compared["name"] == str(other)
    assert compared["other_top1"] == pytest.approx(summary["test_top1"])
    assert compared["top1"] == found["top1"]
    assert compared["images"] == found["images"]
    only = compared["only_one"] - compared["only_other"]
    assert compared["difference"] == pytest.approx(100 * only / found["images"])
    assert compared["difference"] == pytest.approx(found["top1"] - summary["test_top1"])
    _, out, _ = smallvit("eval", run, "--compare", other, *PLACE, "--out", tmp_path / "again")
    assert f"{run} {found['top1']:.2f} %, {other} {summary['test_top1']:.2f} %" in out
    assert "than chance would give (McNemar p" in out


def test_a_weights_file_of_a_run_brings_its_data_and_leaves_nothing(run: Path, smallvit: Command) -> None:
    before = sorted(run.rglob("*"))
    code, out, _ = smallvit("eval", run / "last.safetensors", *PLACE)
    assert code == 0
    assert "179 images at 8 pixels" in out
    assert "nothing is written without --out" in out
    assert sorted(run.rglob("*")) == before


def test_learnt_data_are_the_runs_options_but_for_the_image_size(run: Path, tmp_path: Path) -> None:
    found = learnt_data(str(run))
    assert (found["data"], found["split_seed"], found["test_fraction"]) == ("digits", 3, 0.1)
    assert "img_size" not in found
    assert learnt_data(str(tmp_path)) is None
    assert learnt_data("resnet18:pretrained") is None


def test_judge_is_called_from_python_too(run: Path, tmp_path: Path) -> None:
    config = Config.build(**learnt_data(str(run)), device="cpu", amp="off")
    found = judging.judge(str(run), config, out=str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == found


def test_other_data_is_judged_by_the_names_of_its_classes(
    levels: Path, image_folder: Path, judge: Judge, tmp_path: Path
) -> None:
    found = judge(levels, "--data", image_folder, "--split", "all")
    assert (found["top1"], found["images"]) == (100, 60)
    turned = bright(tmp_path / "turned.safetensors", ("light", "dark", "grey"))
    found = judge(turned, "--data", image_folder, "--split", "all")
    assert (found["top1"], found["images"]) == (100, 60)
    assert [each["name"] for each in found["classes"]] == ["light", "dark", "grey"]
    assert not (tmp_path / "judged" / "mistakes.png").exists()


def test_without_mistakes_there_is_no_sheet_and_a_line_says_so(
    levels: Path, image_folder: Path, smallvit: Command, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mistakes.png").write_bytes(b"former ones")
    arguments = ["--data", image_folder, *PLACE, "--out", tmp_path / "out", "--overwrite"]
    code, out, err = smallvit("eval", levels, *arguments)
    assert code == 0
    assert "no mistakes, hence no mistakes.png" in out
    assert "top-1 100.00 % (95 % interval, exact 73.54 to 100.00)" in out  # 1 - 0.025 ** (1 / 12)
    assert "--split all judges all of it" in err
    assert not (tmp_path / "out" / "mistakes.png").exists()


def test_of_some_of_the_classes_the_others_are_left_out(
    levels: Path, image_folder: Path, smallvit: Command, tmp_path: Path
) -> None:
    shutil.rmtree(image_folder / "grey")
    code, out, err = smallvit("eval", levels, "--data", image_folder, *PLACE, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert code == 0
    assert "2 of the model's 3 classes are in images; the others are not judged" in err
    assert [each["images"] for each in found["classes"]] == [4, 0, 4]
    assert found["classes"][1]["f1"] is None
    assert found["macro"]["f1"] == 100
    assert "grey" not in out


@pytest.mark.parametrize("streaming", ["off", "on"])
def test_predictions_name_the_files_and_damaged_ones_are_left_out(
    levels: Path, image_folder: Path, judge: Judge, tmp_path: Path, streaming: str
) -> None:
    (image_folder / "dark" / "007.png").write_bytes(b"no image")
    (image_folder / "light" / "011.png").write_bytes(b"none either")
    options = ["--skip-corrupt", "--streaming", streaming, "--workers", 0, "--split-seed", 5]
    found = judge(levels, "--data", image_folder, "--split", "all", *options)
    assert found["images"] == 58
    assert found["left_out"] == (2 if streaming == "on" else 0)  # in memory, they are never among the images
    header, *predictions = rows(tmp_path / "judged" / "predictions.csv")
    assert header[-1] == "path"
    files = {str(file.relative_to(image_folder)) for file in image_folder.rglob("*.png")}
    assert {row[-1] for row in predictions} == files - {"dark/007.png", "light/011.png"}
    assert all(row[-1].startswith(f"{row[1]}/") for row in predictions)


def test_the_files_of_a_drawn_test_are_those_whose_images_were_judged(
    levels: Path, image_folder: Path, judge: Judge, tmp_path: Path
) -> None:
    judge(levels, "--data", image_folder, "--split-seed", 5)
    dataset = datasets.load(DataConfig(data=str(image_folder), img_size=16, split_seed=5))
    for row, pixels in zip(rows(tmp_path / "judged" / "predictions.csv")[1:], dataset.test.pixels, strict=True):
        assert np.array_equal(np.asarray(Image.open(image_folder / row[-1])).transpose(2, 0, 1), pixels)


def test_another_programs_file_is_judged_where_its_classes_are_as_many(
    image_folder: Path, judge: Judge, smallvit: Command, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    path = tmp_path / "plain.safetensors"
    save_file(timm.create_model("test_vit", num_classes=3).state_dict(), path)
    arguments = ["--arch", "test_vit", "--data", image_folder, "--img-size", 32]
    found = judge(path, *arguments)
    assert [each["name"] for each in found["classes"]] == ["dark", "grey", "light"]
    shutil.rmtree(image_folder / "grey")
    code, _, err = smallvit("eval", path, *arguments)
    assert code == 2
    assert "it tells 3 classes apart and has no names for them, images has 2 classes" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/none"], "eval runs/none: no such file or folder"),
        ([], "the following arguments are required: RUN"),
        (["RUN", "--epochs", "3"], "unknown argument '--epochs'"),
        (["RUN", "--split", "tests"], "--split tests: expected one of train, val, test, all (did you mean 'test'?)"),
        (["RUN", "--split", "val", "--val-fraction", "0"], "--split val: digits has no such images"),
        (["RUN", "--split-seed", "1"], "give the same here (--split-seed 3)"),
        (["RUN", "--data", "FOLDER"], "takes images of 1 channels, those of images have 3"),
        (["RUN", "--img-size", "1"], "--img-size 1"),
        (["RUN", "--device", "cuda:77"], "--device cuda:77"),
        (["RUN", "--compare", "runs/none"], "--compare runs/none: no such file or folder"),
        (["RUN", "--out", "FILE"], "a file, not a folder"),
        (["LEVELS"], "nothing says which data is meant; give --data"),
        (["LEVELS", "--data", "ODD"], "does not know the classes 'gray', 'purple' of odd (did you mean 'grey'?)"),
        (
            ["LEVELS", "--data", "FOLDER", "--compare", "RUN"],
            "run: the model takes images of 1 channels, those of images",
        ),
        (["RUN", "--split", "val", "--val-fraction", "0.3"], "images of val may be among those that it learnt"),
        (
            ["LEVELS", "--data", "FOLDER", "--compare", "OTHERS"],
            "the models have other classes (only it knows 'white')",
        ),
    ],
)
def test_bad_input_gets_one_line(
    run: Path,
    levels: Path,
    image_folder: Path,
    smallvit: Command,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    shutil.copytree(image_folder, tmp_path / "odd")
    (tmp_path / "odd" / "grey").rename(tmp_path / "odd" / "gray")
    (tmp_path / "odd" / "light").rename(tmp_path / "odd" / "purple")
    (tmp_path / "file").touch()
    others = bright(tmp_path / "others.safetensors", tuple(LEVELS))
    places = {"RUN": run, "LEVELS": levels, "FOLDER": image_folder, "ODD": tmp_path / "odd", "FILE": tmp_path / "file"}
    places["OTHERS"] = others
    code, out, err = smallvit("eval", *[places.get(argument, argument) for argument in arguments])
    assert code == 2
    assert "top-1" not in out
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (run / "eval").exists()


def test_a_model_with_another_test_is_not_compared(run: Path, smallvit: Command, tmp_path: Path) -> None:
    def change(weights: dict, metadata: dict) -> None:
        metadata["data"]["test"]["split_seed"] = 4

    path = changed(run, tmp_path / "other.safetensors", change)
    code, _, err = smallvit("eval", run, "--compare", path)
    assert code == 2
    assert f"--compare {path}: it was trained with --split-seed 4" in err


def test_answers_that_are_not_finite_are_refused(run: Path, smallvit: Command, tmp_path: Path) -> None:
    def change(weights: dict, metadata: dict) -> None:
        name = next(name for name in weights if name.endswith("norm.weight"))
        weights[name] = torch.full_like(weights[name], torch.nan)

    path = changed(run, tmp_path / "broken.safetensors", change)
    code, out, err = smallvit("eval", path, "--data", "digits", "--split-seed", 3, "--test-fraction", 0.1, *PLACE)
    assert (code, out) == (2, "")
    assert f"eval {path}: its answers are not finite: these weights are of no use" in err


def test_a_run_says_which_images_it_left_out(run: Path) -> None:
    card, dataset = trained.card(str(run), "eval"), datasets.load(DataConfig(**SHARES))
    assert card.learnt == trained.identity(dataset)
    assert {name: card.test[name] for name in ("split_seed", "test_fraction")} == {
        "split_seed": 3,
        "test_fraction": 0.1,
    }
    assert {name: card.val[name] for name in ("split_seed", "val_fraction")} == {"split_seed": 3, "val_fraction": 0.1}


def test_a_test_drawn_from_images_that_have_changed_is_refused(
    image_folder: Path, write_images: Callable, smallvit: Command, tmp_path: Path
) -> None:
    weights = learnt(tmp_path / "best.safetensors", image_folder)
    arguments = [weights, "--data", image_folder, *PLACE]
    assert smallvit("eval", *arguments)[0] == 0
    for name in ("dark", "grey", "light"):
        shutil.copy(image_folder / name / "000.png", image_folder / name / "new.png")
    for split in ("test", "val"):
        code, _, err = smallvit("eval", *arguments, "--split", split)
        assert code == 2
        assert "the images of images are not those that it was trained with, so images of the test may be among" in err
    code, _, err = smallvit("eval", *arguments, "--split", "all")
    assert code == 0
    assert "has learnt from images of train" in err
    (image_folder / "train").mkdir()
    for name in ("dark", "grey", "light"):
        (image_folder / name).rename(image_folder / "train" / name)
        write_images(image_folder / "test" / name, 2, LEVELS[name])
    assert smallvit("eval", *arguments)[0] == 0  # a test of its own


@pytest.mark.parametrize("streaming", ["on", "off"])
def test_a_copy_of_what_was_learnt_is_recognised(
    image_folder: Path, smallvit: Command, tmp_path: Path, streaming: str
) -> None:
    weights = learnt(tmp_path / "best.safetensors", image_folder, split_seed=5)
    copy = shutil.copytree(image_folder, tmp_path / "elsewhere")
    arguments = [weights, "--data", copy, "--streaming", streaming, "--workers", 0, "--img-size", 20, *PLACE]
    code, _, err = smallvit("eval", *arguments)
    assert code == 2
    assert "give the same here (--split-seed 5)" in err
    code, _, err = smallvit("eval", *arguments, "--split-seed", 5, "--split", "train")
    assert code == 0
    assert f"{weights} has learnt from images of train" in err


@pytest.mark.parametrize(("fraction", "way"), [(0.3, "give the same here (--val-fraction 0.3)"), (0, "another split")])
def test_other_validation_images_than_the_models_are_refused(
    image_folder: Path, smallvit: Command, tmp_path: Path, fraction: float, way: str
) -> None:
    same = learnt(tmp_path / "best.safetensors", image_folder)
    weights = learnt(tmp_path / "other.safetensors", image_folder, val_fraction=fraction)
    arguments = ["--data", image_folder, "--split", "val", *PLACE]
    for first, *more in ([weights], [same, "--compare", weights]):
        code, _, err = smallvit("eval", first, *arguments, *more)
        assert code == 2
        assert f"{weights}: it was trained with --val-fraction {fraction}, so images of val may be" in err
        assert way in err
    code, _, err = smallvit("eval", same, *arguments)
    assert "were chosen by these images" in err
    shutil.copy(same, tmp_path / "last.safetensors")
    assert "chosen by" not in smallvit("eval", tmp_path / "last.safetensors", *arguments)[2]


def test_it_is_said_of_both_models_what_they_have_learnt(
    levels: Path, image_folder: Path, smallvit: Command, tmp_path: Path
) -> None:
    weights = learnt(tmp_path / "other.safetensors", image_folder)
    code, _, err = smallvit("eval", levels, "--data", image_folder, "--split", "all", "--compare", weights, *PLACE)
    assert code == 0
    assert f"{weights} has learnt from images of train" in err
    assert f"{levels} has learnt" not in err


def test_of_foreign_data_nothing_is_drawn_to_judge_all(
    levels: Path, image_folder: Path, smallvit: Command, judge: Judge
) -> None:
    for file in sorted((image_folder / "dark").iterdir())[1:]:
        file.unlink()
    assert judge(levels, "--data", image_folder, "--split", "all")["images"] == 41
    assert "split: " not in smallvit("eval", levels, "--data", image_folder, "--split", "all", *PLACE)[2]
    for name in ("grey", "light"):
        shutil.rmtree(image_folder / name)
    assert judge(levels, "--data", image_folder, "--split", "all")["images"] == 1


def test_two_models_are_shown_the_same_images_whether_they_fit_into_memory_or_not(
    levels: Path, image_folder: Path, judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (image_folder / "dark" / "000.png").write_bytes(b"no image")  # left out before splits are drawn, or after
    monkeypatch.setattr("smallvit.datasets.source.fits_memory", lambda count, channels, size, share: size < 20)
    large = bright(tmp_path / "large.safetensors", ("dark", "grey", "light"), 24)
    shown = []
    ask = Case.ask

    def asked(case: Case, *arguments: object, **options: object) -> dict:
        found = ask(case, *arguments, **options)
        shown.append([case.paths[index] for index in found[None].index])
        return found

    monkeypatch.setattr(Case, "ask", asked)
    judge(levels, "--data", image_folder, "--compare", large, "--skip-corrupt", "--workers", 0)
    assert shown[0] == shown[1]


def test_answers_are_compared_image_by_image() -> None:
    def answers(index: list[int], predicted: list[int]) -> Answers:
        n = len(index)
        same = {"label": np.zeros(n, int), "rank": np.zeros(n, int), "probability": np.ones(n), "loss": np.zeros(n)}
        return Answers(index=np.array(index), predicted=np.array(predicted), **same)

    found = judging.compared(answers([0, 1, 2, 4], [0, 0, 1, 1]), answers([4, 3, 1, 0], [0, 0, 1, 0]))
    assert (found["images"], found["only_one"], found["only_other"]) == (3, 1, 1)  # of 0, 1 and 4


@pytest.mark.parametrize("streaming", ["on", "off"])
def test_the_sheet_shows_a_mistakes_own_image(
    levels: Path, write_images: Callable, judge: Judge, tmp_path: Path, streaming: str
) -> None:
    folder = tmp_path / "splits"
    for split in ("train", "val", "test"):
        for name in ("dark", "grey", "light"):
            write_images(folder / split / name, 4, LEVELS[name])
    shutil.copy(folder / "val" / "light" / "001.png", folder / "val" / "dark" / "002.png")  # the one mistake
    judge(levels, "--data", folder, "--split", "all", "--streaming", streaming, "--workers", 0)
    page = np.asarray(Image.open(tmp_path / "judged" / "mistakes.png"))
    shown = np.asarray(Image.open(folder / "val" / "dark" / "002.png")).repeat(8, axis=0).repeat(8, axis=1)
    assert np.array_equal(page[26 : 26 + 128, 6 : 6 + 128], shown)


def test_a_file_that_is_damaged_after_it_was_judged_is_white_on_the_sheet(
    levels: Path, image_folder: Path, judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(image_folder / "light" / "000.png", image_folder / "dark" / "000.png")
    figures = judging.metrics.figures

    def damage(*arguments: object) -> dict:
        (image_folder / "dark" / "000.png").write_bytes(b"no image")
        return figures(*arguments)

    monkeypatch.setattr(judging.metrics, "figures", damage)
    judge(levels, "--data", image_folder, "--split", "all", "--streaming", "on", "--workers", 0)
    page = np.asarray(Image.open(tmp_path / "judged" / "mistakes.png"))
    assert (page[26 : 26 + 128, 6 : 6 + 128] == 255).all()


def test_mirror_images_are_spoilt_ones_too(run: Path, judge: Judge) -> None:
    found, plain = judge(run, "--robustness", "--flip"), judge(run, "--robustness")
    _, labels, pixels = by_hand(run)
    spoilt = corrupt(pixels, "contrast", 1, torch.arange(len(pixels)))
    mean = logits_of(run, spoilt).softmax(1) + logits_of(run, spoilt.flip(-1)).softmax(1)
    expected = 100 * float((mean.argmax(1) == labels).double().mean())
    assert found["robustness"]["contrast"]["1"] == pytest.approx(expected, abs=0.6)  # a near tie
    assert abs(plain["robustness"]["contrast"]["1"] - expected) > 1.2


def test_two_judgements_into_one_folder_leave_one_whole(
    run: Path, judge: Judge, smallvit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plot = tmp_path / "judged", pictures.plot_reliability

    def meanwhile(*arguments: object) -> None:
        monkeypatch.setattr(pictures, "plot_reliability", plot)
        judge(run, "--split", "val")
        plot(*arguments)

    monkeypatch.setattr(pictures, "plot_reliability", meanwhile)
    assert judge(run)["split"] == "test"
    assert {file.name for file in folder.iterdir()} == set(evidence.FILES)
    assert len(rows(folder / "predictions.csv")) == 180


def test_what_was_removed_while_it_was_written_is_no_result(
    run: Path, smallvit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "plot_reliability", lambda *arguments: None)
    code, _, err = smallvit("eval", run, *PLACE, "--out", tmp_path / "out")
    assert code == 1
    assert "reliability.png was removed while it was written" in err
    assert not (tmp_path / "out").exists()


def test_what_a_killed_judgement_left_is_no_result(tmp_path: Path) -> None:
    left = files.unshared_folder(tmp_path)
    (left / "metrics.json").touch()
    files.require_free(tmp_path, "--out", overwrite=False)
    (tmp_path / "metrics.json").touch()
    with pytest.raises(ValueError, match="holds results already; choose another folder by --out"):
        files.require_free(tmp_path, "--out", overwrite=False)


def test_weights_that_change_while_they_are_judged_are_refused(
    run: Path, smallvit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    ask = Case.ask

    def asked(*arguments: object, **options: object) -> dict:
        shutil.copy(copy / "last.safetensors", copy / "best.safetensors")
        return ask(*arguments, **options)

    changed(run, copy / "last.safetensors", lambda weights, metadata: metadata.update(epoch=99))
    monkeypatch.setattr(Case, "ask", asked)
    code, _, err = smallvit("eval", copy, *PLACE)
    assert code == 2
    assert "weights have changed while they were judged" in err
    assert not (copy / "eval").exists()


@pytest.mark.filterwarnings("error")
def test_names_that_cannot_be_printed_are_spelt_out(
    image_folder: Path, judge: Judge, smallvit: Command, tmp_path: Path
) -> None:
    learnt(tmp_path / "best.safetensors", image_folder)
    names = {"class_names": ["d\udcff:fire:", "grey", "光\n[b]"]}
    os.rename(os.fsencode(image_folder / "dark"), odd := os.fsencode(image_folder) + b"/d\xff:fire:")
    (image_folder / "light").rename(image_folder / "光\n[b]")
    weights = changed(tmp_path, tmp_path / "odd.safetensors", lambda _, metadata: metadata["data"].update(names))
    found = judge(weights, "--data", image_folder, "--split", "all")
    assert [each["name"] for each in found["classes"]] == ["d\\udcff:fire:", "grey", "光\n[b]"]
    shutil.copy(image_folder / "光\n[b]" / "000.png", odd + b"/000.png")
    _, out, _ = smallvit("eval", weights, "--data", image_folder, "--split", "all", *PLACE)
    assert "d\\udcff:fire: taken for 光 [b]: 1 of 20" in out


def test_options_that_do_nothing_are_not_offered(smallvit: Command) -> None:
    assert smallvit("eval", "runs/none", "--balanced")[2].startswith("smallvit: unknown argument '--balanced'")
    shown = verb.parser().format_help()
    assert "Data set by name" not in shown
    assert "by default the model's" in shown
