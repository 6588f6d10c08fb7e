"""What a run's page lacks is computed: its test, and where it looks."""

from __future__ import annotations

import shlex

from rich.console import Console

from smallvit import hardware, learnt
from smallvit.attention import attending
from smallvit.config import Config
from smallvit.errors import InputError
from smallvit.judgement import judging
from smallvit.pages import dossier
from smallvit.pages.dossier import ATTENTION, METRICS, Dossier

IMAGES = 4
"""Of the test, whose attention is drawn."""


def completed(run: Dossier, device: str, console: Console) -> Dossier:
    """The run, with the results that its folder lacked of its present weights; its notes say why not, where they fail.

    The test of an unfinished run stays unused.

    Raises:
        InputError: one of the run's own files is damaged, or there is no such device.
    """
    hardware.pick_device(device)
    folder, reasons = str(run.folder), {}
    config = Config.build(**(learnt.learnt_data(folder) or {}), device=device)
    common = {"overwrite": True, "console": console}
    if run.metrics is None and run.summary:
        told = {"out": str((run.folder / METRICS).parent), "command": shlex.join(["smallvit", "eval", folder])}
        try:
            judging.judge(folder, config, **told, **common)
        except InputError as error:
            reasons[METRICS] = str(error)
    if run.attention is None and dossier.attends(run.folder):
        command = shlex.join(["smallvit", "attend", folder, "--count", str(IMAGES)])
        told = {"out": (run.folder / ATTENTION).parent, "command": command}
        try:
            attending.attend([folder], [], config, count=IMAGES, **told, **common)
        except InputError as error:
            reasons[ATTENTION] = str(error)
    return dossier.read(run.folder, reasons)
