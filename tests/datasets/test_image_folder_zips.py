"""Zip files of class folders, and Tiny-ImageNet's layout, packed and unpacked."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from smallvit import datasets
from smallvit.config.options import DataConfig
from smallvit.datasets.dataset import ImageDataset
from smallvit.datasets.image_folder import list_zip
from smallvit.utils.errors import InputError
from tests.sweep import sweep

Files = dict[str, bytes]
LEVELS = {"dark": 40, "gray": 128, "light": 220}


def png(level: int, seed: int = 0, size: int = 16) -> bytes:
    """Noise around a gray level."""
    noise = np.random.default_rng((level, seed)).normal(level, 20, (size, size, 3)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def class_folders(prefix: str = "", count: int = 10) -> Files:
    return {
        f"{prefix}{name}/{index:03}.png": png(level, index) for name, level in LEVELS.items() for index in range(count)
    }


def pack(file: Path, files: Files, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file


def unpack(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def shuffled(files: Files) -> Files:
    names = list(files)
    return {names[index]: files[names[index]] for index in np.random.default_rng(0).permutation(len(names))}


def load(path: Path, **options: object) -> ImageDataset:
    return datasets.create_dataset(DataConfig(data=str(path), **options))


def sizes(data: ImageDataset) -> list[int]:
    return [len(split) for split in (data.train, data.val, data.test)]


def assert_same(ours: ImageDataset, theirs: ImageDataset) -> None:
    assert ours.class_names == theirs.class_names
    for split in ("train", "val", "test"):
        assert torch.equal(getattr(ours, split).pixels, getattr(theirs, split).pixels)
        assert torch.equal(getattr(ours, split).labels, getattr(theirs, split).labels)
    assert (ours.mean, ours.std) == (theirs.mean, theirs.std)


def assert_refused(path: Path, match: str, **options: object) -> None:
    with pytest.raises(InputError, match=match) as caught:
        load(path, **options)
    assert "\n" not in str(caught.value)
    assert " at 0x" not in str(caught.value)


def levels_fit(data: ImageDataset, levels: list[int]) -> bool:
    return all(
        abs(pixels.float().mean().item() - levels[label]) < 10
        for split in (data.train, data.val, data.test)
        for pixels, label in zip(split.pixels, split.labels.tolist(), strict=True)
    )


@sweep("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_zip_of_class_folders_is_read_as_its_folder(tmp_path: Path, method: int) -> None:
    files = class_folders()
    data = load(pack(tmp_path / "x.zip", files, method))
    assert sizes(data) == [21, 3, 6]
    assert data.class_names == ("dark", "gray", "light")
    assert levels_fit(data, [40, 128, 220])
    assert_same(data, load(unpack(tmp_path / "folder", files)))


def test_the_order_in_the_zip_does_not_matter(tmp_path: Path) -> None:
    files = class_folders()
    assert_same(load(pack(tmp_path / "x.zip", shuffled(files))), load(pack(tmp_path / "y.zip", files)))


@sweep("given", [("train", "val", "test"), ("train", "test"), ("train", "val"), ("train",)])
def test_splits_in_the_zip_are_used_as_they_are(tmp_path: Path, given: tuple[str, ...]) -> None:
    counts = {"train": 10, "val": 2, "test": 3}
    files = {name: content for split in given for name, content in class_folders(f"{split}/", counts[split]).items()}
    data = load(pack(tmp_path / "x.zip", files))
    assert (
        sizes(data)
        == {
            ("train", "val", "test"): [30, 6, 9],
            ("train", "test"): [27, 3, 9],
            ("train", "val"): [27, 3, 6],
            ("train",): [21, 3, 6],
        }[given]
    )
    assert_same(data, load(unpack(tmp_path / "folder", files)))


@sweep("prefix", ["photos/", "a/b/c/", "my photos/2024/"])
@sweep("split", ["", "train/"])
def test_folders_around_the_classes_are_looked_through(tmp_path: Path, prefix: str, split: str) -> None:
    data = load(pack(tmp_path / "x.zip", class_folders(prefix + split)))
    assert data.class_names == ("dark", "gray", "light")
    assert_same(data, load(pack(tmp_path / "y.zip", class_folders(split))))


def test_images_in_nested_folders_belong_to_their_class(tmp_path: Path) -> None:
    files = class_folders() | {"dark/more/deep/x.png": png(40, 99)}
    data = load(pack(tmp_path / "x.zip", files))
    assert sum((split.labels == 0).sum().item() for split in (data.train, data.val, data.test)) == 11


def test_what_macos_packs_and_hidden_files_are_no_images(tmp_path: Path) -> None:
    rubbish = {
        "__MACOSX/photos/dark/._000.png": b"resource fork",
        "photos/.DS_Store": b"x",
        "photos/dark/._000.png": b"resource fork",
        "photos/.hidden/000.png": b"x",
        "photos/dark/__MACOSX/000.png": b"x",
        "photos/dark/notes.txt": b"x",
        "photos/readme.md": b"x",
        "photos/loose.png": png(1),
        "photos/dark/": b"",
    }
    data = load(pack(tmp_path / "x.zip", rubbish | class_folders("photos/")))
    assert_same(data, load(pack(tmp_path / "y.zip", class_folders())))


@sweep("suffix", ["zip", "ZIP", "data", ""])
def test_the_files_name_does_not_matter(tmp_path: Path, suffix: str) -> None:
    assert sizes(load(pack(tmp_path / f"x.{suffix}", class_folders()))) == [21, 3, 6]


def test_names_of_members_may_be_in_any_script(tmp_path: Path) -> None:
    names = {"Katze": "кошка", "Hund": "犬", "Kuh": "vache été"}
    files = {f"bilder/{name}/{index} ä.PNG": png(60, index) for name in names.values() for index in range(5)}
    data = load(pack(tmp_path / "größe.zip", files))
    assert data.class_names == tuple(sorted(names.values()))
    assert sizes(data) == [9, 3, 3]
    assert data.name == "größe.zip"


def test_a_file_may_be_wherever_home_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = pack(tmp_path / "x.zip", class_folders())
    assert load(Path("~/x.zip")).source == str(file)


def test_relative_names_are_reported_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = pack(tmp_path / "x.zip", class_folders())
    assert load(Path("x.zip")).source == str(file.resolve())


def test_members_with_a_leading_dot_are_read(tmp_path: Path) -> None:
    data = load(pack(tmp_path / "x.zip", class_folders("./")))
    assert_same(data, load(pack(tmp_path / "y.zip", class_folders())))


@sweep("evil", ["../evil.png", "../../dark/evil.png", "dark/../../evil.png"])
def test_nothing_is_written_where_members_point_outside(tmp_path: Path, evil: str) -> None:
    (tmp_path / "inner").mkdir()
    file = pack(tmp_path / "inner" / "x.zip", class_folders() | {evil: png(40, 99)})
    before = set(tmp_path.rglob("*"))
    data = load(file)
    assert set(tmp_path.rglob("*")) == before
    assert data.class_names == ("dark", "gray", "light")


def test_absolute_members_are_read_as_relative_ones(tmp_path: Path) -> None:
    data = load(pack(tmp_path / "x.zip", class_folders("/")))
    assert_same(data, load(pack(tmp_path / "y.zip", class_folders())))


def test_the_second_start_reads_the_cache_until_the_zip_changes(tmp_path: Path) -> None:
    files = class_folders()
    file = pack(tmp_path / "x.zip", files)
    first, second = load(file), load(file)
    assert any("cache" in note for note in second.notes)
    assert_same(first, second)
    pack(tmp_path / "y.zip", files | {"dark/000.png": png(41, 0)})
    os.replace(tmp_path / "y.zip", file)
    third = load(file)
    assert not any("cache" in note for note in third.notes)
    assert third.fingerprint != first.fingerprint


def test_a_zip_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    file = pack(tmp_path / "x.zip", class_folders())
    load(file)
    pack(tmp_path / "y.zip", {name: png(255 - LEVELS[name.split("/")[0]]) for name in class_folders()})
    os.replace(tmp_path / "y.zip", file)
    assert levels_fit(load(file), [215, 127, 35])


@sweep("content", [b"", b"no zip file", b"PK\x03\x04" + bytes(100), bytes(5000)])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.zip").write_bytes(content)
    assert_refused(tmp_path / "x.zip", r"x\.zip: damaged, or no zip file")


@sweep("share", [0.1, 0.5, 0.99])
def test_a_zip_that_is_cut_off_is_refused(tmp_path: Path, share: float) -> None:
    file = pack(tmp_path / "x.zip", class_folders())
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    assert_refused(file, "damaged, or no zip file")


def test_an_empty_zip_is_refused(tmp_path: Path) -> None:
    assert_refused(pack(tmp_path / "x.zip", {}), "at least 2 class folders with images, found none")


@sweep("prefix", ["", "photos/", "train/", "photos/train/"])
def test_a_zip_with_one_class_is_refused(tmp_path: Path, prefix: str) -> None:
    files = {name: content for name, content in class_folders(prefix).items() if "dark" in name}
    assert_refused(pack(tmp_path / "x.zip", files), "at least 2 class folders with images")


def test_a_zip_without_folders_is_refused(tmp_path: Path) -> None:
    files = {Path(name).parts[0] + Path(name).name: content for name, content in class_folders().items()}
    assert_refused(pack(tmp_path / "x.zip", files), "at least 2 class folders with images, found none")


def test_a_test_class_without_training_images_is_refused(tmp_path: Path) -> None:
    files = class_folders("train/") | class_folders("test/") | {"test/odd/1.png": png(1)}
    assert_refused(pack(tmp_path / "x.zip", files), "class folder test/odd does not exist in train/")


def test_splits_without_a_training_split_are_no_classes(tmp_path: Path) -> None:
    files = class_folders("val/") | class_folders("test/")
    assert_refused(pack(tmp_path / "x.zip", files), "test, val look like splits without train/<class>")


def test_broken_images_are_named_or_left_out(tmp_path: Path) -> None:
    files = class_folders()
    files["gray/003.png"] = files["gray/003.png"][:300]
    files["dark/001.png"] = b"no image"
    file = pack(tmp_path / "x.zip", files)
    assert_refused(file, r"2 of 30 images cannot be decoded: dark/001\.png \(.*gray/003\.png \(.*--skip-corrupt")
    data = load(file, skip_corrupt=True)
    assert sum(sizes(data)) == 28
    assert any("gray/003.png" in note and " at 0x" not in note for note in data.notes)


def test_a_member_with_a_wrong_checksum_is_named(tmp_path: Path) -> None:
    files = class_folders()
    file = pack(tmp_path / "x.zip", files, zipfile.ZIP_STORED)
    content = file.read_bytes()
    position = content.index(files["gray/004.png"]) + 100
    file.write_bytes(content[:position] + bytes([content[position] ^ 255]) + content[position + 1 :])
    assert_refused(file, r"1 of 30 .*gray/004\.png")


def encrypt(file: Path) -> Path:
    """Say of every member that it is encrypted, as archives with a password do."""
    content = bytearray(file.read_bytes())
    for magic, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        position = content.find(magic)
        while position >= 0:
            content[position + flags] |= 1
            position = content.find(magic, position + 1)
    file.write_bytes(content)
    return file


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    file = encrypt(pack(tmp_path / "x.zip", class_folders(), zipfile.ZIP_STORED))
    assert_refused(file, "encrypted")
    assert_refused(file, "no usable training image|encrypted", skip_corrupt=True)


@pytest.mark.slow
def test_damage_anywhere_in_a_zip_is_an_input_error_or_harmless(tmp_path: Path) -> None:
    whole = pack(tmp_path / "x.zip", tiny_imagenet(shown=2)).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for attempt in range(600):
        content = bytearray(whole)
        start = (0, len(content) * 3 // 4)[attempt % 2]  # the directory stands at the end
        for position in rng.integers(start, len(content), 3):
            content[position] = rng.integers(256)
        (tmp_path / "y.zip").write_bytes(content)
        try:
            list_zip(tmp_path / "y.zip")
        except InputError:
            refused += 1
    assert refused > 20


WNIDS = ("n02", "n01", "n03")
"""In wnids.txt's order."""
COLORS = {"n02": 40, "n01": 128, "n03": 220}
WORDS = {"n01": "crane, a bird", "n02": "newt, salamander", "n03": "crane, a machine", "n04": "not among them"}


def tiny_imagenet(prefix: str = "tiny-imagenet-200/", shown: int = 6, **texts: str | None) -> Files:
    """Return the official layout; validation images are of the classes of `WNIDS` in turns."""
    files: Files = {}
    for wnid in WNIDS:
        files[f"{prefix}train/{wnid}/{wnid}_boxes.txt"] = b"0 0 1 1"
        for index in range(shown):
            files[f"{prefix}train/{wnid}/images/{wnid}_{index}.JPEG"] = png(COLORS[wnid], index)
    rows = []
    for index in range(9):
        wnid = WNIDS[index % 3]
        files[f"{prefix}val/images/val_{index}.JPEG"] = png(COLORS[wnid], 100 + index)
        files[f"{prefix}test/images/test_{index}.JPEG"] = b"not even an image"
        rows.append(f"val_{index}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    own = {
        "wnids.txt": "".join(f"{wnid}\n" for wnid in WNIDS),
        "words.txt": "".join(f"{wnid}\t{words}\n" for wnid, words in WORDS.items()),
        "val/val_annotations.txt": "".join(rows),
    }
    for name, text in own.items():
        text = texts.get(Path(name).stem, text)
        if text is not None:
            files[prefix + name] = text.encode()
    return files


def put(tmp_path: Path, form: str, files: Files) -> Path:
    """Return the files in this form: zip or folder."""
    return pack(tmp_path / "tiny.zip", files) if form == "zip" else unpack(tmp_path / "unpacked", files)


def position(tmp_path: Path, form: str, **options: object) -> Path:
    """Tiny-ImageNet's layout in this form."""
    return put(tmp_path, form, tiny_imagenet("tiny-imagenet-200/" if form == "zip" else "", **options))


both = sweep("form", ["zip", "folder"])


@both
def test_tiny_imagenets_validation_images_are_the_test(tmp_path: Path, form: str) -> None:
    data = load(position(tmp_path, form))
    assert sizes(data) == [15, 3, 9]
    assert data.test.labels.tolist() == [1, 0, 2] * 3
    assert levels_fit(data, [128, 40, 220])


@both
def test_tiny_imagenets_labels_stand_in_its_annotations(tmp_path: Path, form: str) -> None:
    permuted = [2, 0, 1, 1, 0, 2, 2, 1, 0]
    rows = [f"val_{index}.JPEG\t{sorted(WNIDS)[label]}\t0\t0\t9\t9" for index, label in enumerate(permuted)]
    data = load(position(tmp_path, form, val_annotations="\n".join(rows[::-1])))
    assert data.test.labels.tolist() == permuted
    assert data.test.pixels.float().mean(dim=(1, 2, 3)).tolist() == pytest.approx([40, 128, 220] * 3, abs=10)


@both
def test_tiny_imagenets_classes_are_sorted_and_named_by_their_words(tmp_path: Path, form: str) -> None:
    data = load(position(tmp_path, form))
    assert data.class_names == ("crane (n01)", "newt", "crane (n03)")
    means = [data.train.pixels[data.train.labels == label].float().mean().item() for label in range(3)]
    assert means == pytest.approx([128, 40, 220], abs=10)


def test_tiny_imagenets_class_numbers_are_torchvisions(tmp_path: Path) -> None:
    """Compare the class of every training image, known by the mean of its pixels, and of every validation image."""
    root = unpack(tmp_path / "unpacked", tiny_imagenet(""))
    folders = ImageFolder(str(root / "train"))
    data = load(root, val_fraction=0.0)
    for label, wnid in enumerate(folders.classes):
        paths = [path for path, number in folders.samples if number == label]
        expected = sorted(float(np.asarray(Image.open(path)).mean()) for path in paths)
        actual = sorted(data.train.pixels[data.train.labels == label].float().mean(dim=(1, 2, 3)).tolist())
        assert actual == pytest.approx(expected, abs=0.01), wnid
    assert data.test.labels.tolist() == [folders.class_to_idx[WNIDS[index % 3]] for index in range(9)]


@both
def test_tiny_imagenets_lists_may_be_missing(tmp_path: Path, form: str) -> None:
    assert load(position(tmp_path, form, words=None)).class_names == tuple(sorted(WNIDS))


@both
def test_lines_may_end_as_on_windows(tmp_path: Path, form: str) -> None:
    crlf = {
        "wnids": "\r\n".join(WNIDS),
        "words": "".join(f"{wnid}\t{words}\r\n" for wnid, words in WORDS.items()),
        "val_annotations": "".join(f"val_{i}.JPEG\t{WNIDS[i % 3]}\r\n" for i in range(9)),
    }
    data = load(position(tmp_path, form, **crlf))
    assert data.class_names == ("crane (n01)", "newt", "crane (n03)")
    assert data.test.labels.tolist() == [1, 0, 2] * 3


@sweep("prefix", ["tiny-imagenet-200/", "", "data/tiny-imagenet-200/"])
def test_tiny_imagenet_is_the_same_packed_and_unpacked(tmp_path: Path, prefix: str) -> None:
    packed = load(pack(tmp_path / "x.zip", tiny_imagenet(prefix)))
    assert_same(packed, load(unpack(tmp_path / "folder", tiny_imagenet(""))))


def test_the_order_in_tiny_imagenets_zip_does_not_matter(tmp_path: Path) -> None:
    packed = load(pack(tmp_path / "x.zip", shuffled(tiny_imagenet())))
    assert_same(packed, load(unpack(tmp_path / "folder", tiny_imagenet(""))))


@both
def test_tiny_imagenet_is_streamed_too(tmp_path: Path, form: str) -> None:
    path = position(tmp_path, form)
    streamed, held = load(path, streaming="on", workers=0), load(path)
    assert sizes(streamed) == sizes(held)
    assert torch.equal(streamed.test.labels, held.test.labels)
    assert torch.equal(streamed.test.sample().pixels, held.test.pixels)


def rows_without(*left_out: int) -> str:
    return "".join(f"val_{index}.JPEG\t{WNIDS[index % 3]}\t0\t0\n" for index in range(9) if index not in left_out)


@both
@sweep(
    ("texts", "message"),
    [
        ({"val_annotations": rows_without(4)}, r"val/images/val_4\.JPEG has no \(known\) class"),
        ({"val_annotations": rows_without(4) + "val_4.JPEG\n"}, r"val/images/val_4\.JPEG has no \(known\) class"),
        ({"val_annotations": rows_without(4) + "val_4.JPEG\tn99\n"}, r"val/images/val_4\.JPEG has no \(known\) class"),
        ({"val_annotations": rows_without() + "val_9.JPEG\tn01\n"}, r"val_9\.JPEG is labeled but missing"),
        ({"val_annotations": ""}, r"val_0\.JPEG has no \(known\) class"),
    ],
)
def test_tiny_imagenets_faults_are_reported(tmp_path: Path, form: str, texts: dict[str, str], message: str) -> None:
    assert_refused(position(tmp_path, form, **texts), message)


@both
@sweep("name", ["words.txt", "val/val_annotations.txt"])
def test_lists_of_another_encoding_are_refused(tmp_path: Path, form: str, name: str) -> None:
    prefix = "tiny-imagenet-200/" if form == "zip" else ""
    files = tiny_imagenet(prefix)
    files[prefix + name] += "é".encode("latin-1")
    assert_refused(put(tmp_path, form, files), "tiny.zip|unpacked")


@both
def test_tiny_imagenets_broken_images_are_named(tmp_path: Path, form: str) -> None:
    prefix = "tiny-imagenet-200/" if form == "zip" else ""
    files = tiny_imagenet(prefix) | {f"{prefix}val/images/val_3.JPEG": b"x"}
    path = put(tmp_path, form, files)
    assert_refused(path, r"1 of 27 .*val/images/val_3\.JPEG")
    assert load(path, skip_corrupt=True).test.labels.tolist() == [1, 0, 2, 0, 2, 1, 0, 2]


def test_a_tiny_imagenet_without_training_images_is_refused(tmp_path: Path) -> None:
    files = {name: content for name, content in tiny_imagenet("").items() if not name.startswith("train")}
    assert_refused(pack(tmp_path / "x.zip", files), "expected at least two classes with images in train/, found 0")
    assert_refused(unpack(tmp_path / "folder", files), "folder")


def test_an_encrypted_tiny_imagenet_is_refused(tmp_path: Path) -> None:
    assert_refused(encrypt(pack(tmp_path / "x.zip", tiny_imagenet(), zipfile.ZIP_STORED)), "encrypted")
