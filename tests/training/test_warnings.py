"""Report surprising sizes of images, batches and splits in one line each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import norm

from smallvit import Config
from smallvit.training.setup import create_setup

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Write three classes of 20 photographs of 240x160 pixels."""
    rng = np.random.default_rng(0)
    for label in range(3):
        (tmp_path / "photos" / f"class{label}").mkdir(parents=True)
        for index in range(20):
            pixels = rng.integers(0, 255, (160, 240, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / f"class{label}" / f"{index}.png")
    return tmp_path / "photos"


def test_surprising_sizes_are_said(photographs: Path) -> None:
    config = Config.build(data=str(photographs), arch="deit_tiny_patch16_224", batch_size=128)
    setup = create_setup(config)
    text = "\n".join((*setup.dataset.notes, *setup.warnings()))
    assert "images of 160 pixels (median shorter side) are reduced to 64; --img-size changes that" in text
    assert "deit_tiny_patch16_224 is made for 224 pixels and trains at 64; --img-size 224 takes about 12 times" in text
    assert "timm has pretrained weights for deit_tiny_patch16_224: --init deit_tiny_patch16_224 --recipe" in text
    assert f"a step has all {len(setup.dataset.train)} training images, since --batch-size is 128" in text
    count = len(setup.dataset.val)
    points = 100 * norm.ppf(0.975) * (0.25 / count) ** 0.5
    assert f"{count} validation images measure an accuracy to within {points:.0f} points" in text


def test_test_images_in_train_are_counted(photographs: Path) -> None:
    """Splits share 3 of 12 images, which are larger than what is compared of them."""
    folder = photographs.parent / "splits"
    for index, path in enumerate(sorted(photographs.rglob("*.png"))):
        splits = (*["train"] * (index % 5 > 0 or index % 20 == 0), *["test"] * (index % 5 == 0))
        for split in splits:
            target = folder / split / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    setup = create_setup(Config.build(data=str(folder), arch="vit96", img_size=64, val_fraction=0))
    assert "3 of 12 test images are also in train" in "\n".join(setup.warnings())


def test_usual_sizes_are_not_commented(tmp_path: Path) -> None:
    assert not list(create_setup(Config.build(arch="vit", batch_size=32)).warnings())


def test_too_few_images_say_how_many_are_needed(smallvit: Command, photographs: Path) -> None:
    for path in sorted((photographs / "class1").iterdir())[1:]:
        path.unlink()
    code, _, err = smallvit("train", "--data", photographs)
    assert (code, err.count("\n")) == (2, 1)
    assert "class 'class1'" in err
    assert "3 are needed, for train, val and test" in err


def test_the_next_commands_follow_a_training(smallvit: Command, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, shown, _ = smallvit("train", "--epochs", 1, "--train-fraction", 0.05, "--out", out)
    assert code == 0
    last = [line.removeprefix("next").strip() for line in shown.splitlines()[-3:]]
    assert last == [f"smallvit eval {out}", f"smallvit report {out}", f"smallvit predict {out} IMAGES"]
