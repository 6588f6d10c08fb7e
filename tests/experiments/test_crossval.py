"""Test cross-validation: folds are those of scikit-learn, and results follow from predictions of unseen images."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, f1_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from smallvit import Config, datasets
from smallvit.cli import crossval as crossval_command
from smallvit.config.options import DataConfig
from smallvit.evaluation import stats
from smallvit.experiments import grid
from smallvit.training import train as engine
from smallvit.utils.errors import InputError

Command = Callable[..., tuple[int, str, str]]
FOLDS = 3
MODEL = ["--arch", "vit96", "--img-size", "8", "--epochs", "1", "--batch-size", "16", "--device", "cpu", "--jobs", "1"]


def load(data: object, **options: object) -> datasets.ImageDataset:
    return datasets.create_dataset(DataConfig(**{"data": str(data), "img_size": 8, "folds": FOLDS} | options))


@pytest.mark.parametrize("grouped", [False, True])
def test_folds_are_those_of_scikit_learn(image_folder: Path, grouped: bool) -> None:
    """Validation images are of the other folds, and each image is tested once."""
    paths = sorted(str(path.relative_to(image_folder)) for path in image_folder.rglob("*.png"))
    labels = [path.split("/")[0] for path in paths]
    groups = [path[-6:] for path in paths]
    options = {"group_by": r"\d\d\.png"} if grouped else {}
    splitter = (StratifiedGroupKFold if grouped else StratifiedKFold)(FOLDS, shuffle=True, random_state=4)
    groups = groups if grouped else None
    for fold, (_, held) in enumerate(splitter.split(paths, labels, groups), 1):
        for streaming in ("off", "on"):
            data = load(image_folder, fold=fold, fold_seed=4, streaming=streaming, workers=0, **options)
            assert set(data.test.paths) == {paths[index] for index in held}
            assert {*data.train.paths, *data.val.paths, *data.test.paths} == set(paths)
            assert len(data.train) + len(data.val) + len(data.test) == len(paths)
            assert data.drew_test
        if grouped:
            splits = [{path[-6:] for path in getattr(data, split).paths} for split in ("train", "val", "test")]
            assert len(set.union(*splits)) == sum(map(len, splits)) == 20


def test_a_test_split_stays_unused_and_validation_images_join_the_folds(
    tmp_path: Path, write_images: Callable[..., list[Path]]
) -> None:
    for split, count in (("train", 9), ("val", 6), ("test", 3)):
        for level, name in ((40, "dark"), (200, "light")):
            write_images(tmp_path / split / name, count, level)
    for streaming in ("off", "on"):
        parts = [load(tmp_path, fold=fold, streaming=streaming, workers=0) for fold in range(1, FOLDS + 1)]
        tested = [path for data in parts for path in data.test.paths]
        assert sorted(tested) == sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*[nl]/*/*.png"))
        assert all(not path.startswith("test") for data in parts for path in (*data.train.paths, *data.val.paths))
        assert "--folds: the test split, 6 images, is not used" in parts[0].notes
        final = load(tmp_path, folds=0, fold=2, streaming=streaming, workers=0)
        assert len(final.test) == 6
        assert all(path.startswith("test") for path in final.test.paths)
    assert load("digits").test.labels.numel() == 599


def test_unusable_folds_are_one_line(image_folder: Path) -> None:
    for options, message in (
        ({"folds": 1}, "--folds 1: expected at least 2"),
        ({"folds": 3, "fold": 4}, "--fold 4: expected at most --folds 3"),
        ({"folds": 21}, "--folds 21: no class has so many images; give fewer folds"),
        ({"folds": 61}, "--folds 61: only 60 images; give fewer"),
        ({"folds": 11, "group_by": r"\d\.png"}, "--folds 11: only 10 groups; give fewer"),
        ({"folds": 2, "group_by": "dark|gray|light"}, "are in fold"),
    ):
        with pytest.raises(InputError, match=message):
            datasets.create_dataset(DataConfig(data=str(image_folder), **options))


def test_the_t_test_is_that_of_nadeau_and_bengio() -> None:
    """Without test images the test is the paired t-test; else the variance grows by the paper's factor."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(80, 2, 10), rng.normal(78, 2, 10)
    plain = scipy_stats.ttest_rel(first, second)
    result = stats.corrected_t_test(list(first - second), 0)
    assert (result["t"], result["p"]) == pytest.approx((plain.statistic, plain.pvalue))
    assert result["interval"] == pytest.approx(list(plain.confidence_interval()))
    corrected = stats.corrected_t_test(list(first - second), 1 / 4)
    assert corrected["t"] == pytest.approx(plain.statistic / np.sqrt(1 + 10 / 4))
    assert corrected["p"] == pytest.approx(2 * scipy_stats.t.sf(abs(corrected["t"]), 9))
    for constant, p in ((0.0, 1.0), (1.0, 0.0)):
        assert stats.corrected_t_test([constant] * 3, 0.5)["p"] == p
        assert stats.format_t_test(stats.corrected_t_test([constant] * 3, 0.5))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the runs that are trained, in this process."""
    names: list[str] = []

    def train(options: dict[str, Any], folder: Path, *_: object) -> int:
        names.append(folder.name)
        engine.train(Config.build(**options, out=str(folder), auto_resume=True))
        return 0

    monkeypatch.setattr(grid, "train", train)
    monkeypatch.chdir(tmp_path)
    return names


@pytest.mark.slow
def test_results_follow_from_the_predictions_of_unseen_images(
    image_folder: Path, tmp_path: Path, smallvit: Command, trained: list[str]
) -> None:
    data, out = ["--data", image_folder, "--group-by", r"\d\d\.png", "--folds", FOLDS], tmp_path / "cv"
    command = ["crossval", *MODEL, *data, "--repeats", 2, "--compare", "vit96+spt,lr=0.01", "--out", out]
    code, printed, err = smallvit(*command)
    assert code == 0, err
    assert len(trained) == 2 * 2 * FOLDS
    assert trained[:2] == ["vit96-seed0-fold1", "vit96+spt,lr=0.01-seed0-fold1"]
    record = json.loads((out / "crossval.json").read_text())
    with open(out / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 120
    for run in record["runs"]:
        own = [row for row in rows if (int(row["fold_seed"]), int(row["fold"])) == (run["fold_seed"], run["fold"])]
        test = load(image_folder, group_by=r"\d\d\.png", fold=run["fold"], fold_seed=run["fold_seed"]).test
        assert [row["path"] for row in own] == list(test.paths)
        true, predicted = ([row[name] for row in own] for name in ("label", "predicted"))
        assert run["top1"] == pytest.approx(100 * accuracy_score(true, predicted))
        assert run["macro_f1"] == pytest.approx(100 * f1_score(true, predicted, average="macro"))
        assert run["balanced_accuracy"] == pytest.approx(100 * balanced_accuracy_score(true, predicted))
        summary = json.loads((out / run["run"] / "summary.json").read_text())
        assert run["top1"] == pytest.approx(summary["test_top1"])
    top1 = [run["top1"] for run in record["runs"]]
    assert record["mean"]["top1"] == pytest.approx(np.mean(top1))
    assert record["std"]["top1"] == pytest.approx(np.std(top1, ddof=1))
    true, predicted = ([row[name] for row in rows] for name in ("label", "predicted"))
    assert record["confusion"] == confusion_matrix(true, predicted, labels=["dark", "gray", "light"]).tolist()
    for row in rows[:5]:
        p = [float(row[f"p({name})"]) for name in ("dark", "gray", "light")]
        assert sum(p) == pytest.approx(1, abs=1e-4)
        assert row["predicted"] == ("dark", "gray", "light")[int(np.argmax(p))]
    assert record["comparison"]["df"] == 5
    assert "corrected resampled t-test" in printed
    assert record["comparison"]["name"] in (out / "report.html").read_text()

    trained.clear()
    other = tmp_path / "other"
    assert smallvit(*command)[0] == 0
    assert trained == []  # all runs are reused
    same = [*MODEL, *data, "--repeats", 2, "--out", other]
    code, _, err = smallvit("crossval", "--spt", "--lr", "0.01", *same, "--compare", out)
    assert code == 0, err
    compared = json.loads((other / "crossval.json").read_text())["comparison"]
    assert compared["difference"] == pytest.approx(-record["comparison"]["difference"])
    assert compared["p"] == pytest.approx(record["comparison"]["p"])
    code, _, err = smallvit("crossval", *same, "--fold-seed", 3, "--compare", out, "--out", tmp_path / "new")
    assert (code, err.count("\n")) == (2, 1)
    assert f"--compare {out}: fold-seed 0, not 3" in err

    run = out / "vit96-seed0-fold2"  # an ordinary run
    assert smallvit("eval", run)[0] == 0
    metrics = json.loads((run / "eval" / "test" / "metrics.json").read_text())
    assert metrics["top1"] == pytest.approx(record["runs"][1]["top1"])
    for each in (out, run):
        code, shown, err = smallvit("check", image_folder, "--run", each)
        assert (code, err) == (0, "")
        assert "likely wrong labels" in shown
    code, _, err = smallvit("eval", run, *data, "--fold", 1, "--overwrite")
    assert code == 2
    assert "the test split contains images that it was trained on; add --fold 2 as in training" in err


@pytest.mark.slow
def test_a_comparison_with_folds_has_the_same_folds_for_all_rows(
    image_folder: Path, tmp_path: Path, smallvit: Command, trained: list[str]
) -> None:
    shared = [each for each in MODEL if each not in ("--arch", "vit96")]
    rows = ["vit96", "vit96+spt"]
    code, printed, err = smallvit("compare", *rows, *shared, "--data", image_folder, "--folds", 2, "--no-speed")
    assert code == 0, err
    assert trained == [f"{row}-seed0-fold{fold}" for fold in (1, 2) for row in rows]
    with open(tmp_path / "compare" / "images" / "compare.csv", newline="") as file:
        (first, second) = csv.DictReader(file)
    for row in (first, second):
        folders = [tmp_path / "compare" / "images" / f"{row['model']}-seed0-fold{fold}" for fold in (1, 2)]
        top1 = [json.loads((folder / "summary.json").read_text())["test_top1"] for folder in folders]
        assert float(row["test_top1"]) == pytest.approx(np.mean(top1))
        assert (row["folds"], row["seeds"]) == ("2", "2")
    assert "2 folds, the same for all rows" in " ".join(printed.split())


def test_a_recipe_brings_its_architecture_and_plugins() -> None:
    row = crossval_command._row({"data": "digits"}, "quick")
    assert (row.arch, row.options["stem"], row.options["ffn"], row.options["lsa"]) == ("vit", True, True, True)
    assert "lsa" not in crossval_command._row({"data": "digits", "lsa": False}, "quick").options
    assert crossval_command._row({"data": "digits"}, "resnet").arch == "resnet56"


def test_an_automatic_batch_size_is_refused(smallvit: Command, tmp_path: Path) -> None:
    code, _, error = smallvit("crossval", "--data", "digits", "--batch-size", "auto", "--out", tmp_path / "out")
    assert (code, error.count("\n")) == (2, 1)
    assert "--batch-size auto: models that are compared need one batch size" in error
