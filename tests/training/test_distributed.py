"""torchrun's processes against one process, and what becomes of a run when one of them dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import pytest
import torch.distributed as dist
from PIL import Image
from sklearn.datasets import load_digits

from smallvit import Config, InputError, utils
from smallvit.datasets.image_folder import list_folder
from smallvit.datasets.shards import write_shards
from smallvit.runs.run import Run
from smallvit.training import setup, train
from smallvit.training.launch import open_run
from smallvit.utils.distributed import World

RICH = {
    "keep_resume": True,
    "spt": True,
    "lsa": True,
    "plugin_init": "preserve",
    "drop_path": 0.0,
    "amp": "off",
    "train_fraction": 0.1,
    "aug": "lee2021",
    "aug_repeats": 3,
    "grad_accum_steps": 16,
    "clip_grad": 1.0,
    "ema_decay": 0.9,
    "lr": 3e-3,
    "batch_size": 132,
}
"""Everything that processes must share out rightly; an epoch is one step, of which they get 64 and 65 images."""
SURVIVES_A_CRASH = ("--max-restarts", "1")
"""For FSDP: a gloo thread of torch 2.11 once crashed within malloc; the run must then resume and end the same."""
PATIENCE = 1800
"""Seconds until a process is taken to hang; on a busy machine all take many times as long as alone."""


def flags(options: dict[str, object]) -> list[str]:
    """Options as a command line has them."""
    return [
        part
        for name, value in options.items()
        for part in ([f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)]))
    ]


def free_port() -> str:
    """Return a port that no process listens on, so that tests of several checkouts can run at once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def torchrun(out: Path, options: dict[str, object], *more: str, processes: int = 2) -> subprocess.Popen[str]:
    """Start processes that train on the CPU."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--master-port",
        free_port(),
        "--nproc-per-node",
        str(processes),
        *more,
    ]
    return subprocess.Popen(
        [*command, "-m", "smallvit", "train", *flags(options), "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, output
    return output


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / Run.METRICS).read_text().splitlines()]


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not file.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    assert file.exists()


def assert_alike(one: Path, two: Path) -> None:
    """Check that two runs had the same losses and accuracies at every step, to rounding, which may change an image."""
    assert len(metrics(one)) == len(metrics(two))
    for mine, theirs in zip(metrics(one), metrics(two), strict=True):
        for name in ("train_loss", "val_loss"):
            assert mine[name] == pytest.approx(theirs[name], abs=1e-5), mine["epoch"]
        for name in ("val_top1", "val_top1_raw"):
            assert mine[name] == pytest.approx(theirs[name], abs=1.01 * 100 / 143)
    summaries = [json.loads((folder / Run.SUMMARY).read_text()) for folder in (one, two)]
    assert summaries[0]["test_top1"] == pytest.approx(summaries[1]["test_top1"], abs=1.01 * 100 / 359)
    assert [summary["test_images"] for summary in summaries] == [359, 359]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps of one process."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    return train.train(Config.build(**RICH, epochs=20, out=str(out))).folder


@pytest.mark.slow
def test_two_processes_follow_one(alone: Path, tmp_path: Path) -> None:
    shutil.copytree(alone, tmp_path / "two")  # a finished run there, which must not be resumed
    finish(torchrun(tmp_path / "two", RICH | {"epochs": 20, "overwrite": True}))
    assert_alike(tmp_path / "two", alone)
    assert json.loads((tmp_path / "two" / Run.SUMMARY).read_text())["processes"] == 2


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
def test_eight_processes_follow_one_from_shards_also_killed_and_resumed_by_three(tmp_path: Path) -> None:
    digits = load_digits()
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        (tmp_path / f"digits/{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray((15 * pixels).astype("uint8")).save(tmp_path / f"digits/{label}/{index}.png")
    write_shards(list_folder(tmp_path / "digits"), tmp_path / "shards", 8)
    options = RICH | {"epochs": 8, "grad_accum_steps": 2, "keep": 1}
    options |= {"data": str(tmp_path / "shards"), "streaming": "on", "workers": 0}
    one = train.train(Config.build(**options, out=str(tmp_path / "one"))).folder
    out = tmp_path / "eight"
    process = torchrun(out, options, processes=8)
    wait_for(out / Run.STATE, process)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[5]), signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    assert process.returncode
    assert not (out / Run.SUMMARY).exists()
    done = len(metrics(out))
    assert 0 < done < 8
    assert "resume after epoch" in finish(torchrun(out, options | {"auto_resume": True}, processes=3))
    assert_alike(out, one)
    assert json.loads((out / Run.SUMMARY).read_text())["processes"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_learn_from_a_teacher_as_one_does(alone: Path, tmp_path: Path, fsdp: bool) -> None:
    options = RICH | {"epochs": 6, "teacher": str(alone), "distill": "token", "teacher_views": 2, "init": str(alone)}
    options = {name: value for name, value in options.items() if name not in ("spt", "lsa", "plugin_init")}
    one = train.train(Config.build(**options, out=str(tmp_path / "one"))).folder
    finish(torchrun(tmp_path / "two", options | ({"fsdp": True} if fsdp else {}), *(SURVIVES_A_CRASH if fsdp else ())))
    assert_alike(tmp_path / "two", one)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
def test_sharded_weights_follow_whole_ones_over_a_termination(alone: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "two", RICH | {"epochs": 20, "fsdp": True, "auto_resume": True, "keep": 1}
    process = torchrun(out, options)
    wait_for(out / Run.STATE, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode
    assert not (out / Run.SUMMARY).exists()
    assert "resume after epoch" in finish(torchrun(out, options, *SURVIVES_A_CRASH))
    assert_alike(out, alone)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_run_whose_process_is_killed_restarts_by_itself_and_ends_the_same(
    undisturbed: Path, tmp_path: Path, victim: int
) -> None:
    out = tmp_path / "killed"
    process = torchrun(out, LONG, "--max-restarts", "1")
    wait_for(out / Run.STATE, process)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[victim]), signal.SIGKILL)
    assert "resume after epoch" in finish(process)
    for name in (Run.LAST, Run.BEST):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes()


LONG = {"lsa": True, "aug": "mix", "epochs": 12, "train_fraction": 0.3, "batch_size": 64, "ema_decay": 0.99, "keep": 1}
"""Dropout's like, stochastic depth, and bf16 where the machine has it are on; a checkpoint after every epoch."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run of two processes to the end."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(torchrun(out, LONG))
    return out


OVERFLOW = """\
import json, math, sys
import torch
from torch import nn
from smallvit.config.options import OptimConfig
from smallvit.training import optim
from smallvit.utils import distributed
from smallvit.utils.hardware import LossScaler

CPU = torch.device("cpu")
found = {}
with distributed.init_distributed() as world:
    for name in sys.argv[2:]:
        opt, *sharded = name.split("-")
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        if sharded:
            distributed.shard(model, world, CPU, torch.float32)
        replicated = distributed.replicate(model, world, CPU)
        optimizer = optim.create_optimizer(model, OptimConfig(opt=opt, weight_decay=0.05))
        scaler = LossScaler(CPU, torch.float16)
        weights, skipped = [], []
        for step in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = replicated(torch.ones(2, 8)).float().square().mean()
            scaler.scale(loss).backward()
            if step == 1 and (world.rank == 1 or not sharded):  # one shard's; what DDP averages is infinite in all
                distributed.local_tensor(model[1].weight.grad)[0, 0] = math.inf
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            skipped.append(not scaler.step(optimizer))
            weights.append([distributed.full_tensor(each.detach()).flatten().tolist() for each in model.parameters()])
        found[name] = {"skipped": skipped, "weights": weights}
    with open(f"{sys.argv[1]}/{world.rank}.json", "w") as file:
        json.dump(found, file)
"""


@pytest.mark.slow
def test_an_overflow_in_one_process_skips_the_step_in_all(tmp_path: Path) -> None:
    names = ["adamw-sharded", "lamb-sharded", "adamw", "lamb"]
    (tmp_path / "overflow.py").write_text(OVERFLOW)
    command = [sys.executable, "-m", "torch.distributed.run", "--master-port", free_port(), "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*command, str(tmp_path / "overflow.py"), str(tmp_path), *names],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    finish(process)
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one == two
    for name in names:
        assert one[name]["skipped"] == [False, True, False], name
        first, second, third = one[name]["weights"]
        assert first == second != third, name


def test_restarts_ask_for_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(InputError, match="--out DIR"):
        open_run(Config())


@pytest.mark.slow
def test_bad_input_is_said_once(tmp_path: Path) -> None:
    output = finish(torchrun(tmp_path / "run", {"arch": "vti"}), code=1)
    assert output.count("--arch vti: no such architecture (did you mean 'vit'?)") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_needs_several_processes_says_so(tmp_path: Path) -> None:
    for option in ("fsdp", "sync_bn"):
        with pytest.raises(InputError, match="torchrun"):
            train.train(Config.build(**{option: True}, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_that_see_different_checkpoints_do_not_train_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Follower(World):
        """A process whose main one is further."""

        def send(self, value: object, group: object = None) -> object:
            return (value[0], value[1] + 1) if isinstance(value, tuple) and isinstance(value[0], str) else value

    monkeypatch.setattr(utils.distributed, "World", Follower)
    with pytest.raises(InputError, match="storage that all share"):
        train.train(Config.build(epochs=1, out=str(tmp_path / "run")))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
def test_a_termination_of_all_processes_waits_for_the_step_while_others_decode(
    image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = {"data": str(image_folder), "streaming": "on", "workers": 2, "epochs": 500, "batch_size": 16, "keep": 1}
    process = subprocess.Popen(
        [sys.executable, "-m", "smallvit", "train", *flags(options), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for(out / Run.STATE, process)
    os.killpg(process.pid, signal.SIGTERM)
    assert "resume with" in finish(process, code=143)


class Turn(World):
    """A process that records what it waits for instead of communicating."""

    calls: ClassVar[list[str]] = []

    def create_patient_group(self) -> None:
        return None

    def send(self, value: object, group: object = None) -> object:
        self.calls.append("decisions")
        return value

    def wait(self, group: object) -> None:
        self.calls.append("machines")


@pytest.mark.parametrize(
    ("rank", "local_rank", "before"), [(0, 0, []), (1, 1, ["decisions", "machines"]), (2, 0, ["decisions"])]
)
def test_the_main_process_prepares_first_and_then_one_on_each_machine(
    monkeypatch: pytest.MonkeyPatch, rank: int, local_rank: int, before: list[str]
) -> None:
    def create_dataset(*_: object, **options: object) -> None:
        Turn.calls.append("data")
        raise InputError("stop here")

    monkeypatch.setattr(setup.datasets, "create_dataset", create_dataset)
    monkeypatch.setattr(Turn, "calls", [])
    with pytest.raises(InputError, match="stop here"):
        setup.create_setup(Config.build(device="cpu"), Turn(rank, 4, local_rank))
    assert Turn.calls == [*before, "data"]


def test_the_others_wait_for_the_main_process_without_the_time_limit_of_other_communication(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[object] = []
    monkeypatch.setattr(dist, "new_group", lambda timeout: timeout)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda values, group=None, **_: used.append(group))
    monkeypatch.setattr(dist, "all_reduce", lambda value, group=None: used.append(group))
    world = World(1, 2, 1)
    group = world.create_patient_group()
    world.send("decisions", group)
    world.wait(group)
    assert used == [group, group]
    assert group >= timedelta(days=1)
    assert World().create_patient_group() is None


@pytest.mark.slow
def test_two_processes_train_from_shards_as_one_does_from_the_files(tmp_path: Path, image_folder: Path) -> None:
    files, shards = tmp_path / "files", tmp_path / "shards"
    written = write_shards(list_folder(image_folder), shards, 16)
    for index, path in enumerate(written.paths):
        (files / path).parent.mkdir(parents=True, exist_ok=True)
        (files / path).write_bytes(written.open(index).read())
    options = {"epochs": 3, "batch_size": 12, "streaming": "on", "workers": 1, "drop_path": 0.0, "amp": "off"}
    options |= {"aug": "deit", "aug_repeats": 1, "img_size": 16, "device": "cpu"}
    one = train.train(Config.build(**options, data=str(files), out=str(tmp_path / "one"))).folder
    finish(torchrun(tmp_path / "two", options | {"data": str(shards)}))
    for mine, theirs in zip(metrics(one), metrics(tmp_path / "two"), strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-5)
        assert mine["val_loss"] == pytest.approx(theirs["val_loss"], abs=1e-5)


@pytest.mark.slow
def test_a_run_from_shards_is_resumed_within_an_epoch(
    tmp_path: Path, image_folder: Path, interrupted: Callable[[int], AbstractContextManager[None]]
) -> None:
    write_shards(list_folder(image_folder), tmp_path / "shards", 16)
    options = {"data": str(tmp_path / "shards"), "epochs": 2, "batch_size": 12, "streaming": "on", "workers": 0}
    options |= {"aug": "deit", "aug_repeats": 1, "img_size": 16, "device": "cpu", "keep_resume": True}
    whole = train.train(Config.build(**options, out=str(tmp_path / "whole"))).folder
    with interrupted(6):  # an epoch has four steps
        train.train(Config.build(**options, out=str(tmp_path / "parts")))
    train.train(Config.build(resume=str(tmp_path / "parts")))
    losses = [[row["train_loss"] for row in metrics(folder)] for folder in (whole, tmp_path / "parts")]
    assert losses[0] == losses[1]


def test_one_process_is_a_world_of_its_own() -> None:
    world = World()
    assert (world.agree(3), world.send("x"), world.main) == (3, "x", True)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["lejepa", "dino"])
def test_pretraining_by_two_processes_has_the_losses_of_one(objective: str, tmp_path: Path) -> None:
    options = {"objective": objective, "arch": "vit96", "patch_size": 4, "epochs": 2, "batch_size": 43}
    options |= {"train_fraction": 0.1, "amp": "off", "drop_path": 0.0}
    one = train.train(Config.build(**options, out=str(tmp_path / "one"))).folder
    finish(torchrun(tmp_path / "two", options))
    losses = [[line["train_loss"] for line in metrics(folder)] for folder in (one, tmp_path / "two")]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)
