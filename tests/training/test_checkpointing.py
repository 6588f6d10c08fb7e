"""Test interruption at any moment, checkpoints, infinite losses, lack of memory, and that runs resume bit-exactly."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import smallvit as package
from smallvit import Config, InputError
from smallvit.models import checkpoint
from smallvit.runs.run import Run
from smallvit.training import checkpointing
from smallvit.training import setup as _setup
from smallvit.training import train as engine
from smallvit.training.losses import Objective
from smallvit.training.setup import Setup
from smallvit.utils import signals
from smallvit.utils.hardware import AsyncScalar
from smallvit.utils.signals import SignalInterrupt
from smallvit.utils.terminal import TrainingProgress


def slow_except(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Mark values of a parametrized test as slow, except those in `kept`."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values]


Command = Callable[..., tuple[int, str, str]]

RICH = {
    "spt": True,
    "lsa": True,
    "plugin_init": "preserve",
    "aug": "lee2021",
    "aug_repeats": 3,
    "grad_accum_steps": 3,
    "clip_grad": 1.0,
    "ema_decay": 0.9,
    "dropout": 0.1,
    "drop_path": 0.2,
    "opt": "lamb",
    "lr": 0.4,
    "sched": "constant",
    "select_by": "loss",
    "epochs": 3,
    "batch_size": 48,
    "train_fraction": 0.1,
}
"""Everything on that keeps a state or draws random numbers; the validation loss grows, so the first epoch is best."""
EPOCHS, STEPS = 3, 3
VAL, TEST = 2, 3
"""Batches of validation and test images; one pass evaluates the weights and their moving average."""
PLAIN = {"epochs": 3, "batch_size": 64, "train_fraction": 0.1, "lr": 3e-3}


class Killed(Exception):
    """Stands for the end of the process."""


def train(folder: Path, options: dict[str, Any] = RICH, **more: Any) -> engine.TrainResult:
    return engine.train(Config.build(**options | {"out": str(folder), "keep_resume": True} | more))


def resume(folder: Path) -> engine.TrainResult:
    return engine.train(Config.build(resume=str(folder)))


def flags(options: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def results(folder: Path) -> dict[str, Any]:
    """Return all results of a run except times."""
    lines = [json.loads(line) for line in (folder / Run.METRICS).read_text().splitlines()]
    summary = json.loads((folder / Run.SUMMARY).read_text())
    state, metadata = checkpoint.load_weights(folder / Run.STATE)
    progress = metadata["progress"]
    return {
        "files": sorted(path.name for path in folder.iterdir()),
        "last": (folder / Run.LAST).read_bytes(),
        "best": (folder / Run.BEST).read_bytes(),
        "metrics": [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines],
        "test": [summary[name] for name in ("test_loss", "test_top1", "val_top1", "best_epoch", "images_seen")],
        "state": {name: tensor.numpy().tobytes() for name, tensor in state.items()},
        "numbers": [metadata["optimizer"], *(progress[name] for name in ("epoch", "step", "best_epoch"))],
    }


def progress(folder: Path) -> tuple[int, int]:
    """Epochs, and steps of the next one, in a run's checkpoint."""
    said = checkpoint.load_weights(folder / Run.STATE)[1]["progress"]
    return said["epoch"], said["step"]


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (Run.STATE, Run.BEST, Run.LAST)}


def after_each_step(monkeypatch: pytest.MonkeyPatch, happens: Callable[[int, Setup], None]) -> None:
    """Call a function between the n-th step, counted from 1 at every start, and the Checkpointer's turn."""
    original, begun = engine.train_step, []

    def step(setup: Setup, *arguments: Any) -> Tensor:
        loss = original(setup, *arguments)
        begun.append(1)
        happens(len(begun), setup)
        return loss

    monkeypatch.setattr(engine, "train_step", step)


def signal_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    after_each_step(monkeypatch, lambda n, _: signal.raise_signal(number) if n == step else None)


def signal_during_evaluation(monkeypatch: pytest.MonkeyPatch, split: str, moment: int) -> None:
    """Send SIGINT before the n-th batch of a split is evaluated, counted over all epochs."""
    original, seen = Setup.evaluation_batches, []

    def batches(self: Setup, name: str) -> Iterator[Any]:
        for batch in original(self, name):
            seen.append(name)
            if name == split and seen.count(split) == moment:
                signal.raise_signal(signal.SIGINT)
            yield batch

    monkeypatch.setattr(Setup, "evaluation_batches", batches)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Train without interruption; the best epoch is not the last one, so that confusing them would show."""
    values = results(train(tmp_path_factory.mktemp("runs") / "whole").folder)
    assert values["last"] != values["best"]
    assert len(values["metrics"]) == EPOCHS
    return values


@pytest.mark.parametrize("step", slow_except([1, 5, EPOCHS * STEPS], 5))
def test_a_run_interrupted_after_any_step_ends_as_if_it_had_not_been(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patch:
        signal_after(patch, step)
        with pytest.raises(SignalInterrupt):
            train(tmp_path / "run")
    assert progress(tmp_path / "run") == ((step - 1) // STEPS, (step - 1) % STEPS + 1)
    assert results(resume(tmp_path / "run").folder) == whole


@pytest.mark.slow
@pytest.mark.parametrize("moment", slow_except([1, 3, 4, VAL * EPOCHS], 3))
def test_a_run_interrupted_while_it_validates_ends_as_if_it_had_not_been(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    with monkeypatch.context() as patch:
        signal_during_evaluation(patch, "val", moment)
        with pytest.raises(SignalInterrupt):
            train(tmp_path / "run")
    assert progress(tmp_path / "run") == ((moment - 1) // VAL, STEPS)
    assert results(resume(tmp_path / "run").folder) == whole


@pytest.mark.slow
@pytest.mark.parametrize("moment", slow_except(range(1, TEST + 1), 2))
def test_a_run_interrupted_while_it_is_tested_ends_as_if_it_had_not_been(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    with monkeypatch.context() as patch:
        signal_during_evaluation(patch, "test", moment)
        with pytest.raises(SignalInterrupt):
            train(tmp_path / "run")
    assert not (tmp_path / "run" / Run.SUMMARY).exists()
    assert results(resume(tmp_path / "run").folder) == whole


@pytest.mark.slow
@pytest.mark.parametrize("opt", ["lamb", "adamw"])
def test_a_run_interrupted_after_every_step_ends_as_if_it_had_not_been(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opt: str
) -> None:
    expected = whole if opt == "lamb" else results(train(tmp_path / "whole", opt=opt).folder)
    interruptions = 0
    while not (tmp_path / "run" / Run.SUMMARY).exists():
        assert interruptions <= EPOCHS * STEPS
        with monkeypatch.context() as patch:
            signal_after(patch, 1)
            try:
                train(tmp_path / "run", opt=opt, auto_resume=True)
            except SignalInterrupt:
                interruptions += 1
    assert interruptions == EPOCHS * STEPS
    assert results(tmp_path / "run") == expected


@pytest.mark.slow
def test_streamed_images_resume_from_any_step(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"data": str(image_folder), "streaming": "on", "workers": 0, "aug": "deit", "epochs": 2, "batch_size": 16}
    expected = results(train(tmp_path / "whole", options).folder)
    interruptions = 0
    while not (tmp_path / "run" / Run.SUMMARY).exists():
        with monkeypatch.context() as patch:
            signal_after(patch, 2)
            try:
                train(tmp_path / "run", options, auto_resume=True)
            except SignalInterrupt:
                interruptions += 1
    assert interruptions >= 2
    assert results(tmp_path / "run") == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_as_an_interrupt_that_knows_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    signal_after(monkeypatch, 2, number)
    with pytest.raises(KeyboardInterrupt) as ended:
        train(tmp_path / "run", PLAIN)
    assert ended.value.number == number
    assert progress(tmp_path / "run") == (0, 2)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize(
    ("sent", "apart", "code", "saved"),
    [
        ([INT], True, 130, True),
        ([TERM], True, 143, True),
        ([INT, INT], True, 130, False),
        ([TERM, INT], True, 130, False),
        ([TERM, TERM], True, 143, True),  # as impatient schedulers send
        ([INT, INT], False, 130, True),  # one and the same, by several ways
        ([TERM, INT], False, 143, True),
    ],
)
def test_the_exit_code_tells_the_signal_and_only_a_second_ctrl_c_does_not_wait(
    smallvit: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sent: list[int],
    apart: bool,
    code: int,
    saved: bool,
) -> None:
    def send(step: int, _: Setup) -> None:
        for number in sent if step == 2 else ():
            signal.raise_signal(number)

    monkeypatch.setattr(signals, "TWICE_SECONDS", 0.0 if apart else 60.0)
    after_each_step(monkeypatch, send)
    ended, _, err = smallvit("train", *flags(PLAIN), "--out", tmp_path / "run")
    assert ended == code
    assert err.endswith(f"interrupted; resume with: smallvit train --resume {tmp_path / 'run'}\n")
    assert (tmp_path / "run" / Run.STATE).exists() == saved


def test_a_checkpoint_within_an_epoch_is_enough_to_go_on_after_a_crash(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(step: int, _: Setup) -> None:
        if step == STEPS + 3:
            raise Killed

    with monkeypatch.context() as patch:
        after_each_step(patch, crash)
        with pytest.raises(Killed):
            train(tmp_path / "run", checkpoint_minutes=1e-9)
    assert progress(tmp_path / "run") == (1, 2)
    assert results(resume(tmp_path / "run").folder) == whole


def test_without_a_reason_there_is_no_checkpoint_within_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(step: int, _: Setup) -> None:
        assert not (tmp_path / "run" / Run.STATE).exists(), step

    after_each_step(monkeypatch, look)
    train(tmp_path / "run", PLAIN | {"epochs": 1})
    assert progress(tmp_path / "run") == (1, 0)


@pytest.mark.slow
def test_the_weights_of_the_latest_epochs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, lasts = tmp_path / "run", {}
    monkeypatch.setattr(
        TrainingProgress, "epoch", lambda _, figures: lasts.update({figures["epoch"]: (folder / Run.LAST).read_bytes()})
    )
    train(folder, PLAIN | {"epochs": 4, "keep": 2})
    assert len(set(lasts.values())) == 4
    kept = {path.name: path.read_bytes() for path in folder.glob("epoch-*")}
    assert kept == {"epoch-0003.safetensors": lasts[3], "epoch-0004.safetensors": lasts[4]}
    model, last = package.load_model(folder / "epoch-0004.safetensors"), package.load_model(folder, "last")
    image = torch.randn(2, 1, 8, 8)
    assert torch.equal(model(image), last(image))
    train(folder, PLAIN | {"epochs": 1, "overwrite": True})
    assert not list(folder.glob("epoch-*"))


@pytest.mark.slow
def test_an_interruption_does_not_change_which_epochs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "whole", keep=2)
    for split, moment in (("val", VAL + 1), ("test", 2)):
        with monkeypatch.context() as patch:
            signal_during_evaluation(patch, split, moment)
            with pytest.raises(SignalInterrupt):
                train(tmp_path / "run", keep=2, auto_resume=True)
    resume(tmp_path / "run")
    assert results(tmp_path / "run") == results(tmp_path / "whole")
    for path in (tmp_path / "whole").glob("epoch-*"):
        assert (tmp_path / "run" / path.name).read_bytes() == path.read_bytes()


def with_loss(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, Tensor], Tensor]) -> None:
    """Change the value of the loss at the n-th step, counted from 1."""
    original, steps = Objective.__call__, []

    def objective(self: Objective, *arguments: Any) -> dict[str, Tensor]:
        steps.append(1)
        outputs = original(self, *arguments)
        return outputs | {"loss": change(len(steps), outputs["loss"])}

    monkeypatch.setattr(Objective, "__call__", objective)


SECOND_EPOCH = 3  # PLAIN's epochs have 3 steps


@pytest.mark.parametrize("minutes", [10.0, 1e-9])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_and_spoils_no_checkpoint(
    smallvit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float, value: float
) -> None:
    folder, before = tmp_path / "run", {}

    def spoil(step: int, loss: Tensor) -> Tensor:
        if step == SECOND_EPOCH + 2:
            before.update(contents(folder))
        return loss * value if step >= SECOND_EPOCH + 2 else loss

    monkeypatch.setattr(checkpointing, "EPOCH_SECONDS", 0)
    with_loss(monkeypatch, spoil)
    options = flags(PLAIN | {"checkpoint_minutes": minutes})
    code, _, err = smallvit("train", *options, "--out", folder)
    assert code == 1
    assert err.count("\n") == 1
    assert f"the loss became {value} in epoch 2, step 2, at learning rate 0.0" in err
    assert str(folder / Run.BEST) in err
    assert contents(folder) == before
    assert not [path for path in folder.iterdir() if "partial" in path.name]


@pytest.mark.slow
@pytest.mark.parametrize("cause", ["time", "signal", "epoch"])
def test_weights_that_are_not_finite_never_reach_a_checkpoint(
    smallvit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    """They are spoilt after the loss was computed, which is finite, just before a checkpoint of each kind."""
    folder, before = tmp_path / "run", {}
    at = SECOND_EPOCH + (3 if cause == "epoch" else 2)

    def spoil(step: int, setup: Setup) -> None:
        if step == at:
            before.update(contents(folder))
            with torch.no_grad():
                setup.model.blocks[2].mlp.fc1.weight[3, 5] = math.nan
            if cause == "signal":
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(checkpointing, "EPOCH_SECONDS", 0)
    after_each_step(monkeypatch, spoil)
    options = PLAIN | {"checkpoint_minutes": 1e-9 if cause == "time" else 10.0}
    code, _, err = smallvit("train", *flags(options), "--out", folder, "--keep-resume")
    assert code == 1
    assert "weights are no longer finite in epoch " in err
    assert contents(folder) == before
    monkeypatch.undo()
    resume(folder)  # from the checkpoint before
    assert results(folder)["last"] == results(train(tmp_path / "whole", PLAIN).folder)["last"]


def with_a_hook(monkeypatch: pytest.MonkeyPatch, hook: Callable[..., None]) -> None:
    """Have every forward pass of the model that is trained call this."""
    original = _setup.create_setup

    def create(*arguments: Any, **options: Any) -> Setup:
        setup = original(*arguments, **options)
        setup.model.register_forward_hook(hook)
        return setup

    monkeypatch.setattr(engine, "create_setup", create)


def exhaust_the_device(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of ...")


def exhaust_the_machine(*_: object) -> None:
    torch.empty(2**60)


@pytest.mark.parametrize("exhaust", [exhaust_the_device, exhaust_the_machine])
def test_out_of_memory_gives_an_error_of_one_line_with_a_remedy(
    smallvit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exhaust: Callable[..., None]
) -> None:
    with_a_hook(monkeypatch, exhaust)
    code, _, err = smallvit("train", *flags(PLAIN), "--out", tmp_path / "run")
    assert code == 1
    assert err.count("\n") == 1
    assert "out of memory in steps of 64 images of 8 pixels" in err
    for help_ in ("--grad-accum-steps 2", "--grad-checkpointing", "--batch-size", "--amp bf16"):
        assert help_ in err
    assert not (tmp_path / "run").exists()


def test_other_errors_pass_through_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    def fail(*_: object) -> None:
        raise error

    with_a_hook(monkeypatch, fail)
    with pytest.raises(RuntimeError) as raised:
        train(tmp_path / "run", PLAIN)
    assert raised.value is error


def overflow_in_each_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a gradient overflow in the second step of every epoch."""
    original = engine.backward

    def backward(setup: Setup, images: Tensor, targets: Tensor, position: tuple[int, int]) -> Tensor:
        share = original(setup, images, targets, position)
        if position[1] == 1:
            setup.model.blocks[1].mlp.fc1.weight.grad[0, 0] = math.inf
        return share

    monkeypatch.setattr(engine, "backward", backward)


@pytest.mark.slow
def test_fp16_runs_skip_count_and_resume_as_if_they_had_not_been_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflow_in_each_epoch(monkeypatch)
    options = PLAIN | {"amp": "fp16", "patch_size": 4, "ema_decay": 0.9, "clip_grad": 1.0}
    whole = train(tmp_path / "whole", options)
    assert (whole.summary["precision"], whole.summary["skipped_steps"]) == ("fp16", 3)
    lines = [json.loads(line) for line in (whole.folder / Run.METRICS).read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [1, 2, 3]

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_after(patch, 5)
        with pytest.raises(SignalInterrupt):
            train(folder, options)
    state = checkpoint.load_weights(folder / Run.STATE)[1]["progress"]
    assert (state["scaler"]["scale"], state["scaler"]["skipped"]) == (2.0**14, 2)
    assert resume(folder).summary["skipped_steps"] == 3
    assert results(folder) == results(whole.folder)
    scalers = [checkpoint.load_weights(each / Run.STATE)[1]["progress"]["scaler"] for each in (folder, whole.folder)]
    assert scalers[0] == scalers[1]


def test_async_scalar_returns_the_previous_value() -> None:
    scalar = AsyncScalar(torch.device("cpu"))
    value = torch.tensor(1.5)
    seen = [scalar.exchange(value)]
    value.fill_(7.0)  # the stored value is a copy
    seen += [scalar.exchange(torch.tensor(number)) for number in (2.5, 3.5)]
    assert seen == [None, 1.5, 2.5]


@pytest.mark.slow
def test_auto_resume_begins_where_nothing_is_and_goes_on_where_a_run_is(
    smallvit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "deep" / "run"
    command = ["train", *flags(PLAIN), "--out", folder, "--auto-resume", "--keep-resume"]
    with monkeypatch.context() as patch:
        signal_after(patch, 2)
        code, out, _ = smallvit(*command)
    assert (code, "resume after" in out) == (130, False)
    code, out, _ = smallvit(*command)
    assert code == 0
    assert "resume after epoch 1 of 3, step 2" in out
    assert results(folder) == results(train(tmp_path / "whole", PLAIN).folder)
    before = contents(folder)
    code, out, _ = smallvit(*command)
    assert code == 0
    assert f"{folder} is finished already" in out
    assert contents(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize("left", [[], [".config.json.partial"]])
def test_auto_resume_begins_in_a_folder_without_anything_of_use(
    smallvit: Command, tmp_path: Path, left: list[str]
) -> None:
    """Resume in a folder that a run left which was killed while it wrote its first file, too."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in left:
        (folder / name).mkdir()
        (folder / name / Run.CONFIG).write_text('{"arch"')
    assert smallvit("train", *flags(PLAIN), "--out", folder, "--auto-resume", "--keep-resume")[0] == 0
    assert results(folder)["files"] == sorted(
        [Run.CONFIG, Run.METRICS, Run.SUMMARY, Run.LAST, Run.BEST, Run.STATE, Run.CURVES]
    )


def test_auto_resume_leaves_other_folders_alone(smallvit: Command, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    code, _, err = smallvit("train", *flags(PLAIN), "--out", tmp_path, "--auto-resume")
    assert code == 2
    assert "not empty, and not a run" in err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_auto_resume_refuses_options_that_differ(
    smallvit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_after(patch, 1)
        assert smallvit("train", *flags(PLAIN), "--out", folder)[0] == 130
    before = contents_present(folder)
    code, _, err = smallvit("train", *flags(PLAIN | {"lr": 0.5}), "--out", folder, "--auto-resume")
    assert code == 2
    assert f"--lr 0.5: the run in {folder} has 0.003" in err
    assert contents_present(folder) == before


def contents_present(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_auto_resume_needs_a_folder(smallvit: Command) -> None:
    code, _, err = smallvit("train", "--auto-resume")
    assert code == 2
    assert "--auto-resume needs --out DIR" in err
    with pytest.raises(InputError, match="without --overwrite"):
        Config.build(auto_resume=True, out="run", overwrite=True)
