"""Bad input is reported, and the first line of a training printed, before torch is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import timm

from smallvit.models.architectures import timm_names

RUN = """
import contextlib, io, json, sys
sys.modules["torch"] = None  # importing it fails, and timm with it
from smallvit.cli import main
results = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except ImportError:
            code = None
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""
MISSING = {
    "train --data missing/folder": "--data missing/folder: no such folder",
    "train --data missing": "--data missing: no such data set or folder",
    "train --data cifar1O": "did you mean 'cifar10'?",
    "train --arch vot": "--arch vot: no such architecture (did you mean 'vit'?)",
    "train --arch deit_tiny_patch16_22": "did you mean 'deit_tiny_patch16_224'?",
    "train --arch vit --img-size 30 --patch-size 4": "--img-size 30 is not a multiple of the patch size 4",
    "train --epochs 0": "--epochs",
    "train --init missing/run": "missing/run: no such file or folder",
    "train --resume missing/run": "missing/run: not the folder of a run",
    "predict missing/run image.png": "missing/run: no such file or folder",
    "eval missing/run": "missing/run: no such file or folder",
    "attend missing/run": "missing/run: no such file or folder",
    "probe missing/run": "missing/run: no such file or folder",
    "export missing/run --format onnx": "missing/run: no such file or folder",
    "check missing/folder": "--data missing/folder: no such folder",
    "show --data missing/folder": "--data missing/folder: no such folder",
    "trian": "unknown verb 'trian' (did you mean 'train'?)",
    "train vit": "unknown argument 'vit'; use smallvit train --arch vit",
    "train vit+spt --data digits": "unknown argument 'vit+spt'; use smallvit train --arch vit+spt --data digits",
    "train --data": "--data NAME: the value is missing. Data set (see smallvit list data)",
    "train --spt yes": "--spt takes no value; remove 'yes'",
    "train --learning-rate 3": "--learning-rate: no such option; smallvit calls it --lr",
    "train --cooldown 3": "--cooldown: no such option; see smallvit train --help",
    "compare vit vit+spt --data missing/folder": "--data missing/folder: no such folder",
    "compare vit vti --data digits": "row vti: --arch vti: no such architecture (did you mean 'vit'?)",
    "compare vit missing/run": "vit is a row to train, missing/run an existing run; give one kind only",
    "compare --arch vit,learning-rate=1": "no such option as 'learning_rate'; smallvit calls it lr",
    "profile vti": "row vti: --arch vti: no such architecture (did you mean 'vit'?)",
    "profile missing/run": "profile missing/run: no such file or folder",
    "predict cat.jpg": "cat.jpg: an image, not a run; use smallvit predict RUN cat.jpg",
    "eval": "RUN is missing; use smallvit eval RUN, with the folder of a run",
    "eval --checkpoint missing": "--checkpoint: no such option; smallvit calls it RUN, without a flag",
    "eval vit": "eval vit: no such file, folder or timm model",
    "report": "RUN is missing; use smallvit report RUN",
    "report missing/run": "missing/run: not the folder of a run",
    "export missing/run": "--format {onnx,pt2,timm,hub,packed}: the value is missing",
    "list": "WHAT: the value is missing. archs, recipes,",
    "list archs vti": "no name matches 'vti' (did you mean 'vit'?)",
}
WITH_RUNS = {
    "predict": "RUN is missing; use smallvit predict runs/new IMAGE ...",
    "predict cat.jpg --top 3": "cat.jpg: an image, not a run; use smallvit predict runs/new cat.jpg --top 3",
    "predict cat.jpg runs/old": "cat.jpg: an image, not a run; use smallvit predict runs/old cat.jpg",
    "predict photos": "photos: a folder of images, not a run; use smallvit predict runs/new photos",
    "predict runs/old": "no images: standard input is empty; use smallvit predict runs/old IMAGE ...",
    "attend cat.jpg": "cat.jpg: an image, not a run; use smallvit attend runs/new cat.jpg",
    "eval --split val": "RUN is missing; use smallvit eval runs/new --split val",
    "eval old": "eval old: no such file, folder or timm model (did you mean 'runs/old'?)",
    "report": "RUN is missing; use smallvit report runs/new",
    "probe": "RUN is missing; use smallvit probe runs/new",
    "watch": "RUN is missing; use smallvit watch runs/new",
    "train runs/new": "unknown argument 'runs/new'; use smallvit train --init runs/new",
    "train runs/old": "unknown argument 'runs/old'; use smallvit train --resume runs/old",
    "train photos --epochs 3": "unknown argument 'photos'; use smallvit train --data photos --epochs 3",
}
"""Commands in a folder with runs/old, runs/new, photos/ and cat.jpg."""


def run(commands: list[list[str]], folder: Path) -> list[tuple[int | None, str, str]]:
    """Run commands in one process in which torch cannot be imported."""
    process = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=folder,
        check=True,
    )
    return json.loads(process.stdout)


def assert_answered(messages: dict[str, str], folder: Path) -> None:
    """Check that each command ends in one line with its message, without torch and without new files."""
    before = sorted(folder.rglob("*"))
    results = run([command.split() for command in messages], folder)
    wrong = [
        f"{command}: {code} {err}"
        for (command, expected), (code, _, err) in zip(messages.items(), results, strict=True)
        if code != 2 or expected not in err or err.count("\n") != 1
    ]
    assert not wrong, "\n".join(wrong)
    assert sorted(folder.rglob("*")) == before


def test_bad_input_is_reported_before_torch_is_imported(tmp_path: Path) -> None:
    assert_answered(MISSING, tmp_path)


def test_a_forgotten_run_is_answered_with_the_newest(tmp_path: Path) -> None:
    weights = ("runs/new/best.safetensors", "runs/old/best.safetensors")
    for file in (*weights, "runs/old/config.json", "photos/cat.jpg", "cat.jpg"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    os.utime(tmp_path / weights[1], (0, 0))
    assert_answered(WITH_RUNS, tmp_path)


def test_the_run_folder_is_printed_before_torch_is_imported(tmp_path: Path) -> None:
    ((code, out, _),) = run([["train", "--arch", "vit", "--spt"]], tmp_path)
    assert code is None
    assert out.splitlines() == ["run    runs/vit-spt-digits"]
    assert not list(tmp_path.iterdir())


def test_names_read_from_timms_source_are_those_of_its_registry() -> None:
    theirs = {name for name in timm.list_models() if not name.startswith("smallvit_")}  # other tests register ours
    assert theirs <= timm_names()
