"""Gray values of more than 8 bits, against NumPy: order within and between files, and one scale per data set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smallvit import datasets
from smallvit.config.options import DataConfig
from smallvit.datasets.dataset import ImageDataset
from smallvit.datasets.decode import convert_image, decode_image, open_image
from smallvit.datasets.gray import GrayRanges, measure
from smallvit.utils.errors import InputError
from tests.datasets.test_image_folder_zips import pack
from tests.sweep import sweep

RAMP = np.tile(np.linspace(0, 1, 32), (32, 1))
KINDS = {
    "float": ("tif", np.float32, 1000.0),
    "negative float": ("tif", np.float32, -3.0),
    "int32": ("tif", np.int32, 300),
    "signed": ("tif", np.int32, -1024),
    "12 bit": ("png", np.uint16, 4095),
}
"""Suffix, type, and the value that the brightest pixel of the training images has (the darkest, if negative)."""


def save(values: np.ndarray, path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)
    return path


def load(folder: Path, **options: object) -> ImageDataset:
    return datasets.create_dataset(DataConfig(data=str(folder), **{"img_size": 32, "workers": 0} | options))


def test_every_gray_value_of_a_ramp_keeps_a_level_of_its_own(tmp_path: Path) -> None:
    images = {
        "reflectance.tif": (RAMP * 0.45).astype(np.float32),
        "unit.tif": RAMP.astype(np.float32),
        "large.tif": (RAMP * 65535).astype(np.float32),
        "int.tif": (RAMP * 300).astype(np.int32),
        "signed.tif": (RAMP * 4000 - 1024).astype(np.int32),
        "12.png": (RAMP * 4095).astype(np.uint16),
        "14.png": (RAMP * 16383).astype(np.uint16),
        "16.png": (RAMP * 65535).astype(np.uint16),
        "offset.png": (RAMP * 2000 + 30000).astype(np.uint16),
    }
    for name, values in images.items():
        level = decode_own(save(values, tmp_path / name), 32)[0, 0].astype(int)
        assert (np.diff(level) > 0).all(), name
        assert level[-1] == (255 if name != "reflectance.tif" else round(0.45 * 255)), name


def decode_own(path: Path, size: int) -> np.ndarray:
    """Decode an image with the range of the values in it."""
    with open_image(path, 1) as image:
        return convert_image(image, size, GrayRanges.measured([measure(image)]))


def test_known_ranges_become_levels_exactly(tmp_path: Path) -> None:
    sixteen = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    unit = np.linspace(0, 1, 2**16, dtype=np.float32).reshape(256, 256)
    swapped = Image.frombytes("I;16B", (256, 256), sixteen.astype(">u2").tobytes())
    swapped.save(tmp_path / "b.tif")
    actual = [decode_image(save(sixteen, tmp_path / "a.png"), 256), decode_image(tmp_path / "b.tif", 256)]
    assert all(np.array_equal(each[0], (sixteen / 257).round()) for each in actual)
    assert np.array_equal(decode_image(save(unit, tmp_path / "c.tif"), 256)[1], (unit.astype(float) * 255).round())
    assert np.array_equal(decode_image(tmp_path / "c.tif", 256, GrayRanges()), decode_image(tmp_path / "c.tif", 256))


def test_white_may_be_zero(tmp_path: Path) -> None:
    values = (RAMP * 65535).astype(np.uint16)
    save(values, tmp_path / "x.tif", tiffinfo={262: 0})
    assert np.array_equal(decode_image(tmp_path / "x.tif", 32)[0], 255 - (values / 257).round())


def write(folder: Path, kind: str, brightest: float = 1.0, count: int = 12) -> None:
    """Write two classes of constant images, each brighter than the last, up to the kind's value times `brightest`."""
    suffix, form, full = KINDS[kind]
    for index in range(count):
        values = np.full((32, 32), full * brightest * (index + 1) / count).astype(form)
        save(values, folder / "ab"[index % 2] / f"{index:02}.{suffix}")


def levels(data: ImageDataset, *, names: bool = True) -> list[int]:
    """Return one level per image, over all splits, in the order of the file names where these are unique."""
    actual = {}
    for part in (data.train, data.val, data.test):
        pixels = part.pixels if hasattr(part, "pixels") else part.sample().pixels
        keys = [Path(path).stem if names else path for path in part.paths]
        actual |= dict(zip(keys, pixels[:, 0, 0, 0].tolist(), strict=True))
    return [actual[name] for name in sorted(actual)]


@sweep("kind", KINDS)
def test_brighter_images_of_a_data_set_are_never_darker(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "x", kind)
    members = {str(path.relative_to(tmp_path)): path.read_bytes() for path in sorted((tmp_path / "x").rglob("*.*"))}
    forms = {
        "memory": load(tmp_path / "x"),
        "cache": load(tmp_path / "x"),
        "stream": load(tmp_path / "x", streaming="on"),
        "zip": load(pack(tmp_path / "x.zip", members)),
    }
    assert any("cache" in note for note in forms["cache"].notes)
    for name, data in forms.items():
        actual, known = np.array(levels(data)), data.gray_ranges.integer or data.gray_ranges.floating
        assert (np.diff(actual) * np.sign(KINDS[kind][2]) >= 0).all(), name
        assert len(set(actual.tolist())) >= 8, name
        pixels = data.train.pixels if hasattr(data.train, "pixels") else data.train.sample().pixels
        assert (pixels.min(), pixels.max()) == (0, 255), name  # the range of the training images
        assert sum("become 0 to 255 (the range of the training images)" in note for note in data.notes) == 1, name
        values = np.array([KINDS[kind][2] * (index + 1) / 12 for index in range(12)]).astype(KINDS[kind][1])
        expected = ((values - known[0]) / (known[1] - known[0]) * 255).clip(0, 255).round()
        assert np.abs(actual - expected).max() <= 1, name  # but for ties


def test_the_range_is_that_of_the_images_trained_on(tmp_path: Path) -> None:
    for split, full in (("train", 1000), ("val", 2000), ("test", 4000)):
        for name, part in (("a", 0.5), ("b", 1.0)):
            for index in range(3):
                save(np.full((8, 8), full * part, np.int32), tmp_path / split / name / f"{index}.tif")
    data = load(tmp_path, img_size=8)
    assert data.gray_ranges == GrayRanges(integer=(500, 1000))
    assert data.test.pixels.unique().tolist() == [255]
    given = datasets.create_dataset(DataConfig(data=str(tmp_path), img_size=8), ranges=GrayRanges(integer=(0, 8000)))
    assert given.train.pixels.unique().tolist() == [16, 32]  # 500 and 1000 of 8000
    assert given.test.pixels.unique().tolist() == [64, 128]
    assert any("the range of the training images" in note for note in given.notes)
    assert torch.equal(load(tmp_path, img_size=8).test.pixels, data.test.pixels)  # the cache is not the other's


def test_a_kind_that_no_training_image_has_is_refused_where_its_scale_is_unknown(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("a", "b"):
            save(np.full((8, 8, 3), 90, np.uint8), tmp_path / split / name / "0.png")
            save(np.full((8, 8, 3), 99, np.uint8), tmp_path / split / name / "1.png")
    save(np.full((8, 8), 0.5, np.float32), tmp_path / "test" / "a" / "2.tif")
    assert load(tmp_path, img_size=8).test.pixels[2, 0, 0, 0] == 128
    save(np.full((8, 8), 500.0, np.float32), tmp_path / "test" / "a" / "2.tif")
    with pytest.raises(InputError, match=r"2\.tif \(floating-point gray values.* 500 to 500.*convert it to 8 bits"):
        load(tmp_path, img_size=8)


def test_ranges_survive_json() -> None:
    for ranges in (GrayRanges(), GrayRanges(integer=(-1024, 3071.0)), GrayRanges(integer=(0, 1), floating=(0, 0.5))):
        assert GrayRanges.from_json(json.loads(json.dumps(ranges.to_json()))) == ranges
    for bad in ({"integer": [1, 1]}, {"floating": [0, float("inf")]}, {"other": [0, 1]}, {"integer": [1]}):
        with pytest.raises((ValueError, TypeError)):
            GrayRanges.from_json(bad)


def test_images_are_decoded_up_to_a_limit(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for index in range(3):
            save(np.full((8, 8), 100, np.uint8), tmp_path / name / f"{index}.png")
    large = save(np.full((100, 200), 200, np.uint8), tmp_path / "a" / "large.png")
    for streaming in ("off", "on"):
        data = load(tmp_path, streaming=streaming)
        assert sorted(level for level in levels(data, names=False)) == [100] * 6 + [200]
    assert (decode_image(large, 8) == 200).all()
    with pytest.raises(InputError) as caught:
        load(tmp_path, max_megapixels=0.01)
    expected = "large.png (200 x 100 pixels are 0.02 megapixels, --max-megapixels allows 0.01: raise it, or shrink the"
    assert expected in str(caught.value)
    assert len(levels(load(tmp_path, max_megapixels=0.01, skip_corrupt=True), names=False)) == 6
    with pytest.raises(InputError, match="--max-megapixels 0"):
        DataConfig(max_megapixels=0)
