"""The processes that torchrun starts: who they are, what they tell each other, and how a model is spread over them.

Without torchrun there is one, and everything here does nothing.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from smallvit.errors import InputError, OthersEndedError, first_line

T = TypeVar("T")
MEETING_SECONDS = 1800
"""How long processes wait for the first one."""


@dataclass(frozen=True)
class World:
    """One of the processes, and how it talks to the others. All of them make the same calls in the same order."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and shows."""
        return self.rank == 0

    def agree(self, value: int) -> int:
        """The largest of all processes' values; the device is not waited for."""
        if self.size == 1:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values

    def send(self, value: T) -> T:
        """The main process's value, on all."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def device(self, device: torch.device) -> torch.device:
        """Each process's own GPU, where there are several.

        Raises:
            InputError: one GPU is named for all of them, or there are fewer than processes.
        """
        if device.type == "cuda" and device.index is not None and self.size == 1:
            torch.cuda.set_device(device)  # streams and events are its own from now on
        if device.type != "cuda" or self.size == 1:
            return device
        if device.index is not None:
            raise InputError(f"--device {device}: torchrun's processes take a GPU each; give --device cuda")
        if self.local_rank >= torch.cuda.device_count():
            raise InputError(f"torchrun --nproc-per-node: this machine has {torch.cuda.device_count()} GPUs")
        return torch.device("cuda", self.local_rank)


@contextmanager
def join() -> Iterator[World]:
    """Join torchrun's other processes, if there are any.

    Raises:
        OthersEndedError: one of them has ended.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    ours = not dist.is_initialized()
    if ours:
        _begin()
    try:
        yield World(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))
    except (dist.DistError, RuntimeError) as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = first_line(error).split(". ")[0]  # what follows is advice
        raise OthersEndedError(f"another of torchrun's processes has ended or hangs ({reason})") from None
    if ours:
        dist.destroy_process_group()  # not after an error, when the others may wait in vain


def _begin() -> None:
    """Meet the other processes, those of this start: the addresses of an earlier one are in torchrun's store still."""
    local_rank = int(os.environ["LOCAL_RANK"])
    if local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)  # before anything is put on a GPU
    store, rank, size = next(dist.rendezvous("env://"))
    start = dist.PrefixStore(_agree_on_start(store, rank, size), store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "cpu:gloo"
    dist.init_process_group(backend, store=start, rank=rank, world_size=size)


def _agree_on_start(store: dist.Store, rank: int, size: int) -> str:
    """A name that the processes of this start share, and those of an earlier one did not.

    The first process calls with a name; each of the others answers with a token of its own, and takes the name once it
    finds the token returned under it. torchrun's count of restarts would not do: every machine keeps its own.
    """
    if rank == 0:
        name = uuid.uuid4().hex
        store.set("smallvit/call", name)
        for other in range(1, size):
            token = store.get(f"smallvit/{name}/{other}").decode()
            store.set(f"smallvit/{name}/{token}", "")
        return name
    token, deadline = uuid.uuid4().hex, time.monotonic() + MEETING_SECONDS
    while time.monotonic() < deadline:
        name = store.get("smallvit/call").decode()
        store.set(f"smallvit/{name}/{rank}", token)
        with suppress(dist.DistStoreError):
            store.wait([f"smallvit/{name}/{token}"], timedelta(seconds=1))
            return name
    raise OthersEndedError("torchrun's first process does not answer")


def shard(model: nn.Module, world: World, device: torch.device) -> None:
    """Spread weights over all processes' devices, each block gathered when it is computed (FSDP2).

    Raises:
        InputError: there is but one process.
    """
    if world.size == 1:
        raise InputError("--fsdp: there is one process only; start it with torchrun --nproc-per-node N -m smallvit")
    mesh = init_device_mesh(device.type, (world.size,))
    blocks = [module for module in model.modules() if type(module).__name__.endswith("Block")]
    for block in reversed(blocks):  # those within others first
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are spread over several devices."""
    return isinstance(model, FSDPModule)


def replicate(model: nn.Module, world: World, device: torch.device) -> nn.Module:
    """The model with its gradients averaged over all processes (DDP), if it is not sharded."""
    if world.size == 1 or is_sharded(model):
        return model
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def synchronise_bn(model: nn.Module, world: World, device: torch.device) -> nn.Module:
    """The model with batch norm over the images of all processes.

    Raises:
        InputError: there are no GPUs, or but one process.
    """
    if world.size == 1 or device.type != "cuda":
        raise InputError("--sync-bn: for several GPUs only; start with torchrun --nproc-per-node N -m smallvit")
    return convert_sync_batchnorm(model)


def last_backward(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Average gradients over the processes only after the last of several backward passes."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    return nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()


def whole(value: Tensor) -> Tensor:
    """A tensor that may be spread over the devices, gathered."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, spread over devices and laid out in memory as another of the same shape is."""
    if value.shape != like.shape:
        return value
    if isinstance(like, DTensor):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return torch.empty_like(like, dtype=value.dtype).copy_(value)
