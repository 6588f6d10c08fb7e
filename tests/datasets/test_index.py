"""Compare the index of a large folder with a new listing; it is not used once anything has changed."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smallvit import datasets
from smallvit.config.options import DataConfig
from smallvit.datasets import image_folder, index
from smallvit.datasets.decode import cache_folder
from smallvit.datasets.image_folder import list_folder, list_zip
from smallvit.datasets.listing import Listing
from smallvit.utils.errors import InputError

Change = Callable[[Path], object]


@pytest.fixture(autouse=True)
def _index_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Index small folders, also those that were written a moment ago."""
    monkeypatch.setattr(index, "INDEXED_FILES", 1)
    monkeypatch.setattr(index, "TICK", -(10**13))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Class folders in splits, with a nested folder."""
    for split in ("train", "test"):
        for name in ("cat", "dog", "dog/small"):
            for number in range(3):
                file = tmp_path / "images" / split / name / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (40 * number, 90, 20)).save(file)
    return tmp_path / "images"


def comparable(listing: Listing) -> Listing:
    """Return a listing without what says where it is from; archives are compared by what they read."""
    return replace(listing, indexed=False, archive=None)


def pack(folder: Path, file: Path) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, path.relative_to(folder))
    return file


def test_the_index_equals_the_listing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = list_folder(folder)
    monkeypatch.setattr(image_folder, "_scan", None)
    again = list_folder(folder)
    assert (first.indexed, again.indexed) == (False, True)
    assert comparable(again) == comparable(first)


def test_relative_paths_are_those_of_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list_folder(folder)
    monkeypatch.chdir(folder)
    again = list_folder(Path("."))
    assert again.indexed
    assert again.paths == list_folder(Path("."), use_index=False).paths


CHANGES: dict[str, Change] = {
    "added": lambda root: shutil.copy(root / "train/cat/0.png", root / "train/cat/9.png"),
    "added below": lambda root: shutil.copy(root / "train/cat/0.png", root / "test/dog/small/9.png"),
    "removed": lambda root: (root / "train/dog/1.png").unlink(),
    "renamed": lambda root: (root / "train/dog/1.png").rename(root / "train/dog/7.png"),
    "moved": lambda root: (root / "train/dog/1.png").rename(root / "train/cat/7.png"),
    "class renamed": lambda root: [(root / split / "dog").rename(root / split / "ant") for split in ("train", "test")],
    "split removed": lambda root: shutil.rmtree(root / "test"),
    "folder replaced": lambda root: (
        shutil.copytree(root / "train/cat", root.parent / "new"),
        (root.parent / "new/0.png").rename(root.parent / "new/8.png"),
        shutil.rmtree(root / "train/cat"),
        (root.parent / "new").rename(root / "train/cat"),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_folder_is_listed_again(folder: Path, name: str) -> None:
    before, times = list_folder(folder), os.stat(folder / "train/dog")
    CHANGES[name](folder)
    if (folder / "train/dog").is_dir():
        os.utime(folder / "train/dog", ns=(times.st_atime_ns, times.st_mtime_ns))  # as rsync and tar do
    after = list_folder(folder)
    assert not after.indexed
    assert comparable(after) == comparable(list_folder(folder, use_index=False))
    assert after.paths != before.paths
    assert list_folder(folder).indexed


def test_a_changed_list_of_labels_is_read_again(tmp_path: Path) -> None:
    for name in ("train/a/images/1.png", "train/b/images/2.png", "val/images/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    table = tmp_path / "val/val_annotations.txt"
    table.write_text("3.png\ta\n")
    labels = [list_folder(tmp_path).labels[-1]]
    table.write_text("3.png\tb\n")
    assert [*labels, list_folder(tmp_path).labels[-1]] == [0, 1]


def test_a_folder_that_changed_a_moment_ago_is_listed_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "TICK", 10**13)
    list_folder(folder)
    assert not list_folder(folder).indexed


def test_a_folder_without_labels_has_its_own_index(folder: Path) -> None:
    shutil.rmtree(folder / "train/dog")
    for _ in range(2):
        unlabeled = list_folder(folder / "train", labels=False)
        assert unlabeled.class_names == ("images",)
        with pytest.raises(InputError, match="at least 2 class folders"):
            list_folder(folder / "train")
    assert unlabeled.indexed
    load = {"data": str(folder / "train"), "val_fraction": 0.0, "streaming": "off"}
    assert len(datasets.create_dataset(DataConfig(**load), labels=False).train) == 3


def test_small_folders_are_not_indexed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "INDEXED_FILES", 19)
    list_folder(folder)
    assert not [*cache_folder().glob("*")]


def test_a_damaged_index_is_written_again(folder: Path) -> None:
    list_folder(folder)
    (file,) = cache_folder().glob("listing-*")
    file.write_bytes(file.read_bytes()[:-40])
    assert not list_folder(folder).indexed
    assert list_folder(folder).indexed


def test_images_in_memory_are_those_that_were_overwritten(folder: Path) -> None:
    load = {"data": str(folder), "val_fraction": 0.0, "streaming": "off"}
    datasets.create_dataset(DataConfig(**load))
    for file in folder.rglob("*.png"):
        with open(file, "wb") as same:  # the folder does not change
            Image.new("RGB", (8, 8), "white").save(same, "PNG")
    assert list_folder(folder).indexed
    assert datasets.create_dataset(DataConfig(**load)).train.pixels.eq(255).all()


def test_a_zip_is_read_without_its_directory(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = pack(folder, tmp_path / "images.zip")
    with zipfile.ZipFile(file) as archive:
        expected = {info.filename: archive.read(info) for info in archive.infolist()}
    first = list_zip(file)
    monkeypatch.setattr(zipfile.ZipFile, "_RealGetContents", None)  # reads the directory
    again = list_zip(file)
    assert (first.indexed, again.indexed) == (False, True)
    assert comparable(again) == comparable(first)
    for listing in (first, again):
        assert {path: listing.open(number).read() for number, path in enumerate(listing.paths)} == expected
        stream = datasets.create_dataset(DataConfig(data=str(file), streaming="on", val_fraction=0.0, workers=0))
        assert np.array_equal(stream.train.decode(0), datasets.decode.decode_image(str(folder / "train/cat/0.png"), 8))


def test_a_replaced_zip_is_listed_again(folder: Path, tmp_path: Path) -> None:
    file = pack(folder, tmp_path / "images.zip")
    old = list_zip(file)
    assert old.open(0).read()
    for path in folder.rglob("0.png"):
        Image.new("RGB", (9, 7), "white").save(path)
    pack(folder, file)
    new = list_zip(file)
    assert not new.indexed
    assert new.open(0).read() == Path(folder, new.paths[0]).read_bytes()
