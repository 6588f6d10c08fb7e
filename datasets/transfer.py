"""One file over the network: bytes that came are kept, and an interrupted transfer goes on where it broke off."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from smallvit.datasets.table import Archive
from smallvit.errors import InputError, first_line

STALL_SECONDS = 30.0
"""Silence of a server that counts as an interruption."""
RETRIES = 5
"""Attempts in a row that may break off without headway."""
HEADWAY = 2**20
"""Bytes after which an attempt that broke off is not counted."""
BACK_OFF_SECONDS = 1.0
"""Pause before the second attempt; it doubles with each."""
BLOCK = 2**18
FULL = {errno.ENOSPC, errno.EDQUOT}

Show = Callable[..., None]
"""Takes the bytes done and, once known, their total."""


@dataclass(frozen=True)
class Order:
    """One archive to bring: from where, to where, and what a person can do instead."""

    name: str
    archive: Archive
    url: str
    path: Path
    remedy: str

    @property
    def partial(self) -> Path:
        return self.path.with_name(self.path.name + ".partial")

    @property
    def have(self) -> int:
        """Bytes that have come so far."""
        return self.partial.stat().st_size if self.partial.exists() else 0

    def error(self, why: str) -> InputError:
        return InputError(f"--data {self.name}: {self.url}: {why}; {self.remedy}")


class Interrupted(Exception):
    """A transfer broke off; another attempt may bring the rest."""


def transfer(order: Order) -> None:
    """Bring the whole file to `order.partial`, in as many attempts as it takes.

    Raises:
        InputError: it cannot be had, or the disk is full; what came is kept.
    """
    with progress(order.archive.file, order.archive.size, order.have) as show:
        failures, reached = 0, False
        while True:
            before = order.have
            try:
                response = _open(order, before, reached)
                reached = True
                if response is not None:
                    _receive(order, response, show)
                break
            except Interrupted as error:
                reached = True
                failures = 1 if order.have - before >= HEADWAY else failures + 1
                if failures >= RETRIES:
                    kept = f"; {in_bytes(order.have)} are kept: start again to go on from there" if order.have else ""
                    raise order.error(f"broke off {failures} times in a row ({error}){kept}") from None
            time.sleep(BACK_OFF_SECONDS * 2 ** (failures - 1))


def _open(order: Order, have: int, reached: bool) -> HTTPResponse | None:
    """Ask for what is missing; a response of status 206 goes on at `have`, any other starts over; None: all is here."""
    headers = {"User-Agent": "smallvit"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urlopen(Request(order.url, headers=headers), timeout=STALL_SECONDS)
    except HTTPError as error:
        error.close()
        if error.code == 416 and have:
            return None if error.headers.get("Content-Range") == f"bytes */{have}" else _open(order, 0, reached)
        temporary = error.code in (408, 429) or error.code >= 500
        raise Interrupted(first_line(error)) if temporary else order.error(first_line(error)) from None
    except URLError as error:
        why = getattr(error.reason, "strerror", None) or error.reason
        if reached:
            raise Interrupted(str(why)) from None
        raise order.error(f"cannot be reached ({why})") from None
    except (ValueError, InvalidURL) as error:
        raise order.error(f"no usable address ({first_line(error)})") from None
    except (OSError, HTTPException) as error:
        raise Interrupted(_why(error)) from None
    resumed = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    if response.status == 206 and not resumed:
        response.close()
        if not have:
            raise order.error("sends another part of the file than was asked for")
        return _open(order, 0, reached)
    return response


def _receive(order: Order, response: HTTPResponse, show: Show) -> None:
    """Write what the server sends to the partial file."""
    with response:
        done = order.have if response.status == 206 else 0
        length = response.headers.get("Content-Length") or ""
        total = done + int(length) if length.isdecimal() else None
        _require_space(order, (total or order.archive.size or 0) - order.have)
        with open(order.partial, "ab" if done else "wb", buffering=0) as file:
            show(done, total)
            while block := _read(response):
                done += _write(order, file, block, total)
                show(done)
            os.fsync(file.fileno())
    if total is not None and done < total:
        raise Interrupted(f"closed after {in_bytes(done)} of {in_bytes(total)}")


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read1(BLOCK)  # not read: what came before a stall would be lost
    except (OSError, HTTPException) as error:
        raise Interrupted(_why(error)) from None


def _why(error: BaseException) -> str:
    return f"silent for {STALL_SECONDS:g} s" if isinstance(error, TimeoutError) else first_line(error)


def _write(order: Order, file: IO[bytes], block: bytes, total: int | None) -> int:
    rest = memoryview(block)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        if error.errno not in FULL:
            raise
        lacking = f"{in_bytes(total - order.have)} more are needed" if total else "more room is needed"
        raise InputError(
            f"--data {order.name}: disk full at {in_bytes(order.have)} of {order.archive.file} in "
            f"{order.path.parent}: {lacking}; make room and start again, the download goes on from there"
        ) from None
    return len(block)


def _require_space(order: Order, needed: int) -> None:
    free = shutil.disk_usage(order.path.parent).free
    if needed > free:
        raise InputError(
            f"--data {order.name}: {order.archive.file} needs {in_bytes(needed)} more, {in_bytes(free)} are free in "
            f"{order.path.parent}: make room and start again"
        )


@contextmanager
def progress(what: str, total: int | None, done: int = 0, shown: bool = True) -> Iterator[Show]:
    """A bar of bytes on standard error, gone when it is done: what goes wrong then stands in a line alone."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda done, total=None: bar.update(task, completed=done, total=total)


def in_bytes(count: int) -> str:
    """A number of bytes for people: '1.3 GB'."""
    from rich.filesize import decimal

    return decimal(max(0, count))
