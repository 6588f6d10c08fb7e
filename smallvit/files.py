"""Writing files whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smallvit.errors import InputError

HIDDEN, PARTIAL = ".", ".partial"
"""How the names of folders begin and end in which files are written."""


def partial_name(name: str) -> str:
    """Of the folder in which the file `name` is written."""
    return f"{HIDDEN}{name}{PARTIAL}"


def require_free(folder: Path, option: str, *, overwrite: bool) -> None:
    """Check that files may be written to a folder, which need not be there; `option` is the flag that names it.

    What an interrupted writer left does not count.

    Raises:
        InputError: it holds files that are not to be replaced, is a file itself, or is closed to this user.
    """
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(each))
    another = f"choose another folder by {option}"
    if os.path.isfile(there):
        what = "a file, not a folder" if there == folder.absolute() else f"{there} is a file, not a folder"
        raise InputError(f"{folder}: {what}; {another}")
    if not os.path.isdir(there) or not os.access(there, os.W_OK):
        raise InputError(f"{folder}: {there} cannot be written to; {another}")
    if overwrite or there != folder.absolute():
        return
    if any(not (name.startswith(HIDDEN) and name.endswith(PARTIAL)) for name in os.listdir(folder)):
        raise InputError(f"{folder}: holds results already; {another}, or replace by --overwrite")


def unshared_folder(around: Path) -> Path:
    """A new folder in a folder, to write to: no other program's, and no results yet."""
    return Path(tempfile.mkdtemp(PARTIAL, HIDDEN, around))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file to write to; at the end it reaches the disk and takes the place of `path`.

    After a crash at any moment `path` holds either the old contents or the new. The temporary file lies in a folder of
    its own beside it, since some writers (safetensors) have temporary files too; the next write empties it.
    """
    around = path.with_name(partial_name(path.name))
    partial = around / path.name
    try:
        shutil.rmtree(around, ignore_errors=True)
        around.mkdir()
        partial.touch()
        mode = partial.stat().st_mode  # as the user's umask has it; some writers narrow it
        yield partial
        partial.chmod(mode)
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    finally:
        shutil.rmtree(around, ignore_errors=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to write to; at the end it takes the place of `path`."""
    around = path.with_name(partial_name(path.name))
    partial, former = around / path.name, around / "former"
    shutil.rmtree(around, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if os.path.exists(path):
            os.rename(path, former)
        os.rename(partial, path)
    finally:
        if os.path.exists(former) and not os.path.exists(path):
            os.rename(former, path)
        shutil.rmtree(around, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
