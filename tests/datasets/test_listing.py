"""Test which files are images of which class and split, in folders and zip files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from smallvit import datasets
from smallvit.config.config import Config
from smallvit.config.options import DataConfig
from smallvit.datasets.image_folder import list_folder, list_zip
from smallvit.datasets.listing import Listing, image_suffixes, is_image
from smallvit.utils.errors import InputError
from tests.datasets.test_image_folder_zips import pack, png, unpack
from tests.sweep import sweep

IMAGE = png(100)
RUN = json.dumps(Config().to_dict()).encode()
CLASSES = ("ant", "bee")


def classes(prefix: str = "", count: int = 2) -> dict[str, bytes]:
    return {f"{prefix}{name}/{index}.png": IMAGE for name in CLASSES for index in range(count)}


def both(tmp_path: Path, files: dict[str, bytes]) -> list[Listing]:
    """Return the listings of a folder and of a zip file with these files; they are the same."""
    actual = [list_folder(unpack(tmp_path / "folder", files)), list_zip(pack(tmp_path / "x.zip", files))]
    names = [
        [(listing.relative_path(index), listing.splits[index]) for index in range(len(listing))] for listing in actual
    ]
    assert names[0] == names[1]
    assert actual[0].notes == actual[1].notes
    assert actual[0].class_names == actual[1].class_names
    return actual


def left_out(listing: Listing) -> str:
    """Return the one note that says what was left out."""
    (note,) = [note for note in listing.notes if note.startswith("ignored: ")]
    return note


SPELLINGS = {
    ("Train", "Test"): ("train", "test"),
    ("TRAIN", "VAL", "TEST"): ("train", "val", "test"),
    ("training", "validation"): ("train", "val"),
    ("Training", "Testing"): ("train", "test"),
    ("train", "valid", "test"): ("train", "val", "test"),
    ("train", "dev"): ("train", "val"),
    ("seg_train", "seg_test"): ("train", "test"),
    ("seg_train/seg_train", "seg_test/seg_test"): ("train", "test"),
    ("train_set", "test_set"): ("train", "test"),
    ("training_set/training_set", "test_set/test_set"): ("train", "test"),
    ("train-images", "test-images"): ("train", "test"),
    ("photos/photos/Train", "photos/photos/Test"): ("train", "test"),
}


def test_split_folders_are_known_in_other_spellings(tmp_path: Path) -> None:
    for number, (folders, splits) in enumerate(SPELLINGS.items()):
        files = {name: content for folder in folders for name, content in classes(f"{folder}/").items()}
        (tmp_path / str(number)).mkdir()
        for listing in both(tmp_path / str(number), files):
            assert listing.class_names == CLASSES, folders
            assert list(dict.fromkeys(listing.splits)) == list(splits), folders
            for path, label, split in zip(listing.paths, listing.labels, listing.splits, strict=True):
                assert f"{folders[splits.index(split)]}/{CLASSES[label]}/" in path


def test_a_split_folder_of_another_spelling_is_named(tmp_path: Path) -> None:
    for listing in both(tmp_path, classes("Train/") | classes("test/")):
        assert listing.notes == ("Train/ is train",)


@sweep(
    ("files", "message"),
    [
        (classes("train/") | classes("Training/"), r"Training/ and train/ may both be the train split"),
        (classes("train/") | classes("val/") | classes("dev/"), r"dev/ and val/ may both be the val split"),
        (
            classes("a_train/") | classes("a_test/") | classes("b_train/") | classes("b_test/"),
            "a_test/ and b_test/ may both be the test split",
        ),
        (
            {"Train/0.png": IMAGE, "Test/0.png": IMAGE, "Meta/0.png": IMAGE},
            "Test, Train look like splits without train/<class>",
        ),
        (classes("val/") | classes("test/"), "test, val look like splits without train/<class>"),
        (classes("test/"), "found only test/"),
    ],
)
def test_names_that_leave_a_doubt_are_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(InputError, match=message):
        list_folder(unpack(tmp_path / "folder", files))
    with pytest.raises(InputError, match=message):
        list_zip(pack(tmp_path / "x.zip", files))


def test_classes_may_have_the_names_of_splits_in_theirs(tmp_path: Path) -> None:
    names = ("bullet_train", "dev board", "test tube", "train_station")
    for listing in both(tmp_path, {f"{name}/0.png": IMAGE for name in names}):
        assert listing.class_names == names


def test_folders_that_are_no_split_are_left_out_with_a_word(tmp_path: Path) -> None:
    flat = {f"Test/{index}.png": IMAGE for index in range(3)}
    for listing in both(tmp_path, classes("Train/") | flat | {"Meta/0.png": IMAGE, "Meta/1.png": IMAGE}):
        assert set(listing.splits) == {"train"}
        assert left_out(listing) == "ignored: 2 images in Meta/; 3 images in Test/"


def test_a_copy_of_the_class_folders_is_no_class(tmp_path: Path) -> None:
    for listing in both(tmp_path, classes() | classes("insects/")):
        assert listing.class_names == CLASSES
        assert len(listing) == 4
        assert "insects/ (a copy of the class folders)" in left_out(listing)


def test_folders_without_images_are_no_classes(tmp_path: Path) -> None:
    for listing in both(tmp_path, classes() | {"none/notes.txt": b""}):
        assert listing.class_names == CLASSES
        assert left_out(listing).startswith("ignored: none/ (no images); ")


def test_folders_around_the_classes_are_looked_through(tmp_path: Path) -> None:
    for listing in both(tmp_path, classes("insects/insects/") | {"insects/readme.txt": b"", "license": b""}):
        assert listing.class_names == CLASSES
        assert listing.notes == ()


def test_own_runs_within_the_data_are_no_classes(tmp_path: Path) -> None:
    own = {
        "runs/vit-x/config.json": RUN,
        "runs/vit-x/best.safetensors": b"",
        "runs/vit-x/eval/test/confusion.png": IMAGE,
        "reproduce/grid/vit-0/config.json": RUN,
        "reproduce/grid/vit-0/curves.png": IMAGE,
        "models/vit/config.json": RUN,
        "models/vit/curves.png": IMAGE,
        "models/compare.md": b"",
        "models/compare.png": IMAGE,
        "ant/mine/config.json": RUN,
        "ant/mine/curves.png": IMAGE,
    }
    for listing in both(tmp_path, classes() | own):
        assert listing.class_names == CLASSES
        assert len(listing) == 4
        assert left_out(listing) == (
            "ignored: ant/mine/ (a run); models/ (a run); reproduce/grid/vit-0/ (a run); 3 more"
        )
    plain = list_folder(unpack(tmp_path / "plain", classes()))
    assert plain.content == list_folder(tmp_path / "folder").content


def test_what_is_left_out_is_said_by_kind_and_count(tmp_path: Path) -> None:
    odd = {"ant/a.mov": b"", "ant/b.MOV": b"", "bee/notes.txt": b"", "bee/README": b"", "labels.csv": b""}
    system = {"ant/Thumbs.db": b"", "ant/.DS_Store": b"", "bee/desktop.ini": b""}
    for listing in both(tmp_path, classes() | odd | system | {"1.png": IMAGE, "2.gif": IMAGE}):
        assert left_out(listing) == (
            "ignored: 2 images next to the class folders; 2 MOV files, 1 file without a suffix, 1 TXT file"
        )


@pytest.mark.usefixtures("without_heif")
def test_heic_files_are_skipped_with_the_remedy_where_pillow_heif_is_missing(tmp_path: Path) -> None:
    for listing in both(tmp_path, classes() | {"ant/a.heic": b"", "ant/sub/b.HEIC": b"", "bee/c.mov": b""}):
        assert len(listing) == 4
        assert left_out(listing) == ("ignored: 2 HEIC files (to read HEIC: pip install 'smallvit[heif]'), 1 MOV file")


@pytest.mark.usefixtures("without_heif")
def test_a_class_of_heic_files_is_an_error_where_pillow_heif_is_missing(tmp_path: Path) -> None:
    remedy = re.escape("/ has no images except 1 HEIC file (to read HEIC: pip install 'smallvit[heif]')") + "$"
    heic = {"cat/0.heic": b""}
    for number, (files, folder) in enumerate(
        [
            (classes() | heic, "cat"),
            (heic | {"ant/0.png": IMAGE}, "cat"),
            ({"photos/cat/0.heic": b"", "photos/ant/0.png": IMAGE}, "photos/cat"),
            ({"ant/0.heic": b"", **heic}, "ant"),
            (classes("train/") | {"test/ant/0.png": IMAGE, "test/bee/0.heic": b""}, "test/bee"),
            (classes("train/") | {"val/ant/0.heic": b""}, "val/ant"),
        ]
    ):
        with pytest.raises(InputError, match=f": {folder}{remedy}"):
            list_folder(unpack(tmp_path / str(number), files))
        with pytest.raises(InputError, match=f": {folder}{remedy}"):
            list_zip(pack(tmp_path / f"{number}.zip", files))


@pytest.mark.filterwarnings("ignore:.*image format is deprecated:DeprecationWarning")
def test_every_format_that_pillow_writes_and_reads_is_an_image(tmp_path: Path) -> None:
    picture, read = Image.new("RGB", (16, 16), (200, 30, 30)), []
    for suffix in sorted(image_suffixes()):
        file = tmp_path / "data" / "ant" / f"x{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        kind = Image.registered_extensions()[suffix]
        try:
            picture.convert({"XBM": "1", "MSP": "1"}.get(kind, "RGB")).save(file, kind)
        except (KeyError, OSError, ValueError):  # a format that Pillow only reads
            file.unlink(missing_ok=True)
            continue
        read.append(suffix)
    assert {".jfif", ".gif", ".png", ".jpg", ".tga", ".webp", ".bmp", ".tiff", ".ppm"} <= set(read)
    (tmp_path / "data" / "bee").mkdir()
    for index in range(3):
        picture.save(tmp_path / "data" / "bee" / f"{index}.png")
    data = datasets.create_dataset(DataConfig(data=str(tmp_path / "data"), img_size=8))
    assert sum(len(part) for part in (data.train, data.val, data.test)) == len(read) + 3
    assert not any(is_image(f"x{suffix}") for suffix in (".pdf", ".mpg", ".h5", ".eps", ".txt", ""))


def test_names_that_are_not_utf8_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    for number, name in enumerate((b"ant/caf\xe9.png", b"caf\xe9/0.png")):
        folder = unpack(tmp_path / str(number), classes())
        file = os.path.join(os.fsencode(folder), name)
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(file, "wb") as opened:
            opened.write(IMAGE)
        with pytest.raises(InputError, match=r"caf\\udce9.*not UTF-8; rename it") as caught:
            list_folder(folder)
        str(caught.value).encode()
    os.rename(folder, odd := os.fsencode(tmp_path) + b"/\xff")
    with pytest.raises(InputError, match=r"udcff.*not UTF-8"):
        list_folder(Path(os.fsdecode(odd)))
