"""Provide shared fixtures: a private cache, a trained run, image folders, and the command line in this process."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers run in parallel: one thread each, and one per process they start
    os.environ["OMP_NUM_THREADS"] = "1"

import functools
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from smallvit.cli import main
from smallvit.datasets import listing
from smallvit.runs import curves

TRAINED_RUN = ["--arch", "vit", "--spt", "--lsa", "--data", "digits", "--epochs", "2", "--batch-size", "32"]
"""Options of the shared run. The model is the small ViT for 8-pixel images: 96 wide, 6 layers, patch 2."""
ON_CPU = ["--aug", "none", "--amp", "off", "--device", "cpu"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked gpu on machines without one."""
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALLVIT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session", autouse=True)
def _no_curves() -> Iterator[None]:
    """Replace the plot at the end of a run, which takes as long as a short training, by a small image."""

    @functools.wraps(curves.plot_curves)
    def write_pixel(_history: object, path: Path, *_: object) -> None:
        Image.new("L", (1, 1)).save(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "plot_curves", write_pixel)
        yield


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Train a ViT with SPT and LSA on the digits for two epochs; return its finished run folder.

    The run is made once per test session and shared by all workers, so a test must not write into it:
    use `trained_run_copy` for that.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # each worker has a folder below the session's
    folder = shared / "trained-run" / "vit-spt-lsa-digits"
    with FileLock(shared / "trained-run.lock"), pytest.MonkeyPatch.context() as patch:
        if not folder.exists():
            patch.setenv("SMALLVIT_CACHE", str(tmp_path_factory.mktemp("cache")))
            patch.setattr(curves, "plot_curves", curves.plot_curves.__wrapped__)
            unfinished = tmp_path_factory.mktemp("unfinished") / folder.name
            assert main(["train", *TRAINED_RUN, *ON_CPU, "--out", str(unfinished)]) == 0
            folder.parent.mkdir()
            unfinished.rename(folder)
    files = {path.name for path in folder.iterdir()}
    yield folder
    added = {path.name for path in folder.iterdir()} - files
    assert not added, f"a test wrote {sorted(added)} into the shared trained_run; use trained_run_copy"


@pytest.fixture
def trained_run_copy(trained_run: Path, tmp_path: Path) -> Path:
    """Copy the shared trained run into the test's own folder."""
    return shutil.copytree(trained_run, tmp_path / "runs" / trained_run.name)


@pytest.fixture
def write_images() -> Callable[..., list[Path]]:
    """Return a function that writes `count` PNGs of noise around a gray level, one level per class."""

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
    """Write three classes of 20 images each, without split folders; return their folder."""
    for level, name in ((40, "dark"), (128, "gray"), (220, "light")):
        write_images(tmp_path / "images" / name, 20, level)
    return tmp_path / "images"


@pytest.fixture
def without_heif(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Uninstall pillow-heif, as far as the process can tell."""
    Image.init()  # all formats are registered before the list of them is replaced
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    for cached in (listing.register_heif, listing.image_suffixes):
        cached.cache_clear()
    yield
    for cached in (listing.register_heif, listing.image_suffixes):
        cached.cache_clear()


@pytest.fixture
def smallvit(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs the command line and returns exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], AbstractContextManager[None]]:
    """Return a context manager that interrupts training at the n-th displayed step or epoch, with checkpoints due."""

    @contextmanager
    def at(calls: int) -> Iterator[None]:
        from smallvit.training import checkpointing
        from smallvit.utils.terminal import TrainingProgress

        left = calls

        def interrupt(*_: object) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(checkpointing, "EPOCH_SECONDS", 0)
            patch.setattr(checkpointing, "CHECK_SECONDS", 0)
            patch.setattr(TrainingProgress, "step", interrupt)
            patch.setattr(TrainingProgress, "epoch", interrupt)
            with pytest.raises(KeyboardInterrupt):
                yield

    return at
