"""Check training on a CUDA GPU; the same tests run on the CPU where that is possible.

The forms marked gpu have not been run yet. They are skipped on machines without a GPU, and benchmarks/gpu.py runs them.
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from smallvit import Config, TrainingError
from smallvit.models.checkpoint import load_weights, snapshot
from smallvit.runs.run import Run
from smallvit.training import train as engine
from smallvit.training.setup import Setup, create_setup
from smallvit.utils import distributed
from smallvit.utils.distributed import World

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SMALL = {
    "arch": "vit96",
    "patch_size": 4,
    "spt": True,
    "lsa": True,
    "data": "digits",
    "train_fraction": 0.2,
    "batch_size": 64,
    "epochs": 2,
    "aug": "lee2021",
    "ema_decay": 0.9,
    "clip_grad": 1.0,
    "amp": "off",
    "tf32": False,
}
READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2")
"""Operations whose results the host needs, so that it waits for the device."""


class NoReads(TorchDispatchMode):
    """Raise where the host would wait for a device, on the CPU."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in READS:
            raise RuntimeError(f"aten::{name} waits for the device")
        return function(*args, **(kwargs or {}))


@contextmanager
def forbid_synchronization(device: torch.device) -> Iterator[None]:
    """Raise where the host waits for the device."""
    if device.type == "cpu":
        with NoReads():
            yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def take_steps(
    setup: Setup, count: int, context: Callable[[], AbstractContextManager[Any]] | None = None
) -> list[float]:
    """Take steps in the first epoch; return their losses."""
    batches = list(setup.batches.epoch(0))
    losses = []
    for step in range(count):
        arguments = (setup, 0, step, *batches[step % len(batches)])
        if context is None or step < 2:  # the first steps create the optimizer's state
            losses.append(engine.train_step(*arguments))
        else:
            with context():
                losses.append(engine.train_step(*arguments))
    return torch.stack(losses).tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options", [{}, {"grad_accum_steps": 2}, {"amp": "bf16"}, {"opt": "lamb"}, {"arch": "resnet20", "spt": False}]
)
def test_steps_do_not_wait_for_the_device(device: str, options: dict[str, Any], tmp_path: Path) -> None:
    if device == "cpu" and options.get("opt") == "lamb":
        pytest.skip("LAMB's count of steps lies on the CPU there, and is read without waiting")
    own = SMALL | options
    if own["arch"] == "resnet20":
        own |= {"lsa": False, "patch_size": None}
    setup = create_setup(Config.build(**own, device=device, compile="off", out=str(tmp_path)))
    losses = take_steps(setup, 5, lambda: forbid_synchronization(setup.device))
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("device", DEVICES)
def test_a_value_that_is_read_in_a_step_raises(device: str, tmp_path: Path) -> None:
    setup = create_setup(Config.build(**SMALL, device=device, compile="off", out=str(tmp_path)))
    setup.model.head.register_forward_hook(lambda *arguments: arguments[2] * float(arguments[2].mean() != 0))
    with pytest.raises(RuntimeError, match=r"wait|sync"):
        take_steps(setup, 3, lambda: forbid_synchronization(setup.device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_follows_fp32(device: str, amp: str, tmp_path: Path) -> None:
    options = SMALL | {"drop_path": 0.0, "lr": 1e-4}
    exact, mixed = (
        take_steps(create_setup(Config.build(**options | more, device=device, out=str(tmp_path))), 8)
        for more in ({}, {"amp": amp})
    )
    assert mixed == pytest.approx(exact, rel=0.03)
    assert mixed != exact


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("how", ["on", "graphs"])
def test_compiled_steps_follow_eager_ones(how: str, tmp_path: Path) -> None:
    options = SMALL | {"drop_path": 0.0, "device": "cuda", "lr": 1e-4}
    eager, compiled = (
        engine.train(Config.build(**options, compile=mode, out=str(tmp_path / mode))) for mode in ("off", how)
    )
    assert compiled.summary["compile"] == how
    losses = [
        [json.loads(line)["train_loss"] for line in (run.folder / Run.METRICS).read_text().splitlines()]
        for run in (eager, compiled)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


@contextmanager
def group_of_one(device: torch.device) -> Iterator[World]:
    """Initialize a real process group of this process alone, as torchrun's processes have it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = dist.TCPStore("127.0.0.1", port, is_master=True)
    backend = "cpu:gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    own = None if device.type == "cpu" else torch.device("cuda", 0)
    dist.init_process_group(backend, store=store, rank=0, world_size=1, device_id=own)
    try:
        yield World()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("fsdp", "amp"), [(False, "off"), (True, "off"), (True, "bf16")])
def test_replicated_and_sharded_models_of_one_device_follow_a_plain_one(
    device: str, fsdp: bool, amp: str, tmp_path: Path
) -> None:
    config = Config.build(**SMALL | {"drop_path": 0.0, "device": device, "amp": amp}, out=str(tmp_path))
    plain = create_setup(config)
    losses = take_steps(plain, 6)
    with group_of_one(plain.device) as world:
        wrapped = create_setup(config.replace(fsdp=fsdp), world)
        assert distributed.is_sharded(wrapped.model) == fsdp
        assert isinstance(wrapped.replicated, nn.parallel.DistributedDataParallel) != fsdp
        exact = amp == "off"
        assert take_steps(wrapped, 6) == pytest.approx(losses, rel=1e-4 if exact else 0.03)
        weights = snapshot(wrapped.model)
    for name, value in snapshot(plain.model).items() if exact else ():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)


def exhaust(device: torch.device) -> None:
    """Ask a GPU for more memory than there is, or raise the error that it would."""
    if device.type == "cpu":
        raise torch.OutOfMemoryError("out of memory")
    torch.empty(2**50, dtype=torch.uint8, device=device)


@contextmanager
def limit_memory(setup: Setup, images: int) -> Iterator[None]:
    """Let the model run out of memory with more images."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > images:
            exhaust(setup.device)

    handle = setup.model.register_forward_pre_hook(hook)
    yield
    handle.remove()


@pytest.mark.parametrize("device", DEVICES)
def test_evaluation_continues_after_it_is_out_of_memory(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = create_setup(Config.build(**SMALL | {"ema_decay": None}, device=device, out=str(tmp_path)))
    expected = setup.evaluate("test")
    with limit_memory(setup, 40):
        limited = setup.evaluate("test")
    assert limited == pytest.approx(expected, abs=0.3)
    assert "continuing with" in capsys.readouterr().err
    assert setup.parts.size <= 40
    assert (setup.peaks.evaluation is None) == (device == "cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_training_that_is_out_of_memory_says_what_to_do(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "train_step", lambda setup, *_: exhaust(setup.device))
    with pytest.raises(TrainingError, match="out of memory in steps of 64 images of 8 pixels: try --grad-accum-steps"):
        engine.train(Config.build(**SMALL, device=device, compile="off", out=str(tmp_path / "run")))


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_a_resumed_run_draws_the_same_numbers(
    device: str, tmp_path: Path, interrupted: Callable[[int], AbstractContextManager[None]]
) -> None:
    """Check dropout and stochastic depth, which the device's generator draws; sums may be rounded differently there."""
    options = SMALL | {"dropout": 0.2, "drop_path": 0.2, "device": device, "compile": "off"}
    whole = engine.train(Config.build(**options, out=str(tmp_path / "whole"))).folder
    with interrupted(3):
        engine.train(Config.build(**options, out=str(tmp_path / "parts")))
    parts = engine.train(Config.build(**options, out=str(tmp_path / "parts"), auto_resume=True)).folder
    expected, _ = load_weights(whole / Run.LAST)
    actual, _ = load_weights(parts / Run.LAST)
    tolerance = {"rtol": 0.0, "atol": 0.0} if device == "cpu" else {"rtol": 1e-3, "atol": 1e-4}
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **tolerance)


@pytest.mark.gpu
def test_seeds_alone_decide_what_the_gpu_draws(tmp_path: Path) -> None:
    setup = create_setup(Config.build(**SMALL | {"dropout": 0.2}, device="cuda", compile="off", out=str(tmp_path)))
    images, _ = next(iter(setup.batches.epoch(0)))
    losses = []
    for _ in range(2):
        torch.rand(7, device="cuda")  # moves the generator
        torch.manual_seed(engine._seed(0, engine.MODEL_STREAM, 0, 0, 0))
        with torch.no_grad():
            losses.append(setup.model.train()(images).sum().item())
    assert losses[0] == losses[1]
