"""TrainLoader of images that stay on disk, against the same images in memory and against Pillow."""

from __future__ import annotations

import gc
import io
import itertools
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from smallvit import datasets
from smallvit.config.options import AugmentConfig, DataConfig
from smallvit.datasets import factory
from smallvit.datasets.augment import Augment, RectangleDraws, crop_boxes
from smallvit.datasets.dataset import Files, ImageDataset, Images
from smallvit.datasets.decode import decode_image
from smallvit.datasets.listing import Listing
from smallvit.datasets.loader import IGNORED_LABEL, InMemoryLoader, evaluation_batches
from smallvit.datasets.streaming import Crops, StreamingLoader, decode_crops
from smallvit.utils.errors import InputError
from tests.sweep import sweep

CPU = torch.device("cpu")
Writer = Callable[..., list[Path]]
Batch = tuple[Tensor, Tensor]
ORIENTATION = 0x0112


def stream(folder: Path, workers: int = 0, **options: object) -> ImageDataset:
    return datasets.create_dataset(DataConfig(data=str(folder), streaming="on", workers=workers, **options))


def augment(data: ImageDataset, aug: str = "lee2021", **options: object) -> Augment:
    return Augment.from_config(AugmentConfig(aug=aug, **options), data.img_size, data.flip, policy="imagenet")


def batches(data: ImageDataset, aug: str = "lee2021", crop: str = "auto", **options: object) -> StreamingLoader:
    return StreamingLoader(data, options.pop("batch_size", 14), augment(data, aug, crop=crop), 0, CPU, **options)


def assert_same(ours: Iterator[Batch], expected: Iterator[Batch]) -> None:
    """Equal to the last bit."""
    compared = 0
    for (x, y), (target, target_y) in zip(ours, expected, strict=True):
        assert torch.equal(x, target)
        assert torch.equal(y, target_y)
        compared += len(x)
    assert compared


def united(parts: list[Iterator[Batch]]) -> Iterator[Batch]:
    """Return the batches whose parts, in the order of ranks, these are."""
    for step in zip(*parts, strict=True):
        yield torch.cat([x for x, _ in step]), torch.cat([y for _, y in step])


def workers_alive() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]


def wait_for_workers_to_end(before: list[psutil.Process]) -> None:
    deadline = time.monotonic() + 20
    while set(workers_alive()) - set(before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not set(workers_alive()) - set(before)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise: every misplaced pixel shows."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def landscape(width: int, height: int) -> Image.Image:
    """Smooth waves, as photographs are mostly."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = [np.sin(9 * x + 4 * y), np.cos(7 * y - 3 * x), np.sin(12 * x * y)]
    return Image.fromarray((127 + 100 * np.stack(waves, axis=-1)).astype(np.uint8))


def save(image: Image.Image, path: Path, orientation: int = 1, **options: object) -> str:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image.save(path, exif=exif, **options)
    return str(path)


def rectangle(width: int, height: int, seed: int, least_area: float) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is cut out of an image of this size."""
    box = crop_boxes(RectangleDraws.draw(np.random.default_rng(seed), 1), height, width, (least_area, 1.0))
    return tuple(int(edge[0]) for edge in (box.left, box.top, box.right, box.bottom))


def decode_crop(
    file: str | io.BytesIO, size: int, rng: np.random.Generator, least_area: float, resampling: str = "BILINEAR"
) -> np.ndarray:
    """Decode one random crop of an image."""
    crops = Crops(RectangleDraws.draw(rng, 1), (least_area, 1.0), Image.Resampling[resampling])
    return decode_crops(file, size, crops)[0].numpy()


def difference(ours: np.ndarray, expected: Image.Image) -> np.ndarray:
    return np.abs(ours.transpose(1, 2, 0).astype(int) - np.asarray(expected.convert("RGB")).astype(int))


def test_images_stay_on_disk_when_asked_or_when_they_are_large(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forms(streaming: str) -> set[type]:
        data = datasets.create_dataset(DataConfig(data=str(image_folder), streaming=streaming, workers=0))
        assert (data.img_size, data.in_chans) == (16, 3)
        assert [len(split) for split in (data.train, data.val, data.test)] == [42, 6, 12]
        return {type(split) for split in (data.train, data.val, data.test)}

    assert forms("on") == {Files}
    assert forms("auto") == {Images}
    monkeypatch.setattr(factory, "MAX_IN_MEMORY", 60 * 3 * 16 * 16 - 1)
    assert forms("auto") == {Files}
    assert forms("off") == {Images}


def test_crops_of_files_are_the_same_wherever_images_are_kept(tmp_path: Path) -> None:
    def kept(shape: tuple[int, int], streaming: str = "auto", **options: object) -> type:
        folder = tmp_path / f"{shape[0]}x{shape[1]}"
        for index in range(0 if folder.exists() else 12):
            (folder / f"{index % 2}").mkdir(parents=True, exist_ok=True)
            picture(*shape, index).save(folder / f"{index % 2}" / f"{index}.png")
        config = DataConfig(data=str(folder), img_size=16, streaming=streaming)
        return type(datasets.create_dataset(config, augment=AugmentConfig(**options)).train)

    for shape in ((24, 16), (16, 24), (32, 32)):  # pixels are lost in memory
        assert kept(shape, crop="resized") is Files
        assert kept(shape, aug="deit") is Images  # which pads images of 16 px
        with pytest.raises(InputError, match="--streaming off: --crop resized"):
            kept(shape, "off", crop="resized")
        assert kept(shape, "off") is Images
    for shape in ((16, 16), (8, 8)):
        assert kept(shape, crop="resized") is Images


def test_streaming_splits_as_memory_does(image_folder: Path) -> None:
    streamed, held = stream(image_folder), datasets.create_dataset(DataConfig(data=str(image_folder)))
    for split in ("train", "val", "test"):
        ours, theirs = getattr(streamed, split), getattr(held, split)
        assert torch.equal(ours.labels, theirs.labels)
        for position, pixels in zip(ours.positions, theirs.pixels, strict=True):
            assert np.array_equal(decode_image(ours.listing.open(position), 16), pixels.numpy())


def test_the_fingerprint_of_streamed_images_follows_the_files(image_folder: Path) -> None:
    first, same = stream(image_folder), stream(image_folder)
    assert first.fingerprint == same.fingerprint
    (image_folder / "dark" / "000.png").write_bytes((image_folder / "dark" / "001.png").read_bytes()[:-1] + b"x")
    assert stream(image_folder).fingerprint != first.fingerprint


@sweep("crop", ["auto", "resized"])
def test_batches_are_the_same_with_any_number_of_workers(image_folder: Path, crop: str) -> None:
    expected = list(batches(stream(image_folder), crop=crop).epoch(0))
    for workers in (1, 2):
        assert_same(batches(stream(image_folder, workers), crop=crop).epoch(0), iter(expected))


@sweep("aug", ["lee2021", "deit"])
@sweep("crop", ["auto", "resized"])
@sweep("world", [2, 3, 4])
def test_batches_are_the_same_however_many_devices_share_them(
    image_folder: Path, aug: str, crop: str, world: int
) -> None:
    data = stream(image_folder)
    parts = [batches(data, aug, crop, rank=rank, world=world).epoch(1) for rank in range(world)]
    assert_same(united(parts), batches(data, aug, crop).epoch(1))


def test_devices_without_a_share_of_a_small_batch_get_an_empty_one(image_folder: Path) -> None:
    data = stream(image_folder)
    parts = [list(batches(data, batch_size=4, rank=rank, world=4).epoch(0)) for rank in range(4)]
    assert any(not len(x) for part in parts for x, _ in part)
    assert_same(united([iter(part) for part in parts]), batches(data, batch_size=4).epoch(0))


@sweep("workers", [0, 2])
@sweep("crop", ["auto", "resized"])
def test_an_epoch_can_be_entered_anywhere(image_folder: Path, crop: str, workers: int) -> None:
    data = stream(image_folder, workers)
    whole = list(batches(data, crop=crop).epoch(2))
    assert len(whole) == len(batches(data)) == 3
    for start in (1, 2):
        assert_same(batches(data, crop=crop).epoch(2, start=start), iter(whole[start:]))
    assert list(batches(data, crop=crop).epoch(2, start=3)) == []


@sweep("aug", ["none", "basic", "mix", "lee2021"])
def test_unscaled_images_make_the_same_batches_as_in_memory(image_folder: Path, aug: str) -> None:
    held = datasets.create_dataset(DataConfig(data=str(image_folder)))
    streamed = replace(stream(image_folder), mean=held.mean, std=held.std)
    for epoch in range(2):
        expected = InMemoryLoader(held, 14, augment(held, aug), 0, CPU).epoch(epoch)
        assert_same(batches(streamed, aug).epoch(epoch), expected)


@sweep("workers", [0, 2])
@sweep("split", ["val", "test"])
def test_evaluation_gives_every_image_once_and_in_order(image_folder: Path, workers: int, split: str) -> None:
    held = datasets.create_dataset(DataConfig(data=str(image_folder)))
    streamed = replace(stream(image_folder, workers), mean=held.mean, std=held.std)
    assert_same(evaluation_batches(streamed, split, CPU, 5), evaluation_batches(held, split, CPU, 5))


def test_an_empty_split_has_no_batches(image_folder: Path) -> None:
    data = stream(image_folder, val_fraction=0)
    assert len(data.val) == 0
    assert list(evaluation_batches(data, "val", CPU, 5)) == []


def test_zip_files_are_streamed_too(image_folder: Path, tmp_path: Path) -> None:
    file = shutil.make_archive(str(tmp_path / "packed"), "zip", image_folder)
    held = datasets.create_dataset(DataConfig(data=file))
    for workers in (0, 2):
        streamed = replace(stream(Path(file), workers), mean=held.mean, std=held.std)
        expected = InMemoryLoader(held, 14, augment(held, "mix"), 0, CPU).epoch(0)
        assert_same(batches(streamed, "mix").epoch(0), expected)


def test_workers_resample_as_the_preset_does(image_folder: Path) -> None:
    data = stream(image_folder)
    for aug, expected in (
        ("deit", "BICUBIC"),
        ("deit3", "BICUBIC"),
        ("augreg-medium1", "BILINEAR"),
        ("mix", "BILINEAR"),
    ):
        assert batches(data, aug, crop="resized").crops.keywords["resampling"].name == expected


@sweep("least_area", [0.08, 0.5])
@sweep("shape", [(60, 40), (40, 60), (33, 33), (20, 90), (9, 7)])
def test_crops_are_those_of_pillow_and_torchvision(tmp_path: Path, shape: tuple[int, int], least_area: float) -> None:
    image = picture(*shape).point(lambda level: 80 + level // 3)  # bicubic overshoots stay within 0 to 255
    file = save(image, tmp_path / "x.png")
    for seed in range(12):
        left, top, right, bottom = rectangle(*shape, seed, least_area)
        ours = decode_crop(file, 16, np.random.default_rng(seed), least_area)
        expected = image.crop((left, top, right, bottom)).resize((16, 16), Image.Resampling.BILINEAR)
        assert difference(ours, expected).max() <= 1
        theirs = TF.resized_crop(image, top, left, bottom - top, right - left, [16, 16])
        assert difference(ours, theirs).max() <= 2
        ours = decode_crop(file, 16, np.random.default_rng(seed), least_area, "BICUBIC")
        expected = image.crop((left, top, right, bottom)).resize((16, 16), Image.Resampling.BICUBIC)
        assert difference(ours, expected).max() <= 1


@sweep("split", [(10, 20), (0, 30), (13, 13), (6, 24)])
def test_views_of_one_image_are_decoded_once_and_as_alone(tmp_path: Path, split: tuple[int, int]) -> None:
    """Include photos, of which some crops are decoded at a fraction of the size."""
    for index in range(4):
        (tmp_path / f"{index % 2}").mkdir(exist_ok=True)
        landscape(90 + index, 60).save(tmp_path / f"{index % 2}" / f"{index}.jpg", quality=95)
    data = stream(tmp_path, img_size=16, val_fraction=0, test_fraction=0.4)
    loader = StreamingLoader(data, 30, augment(data, "deit", crop="resized", aug_repeats=15), 0, CPU)
    (order,) = loader.sampling.batches(0)
    (whole,) = loader.read(0, [order], [slice(0, 30)], 0)
    opened = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Listing, "open", lambda self, index: opened.append(index) or self.paths[index])
        (part,) = loader.read(0, [order], [slice(*split)], 0)
    assert torch.equal(part[0], whole[0][slice(*split)])
    assert torch.equal(part[1], whole[1][slice(*split)])
    assert len(opened) == len(set(order[slice(*split)].tolist()))


@sweep("mode", ["L", "RGBA", "P", "I;16", "1", "CMYK"])
def test_crops_of_any_mode_are_rgb(tmp_path: Path, mode: str) -> None:
    gray = np.tile(np.arange(40, dtype=np.uint8) * 6, (30, 1))
    image = Image.fromarray(gray.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(gray).convert(mode)
    path = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    image.save(path)
    reference = Image.fromarray(gray) if mode == "I;16" else image
    expected = reference.crop(rectangle(40, 30, 0, 0.2)).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)
    assert difference(decode_crop(str(path), 16, np.random.default_rng(0), 0.2), expected).max() <= 2


def test_rectangles_differ_between_images_epochs_and_views(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(6):
            picture(24, 24).save(tmp_path / name / f"{index}.png")  # all the same
    data = stream(tmp_path, val_fraction=0, img_size=8)
    loader = StreamingLoader(data, 6, augment(data, "none", crop="resized", aug_repeats=3), 0, CPU)
    seen = [image.flatten().tolist() for epoch in range(2) for x, _ in loader.epoch(epoch) for image in x]
    assert len({tuple(image) for image in seen}) > 0.9 * len(seen) > 10


@sweep("shape", [(800, 600), (600, 800), (1001, 333)])
def test_large_jpegs_decoded_at_a_fraction_of_their_size_look_the_same(
    tmp_path: Path, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = landscape(*shape)
    file = save(image, tmp_path / "x.jpg", quality=95)
    whole = Image.open(file).convert("RGB")
    fractions = set()
    own = JpegImageFile.draft

    def draft(self: JpegImageFile, *arguments: object) -> object:
        result = own(self, *arguments)
        fractions.add(round(shape[0] / self.size[0]))
        return result

    monkeypatch.setattr(JpegImageFile, "draft", draft)
    for seed in range(10):
        expected = whole.crop(rectangle(*shape, seed, 0.08)).resize((32, 32), Image.Resampling.BILINEAR)
        actual = difference(decode_crop(file, 32, np.random.default_rng(seed), 0.08), expected)
        assert actual.mean() < 2
        assert actual.max() < 24
    assert max(fractions) >= 4


@sweep("orientation", range(1, 9))
@sweep("suffix", ["png", "jpg", "webp", "tiff"])
def test_rectangles_lie_in_the_image_as_it_is_seen(tmp_path: Path, suffix: str, orientation: int) -> None:
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    file = save(landscape(48, 30), tmp_path / f"x.{suffix}", orientation, **options)
    upright = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    for seed in range(5):
        expected = upright.crop(rectangle(*upright.size, seed, 0.1)).resize((8, 8), Image.Resampling.BILINEAR)
        assert difference(decode_crop(file, 8, np.random.default_rng(seed), 0.1), expected).mean() < 2


def test_large_rotated_jpegs_are_cut_where_small_ones_are(tmp_path: Path) -> None:
    file = save(landscape(900, 500), tmp_path / "x.jpg", 6, quality=95)
    upright = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    assert upright.size == (500, 900)
    for seed in range(10):
        expected = upright.crop(rectangle(500, 900, seed, 0.1)).resize((16, 16), Image.Resampling.BILINEAR)
        assert difference(decode_crop(file, 16, np.random.default_rng(seed), 0.1), expected).mean() < 2


TEXT_AS_ORIENTATION = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0"
"""A tag of the wrong type, as broken cameras write."""


def test_an_orientation_without_meaning_is_passed_over(tmp_path: Path) -> None:
    image = landscape(48, 30)
    odd = Image.Exif()
    odd[ORIENTATION] = 9
    for exif in (odd, TEXT_AS_ORIENTATION):
        image.save(tmp_path / "x.jpg", exif=exif, quality=100, subsampling=0)
        assert decode_image(str(tmp_path / "x.jpg"), 16).shape == (3, 16, 16)
        for seed in range(5):
            expected = image.crop(rectangle(48, 30, seed, 0.1)).resize((8, 8), Image.Resampling.BILINEAR)
            actual = difference(decode_crop(str(tmp_path / "x.jpg"), 8, np.random.default_rng(seed), 0.1), expected)
            assert actual.mean() < 2


@pytest.mark.slow
def test_statistics_are_estimated_from_images_of_all_classes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = []
    for name, level, count in (("a", 30, 900), ("b", 120, 500), ("c", 220, 400)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(count):
            image = rng.normal([level, level / 2, 128], 15, (8, 8, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / "train" / name / f"{index:04}.png", compress_level=1)
            pixels.append(image)
    everything = np.stack(pixels) / 255
    data = stream(tmp_path, val_fraction=0, test_fraction=0.001)
    assert data.mean == pytest.approx(everything.mean(axis=(0, 1, 2)), abs=0.005)
    assert data.std == pytest.approx(everything.std(axis=(0, 1, 2)), abs=0.005)
    assert data.mean != pytest.approx(everything.mean(axis=(0, 1, 2)), abs=1e-9)  # an estimate
    assert len(data.train.sample()) == 1000


def test_statistics_of_few_images_are_exact(image_folder: Path) -> None:
    streamed, held = stream(image_folder), datasets.create_dataset(DataConfig(data=str(image_folder)))
    assert (streamed.mean, streamed.std) == (held.mean, held.std)


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """Write two classes of 20 images of one color each: red is the image's number, green the class."""
    for label, name in enumerate(("a", "b")):
        for split, count in (("train", 14), ("test", 6)):
            folder = tmp_path / "numbered" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                color = (100 * label + index + 20 * (split == "test"), 100 * label, 0)
                Image.new("RGB", (8, 8), color).save(folder / f"{index:02}.png")
    return tmp_path / "numbered"


def numbers(data: ImageDataset, x: Tensor) -> list[int]:
    """Return what red says."""
    return ((x[:, 0, 0, 0] * data.std[0] + data.mean[0]) * 255).round().int().tolist()


def plain(data: ImageDataset, **options: object) -> StreamingLoader:
    return StreamingLoader(data, 7, augment(data, "none"), 0, CPU, **options)


@sweep("workers", [0, 2])
@sweep("crop", ["none", "resized"])
def test_a_broken_image_stops_the_run_with_its_name(numbered: Path, workers: int, crop: str) -> None:
    broken = numbered / "train" / "b" / "03.png"
    broken.write_bytes(broken.read_bytes()[:45])
    before = workers_alive()
    with pytest.raises(InputError) as caught:
        list(batches(stream(numbered, workers, val_fraction=0), "none", crop).epoch(0))
    assert str(broken) in str(caught.value)
    assert "--skip-corrupt" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert " at 0x" not in str(caught.value)
    del caught
    gc.collect()
    wait_for_workers_to_end(before)


def test_an_image_that_went_away_is_named(numbered: Path) -> None:
    data = stream(numbered, 1, val_fraction=0)
    (numbered / "train" / "b" / "03.png").unlink()
    with pytest.raises(InputError, match=r"train/b/03\.png"):
        list(plain(data).epoch(0))


def test_a_broken_image_of_the_test_stops_it_with_its_name(numbered: Path) -> None:
    (numbered / "test" / "a" / "05.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"test/a/05\.png .*--skip-corrupt"):
        list(evaluation_batches(stream(numbered), "test", CPU, 4))


@sweep("workers", [0, 2])
def test_training_replaces_a_damaged_image_by_the_next_one(numbered: Path, workers: int) -> None:
    for name in ("a/00.png", "a/13.png", "b/07.png"):
        (numbered / "train" / name).write_bytes(b"no image")
    data = stream(numbered, workers, val_fraction=0, skip_corrupt=True)
    whole = {100 * label + index for label in range(2) for index in range(14)}
    instead = {0: 1, 13: 100, 107: 108}
    for epoch in range(3):
        seen: list[int] = []
        for (x, targets), batch in zip(plain(data).epoch(epoch), plain(data).sampling.batches(epoch), strict=True):
            actual = numbers(data, x)
            assert len(actual) == len(batch)
            assert [int(number >= 100) for number in actual] == targets.argmax(1).tolist()
            meant = [100 * int(data.train.labels[index]) + int(index) % 14 for index in batch]
            assert actual == [instead.get(number, number) for number in meant]
            seen += actual
        assert set(seen) == whole - {0, 13, 107}


@sweep("workers", [0, 2])
@sweep("batch_size", [12, 5, 1])
def test_broken_images_are_left_out_of_the_test(numbered: Path, workers: int, batch_size: int) -> None:
    for name in ("a/00.png", "b/05.png"):
        (numbered / "test" / name).write_bytes(b"no image")
    data = stream(numbered, workers, skip_corrupt=True)
    actual = [
        (numbers(data, x), y.tolist())
        for x, y in evaluation_batches(data, "test", CPU, batch_size)
        if y.tolist() != [IGNORED_LABEL]  # fills a batch of which nothing is left
    ]
    assert [number for each, _ in actual for number in each] == [21, 22, 23, 24, 25, 120, 121, 122, 123, 124]
    assert [label for _, labels in actual for label in labels] == [0] * 5 + [1] * 5


def test_a_batch_of_nothing_but_broken_images_says_so(numbered: Path) -> None:
    data = stream(numbered, val_fraction=0, skip_corrupt=True)
    for path in (numbered / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"cannot be decoded, nor the 31 images after it: .*\.png"):
        list(plain(data).epoch(0))


def test_a_folder_of_nothing_but_broken_images_is_refused(numbered: Path) -> None:
    for path in numbered.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(InputError, match="none of 28 images can be decoded"):
        stream(numbered, val_fraction=0, skip_corrupt=True)


def new_workers(before: list[psutil.Process]) -> set[psutil.Process]:
    return set(workers_alive()) - set(before)


def test_workers_are_kept_for_later_passes_and_end_with_the_data(image_folder: Path) -> None:
    before = workers_alive()
    data = stream(image_folder, 2)
    loader = batches(data, batch_size=4)
    assert not new_workers(before)
    next(loader.epoch(0))  # abandoned
    first = new_workers(before)
    assert len(first) == 2
    expected = list(batches(stream(image_folder), batch_size=4).epoch(1))
    for _ in range(2):
        assert_same(loader.epoch(1), iter(expected))
        list(evaluation_batches(data, "val", CPU, 5))
        next(evaluation_batches(data, "test", CPU, 2))
        assert new_workers(before) == first
    del data, loader
    gc.collect()
    wait_for_workers_to_end(before)


def test_passes_at_the_same_time_do_not_mix(image_folder: Path) -> None:
    before = workers_alive()
    data, other = stream(image_folder, 2), stream(image_folder)
    passes = (
        lambda each: batches(each, batch_size=4).epoch(0),
        lambda each: batches(each, batch_size=4).epoch(1),
        lambda each: evaluation_batches(each, "test", CPU, 3),
    )
    together = itertools.zip_longest(*(start(data) for start in passes))
    expected = itertools.zip_longest(*(start(other) for start in passes))
    for ours, theirs in zip(together, expected, strict=True):
        for each, target in zip(ours, theirs, strict=True):
            assert (each is None) == (target is None)
            assert each is None or all(map(torch.equal, each, target))
    gc.collect()
    assert len(new_workers(before)) == 2  # those of the passes that had none are gone
    del data
    gc.collect()
    wait_for_workers_to_end(before)


ENDS = """
import os, signal, sys
from smallvit import datasets
from smallvit.config.options import DataConfig
from smallvit.datasets.loader import evaluation_batches
import psutil, torch
for end in sys.argv[2:]:
    if os.fork():
        os.wait()
        continue
    data = datasets.create_dataset(DataConfig(data=sys.argv[1], streaming="on", workers=2))
    cycle = [data]
    cycle.append(cycle)
    batches = evaluation_batches(data, "test", torch.device("cpu"), 2)
    next(batches)
    print(*[child.pid for child in psutil.Process().children()], flush=True)
    exec(end)
    break
"""


@pytest.mark.slow
def test_workers_end_with_the_program(image_folder: Path) -> None:
    ends = ["pass", "sys.exit(3)", "raise ValueError", "os.kill(os.getpid(), signal.SIGINT)", "os._exit(1)"]
    command = [sys.executable, "-c", ENDS, str(image_folder), *ends]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    pids = [int(pid) for pid in ended.stdout.split()]
    assert len(pids) == 2 * len(ends), ended.stderr
    deadline = time.monotonic() + 60  # of a process that is killed, they notice the end after seconds
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(psutil.pid_exists, pids))


def test_zero_workers_start_no_process(image_folder: Path) -> None:
    before = workers_alive()
    next(batches(stream(image_folder, 0)).epoch(0))
    assert set(workers_alive()) == set(before)


@sweep("workers", [0, 1])
def test_an_epoch_draws_nothing_from_the_global_generators(image_folder: Path, workers: int) -> None:
    data = stream(image_folder, workers)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(batches(data, "deit", "resized").epoch(0))
    list(evaluation_batches(data, "test", CPU, 5))
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002


def test_a_file_object_is_cropped_as_its_file_is(tmp_path: Path) -> None:
    file = save(picture(30, 20), tmp_path / "x.png")
    content = io.BytesIO(Path(file).read_bytes())
    ours, theirs = (decode_crop(each, 8, np.random.default_rng(0), 0.3) for each in (content, file))
    assert np.array_equal(ours, theirs)
