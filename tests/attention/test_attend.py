"""Test the files of `smallvit attend`, the pictures, and the selection of images."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import smallvit as package
from smallvit import datasets
from smallvit.attention import attend, visualize
from smallvit.cli import main
from smallvit.config.options import DataConfig
from smallvit.models import checkpoint

Command = Callable[..., tuple[int, str, str]]
ON_CPU = ("--amp", "off", "--device", "cpu")
PICTURES = ["overview.png", "heads.png", "temperatures.png", "layers-1.png", "layers-2.png", "layers-3.png"]


def train_briefly(folder: Path, *options: str) -> Path:
    short = ["--epochs", "1", "--train-fraction", "0.1", "--batch-size", "64", "--aug", "none"]
    assert main(["train", *short, *ON_CPU, *options, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def drawn(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw the attention of a model; return the folder."""
    out = tmp_path_factory.mktemp("attention") / "drawn"
    assert main(["attend", str(trained_run), "--count", "3", "--out", str(out), *ON_CPU]) == 0
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw the attention of a ViT without plugins, trained for a moment; return the run folder."""
    run = train_briefly(tmp_path_factory.mktemp("runs") / "plain")
    assert main(["attend", str(run), "--count", "3", *ON_CPU]) == 0
    return run


def read_results(folder: Path) -> dict:
    return json.loads((folder / "attention.json").read_text())


def test_all_files_are_written(drawn: Path) -> None:
    assert sorted(path.name for path in drawn.iterdir()) == sorted([*PICTURES, "attention.json"])
    for name in PICTURES:
        with Image.open(drawn / name) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(2**24)) > 50


def test_statistics(drawn: Path, plain: Path) -> None:
    centers = np.array([(2 * row + 1, 2 * column + 1) for row in range(4) for column in range(4)])
    mean = np.linalg.norm(centers[:, None] - centers[None], axis=2).mean()
    without_plugins = read_results(plain / "attend")["layers"]
    for layers, keys, scale in ((read_results(drawn)["layers"], 16, 16 / 15), (without_plugins, 17, 1)):
        assert [layer["layer"] for layer in layers] == [f"blocks.{depth}.attn" for depth in range(6)]
        for layer in layers:
            assert (layer["grid"], layer["keys"], layer["heads"]) == ([4, 4], 17, 6)
            assert len(layer["entropy"]) == len(layer["distance"]) == 6
            assert all(0 < entropy <= math.log(keys) for entropy in layer["entropy"])
            assert all(0 < distance < 8 * math.sqrt(2) for distance in layer["distance"])
            assert layer["uniform_entropy"] == pytest.approx(math.log(keys))  # LSA masks the token itself
            assert layer["uniform_distance"] == pytest.approx(mean * scale)


def test_temperatures_are_those_of_the_weights(drawn: Path, plain: Path, trained_run: Path) -> None:
    weights, _ = checkpoint.load_weights(trained_run / "best.safetensors")
    for layer in read_results(drawn)["layers"]:
        assert layer["temperature"] == weights[f"{layer['layer']}.temperature"].tolist()
        assert layer["initial_temperature"] == pytest.approx((96 // 6) ** -0.5)
    assert all(layer["temperature"] is None for layer in read_results(plain / "attend")["layers"])


def test_predictions_match_the_model(drawn: Path, trained_run: Path) -> None:
    dataset = datasets.create_dataset(DataConfig())
    model = package.load_model(trained_run)
    mean, std = dataset.statistics(torch.device("cpu"))
    for image in read_results(drawn)["images"]:
        data, split, index = image["source"].split()
        assert (data, split) == ("digits", "test")
        with torch.no_grad():
            probabilities = model((dataset.test.pixels[[int(index)]] / 255 - mean) / std).softmax(dim=1)[0]
        assert image["predicted"] == str(int(probabilities.argmax()))
        assert image["probability"] == pytest.approx(float(probabilities.max()), abs=1e-5)
        assert image["label"] == str(int(dataset.test.labels[int(index)]))


def test_results_record_their_origin(drawn: Path, trained_run: Path) -> None:
    results = read_results(drawn)
    weights = (trained_run / "best.safetensors").read_bytes()
    assert results["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert (results["name"], results["img_size"], results["precision"]) == (str(trained_run), 8, "fp32")
    assert results["command"].startswith("smallvit attend ")
    assert (results["data"], results["split"]) == ("digits", "test")
    assert {"hardware", "versions", "git_revision"} < set(results)


def test_overwrite_replaces_earlier_results_and_keeps_other_files(
    drawn: Path, plain: Path, smallvit: Command, tmp_path: Path
) -> None:
    for name in PICTURES:
        (tmp_path / name).write_bytes((drawn / name).read_bytes())
    other = {"mine.txt", "layers-mine.png", "layers-1.png.png"}
    for name in other:
        (tmp_path / name).write_text("mine")
    arguments = ("attend", plain, "--count", 1, "--out", tmp_path, *ON_CPU)
    code, _, err = smallvit(*arguments)
    assert code == 2
    assert "--overwrite" in err
    code, out, _ = smallvit(*arguments, "--overwrite")
    assert code == 0
    written = {"overview.png", "heads.png", "layers-1.png", "attention.json"}
    assert {path.name for path in tmp_path.iterdir()} == written | other
    assert {Path(line).name for line in out.splitlines() if line.startswith(str(tmp_path))} == written


@pytest.mark.slow
def test_default_folders(trained_run_copy: Path, smallvit: Command, write_images: Callable, tmp_path: Path) -> None:
    (image,) = write_images(tmp_path / "images", 1)
    folders = {
        "attend": [("--count", 1), ("digits", "test")],
        "attend-val": [("--count", 1, "--split", "val"), ("digits", "val")],
        "attend-files": [(image,), (None, None)],
    }
    for folder, (arguments, expected) in folders.items():
        assert smallvit("attend", trained_run_copy, *arguments, *ON_CPU)[0] == 0
        results = read_results(trained_run_copy / folder)
        assert (results["data"], results["split"]) == expected
    assert {path.name for path in trained_run_copy.glob("attend*")} == set(folders)
    assert "--overwrite" in smallvit("attend", trained_run_copy, "--count", 1, *ON_CPU)[2]


@pytest.mark.slow
def test_pooled_keys_are_drawn_over_their_own_grid(smallvit: Command, tmp_path: Path) -> None:
    run = train_briefly(tmp_path / "run", "--recipe", "binaryvit", "--data", "digits")
    code, out, err = smallvit("attend", run, "--count", 2, *ON_CPU)
    assert code == 0, err
    assert "4 × 4" in out
    layers = read_results(run / "attend")["layers"]
    assert [layer["grid"][0] for layer in layers] == [4, 4, 4, 4, 2, 2, 2, 2, 1, 1]
    assert [layer["keys"] for layer in layers] == [layer["grid"][0] ** 2 for layer in layers]
    tokens, keys = (np.arange(count) * 8 / count + 4 / count for count in (8, 4))
    queries, pooled = np.meshgrid(tokens, tokens), np.meshgrid(keys, keys)
    distances = np.hypot(
        *(one.reshape(-1, 1) - other.reshape(1, -1) for one, other in zip(queries, pooled, strict=True))
    )
    assert layers[0]["uniform_distance"] == pytest.approx(distances.mean())
    assert layers[-1]["entropy"] == [0.0] * 8  # a single token
    with Image.open(run / "attend" / "overview.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24)) > 50
    assert smallvit("report", run, "--out", tmp_path / "page.html", "--device", "cpu")[0] == 0
    assert "Attention maps are missing" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_image_files_are_drawn(
    trained_run: Path, smallvit: Command, tmp_path: Path, write_images: Callable[..., list[Path]]
) -> None:
    first, second = write_images(tmp_path / "images", 2, size=(20, 12))
    first = first.rename(first.with_name(os.fsdecode(b"caf\xe9 $x$.png")))
    named = shutil.copytree(trained_run, tmp_path / "run [b] $x$ :smile:")
    out = tmp_path / "attention"
    code, stdout, _ = smallvit("attend", named, first, "--out", out, second, *ON_CPU)
    assert code == 0
    assert "[b] $x$ :smile:" in " ".join(stdout.split())
    images = read_results(out)["images"]
    assert [(image["source"], image["label"]) for image in images] == [(str(first), None), (str(second), None)]
    assert not (out / "layers-3.png").exists()


BAD_INPUT = [
    (["RUN", "none.png"], "none.png: No such file or directory"),
    (["RUN", "FOLDER"], ": a folder without images"),
    (["RUN", "BROKEN"], "broken.png: cannot identify image file"),
    (["RUN", "--split", "tset"], "did you mean 'test'?"),
    (["RUN", "--count", "0"], "--count 0: expected at least 1"),
    (["RUN", "IMAGE", "--count", "1"], "--count has no effect with image files"),
    (["RUN", "IMAGE", "--split", "val"], "--split has no effect with image files"),
    (["RUN", "IMAGE", "--data", "digits"], "--data has no effect with image files"),
    (["RUN", "IMAGE", "--split-seed", "1"], "--split-seed has no effect with image files"),
    (["RUN", "--split-seed", "1"], "--split-seed 0"),
    (["RUN", "--data", "FOLDER"], "channels"),
    (["WEIGHTS"], "--data"),
    (["runs/none"], "runs/none: no such file or folder"),
    (["RUN", "--epochs", "3"], "--epochs"),
]


def test_bad_input_is_a_one_line_error(
    trained_run: Path, image_folder: Path, smallvit: Command, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_text("no image")
    (tmp_path / "alone.safetensors").write_bytes((trained_run / "best.safetensors").read_bytes())
    paths = {"RUN": trained_run, "FOLDER": image_folder}
    paths |= {"WEIGHTS": tmp_path / "alone.safetensors", "IMAGE": image_folder / "dark" / "000.png"}
    paths |= {"BROKEN": tmp_path / "broken.png"}
    out, failures = tmp_path / "attention", []
    for arguments, message in BAD_INPUT:
        code, _, err = smallvit("attend", *[paths.get(each, each) for each in arguments], "--out", out, *ON_CPU)
        lines = [line for line in err.splitlines() if line.startswith("smallvit:")]
        if code != 2 or len(lines) != 1 or message not in lines[0] or out.exists():
            failures.append(f"{arguments}: {code} {err}")
    assert not failures, "\n".join(failures)


def test_weights_file_needs_an_output_folder(trained_run: Path, smallvit: Command, tmp_path: Path) -> None:
    file = trained_run / "best.safetensors"
    assert "add --out DIR" in smallvit("attend", file, *ON_CPU)[2]
    assert smallvit("attend", file, "--count", 1, "--out", tmp_path / "attention", *ON_CPU)[0] == 0


def test_cnn_has_no_attention(smallvit: Command, tmp_path: Path) -> None:
    spec = {"arch": "resnet20", "img_size": 8, "num_classes": 10, "in_chans": 1}
    data = {"name": "digits", "class_names": list("0123456789"), "mean": [0.5], "std": [0.2]}
    weights = checkpoint.snapshot(package.create_model(**spec))
    checkpoint.save_weights(tmp_path / "cnn.safetensors", weights, {"model": spec, "data": data})
    code, _, err = smallvit(
        "attend", tmp_path / "cnn.safetensors", "--data", "digits", "--out", tmp_path / "out", *ON_CPU
    )
    assert code == 2
    assert "has no attention between tokens" in err


def test_interruption_leaves_earlier_files(
    trained_run: Path, smallvit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (existing := tmp_path / "existing").mkdir()
    (existing / "attention.json").write_text("{}")
    (existing / "overview.png").write_text("old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", interrupt)
    for out in (tmp_path / "new", existing):
        assert smallvit("attend", trained_run, "--count", 1, "--out", out, "--overwrite", *ON_CPU)[0] == 130
    assert not (tmp_path / "new").exists()
    files = {path.name: path.read_text() for path in existing.iterdir()}
    assert files == {"attention.json": "{}", "overview.png": "old"}


def test_unwritable_folder_is_an_error_before_computing(
    trained_run: Path, smallvit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(attend, "load_predictor", None)
    for path in ("file", "file/below"):
        code, _, err = smallvit("attend", trained_run, "--out", tmp_path / path, "--overwrite", *ON_CPU)
        assert (code, len(err.splitlines())) == (2, 1)
        assert "a file, not a folder" in err
    assert (tmp_path / "file").read_text() == "mine"


def test_corrupt_images_of_streamed_data_are_skipped(image_folder: Path, tmp_path: Path, smallvit: Command) -> None:
    torch.manual_seed(0)
    spec = {"arch": "vit", "img_size": 16, "num_classes": 3, "in_chans": 3}
    names = sorted(path.name for path in image_folder.iterdir())
    data = {"name": "images", "class_names": names, "mean": [0.5] * 3, "std": [0.2] * 3}
    weights = checkpoint.snapshot(package.create_model(**spec))
    checkpoint.save_weights(tmp_path / "m.safetensors", weights, {"model": spec, "data": data})
    for path in (image_folder / "dark").iterdir():
        path.write_text("no image")
    options = ("--data", image_folder, "--streaming", "on", "--count", 3, "--out", tmp_path / "attention", *ON_CPU)
    code, _, err = smallvit("attend", tmp_path / "m.safetensors", *options, "--skip-corrupt")
    assert code == 0
    assert "skipped: " in err
    assert "dark/" in err
    images = read_results(tmp_path / "attention")["images"]
    assert [image["label"] for image in images] == names[1:]
    assert Path(images[0]["source"]).parent.name == names[1]


@pytest.mark.slow
def test_changed_test_split_gives_a_warning(
    image_folder: Path, write_images: Callable[..., list[Path]], tmp_path: Path, smallvit: Command
) -> None:
    run = train_briefly(tmp_path / "run", "--data", str(image_folder), "--arch", "vit", "--img-size", "8")
    write_images(image_folder / "dark", 21, 40)
    code, _, err = smallvit("attend", run, "--count", "2", *ON_CPU)
    assert code == 0
    assert "trained" in err
    assert smallvit("attend", run, "--split", "train", "--count", "2", *ON_CPU)[0] == 0


# Pictures


def test_overlay_is_brightest_at_the_maximum() -> None:
    gray = np.full((1, 8, 12), 100, dtype=np.uint8)
    for smooth in (False, True):
        for token in ((0, 0), (1, 2), (3, 5)):
            weights = np.zeros((4, 6))
            weights[token] = 1
            panel = visualize.overlay_map(gray, weights, 0, 1, (64, 96), smooth=smooth).astype(float).sum(axis=0)
            means = panel.reshape(4, 16, 6, 16).mean(axis=(1, 3))
            assert np.unravel_index(means.argmax(), means.shape) == token
            if not smooth:
                others = np.delete(means.flatten(), 6 * token[0] + token[1])
                np.testing.assert_allclose(others, others[0])


def test_image_is_visible_below_the_overlay() -> None:
    image = np.zeros((3, 8, 8), dtype=np.uint8)
    image[:, :, 4:] = 255
    drawn = visualize.overlay_map(image, np.ones((2, 2)), 0, 1, (32, 32)).astype(float)
    assert (drawn[:, :, 16:] > drawn[:, :, :16] + 60).all()


def test_uniform_map_is_one() -> None:
    np.testing.assert_allclose(visualize.relative_to_uniform(np.full((3, 5), 0.02)), 1)
    assert np.isfinite(visualize.relative_to_uniform(np.zeros((2, 2)))).all()


def test_layers_and_heads_are_limited(tmp_path: Path) -> None:
    assert visualize.select_evenly(3, 12) == [0, 1, 2]
    assert visualize.select_evenly(25, 4) == [0, 8, 16, 24]
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, 16, 16)).astype(np.uint8)
    sizes = []
    for depth in (3, 12, 24):
        maps = {f"layers.{index}.long_name.attn": rng.random((8 * (index + 1), 4, 4)) for index in range(depth)}
        visualize.draw_layers(image, "a label", maps, tmp_path / "layers.png")
        with Image.open(tmp_path / "layers.png") as picture:
            sizes.append(picture.size)
    assert sizes[0][0] == sizes[1][0]
    assert sizes[0][1] < sizes[1][1] == sizes[2][1]


def test_images_are_drawn_by_whole_factors_or_reduced() -> None:
    drawn = {8: 128, 48: 96, 64: 128, 100: 100, 128: 128, 224: 128}
    for size, side in drawn.items():
        assert visualize._drawn_sides((size, size), 128) == (side, side)
        assert visualize._drawn_sides((size // 2, size), 128) == (side // 2, side)


def test_images_are_selected_evenly_over_the_classes() -> None:
    dataset = datasets.create_dataset(DataConfig())
    console = Console(quiet=True)
    for count, least in ((5, 0), (10, 1), (40, 3)):
        examples = attend.examples_from_split(dataset, "test", count, console)
        counts = np.bincount([int(each.label) for each in examples], minlength=10)
        assert counts.sum() == count
        assert counts.min() >= least
    assert len(attend.examples_from_split(dataset, "test", 10**6, console)) == len(dataset.test)
