"""Archives to folders and files, safely: nothing lands outside, and half an archive is never taken for a whole one.

Everything is unpacked beside its place, under a name that ends in .partial, and renamed when it is complete; what an
interruption left there is replaced. Members are folders and plain files, with the modes that new files have.
"""

from __future__ import annotations

import gzip
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO

from smallvit.datasets.transfer import BLOCK, FULL, progress
from smallvit.errors import InputError, first_line

Members = Iterator[tuple[str, IO[bytes]]]
"""Path within the archive and contents of each file, in order; contents are read before the next is asked for."""


def unpack_tar(archive: Path, into: Path, what: str) -> None:
    """Unpack a tar, compressed or not, into a folder; if all it holds is a folder of that name, this becomes it.

    Files that are in the folder already are replaced one by one, others stay. `what` is shown beside the bar.

    Raises:
        InputError: a member would land elsewhere or is no file or folder, the archive is damaged, the disk is full.
    """
    with unpacked(archive, into) as partial, opened_tar(archive, what) as members:
        for name, content in members:
            write(content, partial / name)


def unpack_gzip(archive: Path, into: Path, what: str) -> None:
    """Unpack a single compressed file.

    Raises:
        InputError: the archive is damaged, or the disk is full.
    """
    size = archive.stat().st_size
    with (
        unpacked(archive, into, folder=False) as partial,
        open(archive, "rb") as raw,
        progress(f"unpacking {what}", size) as show,
        gzip.open(raw) as content,
    ):
        write(content, partial, lambda: show(raw.tell()))


@contextmanager
def unpacked(archive: Path, into: Path, folder: bool = True) -> Iterator[Path]:
    """Give the folder (or the name of the file) to unpack to; at the end it takes its place.

    Raises:
        InputError: in place of what goes wrong with the archive or the disk.
    """
    partial = into.with_name(into.name + ".partial")
    try:
        _remove(partial)
        (partial if folder else partial.parent).mkdir(parents=True, exist_ok=True)
        yield partial
        _settle(partial, into)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"{archive}: damaged ({first_line(error)}); remove it to have it fetched again") from None
    except OSError as error:
        why = "disk full: make room and start again" if error.errno in FULL else error.strerror or first_line(error)
        raise InputError(f"{archive}: cannot be unpacked into {into.parent} ({why})") from None
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _settle(partial: Path, into: Path) -> None:
    """Give what was unpacked its place."""
    if partial.is_dir() and [path.name for path in partial.iterdir()] == [into.name]:
        partial = partial / into.name
    if not into.is_dir():
        partial.replace(into)
        return
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            target = into / path.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)


@contextmanager
def opened_tar(archive: Path, what: str) -> Iterator[Members]:
    """Give the files of a tar, with a bar that follows them."""
    size = archive.stat().st_size
    with (
        open(archive, "rb") as raw,
        progress(f"unpacking {what}", size) as show,
        tarfile.open(fileobj=raw) as tar,
    ):
        yield members_of(tar, archive, lambda: show(raw.tell()))


def members_of(tar: tarfile.TarFile, archive: Path, after_each: Callable[[], None] = lambda: None) -> Members:
    """The files of an open tar.

    Raises:
        InputError: a member would land elsewhere, or is no file or folder.
    """
    for member in tar:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise InputError(f"{archive}: member {member.name!r} would land outside its folder: not unpacked")
        if not (member.isfile() or member.isdir()):
            kind = "link" if member.issym() or member.islnk() else "device"
            raise InputError(f"{archive}: member {member.name!r} is a {kind}: not unpacked")
        if member.isfile():
            yield member.name, tar.extractfile(member)
            after_each()


def write(content: IO[bytes], path: Path, after_each: Callable[[], None] = lambda: None) -> None:
    """Write a file, and the folders above it, in blocks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        while block := content.read(BLOCK):
            file.write(block)
            after_each()
