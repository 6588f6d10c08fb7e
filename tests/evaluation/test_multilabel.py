"""Test images with several labels: scores are scikit-learn's, thresholds are the best, and all verbs agree."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score, precision_recall_fscore_support
from sklearn.metrics import log_loss as cross_entropy

import smallvit as package
from smallvit.config.config import Config
from smallvit.evaluation.evaluate import compute_logits
from smallvit.evaluation.multilabel import compute_scores, tune_thresholds
from smallvit.evaluation.predictor import load_predictor
from smallvit.export.timm_folder import build_config
from smallvit.export.verify import build_metadata
from smallvit.training import train as engine
from smallvit.utils.errors import InputError

Command = Callable[..., tuple[int, str, str]]
CLASSES = ("dark", "left", "noisy")


@pytest.fixture
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Classes and probabilities of images, with ties; the last class has no images."""
    rng = np.random.default_rng(0)
    targets = rng.random((90, 5)) < [0.5, 0.3, 0.1, 0.02, 0]
    return targets, (0.6 * rng.random((90, 5)) + 0.4 * targets).round(2)


def test_scores_are_scikit_learns(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    targets, probabilities = drawn
    thresholds = [0.5, 0.4, 0.6, 0.7, 0.5]
    scores, predicted = compute_scores(targets, probabilities, thresholds), probabilities >= thresholds
    precision, recall, f1, images = precision_recall_fscore_support(targets, predicted, zero_division=0)
    assert scores["map"] == pytest.approx(100 * average_precision_score(targets[:, :4], probabilities[:, :4]))
    assert scores["micro_f1"] == pytest.approx(100 * f1_score(targets, predicted, average="micro"))
    assert scores["macro_f1"] == pytest.approx(100 * f1[:4].mean())
    for name, expected in {"precision": precision, "recall": recall, "f1": f1}.items():
        np.testing.assert_allclose(scores[name], 100 * expected)
    assert scores["images"].tolist() == images.tolist()


def test_tuned_thresholds_have_the_highest_f1(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    targets, probabilities = drawn
    thresholds = tune_thresholds(targets, probabilities)
    for number in range(4):
        scores = [f1_score(targets[:, number], probabilities[:, number] >= each) for each in np.arange(0, 1, 0.005)]
        assert f1_score(targets[:, number], probabilities[:, number] >= thresholds[number]) == max(scores)
    assert thresholds[4] == 0.5
    assert compute_scores(targets, probabilities)["thresholds"] == thresholds.tolist()


def test_mirror_images_average_probabilities_of_sigmoids() -> None:
    first, second = torch.tensor([[[-40.0, 0.5, 90.0]], [[-44.0, -1.0, 30.0]]])
    logits = iter([first, second])
    mean = compute_logits(
        lambda _: next(logits), torch.zeros(1, 1), torch.device("cpu"), torch.float32, flip=True, multi_label=True
    )
    expected = torch.stack([first, second]).double().sigmoid().mean(dim=0).logit()
    torch.testing.assert_close(mean[:, :2].double(), expected[:, :2])
    assert 30 < mean[0, 2] < 31  # double precision rounds this probability to 1


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Write a table of images that are dark, bright on the left, noisy, several of them, or none."""
    rng = np.random.default_rng(0)
    rows = [["path", "label"]]
    for number in range(120):
        has = rng.random(3) < [0.5, 0.5, 0.3]
        pixels = np.full((8, 8), 60.0 if has[0] else 140.0)
        pixels[:, :4] += 80 * has[1]
        pixels += has[2] * rng.normal(0, 30, (8, 8))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / f"{number}.png")
        rows.append([f"{number}.png", ";".join(np.array(CLASSES)[has])])
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return tmp_path / "labels.csv"


@pytest.mark.slow
def test_a_run_resumes_exactly_and_every_verb_uses_its_thresholds(
    table: Path, tmp_path: Path, smallvit: Command, interrupted: Callable[[int], AbstractContextManager[None]]
) -> None:
    options = {"data": str(table), "arch": "vit96", "img_size": 8, "patch_size": 4, "epochs": 3, "batch_size": 32}
    options |= {"aug": "mix", "lr": 3e-3, "amp": "off"}
    run, other = tmp_path / "run", tmp_path / "other"
    engine.train(Config.build(**options, out=str(run)))
    with interrupted(2):
        engine.train(Config.build(**options, out=str(other)))
    engine.train(Config.build(resume=str(other)))
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    again = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    timed = {"seconds", "images_per_second"}
    assert [{k: v for k, v in each.items() if k not in timed} for each in history] == [
        {k: v for k, v in each.items() if k not in timed} for each in again
    ]
    summary = json.loads((run / "summary.json").read_text())
    best = max(history, key=lambda line: (line["val_map"], -line["val_loss"]))
    assert (summary["best_epoch"], summary["val_map"]) == (best["epoch"], best["val_map"])
    assert json.loads((run / "config.json").read_text())["loss"] == "bce"

    code, out, err = smallvit("eval", run)
    assert code == 0, err
    assert "mAP" in out
    metrics = json.loads((run / "eval/test/metrics.json").read_text())
    for name in ("map", "macro_f1", "micro_f1", "loss"):
        assert metrics[name] == pytest.approx(summary[f"test_{name}"], rel=1e-4)
    assert [each["threshold"] for each in metrics["classes"]] == best["thresholds"]
    with open(run / "eval/test/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    targets = np.array([[name in row["label"].split(";") for name in CLASSES] for row in rows])
    probabilities = np.array([[float(row[f"p({name})"]) for name in CLASSES] for row in rows])
    assert metrics["map"] == pytest.approx(100 * average_precision_score(targets, probabilities), abs=0.1)
    losses = [cross_entropy(targets[:, k], probabilities[:, k], labels=[0, 1]) for k in range(3)]
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-3)

    paths = [str(tmp_path / row["path"]) for row in rows]
    for row, prediction in zip(rows, package.predict(run, paths), strict=True):
        assert {name for name, _ in prediction.classes} == {*row["predicted"].split(";")} - {""}
        assert prediction.classes == tuple(sorted(prediction.classes, key=lambda each: -each[1]))
    assert [len(each.classes) for each in package.predict(run, paths[:2], top=2)] == [2, 2]
    written = smallvit("predict", run, *paths, "--format", "csv")[1].splitlines()
    assert written[0] == "path,label,probability"
    assert len(written) == 1 + len(paths)
    assert smallvit("predict", run, *paths)[0] == 0

    model = load_predictor(str(run), "test", device="cpu")
    metadata = build_metadata(model)
    assert metadata["activation"] == build_config(model)["activation"] == "sigmoid"
    assert json.loads(metadata["thresholds"]) == build_config(model)["thresholds"] == best["thresholds"]
    assert smallvit("report", run)[0] == 0
    page = (run / "report.html").read_text()
    assert "test mAP" in page
    assert f"{best['thresholds'][0]:.3f}" in page
    assert smallvit("check", table)[0] == 0
    for arguments, message in (
        (["eval", run, "--compare", other], "--compare"),
        (["probe", run], "has several labels an image, which probe does not take"),
        (["export", run, "--format", "hub"], "use --format timm"),
        (["check", table, "--run", run], "likely wrong labels are not found among several labels"),
        (["crossval", "--arch", "vit", "--data", table, "--folds", 2], "which compare and crossval do not take"),
    ):
        code, _, err = smallvit(*arguments)
        assert (code, err.count("\n")) == (2, 1), (arguments, err)
        assert message in err


def test_options_that_need_one_label_get_one_line(table: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.csv"
    weights.write_text("".join(f"{line},{(i and 1) or 'weight'}\n" for i, line in enumerate(table.read_text().split())))
    for options, message in (
        ({"loss": "focal"}, "--loss focal cannot be combined with several labels an image; use bce or asymmetric"),
        ({"balanced": True}, "--balanced cannot be combined with several labels"),
        ({"class_weights": "balanced", "loss": "ce"}, "--class-weights cannot be combined with several labels"),
        ({"logit_adjustment": 1.0}, "--logit-adjustment cannot be combined"),
        (
            {"select_by": "balanced_accuracy"},
            "--select-by balanced_accuracy: not for several labels an image; use map,",
        ),
        ({"data": "digits", "select_by": "map"}, "--select-by map: not for one label an image; use top1"),
        ({"data": str(weights)}, "weights cannot be combined with several labels; remove the column"),
    ):
        config = Config.build(
            **{"data": str(table), "arch": "vit96", "img_size": 8, "patch_size": 4} | options, out=str(tmp_path / "no")
        )
        with pytest.raises(InputError, match=message.replace("(", "\\(")):
            engine.train(config)
    assert not (tmp_path / "no").exists()
