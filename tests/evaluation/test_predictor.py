"""Test loading trained models for inference."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import smallvit
from smallvit import InputError
from smallvit.evaluation.predictor import load_predictor


def pixels(count: int, channels: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, channels, size, size), generator=torch.Generator().manual_seed(0)).byte()


def test_logits_equal_those_of_the_loaded_model(trained_run: Path) -> None:
    images, model = pixels(5, 1, 8), smallvit.load_model(trained_run)
    config = model.pretrained_cfg
    mean, std = config["mean"][0], config["std"][0]
    with torch.no_grad():
        expected = model((images / 255 - mean) / std)
    result = load_predictor(str(trained_run), "eval", device="cpu", amp="off")
    logits = result.predict_logits(result.normalize(images))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert result.class_names == tuple("0123456789")
    assert (result.in_chans, result.img_size, result.precision) == (1, 8, "fp32")
    assert not logits.requires_grad


def test_flip_averages_probabilities(trained_run: Path) -> None:
    result = load_predictor(str(trained_run), "eval", device="cpu", amp="off")
    images = result.normalize(pixels(3, 1, 8))
    one, other = (result.predict_logits(each).softmax(dim=1) for each in (images, images.flip(-1)))
    torch.testing.assert_close(result.predict_logits(images, flip=True).softmax(dim=1), (one + other) / 2)


def test_models_are_resized(trained_run: Path) -> None:
    result = load_predictor(str(trained_run), "eval", img_size=16, device="cpu", amp="off")
    assert result.predict_logits(result.normalize(pixels(2, 1, 16))).shape == (2, 10)
    assert result.img_size == 16


def test_a_file_without_a_model_name_needs_arch(trained_run: Path, tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=32)
    file = tmp_path / "bare.safetensors"
    save_file(model.state_dict(), file)
    with pytest.raises(InputError, match="does not name its model; add --arch"):
        load_predictor(str(file), "eval")
    result = load_predictor(str(file), "eval", arch="vit_tiny_patch16_224", device="cpu", amp="off")
    assert result.class_names == tuple("0123456")
    with pytest.raises(InputError, match=r"--arch vit: .* remove --arch"):
        load_predictor(str(trained_run), "eval", arch="vit")


def test_bad_input_is_one_line(trained_run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^eval .*nowhere: "):
        load_predictor(str(tmp_path / "nowhere"), "eval")
    with pytest.raises(InputError, match="--device cuda:99"):
        load_predictor(str(trained_run), "eval", device="cuda:99")
    with pytest.raises(InputError, match=r"--img-size 9: expected a multiple of the patch size 2"):
        load_predictor(str(trained_run), "eval", img_size=9)
    path = tmp_path / "cnn.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=2).state_dict(), path)
    assert load_predictor(str(path), "eval", arch="test_resnet", img_size=33, device="cpu").img_size == 33
