"""Import every module and train a model without the modules and functions that Windows lacks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT = """\
import os, psutil, signal, sys  # psutil needs resource on Linux only
sys.modules["fcntl"] = sys.modules["resource"] = None
for module, names in ((os, ("sched_getaffinity", "geteuid")), (signal, ("pthread_sigmask",))):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
"""
IMPORT_ALL = """\
import importlib, pkgutil, smallvit, smallvit.plugins, smallvit.datasets, smallvit.cli
for package in (smallvit, smallvit.plugins, smallvit.datasets, smallvit.cli):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
            print(module.name)
"""
TRAIN = """\
from smallvit.cli import main
small = ["--data", sys.argv[1], "--arch", "vit", "--epochs", "2", "--batch-size", "16", "--aug", "basic"]
assert main(["train", *small, "--streaming", "on", "--workers", "2", "--out", "run"]) == 0
assert main(["train", *small, "--out", "run", "--auto-resume"]) == 0
assert main(["eval", "run"]) == 0
assert main(["predict", "run", sys.argv[1]]) == 0
"""


def run(code: str, *arguments: object, folder: Path) -> str:
    command = [sys.executable, "-c", WITHOUT + code, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_module_imports_without_fcntl_and_resource(tmp_path: Path) -> None:
    imported = run(IMPORT_ALL, folder=tmp_path).split()
    for name in (
        "smallvit.runs.run",
        "smallvit.experiments.records",
        "smallvit.datasets.download",
        "smallvit.cli.train",
    ):
        assert name in imported


@pytest.mark.slow
def test_training_works_without_fcntl_and_resource(image_folder: Path, tmp_path: Path) -> None:
    run(TRAIN, image_folder, folder=tmp_path)
    assert (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / ".lock").exists()
