"""What models need in memory: activations kept for the backward pass, and the most that a training step has in use.

Axes: b batch, c channels, h w pixels.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile

from smallvit.hardware import autocast
from smallvit.optim import create_optimizer
from smallvit.options import OptimConfig

BATCHES = (2, 3)
"""Of these the difference tells what an image adds; one image alone is too few for some batch norms."""
STEPS = 2
"""Training steps until what is in use is what it will always be: the first one makes the optimiser's state."""
COUNTABLE = ("cpu", "cuda")
"""Devices that tell what is in use."""
SPARED = 0.1
"""Share of the memory that is free which is left alone."""
SHORTAGES = ("can't allocate memory", "out of memory", "bad_alloc")
"""Of which an error of torch's speaks that is none of its class for them."""

T = TypeVar("T")


def activation_bytes(model: nn.Module, in_chans: int, img_size: int, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes that each further image of a batch adds to what training keeps for the backward pass."""
    fewer, more = (
        kept_bytes(model, torch.zeros(count, in_chans, img_size, img_size, device=device), dtype) for count in BATCHES
    )
    return (more - fewer) // (BATCHES[1] - BATCHES[0])


def kept_bytes(model: nn.Module, images: Float[Tensor, "b c h w"], dtype: torch.dtype) -> int:
    """Bytes that a forward pass in training keeps for the backward pass, parameters and buffers aside.

    Tensors that share their memory count once. They are let go of again, so that the pass needs no more memory than
    one of inference.
    """
    own = _storages(chain(model.parameters(), model.buffers()))
    kept: dict[StorageWeakRef, int] = {}

    def keep(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        kept[StorageWeakRef(storage)] = storage.nbytes()  # while the reference lives, no other storage is equal to it

    training = model.training
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, _let_go), autocast(images.device, dtype):
        model(images)
    model.train(training)
    return sum(size for storage, size in kept.items() if storage not in own)


def step_peak_bytes(model: nn.Module, images: Float[Tensor, "b c h w"], dtype: torch.dtype) -> int:
    """Most bytes that tensors take at once while AdamW fits the model to a batch; on one of the devices `COUNTABLE`.

    Weights, gradients, the optimiser's state and the batch are among them. On a GPU it is what its allocator says; on a
    CPU the largest sum of the allocations that torch's profiler records, which sees all but the scratch memory of
    libraries (oneDNN) and of the interpreter. The model is trained by it.
    """
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    resident = sum(_storages(chain(model.parameters(), model.buffers(), [images, labels])).values())
    training, optimizer = model.training, create_optimizer(model, OptimConfig())
    model.train()

    def steps() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            with autocast(images.device, dtype):
                logits = model(images)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()

    peak = (_peak_on_gpu if images.device.type == "cuda" else _peak_on_cpu)(steps, images.device)
    model.train(training).zero_grad()
    return resident + peak


def unless_short(device: torch.device, task: Callable[[], T]) -> T | None:
    """What a task gives; None where it needs more memory than there is."""
    try:
        with bounded(device):
            return task()
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and not any(words in str(error) for words in SHORTAGES):
            raise
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


@contextmanager
def bounded(device: torch.device) -> Iterator[None]:
    """Let allocations fail that need more memory than is free; Linux would grant them, and end the process later.

    A GPU's fail anyway.
    """
    if device.type != "cpu" or sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    free = int((1 - SPARED) * psutil.virtual_memory().available)
    bound = psutil.Process().memory_info().data + free
    known = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(bound, *known) if known else bound, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _let_go(_: None) -> Tensor:
    raise RuntimeError("activations were counted, not kept: there is nothing to go back by")


def _storages(tensors: Iterable[Tensor]) -> dict[StorageWeakRef, int]:
    """The memory that tensors lie in, each once, and its bytes."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {StorageWeakRef(storage): storage.nbytes() for storage in storages}


def _peak_on_gpu(steps: Callable[[], None], device: torch.device) -> int:
    """Most bytes allocated beyond those at the beginning."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    steps()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(steps: Callable[[], None], _: torch.device) -> int:
    """The same, from a recording of every allocation."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else it writes over the progress bar
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        steps()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return _largest_sum([event for event in events if event.get("name") == "[memory]"])


def _largest_sum(events: list[dict[str, Any]]) -> int:
    """Most bytes in use at once, of allocations and releases; those of older memory do not count."""
    sizes: dict[int, int] = {}
    now = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        change, address = event["args"]["Bytes"], event["args"]["Addr"]
        if change > 0:
            sizes[address] = change
            now += change
        else:
            now -= sizes.pop(address, 0)
        most = max(most, now)
    return most
