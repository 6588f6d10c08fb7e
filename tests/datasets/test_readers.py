"""Reading data sets by name, from miniatures in the official formats."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, SVHN, FashionMNIST, imagenet

from smallvit.config.options import DataConfig
from smallvit.datasets import create_dataset, readers
from smallvit.datasets.catalog import DATASETS, Archive, DatasetInfo
from smallvit.datasets.readers import READERS, Arrays, read, unpack_imagenet
from smallvit.utils.errors import InputError
from tests.sweep import sweep

FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@pytest.fixture(autouse=True)
def _without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALLVIT_OFFLINE", "1")


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def images(seed: int, count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def tar_of(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@dataclass
class Miniature:
    """A data set in its official format: the files of its folder, and what reading them must give."""

    files: dict[str, bytes]
    train: tuple[np.ndarray, list[int]]
    test: tuple[np.ndarray, list[int]]
    extra: tuple[np.ndarray, list[int]] | None = None

    def put(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        for file, content in self.files.items():
            (folder / file).write_bytes(content)
        return folder


def set_checksums(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], files: dict[str, bytes]) -> None:
    """Make the table's checksums those of these files."""
    for name in names:
        known = [replace(item, md5=md5(files[item.file])) for item in DATASETS[name].archives if item.file in files]
        monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], archives=tuple(known)))


def cifar_batch(pixels: np.ndarray, **labels: list[int]) -> bytes:
    return pickle.dumps({"data": pixels.reshape(len(pixels), -1), "filenames": ["x.png"] * len(pixels), **labels})


def make_cifar(monkeypatch: pytest.MonkeyPatch, reader: type[CIFAR10], names: tuple[str, ...], parts: dict) -> bytes:
    """CIFAR's archive of these pickles; checksums set here and at torchvision."""
    content = tar_of({f"{reader.base_folder}/{file}": data for file, data in parts.items()})
    set_checksums(monkeypatch, names, {reader.filename: content})
    for listing in ("train_list", "test_list"):
        monkeypatch.setattr(reader, listing, [[file, md5(parts[file])] for file, _ in getattr(reader, listing)])
    monkeypatch.setattr(reader, "meta", reader.meta | {"md5": md5(parts[reader.meta["filename"]])})
    return content


@pytest.fixture
def cifar10(monkeypatch: pytest.MonkeyPatch) -> Miniature:
    train, test = images(0, 10, 3, 32, 32), images(1, 3, 3, 32, 32)
    parts = {f"data_batch_{i + 1}": cifar_batch(train[2 * i : 2 * i + 2], labels=[i, 9 - i]) for i in range(5)}
    parts["test_batch"] = cifar_batch(test, labels=[7, 8, 9])
    parts["batches.meta"] = pickle.dumps({"label_names": [f"kind {i}" for i in range(10)]})
    content = make_cifar(monkeypatch, CIFAR10, ("cifar10",), parts)
    labels = [label for i in range(5) for label in (i, 9 - i)]
    return Miniature({CIFAR10.filename: content}, (train, labels), (test, [7, 8, 9]))


@pytest.fixture
def cifar100(monkeypatch: pytest.MonkeyPatch) -> Miniature:
    train, test = images(2, 4, 3, 32, 32), images(3, 2, 3, 32, 32)
    parts = {
        "train": cifar_batch(train, fine_labels=[99, 0, 1, 50], coarse_labels=[19, 0, 0, 7]),
        "test": cifar_batch(test, fine_labels=[3, 98], coarse_labels=[2, 18]),
        "meta": pickle.dumps(
            {
                "fine_label_names": [f"kind {i}" for i in range(100)],
                "coarse_label_names": [f"family {i}" for i in range(20)],
            }
        ),
    }
    content = make_cifar(monkeypatch, CIFAR100, ("cifar100", "cifar100-coarse"), parts)
    return Miniature({CIFAR100.filename: content}, (train, [99, 0, 1, 50]), (test, [3, 98]))


@pytest.fixture
def svhn(monkeypatch: pytest.MonkeyPatch) -> Miniature:
    parts = {split: images(seed, 12 - seed, 3, 32, 32) for seed, split in enumerate(("train", "test", "extra"))}
    labels = {split: [1 + (seed + i) % 10 for i in range(12 - seed)] for seed, split in enumerate(parts)}  # 1 to 10
    files = {}
    for split, pixels in parts.items():
        buffer = io.BytesIO()
        y = np.array(labels[split], dtype=np.uint8)[:, None]
        scipy.io.savemat(buffer, {"X": pixels.transpose(2, 3, 1, 0), "y": y})
        files[f"{split}_32x32.mat"] = buffer.getvalue()
    set_checksums(monkeypatch, ("svhn", "svhn-extra"), files)
    patched = {s: [url, file, md5(files[file])] for s, (url, file, _) in SVHN.split_list.items()}
    monkeypatch.setattr(SVHN, "split_list", patched)
    digits = {split: [label % 10 for label in of_split] for split, of_split in labels.items()}
    return Miniature(files, *((parts[split], digits[split]) for split in parts))


def idx(content: np.ndarray) -> bytes:
    return struct.pack(f">HBB{content.ndim}I", 0, 8, content.ndim, *content.shape) + content.tobytes()


def make_mnist(monkeypatch: pytest.MonkeyPatch, name: str) -> Miniature:
    train, test = images(len(name), 5, 28, 28), images(len(name) + 1, 2, 28, 28)
    parts = (train, np.array([9, 0, 1, 2, 3], dtype=np.uint8), test, np.array([5, 6], dtype=np.uint8))
    archives = DATASETS[name].archives
    files = {each.file: gzip.compress(idx(content)) for each, content in zip(archives, parts, strict=True)}
    set_checksums(monkeypatch, (name,), files)
    return Miniature(files, (train[:, None], [9, 0, 1, 2, 3]), (test[:, None], [5, 6]))


def same(arrays: Arrays, expected: Miniature) -> bool:
    assert (arrays.splits["train"].pixels.dtype, arrays.splits["train"].labels.dtype) == (torch.uint8, torch.int64)
    assert arrays.splits["train"].pixels.is_contiguous()
    return (
        np.array_equal(arrays.splits["train"].pixels.numpy(), expected.train[0])
        and arrays.splits["train"].labels.tolist() == expected.train[1]
        and np.array_equal(arrays.splits["test"].pixels.numpy(), expected.test[0])
        and arrays.splits["test"].labels.tolist() == expected.test[1]
    )


def test_cifar10_is_read_from_its_archive_and_then_without(tmp_path: Path, cifar10: Miniature) -> None:
    home = cifar10.put(tmp_path / "cifar10")
    arrays = read("cifar10", tmp_path)
    assert same(arrays, cifar10)
    assert arrays.class_names == tuple(f"kind {i}" for i in range(10))
    (home / CIFAR10.filename).unlink()
    assert same(read("cifar10", tmp_path), cifar10)
    assert {path.name for path in home.iterdir()} == {"cifar-10-batches-py"}


def test_cifar100_has_fine_and_coarse_classes_in_one_folder(tmp_path: Path, cifar100: Miniature) -> None:
    cifar100.put(tmp_path / "cifar100")
    fine, coarse = read("cifar100", tmp_path), read("cifar100-coarse", tmp_path)
    assert same(fine, cifar100)
    assert fine.class_names[99] == "kind 99"
    assert torch.equal(coarse.splits["train"].pixels, fine.splits["train"].pixels)
    assert (coarse.splits["train"].labels.tolist(), coarse.splits["test"].labels.tolist()) == ([19, 0, 0, 7], [2, 18])
    assert coarse.class_names == tuple(f"family {i}" for i in range(20))


def test_svhn_calls_the_class_ten_zero(tmp_path: Path, svhn: Miniature) -> None:
    svhn.put(tmp_path / "svhn")
    arrays = read("svhn", tmp_path)
    assert same(arrays, svhn)
    assert set(arrays.splits["train"].labels.tolist()) == set(range(10))
    assert arrays.class_names == tuple("0123456789")


def test_svhn_needs_the_extra_images_only_when_they_are_asked_for(tmp_path: Path, svhn: Miniature) -> None:
    extra = svhn.files.pop("extra_32x32.mat")
    home = svhn.put(tmp_path / "svhn")
    assert same(read("svhn", tmp_path), svhn)
    with pytest.raises(InputError, match=r"put extra_32x32\.mat "):
        read("svhn-extra", tmp_path)
    (home / "extra_32x32.mat").write_bytes(extra)
    svhn.train = (np.concatenate([svhn.train[0], svhn.extra[0]]), svhn.train[1] + svhn.extra[1])
    assert same(read("svhn-extra", tmp_path), svhn)


def test_data_sets_in_mnists_format_keep_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    all_sets = {name: make_mnist(monkeypatch, name) for name, entry in DATASETS.items() if entry.reader == "mnist"}
    for name, miniature in all_sets.items():
        miniature.put(tmp_path / name)
        assert same(read(name, tmp_path), miniature)
    for name, miniature in all_sets.items():
        for file in miniature.files:
            (tmp_path / name / file).unlink()
        assert same(read(name, tmp_path), miniature)  # from the unpacked files alone
        assert len(read(name, tmp_path).class_names) == DATASETS[name].num_classes
    assert read("mnist", tmp_path).class_names == tuple("0123456789")
    assert read("fashion-mnist", tmp_path).class_names == FASHION
    assert (tmp_path / "fashion-mnist" / FashionMNIST.__name__ / "raw").is_dir()


@sweep("name", [name for name, info in DATASETS.items() if info.archives])
def test_missing_files_are_reported_with_their_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError) as caught:
        read(name, tmp_path)
    assert str(tmp_path / (DATASETS[name].folder or name)) in str(caught.value)
    assert all(archive.file in str(caught.value) for archive in DATASETS[name].archives)


@sweep("file", ["data_batch_3", "test_batch", "batches.meta"])
@sweep("spoil", [Path.unlink, lambda path: path.write_bytes(b"cut"), Path.touch])
def test_damaged_cifar_files_are_unpacked_again(
    tmp_path: Path, cifar10: Miniature, file: str, spoil: Callable[[Path], object]
) -> None:
    home = cifar10.put(tmp_path / "cifar10")
    read("cifar10", tmp_path)
    spoil(home / "cifar-10-batches-py" / file)
    assert same(read("cifar10", tmp_path), cifar10)


@sweep("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_missing_mnist_files_are_unpacked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    miniature = make_mnist(monkeypatch, "mnist")
    home = miniature.put(tmp_path / "mnist")
    read("mnist", tmp_path)
    (home / "MNIST" / "raw" / name).unlink()
    assert same(read("mnist", tmp_path), miniature)


def test_an_extraction_that_was_interrupted_is_done_again(
    tmp_path: Path, cifar10: Miniature, monkeypatch: pytest.MonkeyPatch
) -> None:
    cifar10.put(tmp_path / "cifar10")
    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", lambda *_, **__: interrupt())
        with pytest.raises(KeyboardInterrupt):
            read("cifar10", tmp_path)
    assert not (tmp_path / "cifar10" / "cifar-10-batches-py").exists()
    assert same(read("cifar10", tmp_path), cifar10)


def interrupt() -> None:
    raise KeyboardInterrupt


class Trap:
    """A pickle that makes a folder when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@sweep("name", ["cifar100", "cifar100-coarse"])
@sweep("file", ["train", "test", "meta"])
def test_a_pickle_of_another_checksum_is_never_opened(
    tmp_path: Path, cifar100: Miniature, name: str, file: str
) -> None:
    home = cifar100.put(tmp_path / "cifar100")
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    read(name, tmp_path)
    (home / "cifar-100-python" / file).write_bytes(trap)
    read(name, tmp_path)  # unpacked again
    (home / "cifar-100-python" / file).write_bytes(trap)
    (home / CIFAR100.filename).unlink()
    with pytest.raises(InputError, match=r"put cifar-100-python\.tar\.gz"):
        read(name, tmp_path)
    (home / CIFAR100.filename).write_bytes(tar_of({f"cifar-100-python/{file}": trap}))
    with pytest.raises(InputError, match=r"cifar-100-python.tar.gz has md5 .* expected"):
        read(name, tmp_path)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists()  # it would have been


def test_an_archive_whose_files_have_other_checksums_than_torchvisions_is_refused(
    tmp_path: Path, cifar100: Miniature, monkeypatch: pytest.MonkeyPatch
) -> None:
    cifar100.put(tmp_path / "cifar100")
    monkeypatch.setattr(CIFAR100, "train_list", [["train", "0" * 32]])
    with pytest.raises(InputError, match=r"--data cifar100: .*cannot be read"):
        read("cifar100", tmp_path)


def test_what_is_whole_is_neither_fetched_nor_unpacked(
    tmp_path: Path, cifar10: Miniature, monkeypatch: pytest.MonkeyPatch
) -> None:
    cifar10.put(tmp_path / "cifar10")
    mnist = make_mnist(monkeypatch, "mnist")
    mnist.put(tmp_path / "mnist")
    for name in ("cifar10", "mnist"):
        read(name, tmp_path)
    for function in ("fetch", "unpack_tar", "unpack_gzip"):
        monkeypatch.setattr(readers, function, None)  # cannot be called
    assert same(read("cifar10", tmp_path), cifar10)
    assert same(read("mnist", tmp_path), mnist)


WNIDS = ("n01440764", "n01443537", "n02123045")
VAL_NUMBERS = (3, 1, 2, 3)


def devkit() -> bytes:
    """Return the devkit's labels: three classes below one more, and of each validation image its class number."""
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height", "num_train")
    synsets = np.zeros((len(WNIDS) + 1, 1), dtype=[(field, object) for field in fields])
    for index, wnid in enumerate((*WNIDS, "n00001740")):
        children = [] if wnid in WNIDS else [1, 2, 3]
        row = (index + 1, wnid, f"{wnid}, a name", "gloss", len(children), np.array(children), len(children) // 3, 2)
        synsets[index, 0] = row
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"synsets": synsets})
    base = "ILSVRC2012_devkit_t12/data"
    truth = "".join(f"{number}\n" for number in VAL_NUMBERS).encode()
    return tar_of({f"{base}/meta.mat": buffer.getvalue(), f"{base}/ILSVRC2012_validation_ground_truth.txt": truth})


def put_imagenet(folder: Path, monkeypatch: pytest.MonkeyPatch, **other: bytes) -> Path:
    """Miniature archives with their checksums set; `train` and `val` may be others."""
    train = {
        f"{wnid}.tar": tar_of({f"{wnid}_{i}.JPEG": f"{wnid} {i}".encode() for i in range(2)}, "w") for wnid in WNIDS
    }
    val = {f"ILSVRC2012_val_{i:08}.JPEG": f"val {i}".encode() for i in (2, 1, 4, 3)}  # in any order
    files = {
        "ILSVRC2012_img_train.tar": other.get("train", tar_of(train, "w")),
        "ILSVRC2012_img_val.tar": other.get("val", tar_of(val, "w")),
        "ILSVRC2012_devkit_t12.tar.gz": devkit(),
    }
    set_checksums(monkeypatch, ("imagenet",), files)
    meta = {part: (file, md5(files[file])) for part, (file, _) in imagenet.ARCHIVE_META.items()}
    monkeypatch.setattr(imagenet, "ARCHIVE_META", meta)
    return Miniature(files, (), ()).put(folder)


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.JPEG")}


TRAIN = {f"train/{wnid}/{wnid}_{i}.JPEG": f"{wnid} {i}" for wnid in WNIDS for i in range(2)}
VAL = {
    f"val/{WNIDS[number - 1]}/ILSVRC2012_val_{i + 1:08}.JPEG": f"val {i + 1}" for i, number in enumerate(VAL_NUMBERS)
}


def test_imagenets_archives_become_class_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put_imagenet(tmp_path / "imagenet", monkeypatch)
    unpack_imagenet(folder)
    assert tree(folder) == TRAIN | VAL
    assert not list(folder.glob(".*"))
    for archive in folder.glob("*.tar*"):
        archive.unlink()
    unpack_imagenet(folder)  # nothing is missing


def test_imagenets_training_images_are_unpacked_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put_imagenet(tmp_path / "imagenet", monkeypatch)
    done = []
    extract = tarfile.TarFile.extractall

    def extract_one(tar: tarfile.TarFile, *arguments: object, **options: object) -> None:
        done.append(tar)
        if len(done) > 1:
            raise KeyboardInterrupt
        extract(tar, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", extract_one)
        with pytest.raises(KeyboardInterrupt):
            unpack_imagenet(folder)
    assert not (folder / "train").exists()
    unpack_imagenet(folder)
    assert tree(folder) == TRAIN | VAL


def test_imagenets_part_that_is_there_needs_no_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put_imagenet(tmp_path / "imagenet", monkeypatch)
    (folder / "ILSVRC2012_img_train.tar").unlink()
    with pytest.raises(InputError, match=r"put ILSVRC2012_img_train.tar \(md5 \w+\) into"):
        unpack_imagenet(folder)
    (folder / "train").mkdir()
    unpack_imagenet(folder)
    assert tree(folder) == VAL


@sweep("content", [{"n01440764.tar": tar_of({"../x.JPEG": b""}, "w")}, {"n01440764.tar": b"no archive"}])
def test_imagenets_damaged_archives_leave_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: dict[str, bytes]
) -> None:
    folder = put_imagenet(tmp_path / "imagenet", monkeypatch, train=tar_of(content, "w"))
    with pytest.raises(InputError, match="damaged") as caught:
        unpack_imagenet(folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "train").exists()
    assert not list(folder.glob(".*"))


def test_every_data_set_has_a_reader_and_every_reader_a_data_set() -> None:
    assert {info.reader for info in DATASETS.values()} == set(READERS)
    for name, info in DATASETS.items():
        assert info.folder is None or info.folder in DATASETS, name


FLOWERS = DatasetInfo(
    title="Flowers",
    num_classes=2,
    img_size=16,
    num_train=2,
    num_test=2,
    flip=True,
    policy="imagenet",
    archives=(Archive(file="flowers.tar.gz", url="https://example.org/flowers.tar.gz", md5="0" * 32),),
    citation="Nobody 2026",
    license="MIT",
)


@sweep("name, entry", [("flowers", FLOWERS), *((n, e) for n, e in DATASETS.items() if e.reader == "image-folder")])
def test_an_archive_of_class_folders_needs_one_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, entry: DatasetInfo
) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(buffer, "PNG")
    files = {f"{name}/{split}/{label}/0.png": buffer.getvalue() for split in ("train", "test") for label in "ab"}
    (archive,) = entry.archives
    path = tmp_path / archive.file
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as packed:
            for file, content in files.items():
                packed.writestr(file, content)
    else:
        path.write_bytes(tar_of(files))
    archive = replace(archive, url=path.as_uri(), md5=md5(path.read_bytes()))
    monkeypatch.setitem(DATASETS, name, replace(entry, archives=(archive,)))
    for _ in range(2):
        data = create_dataset(DataConfig(data=name, data_dir=str(tmp_path / "data"), val_fraction=0))
        assert (data.class_names, data.img_size, len(data.train), len(data.test)) == (("a", "b"), entry.img_size, 2, 2)
        assert (data.policy, data.source, data.content) == (entry.policy, name, None)
        assert data.mean == pytest.approx(entry.mean or (1, 0, 0))
