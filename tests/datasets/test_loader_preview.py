"""Contact sheets and lists: what a person sees of the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smallvit import cli
from smallvit.config.config import Config
from smallvit.config.options import AugmentConfig
from smallvit.datasets import DATASETS
from smallvit.datasets.loader import draw_augmented, format_caption
from smallvit.datasets.presets import PRESETS
from smallvit.utils.plots import draw_grid


def test_the_grid_shows_each_picture_enlarged_by_whole_pixels() -> None:
    pictures = torch.linspace(0, 1, 6 * 3 * 32 * 32).reshape(6, 3, 32, 32)
    page = np.asarray(draw_grid(pictures, ["a"] * 6, columns=3))
    expected = (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy().repeat(4, axis=1).repeat(4, axis=2)
    height, width = page.shape[0] // 2, 128 + 6
    for index, picture in enumerate(expected):
        top, left = 6 + index // 3 * (128 + 6 + 14), 6 + index % 3 * width
        assert np.array_equal(page[top : top + 128, left : left + 128], picture)
    assert height > 128


def test_captions_name_the_classes_and_their_weights() -> None:
    names = ("cat", "dog", "owl")
    assert format_caption(torch.tensor([0.0, 1.0, 0.0]), names) == "dog"
    assert format_caption(torch.tensor([0.25, 0.0, 0.75]), names) == "owl 75%\ncat 25%"


def test_captions_are_cut_to_the_width_of_their_picture() -> None:
    short, long = (np.asarray(draw_grid(torch.ones(2, 1, 32, 32), [text, ""], columns=2)) for text in ("mm", "m" * 200))
    right = slice(6 + 128 + 6, None)
    assert (long[:, right] == 255).all()
    assert (short[:, : 6 + 128] < 255).any()


def test_the_first_column_is_the_image_itself_and_the_others_are_varied(image_folder: Path) -> None:
    page = np.asarray(draw_augmented(Config.build(data=str(image_folder), aug="basic", crop_padding=4)))
    plain = np.asarray(draw_augmented(Config.build(data=str(image_folder), aug="none")))
    width = 128 + 6
    assert np.array_equal(page[:, :width], plain[:, :width])
    assert not np.array_equal(page[:, width:], plain[:, width:])
    assert np.array_equal(plain[6 : 6 + 128, 6 : 6 + 128], plain[6 : 6 + 128, 6 + width : 6 + width + 128])


@pytest.mark.parametrize("streaming", ["on", "off"])
def test_show_writes_a_picture_once(image_folder: Path, tmp_path: Path, streaming: str) -> None:
    path = tmp_path / "sheet.png"
    arguments = ["show", "--data", str(image_folder), "--aug", "deit", "--streaming", streaming, "--out", str(path)]
    assert cli.main(arguments) == 0
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 500
    before = path.read_bytes()
    assert cli.main(arguments) == 2
    assert path.read_bytes() == before
    assert cli.main([*arguments, "--overwrite", "--seed", "1"]) == 0
    assert path.read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "--out", "x.jpg"], "expected a name that ends in .png"),
        (["show", "--out", "nowhere/x.png"], "no such folder"),
        (["show", "--epochs", "3"], "--epochs: no such option"),
        (["show", "--auto-augment", "rand-m9-inc7", "--out", "never.png"], "--auto-augment rand-m9-inc7: expected"),
        (["list", "dta"], "did you mean 'data'?"),
        (["list"], "WHAT"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_list_names_every_data_set_and_preset(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["list", "data"]) == 0
    data = capsys.readouterr().out
    assert all(name in data for name in DATASETS)
    assert cli.main(["list", "aug"]) == 0
    aug = capsys.readouterr().out
    assert all(name in aug for name in PRESETS)


def test_the_configuration_knows_every_name_of_the_tables() -> None:
    for name in PRESETS:
        AugmentConfig(aug=name)
    for entry in DATASETS.values():
        assert entry.aug in PRESETS
