"""Trained models, ready to answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import smallvit
from smallvit import Config, InputError, engine
from smallvit.ready import ready


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    engine.train(Config.build(arch="vit", lsa=True, epochs=1, out=str(folder), device="cpu"))
    return folder


def pixels(count: int, channels: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, channels, size, size), generator=torch.Generator().manual_seed(0)).byte()


def test_it_answers_as_the_loaded_model_does(run: Path) -> None:
    images, model = pixels(5, 1, 8), smallvit.load(run)
    config = model.pretrained_cfg
    mean, std = config["mean"][0], config["std"][0]
    with torch.no_grad():
        expected = model((images / 255 - mean) / std)
    found = ready(str(run), "eval", device="cpu", amp="off")
    logits = found.logits(found.normalised(images))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert found.class_names == tuple("0123456789")
    assert (found.in_chans, found.img_size, found.precision) == (1, 8, "fp32")
    assert not logits.requires_grad


def test_flipped_probabilities_are_the_mean_of_both(run: Path) -> None:
    found = ready(str(run), "eval", device="cpu", amp="off")
    images = found.normalised(pixels(3, 1, 8))
    one, other = (found.logits(each).softmax(dim=1) for each in (images, images.flip(-1)))
    torch.testing.assert_close(found.logits(images, flip=True).softmax(dim=1), (one + other) / 2)


def test_a_model_answers_at_another_size(run: Path) -> None:
    found = ready(str(run), "eval", img_size=16, device="cpu", amp="off")
    assert found.logits(found.normalised(pixels(2, 1, 16))).shape == (2, 10)
    assert found.img_size == 16


def test_a_file_that_names_no_model_needs_arch(run: Path, tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=32)
    file = tmp_path / "bare.safetensors"
    save_file(model.state_dict(), file)
    with pytest.raises(InputError, match="does not say what model it holds; give --arch"):
        ready(str(file), "eval")
    found = ready(str(file), "eval", arch="vit_tiny_patch16_224", device="cpu", amp="off")
    assert found.class_names == tuple("0123456")
    with pytest.raises(InputError, match=r"--arch vit: .* leave --arch out"):
        ready(str(run), "eval", arch="vit")


def test_what_cannot_be_had_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^eval .*nowhere: "):
        ready(str(tmp_path / "nowhere"), "eval")
    with pytest.raises(InputError, match="--device cuda:99"):
        ready(str(run), "eval", device="cuda:99")
    with pytest.raises(InputError, match=r"--img-size 9: .* multiples of its patch size 2"):
        ready(str(run), "eval", img_size=9)
    engine.train(Config.build(arch="resnet20", epochs=1, out=str(tmp_path / "cnn"), device="cpu", amp="off"))
    assert ready(str(tmp_path / "cnn"), "eval", img_size=9).img_size == 9
