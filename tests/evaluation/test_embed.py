"""Test features of images and their nearest neighbors."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow.parquet import read_table

import smallvit as package
from smallvit.evaluation.embed import find_neighbors
from smallvit.utils.errors import InputError

Command = Callable[..., tuple[int, str, str]]
CPU = ["--device", "cpu", "--amp", "off"]


@pytest.fixture
def gray(tmp_path: Path) -> Path:
    """Write gray images of the run's size, one file that is no image, and a table of the images."""
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for index in range(7):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{index}.png")
    (folder / "damaged.png").write_text("no image")
    (folder / "notes.txt").write_text("no image either")
    (tmp_path / "table.csv").write_text("path\n" + "".join(f"images/{index}.png\n" for index in range(7)))
    return folder


def expected_features(run: Path, folder: Path) -> np.ndarray:
    """Compute the features by Pillow, NumPy and the loaded model."""
    model = package.load_model(run)
    pixels = np.stack([np.asarray(Image.open(folder / f"{index}.png")) for index in range(7)])[:, None] / 255
    cfg = model.pretrained_cfg
    images = torch.from_numpy((pixels - cfg["mean"][0]) / cfg["std"][0]).float()
    with torch.inference_mode():
        return model.forward_head(model.forward_features(images), pre_logits=True).numpy()


def test_files_hold_the_models_features_and_neighbors(
    trained_run: Path, gray: Path, tmp_path: Path, smallvit: Command
) -> None:
    expected = expected_features(trained_run, gray)
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    cosine = unit @ unit.T - 2 * np.eye(7)
    order = (-cosine).argsort(axis=1)[:, :3]
    for suffix in ("npy", "parquet"):
        out = tmp_path / f"features.{suffix}"
        code, printed, err = smallvit("embed", trained_run, gray, "--out", out, "--neighbors", "3", *CPU)
        assert code == 0
        assert printed.startswith(f"7 images, {expected.shape[1]} features\n{out}\n")
        unreadable = f"1 of 8 images cannot be read: {gray / 'damaged.png'} (cannot identify image file)"
        assert err == f"ignored: 1 TXT file\n{unreadable}\n"
    np.testing.assert_allclose(np.load(tmp_path / "features.npy"), expected, atol=1e-5)
    _, *rows = csv.reader((tmp_path / "features.neighbors.csv").open())
    names = [row[0] for row in rows]
    assert names == [str(gray / f"{index}.png") for index in range(7)]
    assert [[names.index(name) for name in row[1::2]] for row in rows] == order.tolist()
    similarities = np.take_along_axis(cosine, order, axis=1)
    np.testing.assert_allclose(np.array([row[2::2] for row in rows], float), similarities, atol=1e-3)
    table = read_table(tmp_path / "features.parquet").to_pydict()
    np.testing.assert_allclose(np.array(table["features"]), expected, atol=1e-5)
    assert table["path"] == names
    assert table["neighbors"] == [row[1::2] for row in rows]
    np.testing.assert_allclose(np.array(table["similarities"]), similarities, atol=1e-5)


def test_a_table_names_the_images(trained_run: Path, gray: Path, tmp_path: Path, smallvit: Command) -> None:
    out = tmp_path / "features.npy"
    assert smallvit("embed", trained_run, "--data", gray.parent / "table.csv", "--out", out, *CPU)[0] == 0
    np.testing.assert_allclose(np.load(out), expected_features(trained_run, gray), atol=1e-5)
    images = [gray / f"{index}.png" for index in range(7)]
    np.testing.assert_array_equal(package.embed(trained_run, images, device="cpu", amp="off"), np.load(out))


def test_few_images_have_fewer_neighbors() -> None:
    assert find_neighbors(np.ones((1, 4), np.float32), 5).indices.shape == (1, 0)
    assert find_neighbors(np.eye(2, dtype=np.float32), 5).indices.tolist() == [[1], [0]]
    assert find_neighbors(np.eye(2, dtype=np.float32), 0).indices.shape == (2, 0)


def test_bad_input_writes_nothing(trained_run: Path, gray: Path, tmp_path: Path, smallvit: Command) -> None:
    existing = tmp_path / "old.neighbors.csv"
    existing.write_text("mine")
    for arguments, message in (
        ([gray, "--out", tmp_path / "features.txt"], "expected a name that ends in .npy or .parquet"),
        ([gray, "--out", tmp_path / "old.npy"], f"--out {existing}: already exists"),
        ([gray / "damaged.png", "--out", tmp_path / "new.npy"], "1 of 1 images cannot be read"),
        ([gray, "--out", tmp_path / "new.npy", "--neighbors", "-1"], "--neighbors -1: expected at least 0"),
        ([gray], "--out FILE: the value is missing"),
        (["--data", tmp_path / "t.parquet", "--out", tmp_path / "t.parquet"], "is the table of --data"),
    ):
        code, out, err = smallvit("embed", trained_run, *arguments, *CPU)
        assert (code, out) == (2, "")
        assert message in err
    assert existing.read_text() == "mine"
    assert not [*tmp_path.glob("*.npy"), *tmp_path.glob("*.txt")]
    with pytest.raises(InputError, match=r"damaged\.png: cannot identify image file"):
        package.embed(trained_run, gray)
