"""Test the nearest neighbors that a report shows after training without labels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smallvit import Config, embed
from smallvit.datasets import create_dataset
from smallvit.evaluation.embed import find_neighbors
from smallvit.report.run_summary import NEIGHBORS, read_run_summary
from smallvit.runs.curves import read_run
from smallvit.training.train import train

TINY = {"arch": "vit96", "epochs": 1, "batch_size": 32, "amp": "off", "img_size": 8, "objective": "lejepa"}
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write noise without labels."""
    folder = tmp_path_factory.mktemp("noise")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def pooled(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pretrain on digits and noise."""
    options = TINY | {"data": ["digits", str(folder)], "in_chans": 1, "train_fraction": 0.1}
    return train(Config.build(**options, out=str(tmp_path_factory.mktemp("pooled")))).folder


def test_neighbors_are_ranked_by_cosine_similarity() -> None:
    candidates, queries = np.split(np.random.default_rng(0).normal(size=(30, 5)), [22])
    cosine = (queries / np.linalg.norm(queries, axis=1)[:, None]) @ (
        candidates / np.linalg.norm(candidates, axis=1)[:, None]
    ).T
    near = find_neighbors(candidates, 4, queries)
    assert np.array_equal(near.indices, np.argsort(-cosine)[:, :4])
    assert np.allclose(near.similarities, -np.sort(-cosine)[:, :4])
    assert find_neighbors(candidates, 50, queries).indices.shape == (8, 22)
    near = find_neighbors(candidates, 50)
    assert near.indices.shape == (22, 21)
    assert not any(number in row for number, row in enumerate(near.indices))


def test_a_page_of_pooled_images_shows_neighbors_of_validation_images(
    pooled: Path, folder: Path, smallvit: Command
) -> None:
    assert read_run(pooled).data_name.startswith("digits + noise")
    code, out, err = smallvit("report", pooled, "--device", "cpu")
    assert code == 0, err
    assert out.strip() == str(pooled / "report.html")
    result = json.loads((pooled / NEIGHBORS).read_text())
    assert (result["split"], result["images"]) == ("val", 129 + 4)  # a tenth of each
    assert [row["label"] for row in result["queries"]] == [str(digit) for digit in range(10)]
    digits = create_dataset(Config.build(data="digits", train_fraction=0.1).data)
    first = digits.val.subset(np.flatnonzero(digits.val.labels.numpy() == 0)[:1]).pixels[0, 0].numpy()
    others = [*digits.train.pixels[:, 0].numpy()]
    features = embed(pooled, [Image.fromarray(each) for each in (first, *others)], device="cpu", amp="off")
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    similarities = features[1:] @ features[0]
    row = result["queries"][0]["neighbors"]
    best = similarities.argmax()
    assert row[0]["label"] == str(digits.train.labels[best].item())
    assert row[0]["similarity"] == pytest.approx(similarities[best], abs=1e-5)
    page = (pooled / "report.html").read_text()
    for text in ("Nearest neighbors", "Rank of the features", "Next steps", f"smallvit embed {pooled} IMAGES"):
        assert text in page
    command = page.partition("Train again")[2].partition("</code>")[0]
    assert "--objective lejepa" in command
    assert f"--data digits --data {folder}" in command


def test_neighbors_of_other_weights_are_replaced(pooled: Path, smallvit: Command, tmp_path: Path) -> None:
    run = shutil.copytree(pooled, tmp_path / "run")
    shutil.rmtree(run / "neighbors", ignore_errors=True)
    assert smallvit("report", run, "--no-compute", "--overwrite")[1].count("Nearest neighbors are missing") == 1
    assert smallvit("report", run, "--overwrite", "--device", "cpu")[0] == 0
    file = run / NEIGHBORS
    file.write_text(file.read_text().replace('"weights_sha256": "', '"weights_sha256": "0'))
    summary = read_run_summary(run)
    assert summary.neighbors is None
    assert summary.missing[0].startswith("Nearest neighbors are missing: neighbors/neighbors.json is of other weights")
    assert summary.computable == (NEIGHBORS,)


def test_a_page_of_images_without_labels_shows_neighbors_of_training_images(
    folder: Path, tmp_path: Path, smallvit: Command
) -> None:
    run = train(Config.build(**TINY, data=str(folder), out=str(tmp_path / "run"))).folder
    code, out, err = smallvit("report", run, "--device", "cpu")
    assert (code, out.strip()) == (0, str(run / "report.html")), err
    result = json.loads((run / NEIGHBORS).read_text())
    assert (result["split"], result["images"], len(result["queries"])) == ("train", 40, 10)
    assert {each["label"] for row in result["queries"] for each in row["neighbors"]} == {None}
    assert torch.tensor([row["neighbors"][0]["similarity"] for row in result["queries"]]).lt(1).all()  # not itself
    page = (run / "report.html").read_text()
    assert "dimensions that the features use" in page
    assert "0 test images" not in page
    moved = shutil.copytree(folder, tmp_path / "moved")
    shutil.rmtree(run / "neighbors")
    assert smallvit("report", run, "--data", moved, "--overwrite", "--device", "cpu")[0] == 0
    assert (run / NEIGHBORS).exists()
