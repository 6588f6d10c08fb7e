"""Writing files whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def partial_name(name: str) -> str:
    """Of the folder in which the file `name` is written."""
    return f".{name}.partial"


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


def write_text(path: Path, text: str) -> None:
    """Replace a text file."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
