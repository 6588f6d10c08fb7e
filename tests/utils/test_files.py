"""Locks between processes: exclusive, released however a process ends, and without traces."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from smallvit.utils.files import Lock

HOLD = """\
import sys, time
from pathlib import Path
from smallvit.utils.files import Lock
lock = Lock(Path(sys.argv[1]))
assert lock.acquire(0)
print("held", flush=True)
time.sleep(600)
"""


def test_a_lock_ends_with_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    lock = Lock(path)
    assert not lock.acquire(0)
    process.kill()  # -9
    process.communicate()
    assert lock.acquire(0)
    assert not Lock(path).acquire(0)
    lock.release()
    assert not path.exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_folders_without_locks_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    lock = Lock(tmp_path / ".lock")
    if code == errno.ENOSPC:
        with pytest.raises(OSError, match="No space"):
            lock.acquire(0)
    else:
        assert lock.acquire(0)
        lock.release()
