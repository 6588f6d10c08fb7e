"""Count the CPU cores and the memory that this process may use, and set up OpenMP. Needs no torch."""

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

MEMORY_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Files with limit and usage of memory in bytes, and the key in memory.stat of cached files that were not used
recently; of control groups v2 and v1, by controller."""


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


def local_processes() -> int:
    """Return the number of torchrun's processes on this machine, 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _limited(cores: int) -> int:
    """Return at most the quota of the control groups, rounded up."""
    return max(1, math.ceil(min(cores, cpu_quota())))


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def cpu_quota() -> float:
    """Return the smallest CPU quota, in cores, of this process's control group and those around it (v2)."""
    return min(_quotas(), default=math.inf)


def _quotas() -> Iterator[float]:
    for folder in _groups(""):
        with suppress(ValueError):  # no such file, or "max"
            quota, period = _read(f"{folder}/cpu.max").split()
            yield int(quota) / int(period)


def free_group_memory() -> float:
    """Return the free bytes within the memory limits of this process's control groups and those around it (v1, v2).

    Cached files count as free where they were not used recently.
    """
    return min(_free_in_groups(), default=math.inf)


def _free_in_groups() -> Iterator[float]:
    for controller, (limit, usage, cached) in MEMORY_FILES.items():
        for folder in _groups(controller):
            with suppress(ValueError):  # no such file, or "max"
                free = int(_read(f"{folder}/{limit}")) - int(_read(f"{folder}/{usage}"))
                stat = dict(line.split() for line in _read(f"{folder}/memory.stat").splitlines())
                yield max(0, free + int(stat.get(cached, 0)))


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control group and those around it; of v2 for the controller ""."""
    lines = [line.split(":", 2) for line in _read("proc/self/cgroup").splitlines() if line]
    own = next((group for _, controllers, group in lines if controller in controllers.split(",")), "/")
    group = Path("sys/fs/cgroup", controller, own.strip("/"))
    yield from (group, *group.parents)


def _read(file: str) -> str:
    """Return the contents of a file of the kernel; an empty text if there is none."""
    with suppress(OSError):
        return (ROOT / file).read_text(encoding="utf-8", errors="replace")
    return ""
