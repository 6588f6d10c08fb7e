"""Test arrays of any number of channels: reading, scaling, augmenting, and all verbs."""

from __future__ import annotations

import io
import json
import pickle
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import adapt_input_conv

import smallvit as package
from smallvit import datasets
from smallvit.config.options import AugmentConfig, DataConfig
from smallvit.datasets.augment import Augment, RectangleDraws
from smallvit.datasets.channels import read_channels, view_channels
from smallvit.datasets.decode import decode_image
from smallvit.datasets.functional import apply_operations, corrupt
from smallvit.datasets.gray import GrayRanges
from smallvit.datasets.streaming import Crops, decode_crops
from smallvit.evaluation.predictor import read_model_info
from smallvit.models.checkpoint import load_model
from smallvit.models.weights import load_trained_model
from smallvit.utils.errors import InputError

Command = Callable[..., tuple[int, str, str]]
CHANNELS = 5


def make_array(level: float, size: tuple[int, int] = (12, 16), channels: int = CHANNELS) -> np.ndarray:
    """Return 12-bit values around a level, each channel with its own unit."""
    noise = np.random.default_rng(int(level)).normal(level, 200, (*size, channels))
    return (noise.clip(0, 4095) / np.arange(1, channels + 1)).astype(np.uint16)


def write_arrays(folder: Path, count: int = 6) -> Path:
    for split in ("train", "test"):
        for name, level in (("dark", 1000), ("light", 3000)):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                np.save(folder / split / name / f"{index}.npy", make_array(level + index))
    return folder


def test_arrays_are_read_in_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = make_array(2000)
    (bands := values.transpose(2, 0, 1))
    for name, array in (("last.npy", values), ("first.npy", bands)):
        np.save(tmp_path / name, array)
    pages = [Image.fromarray(np.ascontiguousarray(band)) for band in bands]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    for name in ("last.npy", "first.npy", "pages.tif"):
        np.testing.assert_array_equal(read_channels(str(tmp_path / name), 1), bands, name)
        np.testing.assert_array_equal(read_channels(io.BytesIO((tmp_path / name).read_bytes()), 1), bands, name)
    color = np.ascontiguousarray(values[..., :4] // 16).astype(np.uint8)
    Image.fromarray(color, "RGBX").save(tmp_path / "four.tif")
    np.testing.assert_array_equal(read_channels(str(tmp_path / "four.tif"), 1), color.transpose(2, 0, 1))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match=r"pip install 'smallvit\[tiff\]'"):
        read_channels(str(tmp_path / "four.tif"), 1)
    for mode in ("RGB", "RGBA", "L", "I;16"):
        Image.new(mode, (4, 4)).save(tmp_path / "plain.tif")
        assert read_channels(str(tmp_path / "plain.tif"), 1) is None
    assert np.asarray(view_channels(bands)).shape == (12, 16, 3)
    eight = (values // 16).astype(np.uint8)
    np.save(tmp_path / "eight.npy", eight)
    expected = [
        np.asarray(Image.fromarray(band).resize((8, 6), Image.Resampling.BILINEAR)) for band in np.moveaxis(eight, 2, 0)
    ]
    pixels = decode_image(str(tmp_path / "eight.npy"), package.utils.sizes.Rectangle(6, 8), channels=CHANNELS)
    np.testing.assert_array_equal(pixels, expected)


def test_arrays_that_are_no_images_get_one_line(tmp_path: Path) -> None:
    folder = write_arrays(tmp_path / "data")
    file = folder / "train" / "dark" / "3.npy"
    cases = {
        "4 channels, expected 5": make_array(9, channels=4),
        "complex64 array": np.zeros((4, 4), dtype=np.complex64),
        "expected integers or floats": np.zeros((2, 3, 4, 5)),
        "infinite or NaN": np.full((12, 16, CHANNELS), np.nan),
        "allow_pickle=False": np.array([{"a": 1}], dtype=object),
    }
    for message, array in cases.items():
        np.save(file, array, allow_pickle=True)
        with pytest.raises(InputError, match=f"3.npy.*{message}") as caught:
            datasets.create_dataset(DataConfig(data=str(folder)))
        assert "\n" not in str(caught.value)
    file.write_bytes(pickle.dumps("no array"))
    with pytest.raises(InputError, match=r"3\.npy"):
        datasets.create_dataset(DataConfig(data=str(folder)))
    np.save(file, make_array(1003))
    with pytest.raises(InputError, match="5 channels, expected 3"):
        datasets.create_dataset(DataConfig(data=str(folder), in_chans=3))
    with pytest.raises(InputError, match="--in-chans 4: images of digits have 1"):
        datasets.create_dataset(DataConfig(data="digits", in_chans=4))


def test_each_channel_has_its_own_scale_and_statistics(tmp_path: Path) -> None:
    dataset = datasets.create_dataset(DataConfig(data=str(write_arrays(tmp_path)), img_size=12))
    raw = np.stack([np.load(tmp_path / path) for path in dataset.train.paths])[:, :, 2:14]
    low, high = (
        extreme(np.stack([np.load(tmp_path / path) for path in dataset.train.paths]), axis=(0, 1, 2))
        for extreme in (np.min, np.max)
    )
    levels = ((raw - low.astype(float)) * 255 / (high - low.astype(float))).round()
    np.testing.assert_allclose(dataset.train.pixels.permute(0, 2, 3, 1), levels, atol=1)
    np.testing.assert_allclose(dataset.mean, levels.mean((0, 1, 2)) / 255, atol=1e-4)
    np.testing.assert_allclose(dataset.std, levels.std((0, 1, 2)) / 255, atol=1e-4)


def test_streamed_crops_of_arrays_use_the_ranges_of_the_data(tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(60, 120, (30, 40, CHANNELS), dtype=np.uint8)
    ranges = GrayRanges(channels=tuple((float(c), c + 51.0) for c in range(CHANNELS)))
    Image.fromarray(np.ascontiguousarray(levels[..., :3])).save(tmp_path / "color.png")
    np.save(tmp_path / "color.npy", levels[..., :3] / 5 + np.arange(3))
    np.save(tmp_path / "five.npy", levels / 5 + np.arange(CHANNELS))
    crops = Crops(RectangleDraws.draw(np.random.default_rng(3), 1), (0.3, 1.0))
    color, array, five = (
        decode_crops(str(tmp_path / name), 16, crops, ranges=own, channels=count)[0].numpy()
        for name, own, count in (
            ("color.png", GrayRanges(), 3),
            ("color.npy", GrayRanges(channels=ranges.channels[:3]), 3),
            ("five.npy", ranges, CHANNELS),
        )
    )
    assert five.shape == (CHANNELS, 16, 16)
    np.testing.assert_array_equal(array, color)
    np.testing.assert_array_equal(five[:3], color)


def test_gray_is_made_of_colors_on_request(image_folder: Path) -> None:
    color, gray = (datasets.create_dataset(DataConfig(data=str(image_folder), in_chans=n)) for n in (3, 1))
    first = Image.fromarray(color.train.pixels[0].permute(1, 2, 0).numpy()).convert("L")
    np.testing.assert_array_equal(gray.train.pixels[0, 0], first)


def test_augmentation_leaves_colors_out() -> None:
    images = torch.randint(0, 256, (4, CHANNELS, 8, 12), dtype=torch.uint8)
    for name in ("Color", "Grayscale"):
        assert torch.equal(apply_operations(images.clone(), [name] * 4, np.full(4, 0.3)), images)
    turned = apply_operations(images.clone(), ["Rotate"] * 4, np.full(4, 90.0), bicubic=False)
    for channel in range(CHANNELS):
        alone = apply_operations(images[:, channel, None].clone(), ["Rotate"] * 4, np.full(4, 90.0))
        assert torch.equal(turned[:, channel], alone[:, 0])
    rng, mean, std = np.random.default_rng(0), torch.full((CHANNELS, 1, 1), 0.5), torch.ones(CHANNELS, 1, 1)
    for aug in ("lee2021", "deit", "deit3", "augreg-strong2"):
        augment = Augment.from_config(AugmentConfig(aug=aug), 12, flip=True)
        x, _ = augment.apply(images, torch.zeros(4, dtype=torch.int64), augment.draw(rng, 4, 8, 12), mean, std, 2)
        assert x.shape == images.shape
    assert corrupt(images, "jpeg", 3, torch.arange(4)).shape == images.shape


def test_weights_of_timm_are_adapted_as_timm_does(tmp_path: Path) -> None:
    weights = {name: torch.randn_like(each) for name, each in timm.create_model("test_vit").state_dict().items()}
    save_file(weights, file := tmp_path / "timm.safetensors")
    info = read_model_info(str(file), "--init", "test_vit")
    adapted = load_trained_model(info, CHANNELS).state_dict()
    expected = adapt_input_conv(CHANNELS, weights["patch_embed.proj.weight"])
    torch.testing.assert_close(adapted.pop("patch_embed.proj.weight"), expected)
    assert all(torch.equal(each, weights[name]) for name, each in adapted.items())


@pytest.mark.slow
def test_channels_go_through_all_verbs(tmp_path: Path, smallvit: Command) -> None:
    data, run = write_arrays(tmp_path / "data"), tmp_path / "run"
    options = ["--img-size", "8x12", "--aug", "basic", "--epochs", "1", "--device", "cpu"]
    code, _, err = smallvit("train", "--arch", "vit+spt+lsa", "--data", data, "--out", run, *options)
    assert code == 0, err
    for command in (
        ["eval", run, "--robustness"],
        ["attend", run, "--count", "2"],
        ["export", run, "--format", "onnx"],
        ["report", run],
    ):
        code, _, err = smallvit(*command)
        assert code == 0, err
    assert "image.npy" in (page := (run / "report.html").read_text())
    assert "Image.open" not in page
    file = data / "test" / "dark" / "0.npy"
    spec = spec_from_file_location("preprocess", run / "export" / "preprocess.py")
    spec.loader.exec_module(module := module_from_spec(spec))
    model = load_model(run)
    expected = model(torch.from_numpy(module.preprocess(file))).softmax(1)[0].max().item()
    for image in (file, np.load(file)):
        (prediction,) = package.predict(run, image, device="cpu", amp="off")
        assert prediction.classes[0][1] == pytest.approx(expected, abs=1e-4)
    Image.new("RGB", (20, 20)).save(tmp_path / "color.png")
    assert package.predict(run, tmp_path / "color.png")[0].error == "a gray or color image, expected 5 channels"
    assert len(json.loads((run / "config.json").read_text())["img_size"]) == 2
