"""The command line that does again what a configuration says. Imports no torch."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection

from smallvit.config import Config
from smallvit.options import flag


def training(config: Config, without: Collection[str], *, full: bool = False, in_place: bool = True) -> str:
    """What trains such a model: the options that differ from the defaults; with `full` all, whatever these may be.

    Options named in `without` are left out; unless it is to run `in_place`, so are the folders of this machine.
    """
    usual, words = Config().options(), ["smallvit", "train"]
    for name, value in config.options().items():
        if name in without or value is None or not (full or value != usual[name]):
            continue
        if isinstance(value, bool):
            words.append(flag(name if value else f"no_{name}"))
            continue
        text = str(value) if in_place else portable(value)
        words += [f"{flag(name)}={text}"] if text.startswith("-") else [flag(name), text]
    return shlex.join(words)


def portable(value: object) -> str:
    """A value without the folder that it lay in."""
    return os.path.basename(str(value)) if os.path.isabs(str(value)) else str(value)
