"""Test evaluating trained models: metrics, output files, other data, comparisons, and data leakage."""

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
from smallvit import datasets
from smallvit.cli import eval as verb
from smallvit.config.config import Config
from smallvit.config.options import DataConfig
from smallvit.datasets.functional import corrupt
from smallvit.evaluation import artifacts, evaluator
from smallvit.evaluation.evaluator import EvaluationTask
from smallvit.evaluation.metrics import Outputs
from smallvit.models import checkpoint, weights_info
from smallvit.models.weights_info import read_data_options

Command = Callable[..., tuple[int, str, str]]
Evaluate = Callable[..., dict]
KEYS = {
    *("name", "data", "split", "images", "top1", "top5", "loss", "interval", "ece", "classes", "confusion"),
    *("reliability", "flip", "robustness", "comparison", "weights_sha256", "img_size", "precision", "hardware"),
    *("versions", "git_revision", "command", "interval_method", "macro", "macro_f1", "balanced_accuracy"),
    *("imbalance_ratio", "skipped_images"),
}
ON_CPU = ["--amp", "off", "--device", "cpu"]
LEVELS = {"dark": 40, "gray": 128, "light": 220, "white": 250}
"""Gray levels of classes."""


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the plots, which take longer than an evaluation, by empty files."""
    for name in ("plot_confusion", "plot_reliability"):
        monkeypatch.setattr(artifacts, name, lambda *arguments: arguments[-2].touch())


@pytest.fixture
def evaluate(smallvit: Command, tmp_path: Path, no_plots: None) -> Evaluate:
    """Return a function that evaluates on the CPU in fp32 and returns the contents of metrics.json."""

    def run(*arguments: object, out: Path = tmp_path / "out") -> dict:
        code, _, err = smallvit("eval", *arguments, *ON_CPU, "--out", out, "--overwrite")
        assert code == 0, err
        return json.loads((out / "metrics.json").read_text())

    return run


@pytest.fixture
def images(image_folder: Path) -> Path:
    """Return a folder of three classes that differ in gray level."""
    return image_folder


@pytest.fixture
def levels(tmp_path: Path) -> Path:
    """Return weights that classify images by their gray level."""
    return save_level_model(tmp_path / "levels.safetensors", ("dark", "gray", "light"))


def save_level_model(path: Path, class_names: tuple[str, ...], size: int = 16, **data: object) -> Path:
    """Save a random CNN with a classifier fitted to images of noise around the gray levels of the classes."""
    torch.manual_seed(0)
    spec = {"arch": "resnet20", "img_size": size, "in_chans": 3, "num_classes": len(class_names)}
    model, number = package.create_model(**spec).eval(), torch.arange(len(class_names)).repeat_interleave(50)
    means = torch.tensor([LEVELS[name] for name in class_names])[number]
    images = (means[:, None, None, None] + 20 * torch.randn(len(number), 3, size, size)).clamp(0, 255) / 255
    with torch.no_grad():
        features = model.forward_head(model.forward_features((images - 0.5) / 0.25), pre_logits=True)
        inputs = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
        fitted = torch.linalg.pinv(inputs) @ torch.eye(len(class_names), dtype=torch.float64)[number]
        model.get_classifier().weight.copy_(20 * fitted[:-1].T)
        model.get_classifier().bias.copy_(20 * fitted[-1])
    data = {"name": "levels", "class_names": class_names, "mean": [0.5] * 3, "std": [0.25] * 3} | data
    checkpoint.save_weights(path, checkpoint.snapshot(model), {"model": spec, "data": data})
    return path


def save_trained_on(path: Path, folder: Path, **options: object) -> Path:
    """Save such weights with the metadata of training on a folder."""
    config = DataConfig(data=str(folder), **options)
    dataset = datasets.create_dataset(config)
    training_data = dataset.describe_training_data(config)
    return save_level_model(path, dataset.class_names, name=dataset.name, training_data=training_data)


def read_rows(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


def save_changed(run: Path, path: Path, change: Callable[[dict, dict], None]) -> Path:
    """Save changed weights or metadata of a run."""
    weights, metadata = checkpoint.load_weights(run / "best.safetensors")
    change(weights, metadata)
    checkpoint.save_weights(path, weights, metadata)
    return path


def compute_by_hand(run: Path, split: str = "test") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits, labels and pixels of a split of the digits."""
    part = getattr(datasets.create_dataset(DataConfig()), split)
    return compute_logits(run, part.pixels), part.labels, part.pixels


def compute_logits(run: Path, pixels: torch.Tensor) -> torch.Tensor:
    dataset = datasets.create_dataset(DataConfig())
    mean, std = (torch.tensor(values)[:, None, None] for values in (dataset.mean, dataset.std))
    with torch.no_grad():
        return package.load_model(run)((pixels / 255 - mean) / std)


# Metrics and files


def test_results_agree_with_training_and_with_each_other(
    trained_run_copy: Path, smallvit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained_run_copy
    code, out, _ = smallvit("eval", run, *ON_CPU)
    folder = run / "eval" / "test"
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith(str(folder))] == [
        str(folder / name) for name in artifacts.FILES
    ]
    record, summary = json.loads((folder / "metrics.json").read_text()), json.loads((run / "summary.json").read_text())
    assert set(record) == KEYS
    assert record["images"] == summary["test_images"]
    assert record["top1"] == pytest.approx(summary["test_top1"])
    assert record["loss"] == pytest.approx(summary["test_loss"], rel=1e-5)
    assert (record["data"], record["split"], record["img_size"], record["skipped_images"]) == ("digits", "test", 8, 0)
    assert record["interval"][0] < record["top1"] < record["interval"][1]
    assert record["weights_sha256"] == hashlib.sha256((run / "best.safetensors").read_bytes()).hexdigest()
    assert record["command"].startswith(f"smallvit eval {run} --amp off")

    logits, labels, pixels = compute_by_hand(run)
    header, *predictions = read_rows(folder / "predictions.csv")
    assert header == ["index", "label", "predicted", "probability"]
    assert [int(row[0]) for row in predictions] == list(range(record["images"]))
    assert [int(row[1]) for row in predictions] == labels.tolist()
    assert [int(row[2]) for row in predictions] == logits.argmax(1).tolist()
    probabilities = torch.tensor([float(row[3]) for row in predictions])
    torch.testing.assert_close(probabilities, logits.softmax(1).amax(1), rtol=1e-4, atol=1e-5)
    header, *confusion = read_rows(folder / "confusion.csv")
    assert header == ["true", *"0123456789"]
    counts = np.array([row[1:] for row in confusion], dtype=int)
    assert counts.tolist() == record["confusion"]
    assert 100 * np.trace(counts) / counts.sum() == pytest.approx(record["top1"])
    header, *classes = read_rows(folder / "classes.csv")
    assert header == ["name", "precision", "recall", "f1", "images"]
    assert [int(row[-1]) for row in classes] == counts.sum(axis=1).tolist()

    mistakes = Image.open(folder / "mistakes.png")
    cell, wrong = 128 + 6, record["images"] - int(np.trace(counts))
    assert mistakes.size == (8 * cell + 6, -(-min(wrong, 40) // 8) * (cell + 28) + 6 + 14 + 6)
    confidence, predicted = logits.softmax(1).max(1)
    first = int((confidence * (predicted != labels)).argmax())
    expected = pixels[first, 0].numpy().repeat(16, axis=0).repeat(16, axis=1)
    assert np.array_equal(np.asarray(mistakes)[26 : 26 + 128, 6 : 6 + 128, 0], expected)
    assert min(min(Image.open(folder / name).size) for name in ("confusion.png", "reliability.png")) > 400

    # Earlier results are kept unless --overwrite is given, and after an interruption.
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    code, out, err = smallvit("eval", run, *ON_CPU, "--flip")
    assert (code, out) == (2, "")
    assert f"{folder}: already holds results" in err
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "plot_reliability", interrupt)
        assert smallvit("eval", run, *ON_CPU, "--overwrite")[0] == 130
        assert smallvit("eval", run, *ON_CPU, "--out", run / "new" / "folder")[0] == 130
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == files
    assert not (run / "new").exists()
    (folder / "mine.txt").write_text("kept")
    assert smallvit("eval", run, *ON_CPU, "--flip", "--overwrite")[0] == 0
    assert json.loads((folder / "metrics.json").read_text())["flip"] is True
    assert (folder / "mine.txt").read_text() == "kept"


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_flip_averages_probabilities_over_mirror_images(trained_run: Path, evaluate: Evaluate) -> None:
    logits, labels, pixels = compute_by_hand(trained_run)
    mean = (logits.softmax(1) + compute_logits(trained_run, pixels.flip(-1)).softmax(1)) / 2
    record = evaluate(trained_run, "--flip")
    assert record["top1"] == pytest.approx(100 * float((mean.argmax(1) == labels).double().mean()))
    assert record["loss"] == pytest.approx(float(-mean.log()[torch.arange(len(labels)), labels].mean()), rel=1e-4)


@pytest.mark.slow
def test_robustness_is_the_accuracy_on_corrupted_images(trained_run: Path, evaluate: Evaluate) -> None:
    record = evaluate(trained_run, "--robustness", "--split", "val")
    assert list(record["robustness"]) == ["noise", "blur", "contrast", "jpeg"]
    _, labels, pixels = compute_by_hand(trained_run, "val")
    for kind, strength in (("noise", 3), ("jpeg", 1)):
        corrupted = corrupt(pixels, kind, strength, torch.arange(len(pixels)))
        expected = 100 * float((compute_logits(trained_run, corrupted).argmax(1) == labels).double().mean())
        assert record["robustness"][kind][str(strength)] == pytest.approx(expected, abs=0.8)  # near ties
    corrupted = corrupt(pixels, "contrast", 1, torch.arange(len(pixels)))
    pair = (compute_logits(trained_run, each).softmax(1) for each in (corrupted, corrupted.flip(-1)))
    expected = 100 * float((sum(pair).argmax(1) == labels).double().mean())
    flipped = evaluate(trained_run, "--robustness", "--flip", "--split", "val")
    assert flipped["robustness"]["contrast"]["1"] == pytest.approx(expected, abs=1.5)  # near ties


@pytest.mark.parametrize("split", ["val", *(pytest.param(split, marks=pytest.mark.slow) for split in ("train", "all"))])
def test_other_splits_are_evaluated_with_a_warning(
    trained_run: Path, smallvit: Command, tmp_path: Path, split: str, no_plots: None
) -> None:
    code, _, err = smallvit("eval", trained_run, "--split", split, *ON_CPU, "--out", tmp_path / split)
    assert code == 0
    assert ("validation images helped to choose" if split == "val" else "was trained on images of train") in err
    parts = ("train", "val", "test") if split == "all" else (split,)
    logits, labels, _ = map(torch.cat, zip(*(compute_by_hand(trained_run, part) for part in parts), strict=True))
    record = json.loads((tmp_path / split / "metrics.json").read_text())
    assert record["top1"] == pytest.approx(100 * float((logits.argmax(1) == labels).double().mean()))
    predictions = read_rows(tmp_path / split / "predictions.csv")[1:]
    assert [int(row[1]) for row in predictions] == labels.tolist()


@pytest.mark.slow
def test_confusion_matrices_of_any_size_are_plotted(tmp_path: Path) -> None:
    for classes in (2, 200):
        names = [f"class {number} of $many, with a long name" for number in range(classes)]
        artifacts.plot_confusion(np.eye(classes, dtype=int) * 9, names, tmp_path / "c.png", "a $title " * 20)
        width, height = Image.open(tmp_path / "c.png").size
        assert 600 < height < width < 1700


def test_a_weights_file_of_a_run_uses_its_data_and_writes_nothing(trained_run: Path, smallvit: Command) -> None:
    before = sorted(trained_run.rglob("*"))
    code, out, _ = smallvit("eval", trained_run / "last.safetensors", *ON_CPU)
    assert code == 0
    assert "359 images at 8 pixels" in out
    assert "no files written" in out
    assert sorted(trained_run.rglob("*")) == before


def test_evaluate_run_from_python(trained_run: Path, tmp_path: Path) -> None:
    options = read_data_options(str(trained_run))
    assert options["data"] == "digits"
    assert "img_size" not in options
    assert read_data_options(str(tmp_path)) is None
    assert read_data_options("resnet18:pretrained") is None
    config = Config.build(**options, device="cpu", amp="off")
    record = evaluator.evaluate_run(str(trained_run), config, out=str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == record


# Comparison


@pytest.mark.slow
def test_a_second_model_is_evaluated_on_the_same_images_at_its_own_size(
    trained_run: Path, evaluate: Evaluate, smallvit: Command, tmp_path: Path
) -> None:
    _, metadata = checkpoint.load_weights(trained_run / "best.safetensors")
    metadata["model"] |= {"img_size": 12}
    torch.manual_seed(0)
    other = tmp_path / "other.safetensors"
    checkpoint.save_weights(other, checkpoint.snapshot(package.create_model(**metadata["model"])), metadata)
    top1 = evaluate(other, "--data", "digits")["top1"]
    record = evaluate(trained_run, "--compare", other)
    comparison = record["comparison"]
    assert comparison["name"] == str(other)
    assert comparison["other_top1"] == pytest.approx(top1)
    assert (comparison["top1"], comparison["images"]) == (record["top1"], record["images"])
    assert comparison["difference"] == pytest.approx(record["top1"] - top1)
    _, out, _ = smallvit("eval", trained_run, "--compare", other, *ON_CPU, "--out", tmp_path / "again")
    assert f"{trained_run} {record['top1']:.2f} %, {other} {top1:.2f} %: +" in out
    same = evaluate(trained_run, "--compare", trained_run)["comparison"]
    assert (same["p"], same["difference"], same["only_one"], same["only_other"]) == (1, 0, 0, 0)


def test_outputs_are_compared_image_by_image() -> None:
    def create_outputs(index: list[int], predicted: list[int]) -> Outputs:
        n = len(index)
        same = {"label": np.zeros(n, int), "rank": np.zeros(n, int), "probability": np.ones(n), "loss": np.zeros(n)}
        return Outputs(index=np.array(index), predicted=np.array(predicted), **same)

    first, second = create_outputs([0, 1, 2, 4], [0, 0, 1, 1]), create_outputs([4, 3, 1, 0], [0, 0, 1, 0])
    comparison = evaluator.compare_outputs(first, second)
    assert (comparison["images"], comparison["only_one"], comparison["only_other"]) == (3, 1, 1)  # of 0, 1 and 4


def test_both_models_are_streamed_if_the_larger_images_are(
    levels: Path, images: Path, evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images / "dark" / "000.png").write_bytes(b"no image")  # skipped before splits are drawn in memory
    files = sum(path.is_file() for path in images.rglob("*.png"))
    monkeypatch.setattr("smallvit.datasets.factory.MAX_IN_MEMORY", files * 3 * 20 * 20)
    large = save_level_model(tmp_path / "large.safetensors", ("dark", "gray", "light"), 24)
    evaluated = []
    compute_outputs = EvaluationTask.compute_outputs

    def record(task: EvaluationTask, *arguments: object, **options: object) -> dict:
        outputs = compute_outputs(task, *arguments, **options)
        evaluated.append([task.paths[index] for index in outputs[None].index])
        return outputs

    monkeypatch.setattr(EvaluationTask, "compute_outputs", record)
    evaluate(levels, "--data", images, "--compare", large, "--skip-corrupt", "--workers", 0)
    assert evaluated[0] == evaluated[1]


# Other data


def test_classes_of_other_data_are_matched_by_name(
    levels: Path, images: Path, evaluate: Evaluate, smallvit: Command, tmp_path: Path
) -> None:
    permuted = save_level_model(tmp_path / "permuted.safetensors", ("light", "dark", "gray"))
    for weights in (levels, permuted):
        record = evaluate(weights, "--data", images, "--split", "all")
        assert (record["top1"], record["images"]) == (100, 60)
    assert [each["name"] for each in record["classes"]] == ["light", "dark", "gray"]
    (tmp_path / "out" / "mistakes.png").write_bytes(b"of an earlier evaluation")
    code, out, err = smallvit("eval", levels, "--data", images, *ON_CPU, "--out", tmp_path / "out", "--overwrite")
    assert code == 0
    assert "top-1 100.00 % (95 % Clopper-Pearson interval 73.54 to 100.00)" in out  # 1 - 0.025 ** (1 / 12)
    assert "--split all evaluates all images" in err
    assert not (tmp_path / "out" / "mistakes.png").exists()
    shutil.rmtree(images / "gray")
    code, out, err = smallvit("eval", levels, "--data", images, *ON_CPU, "--out", tmp_path / "two")
    record = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert code == 0
    assert "images has 2 of the model's 3 classes; the others are not evaluated" in err
    assert [each["images"] for each in record["classes"]] == [4, 0, 4]
    assert (record["classes"][1]["f1"], record["macro"]["f1"]) == (None, 100)
    assert "gray" not in out


@pytest.mark.parametrize("streaming", ["off", "on"])
def test_predictions_name_files_and_skip_damaged_ones(
    levels: Path, images: Path, evaluate: Evaluate, tmp_path: Path, streaming: str
) -> None:
    (images / "dark" / "007.png").write_bytes(b"no image")
    (images / "light" / "011.png").write_bytes(b"no image")
    shutil.copy(images / "light" / "001.png", images / "dark" / "002.png")  # the only mistake
    options = ["--skip-corrupt", "--streaming", streaming, "--workers", 0, "--split-seed", 5]
    record = evaluate(levels, "--data", images, "--split", "all", *options)
    assert record["images"] == 58
    assert record["skipped_images"] == (2 if streaming == "on" else 0)  # in memory, they are not counted
    header, *predictions = read_rows(tmp_path / "out" / "predictions.csv")
    assert header[-1] == "path"
    files = {str(file.relative_to(images)) for file in images.rglob("*.png")}
    assert {row[-1] for row in predictions} == files - {"dark/007.png", "light/011.png"}
    assert all(row[-1].startswith(f"{row[1]}/") for row in predictions)
    sheet = np.asarray(Image.open(tmp_path / "out" / "mistakes.png"))
    mistake = np.asarray(Image.open(images / "dark" / "002.png")).repeat(8, axis=0).repeat(8, axis=1)
    assert np.array_equal(sheet[26 : 26 + 128, 6 : 6 + 128], mistake)


def test_unnamed_classes_need_as_many_classes_in_the_data(
    images: Path, evaluate: Evaluate, smallvit: Command, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    path = tmp_path / "plain.safetensors"
    save_file(timm.create_model("test_vit", num_classes=3).state_dict(), path)
    arguments = ["--arch", "test_vit", "--data", images, "--img-size", 32]
    record = evaluate(path, *arguments)
    assert [each["name"] for each in record["classes"]] == ["dark", "gray", "light"]
    shutil.rmtree(images / "gray")
    code, _, err = smallvit("eval", path, *arguments)
    assert code == 2
    assert "the model has 3 classes without names, images has 2 classes" in err


def test_all_images_of_other_data_need_no_split(
    levels: Path, images: Path, smallvit: Command, evaluate: Evaluate
) -> None:
    for file in sorted((images / "dark").iterdir())[1:]:
        file.unlink()
    assert evaluate(levels, "--data", images, "--split", "all")["images"] == 41
    assert "split: " not in smallvit("eval", levels, "--data", images, "--split", "all", *ON_CPU)[2]
    for name in ("gray", "light"):
        shutil.rmtree(images / name)
    assert evaluate(levels, "--data", images, "--split", "all")["images"] == 1


@pytest.mark.filterwarnings("error")
def test_class_names_with_line_breaks_and_markup_are_printed(
    images: Path, evaluate: Evaluate, smallvit: Command, tmp_path: Path
) -> None:
    save_trained_on(tmp_path / "best.safetensors", images)
    names = {"class_names": [":fire:", "gray", "光\n[b]"]}
    (images / "dark").rename(images / ":fire:")
    (images / "light").rename(images / "光\n[b]")
    weights = save_changed(tmp_path, tmp_path / "odd.safetensors", lambda _, metadata: metadata["data"].update(names))
    record = evaluate(weights, "--data", images, "--split", "all")
    assert [each["name"] for each in record["classes"]] == names["class_names"]
    shutil.copy(images / "光\n[b]" / "000.png", images / ":fire:" / "000.png")
    _, out, _ = smallvit("eval", weights, "--data", images, "--split", "all", *ON_CPU)
    assert ":fire: → 光 [b]: 1 of 20" in out


# Leakage


@pytest.mark.usefixtures("no_plots")
def test_a_test_split_with_training_images_is_refused_and_other_overlaps_are_reported(
    images: Path, smallvit: Command, tmp_path: Path
) -> None:
    weights = save_trained_on(tmp_path / "best.safetensors", images, split_seed=5)
    copy = shutil.copytree(images, tmp_path / "copy")
    for folder, streaming in ((images, "off"), (copy, "on")):
        arguments = [weights, "--data", folder, "--streaming", streaming, "--workers", 0, *ON_CPU]
        code, _, err = smallvit("eval", *arguments)
        assert (code, len(err.splitlines())) == (2, 1)
        assert "the test split contains images that it was trained on; add --split-seed 5 as in training" in err
        code, _, err = smallvit("eval", *arguments, "--split-seed", 5, "--test-fraction", 0.4)
        assert code == 2
        assert "add --test-fraction 0.2 as in training" in err
        code, _, err = smallvit("eval", *arguments, "--split-seed", 5)
        assert (code, "was trained" in err) == (0, False)
        code, _, err = smallvit("eval", *arguments, "--split", "train")
        assert code == 0
        assert f"{weights} was trained on images of train" in err
    levels = save_level_model(tmp_path / "levels.safetensors", ("dark", "gray", "light"))
    code, _, err = smallvit("eval", levels, "--data", images, *ON_CPU, "--compare", weights)
    assert code == 2
    assert f"--compare {weights}: the test split contains" in err
    code, _, err = smallvit("eval", levels, "--data", images, *ON_CPU, "--compare", weights, "--split", "all")
    assert code == 0
    assert f"{weights} was trained on images of train" in err
    assert f"{levels} was trained" not in err
    shutil.copy(images / "dark" / "000.png", images / "dark" / "new.png")
    code, _, err = smallvit("eval", weights, "--data", images, *ON_CPU)
    assert code == 0
    assert f"images has changed since {weights} was trained on it; test may contain training images" in err


def test_weights_store_a_fingerprint_of_their_training_data(trained_run: Path) -> None:
    info, dataset = weights_info.read_weights_info(str(trained_run), "eval"), datasets.create_dataset(DataConfig())
    assert info.training_data == dataset.describe_training_data(DataConfig())
    fold = {"folds": 0, "fold": 1, "fold_seed": 0}
    assert info.training_data["test_split"] == {"group_by": None, "split_seed": 0, "test_fraction": 0.2} | fold


# Errors


def test_bad_input_exits_with_one_line(trained_run: Path, images: Path, smallvit: Command, tmp_path: Path) -> None:
    levels = save_level_model(tmp_path / "levels.safetensors", ("dark", "gray", "light"))
    others = save_level_model(tmp_path / "others.safetensors", tuple(LEVELS))
    odd, file = shutil.copytree(images, tmp_path / "odd"), tmp_path / "file"
    (odd / "gray").rename(odd / "grays")
    (odd / "light").rename(odd / "purple")
    file.touch()

    def change(weights: dict, metadata: dict) -> None:
        name = next(name for name in weights if name.endswith("norm.weight"))
        weights[name] = torch.full_like(weights[name], torch.nan)

    broken = save_changed(trained_run, tmp_path / "broken.safetensors", change)
    undecodable = shutil.copytree(images, tmp_path / "undecodable")
    os.rename(undecodable / "dark", os.fsencode(undecodable) + b"/d\xff")
    cases = [
        (["runs/none"], "eval runs/none: no such file or folder"),
        ([], "RUN is missing; use smallvit eval"),
        ([trained_run, "--epochs", 3], "--epochs: no such option"),
        ([trained_run, "--balanced"], "--balanced: no such option"),
        ([trained_run, "--split", "tests"], "expected one of train, val, test, all (did you mean 'test'?)"),
        ([trained_run, "--split", "val", "--val-fraction", 0], "--split val: digits has no such images"),
        ([trained_run, "--split-seed", 1], "add --split-seed 0 as in training"),
        ([trained_run, "--data", images], "takes images with 1 channels, those of images have 3"),
        ([trained_run, "--img-size", 1], "--img-size 1"),
        ([trained_run, "--device", "cuda:77"], "--device cuda:77"),
        ([trained_run, "--compare", "runs/none"], "--compare runs/none: no such file or folder"),
        ([trained_run, "--out", file], "a file, not a folder"),
        ([levels], "the data set is unknown; add --data"),
        ([levels, "--data", odd], "lacks the classes 'grays', 'purple' of odd (did you mean 'gray'?)"),
        ([levels, "--data", images, "--compare", trained_run], "the model takes images with 1 channels, those of"),
        ([levels, "--data", images, "--compare", others], "the models have different classes (only it has 'white')"),
        ([levels, "--data", undecodable], "d\\udcff/000.png' and 19 more: the name is not UTF-8; rename it"),
    ]
    failures = []
    for arguments, message in cases:
        code, out, err = smallvit("eval", *arguments)
        if code != 2 or "top-1" in out or message not in err or len(err.splitlines()) != 1:
            failures.append((arguments, message, code, err))
    assert not failures
    code, out, err = smallvit("eval", broken, "--data", "digits", *ON_CPU)
    assert (code, out) == (2, "")
    assert f"eval {broken}: the logits are not finite" in err
    assert not (trained_run / "eval").exists()


def test_help_lists_only_options_with_an_effect() -> None:
    text = verb.parser().format_help()
    assert "--balanced" not in text
    assert "Data set by name" not in text
