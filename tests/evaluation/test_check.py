"""Test that planted duplicates, damaged files, unusual classes and wrong labels are all listed, and nothing else."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from smallvit.evaluation import check

Command = Callable[..., tuple[int, str, str]]


def draw(seed: int) -> Image.Image:
    """Return a smooth picture that no other seed resembles."""
    pixels = np.random.default_rng(seed).integers(40, 200, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC)


def recompress(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return Image.open(file)


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """Write a folder with duplicates within and across splits, and other problems."""
    for number, name in enumerate(("train/cat", "train/Cat ", "train/dog", "test/cat", "test/Cat ", "test/dog")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(6 if name != "train/dog" else 3):
            draw(10 * number + index).save(tmp_path / "data" / name / f"{index}.png")
    copies = {
        "train/cat/copy.bmp": draw(0),
        "test/cat/copy.png": draw(1),
        "test/cat/resized.png": draw(2).resize((57, 57), Image.Resampling.BICUBIC),
        "test/cat/jpeg.png": recompress(draw(3)),
        "test/dog/brighter.png": ImageEnhance.Brightness(draw(4)).enhance(1.15),
    }
    for name, image in copies.items():
        image.save(tmp_path / "data" / name)
    for index in range(3):  # plain images of one color resemble none
        Image.new("L", (8, 8), 50 * index).save(tmp_path / "data" / "test" / "dog" / f"plain{index}.png")
    (tmp_path / "data" / "test" / "dog" / "damaged.png").write_bytes(b"no image")
    return tmp_path / "data"


def test_all_planted_problems_are_listed(planted: Path, tmp_path: Path, smallvit: Command) -> None:
    code, shown, err = smallvit("check", planted, "--out", tmp_path / "page.html")
    assert code == 0, err
    results = json.loads((tmp_path / "page.json").read_text())
    groups = {tuple(sorted(each["path"] for each in group["images"])): group for group in results["duplicates"]}
    assert {paths: group["kind"] for paths, group in groups.items()} == {
        ("train/cat/0.png", "train/cat/copy.bmp"): "exact",
        ("test/cat/copy.png", "train/cat/1.png"): "exact",
        ("test/cat/resized.png", "train/cat/2.png"): "near",
        ("test/cat/jpeg.png", "train/cat/3.png"): "near",
        ("test/dog/brighter.png", "train/cat/4.png"): "near",
    }
    assert [group["across_splits"] for group in results["duplicates"]] == [True] * 4 + [False]
    assert [group["labels_differ"] for group in results["duplicates"]] == [True] + [False] * 4
    assert [each["path"] for each in results["unreadable"]] == ["test/dog/damaged.png"]
    assert results["similar_names"] == [["Cat ", "cat"]]
    assert results["small_classes"] == [{"name": "dog", "images": 3}]
    assert results["classes"][1] == {"name": "cat", "train": 7, "test": 9}
    assert results["sizes"] == {"40 x 40": 37, "8 x 8": 3, "57 x 57": 1}
    assert results["modes"] == {"RGB": 38, "L": 3}
    page = (tmp_path / "page.html").read_text()
    assert page.count('alt="" width="96"') == 10
    for text in ("test/dog/damaged.png", "near, across splits, labels differ", "test/cat/jpeg.png (cat)"):
        assert text in page
        assert text in shown
    for path in (planted / "test" / "dog").glob("*r*.png"):
        path.unlink()
    code, shown, _ = smallvit("check", planted, "--strict", "--similarity", 1)
    assert code == 1
    assert "near" not in shown.partition("groups of duplicates:")[2]
    assert "exact, across splits" in shown


def test_data_without_findings_and_data_in_memory(tmp_path: Path, smallvit: Command) -> None:
    for number in range(12):
        folder = tmp_path / "clean" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        draw(number).save(folder / f"{number}.png")
    assert smallvit("check", tmp_path / "clean", "--strict")[0] == 0
    code, shown, err = smallvit("check", "digits")
    assert (code, err) == (0, "")
    assert "digits: 1,797 images of 10 classes\nsizes: 8 x 8 (1,797)\nmodes: L (1,797)" in shown


def test_chunks_find_the_pairs_of_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(40, 3))
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    linked = np.linalg.matrix_power((values @ values.T >= 0.97).astype(float) + np.eye(40), 40) > 0
    expected = {tuple(np.flatnonzero(row)) for row in linked if row.sum() > 1}
    monkeypatch.setattr(check, "CHUNK", 7)
    groups = check.find_duplicates([bytes([index]) for index in range(40)], list(values), 0.97)
    assert {tuple(group) for group in groups} == expected
    assert len(expected) > 3
    assert check.find_duplicates([], [], 0.97) == []


def test_wrong_labels_follow_from_confident_learning() -> None:
    """Thresholds by hand: class 0 (0.9 + 0.8 + 0.1) / 3 = 0.6, class 1 (0.7 + 0.2 + 0.6) / 3 = 0.5, class 2 none."""
    labels = np.array([0, 0, 0, 1, 1, 1])
    probabilities = np.array(
        [
            [0.9, 0.1, 0.0],
            [0.8, 0.1, 0.1],
            [0.1, 0.85, 0.05],  # above 0.5 for class 1: wrong, margin 0.1 - 0.85
            [0.3, 0.7, 0.0],
            [0.65, 0.2, 0.15],  # above 0.6 for class 0: wrong, margin 0.2 - 0.65
            [0.1, 0.6, 0.3],
        ]
    )
    wrong, classes = check.find_wrong_labels(labels, probabilities)
    assert (wrong.tolist(), classes.tolist()) == ([2, 4], [1, 0])
    probabilities[4] = [0.55, 0.2, 0.25]  # below 0.6: the most likely class is not confident
    assert check.find_wrong_labels(labels, probabilities)[0].tolist() == [2]


def write_predictions(folder: Path, rows: list[list[object]], names: tuple[str, ...]) -> Path:
    folder.mkdir(exist_ok=True)
    with open(folder / "predictions.csv", "w", newline="") as file:
        header = ["fold_seed", "fold", "path", "label", "predicted", *(f"p({name})" for name in names)]
        csv.writer(file).writerows([header, *rows])
    return folder


def test_wrong_labels_do_not_depend_on_how_training_weighed_the_classes() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(range(3), (80, 15, 5))
    probabilities = rng.dirichlet((1, 1, 1), 100) + 2 * np.eye(3)[labels]
    matched = check.match_frequencies(labels, probabilities / probabilities.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(matched.mean(axis=0), [0.8, 0.15, 0.05], atol=1e-6)
    np.testing.assert_allclose(matched.sum(axis=1), 1)
    adjusted = matched / [0.8, 0.15, 0.05]  # as after training with logit adjustment
    adjusted /= adjusted.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(check.match_frequencies(labels, adjusted), matched, atol=1e-4)
    never = np.array([[1.0, 0.0], [1.0, 0.0]])
    np.testing.assert_array_equal(check.match_frequencies(np.array([0, 1]), never), never)


def test_predictions_of_a_cross_validation_list_wrong_labels(
    image_folder: Path, tmp_path: Path, smallvit: Command
) -> None:
    names = ("light", "dark", "gray")  # in another order than the data's
    rows: list[list[object]] = []
    for path in sorted(image_folder.rglob("*.png")):
        label = "gray" if path.name == "003.png" else path.parent.name
        for repeat, p in enumerate((0.6, 1.0)):  # the mean is 0.8
            values = [p if name == label else (1 - p) / 2 for name in names]
            rows.append([repeat, 1, path.relative_to(image_folder), path.parent.name, label, *values])
    out = tmp_path / "page.html"
    run = write_predictions(tmp_path / "cv", rows, names)
    code, shown, err = smallvit("check", image_folder, "--run", run, "--out", out, "--strict")
    assert code == 1, err
    findings = json.loads(out.with_suffix(".json").read_text())["wrong_labels"]
    assert [(each["path"], each["likely"]) for each in findings] == [
        ("dark/003.png", "gray"),
        ("light/003.png", "gray"),
    ]
    pairs = [(each["p_label"], each["p_likely"]) for each in findings]
    assert pairs == [pytest.approx((0.1, 0.8), abs=0.04)] * 2  # matched to the labels' frequencies
    assert f"dark/003.png: dark ({100 * pairs[0][0]:.0f} %), likely gray ({100 * pairs[0][1]:.0f} %)" in shown


def test_unusable_input_is_one_line(image_folder: Path, tmp_path: Path, smallvit: Command) -> None:
    names = ("dark", "gray", "light")
    other = write_predictions(tmp_path / "other", [[0, 1, "x.png", "dark", "dark", 1, 0, 0]], names)
    damaged = write_predictions(tmp_path / "damaged", [[0, 1, "x.png", "dark", "dark", 1, "?", 0]], names)
    fewer = write_predictions(tmp_path / "fewer", [[0, 1, "x.png", "dark", "dark", 1, 0]], names[:2])
    for arguments, message in (
        (["missing"], "--data missing: no such data set or folder"),
        ([], "DATA: the value is missing"),
        ([image_folder, "--similarity", 0], "--similarity 0.0: expected above 0 and at most 1"),
        ([image_folder, "--out", "page.txt"], "--out page.txt: expected a name that ends in .html"),
        ([image_folder, "--run", tmp_path / "none"], "none: no such file or folder"),
        ([image_folder, "--run", other], "none of its predictions is of an image file of"),
        ([image_folder, "--run", damaged], "predictions.csv cannot be used (could not convert string to float: '?')"),
        ([image_folder, "--run", fewer], "it does not know class 'light'"),
    ):
        code, _, err = smallvit("check", *arguments)
        assert (code, err.count("\n")) == (2, 1), (arguments, err)
        assert message in err
