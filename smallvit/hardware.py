"""The machine: which device to train on, in which precision, and what to record about it."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

import smallvit
from smallvit.errors import InputError, TrainingError


def pick_device(name: str) -> torch.device:
    """The device that --device names.

    Raises:
        InputError: no such device on this machine.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception:  # each backend has its own
        have = ["cpu", *[f"cuda:{i}" for i in range(torch.cuda.device_count())]]
        raise InputError(f"--device {name}: this machine has {', '.join(have)}") from None
    return device


def pick_dtype(device: torch.device, amp: str) -> torch.dtype:
    """bfloat16 if asked for, or if left to choose and the device computes in it natively; else float32."""
    if amp != "auto":
        return torch.bfloat16 if amp == "bf16" else torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        native = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Mixed precision for the forward pass; nothing to do in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@contextmanager
def explained_memory(batch_size: int, img_size: int) -> Iterator[None]:
    """Say what to try where a step needs more memory than there is.

    Raises:
        TrainingError: it does.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise TrainingError(
            f"out of memory in steps of {batch_size} images of {img_size} pixels: try --accumulate 2 (or 4, 8: the "
            "same result), --grad-checkpointing, a smaller --batch-size, or --amp bf16"
        ) from None


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: the device's allocations on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Glimpse:
    """A number of the device's, read half a second late instead of waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.event = torch.Event(device) if device.type == "cuda" else None
        self.number = torch.zeros((), pin_memory=self.event is not None)
        self.pending = False

    def exchange(self, value: Tensor) -> float | None:
        """Leave a value to be read the next time; returns the one left before, if it has arrived."""
        if self.pending and self.event is not None and not self.event.query():
            return None
        before = self.number.item() if self.pending else None
        self.number.copy_(value, non_blocking=True)
        if self.event is not None:
            self.event.record()
        self.pending = True
        return before


def describe_hardware(device: torch.device) -> str:
    """The processor, or the GPU, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    return {
        "smallvit": smallvit.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def git_revision() -> str | None:
    """The commit of the checkout this package runs from, with '-dirty' if changed; None if it is none."""
    package = Path(__file__).resolve().parent

    def git(*arguments: str) -> Any:
        return subprocess.run(
            ["git", "-C", str(package), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # installed copies are not of the repository
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
