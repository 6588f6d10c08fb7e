"""What goes wrong, in one line each, and how to say it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What the user gave cannot be used. Its one line says what, where, and what to do."""


class TrainingError(RuntimeError):
    """Training cannot go on, though the input was good. Its one line says where it stopped and what to try."""


class DivergedError(TrainingError):
    """The loss or the weights are of no more use; in all of torchrun's processes alike."""


class OthersEndedError(TrainingError):
    """Another of torchrun's processes has ended, and has said why."""


def first_line(error: BaseException) -> str:
    """An error of another library in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(name: str, names: Iterable[str]) -> str:
    """' (did you mean ...?)' with the name most like `name`, or nothing where none is."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
