"""Files of records: one JSON object a line, which is only ever appended. Needs no torch."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from io import FileIO
from pathlib import Path
from tempfile import TemporaryFile

from smallvit.errors import InputError
from smallvit.reproduction.experiments import EXPERIMENTS
from smallvit.reproduction.records import Record, parsed


def require_writable(file: Path) -> None:
    """Check that records can be added to a file, before anything is trained for them; makes its folder.

    Raises:
        InputError: they cannot.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror}); choose another folder") from None


def append(file: Path, record: Record) -> bool:
    """Add a record to the file, which is made if need be; returns whether it is new there.

    A last line that was written in part is cut off. Processes take turns, where the file system has locks.

    Raises:
        InputError: the file is damaged, or cannot be written; then it is as it was.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "ab+", buffering=0) as stream:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(stream, fcntl.LOCK_EX)
            stream.seek(0)
            held = stream.read()
            lines = _lines(held)
            if any(_is_same(other, record) for other in _parsed(lines, file)):
                return False
            length = len(b"\n".join(lines))
            ended = held[length : length + 1] == b"\n"
            _write(stream, length + ended, "\n" * (length > 0 and not ended) + json.dumps(vars(record)) + "\n")
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror})") from None
    return True


def _is_same(one: Record, other: Record) -> bool:
    """Whether two records are of the same run."""
    return one.identity == other.identity and one.options == other.options


def _write(stream: FileIO, end: int, text: str) -> None:
    """Put a text at the end of a file, which is cut there first and again if the text cannot be written whole."""
    stream.truncate(end)
    rest = memoryview(text.encode())
    try:
        while rest:
            rest = rest[stream.write(rest) :]
        os.fsync(stream.fileno())
    except OSError:
        with suppress(OSError):
            stream.truncate(end)
        raise


def read(file: Path) -> list[Record]:
    """The records in a file; none where it is not there. A last line that was written in part is passed over.

    Raises:
        InputError: a line is none.
    """
    try:
        return _parsed(_lines(file.read_bytes()), file)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None


def _lines(held: bytes) -> list[bytes]:
    """The lines of a file, without a last one that breaks off."""
    *whole, last = held.split(b"\n")
    with suppress(ValueError):
        json.loads(last)
        whole.append(last)
    return whole


def _parsed(lines: list[bytes], file: Path) -> list[Record]:
    return [_read(line, file, number) for number, line in enumerate(lines, 1)]


def _read(line: bytes, file: Path, number: int) -> Record:
    found = parsed(line)
    if found is None:
        raise InputError(f"{file}, line {number}: no record of a run; remove the line")
    return found


def gathered(folder: Path) -> list[Record]:
    """The records of a collection: of the files that have experiments' names.

    Raises:
        InputError: one of them is damaged.
    """
    return [record for name in sorted(EXPERIMENTS) for record in read(folder / f"{name}.jsonl")]
