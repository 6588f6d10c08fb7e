"""Runs whose data, teacher, initial weights or own folder have moved: contents decide, not paths."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from smallvit import Config
from smallvit.models import checkpoint
from smallvit.runs.run import Run
from smallvit.training import launch
from smallvit.training import train as engine

Command = Callable[..., tuple[int, str, str]]
Interrupted = Callable[[int], AbstractContextManager[None]]
QUICK = {"arch": "vit", "img_size": 8, "batch_size": 16, "aug": "none", "amp": "off", "val_fraction": 0.2}


def train(folder: Path, data: Path, **options: Any) -> Path:
    return engine.train(
        Config.build(**QUICK | {"data": str(data), "epochs": 2, "out": str(folder), "keep_resume": True} | options)
    ).folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def options(folder: Path) -> dict[str, Any]:
    return json.loads((folder / Run.CONFIG).read_text())


def refused(smallvit: Command, *arguments: object) -> str:
    """Return the one line of a command's error."""
    code, _, err = smallvit(*arguments)
    assert (code, err.count("\n")) == (2, 1), err
    return err


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = (checkpoint.load_weights(folder / Run.LAST)[0] for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def invert(image: Path) -> None:
    """Other pixels in a file of the same size, where PNG allows."""
    Image.fromarray(255 - np.asarray(Image.open(image))).save(image)


CHANGES: dict[str, Callable[[Path], object]] = {
    "other pixels": lambda data: invert(data / "dark" / "007.png"),
    "one image fewer": lambda data: (data / "dark" / "007.png").unlink(),
    "another label": lambda data: (data / "dark" / "007.png").rename(data / "light" / "999.png"),
    "another class": lambda data: shutil.copytree(data / "dark", data / "night"),
}


@pytest.mark.slow
@pytest.mark.parametrize("streaming", ["off", "on"])
def test_a_run_resumes_where_its_data_has_moved(
    image_folder: Path, tmp_path: Path, interrupted: Interrupted, smallvit: Command, streaming: str
) -> None:
    whole = train(tmp_path / "whole", image_folder, streaming=streaming, workers=0)
    run, data = tmp_path / "run", tmp_path / "elsewhere" / "photos"
    with interrupted(4):
        train(run, image_folder, streaming=streaming, workers=0)
    data.parent.mkdir()
    image_folder.rename(data)
    before = contents(run)
    assert f"{image_folder} no longer exists" in refused(smallvit, "train", "--resume", run)
    assert "no such" in refused(smallvit, "train", "--resume", run, "--data", tmp_path / "nowhere")
    assert "--data digits: the run in" in refused(smallvit, "train", "--resume", run, "--data", "digits")
    for what, change in CHANGES.items():
        if streaming == "on" and what == "other pixels":  # only names and sizes are known there
            continue
        copy = Path(shutil.copytree(data, tmp_path / what))
        change(copy)
        err = refused(smallvit, "train", "--resume", run, "--data", copy)
        assert f"--data {copy}: not the images that the run was started with" in err
    assert contents(run) == before
    code, out, err = smallvit("train", "--out", run, "--auto-resume", "--data", data)
    assert (code, err) == (0, ""), err
    assert "resume after epoch 1" in out
    assert options(run) == json.loads(before[Run.CONFIG]) | {"data": str(data)}
    assert same_weights(run, whole)
    assert smallvit("train", "--resume", run)[0] == 0


@pytest.mark.slow
def test_a_run_resumes_where_its_teacher_and_initial_weights_have_moved(
    image_folder: Path, tmp_path: Path, interrupted: Interrupted, smallvit: Command
) -> None:
    teacher = train(tmp_path / "teacher", image_folder, epochs=1)
    other = train(tmp_path / "other", image_folder, epochs=1, seed=1)
    source = Path(shutil.copytree(other, tmp_path / "source"))
    start = {"teacher": str(teacher), "init": str(source), "arch": None}
    whole = train(tmp_path / "whole", image_folder, **start)
    run = tmp_path / "run"
    with interrupted(4):
        train(run, image_folder, **start)
    before = contents(run)
    teacher.rename(tmp_path / "moved teacher")
    source.rename(tmp_path / "moved source")
    assert f"{teacher} no longer exists" in refused(smallvit, "train", "--resume", run)
    moved = {"--teacher": tmp_path / "moved teacher", "--init": tmp_path / "moved source"}
    for option, wrong in zip(moved, reversed(moved.values()), strict=True):  # each where the other belongs
        given = moved | {option: wrong}
        err = refused(smallvit, "train", "--resume", run, *[each for pair in given.items() for each in pair])
        assert f"{option} {wrong}: not the weights that the run in {run} was started with" in err
    assert contents(run) == before
    code, out, err = smallvit("train", "--resume", run, *[each for pair in moved.items() for each in pair])
    assert (code, err) == (0, ""), err
    assert "resume after epoch 1" in out
    assert [options(run)[name] for name in ("teacher", "init")] == [str(moved["--teacher"]), str(moved["--init"])]
    assert same_weights(run, whole)
    (other / Run.SUMMARY).unlink()
    assert "--teacher" in (line := refused(smallvit, "train", "--resume", other, "--teacher", other))
    assert "has None" in line


def test_a_run_resumes_where_its_own_folder_has_moved(
    image_folder: Path, tmp_path: Path, interrupted: Interrupted, smallvit: Command
) -> None:
    whole = train(tmp_path / "whole", image_folder)
    with interrupted(4):
        train(tmp_path / "run", image_folder)
    copy = Path(shutil.copytree(tmp_path / "run", tmp_path / "copy"))
    (tmp_path / "run").rename(tmp_path / "moved")
    for folder in (copy, tmp_path / "moved"):
        assert smallvit("train", "--resume", folder)[0] == 0
        assert same_weights(folder, whole)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_report_is_computed_where_the_data_has_moved(image_folder: Path, tmp_path: Path, smallvit: Command) -> None:
    run, data = train(tmp_path / "run", image_folder), tmp_path / "photos"
    there = Path(shutil.copytree(run, tmp_path / "there"))
    assert smallvit("report", there)[0] == 0
    image_folder.rename(data)
    for verb in ("eval", "attend", "probe"):
        assert f"its data is no longer at {image_folder}" in refused(smallvit, verb, run)
    code, out, _ = smallvit("report", run)
    assert code == 0
    assert out.count(f"its data is no longer at {image_folder}") == 2
    assert not (run / "eval").exists()
    for what, change in CHANGES.items():
        copy = Path(shutil.copytree(data, tmp_path / what))
        change(copy)
        err = refused(smallvit, "report", run, "--data", copy, "--overwrite")
        assert f"--data {copy}: differs from the images of {run}" in err
    code, out, err = smallvit("report", run, "--data", data, "--overwrite")
    assert (code, out.splitlines()[-1]) == (0, str(run / Run.REPORT)), err
    assert "missing" not in out
    ours, theirs = (json.loads((each / "eval" / "test" / "metrics.json").read_text()) for each in (run, there))
    assert all(ours[name] == theirs[name] for name in ours.keys() - {"name", "command"})
    assert ours["command"] == f"smallvit eval {run} --data {data}"
    (run / Run.STATE).unlink()  # then names and sizes of the files decide
    shutil.rmtree(run / "eval")
    assert smallvit("report", run, "--data", data, "--overwrite")[0] == 0
    shutil.rmtree(run / "eval")
    err = refused(smallvit, "report", run, "--data", tmp_path / "another label", "--overwrite")
    assert "differs from the images of" in err


def test_options_without_their_plugin_are_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    for options, line in [
        ({"lsa_mask": False}, "--no-lsa-mask has no effect without --lsa"),
        ({"arch": "vit+lsa", "spt_shift": 0.25}, "--spt-shift has no effect without --spt"),
        ({"plugin_init": "preserve"}, "--plugin-init has no effect without a plugin"),
    ]:
        launch.warn_ineffective(Config.build(**options))
        assert capsys.readouterr().err.startswith(f"smallvit: warning: {line}")
    launch.warn_ineffective(Config.build(arch="vit+spt+lsa", spt_shift=0.25, plugin_init="preserve"))
    launch.warn_ineffective(Config.build(arch="binaryvit_tiny", binary_downsampling=False))
    assert not capsys.readouterr().err
