"""Define errors that end in one line, and format names and values in messages."""

from __future__ import annotations

import difflib
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable
from datetime import timedelta

MAX_NAMED = 3
"""Number of files, folders or errors that a message names."""


class InputError(ValueError):
    """Invalid user input. Its one-line message names the argument, the problem and the remedy."""


class TrainingError(RuntimeError):
    """A training failure despite valid input. Its one-line message says where training stopped and what to try."""


class DivergedError(TrainingError):
    """A loss or weights that are no longer finite, in all of torchrun's processes."""


class PeerExitedError(TrainingError):
    """Another of torchrun's processes exited and has reported the cause."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def escape_unprintable(text: str) -> str:
    """Escape characters that do not print on one line."""
    return text if text.isprintable() else repr(text)[1:-1]


def group_errors(errors: Iterable[tuple[str, str]]) -> str:
    """Return the first files of the first errors: "a.png (truncated), b.png, c.png, d.png and 4 more (empty)"."""
    files: dict[str, list[str]] = {}
    for path, reason in errors:
        files.setdefault(reason, []).append(escape_unprintable(path))
    shown = list(files.items())[:MAX_NAMED]
    named = [f"{', '.join(paths[:MAX_NAMED])}{_more(len(paths) - MAX_NAMED)} ({reason})" for reason, paths in shown]
    return ", ".join(named) + _more(sum(map(len, files.values())) - sum(len(paths) for _, paths in shown))


def _more(count: int) -> str:
    return f" and {count:,} more" if count > 0 else ""


def suggest(name: str, names: Iterable[str]) -> str:
    """Return " (did you mean ...?)" with the closest match among `names`, or an empty string."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def escape_undecodable(text: str) -> str:
    """Escape bytes of file names that are not valid UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def collapse_whitespace(name: str) -> str:
    """Replace line breaks and repeated spaces by single spaces."""
    return " ".join(name.split())


def format_duration(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds: 1:02:03."""
    return str(timedelta(seconds=round(seconds)))


def flag(option: str) -> str:
    """Return the command-line flag of an option."""
    return "--" + option.replace("_", "-")


def require(condition: bool, option: str, value: object, expected: str) -> None:
    """Raise an InputError that names an option, its value and what was expected, unless `condition` holds."""
    if not condition:
        raise InputError(f"{flag(option)} {value}: expected {expected}")


WORDS = {"break_long_words": False, "break_on_hyphens": False}
"""Arguments of textwrap that keep names and paths whole."""


def print_message(message: str) -> None:
    """Print one line to standard error; a terminal wraps it at words."""
    if sys.stderr is not None and sys.stderr.isatty():
        message = textwrap.fill(message, shutil.get_terminal_size().columns, **WORDS)
    print(message, file=sys.stderr)


def warn(message: str) -> None:
    """Print a one-line warning to standard error, in the first of torchrun's processes only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print_message(f"smallvit: warning: {message}")


def is_utf8(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8; file names may hold other bytes."""
    return escape_undecodable(text) == text
