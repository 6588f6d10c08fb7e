"""Communicate between the processes of torchrun, and replicate or shard a model over them.

Without torchrun there is one process, and these functions do nothing.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from smallvit.utils.errors import InputError, PeerExitedError, TrainingError, first_line

T = TypeVar("T")
MEETING_SECONDS = 1800
"""Maximum wait for the first process at the start, and for any process later."""
PREPARATION = timedelta(days=2)
"""Maximum wait for another process to prepare: to download, unpack, list and decode images, and to load a teacher."""
SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")  # since and before PyTorch 2.14
    if name in signature(DistributedDataParallel).parameters
)
"""DDP's argument for broadcasting buffers before each forward pass."""
REPORT_SECONDS = 5.0
"""Time in which the processes that have lost another one report to each other."""


@dataclass(frozen=True)
class World:
    """One of torchrun's processes. All of them must make the same calls in the same order."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this process writes files and output."""
        return self.rank == 0

    def agree(self, value: int) -> int:
        """Return the largest of all processes' values, without waiting for the device."""
        return self.agree_all(value)[0]

    def agree_all(self, *values: int) -> tuple[int, ...]:
        """Return the largest of all processes' values, for each of several numbers."""
        if self.size == 1:
            return values
        largest = torch.tensor(values)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return tuple(largest.tolist())

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over all processes."""
        if self.size == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values

    def differentiable_total(self, values: Tensor) -> Tensor:
        """Return the sum over all processes; in the backward pass, the sum of their gradients."""
        return values if self.size == 1 else _Sum.apply(values)

    def gather(self, value: T) -> list[T]:
        """Return all processes' values."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def send(self, value: T, group: dist.ProcessGroup | None = None) -> T:
        """Return the main process's value in all processes.

        Args:
            group: All processes, with another time limit, see `create_patient_group`.
        """
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=torch.device("cpu"), group=group)
        return values[0]

    def create_patient_group(self) -> dist.ProcessGroup | None:
        """Return a group of all processes that wait for each other while one of them prepares; None without others.

        They notice at once if another process exits.
        """
        return dist.new_group(timeout=PREPARATION) if self.size > 1 else None

    def wait(self, group: dist.ProcessGroup | None) -> None:
        """Wait until all processes have come here."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(1), group=group)

    def device(self, device: torch.device) -> torch.device:
        """Return this process's own GPU.

        Raises:
            InputError: One GPU is named for all processes, or there are fewer GPUs than processes.
        """
        if device.type == "cuda" and device.index is not None and self.size == 1:
            torch.cuda.set_device(device)  # streams and events belong to it from now on
        if device.type != "cuda" or self.size == 1:
            return device
        if device.index is not None:
            raise InputError(f"--device {device}: torchrun's processes take a GPU each; give --device cuda")
        if self.local_rank >= torch.cuda.device_count():
            raise InputError(f"torchrun --nproc-per-node: this machine has {torch.cuda.device_count()} GPUs")
        return torch.device("cuda", self.local_rank)


@contextmanager
def init_distributed() -> Iterator[World]:
    """Initialize torch.distributed under torchrun.

    Raises:
        InputError: Other machines cannot reach this one.
        TrainingError: Another process has exited or hangs; `PeerExitedError` in all processes but one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    store = None if dist.is_initialized() else _init_process_group()
    world = World(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))
    try:
        yield world
    except (dist.DistError, RuntimeError) as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = first_line(error).split(". ")[0]  # the rest is advice
        missing = {} if store is None else find_missing(store, world)
        named = " and ".join(f"process {rank} of {world.size} on {host}" for rank, host in missing.items())
        reports = world.rank == min({*range(world.size)} - missing.keys())
        kind = TrainingError if missing and reports else PeerExitedError
        raise kind(f"{named or 'another process'} of torchrun has exited or hangs ({reason})") from None
    if store is not None:
        dist.destroy_process_group()  # not after an error: the others may be waiting


def _init_process_group() -> dist.Store:
    """Initialize the process group of this start, and return its store; torchrun's still holds earlier addresses."""
    local_rank = int(os.environ["LOCAL_RANK"])
    device = None
    if local_rank < torch.cuda.device_count():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)  # before anything is put on a GPU
    store, rank, size = next(dist.rendezvous("env://"))
    start = dist.PrefixStore(_agree_on_start(store, rank, size), store)
    require_reachable(start, World(rank, size, local_rank))
    backend = "cpu:gloo,cuda:nccl" if device is not None else "cpu:gloo"
    dist.init_process_group(
        backend,
        store=start,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=MEETING_SECONDS),
        device_id=device,  # NCCL connects to it now, and not to the first GPU
    )
    return start


def require_reachable(store: dist.Store, world: World) -> None:
    """Check that the other machines, if there are any, can reach this one through gloo.

    gloo listens on the address of the machine's name, which many systems resolve to 127.0.1.1.

    Raises:
        InputError: This machine's name has a local address; `PeerExitedError` in all its processes but one.
    """
    name = socket.gethostname()
    store.set(f"host/{world.rank}", name)
    ends = {store.get(f"host/{rank}").decode() for rank in (0, world.size - 1)}
    if len(ends) == 1 or os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    with suppress(OSError):
        if (address := socket.gethostbyname(name)).startswith("127."):
            raise (PeerExitedError if world.local_rank else InputError)(
                f"the name {name} of this machine has the address {address}, where other machines do not reach it: set "
                "GLOO_SOCKET_IFNAME to the network interface, e.g. GLOO_SOCKET_IFNAME=eth0 (see ip addr)"
            )


def find_missing(store: dist.Store, world: World) -> dict[int, str]:
    """Return the processes that do not report in time that they have lost another one, with their machines."""
    missing: dict[int, str] = {}
    deadline = time.monotonic() + REPORT_SECONDS
    with suppress(dist.DistError):  # the store may be gone, too
        store.set(f"lost/{world.rank}", "")
        for rank in range(world.size):
            left = max(0.1, deadline - time.monotonic())
            try:
                store.wait([f"lost/{rank}"], timedelta(seconds=left))
            except dist.DistStoreError:
                missing[rank] = store.get(f"host/{rank}").decode()
    return missing


def _agree_on_start(store: dist.Store, rank: int, size: int) -> str:
    """Return a name that the processes of this start share, unlike those of earlier ones.

    The first process publishes a name; each other process replies with a token, and takes the name once it finds the
    token returned under it. torchrun's count of restarts does not serve: each machine has its own.
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
    raise PeerExitedError("torchrun's first process does not respond")


def shard(model: nn.Module, world: World, device: torch.device, dtype: torch.dtype) -> None:
    """Shard weights over all processes' devices; each block is gathered when it is computed (FSDP2).

    Weights are gathered in the dtype of mixed precision, which halves the traffic. Their shards, and the averages of
    gradients, are in fp32.

    Raises:
        InputError: There is only one process.
    """
    if not dist.is_initialized():
        raise InputError("--fsdp: there is only one process; start it with torchrun --nproc-per-node N -m smallvit")
    mesh = init_device_mesh(device.type, (world.size,))
    blocks = [module for module in model.modules() if type(module).__name__.endswith("Block")]
    mixed = dtype != torch.float32
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if mixed else None,
        reduce_dtype=torch.float32 if mixed else None,
        cast_forward_inputs=False,  # autocast does, where it is exact enough
    )
    for block in reversed(blocks):  # inner blocks first
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model's weights are sharded over several devices."""
    return isinstance(model, FSDPModule)


def replicate(model: nn.Module, world: World, device: torch.device) -> nn.Module:
    """Return the model with gradients averaged over all processes (DDP), unless it is sharded.

    Before each step, batch norm's statistics of the first process are sent to all. Other buffers do not differ.
    """
    if not dist.is_initialized() or is_sharded(model):
        return model
    ids = [device.index] if device.type == "cuda" else None
    normed = any(isinstance(module, _BatchNorm) for module in model.modules())
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # depthwise convolutions
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **{SYNC_BUFFERS: normed})


def convert_sync_bn(model: nn.Module, world: World, device: torch.device) -> nn.Module:
    """Return the model with batch norm over the images of all processes.

    Raises:
        InputError: There is only one process, or a CPU and a batch norm that is not torch's.
    """
    if world.size == 1:
        raise InputError("--sync-bn: there is only one process; start with torchrun --nproc-per-node N -m smallvit")
    if device.type == "cuda":
        return convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) in CPUBatchNorm.kinds and module.affine and module.track_running_stats:
            module.__class__ = CPUBatchNorm.kinds[type(module)]
        elif isinstance(module, _BatchNorm):
            raise InputError(
                f"batch norm of class {type(module).__name__} takes one process on a CPU; use --processes 1"
            )
    return model


class _Sum(torch.autograd.Function):
    """Sum a tensor over the processes, and in the backward pass its gradients.

    torch.distributed.nn.functional.all_reduce does the same, but is deprecated in torch 2.14.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return World(size=dist.get_world_size()).total(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return World(size=dist.get_world_size()).total(gradient.contiguous())


class CPUBatchNorm(_BatchNorm):
    """Batch norm over the images of all processes, which torch has for GPUs only."""

    kinds: ClassVar[dict[type[nn.Module], type[nn.Module]]] = {}
    """Class by torch's class, with the same parameters and buffers."""

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        channels, dims = x.shape[1], [0, *range(2, x.ndim)]
        shape = [1, channels] + [1] * (x.ndim - 2)
        values = x.float()
        *_, count = sums = _Sum.apply(torch.cat([values.sum(dims), values.new_tensor([values.numel() // channels])]))
        mean = sums[:-1] / count
        centered = values - mean.view(shape)
        var = _Sum.apply(centered.square().sum(dims)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            unbiased = var * (count / (count - 1))
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(unbiased.detach(), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (centered * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


for _kind in (nn.BatchNorm1d, nn.BatchNorm2d):
    CPUBatchNorm.kinds[_kind] = type(f"CPU{_kind.__name__}", (CPUBatchNorm, _kind), {"__module__": __name__})


def sync_last_backward(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Average gradients over the processes only in the last of several backward passes."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    return nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()


def full_tensor(value: Tensor) -> Tensor:
    """Return a tensor, gathered if it is sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local_tensor(value: Tensor) -> Tensor:
    """Return this process's shard of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def distribute_like(value: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor sharded and laid out in memory like another of the same shape."""
    if value.shape != like.shape:
        return value
    if isinstance(like, DTensor):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return torch.empty_like(like, dtype=value.dtype).copy_(value)
