"""Data sets in the formats of the Hugging Face Hub, from miniatures on disk, without the network."""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image

import smallvit
from smallvit import datasets
from smallvit.config.options import DataConfig
from smallvit.datasets.catalog import is_hub_source
from smallvit.datasets.dataset import ImageDataset, Images
from smallvit.utils.errors import InputError
from tests.sweep import sweep

Item = tuple[bytes, int]
NAMES = ("newt", "crane", "mole")


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(seed: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def items(count: int, first: int = 0) -> list[Item]:
    """PNGs of noise, of the classes in turns."""
    return [(encode(Image.fromarray(noise(first + index))), index % len(NAMES)) for index in range(count)]


def pixels(count: int, first: int = 0) -> torch.Tensor:
    """Return what `items` show."""
    return torch.from_numpy(np.stack([noise(first + index) for index in range(count)]).transpose(0, 3, 1, 2).copy())


def assert_holds(images: Images, count: int, first: int = 0) -> None:
    assert torch.equal(images.pixels, pixels(count, first))
    assert images.labels.tolist() == [index % len(NAMES) for index in range(count)]


def load(data: str, folder: Path, **options: object) -> ImageDataset:
    return datasets.create_dataset(
        DataConfig(data=data, data_dir=str(folder / "downloads"), **{"img_size": 16} | options)
    )


def refusal(data: str, folder: Path, **options: object) -> str:
    """Return the one line with which a source is refused."""
    with pytest.raises(InputError) as caught:
        load(data, folder, **options)
    assert "\n" not in str(caught.value)
    assert " at 0x" not in str(caught.value)
    assert str(caught.value).startswith(f"--data {data}: ")
    return str(caught.value)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Hugging Face's package `datasets`, offline, also where this repository's folder of that name lies in the path."""
    root = Path(smallvit.__file__).resolve().parents[1]
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry or ".").resolve() != root])
    if str(getattr(sys.modules.get("datasets"), "__file__", "")).startswith(str(root / "datasets")):
        monkeypatch.delitem(sys.modules, "datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    package = pytest.importorskip("datasets")
    monkeypatch.setattr(package.config, "HF_HUB_OFFLINE", True)
    return package


Writer = Callable[..., Path]


@pytest.fixture
def parquet(hub: ModuleType, tmp_path: Path) -> Writer:
    """Write splits as parquet files; returns their folder."""

    def write(names: tuple[str, ...] | None = NAMES, columns: tuple[str, str] = ("image", "label"), **splits) -> Path:
        folder = Path(tempfile.mkdtemp(dir=tmp_path)) / "source"
        (folder / "data").mkdir(parents=True)
        labels = hub.ClassLabel(names=list(names)) if names else hub.Value("int64")
        features = hub.Features({columns[0]: hub.Image(), columns[1]: labels})
        for split, content in splits.items():
            images = [{"bytes": image, "path": None} for image, _ in content]
            table = {columns[0]: images, columns[1]: [label for _, label in content]}
            written = hub.Dataset.from_dict(table, features=features)
            written.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
        return folder

    return write


@sweep(
    ("data", "expected"),
    [("hfds/someone/name", True), ("hfds//mnt/x", True)]
    + [(other, False) for other in ("hfds", "digits", "folder/hfds", "./hfds/x", "/hfds/x", "hfdsx/y", "wds/x", "")],
)
def test_a_source_is_reported_by_what_stands_before_the_first_slash(data: str, expected: bool) -> None:
    assert is_hub_source(data) == expected


def test_parquet_files_give_their_splits_pixels_labels_and_class_names(parquet: Writer, tmp_path: Path) -> None:
    folder = parquet(train=items(21), validation=items(6, 100), test=items(9, 200))
    data = load(f"hfds/{folder}", tmp_path)
    assert data.class_names == NAMES
    assert_holds(data.train, 21)
    assert_holds(data.val, 6, 100)
    assert_holds(data.test, 9, 200)
    assert data.mean == pytest.approx((pixels(21).double() / 255).mean(dim=(0, 2, 3)).tolist(), abs=1e-9)
    assert (data.flip, data.aug, data.policy) == (True, "mix", "imagenet")


@sweep(
    ("counts", "expected"),
    [({}, (21, 3, 6)), ({"test": 9}, (27, 3, 9)), ({"validation": 6}, (27, 3, 6)), ({"valid": 6}, (27, 3, 6))],
)
def test_splits_that_a_source_lacks_are_drawn(
    parquet: Writer, tmp_path: Path, counts: dict[str, int], expected: tuple[int, ...]
) -> None:
    folder = parquet(train=items(30), **{split: items(count, 100) for split, count in counts.items()})
    data = load(f"hfds/{folder}", tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == expected


def test_labels_without_names_are_called_by_their_numbers(parquet: Writer, tmp_path: Path) -> None:
    assert load(f"hfds/{parquet(names=None, train=items(21))}", tmp_path).class_names == ("0", "1", "2")


def test_a_folder_of_class_folders_is_read_by_the_package_too(hub: ModuleType, tmp_path: Path) -> None:
    for split, count in (("train", 9), ("test", 6)):
        for index, (image, label) in enumerate(items(count)):
            path = tmp_path / "images" / split / NAMES[label] / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
    data = load(f"hfds/{tmp_path / 'images'}", tmp_path, val_fraction=0)
    assert data.class_names == tuple(sorted(NAMES))
    assert (len(data.train), len(data.test)) == (9, 6)
    known = {noise(index).tobytes(): NAMES[index % 3] for index in range(9)}
    for image, label in zip(data.train.pixels, data.train.labels.tolist(), strict=True):
        assert known[image.permute(1, 2, 0).numpy().tobytes()] == data.class_names[label]


def test_images_are_resized_and_by_default_of_64_pixels(parquet: Writer, tmp_path: Path) -> None:
    folder = parquet(train=items(21))
    assert load(f"hfds/{folder}", tmp_path, img_size=None).img_size == 64
    small = load(f"hfds/{folder}", tmp_path, img_size=8, val_fraction=0).train
    whole = load(f"hfds/{folder}", tmp_path, img_size=16, val_fraction=0).train
    for ours, image in zip(small.pixels, whole.pixels, strict=True):
        expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((8, 8), Image.Resampling.BILINEAR)
        assert np.array_equal(ours.permute(1, 2, 0).numpy(), np.asarray(expected))


def red_and_blue() -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", (16, 16), "red")
    image.paste("blue", (8, 0, 16, 16))
    return image


def upside_down() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 3
    return exif


ODD: dict[str, tuple[bytes, tuple[int, int, int]]] = {
    "transparent": (encode(Image.new("RGBA", (16, 16), (255, 0, 0, 0))), (255, 255, 255)),
    "16 bit": (encode(Image.fromarray(np.full((16, 16), 100 * 257, dtype=np.uint16))), (100, 100, 100)),
    "gray": (encode(Image.new("L", (16, 16), 77)), (77, 77, 77)),
    "palette": (encode(Image.new("RGB", (16, 16), (10, 200, 30)).convert("P")), (10, 200, 30)),
    "upside down": (encode(red_and_blue(), "JPEG", quality=100, exif=upside_down()), (0, 0, 255)),  # blue left
}
"""Images, and the color of their left half."""


def assert_decoded(data: ImageDataset, expected: tuple[int, int, int]) -> None:
    actual = data.train.pixels[0, :, 4, 2].tolist()
    assert np.abs(np.subtract(actual, expected)).max() <= (30 if expected == (10, 200, 30) else 3)


@sweep("name", ODD)
def test_images_of_hugging_face_are_decoded_as_those_of_folders(parquet: Writer, tmp_path: Path, name: str) -> None:
    folder = parquet(train=[(ODD[name][0], 0), *items(8)])
    assert_decoded(load(f"hfds/{folder}", tmp_path, val_fraction=0, test_fraction=0.01), ODD[name][1])


def test_relative_folder_is_valid_from_another_working_directory(
    parquet: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = parquet(train=items(30))
    monkeypatch.chdir(folder.parent)
    first = load(f"hfds/{folder.name}", tmp_path)
    monkeypatch.chdir("/")
    assert load(first.source, tmp_path / "other").fingerprint == first.fingerprint


def test_a_source_is_named_as_it_was_given(parquet: Writer, tmp_path: Path) -> None:
    folder = parquet(train=items(21))
    data = load(f"hfds/{folder}", tmp_path)
    assert data.name == data.source == f"hfds/{folder}"


def test_a_changed_source_has_another_fingerprint(parquet: Writer, tmp_path: Path) -> None:
    folder = parquet(train=items(30))
    first, same = (load(f"hfds/{folder}", tmp_path) for _ in range(2))
    assert first.fingerprint == same.fingerprint
    shutil.rmtree(folder)
    shutil.move(parquet(train=items(30, 1)), folder)
    assert load(f"hfds/{folder}", tmp_path).fingerprint != first.fingerprint


def test_a_missing_package_is_named_with_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refusal("hfds/someone/name", tmp_path)


def test_another_module_of_the_packages_name_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = ModuleType("datasets")
    stranger.__file__ = "/somewhere/datasets/__init__.py"
    monkeypatch.setitem(sys.modules, "datasets", stranger)
    assert "datasets" in refusal("hfds/someone/name", tmp_path)


def test_no_package_is_blamed_for_a_folder_without_data(hub: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "install").mkdir()
    assert "pip install" not in refusal(f"hfds/{tmp_path / 'install'}", tmp_path)


def test_sources_without_a_training_split_are_refused(parquet: Writer, tmp_path: Path) -> None:
    assert "train" in refusal(f"hfds/{parquet(test=items(9))}", tmp_path)


def test_missing_folder_or_repository_is_refused(hub: ModuleType, tmp_path: Path) -> None:
    assert "nowhere" in refusal(f"hfds/{tmp_path / 'nowhere'}", tmp_path)
    assert "someone/name" in refusal("hfds/someone/name", tmp_path)


@sweep("content", [b"no image", items(1)[0][0][:200]])
def test_a_broken_image_stops_the_run(parquet: Writer, tmp_path: Path, content: bytes) -> None:
    broken = items(12)
    broken[5] = (content, 2)
    assert "image 6 of train" in refusal(f"hfds/{parquet(train=broken)}", tmp_path)


@sweep(("columns", "other"), [(("image", "fine_label"), "fine_label"), (("img", "label"), "img")])
def test_columns_by_other_names_are_reported(
    parquet: Writer, tmp_path: Path, columns: tuple[str, str], other: str
) -> None:
    assert other in refusal(f"hfds/{parquet(columns=columns, train=items(9))}", tmp_path)


def test_a_test_without_labels_is_not_used(parquet: Writer, tmp_path: Path) -> None:
    folder = parquet(train=items(30), test=[(image, -1) for image, _ in items(9)])
    with suppress(InputError):  # refused, or the split left out
        assert load(f"hfds/{folder}", tmp_path).test.labels.min() >= 0


def test_sources_are_not_streamed_nor_downloaded_from_another_address(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--streaming on: hfds/x is read into memory"):
        load("hfds/x", tmp_path, streaming="on")


def test_downloads_lie_in_the_data_folder(parquet: Writer, tmp_path: Path) -> None:
    load(f"hfds/{parquet(train=items(21))}", tmp_path)
    assert any((tmp_path / "downloads" / "hfds").rglob("*.arrow"))
