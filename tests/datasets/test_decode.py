"""Test images of phones: HEIC, AVIF and their rotation."""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features

from smallvit import datasets
from smallvit.config.options import DataConfig
from smallvit.datasets import decode
from smallvit.datasets.decode import decode_image
from smallvit.datasets.loader import evaluation_batches
from tests.sweep import sweep

CPU = torch.device("cpu")
Command = Callable[..., tuple[int, str, str]]
ROTATED = 6
"""EXIF orientation of a photograph that is turned by a quarter clockwise to be seen."""


@pytest.fixture
def heif() -> None:
    """Skip the test where pillow-heif is missing or does not encode."""
    if not pytest.importorskip("pillow_heif").libheif_info()["HEIF"]:
        pytest.skip("pillow-heif does not encode HEIC")


def photograph(width: int, height: int, level: int = 0) -> Image.Image:
    """Return colors that change slowly, differently along both axes."""
    x, y = np.linspace(0, 200, width), np.linspace(0, 200, height)[:, None]
    channels = (x + 0 * y, y + 0 * x, (x + y) / 2 + level)
    return Image.fromarray(np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8))


def save_rotated(image: Image.Image, path: Path) -> Path:
    """Save an image with an orientation, as phones do."""
    decode_image(io.BytesIO(png(image)), 8)  # which registers pillow-heif
    exif = Image.Exif()
    exif[0x0112] = ROTATED
    fast = {"enc_params": {"preset": "ultrafast"}} if path.suffix == ".heic" else {}
    image.save(path, exif=exif.tobytes(), quality=90, **fast)
    return path


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def assert_upright(path: Path, image: Image.Image, size: int = 64) -> None:
    """Check that a rotated file is decoded as the PNG of the upright pixels is, up to the loss of the codec."""
    upright = io.BytesIO(png(image.transpose(Image.Transpose.ROTATE_270)))
    expected = decode_image(upright, size).astype(int)
    for file in (str(path), io.BytesIO(path.read_bytes())):
        difference = np.abs(decode_image(file, size) - expected)
        assert difference.mean() < 2
        assert difference.max() < 12


@pytest.mark.slow
@pytest.mark.usefixtures("heif")
def test_a_rotated_photograph_in_heic_is_decoded_as_its_png(tmp_path: Path) -> None:
    image = photograph(4000, 3000)
    path = save_rotated(image, tmp_path / "x.heic")
    with Image.open(path) as opened:
        assert opened.format == "HEIF"
    assert_upright(path.rename(tmp_path / "x.jpg"), image)  # photographs are renamed, too


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_a_rotated_photograph_in_avif_is_decoded_as_its_png(tmp_path: Path) -> None:
    image = photograph(400, 300)
    assert_upright(save_rotated(image, tmp_path / "x.avif"), image)


@pytest.mark.slow
@pytest.mark.usefixtures("heif")
def test_heic_files_are_trained_on_and_predicted(tmp_path: Path, smallvit: Command) -> None:
    folder, archive = tmp_path / "photos", tmp_path / "photos.zip"
    for name, level in (("dark", 0), ("light", 155)):
        (folder / name).mkdir(parents=True)
        for index in range(8):
            save_rotated(photograph(48, 32, level), folder / name / f"{index}.{('heic', 'heif', 'HEIC')[index % 3]}")
    with zipfile.ZipFile(archive, "w") as opened:
        for file in sorted(folder.rglob("*.*")):
            opened.write(file, file.relative_to(folder))
    held, *others = (
        datasets.create_dataset(DataConfig(data=str(source), streaming=streaming, workers=1))
        for source in (folder, archive)
        for streaming in ("off", "on")
    )
    assert (held.img_size, len(held.train) + len(held.val) + len(held.test)) == (32, 16)
    assert not any("ignored" in note for note in held.notes)
    expected, *actual = ([x for x, _ in evaluation_batches(data, "test", CPU, 4)] for data in (held, *others))
    for batches in actual:
        torch.testing.assert_close(batches, expected)
    run, quick = tmp_path / "run", ["--epochs", "1", "--batch-size", "4", "--patch-size", "8", "--device", "cpu"]
    assert smallvit("train", "--data", archive, "--streaming", "on", "--workers", 1, *quick, "--out", run)[0] == 0
    code, out, err = smallvit("predict", run, folder, "--format", "csv")
    assert (code, len(out.splitlines()), err) == (0, 17, "")
    assert smallvit("eval", run, "--data", folder, "--split", "all")[0] == 0
    assert smallvit("attend", run, folder / "dark" / "0.heic", "--out", tmp_path / "maps")[0] == 0
    assert smallvit("show", "--data", folder, "--out", tmp_path / "sheet.png")[0] == 0


def encode(image: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


def decode_whole(content: bytes) -> np.ndarray:
    stream = io.BytesIO(content)
    with decode.open_image(stream, 1) as image:
        return decode.decode_rgb(image, stream).permute(1, 2, 0).numpy()


JPEGS = {
    "plain": {"quality": 90},
    "full colors": {"subsampling": 0},
    "half colors": {"subsampling": 1},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 3},
    "RGB without conversion": {"keep_rgb": True},
}


@sweep("name", JPEGS)
@sweep("mode", ["RGB", "L", "CMYK"])
@sweep("shape", [(61, 47), (16, 16), (1, 1)])
def test_jpegs_are_decoded_to_the_pixels_of_pillow(name: str, mode: str, shape: tuple[int, int]) -> None:
    pytest.importorskip("simplejpeg")
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(shape, Image.Resampling.BICUBIC).convert(mode)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encode(image, exif=exif, **JPEGS[name])
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
        np.testing.assert_array_equal(decode_whole(content), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("simplejpeg.decode_jpeg", lambda _: np.zeros((1, 2, 3), np.uint8))
        assert (decode_whole(encode(image, **JPEGS[name])).shape == (1, 2, 3)) == (mode != "CMYK")
        patch.setitem(sys.modules, "simplejpeg", None)  # not installed
        np.testing.assert_array_equal(
            decode_whole(content), ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
        )


def test_damaged_jpegs_fail_as_in_pillow() -> None:
    pytest.importorskip("simplejpeg")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    whole = encode(Image.fromarray(pixels), quality=90)
    for length in (*range(0, len(whole), 97), len(whole) - 2):
        with pytest.raises((OSError, SyntaxError)):
            decode_whole(whole[:length])
    np.testing.assert_array_equal(decode_whole(whole + b"more"), Image.open(io.BytesIO(whole)))
    for seed in range(20):
        content, rng = bytearray(whole), np.random.default_rng(seed)
        content[int(rng.integers(len(whole) // 3, len(whole)))] ^= int(rng.integers(1, 256))
        try:
            expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        except (OSError, SyntaxError):
            with pytest.raises((OSError, SyntaxError)):
                decode_whole(bytes(content))
        else:
            np.testing.assert_array_equal(decode_whole(bytes(content)), expected)
