"""Test contact sheets and the choice of fonts for characters that matplotlib's default font lacks."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font
from PIL import Image

from smallvit.utils import plots
from smallvit.utils.plots import draw_grid, font_families, pillow_font, save_figure

UNASSIGNED = "\U000effff"
"""A code point that no font has."""


@pytest.fixture
def rare_letter(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a letter that STIX, which is installed with matplotlib, has and the default font lacks."""
    (stix,) = {entry.fname for entry in plots._regular_fonts() if entry.name == "STIXGeneral"}
    known, default = (set(get_font(file).get_charmap()) for file in (stix, findfont(plots.DEFAULT_FONT)))
    monkeypatch.setattr(plots, "_reported", set())
    plots._find_fonts.cache_clear()
    return next(chr(code) for code in sorted(known - default) if chr(code).isalpha())


def test_sheet_holds_pictures_in_rows_with_captions() -> None:
    pictures = torch.zeros(3, 1, 32, 32)
    pictures[1] = 1
    sheet = draw_grid(pictures, ["a", "a long caption that must be truncated", "c\nd"], 2)
    pixels = np.asarray(sheet)
    assert sheet.size == (2 * 128 + 3 * plots.MARGIN, plots.MARGIN + 2 * (128 + plots.MARGIN + 2 * plots.LINE_HEIGHT))
    left = plots.MARGIN + 128 + plots.MARGIN
    assert (pixels[plots.MARGIN : plots.MARGIN + 128, plots.MARGIN : plots.MARGIN + 128] == 0).all()
    assert (pixels[plots.MARGIN : plots.MARGIN + 128, left : left + 128] == 255).all()
    assert (pixels[:, -plots.MARGIN :] == 255).all()
    with_title = draw_grid(pictures, ["", "", ""], 2, title="one title that is wrapped to the width of the sheet " * 3)
    assert with_title.height > sheet.height


def test_bytes_and_floats_are_drawn_alike() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16)).astype(np.uint8)
    sheets = [np.asarray(draw_grid(pictures, ["", ""], 2)) for pictures in (pixels, pixels / 255)]
    assert (sheets[0] == sheets[1]).all()


def test_rare_letters_get_another_font(rare_letter: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert font_families("plain, žluťoučký, привет") == ["DejaVu Sans"]
    default, *others = font_families(f"a{rare_letter}b")
    assert default == "DejaVu Sans"
    files = [entry.fname for entry in fontManager.ttflist if entry.name == others[0]]
    assert any(ord(rare_letter) in get_font(file).get_charmap() for file in files)
    assert capsys.readouterr().err == ""


def test_characters_without_a_font_are_reported_once(rare_letter: str, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert font_families(f"x{UNASSIGNED}") == ["DejaVu Sans"]
        pillow_font(UNASSIGNED)
    err = capsys.readouterr().err
    assert "no installed font has" in err
    assert "(U+EFFFF): pictures show boxes; install one" in err
    assert len(err.splitlines()) == 1


def test_figures_and_sheets_show_rare_letters(rare_letter: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns about missing glyphs
        figure = Figure()
        figure.subplots().set(title=rare_letter, xlabel=rare_letter)
        figure.suptitle(rare_letter)
        save_figure(figure, tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").width > 100
    sheets = [np.asarray(draw_grid(torch.zeros(1, 3, 64, 64), [text], 1)) for text in (rare_letter, UNASSIGNED)]
    assert (sheets[0] != sheets[1]).any()
    assert pillow_font("cat").getname() == pillow_font("dog é").getname()
