"""Bad input is reported, and the first line of a training printed, before torch is imported."""

from __future__ import annotations

import json
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
    "show --data missing/folder": "--data missing/folder: no such folder",
}


def run(commands: list[list[str]], folder: Path) -> list[tuple[int | None, str, str]]:
    """Run commands in one process in which torch cannot be imported."""
    process = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)], capture_output=True, text=True, cwd=folder, check=True
    )
    return json.loads(process.stdout)


def test_bad_input_is_reported_before_torch_is_imported(tmp_path: Path) -> None:
    results = run([command.split() for command in MISSING], tmp_path)
    wrong = [
        f"{command}: {code} {err}"
        for (command, expected), (code, _, err) in zip(MISSING.items(), results, strict=True)
        if code != 2 or expected not in err or err.count("\n") != 1
    ]
    assert not wrong, "\n".join(wrong)
    assert not list(tmp_path.iterdir())


def test_the_run_folder_is_printed_before_torch_is_imported(tmp_path: Path) -> None:
    ((code, out, _),) = run([["train", "--arch", "vit", "--spt"]], tmp_path)
    assert code is None
    assert out.splitlines() == ["run    runs/vit-spt-digits"]
    assert not list(tmp_path.iterdir())


def test_names_read_from_timms_source_are_those_of_its_registry() -> None:
    theirs = {name for name in timm.list_models() if not name.startswith("smallvit_")}  # other tests register ours
    assert theirs <= timm_names()
