"""Test recovery from signals, kill -9, full and read-only disks, and files that are damaged or of another run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import smallvit as package
from smallvit import Config, InputError
from smallvit.models import checkpoint, weights_info
from smallvit.runs.run import Run
from smallvit.training import train
from smallvit.training.optim import create_average, create_optimizer
from smallvit.utils import signals as interrupt
from smallvit.utils.files import Lock


def slow_except(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Mark values of a parametrized test as slow, except those in `kept`."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values]


Command = Callable[..., tuple[int, str, str]]

OPTIONS = {
    "lsa": True,
    "keep_resume": True,
    "aug": "mix",
    "ema_decay": 0.9,
    "lr": 3e-3,
    "weight_decay": 0.05,
    "keep": 1,
    "train_fraction": 0.03,
    "val_fraction": 0.02,
    "batch_size": 24,
}
"""Two steps an epoch."""
FLAGS = [
    part
    for name, value in OPTIONS.items()
    for part in ([f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)]))
]
EPOCHS = 10
STEPS = 2
OFTEN = ("--checkpoint-minutes", "1e-9")
"""A checkpoint after every step."""
PATIENCE = 1800
"""Seconds until a process is taken to hang; on a busy machine all take many times as long as alone."""
pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX: fork, signals, mounts")


def command(out: Path, *more: object) -> list[str]:
    return ["train", *FLAGS, "--epochs", str(EPOCHS), "--out", str(out), *map(str, more)]


def outcome(folder: Path) -> dict[str, Any]:
    """Return all results of a run except times."""
    lines = [json.loads(line) for line in (folder / Run.METRICS).read_text().splitlines()]
    summary = json.loads((folder / Run.SUMMARY).read_text())
    return {
        "files": sorted(path.name for path in folder.iterdir()),
        "weights": [(folder / name).read_bytes() for name in (Run.LAST, Run.BEST)],
        "metrics": [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines],
        "test": [summary[name] for name in ("test_loss", "test_top1", "val_top1", "best_epoch", "images_seen")],
    }


def resumed(folder: Path) -> dict[str, Any]:
    return outcome(train.train(Config.build(resume=str(folder))).folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Train without interruption."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return outcome(train.train(Config.build(**OPTIONS, epochs=EPOCHS, out=str(out))).folder)


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start Python in a separate process and process group that end with the test."""
    started = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-u", *map(str, arguments)],
            env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def wait_until(holds: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def partials(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if "partial" in path.name]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_followed_by_a_checkpoint_and_words_how_to_go_on(
    start: Start, whole: dict[str, Any], tmp_path: Path, number: int, code: int
) -> None:
    out = tmp_path / "run"
    process = start("-m", "smallvit", *command(out))
    while not process.stdout.readline().startswith("train "):
        assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code
    noted, ended = err.splitlines()
    assert noted.startswith(f"smallvit: {signal.Signals(number).name} received: finishing the current step and saving")
    assert ended == f"interrupted; resume with: smallvit train --resume {out}"
    assert (out / Run.STATE).exists()
    assert not (out / Run.SUMMARY).exists()
    assert resumed(out) == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (RuntimeError("the compiler was killed"), interrupt.SignalInterrupt),
        (InputError("no such teacher"), InputError),
        (OSError("no space left"), OSError),
    ],
    ids=["unforeseen", "input", "disk"],
)
def test_what_fails_after_a_signal_is_an_interruption_unless_it_says_more(
    error: Exception, ends: type[BaseException]
) -> None:
    """Send Ctrl-C as a terminal does, which ends the compilers that torch started, too."""

    def fail(signals: int) -> None:
        with interrupt.SignalHandler():
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGINT)
            raise error

    with pytest.raises(ends):
        fail(1)
    with pytest.raises(type(error)):
        fail(0)


STALLING = """
import os, stat, sys, time
from smallvit.cli import main
real = os.fsync
def fsync(file):
    if os.path.exists(sys.argv[1]) and stat.S_ISREG(os.fstat(file).st_mode):
        time.sleep(1000)
    real(file)
os.fsync = fsync
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_second_ctrl_c_does_not_wait_for_the_current_checkpoint(
    start: Start, whole: dict[str, Any], tmp_path: Path
) -> None:
    """Stall the disk during a checkpoint, which would last for minutes."""
    out, stall = tmp_path / "run", tmp_path / "stall"
    process = start("-c", STALLING, stall, *command(out, *OFTEN))
    wait_until((out / Run.STATE).exists, process)
    stall.touch()
    wait_until(lambda: partials(out), process)
    process.send_signal(signal.SIGINT)
    assert "SIGINT received: finishing the current step and saving" in process.stderr.readline()
    time.sleep(interrupt.TWICE_SECONDS + 0.5)  # one that follows sooner is taken for the same
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert err == f"interrupted; resume with: smallvit train --resume {out}\n"
    assert not partials(out)
    checkpoint.load_weights(out / Run.STATE)
    assert resumed(out) == whole


KILLS = '''
"""A run whose process is killed over and over. Everything is imported once, and nothing computed before the forks."""
import json, os, random, signal, stat, sys, time
from contextlib import suppress
from pathlib import Path
import matplotlib.figure, numpy, scipy, sklearn.datasets, sklearn.model_selection, torch, torch.utils.data
import smallvit.cli.train
from smallvit import cli
from smallvit.models import checkpoint
from smallvit.training import train as engine
from smallvit.runs.run import Run

torch.set_num_threads(1)
folder, command = Path(sys.argv[1]), sys.argv[2:]
out = folder / "run"
draw = random.Random(0)
START_UP, WRITING, ANYWHERE = range(3)

MOST = 2
PATIENCE = 10_000

def train(*more, events=None, stall=0, since=0.0):
    """Start a child that trains. It writes "." to `events` before each step, and waits for its end after some steps.

    With `stall` it writes "w" and waits in the middle of that many a file of weights or state.
    """
    if child := os.fork():
        return child
    code = 99
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        fsync, step, steps = os.fsync, engine.train_step, []
        def stalling(file):
            nonlocal stall
            if steps and stat.S_ISREG(os.fstat(file).st_mode) and being_written(since):
                stall -= 1
                if stall == 0:
                    os.write(events, b"w")
                    time.sleep(PATIENCE)
            fsync(file)
        def few(*arguments):
            os.write(events, b".")
            steps.append(1)
            if len(steps) > MOST:
                time.sleep(PATIENCE)
            return step(*arguments)
        if events is not None:
            os.fsync, engine.train_step = stalling, few
        code = cli.main([*command, *more])
    finally:
        os._exit(code)

def being_written(since):
    """Weights or a state that are not whole, and are no older."""
    found = []
    for file in out.glob(".*.safetensors.partial"):
        with suppress(FileNotFoundError):  # in its place meanwhile
            found += [file.name] if file.stat().st_mtime >= since else []
    return found

def strike(how):
    """Start a child, kill it at some moment; its exit status, and the partial files that it left."""
    started = time.time()
    reader, writer = os.pipe()
    stall = draw.randint(1, 3) if how == WRITING else 0
    saved_often = ("--auto-resume", "--checkpoint-minutes", "1e-9")
    child = train("--out", str(out), *saved_often, events=writer, stall=stall, since=started)
    os.close(writer)
    if how == WRITING:
        while os.read(reader, 1) not in (b"w", b""):
            pass
    if how == ANYWHERE:
        for _ in range(draw.choice((1, 2, 2, 3))):
            os.read(reader, 1)
    if how != WRITING:
        time.sleep(draw.uniform(0, 0.2))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reader)
    return status, being_written(started)

def place():
    """Epochs and steps in the checkpoint."""
    if not (out / Run.STATE).exists():
        return 0, 0
    progress = checkpoint.load_weights(out / Run.STATE)[1]["progress"]
    return progress["epoch"], progress["step"]

killed = cut = 0
places = []
for attempt in range(50):
    how = (WRITING, ANYWHERE, START_UP, ANYWHERE, ANYWHERE)[attempt % 5]
    status, left = strike(how)
    killed += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    cut += how == WRITING and bool(left)
    places.append(place())
finished_early = (out / Run.SUMMARY).exists()
ends = [os.waitpid(train("--out", str(out), "--auto-resume"), 0)[1]]
ends.append(os.waitpid(train("--out", str(folder / "whole")), 0)[1])
print(json.dumps({"killed": killed, "cut": cut, "places": places, "early": finished_early, "ends": ends}))
'''


@pytest.mark.slow
def test_fifty_times_kill_9_change_nothing(start: Start, tmp_path: Path) -> None:
    """Kill a fifth of the processes while they write a checkpoint, and a fifth mostly before training starts."""
    epochs = 52  # of two steps; no child does more than two
    process = start("-c", KILLS, tmp_path, "train", *FLAGS, "--epochs", epochs)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    outcomes = json.loads(out)
    assert outcomes["killed"] == 50
    assert outcomes["cut"] == 10
    assert outcomes["places"] == sorted(outcomes["places"])  # never back
    assert len(set(map(tuple, outcomes["places"]))) >= 20
    assert not outcomes["early"]
    assert outcomes["ends"] == [0, 0]
    run, whole = outcome(tmp_path / "run"), outcome(tmp_path / "whole")
    assert len(run["metrics"]) == epochs
    assert run == whole


def after_step(monkeypatch: pytest.MonkeyPatch, number: int, happens: Callable[[], None]) -> None:
    """Have something happen once, between the n-th step and what is saved after it."""
    original, steps = train.train_step, []

    def step(*arguments: Any) -> torch.Tensor:
        loss = original(*arguments)
        steps.append(1)
        if len(steps) == number:
            happens()
        return loss

    monkeypatch.setattr(train, "train_step", step)


LIMITED = """
import os, resource, sys
from smallvit.training import train as engine
from smallvit.cli import main
original, steps = engine.train_step, []
def step(*arguments):
    steps.append(1)
    if len(steps) == 5:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    return original(*arguments)
engine.train_step = step
for limit in (0, 100_000):
    if not os.fork():
        os._exit(main([*sys.argv[2:], "--out", sys.argv[1] + str(limit)]))
    print("ended with", os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.slow
def test_a_limit_on_files_ends_the_run_in_one_line_and_loses_nothing(
    start: Start, whole: dict[str, Any], tmp_path: Path
) -> None:
    """At the first byte, and in the midst of a file."""
    process = start("-c", LIMITED, tmp_path / "run", *command(tmp_path, *OFTEN))
    out, err = process.communicate(timeout=PATIENCE)
    assert out.count("ended with 1\n") == 2
    assert [line.startswith("smallvit: ") for line in err.splitlines()] == [True, True]
    for name in ("run0", "run100000"):
        assert_saved(tmp_path / name, epoch=2, step=0)
        assert resumed(tmp_path / name) == whole


def assert_saved(folder: Path, epoch: int, step: int) -> None:
    """Check that the checkpoint and its weights are complete, and that no other file is left."""
    progress = checkpoint.load_weights(folder / Run.STATE)[1]["progress"]
    assert (progress["epoch"], progress["step"]) == (epoch, step)
    for name in ("best", "last"):
        package.load_model(folder, name)
    assert not partials(folder)


class Disk:
    """A small one, which can fill up and become read-only; or, where none can be had, a folder that can be closed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ballast = folder, folder / "ballast"
        mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "smallvit", str(folder)]
        self.mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0

    def fill(self, but: int) -> None:
        """Leave so many bytes."""
        with self.ballast.open("wb", buffering=0) as file:
            free = os.statvfs(self.folder)
            file.write(bytes(free.f_bavail * free.f_frsize - but))

    def set_writable(self, writable: bool) -> None:
        if self.mounted:
            remount = f"remount,{'rw' if writable else 'ro'}"
            subprocess.run(["mount", "-o", remount, str(self.folder)], check=True)
        else:
            for folder in (self.folder, *(path for path in self.folder.rglob("*") if path.is_dir())):
                folder.chmod(0o700 if writable else 0o500)

    def remove(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    (tmp_path / "disk").mkdir()
    disk = Disk(tmp_path / "disk")
    if not disk.mounted and os.geteuid() == 0:
        pytest.skip("root, for whom no folder is read-only, may not mount a disk here")
    yield disk
    disk.set_writable(True)
    disk.remove()


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 100 * 1024])
def test_a_full_disk_ends_the_run_in_one_line_and_loses_nothing(
    smallvit: Command, whole: dict[str, Any], disk: Disk, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    if not disk.mounted:
        pytest.skip("only root may mount a small disk")
    out = disk.folder / "run"
    with monkeypatch.context() as patch:
        after_step(patch, 5, lambda: disk.fill(but=left))
        code, _, err = smallvit(*command(out, *OFTEN))
    assert code == 1
    assert err.startswith("smallvit: ")
    assert err.count("\n") == 1
    assert "No space left on device" in err
    assert_saved(out, epoch=2, step=0)
    disk.ballast.unlink()
    assert resumed(out) == whole


@pytest.mark.slow
def test_a_disk_that_becomes_read_only_ends_the_run_in_one_line_and_loses_nothing(
    smallvit: Command, whole: dict[str, Any], disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = disk.folder / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Lock, "acquire", lambda lock, timeout=-1: True)  # mount refuses while a file is open for writing
        after_step(patch, 5, lambda: disk.set_writable(False))
        code, _, err = smallvit(*command(out, *OFTEN))
    assert code == 1
    assert err.startswith("smallvit: ")
    assert err.count("\n") == 1
    assert str(out) in err
    assert_saved(out, epoch=2, step=0)
    disk.set_writable(True)
    assert resumed(out) == whole


def test_read_only_folder_is_refused_before_training(
    smallvit: Command, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "train_step", None)  # must not be reached
    (disk.folder / "there").mkdir()
    disk.set_writable(False)
    for out in (disk.folder / "there", disk.folder / "new" / "run"):
        code, _, err = smallvit(*command(out))
        assert code == 2
        assert err.startswith(f"smallvit: --out {out}: cannot be written (")
        assert err.count("\n") == 1


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run that is interrupted in its third epoch."""
    out = tmp_path_factory.mktemp("runs") / "half"
    with pytest.MonkeyPatch.context() as patch:
        after_step(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train.train(Config.build(**OPTIONS, epochs=EPOCHS, out=str(out)))
    assert_saved(out, epoch=2, step=1)
    return out


@pytest.fixture
def copy(half: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(half, tmp_path / "run"))


Spoil = Callable[[Path], None]


def assert_refused(smallvit: Command, folder: Path, name: str, spoil: Spoil, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that all readers of a damaged file refuse it before training, name it in one line, and keep it."""
    file = folder / name
    spoil(file)
    before = file.read_bytes()
    monkeypatch.setattr(train, "train_step", None)  # must not be reached
    if name != Run.LAST:  # which resuming writes and does not read
        code, _, err = smallvit("train", "--resume", folder)
        assert code == 2, err
        assert err.startswith("smallvit: ")
        assert err.count("\n") == 1
        assert str(file) in err
    if name != Run.STATE:
        with pytest.raises(InputError) as refused:
            package.load_model(folder, file.stem)
        assert str(file) in str(refused.value)
        assert "\n" not in str(refused.value)
    assert file.read_bytes() == before


def cut(length: Callable[[int], int]) -> Spoil:
    return lambda file: file.write_bytes(file.read_bytes()[: length(file.stat().st_size)])


LENGTHS = {
    "empty": lambda size: 0,
    "7 bytes": lambda size: 7,
    "8 bytes": lambda size: 8,
    "100 bytes": lambda size: 100,
    "half": lambda size: size // 2,
    "all but one byte": lambda size: size - 1,
}


@pytest.mark.parametrize("length", slow_except(LENGTHS, *[*LENGTHS][::3]))
@pytest.mark.parametrize("name", [Run.STATE, Run.BEST, Run.LAST])
def test_a_file_cut_short_is_refused(
    smallvit: Command, copy: Path, monkeypatch: pytest.MonkeyPatch, name: str, length: str
) -> None:
    assert_refused(smallvit, copy, name, cut(LENGTHS[length]), monkeypatch)


class Bomb:
    """Pickled, it writes a file where it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", [Run.STATE, Run.BEST, Run.LAST])
def test_a_pickle_under_the_name_of_weights_is_refused_and_never_run(
    smallvit: Command, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, zipped: bool
) -> None:
    marker, proof = tmp_path / "marker", tmp_path / "proof"
    torch.save(Bomb(proof), tmp_path / "bomb")
    torch.load(tmp_path / "bomb", weights_only=False)
    assert proof.exists()  # it would go off

    def plant(file: Path) -> None:
        torch.save(Bomb(marker), file, _use_new_zipfile_serialization=zipped)

    assert_refused(smallvit, copy, name, plant, monkeypatch)
    assert not marker.exists()


def rewritten(
    tensors: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None,
    entry: Callable[[dict[str, Any]], object] = lambda entry: None,
) -> Spoil:
    """Write the same file with some tensors, or some of its metadata, changed in place."""

    def rewrite(file: Path) -> None:
        weights, metadata = checkpoint.load_weights(file)
        tensors(weights)
        entry(metadata)
        save_file(weights, file, {weights_info.ENTRY: json.dumps(metadata)})

    return rewrite


def with_entry(text: str | None) -> Spoil:
    """Write the same tensors with entirely different metadata."""

    def rewrite(file: Path) -> None:
        weights, _ = checkpoint.load_weights(file)
        save_file(weights, file, None if text is None else {weights_info.ENTRY: text})

    return rewrite


def of_another_model(file: Path) -> None:
    weights, metadata = checkpoint.load_weights(file)
    other = package.create_model("vit", img_size=8, num_classes=10, in_chans=1, plugins={"spt": True})
    if file.name != Run.STATE:
        checkpoint.save_weights(file, checkpoint.snapshot(other), metadata)
        return
    config = Config.build(**OPTIONS).optim
    state = checkpoint.gather_state(other, create_optimizer(other, config), create_average(other, config))
    checkpoint.save_state(file, state, metadata["progress"])


def of_another_optimizer(opt: str) -> Spoil:
    """Write the state of the same model after one step of another optimizer."""

    def rewrite(file: Path) -> None:
        weights, metadata = checkpoint.load_weights(file)
        model = package.create_model("vit", img_size=8, num_classes=10, in_chans=1, plugins={"lsa": True})
        config = Config.build(**OPTIONS | {"opt": opt}).optim
        optimizer = create_optimizer(model, config)
        model(torch.randn(2, 1, 8, 8)).sum().backward()
        optimizer.step()
        state = checkpoint.gather_state(model, optimizer, create_average(model, config))
        checkpoint.save_state(file, state, metadata["progress"])

    return rewrite


def resized(name: str) -> Spoil:
    return rewritten(lambda tensors: tensors.update({name: torch.zeros(3, 5)}))


def without(name: str) -> Spoil:
    return rewritten(lambda tensors: tensors.pop(name))


def metadata(*keys: str, value: object) -> Spoil:
    """Another value somewhere in the metadata."""

    def change(entry: dict[str, Any]) -> None:
        for key in keys[:-1]:
            entry = entry[key]
        entry[keys[-1]] = value

    return rewritten(entry=change)


FOREIGN_STATES = {
    "another model's": of_another_model,
    "SGD's": of_another_optimizer("sgd"),
    "LAMB's": of_another_optimizer("lamb"),
    "Lion's": of_another_optimizer("lion"),
    "a key too many": resized("model.more"),
    "a key of nothing": resized("more"),
    "a weight missing": without("model.head.bias"),
    "an average missing": without("average.head.bias"),
    "a moment missing": without("optimizer.3.exp_avg"),
    "all moments of a weight missing": rewritten(
        lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("optimizer.3.")]
    ),
    "another weight's shape": resized("model.head.weight"),
    "another moment's shape": resized("optimizer.3.exp_avg"),
    "a moment of no weight": resized("optimizer.9999.exp_avg"),
    "a moment without a number": resized("optimizer.x.exp_avg"),
    "no metadata": with_entry(None),
    "no JSON": with_entry("{"),
    "nested deeply": with_entry("[" * 100_000),
    "a list": with_entry("[]"),
    "nothing in it": with_entry('{"format": 3}'),
    "another format": metadata("format", value=99),
    "progress of nothing": metadata("progress", value=None),
    "progress as a list": metadata("progress", value=[1, 2]),
    "progress unknown": metadata("progress", "more", value=1),
    "no optimizer": metadata("optimizer", value=None),
    "no groups": metadata("optimizer", "groups", value=[]),
    "groups of words": metadata("optimizer", "groups", value=["lr", "lr"]),
    "a rate in words": metadata("optimizer", "groups", value=[{"weight_decay": "much"}, {}]),
    "numbers as a list": metadata("optimizer", "numbers", value=[1]),
    **{
        f"{name} {value!r}": metadata("progress", name, value=value)
        for name, values in {
            "losses": (["low"],),
            "new": (5, [1]),
        }.items()
        for value in values
    },
}


@pytest.mark.parametrize("what", slow_except(FOREIGN_STATES, *[*FOREIGN_STATES][::5]))
def test_a_state_that_does_not_fit_the_run_is_refused(
    smallvit: Command, copy: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    assert_refused(smallvit, copy, Run.STATE, FOREIGN_STATES[what], monkeypatch)


FOREIGN_WEIGHTS = {
    "another model's": of_another_model,
    "a key too many": resized("more"),
    "a weight missing": without("head.bias"),
    "another shape": resized("head.weight"),
    "no metadata": with_entry(None),
    "no JSON": with_entry("{"),
    "nested deeply": with_entry("[" * 100_000),
    "a number": with_entry("1"),
    "nothing in it": with_entry('{"format": 3}'),
    "model as a list": metadata("model", value=["vit"]),
    "no class names": metadata("data", value={"mean": [0.5], "std": [0.5]}),
    "data as a word": metadata("data", value="digits"),
    **{
        f"{name} {value!r}": metadata("model", name, value=value)
        for name, values in {
            "arch": (5, None, "os.system"),
            "img_size": ("8", None, 0),
            "num_classes": ("10", None, -1),
            "in_chans": ("1", None, 0),
            "patch_size": ("2", 0.5, -2),
            "lsa_temperature": ("warm",),
        }.items()
        for value in values
    },
    **{
        f"{name} {value!r}": metadata("data", name, value=value)
        for name, values in {"mean": (0.5, None), "std": (1,), "class_names": (10, None)}.items()
        for value in values
    },
}


@pytest.mark.parametrize("what", slow_except(FOREIGN_WEIGHTS, *[*FOREIGN_WEIGHTS][::3]))
def test_weights_that_do_not_fit_their_metadata_are_refused(half: Path, tmp_path: Path, what: str) -> None:
    file = Path(shutil.copy(half / Run.BEST, tmp_path))
    FOREIGN_WEIGHTS[what](file)
    before = file.read_bytes()
    with pytest.raises(InputError) as refused:
        package.load_model(file)
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "what", ["another model's", "a key too many", "a weight missing", "another shape", "nothing in it"]
)
def test_best_weights_that_do_not_fit_the_run_are_noticed_before_it_goes_on(
    smallvit: Command, copy: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    assert_refused(smallvit, copy, Run.BEST, FOREIGN_WEIGHTS[what], monkeypatch)
