"""Train, evaluate and export models of rectangular images, and refuse sizes that are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torchvision.transforms.v2 import functional as V

import smallvit as package
from smallvit.config.config import Config
from smallvit.datasets.dataset import Images
from smallvit.models.checkpoint import load_model
from smallvit.models.factory import create_model
from smallvit.utils.errors import InputError
from smallvit.utils.sizes import Rectangle, parse_size

Command = Callable[..., tuple[int, str, str]]


def test_sizes_are_read_from_options_and_records() -> None:
    for value in (64, "64", (64, 64), [64, 64], "64x64"):
        assert parse_size(value) == 64
    for value in ("64x96", (64, 96), [64, 96], Rectangle(64, 96)):
        config = Config.build(img_size=value)
        assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert config.data.img_size == (64, 96)
        assert f"{config.data.img_size}" == "64x96"
    for value in ("64x", "x64", "0x8", "-8", "8x8x8", "6 4", "8*8", 0, 8.0, True, [8, 8, 8], []):
        with pytest.raises(InputError, match=r"^--img-size .*: expected pixels, e\.g\. 64, or"):
            Config.build(img_size=value)
    for size, use in (((50, 96), "48x96 or 56x96"), ((4, 20), "8x24, or a smaller --patch-size")):
        with pytest.raises(InputError, match=f"is not a multiple of the patch size 8; use {use}"):
            create_model("vit", img_size=size, patch_size=8, num_classes=2)


def test_arrays_are_resized_as_torchvision_does() -> None:
    images = torch.randint(0, 256, (2, 4, 20, 30), dtype=torch.uint8)
    ours = Images(images, torch.zeros(2, dtype=torch.int64))
    bicubic = {"interpolation": V.InterpolationMode.BICUBIC, "antialias": True}
    padded = V.resize(images.float(), [16, 24], **bicubic)
    expected = {
        "squash": V.resize(images.float(), [40, 24], **bicubic),
        "center": V.center_crop(V.resize(images.float(), [40, 60], **bicubic), [40, 24]),
        "border": V.pad(padded, [0, 12, 0, 12], fill=128),
    }
    for mode, pixels in expected.items():
        assert (
            ours.resize(Rectangle(40, 24), mode).pixels.int() - pixels.round().clamp(0, 255).int()
        ).abs().max() <= 1, mode


@torch.no_grad()
def test_models_take_rectangles_as_timms_do() -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("test_vit", img_size=(24, 40), patch_size=4, num_classes=5).eval()
    ours = create_model("test_vit", img_size=(24, 40), patch_size=4, num_classes=5).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 24, 40)
    torch.testing.assert_close(ours(images), theirs(images))
    for arch in ("vit+spt+lsa", "pit+spt+lsa", "swin+spt", "cait+lsa", "t2t+spt", "binaryvit_tiny", "resnet18"):
        model = create_model(arch, img_size=(24, 48), num_classes=5).eval()
        assert model(torch.randn(2, 3, 24, 48)).shape == (2, 5), arch


@pytest.mark.slow
def test_rectangles_go_through_all_verbs(
    tmp_path: Path, smallvit: Command, write_images: Callable[..., list[Path]]
) -> None:
    for split, name, level in [(s, n, v) for s in ("train", "test") for n, v in (("dark", 60), ("light", 190))]:
        write_images(tmp_path / "data" / split / name, 6, level, size=(40, 20))
    run, picture = tmp_path / "run", next((tmp_path / "data" / "test" / "dark").iterdir())
    options = ["--img-size", "16x24", "--resize", "pad", "--aug", "basic", "--epochs", "1", "--device", "cpu"]
    code, _, err = smallvit("train", "--arch", "vit+spt", "--data", tmp_path / "data", "--out", run, *options)
    assert code == 0, err
    model = load_model(run)
    assert resolve_model_data_config(model)["input_size"] == (3, 16, 24)
    for command in (["eval", run], ["attend", run, "--count", "2"], ["export", run, "--format", "onnx"]):
        code, _, err = smallvit(*command)
        assert code == 0, err
    assert json.loads((run / "eval" / "test" / "metrics.json").read_text())["img_size"] == [16, 24]
    # the transform of timm, except that its border has the mean color
    config = resolve_model_data_config(model)
    border = create_transform(**config | {"mean": (128 / 255,) * 3, "std": (1, 1, 1)})(Image.open(picture))
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    pixels = (border + 128 / 255 - mean) / std
    spec = spec_from_file_location("preprocess", run / "export" / "preprocess.py")
    spec.loader.exec_module(module := module_from_spec(spec))
    np.testing.assert_allclose(module.preprocess(picture)[0], pixels, atol=1e-5)
    (prediction,) = package.predict(run, picture, device="cpu", amp="off")
    expected = model(pixels[None]).softmax(1)[0].max().item()
    assert prediction.classes[0][1] == pytest.approx(expected, abs=1e-4)
    other = package.predict(run, picture, img_size=(32, 16), device="cpu")
    assert other[0].error is None
