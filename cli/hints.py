"""Name the command that was meant where arguments are unknown, missing or misplaced."""

from __future__ import annotations

import os
import re
import shlex
from argparse import Action
from collections.abc import Sequence
from pathlib import Path

from smallvit.config.other_names import suggest_option
from smallvit.datasets.catalog import DATASETS
from smallvit.models.architectures import CIFAR_RESNETS, OURS, timm_names
from smallvit.models.weights_info import EXPORTED
from smallvit.runs.run import Run
from smallvit.utils.errors import InputError

VALUES = {"int": "a whole number", "float": "a number"}
"""What is expected of an argument, by its type."""


def find_newest_run() -> str | None:
    """Return the folder under runs/ with the newest weights; None without one."""
    newest = max(Path("runs").glob(f"*/{Run.BEST}"), key=os.path.getmtime, default=None)
    return None if newest is None else str(newest.parent)


def is_run(name: str) -> bool:
    """Return whether a folder holds a run or an exported model."""
    folder = Path(os.path.expanduser(name))
    return any(os.path.exists(folder / each) for each in (Run.CONFIG, Run.BEST, EXPORTED))


def explain_unknown(prog: str, actions: Sequence[Action], args: Sequence[str], unknown: Sequence[str]) -> str:
    """Return the message for arguments that a verb does not take.

    Args:
        prog: The program and the verb.
        actions: The arguments that the verb takes.
        args: All arguments that were given.
        unknown: Those of them that the verb does not take.
    """
    flags = {flag: action for action in actions for flag in action.option_strings}
    shown = {flag.lstrip("-").replace("-", "_"): flag for flag in flags}
    shown |= {str(each.metavar): str(each.metavar) for each in actions if not each.option_strings and each.nargs != "*"}
    text = next((each for each in unknown if each.startswith("-")), unknown[0])
    if text.startswith("-"):
        text = text.partition("=")[0]
        return f"{text}: no such option{suggest_option(text, shown) or f'; see {prog} --help'}"
    index = args.index(text)
    if (flag := _guess_flag(text)) in flags:
        command = shlex.join([*prog.split(), *args[:index], flag, *args[index:]])
        return f"unknown argument {text!r}; use {command}"
    if index and args[index - 1] in flags and flags[args[index - 1]].nargs == 0:
        return f"{args[index - 1]} takes no value; remove {text!r}"
    return f"unknown argument {text!r}; see {prog} --help"


def _guess_flag(text: str) -> str | None:
    """Return the flag of a value that was given without one."""
    if is_run(text):
        return "--resume" if os.path.exists(Path(os.path.expanduser(text)) / Run.CONFIG) else "--init"
    if text in DATASETS or os.path.exists(os.path.expanduser(text)):
        return "--data"
    arch = re.split(r"[+,.]", text)[0]
    return "--arch" if arch in OURS or arch in CIFAR_RESNETS or arch in timm_names() else None


def explain_error(prog: str, actions: Sequence[Action], args: Sequence[str], message: str) -> str:
    """Return argparse's message about an argument with what was expected, and the command where RUN is missing."""
    message = message.removeprefix("argument ")
    if missing := re.fullmatch(r"the following arguments are required: RUN(, IMAGE)?", message):
        run = find_newest_run()
        command = shlex.join([*prog.split(), run or "RUN", *args]) + " IMAGE ..." * (missing[1] is not None)
        return f"RUN is missing; use {command}" + ("" if run else ", with the folder of a run")
    missing = re.fullmatch(
        r"the following arguments are required: (\S+)|(.+): expected (?:one|at least one) argument", message
    )
    for action in actions if missing else ():
        name = "/".join(action.option_strings) or str(action.metavar)
        if name in missing.groups():
            value = action.metavar or "{" + ",".join(action.choices or ()) + "}"
            about = " ".join((action.help or "").replace("%%", "%").split())
            return f"{name}{f' {value}' * bool(action.option_strings)}: the value is missing. {about}"
    if wrong := re.fullmatch(r"(\S+): invalid (int|float) value: '(.*)'", message):
        return f"{wrong[1]} {wrong[3]}: expected {VALUES[wrong[2]]}"
    return f"{message.replace('ignored explicit argument', 'takes no value; remove')}; see {prog} --help"


def require_run(prog: str, args: Sequence[str], run: str, images: Sequence[str], *, folders: bool = False) -> None:
    """Check that RUN was not forgotten, so that the first image is taken for it.

    Args:
        prog: The program and the verb.
        args: All arguments that were given.
        run: What was given as RUN.
        images: The images after it.
        folders: Whether the verb also takes folders of images.

    Raises:
        InputError: RUN is an image, or a folder of images without further images.
    """
    from smallvit.datasets.listing import is_image

    folder = os.path.isdir(os.path.expanduser(run))
    if is_run(run) or not (folders and not images if folder else is_image(run)):
        return
    named = next(filter(is_run, images), None)
    command = [*prog.split(), named or find_newest_run() or "RUN", *(each for each in args if each != named)]
    raise InputError(f"{run}: {'a folder of images' if folder else 'an image'}, not a run; use {shlex.join(command)}")
