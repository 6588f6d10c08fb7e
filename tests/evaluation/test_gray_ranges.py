"""Runs on images of more than 8 bits: the range of the training images is used again by every verb."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smallvit import datasets
from smallvit.config.config import Config
from smallvit.config.options import DataConfig
from smallvit.datasets.gray import GrayRanges
from smallvit.evaluation import evaluator
from smallvit.evaluation.predict import decode
from smallvit.evaluation.predictor import load_predictor
from smallvit.export.timm_folder import build_config as timm_config
from smallvit.export.verify import build_metadata
from smallvit.models import weights_info
from smallvit.models.checkpoint import load_model

Command = Callable[..., tuple[int, str, str]]
QUICK = ("--arch", "vit", "--epochs", 1, "--device", "cpu", "--amp", "off", "--compile", "off", "--batch-size", 8)


def photographs(folder: Path, full: int, count: int = 10) -> None:
    """Write two classes of 12-bit images, none brighter than `full`."""
    for name, share in (("dim", 0.4), ("lit", 1.0)):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            ramp = np.tile(np.linspace(0, full * share, 16), (16, 1)).astype(np.uint16)
            Image.fromarray(ramp).save(folder / name / f"{index}.png")


@pytest.mark.slow
def test_a_model_sees_gray_values_as_in_its_training(
    tmp_path: Path, smallvit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    photographs(tmp_path / "photos", 4000)
    monkeypatch.chdir(tmp_path / "photos")
    code, out, err = smallvit("train", "--data", ".", *QUICK)  # the run's folder lies within the data
    assert code == 0, err
    assert "0 to 4,000 become 0 to 255 (the range of the training images)" in out
    run = next((tmp_path / "photos" / "runs").iterdir())
    info = weights_info.read_weights_info(str(run), "eval")
    assert info.gray_ranges == GrayRanges(integer=(0, 4000))
    assert load_model(run).pretrained_cfg["gray_ranges"]["integer"] == [0, 4000]

    bright = tmp_path / "bright.png"
    Image.fromarray(np.full((16, 16), 2000, np.uint16)).save(bright)
    model = load_predictor(str(run), "predict", device="cpu", amp="off")
    pixels, note = decode(model, str(bright))
    assert pixels.flatten().tolist() == [128] * pixels.size  # by its own range it would be black or white
    code, out, err = smallvit("predict", run, bright, tmp_path / "photos" / "dim", "--device", "cpu", "--amp", "off")
    assert code == 0
    assert f"11 of 11 images have {note}" in err
    assert json.loads(build_metadata(model)["gray_ranges"])["integer"] == [0, 4000]
    assert "0 to 4,000 become 0 to 255" in build_metadata(model)["preprocessing"]
    assert timm_config(model)["gray_ranges"]["integer"] == [0, 4000]

    photographs(tmp_path / "others", 2000)  # evaluated with the model's range, not by their own
    config = Config.build(data=str(tmp_path / "others"), device="cpu", amp="off")
    (task,) = evaluator.create_tasks(str(run), [info], config, "test")
    assert task.dataset.gray_ranges == info.gray_ranges
    assert task.dataset.test.pixels.max() == 128
    assert smallvit("attend", run, bright, "--out", tmp_path / "seen", "--device", "cpu", "--amp", "off")[0] == 0

    code, out, err = smallvit(
        "train", "--data", ".", *QUICK, "--keep-resume"
    )  # again, with two runs in the data, then resumed
    assert code == 0, err
    assert "ignored: runs/vit-photos/ (a run)" in out
    first, second = sorted((tmp_path / "photos" / "runs").iterdir())
    (second / "summary.json").unlink()
    assert smallvit("train", "--resume", second)[0] == 0
    contents = [
        weights_info.read_weights_info(str(each), "eval").training_data["fingerprint"] for each in (first, second)
    ]
    assert contents[0] == contents[1]
    assert len(datasets.create_dataset(DataConfig(data=".")).train) == 14


def test_a_model_of_8_bits_says_how_it_reads_others(tmp_path: Path, smallvit: Command) -> None:
    assert smallvit("train", "--data", "digits", "--out", tmp_path / "run", *QUICK, "--train-fraction", 0.02)[0] == 0
    assert weights_info.read_weights_info(str(tmp_path / "run"), "eval").gray_ranges == GrayRanges()
    Image.fromarray(np.full((16, 16), 4000, np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.full((16, 16), 4000, np.float32)).save(tmp_path / "float.tif")
    files = (tmp_path / "deep.png", tmp_path / "float.tif")
    code, _, err = smallvit("predict", tmp_path / "run", *files, "--device", "cpu", "--amp", "off")
    assert code == 0
    assert "0 to 65,535 become 0 to 255 (their full range), as the model was not trained on such images" in err
    assert "float.tif (floating-point gray values from 4000 to 4000" in err
    assert "convert it to 8 bits" in err


def test_an_out_folder_that_is_not_utf8_is_refused_before_anything_is_read(tmp_path: Path, smallvit: Command) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    for verb in (
        ("train",),
        ("eval", "run"),
        ("attend", "run"),
        ("export", "run", "--format", "onnx"),
        ("predict", "run", "x.png"),
    ):
        code, _, err = smallvit(*verb, "--out", odd)
        assert (code, len(err.splitlines())) == (2, 1), verb
        assert "caf\\udce9': expected a name in UTF-8" in err
    assert list(tmp_path.iterdir()) == []
