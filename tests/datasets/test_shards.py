"""Compare shards with the image files they were written from, as tarfile, Pillow and timm read them."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data.readers.reader_wds import _parse_split_info

from smallvit import datasets
from smallvit.config.options import AugmentConfig, DataConfig
from smallvit.datasets import shards
from smallvit.datasets.augment import Augment
from smallvit.datasets.factory import read_source
from smallvit.datasets.shards import resize_to_jpeg
from smallvit.datasets.streaming import StreamingLoader

Command = Callable[..., tuple[int, str, str]]
SIZE = 24


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write two splits of three classes: PNG files and JPEG files, small and large ones."""
    for split, count in (("train", 12), ("test", 5)):
        for label, name in enumerate(("ant", "bee", "cat")):
            for number in range(count):
                file = tmp_path / "images" / split / name / f"{number}.{'png' if number % 2 else 'jpg'}"
                file.parent.mkdir(parents=True, exist_ok=True)
                size = (28, 20) if number % 3 else (40, 30)
                picture(100 * label + number, *size).save(file)
    return tmp_path / "images"


@pytest.fixture
def written(folder: Path, tmp_path: Path, smallvit: Command, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write many small shards."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 8000)
    code, output, error = smallvit("shard", folder, tmp_path / "shards", "--size", SIZE)
    assert (code, error) == (0, "")
    assert "51 images" in output
    return tmp_path / "shards"


def members(folder: Path) -> dict[str, bytes]:
    """Return the members of all shards as tarfile reads them, in the order in which they were written."""
    parts = []
    for file in folder.glob("*.tar"):
        with tarfile.open(file) as tar:
            parts.append({member.name: tar.extractfile(member).read() for member in tar})
    return {name: data for part in sorted(parts, key=min) for name, data in part.items()}


def load(folder: Path, **options: object) -> datasets.dataset.ImageDataset:
    return datasets.create_dataset(DataConfig(data=str(folder), img_size=16, val_fraction=0.2, **options))


def loader(folder: Path, **options: object) -> StreamingLoader:
    data = load(folder, streaming="on", workers=options.pop("workers", 0))
    augment = Augment.from_config(AugmentConfig(aug="deit", aug_repeats=1), 16, data.flip, policy="imagenet")
    return StreamingLoader(data, 8, augment, 3, torch.device("cpu"), **options)


def unpack(written: Path, source: Path, target: Path) -> Path:
    """Write the images in shards as files, with the names that the source has."""
    images = {name: data for name, data in members(written).items() if name.endswith(".jpg")}
    listing = read_source(DataConfig(data=str(source)))
    for path, data in zip(listing.paths, images.values(), strict=True):
        file = target / Path(path).relative_to(source)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return target


def test_training_is_that_of_the_same_image_files(folder: Path, written: Path, tmp_path: Path) -> None:
    files = unpack(written, folder, tmp_path / "files")
    expected = [list(loader(files).epoch(epoch)) for epoch in (0, 1)]
    ours = loader(written, workers=1)
    for epoch in (0, 1):
        for (x, y), (target, target_y) in zip(ours.epoch(epoch), expected[epoch], strict=True):
            assert torch.equal(x, target)
            assert torch.equal(y, target_y)
    parts = [list(loader(written, rank=rank, world=2).epoch(1, start=2)) for rank in (0, 1)]
    for (x0, y0), (x1, y1), (target, target_y) in zip(*parts, expected[1][2:], strict=True):
        assert torch.equal(torch.cat([x0, x1]), target)
        assert torch.equal(torch.cat([y0, y1]), target_y)


@pytest.mark.parametrize("streaming", ["on", "off"])
def test_the_data_set_is_that_of_the_same_image_files(
    folder: Path, written: Path, tmp_path: Path, streaming: str
) -> None:
    one, two = (load(each, streaming=streaming) for each in (unpack(written, folder, tmp_path / "files"), written))
    for name in ("class_names", "mean", "std", "fingerprint", "content", "drew_val", "drew_test"):
        assert getattr(one, name) == getattr(two, name), name
    for split in ("train", "val", "test"):
        assert torch.equal(getattr(one, split).labels, getattr(two, split).labels)
        assert getattr(one, split).paths == getattr(two, split).paths


def test_shards_are_in_the_format_of_webdataset_and_timm(folder: Path, written: Path) -> None:
    read, listing = members(written), read_source(DataConfig(data=str(folder)))
    keys = sorted({name.split(".")[0] for name in read})
    assert [int(read[f"{key}.cls"]) for key in keys] == [*listing.labels]
    assert [f"{key}.{kind}" for key in keys for kind in ("jpg", "cls")] == [*read]  # a sample's members are neighbors
    info = json.loads((written / "_info.json").read_text())
    for split, count in (("train", 36), ("test", 15)):
        part = _parse_split_info(split, info)
        assert (part.num_samples, sum(part.shard_lengths)) == (count, count)
        for file, length in zip(part.filenames, part.shard_lengths, strict=True):
            with tarfile.open(written / file) as tar:
                assert len(tar.getnames()) == 2 * length
    assert len(info["splits"]["train"]["filenames"]) > 2


def test_large_images_are_resized_and_small_jpegs_are_unchanged(folder: Path, written: Path) -> None:
    listing = read_source(DataConfig(data=str(folder)))
    images = [data for name, data in members(written).items() if name.endswith(".jpg")]
    unchanged = 0
    for path, data in zip(listing.paths, images, strict=True):
        with Image.open(path) as image:
            if image.format == "JPEG" and image.height <= SIZE:
                unchanged += data == Path(path).read_bytes()
                continue
            size = (32, 24) if image.height > SIZE else image.size
            buffer = io.BytesIO()
            image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
        assert data == buffer.getvalue()
    assert unchanged == 3 * (4 + 2)


def test_rotated_photographs_are_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    waves = Image.linear_gradient("L").resize((64, 40))
    Image.merge("RGB", [waves, waves.transpose(Image.Transpose.ROTATE_180), waves]).save(tmp_path / "x.jpg", exif=exif)
    with Image.open(io.BytesIO(resize_to_jpeg(str(tmp_path / "x.jpg"), 20))) as ours:
        assert ours.size == (20, 32)
        assert not ours.getexif().get(0x0112)
        with Image.open(tmp_path / "x.jpg") as image:
            expected = ImageOps.exif_transpose(image).resize((20, 32), Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(ours, float) - np.asarray(expected, float)).mean() < 3


def test_an_unreadable_file_is_named_or_skipped(folder: Path, tmp_path: Path, smallvit: Command) -> None:
    (folder / "train/bee/3.png").write_bytes(b"no image")
    (folder / "train/cat/2.jpg").write_bytes((folder / "train/cat/2.jpg").read_bytes()[:300])
    code, _, error = smallvit("shard", folder, tmp_path / "out")
    assert code == 2
    assert "train/bee/3.png (cannot identify image file" in error
    assert "--skip-corrupt" in error
    assert {path.name for path in tmp_path.iterdir()} == {"images"}
    code, output, _ = smallvit("shard", folder, tmp_path / "out", "--skip-corrupt")
    assert code == 0
    assert "skipped: 2 images" in output
    data = load(tmp_path / "out")
    assert len(data.train) + len(data.val) == 34
    assert {"train/bee/3.png", "train/cat/2.jpg"}.isdisjoint(data.train.paths + data.val.paths)


def test_values_that_jpeg_cannot_hold_are_refused(folder: Path, tmp_path: Path, smallvit: Command) -> None:
    Image.fromarray(np.full((8, 8), 3000, dtype=np.uint16)).save(folder / "train/bee/3.png")
    code, _, error = smallvit("shard", folder, tmp_path / "out")
    assert (code, "more than 8 bits" in error) == (2, True)


def test_shards_are_not_overwritten(folder: Path, written: Path, smallvit: Command) -> None:
    before = members(written)
    code, _, error = smallvit("shard", folder, written, "--size", 8)
    assert (code, "already holds results" in error) == (2, True)
    assert members(written) == before
    assert smallvit("shard", folder, written, "--size", 8, "--overwrite")[0] == 0
    assert members(written) != before
    code, _, error = smallvit("shard", written, folder, "--overwrite")
    assert (code, "holds no shards" in error) == (2, True)
    assert (folder / "train/bee/3.png").exists()


def test_an_interruption_leaves_no_shards(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "_list_written", interrupt)
    with pytest.raises(KeyboardInterrupt):
        shards.write_shards(read_source(DataConfig(data=str(folder))), tmp_path / "out", SIZE)
    assert {path.name for path in tmp_path.iterdir()} == {"images"}


@pytest.mark.parametrize("damage", ["cut", "missing", "listing", "info"])
def test_a_partial_copy_is_refused(written: Path, smallvit: Command, damage: str) -> None:
    file = written / {"listing": "listing.safetensors", "info": "_info.json"}.get(damage, "train-000001.tar")
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-600] if damage != "info" else b"{}")
    code, _, error = smallvit("train", "--arch", "vit", "--data", written)
    assert (code, "copy it again" in error) == (2, True), error


def test_tables_keep_groups_weights_and_labels(folder: Path, tmp_path: Path, smallvit: Command) -> None:
    rows = [["path", "label", "group", "weight"]]
    for number, file in enumerate(sorted(folder.rglob("*.png"))):
        label = file.parent.name + ";small" * (number % 2)
        rows.append([str(file.relative_to(tmp_path)), label, f"g{number // 2}", str(1 + number % 3)])
    with open(tmp_path / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert smallvit("shard", tmp_path / "table.csv", tmp_path / "out")[0] == 0
    one, two = (read_source(DataConfig(data=str(tmp_path / name))) for name in ("table.csv", "out"))
    for name in ("class_names", "labels", "splits", "groups", "weights", "label_sets"):
        assert getattr(one, name) == getattr(two, name), name
    assert not any(name.endswith(".cls") for name in members(tmp_path / "out"))


def test_data_without_image_files_is_refused(tmp_path: Path, smallvit: Command) -> None:
    code, _, error = smallvit("shard", "digits", tmp_path / "out")
    assert (code, "only image files" in error) == (2, True)


def test_the_info_names_classes_and_size(written: Path) -> None:
    info = json.loads((written / "_info.json").read_text())
    assert (info["class_names"], info["size"]) == (["ant", "bee", "cat"], SIZE)
