"""Check how models are replicated and sharded, what gloo needs, and how a lost process is named."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smallvit.models.checkpoint import gather_state, snapshot
from smallvit.models.factory import create_model
from smallvit.utils import distributed
from smallvit.utils.distributed import World, find_missing, replicate, require_reachable, shard
from smallvit.utils.errors import InputError, PeerExitedError
from tests.worlds import fake_group

CPU = torch.device("cpu")


def create(arch: str = "vit") -> nn.Module:
    torch.manual_seed(0)
    return create_model(arch=arch, img_size=8, in_chans=1, num_classes=10)


def test_buffers_are_broadcast_with_batch_norm_only() -> None:
    for arch, normed in (("vit", False), ("resnet20", True)):
        with fake_group(1, 8) as world:
            assert replicate(create(arch), world, CPU).broadcast_buffers == normed
    model = create()
    assert replicate(model, World(), CPU) is model


class Traffic(TorchDispatchMode):
    """Record the types of the tensors that are gathered and reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: dict[str, set[torch.dtype]] = {"_allgather_base_": set(), "_reduce_scatter_base_": set()}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for name, dtypes in self.dtypes.items():
            if name in str(function):
                dtypes |= {each.dtype for each in tree_leaves(args) if isinstance(each, torch.Tensor)}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_gathered_in_the_compute_dtype_and_gradients_averaged_in_fp32(dtype: torch.dtype) -> None:
    with fake_group(3, 8) as world, Traffic() as traffic:
        model = create()
        shard(model, world, CPU, dtype)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(torch.randn(2, 1, 8, 8)).float().sum()
        loss.backward()
    assert traffic.dtypes == {"_allgather_base_": {dtype}, "_reduce_scatter_base_": {torch.float32}}
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    assert {each.grad.dtype for each in model.parameters()} == {torch.float32}


def test_sharding_takes_several_processes() -> None:
    with pytest.raises(InputError, match="--fsdp: there is only one process"):
        shard(create(), World(), CPU, torch.float32)


def test_other_processes_gather_but_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = create()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    copies = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor) or cpu(tensor))
    assert snapshot(model, keep=False) == {}
    assert gather_state(model, optimizer, None, keep=False)[0] == {}
    assert not copies
    assert len(snapshot(model)) == len(copies)


def open_hosts(names: list[str]) -> dist.Store:
    """Return a store in which other processes have set the names of their machines."""
    store = dist.HashStore()
    for rank, name in enumerate(names):
        store.set(f"host/{rank}", name)
    return store


def test_a_local_address_of_this_machines_name_is_said_before_gloo_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: "node1")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    for local_rank, error in ((0, InputError), (1, PeerExitedError)):
        with pytest.raises(error, match=r"node1 .* has the address 127\.0\.1\.1.*set GLOO_SOCKET_IFNAME") as raised:
            require_reachable(open_hosts(["node0", "node0"]), World(2, 3, local_rank))
        assert "\n" not in str(raised.value)
    require_reachable(open_hosts(["node1", "node1"]), World(2, 3, 0))  # one machine
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.7")
    require_reachable(open_hosts(["node0", "node0"]), World(2, 3, 0))
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    require_reachable(open_hosts(["node0", "node0"]), World(2, 3, 0))


def test_processes_that_do_not_report_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "REPORT_SECONDS", 0.1)
    store = open_hosts(["a", "a", "b", "b"])
    for rank in (0, 3):
        store.set(f"lost/{rank}", "")
    assert find_missing(store, World(1, 4)) == {2: "b"}


def test_nccl_is_bound_to_the_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: given.update(current=device))
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(open_hosts(["a"]), 1, 2)]))
    monkeypatch.setattr(distributed, "_agree_on_start", lambda *_: "start")
    monkeypatch.setattr(distributed, "require_reachable", lambda *_: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: given.update(options, backend=backend))
    distributed._init_process_group()
    assert given["backend"] == "cpu:gloo,cuda:nccl"
    assert given["device_id"] == given["current"] == torch.device("cuda", 1)
    assert given["timeout"].total_seconds() == distributed.MEETING_SECONDS


HANGING = """\
import sys, time
from smallvit.utils import distributed
from smallvit.utils.errors import TrainingError

distributed.MEETING_SECONDS = 5
try:
    with distributed.init_distributed() as world:
        world.agree(0)
        if world.rank == int(sys.argv[1]):
            open(sys.argv[2], "w").close()
            time.sleep(600)
        world.agree(0)
except TrainingError as error:
    print(f"{type(error).__name__}: {error}", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])
def test_the_process_that_hangs_is_named(tmp_path: Path, victim: int) -> None:
    (tmp_path / "hang.py").write_text(HANGING)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    store = dist.TCPStore("127.0.0.1", int(port), is_master=True, wait_for_workers=False)  # as torchrun's agent has it
    processes = []
    for rank in range(3):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True, "OMP_NUM_THREADS": 1}
        processes.append(
            subprocess.Popen(
                [sys.executable, str(tmp_path / "hang.py"), str(victim), str(tmp_path / "hangs")],
                env=os.environ | {name: str(value) for name, value in environment.items()},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    others = [process for rank, process in enumerate(processes) if rank != victim]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in others]
    finally:
        processes[victim].kill()
        processes[victim].communicate()
        del store
    assert (tmp_path / "hangs").exists()
    said = f"process {victim} of 3 on {socket.gethostname()} of torchrun has exited or hangs"
    assert outputs[0].startswith(f"TrainingError: {said}"), outputs  # printed in any case
    assert outputs[1].startswith(f"PeerExitedError: {said}"), outputs
