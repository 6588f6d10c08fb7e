"""Test the splits that --data gives: fractions, notes, and named data sets read from miniatures of their files."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, SVHN

from smallvit import datasets
from smallvit.config.options import DataConfig
from smallvit.datasets.catalog import DATASETS
from smallvit.datasets.dataset import Files, ImageDataset, Images
from smallvit.datasets.factory import assemble, data_folder
from smallvit.utils.errors import InputError
from tests.sweep import sweep

Writer = Callable[..., list[Path]]
SPLITS = ("train", "val", "test")


@pytest.fixture(autouse=True)
def _without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALLVIT_OFFLINE", "1")
    monkeypatch.delenv("SMALLVIT_DATA", raising=False)


def load(data: object, **options: object) -> ImageDataset:
    return datasets.create_dataset(
        DataConfig(data=str(data), **{k: str(v) if isinstance(v, Path) else v for k, v in options.items()})
    )


def sizes(data: ImageDataset) -> list[int]:
    return [len(getattr(data, split)) for split in SPLITS]


def identities(images: Images) -> set[bytes]:
    return {image.numpy().tobytes() for image in images.pixels}


def in_memory(images: Images | Files) -> Images:
    return images if isinstance(images, Images) else images.sample()


def noise(seed: int, count: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


def some(labels: list[int], seed: int = 0) -> Images:
    return Images(torch.from_numpy(noise(seed, len(labels), 4)), torch.tensor(labels, dtype=torch.int64))


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def set_checksums(monkeypatch: pytest.MonkeyPatch, name: str, files: dict[str, bytes]) -> None:
    known = [replace(archive, md5=md5(files[archive.file])) for archive in DATASETS[name].archives]
    monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], archives=tuple(known)))


Miniature = tuple[np.ndarray, list[int], np.ndarray, list[int]]
"""Training pixels and labels, test pixels and labels."""


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Miniature:
    """Six images of each class in tmp_path/cifar10."""
    train, test, labels = noise(0, 60), noise(1, 10), [index % 10 for index in range(60)]
    part = {f"data_batch_{i + 1}": (train[12 * i : 12 * i + 12], labels[12 * i : 12 * i + 12]) for i in range(5)}
    part["test_batch"] = (test, list(range(10)))
    files = {name: pickle.dumps({"data": x.reshape(len(x), -1), "labels": y}) for name, (x, y) in part.items()}
    files["batches.meta"] = pickle.dumps({"label_names": [f"kind {i}" for i in range(10)]})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    for listing in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, listing, [[file, md5(files[file])] for file, _ in getattr(CIFAR10, listing)])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(files["batches.meta"])})
    set_checksums(monkeypatch, "cifar10", {CIFAR10.filename: buffer.getvalue()})
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / CIFAR10.filename).write_bytes(buffer.getvalue())
    return train, labels, test, list(range(10))


@pytest.fixture
def svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Miniature:
    """Three images of each class in tmp_path/svhn."""
    train, test = noise(2, 30), noise(3, 10)
    labels = {"train": [1 + i % 10 for i in range(30)], "test": [10 - i for i in range(10)]}  # 1 to 10
    files = {}
    for split, pixels in (("train", train), ("test", test)):
        buffer = io.BytesIO()
        scipy.io.savemat(buffer, {"X": pixels.transpose(2, 3, 1, 0), "y": np.array(labels[split], np.uint8)[:, None]})
        files[f"{split}_32x32.mat"] = buffer.getvalue()
    set_checksums(monkeypatch, "svhn", files)
    known = {s: [url, file, md5(files[file])] for s, (url, file, _) in SVHN.split_list.items() if file in files}
    monkeypatch.setattr(SVHN, "split_list", known)
    (tmp_path / "svhn").mkdir()
    for file, content in files.items():
        (tmp_path / "svhn" / file).write_bytes(content)
    return train, [label % 10 for label in labels["train"]], test, [label % 10 for label in labels["test"]]


PUBLISHED = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), True, "lee2021", "cifar10"),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), False, "lee2021", "svhn"),
}
"""Mean, standard deviation, flip, preset and policy."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_data_sets_by_name_are_described_by_the_table(
    tmp_path: Path, request: pytest.FixtureRequest, name: str
) -> None:
    train, labels, test, test_labels = request.getfixturevalue(name)
    data = load(name, data_dir=tmp_path, val_fraction=0)
    assert (data.mean, data.std, data.flip, data.aug, data.policy) == PUBLISHED[name]
    assert (data.name, data.source, data.img_size, data.in_chans) == (name, name, 32, 3)
    assert np.array_equal(data.train.pixels.numpy(), train)
    assert data.train.labels.tolist() == labels
    assert np.array_equal(data.test.pixels.numpy(), test)
    assert data.test.labels.tolist() == test_labels
    assert len(data.class_names) == 10


def test_only_the_training_images_of_a_published_split_are_divided(tmp_path: Path, cifar10: Miniature) -> None:
    data = load("cifar10", data_dir=tmp_path, val_fraction=0.3, test_fraction=0.9)
    assert sizes(data) == [40, 20, 10]
    assert data.val.labels.bincount().tolist() == [2] * 10
    assert identities(data.train) | identities(data.val) == {image.tobytes() for image in cifar10[0]}
    assert not identities(data.train) & identities(data.val)
    assert np.array_equal(data.test.pixels.numpy(), cifar10[2])


@pytest.mark.parametrize("size", [16, 32, 48])
def test_data_sets_by_name_come_in_any_size(tmp_path: Path, cifar10: Miniature, size: int) -> None:
    data = load("cifar10", data_dir=tmp_path, img_size=size, val_fraction=0)
    assert data.img_size == size
    assert (data.mean, data.std) == PUBLISHED["cifar10"][:2]
    for ours, image in ((data.train.pixels, cifar10[0]), (data.test.pixels, cifar10[2])):
        expected = Image.fromarray(image[0].transpose(1, 2, 0)).resize((size, size), Image.Resampling.BICUBIC)
        difference = ours[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(expected).astype(int)
        assert np.abs(difference).mean() < 0.5


@sweep("name", ["cifar10", "svhn", "mnist", "digits"])
def test_data_sets_that_are_arrays_are_not_streamed(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"--streaming on: {name} is read into memory"):
        load(name, data_dir=tmp_path, streaming="on")


def test_the_data_folder_is_the_one_given_or_the_environments_or_the_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMALLVIT_CACHE", str(tmp_path / "cache"))
    assert data_folder(DataConfig()) == tmp_path / "cache" / "data"
    monkeypatch.setenv("SMALLVIT_DATA", str(tmp_path / "shared"))
    assert data_folder(DataConfig()) == tmp_path / "shared"
    assert data_folder(DataConfig(data_dir=str(tmp_path / "mine"))) == tmp_path / "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_folder(DataConfig(data_dir="~/mine")) == tmp_path / "mine"


def test_data_set_is_read_from_the_folder_of_the_environment_variable(
    tmp_path: Path, svhn: Miniature, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMALLVIT_DATA", str(tmp_path))
    assert sizes(load("svhn")) == [20, 10, 10]


def test_files_that_are_missing_are_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cifar-10-python\.tar\.gz"):
        load("cifar10", data_dir=tmp_path)


WNIDS = [f"n{index:08}" for index in range(1, 4)]


def png(seed: int, size: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(seed, 1, size)[0].transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def tiny_imagenet() -> dict[str, bytes]:
    """Ten training and two validation images of three classes."""
    files = {f"train/{wnid}/images/{wnid}_{i}.JPEG": png(10 * k + i) for k, wnid in enumerate(WNIDS) for i in range(10)}
    files |= {f"val/images/val_{i}.JPEG": png(50 + i) for i in range(6)}
    files["val/val_annotations.txt"] = "".join(f"val_{i}.JPEG\t{WNIDS[i // 2]}\t0\n" for i in range(6)).encode()
    files["wnids.txt"] = "\n".join(WNIDS).encode()
    files["words.txt"] = "".join(f"{wnid}\tword {k}\n" for k, wnid in enumerate(WNIDS)).encode()
    return files


@pytest.fixture
def tiny_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put Tiny-ImageNet's zip file into the folder of data sets, and set its checksum."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in tiny_imagenet().items():
            archive.writestr(f"tiny-imagenet-200/{name}", content)
    set_checksums(monkeypatch, "tiny-imagenet", {"tiny-imagenet-200.zip": buffer.getvalue()})
    path = tmp_path / "data" / "tiny-imagenet" / "tiny-imagenet-200.zip"
    path.parent.mkdir(parents=True)
    path.write_bytes(buffer.getvalue())
    return path


@pytest.mark.usefixtures("tiny_zip")
def test_tiny_imagenet_by_name_is_read_from_its_zip_file(tmp_path: Path) -> None:
    data = load("tiny-imagenet", data_dir=tmp_path / "data")
    assert sizes(data) == [27, 3, 6]
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.class_names == ("word 0", "word 1", "word 2")
    assert (data.mean, data.std) == ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821))
    assert (data.name, data.source, data.img_size) == ("tiny-imagenet", "tiny-imagenet", 64)
    assert (data.flip, data.aug, data.policy) == (True, "lee2021", "imagenet")


def test_another_file_than_tiny_imagenets_is_refused(tmp_path: Path, tiny_zip: Path) -> None:
    with open(tiny_zip, "ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match="md5"):
        load("tiny-imagenet", data_dir=tmp_path / "data")


def test_an_unpacked_tiny_imagenet_needs_no_archive(tmp_path: Path) -> None:
    for name, content in tiny_imagenet().items():
        path = tmp_path / "tiny-imagenet" / "tiny-imagenet-200" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    data = load("tiny-imagenet", data_dir=tmp_path)
    assert sizes(data) == [27, 3, 6]
    assert data.mean == (0.4802, 0.4481, 0.3975)


@pytest.mark.usefixtures("tiny_zip")
def test_tiny_imagenet_is_streamed_when_asked(tmp_path: Path) -> None:
    options = {"data_dir": tmp_path / "data", "img_size": 32}
    streamed, held = load("tiny-imagenet", streaming="on", workers=0, **options), load("tiny-imagenet", **options)
    assert streamed.mean == held.mean == (0.4802, 0.4481, 0.3975)
    assert sizes(streamed) == sizes(held)
    assert streamed.img_size == held.img_size == 32
    for split in SPLITS:
        assert torch.equal(getattr(streamed, split).sample().pixels, getattr(held, split).pixels)
        assert torch.equal(getattr(streamed, split).labels, getattr(held, split).labels)


def test_imagenet_by_name_is_read_from_its_folders(tmp_path: Path, write_images: Writer) -> None:
    for k, wnid in enumerate(WNIDS):
        write_images(tmp_path / "imagenet" / "train" / wnid, 10, 60 * k + 30)
        write_images(tmp_path / "imagenet" / "val" / wnid, 2, 60 * k + 31)
    data = load("imagenet", data_dir=tmp_path, val_fraction=0.1)
    assert sizes(data) == [27, 3, 6]  # val/ is what everybody reports on
    assert data.img_size == 224
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (data.name, data.source, data.flip, data.aug) == ("imagenet", "imagenet", True, "deit")
    assert load("imagenet", data_dir=tmp_path, img_size=16, streaming="on", workers=0).img_size == 16


def test_nothing_is_held_out_of_a_share_of_nothing(image_folder: Path) -> None:
    whole, without = load(image_folder), load(image_folder, val_fraction=0)
    assert sizes(without) == [48, 0, 12]
    assert torch.equal(whole.test.pixels, without.test.pixels)
    assert identities(without.train) == identities(whole.train) | identities(whole.val)
    assert without.val.pixels.shape == (0, 3, 16, 16)
    assert any("last epoch" in note for note in without.notes)
    assert not any("last epoch" in note for note in whole.notes)


def test_no_split_of_the_data_is_dropped_for_a_share_of_nothing(tmp_path: Path, write_images: Writer) -> None:
    for name, level in (("a", 60), ("b", 200)):
        for split, count in (("train", 10), ("val", 3), ("test", 4)):
            write_images(tmp_path / split / name, count, level)
    assert sizes(load(tmp_path, val_fraction=0)) == [20, 6, 8]


@pytest.mark.parametrize("streaming", ["on", "off"])
def test_smaller_shares_of_the_training_images_are_parts_of_larger_ones(image_folder: Path, streaming: str) -> None:
    options = {"streaming": streaming, "workers": 0, "val_fraction": 0.2}
    shares = [load(image_folder, train_fraction=fraction, **options) for fraction in (0.01, 0.1, 0.3, 0.5, 1.0)]
    images = [in_memory(data.train) for data in shares]
    known = [identities(each) for each in images]
    assert [len(each) for each in known] == [3, 3, 12, 18, 39]  # of 13 per class: 1, 1, 4, 6, 13
    assert all(small <= large for small, large in itertools.pairwise(known))
    for each in images:
        assert len(set(each.labels.bincount(minlength=3).tolist())) == 1
    for data in shares:
        assert torch.equal(data.val.labels, shares[-1].val.labels)
        assert data.fingerprint == shares[-1].fingerprint
        for split in ("val", "test"):
            assert torch.equal(in_memory(getattr(data, split)).pixels, in_memory(getattr(shares[-1], split)).pixels)


def test_a_share_of_the_training_images_is_reported(image_folder: Path) -> None:
    notes = load(image_folder, train_fraction=0.3).notes
    assert any("training on 12 images" in note and "30 %" in note for note in notes)


@sweep("counts", [[100, 3, 1], [1, 1, 1], [50, 50, 7]])
@sweep("fraction", [0.001, 0.1, 0.34, 1.0])
def test_every_class_keeps_its_share_and_at_least_one_image(counts: list[int], fraction: float) -> None:
    labels = np.repeat(np.arange(3), counts).tolist()
    parts = {"train": some(labels), "val": some([0, 1, 2], 1), "test": some([0, 1, 2], 2)}
    config = DataConfig(data="some/folder", train_fraction=fraction)
    kept = assemble(config, parts, ("a", "b", "c"), []).train.labels.bincount(minlength=3).tolist()
    for count, n in zip(kept, counts, strict=True):
        assert count >= 1
        assert abs(count - n * fraction) <= 0.5 or count == 1


def test_the_statistics_are_those_of_the_images_trained_on() -> None:
    parts = {"train": some([0, 1] * 40), "val": some([0, 1], 1), "test": some([0, 1], 2)}
    data = assemble(DataConfig(data="some/folder", train_fraction=0.1), parts, ("a", "b"), [])
    pixels = data.train.pixels.double() / 255
    assert len(pixels) == 8
    assert data.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), abs=1e-9)


def test_a_class_without_training_images_is_named() -> None:
    parts = {"train": some([0, 2]), "test": some([0, 1, 2])}
    with pytest.raises(InputError, match="class 'b' has no usable training image"):
        assemble(DataConfig(data="some/folder"), parts, ("a", "b", "c"), [])


def test_data_without_training_images_is_refused() -> None:
    with pytest.raises(InputError, match="train"):
        assemble(DataConfig(data="some/folder"), {"test": some([0, 1])}, ("a", "b"), [])


def test_the_fingerprint_follows_pixels_labels_and_splits() -> None:
    def fingerprint(**parts: Images) -> str:
        return assemble(DataConfig(data="some/folder"), parts, ("a", "b"), []).fingerprint

    labels = [0, 1] * 20
    first = fingerprint(train=some(labels), test=some([0, 1], 1))
    assert first == fingerprint(train=some(labels), test=some([0, 1], 1))
    others = [
        fingerprint(train=some(labels, 5), test=some([0, 1], 1)),
        fingerprint(train=some(labels[::-1]), test=some([0, 1], 1)),
        fingerprint(train=some(labels), test=some([1, 0], 1)),
        fingerprint(train=some(labels), val=some([0, 1], 1), test=some([0, 1], 1)),
    ]
    assert len({first, *others}) == 5


def test_what_the_notes_say_is_true(image_folder: Path) -> None:
    data = load(image_folder, split_seed=3)
    assert f"test split: {len(data.test)} images, stratified, seed 3" in data.notes
    assert f"val split: {len(data.val)} images, stratified, seed 3" in data.notes


def test_folder_path_is_valid_from_another_working_directory(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(image_folder.parent)
    first = load(image_folder.name)
    assert (first.name, first.source) == ("images", str(image_folder))
    monkeypatch.chdir("/")
    assert load(first.source).fingerprint == first.fingerprint


def test_a_folder_of_a_data_sets_name_is_meant_with_its_path(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    image_folder.rename(tmp_path / "digits")
    assert load("digits").in_chans == 1
    meant = load("./digits")
    assert meant.class_names == ("dark", "gray", "light")
    assert load(meant.source).class_names == meant.class_names


@sweep(("given", "meant"), [("cifar-10", "cifar10"), ("imagnet", "imagenet"), ("shvn", "svhn")])
def test_an_unknown_name_is_reported_the_nearest(given: str, meant: str) -> None:
    with pytest.raises(InputError, match=f"'{meant}'"):
        load(given)


def test_a_split_whose_images_are_all_broken_is_refused_before_training(image_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(image_folder, tmp_path / "data" / "train")
    for name in ("dark", "light"):
        (tmp_path / "data" / "test" / name).mkdir(parents=True)
        (tmp_path / "data" / "test" / name / "0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"no image of test/ can be used"):
        datasets.create_dataset(DataConfig(data=str(tmp_path / "data"), skip_corrupt=True))


@pytest.mark.parametrize("packed", [False, True])
def test_two_folders_for_one_split_are_refused(image_folder: Path, tmp_path: Path, packed: bool) -> None:
    shutil.copytree(image_folder, tmp_path / "data" / "train")
    for name in ("val", "valid"):
        shutil.copytree(image_folder, tmp_path / "data" / name)
    data = shutil.make_archive(str(tmp_path / "x"), "zip", tmp_path / "data") if packed else str(tmp_path / "data")
    with pytest.raises(InputError, match=r"val.* valid"):
        datasets.create_dataset(DataConfig(data=data))


def test_a_split_without_images_is_refused(image_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(image_folder, tmp_path / "data" / "train")
    (tmp_path / "data" / "test" / "dark").mkdir(parents=True)
    with pytest.raises(InputError, match=r"test/ has no images"):
        datasets.create_dataset(DataConfig(data=str(tmp_path / "data")))


def test_a_copy_with_other_times_has_the_same_content(image_folder: Path, tmp_path: Path) -> None:
    one = datasets.create_dataset(DataConfig(data=str(image_folder), streaming="on", workers=0))
    shutil.copytree(image_folder, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*.png"):
        os.utime(path, ns=(1, 1))
    other = datasets.create_dataset(DataConfig(data=str(tmp_path / "copy"), streaming="on", workers=0))
    assert one.fingerprint == other.fingerprint
    next((tmp_path / "copy").rglob("*.png")).write_bytes(b"another size")
    changed = datasets.create_dataset(DataConfig(data=str(tmp_path / "copy"), streaming="on", workers=0))
    assert changed.fingerprint != other.fingerprint
