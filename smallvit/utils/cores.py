"""Count the CPU cores that this process may use, and set up OpenMP for them. Needs no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path

ROOT = Path("/")
"""Folder that holds proc and sys."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables by which a user chooses the number of threads."""
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables by which a user chooses how idle threads wait."""


def set_openmp_defaults(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set OpenMP's threads and waiting for this process, except what the environment sets already.

    Takes effect only before torch is loaded. Idle threads sleep instead of spinning: threads that spin take the cores
    from other processes, and two trainings on one machine slow each other down several times.
    """
    if hasattr(os, "sched_getaffinity") and not any(name in environment for name in THREAD_VARIABLES):
        # physical cores only: a second hardware thread adds little to matrix products
        cores = {_read(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or cpu for cpu in _affinity()}
        environment["OMP_NUM_THREADS"] = str(_limited(len(cores)))
    if not any(name in environment for name in WAIT_VARIABLES):
        environment["OMP_WAIT_POLICY"] = "passive"


def usable_cores() -> int:
    """Return the number of logical CPU cores that this process may use, by affinity and control groups."""
    return _limited(len(_affinity()))


def _limited(cores: int) -> int:
    """Return at most the quota of the control groups, rounded up."""
    return max(1, math.ceil(min(cores, cpu_quota())))


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def cpu_quota() -> float:
    """Return the smallest CPU quota, in cores, of this process's control group and those around it (v2)."""
    return min(_quotas(), default=math.inf)


def _quotas() -> Iterator[float]:
    own = next((line[3:] for line in _read("proc/self/cgroup").splitlines() if line.startswith("0::")), "/")
    group = Path("sys/fs/cgroup", own.strip("/"))
    for folder in (group, *group.parents):
        with suppress(ValueError):  # no such file, or "max"
            quota, period = _read(f"{folder}/cpu.max").split()
            yield int(quota) / int(period)


def _read(file: str) -> str:
    """Return the contents of a file of the kernel; an empty text if there is none."""
    with suppress(OSError):
        return (ROOT / file).read_text(encoding="utf-8", errors="replace")
    return ""
