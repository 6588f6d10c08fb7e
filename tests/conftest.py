"""Shared fixtures: a cache of its own, small image folders, and the command line run in this process."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # files of tests side by side: a thread for each, and for what they start
    os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smallvit.cli import main


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALLVIT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def write_images() -> Callable[..., list[Path]]:
    """Write `count` PNGs of noise around a grey level that tells the class."""

    def write(folder: Path, count: int, level: int = 128, size: tuple[int, int] = (16, 16)) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(level)
        paths = [folder / f"{index:03}.png" for index in range(count)]
        for path in paths:
            noise = rng.normal(level, 20, (size[1], size[0], 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noise).save(path)
        return paths

    return write


@pytest.fixture
def image_folder(tmp_path: Path, write_images: Callable[..., list[Path]]) -> Path:
    """Three classes of 20 images, without split folders."""
    for level, name in ((40, "dark"), (128, "grey"), (220, "light")):
        write_images(tmp_path / "images" / name, 20, level)
    return tmp_path / "images"


@pytest.fixture
def smallvit(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], AbstractContextManager[None]]:
    """A context in which training is interrupted at the n-th display of a step or an epoch, checkpoints being due."""

    @contextmanager
    def at(calls: int) -> Iterator[None]:
        from smallvit import keeper
        from smallvit.progress import TrainingProgress

        left = calls

        def interrupt(*_: object) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(keeper, "EPOCH_SECONDS", 0)
            patch.setattr(keeper, "LOOK_SECONDS", 0)
            patch.setattr(TrainingProgress, "step", interrupt)
            patch.setattr(TrainingProgress, "epoch", interrupt)
            with pytest.raises(KeyboardInterrupt):
                yield

    return at
