"""Run the verbs in a pseudo-terminal of 80 columns, and check what a person sees there."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.cells import cell_len

pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
Command = Callable[..., tuple[int, str, str]]

RUN = """
import json, sys
from smallvit.cli import main
from smallvit.profiling import benchmark
benchmark.SECONDS = 0.2
for arguments in json.loads(sys.argv[1]):
    print("$", flush=True)
    code = main(arguments)
    print("exit code", code, flush=True)
"""
QUICK = "--epochs 1 --batch-size 32 --train-fraction 0.1 --aug none --keep-resume --amp off"
COMMANDS = {
    f"train --arch vit --spt --lsa {QUICK} --out short": "epoch 1/1 loss",
    "train --resume short --epochs 2": "resume after epoch 1 of 2",
    "eval RUN --robustness --compare short": "calibration error",
    "predict RUN images --top 9": "%",
    "show": "augmented.png",
    "check digits": "likely wrong labels",
    "watch RUN": "validation accuracy (%)",
    "compare RUN": "images seen",
    "report RUN --overwrite": "report.html",
    "profile --batch-sizes 1 2 --seconds 0.2": "MACs",
    "attend RUN --count 2 --overwrite": "temperatures",
    "attend RUN --count 2": "already holds results",
    "probe RUN": "neighbors",
    **{f"list {what}": f"--{what.rstrip('s')}" for what in ("archs", "recipes", "data", "aug")},
    "list plugins": "flag",
    "list experiments": "NAME",
    "list experiments lee2021/digits": "--rows",
    "list archs deit_b*": "deit_base_distilled_patch16_384",
}
"""Commands, each with some text that it shows."""


def show(commands: list[list[str]], folder: Path) -> str:
    """Run commands in a process whose terminal has 80 columns and 24 rows; return what it prints."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    with subprocess.Popen(
        [sys.executable, "-c", RUN, json.dumps(commands)],
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
        cwd=folder,
        env=environment | {"TERM": "xterm"},
    ):
        os.close(theirs)
        output = b""
        try:
            while data := os.read(ours, 65536):
                output += data
        except OSError:  # the terminal is closed
            pass
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode().replace("\r\n", "\n")).replace("\r", "\n")


@pytest.mark.slow
def test_80_columns_show_every_word_and_label_every_time(
    trained_run_copy: Path, smallvit: Command, write_images: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained_run_copy.parent
    write_images(folder / "images", 2)
    commands = [[trained_run_copy.name if word == "RUN" else word for word in each.split()] for each in COMMANDS]
    _, *parts = show(commands, folder).split("$\n")
    assert len(parts) == len(commands)
    monkeypatch.setenv("COLUMNS", "1000")
    for text, command, part in zip(COMMANDS.values(), commands, parts, strict=True):
        assert part.endswith(f"exit code {2 * (text == 'already holds results')}\n"), part
        assert text in " ".join(part.split()), part
        assert not [line for line in part.splitlines() if cell_len(line) > 80 or "…" in line], part
        assert not re.findall(r"[\d-]:[\d-]{2}(?![\d:-]| left)", part), part
        if command[0] == "list" and command[1] != "archs":  # the same words as in a wide terminal
            assert set(re.findall(r"\w\S+", smallvit(*command)[1])) <= set(re.findall(r"\w\S+", part)), part
