"""Whether decoded images fit into the machine's free memory."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import psutil

from smallvit.errors import InputError

COPIES = 2.5
"""Peak memory of reading and splitting, in multiples of the images (2.3 measured)."""


def fits_memory(count: int, channels: int, size: int, share: float = 1.0) -> bool:
    """Whether so many square images of a size in pixels fit into this share of the free memory."""
    return COPIES * count * channels * size * size <= share * free_memory()


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, or of its container."""
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # no container, or one without a limit
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, max(0, limit - used))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # each of torchrun's processes holds all images


def require_memory(count: int, channels: int, size: int) -> None:
    """Check that so many images fit into memory while they are read and split.

    Raises:
        InputError: they do not.
    """
    if not fits_memory(count, channels, size):
        needed, available = COPIES * count * channels * size * size, free_memory()
        raise InputError(
            f"{count:,} images of {size} px need {needed / 2**30:.1f} GiB of memory, "
            f"{available / 2**30:.1f} GiB are free: choose a smaller --img-size"
        )
