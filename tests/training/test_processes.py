"""Runs that start their own processes on a CPU, against one process."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import smallvit
from smallvit import Config, InputError
from smallvit.runs.run import Run
from smallvit.training import train
from smallvit.training.processes import count_processes
from smallvit.utils.distributed import World, convert_sync_bn
from tests.training.test_distributed import PATIENCE, finish, flags, metrics, wait_for

SHORT = {
    "arch": "vit96",
    "stem": True,
    "ffn": True,
    "lsa": True,
    "drop_path": 0.0,
    "aug": "mix",
    "amp": "off",
    "device": "cpu",
    "epochs": 3,
    "train_fraction": 0.3,
    "batch_size": 45,
}
"""A model with batch norm, and batches that two processes cannot halve."""


def command(out: Path, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "smallvit", "train", *flags(options | {"out": out})],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def children(process: subprocess.Popen[str]) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    return [int(line) for line in listed.split()]


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_also_after_an_interrupt(tmp_path: Path) -> None:
    one = train.train(Config.build(**SHORT, out=str(tmp_path / "one"))).folder
    process = command(tmp_path / "two", **SHORT, processes=2, checkpoint_minutes=1e-6)
    wait_for(tmp_path / "two" / Run.STATE, process)
    process.send_signal(signal.SIGINT)
    output = finish(process, code=130)
    assert f"interrupted; resume with: smallvit train --resume {tmp_path / 'two'}" in output
    assert "Traceback" not in output
    resume = [sys.executable, "-m", "smallvit", "train", "--resume", str(tmp_path / "two")]
    subprocess.run(resume, env=os.environ | {"OMP_NUM_THREADS": "2"}, check=True)
    for mine, theirs in zip(metrics(one), metrics(tmp_path / "two"), strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-4)
        assert mine["val_loss"] == pytest.approx(theirs["val_loss"], abs=1e-4)
    assert json.loads((tmp_path / "two" / Run.SUMMARY).read_text())["processes"] == 2
    first, second = (smallvit.load_model(tmp_path / name, weights="last").state_dict() for name in ("one", "two"))
    norms = [name for name in first if "running" in name]
    assert norms
    for name in norms:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
def test_a_run_ends_with_its_processes_and_they_with_it(tmp_path: Path) -> None:
    for victim in ("other", "first"):
        out = tmp_path / victim
        process = command(out, **SHORT | {"epochs": 1000}, processes=2)
        wait_for(out / Run.STATE, process)
        (other,) = children(process)
        os.kill(other if victim == "other" else process.pid, signal.SIGKILL)
        output = finish(process, code=1 if victim == "other" else -signal.SIGKILL)
        assert "Traceback" not in output
        deadline = time.monotonic() + PATIENCE
        while Path(f"/proc/{other}").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not Path(f"/proc/{other}").exists()


def test_batch_norm_of_one_process_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    torch.manual_seed(0)
    x = (
        torch.randn(8, 3, 5, 5) * torch.tensor([1.0, 0.01, 0.0])[:, None, None]
        + torch.tensor([0.5, 100.0, 30.1])[:, None, None]
    )
    plain = torch.nn.BatchNorm2d(3)
    torch.nn.init.uniform_(plain.weight)
    world = World(size=2)
    ours = convert_sync_bn(copy.deepcopy(plain), world, torch.device("cpu"))
    outputs, gradients = [], []
    for norm in (plain, ours):
        images = x.clone().requires_grad_()
        outputs.append(norm(images))
        (outputs[-1] * torch.linspace(-1, 1, 5)).square().sum().backward()
        gradients.append(images.grad)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3, atol=2e-2)  # rounding of 100 is 1e-3 of 0.01
    torch.testing.assert_close(gradients[1][:, 0], gradients[0][:, 0], rtol=1e-4, atol=1e-5)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_the_number_of_processes_fits_threads_and_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for options, count in (
        ({}, 1),
        ({"processes": "3"}, 3),
        ({"processes": "auto"}, 4),
        ({"processes": "auto", "batch_size": 40}, 2),
        ({"processes": "auto", "batch_size": 8}, 1),
    ):
        assert count_processes(Config.build(device="cpu", **options)) == count
    with pytest.raises(InputError, match="--processes 5: expected at most 4, the number of threads"):
        count_processes(Config.build(device="cpu", processes="5"))
    for wrong in ("0", "-1", "many"):
        with pytest.raises(InputError, match="expected auto or a number above 0"):
            Config.build(processes=wrong)
