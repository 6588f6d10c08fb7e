"""Archives from the web to a folder: resumed, checked, and fetched once however many processes ask.

Beside an archive lie <file>.partial, what has come of it so far, and <file>.verified, the size and time of change
that it had when its checksum was found right. Where it comes from, first of these:

    --data-url URL      URL/<file>; or URL itself, where the data set is one file and URL ends in that file's suffix
                        or holds a query
    SMALLVIT_MIRROR     its value/<data set>/<file>
    the table           the authors' own address

With SMALLVIT_OFFLINE set (to anything but 0) nothing is asked of the network; file: addresses still serve.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import SplitResult, urlsplit

from smallvit.datasets.table import DATASETS, Archive
from smallvit.datasets.transfer import BLOCK, Order, progress, transfer
from smallvit.errors import InputError

LARGE = 2**28
"""Bytes from which checking a file takes long enough for a bar."""


def fetch(
    entry_name: str, archives: Iterable[Archive], folder: Path, mirror: str | None = None, offline: bool | None = None
) -> list[Path]:
    """Make sure that the archives lie in the folder, whole and with the right checksum; returns their paths.

    `mirror` is what --data-url says; `offline` goes before SMALLVIT_OFFLINE.

    Raises:
        InputError: a file that is there has another checksum, or one that is missing cannot be had; what has come
            of it is kept, and the next call goes on from there.
    """
    archives = tuple(archives)
    if offline is None:
        offline = os.environ.get("SMALLVIT_OFFLINE", "") not in ("", "0")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, f"fetches {entry_name}"):
            for archive in archives:
                if (folder / archive.file).exists():
                    _verify(entry_name, folder / archive.file, archive)
            missing = [archive for archive in archives if not (folder / archive.file).exists()]
            for index, archive in enumerate(missing):
                remedy = _remedy(missing[index:], folder)
                url = _address(entry_name, archive, len(archives) == 1, mirror)
                _require_source(entry_name, url, offline, remedy)
                _download(Order(entry_name, archive, url, folder / archive.file, remedy))
    except OSError as error:
        raise InputError(f"--data {entry_name}: {error.filename or folder}: {error.strerror or error}") from None
    return [folder / archive.file for archive in archives]


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Let in one process at a time; the others wait and say what for. A folder nobody may write to needs no lock."""
    path = folder / ".lock"
    handle = _lock(path, what)
    try:
        yield
    finally:
        if handle:
            path.unlink(missing_ok=True)  # while it is held: who waits for it sees that it is gone, and takes a new one
            handle.close()


def _lock(path: Path, what: str) -> IO[bytes] | None:
    while True:
        try:
            handle = open(path, "ab")  # noqa: SIM115
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                return None
            raise
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that {what}", file=sys.stderr, flush=True)
                fcntl.flock(handle, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(handle.fileno()), path.stat()):
                return handle
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # some file systems of clusters
                return handle
            handle.close()
            raise
        except BaseException:
            handle.close()
            raise
        handle.close()


def _verify(name: str, path: Path, archive: Archive) -> None:
    """Compare the file's checksum, unless that was done before and the file has not changed since."""
    if _read_note(path) == _stamp(path, archive):
        return
    found = _md5(path)
    if found != archive.md5:
        raise InputError(
            f"--data {name}: {path} has md5 {found}, expected {archive.md5}: damaged, incomplete or another file; "
            "remove it to have it downloaded again"
        )
    _write_note(path, archive)


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


def _stamp(path: Path, archive: Archive) -> dict[str, object]:
    status = path.stat()
    return {"md5": archive.md5, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _read_note(path: Path) -> object:
    with suppress(OSError, ValueError):
        return json.loads(_note(path).read_text())
    return None


def _write_note(path: Path, archive: Archive) -> None:
    with suppress(OSError):  # read-only: checked again next time
        _note(path).write_text(json.dumps(_stamp(path, archive)))


def _md5(path: Path) -> str:
    digest, size = hashlib.md5(usedforsecurity=False), path.stat().st_size
    with open(path, "rb") as file, progress(f"checking {path.name}", size, shown=size >= LARGE) as show:
        while block := file.read(BLOCK):
            digest.update(block)
            show(file.tell())
    return digest.hexdigest()


def _remedy(missing: list[Archive], folder: Path) -> str:
    files = ", ".join(f"{archive.file} (md5 {archive.md5})" for archive in missing)
    return f"put {files} into {folder}, or name a mirror with --data-url"


def _address(name: str, archive: Archive, alone: bool, mirror: str | None) -> str | None:
    if mirror is not None:
        parts = _parse(mirror, "--data-url")
        own = alone and (parts.query or parts.path.endswith(PurePosixPath(archive.file).suffix))
        return mirror if own else f"{mirror.rstrip('/')}/{archive.file}"
    if base := os.environ.get("SMALLVIT_MIRROR"):
        _parse(base, "SMALLVIT_MIRROR")
        return f"{base.rstrip('/')}/{name}/{archive.file}"
    return archive.url


def _parse(url: str, option: str) -> SplitResult:
    with suppress(ValueError):
        parts = urlsplit(url)
        if url.isprintable() and " " not in url and parts.scheme in ("http", "https", "file"):
            return parts
    raise InputError(f"{option} {url!r}: expected an http, https or file URL, such as file:///mnt/mirror")


def _require_source(name: str, url: str | None, offline: bool, remedy: str) -> None:
    if url is None:
        terms = f" ({DATASETS[name].terms})" if name in DATASETS else ""
        raise InputError(f"--data {name}: its authors ask for a login{terms}: {remedy}")
    if offline and not url.startswith("file:"):
        raise InputError(f"--data {name}: offline, as SMALLVIT_OFFLINE says, and files are missing: {remedy}")


def _download(order: Order) -> None:
    """Bring the file, and give it its name once its checksum is right."""
    transfer(order)
    found = _md5(order.partial)
    if found != order.archive.md5:
        size = order.have
        order.partial.unlink()
        raise order.error(f"sent {size:,} bytes of md5 {found}, expected {order.archive.md5}; what came is removed")
    order.partial.replace(order.path)
    _write_note(order.path, order.archive)
