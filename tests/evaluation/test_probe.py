"""Test evaluating features with classifiers of scikit-learn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import smallvit as package
from smallvit import datasets
from smallvit.config.options import DataConfig
from smallvit.evaluation import probe as probing
from smallvit.evaluation.probe import Features
from smallvit.models import checkpoint

Command = Callable[..., tuple[int, str, str]]
KEYS = {"name", "data", "linear_top1", "linear_val_top1", "C", "knn_top1", "k", "features", "images"}
MACHINE = {"img_size", "precision", "hardware", "versions", "git_revision"}


@pytest.fixture
def run(trained_run: Path) -> Path:
    """Return a run on the digits."""
    return trained_run


@pytest.fixture
def blank(run: Path, tmp_path: Path) -> Path:
    """Save the same model with random weights."""
    _, metadata = checkpoint.load_weights(run / "best.safetensors")
    torch.manual_seed(0)
    weights = checkpoint.snapshot(package.create_model(**metadata["model"]))
    checkpoint.save_weights(tmp_path / "blank.safetensors", weights, metadata)
    return tmp_path / "blank.safetensors"


@pytest.fixture
def probe(smallvit: Command, tmp_path: Path) -> Callable[..., dict]:
    """Probe on a CPU in fp32; returns the figures."""

    def probed(*arguments: object) -> dict:
        out = tmp_path / "probe.json"
        code, _, err = smallvit("probe", *arguments, "--amp", "off", "--device", "cpu", "--out", out, "--overwrite")
        assert code == 0, err
        return json.loads(out.read_text())

    return probed


def by_hand(run: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the class tokens after the last norm of the digits' splits normalized as in the run."""
    model = package.load_model(run)
    model.head = torch.nn.Identity()
    dataset, splits = datasets.create_dataset(DataConfig()), {}
    mean, std = (torch.tensor(values)[:, None, None] for values in (dataset.mean, dataset.std))
    for split in ("train", "val", "test"):
        part = getattr(dataset, split)
        with torch.no_grad():
            result = model((part.pixels / 255 - mean) / std)
        splits[split] = result.double().numpy(), part.labels.numpy()
    return splits


def test_the_figures_are_those_of_scikit_learn_on_features_by_hand(run: Path, probe: Callable[..., dict]) -> None:
    result, splits = probe(run), by_hand(run)
    scaler = StandardScaler().fit(splits["train"][0])
    scaled = {split: (scaler.transform(values), labels) for split, (values, labels) in splits.items()}
    linear = {c: LogisticRegression(C=c, max_iter=1000).fit(*scaled["train"]) for c in probing.STRENGTHS}
    val = [linear[c].score(*scaled["val"]) for c in probing.STRENGTHS]
    assert result["C"] == probing.STRENGTHS[int(np.argmax(val))]
    assert result["linear_val_top1"] == pytest.approx(100 * max(val))
    assert result["linear_top1"] == pytest.approx(100 * linear[result["C"]].score(*scaled["test"]))
    neighbors = KNeighborsClassifier(20, weights="distance", metric="cosine").fit(*splits["train"])
    assert result["knn_top1"] == pytest.approx(100 * neighbors.score(*splits["test"]))


def test_of_few_images_training_makes_more_than_random_weights_do(
    run: Path, blank: Path, probe: Callable[..., dict]
) -> None:
    trained, random = (probe(name, "--data", "digits", "--train-fraction", 0.05) for name in (run, blank))
    for figure in ("linear_top1", "knn_top1"):
        assert trained[figure] > 85
        assert trained[figure] > random[figure] + 5


def test_the_figures_come_with_all_that_decides_them(run: Path, probe: Callable[..., dict]) -> None:
    result = probe(run)
    assert set(result) == KEYS | MACHINE
    assert (result["name"], result["data"], result["features"], result["k"]) == (str(run), "digits", 96, 20)
    assert result["images"] == {"train": 1295, "val": 143, "test": 359}
    assert "scikit-learn" in result["versions"]


def test_without_validation_images_c_is_one(run: Path, probe: Callable[..., dict]) -> None:
    result = probe(run, "--val-fraction", 0)
    assert (result["C"], result["linear_val_top1"], result["images"]["val"]) == (1.0, None, 0)


@pytest.mark.slow
def test_images_of_another_size_need_only_be_asked_for(run: Path, probe: Callable[..., dict]) -> None:
    result = probe(run, "--img-size", 12)
    assert result["img_size"] == 12
    assert result["linear_top1"] > 50


def test_a_folder_gives_the_same_streamed_as_from_memory(
    image_folder: Path, tmp_path: Path, probe: Callable[..., dict]
) -> None:
    torch.manual_seed(0)
    model = package.create_model("vit", img_size=16, num_classes=2, drop_path_rate=0.0)
    spec = {"arch": "vit", "img_size": 16, "in_chans": 3, "num_classes": 2, "drop_path_rate": 0.0}
    data = {"name": "x", "class_names": ["a", "b"], "mean": [0.5] * 3, "std": [0.25] * 3}
    path = tmp_path / "color.safetensors"
    checkpoint.save_weights(path, checkpoint.snapshot(model), {"model": spec, "data": data})
    (image_folder / "dark" / "broken.png").write_bytes(b"no image")
    kept = probe(path, "--data", image_folder, "--skip-corrupt")
    streamed = probe(path, "--data", image_folder, "--skip-corrupt", "--streaming", "on", "--workers", 0)
    assert kept["linear_top1"] == 100  # gray levels that tell the class
    assert kept["k"] == 14
    assert sum(kept["images"].values()) == sum(streamed["images"].values()) == 60
    assert streamed["linear_top1"] == streamed["knn_top1"] == 100


def test_images_are_normalized_as_the_model_wants_them(
    run: Path, probe: Callable[..., dict], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []
    extract = probing.extract_features

    def look(model: object, batches: object, *arguments: object) -> Features:
        batches = list(batches)
        seen.append(torch.cat([images for images, _ in batches]))
        return extract(model, batches, *arguments)

    monkeypatch.setattr(probing, "extract_features", look)
    weights, metadata = checkpoint.load_weights(run / "best.safetensors")
    metadata["data"] |= {"mean": [0.1], "std": [0.2]}
    checkpoint.save_weights(tmp_path / "other.safetensors", weights, metadata)
    probe(tmp_path / "other.safetensors", "--data", "digits")
    expected = (datasets.create_dataset(DataConfig()).train.pixels / 255 - 0.1) / 0.2
    torch.testing.assert_close(seen[0], expected)


def test_balanced_weighs_classes_alike() -> None:
    rng = np.random.default_rng(0)
    labels = np.array([0] * 190 + [1] * 10)
    values = rng.normal(labels[:, None] * 1.5, 1, (200, 2))
    evenly = Features(rng.normal(np.repeat([0, 1.5], 100)[:, None], 1, (200, 2)), np.repeat([0, 1], 100))
    with probing.Progress(disable=True) as bar:
        plain, balanced = (
            probing.fit_classifiers({"train": Features(values, labels), "test": evenly}, bar, balanced=each)
            for each in (False, True)
        )
    assert balanced["linear_top1"] > plain["linear_top1"] + 5
    assert plain["k"] == 20


def test_another_programs_file_is_probed_by_its_architecture(
    tmp_path: Path, image_folder: Path, probe: Callable[..., dict], smallvit: Command
) -> None:
    torch.manual_seed(0)
    path = tmp_path / "plain.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), path)
    result = probe(path, "--arch", "test_vit", "--data", image_folder, "--img-size", 32)
    assert result["features"] == 64
    assert smallvit("probe", path, "--data", image_folder)[::2] == (
        2,
        f"smallvit: probe {path}: this file of another program does not name its model; add --arch\n",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/none"], "probe runs/none: no such file or folder"),
        ([], "RUN is missing; use smallvit probe"),
        (["RUN", "--epochs", "3"], "--epochs: no such option"),
        (["RUN", "--arch", "vit"], "remove --arch"),
        (["RUN", "--split-seed", "1"], "add --split-seed 0 as in training"),
        (["RUN", "--data", "FOLDER"], "takes images with 1 channels, those of images have 3"),
        (["RUN", "--img-size", "1"], "--img-size 1"),
        (["RUN", "--out", "probe.txt"], "expected a name that ends in .json"),
        (["RUN", "--out", "none/probe.json"], "no such folder"),
        (["deit_tiny_patch16_242"], "did you mean 'deit_tiny_patch16_224'?"),
    ],
)
def test_bad_input_gets_one_line(
    run: Path, image_folder: Path, smallvit: Command, arguments: list[str], message: str
) -> None:
    paths_by_name = {"RUN": str(run), "FOLDER": str(image_folder)}
    code, out, err = smallvit("probe", *[paths_by_name.get(argument, argument) for argument in arguments])
    assert code == 2
    assert "linear" not in out
    assert message in err
    assert len(err.splitlines()) == 1


def test_without_data_a_runs_own_is_probed(
    image_folder: Path, tmp_path: Path, smallvit: Command, probe: Callable[..., dict]
) -> None:
    arguments = ["--data", image_folder, "--img-size", 8, "--test-fraction", 0.5, "--epochs", 1, "--batch-size", 8]
    assert smallvit("train", "--arch", "vit", *arguments, "--out", tmp_path / "own")[0] == 0
    result = probe(tmp_path / "own")
    assert (result["data"], result["images"]["test"]) == ("images", 30)


def test_figures_are_not_overwritten_unasked(run: Path, smallvit: Command, tmp_path: Path) -> None:
    out = tmp_path / "probe.json"
    out.write_text("mine")
    code, _, err = smallvit("probe", run, "--out", out)
    assert code == 2
    assert "already exists; choose another name, or add --overwrite" in err
    assert out.read_text() == "mine"


def test_weights_that_give_no_finite_features_are_refused(run: Path, smallvit: Command, tmp_path: Path) -> None:
    weights, metadata = checkpoint.load_weights(run / "best.safetensors")
    name = next(name for name in weights if name.endswith("norm.weight"))
    weights[name] = torch.full_like(weights[name], torch.nan)
    path = tmp_path / "broken.safetensors"
    checkpoint.save_weights(path, weights, metadata)
    code, _, err = smallvit("probe", path, "--data", "digits")
    assert code == 2
    assert f"probe {path}: the features are not finite" in err
