"""Reading folders of class folders."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smallvit import datasets
from smallvit.config.options import DataConfig
from smallvit.datasets import decode
from smallvit.datasets.dataset import hold_out
from smallvit.datasets.decode import decode_image, default_size, median_side
from smallvit.datasets.image_folder import list_folder
from smallvit.models.factory import default_patch_size
from smallvit.utils.errors import InputError
from tests.sweep import sweep

Writer = Callable[..., list[Path]]


def load(folder: Path, **options: object) -> datasets.ImageDataset:
    return datasets.create_dataset(DataConfig(data=str(folder), **options))


def test_a_flat_folder_is_split_in_three_with_every_class_in_each(image_folder: Path) -> None:
    data = load(image_folder)
    assert data.class_names == ("dark", "gray", "light")
    assert [len(split) for split in (data.train, data.val, data.test)] == [42, 6, 12]
    assert all(set(split.labels.tolist()) == {0, 1, 2} for split in (data.train, data.val, data.test))
    assert data.img_size == 16
    levels = [data.train.pixels[data.train.labels == label].float().mean().item() for label in range(3)]
    assert levels == pytest.approx([40, 128, 220], abs=5)


def test_the_split_depends_on_its_own_seed_alone(image_folder: Path) -> None:
    one, same, other = (load(image_folder, split_seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.test.pixels, same.test.pixels)
    assert not torch.equal(one.test.pixels, other.test.pixels)


@sweep("given", [("val", "test"), ("test",), ("val",), ()])
def test_splits_that_the_folder_brings_are_used_as_they_are(
    tmp_path: Path, write_images: Writer, given: tuple[str, ...]
) -> None:
    for name, level in (("a", 60), ("b", 200)):
        write_images(tmp_path / "train" / name, 20, level)
        for split in given:
            write_images(tmp_path / split / name, 3 if split == "val" else 5, level + 1)
    data = load(tmp_path)
    sizes = len(data.train), len(data.val), len(data.test)
    assert (
        sizes
        == {
            ("val", "test"): (40, 6, 10),
            ("test",): (36, 4, 10),
            ("val",): (36, 4, 6),  # the only held-out folder is the test split; val is drawn from train
            (): (28, 4, 8),
        }[given]
    )


def test_statistics_are_those_of_the_training_split(image_folder: Path) -> None:
    data = load(image_folder)
    pixels = data.train.pixels.double() / 255
    assert data.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), abs=1e-9)
    assert data.std == pytest.approx(pixels.std(dim=(0, 2, 3), correction=0).tolist(), abs=1e-9)


def test_the_second_start_reads_the_cache(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(image_folder)
    monkeypatch.setattr(decode, "decode_image", None)  # cannot be called
    second = load(image_folder)
    assert torch.equal(first.train.pixels, second.train.pixels)
    assert any("cache" in note for note in second.notes)
    assert first.fingerprint == second.fingerprint


def test_a_changed_file_makes_the_cache_stale(image_folder: Path) -> None:
    first = load(image_folder)
    changed = image_folder / "dark" / "000.png"
    Image.new("RGB", (16, 16), "red").save(changed)
    os.utime(changed, ns=(1, 1))
    assert load(image_folder).fingerprint != first.fingerprint


def test_a_broken_cache_is_replaced(image_folder: Path) -> None:
    first = load(image_folder)
    (cache,) = decode.cache_folder().iterdir()
    cache.write_bytes(cache.read_bytes()[:1000])
    assert torch.equal(load(image_folder).train.pixels, first.train.pixels)
    assert any("cache" in note for note in load(image_folder).notes)


def test_an_unwritable_cache_is_done_without(image_folder: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SMALLVIT_CACHE", str(tmp_path / "file" / "cache"))
    assert len(load(image_folder).train) == 42


def picture() -> Image.Image:
    """40 × 20: left half red, right half blue."""
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    return image


def save(image: Image.Image, path: Path, **options: object) -> str:
    image.save(path, **options)
    return str(path)


@sweep("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "CMYK", "I;16", "I", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    gray = picture().convert("L")
    if mode == "I;16":
        image, suffix = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257), "png"
    elif mode == "I":
        image, suffix = Image.fromarray(np.asarray(gray).astype(np.int32) * 257), "tiff"
    else:
        image, suffix = picture().convert(mode), {"CMYK": "tiff", "YCbCr": "tiff"}.get(mode, "png")
    pixels = decode_image(save(image, tmp_path / f"x.{suffix}"), 8)
    assert pixels.shape == (3, 8, 8)
    expected = decode_image(
        save(image.convert("RGB") if mode[0] != "I" else gray.convert("RGB"), tmp_path / "y.png"), 8
    )
    assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= 2


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (decode_image(save(image, tmp_path / "x.png"), 8) == 255).all()


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pixels = decode_image(save(picture(), tmp_path / "x.jpg", exif=exif, quality=95), 20)
    assert pixels[0, 10, 15] > 200  # red on the right now


def test_animations_give_their_first_frame(tmp_path: Path) -> None:
    path = tmp_path / "x.webp"
    Image.new("RGB", (8, 8), "red").save(path, save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")])
    pixels = decode_image(str(path), 8)
    assert pixels[0].min() > 200
    assert pixels[2].max() < 60


@sweep("shape", [(40, 20), (20, 40), (3, 50), (1000, 700), (1, 1)])
@sweep("suffix", ["png", "jpg"])
def test_any_shape_is_cut_to_a_square_from_its_center(tmp_path: Path, shape: tuple[int, int], suffix: str) -> None:
    pixels = decode_image(save(picture().resize(shape, Image.Resampling.NEAREST), tmp_path / f"x.{suffix}"), 16)
    assert pixels.shape == (3, 16, 16)
    if min(shape) > 10:
        assert pixels[0, 8, 2] > 200  # red left
        assert pixels[2, 8, 13] > 200  # blue right


@sweep(("side", "expected"), [(32, 32), (30, 28), (55, 52), (60, 56), (64, 64), (500, 64), (5, 8)])
def test_the_image_size_follows_the_images(tmp_path: Path, write_images: Writer, side: int, expected: int) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / name, 3, size=(side, side + 7))
    assert default_size(median_side(list_folder(tmp_path))) == expected
    assert expected % default_patch_size("vit", expected) == 0


def truncate(path: Path, to: int) -> None:
    path.write_bytes(path.read_bytes()[:to])


def test_damaged_images_are_named_and_stop_the_run(image_folder: Path) -> None:
    truncate(image_folder / "gray" / "003.png", 300)
    truncate(image_folder / "dark" / "001.png", 0)
    with pytest.raises(InputError, match=r"2 of 60 .*dark/001\.png.*gray/003\.png.*--skip-corrupt"):
        load(image_folder)
    assert list(decode.cache_folder().iterdir()) == []


def test_skipped_damaged_images_are_named_again_from_the_cache(image_folder: Path) -> None:
    truncate(image_folder / "gray" / "003.png", 300)
    for _ in range(2):
        data = load(image_folder, skip_corrupt=True)
        assert sum(len(split) for split in (data.train, data.val, data.test)) == 59
        assert any("gray/003.png" in note for note in data.notes)
    with pytest.raises(InputError, match=r"gray/003\.png"):
        load(image_folder)


def test_arrays_next_to_images_of_other_kinds_are_ignored(image_folder: Path) -> None:
    first = next(image_folder.glob("*/*.png"))
    np.save(first.with_name("mask.npy"), np.zeros((4, 4)))
    data = load(image_folder)
    assert "ignored: 1 NPY file next to images of other kinds" in data.notes
    assert sum(len(part) for part in (data.train, data.val, data.test)) == len([*image_folder.glob("*/*.png")])


def test_hidden_files_and_folders_are_no_images(image_folder: Path) -> None:
    (image_folder / ".cache").mkdir()
    (image_folder / "dark" / "._000.png").write_bytes(b"resource fork")
    (image_folder / "dark" / "notes.txt").write_text("no image")
    assert load(image_folder).class_names == ("dark", "gray", "light")


def test_hidden_folders_within_a_class_are_passed_over(image_folder: Path, write_images: Writer) -> None:
    write_images(image_folder / "dark" / ".ipynb_checkpoints", 5, 41)
    write_images(image_folder / "__MACOSX", 5, 41)
    data = load(image_folder)
    assert sum(len(split) for split in (data.train, data.val, data.test)) == 60


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_to_parents_show_no_image_twice(image_folder: Path) -> None:
    (image_folder / "dark" / "loop").symlink_to(image_folder / "dark")
    data = load(image_folder)
    assert sum(len(split) for split in (data.train, data.val, data.test)) == 60


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_dangling_link_is_a_damaged_image(image_folder: Path) -> None:
    (image_folder / "dark" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(InputError, match=r"1 of 61 .*gone\.png"):
        load(image_folder)
    assert len(load(image_folder, skip_corrupt=True).train) == 42


def test_a_class_may_be_called_train(image_folder: Path) -> None:
    (image_folder / "dark").rename(image_folder / "train")
    assert load(image_folder).class_names == ("gray", "light", "train")


def test_file_names_that_hold_line_breaks_stay_on_one_line(image_folder: Path) -> None:
    (image_folder / "dark" / "a\nb.png").write_bytes(b"no image")
    with pytest.raises(InputError) as caught:
        load(image_folder)
    assert "\n" not in str(caught.value)


@sweep("counts", [[1000, 3], [400, 5, 5], [2, 100], [2, 2]])
@sweep("fraction", [0.001, 0.1, 0.5, 0.999])
def test_held_out_images_are_of_every_class_in_proportion(counts: list[int], fraction: float) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    stay, held = hold_out(labels, fraction, 0, "a test split", ("a", "b", "c", "d"))
    assert np.array_equal(np.sort(np.concatenate([stay, held])), np.arange(len(labels)))
    for label, n in enumerate(counts):
        share = (labels[held] == label).sum()
        assert 1 <= share <= n - 1
        assert abs(share - n * fraction) <= 1


def test_images_in_nested_folders_belong_to_their_class(image_folder: Path, write_images: Writer) -> None:
    write_images(image_folder / "dark" / "more", 5, 41)
    data = load(image_folder)
    assert sum((split.labels == 0).sum().item() for split in (data.train, data.val, data.test)) == 25


def remove_all_but_one(folder: Path) -> None:
    shutil.rmtree(folder / "gray")
    shutil.rmtree(folder / "light")


def tiny_class(folder: Path) -> None:
    for path in sorted((folder / "gray").iterdir())[1:]:
        path.unlink()


def only_broken(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")


def splits_without_training(folder: Path) -> None:
    for name in ("Validation", "Testing"):
        (folder / name).mkdir()
    for name in ("dark", "gray", "light"):
        shutil.copytree(folder / name, folder / "Validation" / name)
        shutil.move(folder / name, folder / "Testing" / name)


def foreign_test_class(folder: Path) -> None:
    for name in ("train", "test"):
        (folder / name).mkdir()
    for name in ("dark", "gray", "light"):
        shutil.copytree(folder / name, folder / "train" / name)
        shutil.move(folder / name, folder / "test" / name)
    shutil.copytree(folder / "test" / "dark", folder / "test" / "unknown")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_all_but_one, "at least 2 class folders.*only dark/"),
        (tiny_class, "too few images to hold out"),
        (splits_without_training, "Testing, Validation look like splits without train/<class>"),
        (foreign_test_class, "test/unknown does not exist"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_unusable_folders_say_why(image_folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(image_folder)
    with pytest.raises(InputError, match=message):
        load(image_folder)


def test_nothing_but_broken_images_is_refused_when_they_are_left_out(image_folder: Path) -> None:
    only_broken(image_folder)
    with pytest.raises(InputError, match="no usable training image"):
        load(image_folder, skip_corrupt=True)


def test_images_that_do_not_fit_into_memory_are_refused_before_decoding(image_folder: Path) -> None:
    with pytest.raises(InputError, match=r"GiB of memory.*smaller --img-size"):
        load(image_folder, img_size=1_000_000)
    with pytest.raises(InputError, match="GiB of memory"):
        datasets.create_dataset(DataConfig(img_size=30_000))


def test_an_unknown_name_is_reported_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'digits'"):
        load(Path("digit"))


def test_digits_are_the_images_of_scikit_learn() -> None:
    data = datasets.create_dataset(DataConfig())
    assert (data.img_size, data.in_chans, len(data.class_names)) == (8, 1, 10)
    assert sum(len(split) for split in (data.train, data.val, data.test)) == 1797
    assert data.train.pixels.max() == 255
    assert not data.flip
    assert datasets.create_dataset(DataConfig(img_size=16)).train.pixels.shape[-2:] == (16, 16)


def test_decoding_follows_pillow_for_images_of_the_right_size(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    (tmp_path / "x.png").write_bytes(buffer.getvalue())
    assert np.array_equal(decode_image(str(tmp_path / "x.png"), 16), noise.transpose(2, 0, 1))


@pytest.mark.parametrize(("name", "rest"), [(None, ""), ("notes.txt", ""), ("a.heic", " except 1 HEIC file")])
def test_a_folder_without_images_is_refused_also_where_no_labels_are_needed(
    tmp_path: Path, without_heif: None, name: str | None, rest: str
) -> None:
    if name is not None:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError) as refused:
        list_folder(tmp_path, labels=False)
    assert str(refused.value).startswith(f"--data {tmp_path}: holds no images{rest}")
    assert "class folders" not in str(refused.value)
