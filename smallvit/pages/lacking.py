"""What a run's page lacks is computed: its test, and where it looks."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from smallvit import hardware, learnt
from smallvit.attention import attending
from smallvit.config import Config
from smallvit.errors import InputError
from smallvit.judgement import judging
from smallvit.pages import dossier, findings
from smallvit.pages.dossier import Dossier
from smallvit.pages.findings import ATTENTION, METRICS

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
    if METRICS in run.lacking:
        flip = run.view.config.augment.test_flip
        told = {"out": str((run.folder / METRICS).parent), "command": shlex.join(findings.again(run.view, METRICS))}
        with _noting(reasons, METRICS):
            judging.judge(folder, config, flip=flip, **told, **common)
    if ATTENTION in run.lacking:
        command = shlex.join([*findings.again(run.view, ATTENTION), "--count", str(IMAGES)])
        told = {"out": (run.folder / ATTENTION).parent, "command": command}
        with _noting(reasons, ATTENTION):
            attending.attend([folder], [], config, count=IMAGES, **told, **common)
    return dossier.read(run.folder, reasons)


@contextmanager
def _noting(reasons: dict[str, str], name: str) -> Iterator[None]:
    """Note why something could not be computed, or written."""
    try:
        yield
    except (InputError, OSError) as error:
        reasons[name] = f"{name}: {error}"
