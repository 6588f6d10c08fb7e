"""Train a finished run for more epochs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from smallvit import Config
from smallvit.runs.run import Run
from smallvit.training.train import train

Command = Callable[..., tuple[int, str, str]]


def read_history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / Run.METRICS).read_text().splitlines()]


@pytest.mark.slow
def test_a_finished_run_is_trained_longer_by_a_second_schedule(smallvit: Command, tmp_path: Path) -> None:
    flags = ["--train-fraction", 0.1, "--batch-size", 32, "--aug", "none", "--amp", "off", "--lr", 2e-3]
    out, fresh = tmp_path / "run", tmp_path / "fresh"
    assert smallvit("train", *flags, "--epochs", 2, "--keep-resume", "--out", out)[0] == 0
    before = read_history(out)
    code, shown, _ = smallvit("train", "--resume", out, "--epochs", 5)
    assert code == 0
    assert "cosine again since epoch 3, without warmup" in shown
    history = read_history(out)
    assert history[:2] == before
    assert [line["epoch"] for line in history] == [1, 2, 3, 4, 5]
    assert smallvit("train", *flags, "--epochs", 3, "--warmup-ratio", 0, "--out", fresh)[0] == 0
    assert [line["lr"] for line in history[2:]] == [line["lr"] for line in read_history(fresh)]
    assert json.loads((out / Run.SUMMARY).read_text())["epochs"] == 5
    assert (out / Run.STATE).exists()


@pytest.mark.slow
def test_an_interrupted_extension_is_resumed(
    smallvit: Command, tmp_path: Path, interrupted: Callable[[int], AbstractContextManager[None]]
) -> None:
    flags = ["--train-fraction", 0.1, "--batch-size", 32, "--aug", "none", "--amp", "off"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert smallvit("train", *flags, "--epochs", 1, "--keep-resume", "--out", whole)[0] == 0
    shutil.copytree(whole, parts)
    assert smallvit("train", "--resume", whole, "--epochs", 3)[0] == 0
    with interrupted(3):
        train(Config.build(resume=str(parts), epochs=3))
    assert smallvit("train", "--resume", parts)[0] == 0
    for name in (Run.LAST, Run.BEST):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_finished_run_without_its_state_names_the_remedy(smallvit: Command, trained_run_copy: Path) -> None:
    assert not (trained_run_copy / Run.STATE).exists()
    code, _, err = smallvit("train", "--resume", trained_run_copy, "--epochs", 5)
    assert code == 2
    assert f"--init {trained_run_copy} --epochs 3" in err
    (trained_run_copy / Run.SUMMARY).unlink()
    code, _, err = smallvit("train", "--resume", trained_run_copy)
    assert code == 2
    assert f"smallvit eval {trained_run_copy}" in err
