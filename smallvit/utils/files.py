"""Write files atomically, check output paths, lock files, and read the headers of safetensors files."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from smallvit.utils.errors import InputError

HIDDEN, PARTIAL = ".", ".partial"
"""Prefix and suffix of the temporary folders that files are written to."""
LOCK = ".lock"
"""Name of a folder's lock file."""
UNLOCKABLE = (
    *(errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP),  # file systems without locks
    *(errno.EACCES, errno.EPERM, errno.EROFS),  # folders that this user cannot write to
)
"""Errors after which a process continues without a lock."""
SUFFIX = ".safetensors"
PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".npz")
"""Suffixes of weights files that are not read, since loading them may run code."""


# Output paths


def check_output_folder(folder: Path, option: str = "--out", *, overwrite: bool = False) -> None:
    """Check that files can be written to a folder, which need not exist.

    Leftovers of an interrupted writer are ignored.

    Raises:
        InputError: The folder is not empty and not to be replaced, is a file, or is not writable.
    """
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(each))
    remedy = f"choose another folder with {option}"
    if os.path.isfile(existing):
        problem = "a file, not a folder" if existing == folder.absolute() else f"{existing} is a file, not a folder"
        raise InputError(f"{folder}: {problem}; {remedy}")
    if not os.path.isdir(existing) or not os.access(existing, os.W_OK):
        raise InputError(f"{folder}: {existing} cannot be written to; {remedy}")
    if overwrite or existing != folder.absolute():
        return
    if any(not (name.startswith(HIDDEN) and name.endswith(PARTIAL)) for name in os.listdir(folder)):
        raise InputError(f"{folder}: already holds results; {remedy}, or replace them with --overwrite")


def check_output_file(name: str, suffix: str, *, overwrite: bool = False) -> Path:
    """Return the path of a single output file, after checking that it can be written.

    Raises:
        InputError: The suffix differs, the folder is missing or not writable, the path is a folder, or the file exists
            and is not to be replaced.
    """
    path = Path(os.path.expanduser(name))
    folder = path.absolute().parent
    if path.suffix.lower() != suffix:
        raise InputError(f"--out {path}: expected a name that ends in {suffix}")
    if os.path.isdir(path):
        raise InputError(f"--out {path}: is a folder; choose another name")
    if os.path.lexists(path) and not overwrite:
        raise InputError(f"--out {path}: already exists; choose another name, or add --overwrite")
    if not os.path.isdir(folder):
        raise InputError(f"--out {path}: no such folder: {folder}")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"--out {path}: cannot write to {folder} ({error.strerror}); choose another folder") from None
    return path


# Atomic writes


def partial_name(name: str) -> str:
    """Return the name of the temporary folder in which the file `name` is written."""
    return f"{HIDDEN}{name}{PARTIAL}"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file to write to; on success it is synced to disk and replaces `path`.

    After a crash at any moment `path` holds either the old or the new contents. The temporary file lies in its own
    folder, since some writers (safetensors) create temporary files too; the next write removes leftovers.
    """
    folder = path.with_name(partial_name(path.name))
    partial = folder / path.name
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        partial.touch()
        mode = partial.stat().st_mode  # follows the user's umask; some writers narrow it
        yield partial
        partial.chmod(mode)
        with open(partial, "r+b") as written:  # Windows flushes only files opened for writing
            os.fsync(written.fileno())
        os.replace(partial, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if os.name == "nt":  # cannot open folders
        return
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write or replace a text file atomically."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to write to; on success it replaces `path`."""
    folder = path.with_name(partial_name(path.name))
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        yield folder
        shutil.rmtree(path, ignore_errors=True)
        os.rename(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def atomic_update(folder: Path, list_outputs: Callable[[Path], Sequence[Path]]) -> Iterator[Path]:
    """Yield an empty folder to write to; on success its files replace the earlier outputs in `folder`.

    Other files in `folder` stay. After a failure, `folder` is unchanged.

    Args:
        folder: The output folder, created if needed.
        list_outputs: Lists the output files in a folder. The last one is removed first and written last, so if it
            exists, all files are complete.
    """
    created = [parent for parent in (folder, *folder.absolute().parents) if not os.path.exists(parent)]
    partial = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(PARTIAL, HIDDEN, folder))
        yield partial
        for old in reversed(list_outputs(folder)):
            old.unlink(missing_ok=True)
        for new in list_outputs(partial):
            os.replace(new, folder / new.name)
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for parent in created:
            with suppress(OSError):  # not empty
                parent.rmdir()


# Locks


class Lock:
    """An exclusive lock on a file, which is created for it and removed afterwards.

    Read-only folders and file systems without locks count as unlocked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path, thread_local=False)  # another thread may release it

    def acquire(self, timeout: float = -1) -> bool:
        """Wait up to `timeout` seconds (-1: forever). Return False if another process still holds the lock.

        Raises:
            OSError: The lock file cannot be created.
        """
        try:
            self._lock.acquire(timeout, poll_interval=0.1)
        except Timeout:
            return False
        except OSError as error:
            if error.errno not in UNLOCKABLE:
                raise
        return True

    def release(self) -> None:
        """Release the lock if it is held."""
        if self._lock.is_locked:
            with suppress(OSError):  # Windows removes it on release
                self.path.unlink()  # while the lock is held: processes waiting for this file then lock a new one
            self._lock.release()


@contextmanager
def locked(path: Path, activity: str) -> Iterator[None]:
    """Hold the lock on `path`. If another process holds it, print `activity`, such as "downloads mnist", and wait."""
    lock = Lock(path)
    if not lock.acquire(0):
        print(f"waiting for another process that {activity}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


# Weights files


def is_path(name: str) -> bool:
    """Return whether a name is a path rather than the name of a timm model."""
    return os.path.exists(os.path.expanduser(name)) or os.sep in name or name.endswith((SUFFIX, *PICKLED))


def absolute_name(name: str) -> str:
    """Return a path as an absolute path, and any other name unchanged."""
    return os.path.realpath(os.path.expanduser(name)) if is_path(name) else name


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Return the metadata of a safetensors file and the shape of each tensor, without reading tensors.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is damaged, truncated, or in another format.
    """
    try:
        with safe_open(path, "np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, not a dict
            return file.metadata() or {}, shapes
    except SafetensorError as error:
        raise ValueError(str(error)) from None
