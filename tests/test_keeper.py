"""Interruptions at any moment, checkpoints, divergence and lack of memory: what is saved, what ends a run, and that it
goes on as if nothing had been."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import smallvit as package
from smallvit import Config, InputError, checkpoint, engine, interrupt, keeper, objectives
from smallvit.hardware import Glimpse
from smallvit.interrupt import Interrupted
from smallvit.progress import TrainingProgress
from smallvit.runs import Run
from smallvit.setup import Setup

Command = Callable[..., tuple[int, str, str]]

RICH = {
    "spt": True,
    "lsa": True,
    "plugin_init": "exact",
    "aug": "paper",
    "repeats": 3,
    "accumulate": 3,
    "clip_grad": 1.0,
    "ema": 0.9,
    "dropout": 0.1,
    "drop_path": 0.2,
    "opt": "lamb",
    "lr": 0.03,
    "sched": "constant",
    "epochs": 3,
    "batch_size": 48,
    "train_fraction": 0.1,
}
"""Everything on that keeps a state or draws random numbers."""
EPOCHS, STEPS = 3, 3
VAL, TEST = 2, 3
"""Batches of validation and test images; with --ema validation runs twice."""
PLAIN = {"epochs": 3, "batch_size": 64, "train_fraction": 0.1, "lr": 3e-3}


class Killed(Exception):
    """Stands for the end of the process."""


def train(folder: Path, options: dict[str, Any] = RICH, **more: Any) -> engine.Result:
    return engine.train(Config.build(**options | {"out": str(folder)} | more))


def resume(folder: Path) -> engine.Result:
    return engine.train(Config.build(resume=str(folder)))


def flags(options: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def results(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but for its times."""
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
        "numbers": [metadata["optimizer"], *(progress[name] for name in ("epoch", "step", "first_loss", "best_epoch"))],
    }


def progress(folder: Path) -> tuple[int, int]:
    """Epochs, and steps of the next one, in a run's checkpoint."""
    said = checkpoint.load_weights(folder / Run.STATE)[1]["progress"]
    return said["epoch"], said["step"]


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (Run.STATE, Run.BEST, Run.LAST)}


def after_each_step(monkeypatch: pytest.MonkeyPatch, happens: Callable[[int, Setup], None]) -> None:
    """Have something happen between the n-th step, counted from 1 at every start, and what the keeper does then."""
    original, begun = engine.train_step, []

    def step(setup: Setup, *arguments: Any) -> Tensor:
        loss = original(setup, *arguments)
        begun.append(1)
        happens(len(begun), setup)
        return loss

    monkeypatch.setattr(engine, "train_step", step)


def signal_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    after_each_step(monkeypatch, lambda n, _: signal.raise_signal(number) if n == step else None)


def signal_while_judging(monkeypatch: pytest.MonkeyPatch, split: str, moment: int) -> None:
    """Send SIGINT when the n-th batch of a split is at hand, over all epochs."""
    original, seen = Setup.evaluation_batches, []

    def batches(self: Setup, wanted: str) -> Iterator[Any]:
        for batch in original(self, wanted):
            seen.append(wanted)
            if wanted == split and seen.count(split) == moment:
                signal.raise_signal(signal.SIGINT)
            yield batch

    monkeypatch.setattr(Setup, "evaluation_batches", batches)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An undisturbed run; the best epoch is not the last, so that mistaking one for the other would show."""
    found = results(train(tmp_path_factory.mktemp("runs") / "whole").folder)
    assert found["last"] != found["best"]
    assert len(found["metrics"]) == EPOCHS
    return found


@pytest.mark.parametrize("step", range(1, EPOCHS * STEPS + 1))
def test_a_run_interrupted_after_any_step_ends_as_if_it_had_not_been(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patch:
        signal_after(patch, step)
        with pytest.raises(Interrupted):
            train(tmp_path / "run")
    assert progress(tmp_path / "run") == ((step - 1) // STEPS, (step - 1) % STEPS + 1)
    assert results(resume(tmp_path / "run").folder) == whole


@pytest.mark.parametrize("moment", [1, 6, 7, 2 * VAL * EPOCHS])
def test_a_run_interrupted_while_it_validates_ends_as_if_it_had_not_been(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    with monkeypatch.context() as patch:
        signal_while_judging(patch, "val", moment)
        with pytest.raises(Interrupted):
            train(tmp_path / "run")
    assert progress(tmp_path / "run") == ((moment - 1) // (2 * VAL), STEPS)
    assert results(resume(tmp_path / "run").folder) == whole


@pytest.mark.parametrize("moment", range(1, TEST + 1))
def test_a_run_interrupted_while_it_is_tested_ends_as_if_it_had_not_been(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    with monkeypatch.context() as patch:
        signal_while_judging(patch, "test", moment)
        with pytest.raises(Interrupted):
            train(tmp_path / "run")
    assert not (tmp_path / "run" / Run.SUMMARY).exists()
    assert results(resume(tmp_path / "run").folder) == whole


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
            except Interrupted:
                interruptions += 1
    assert interruptions == EPOCHS * STEPS
    assert results(tmp_path / "run") == expected


def test_images_read_from_disk_go_on_from_any_step_too(
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
            except Interrupted:
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

    monkeypatch.setattr(interrupt, "TWICE_SECONDS", 0.0 if apart else 60.0)
    after_each_step(monkeypatch, send)
    ended, _, err = smallvit("train", *flags(PLAIN), "--out", tmp_path / "run")
    assert ended == code
    assert err.endswith(f"interrupted; go on with: smallvit train --resume {tmp_path / 'run'}\n")
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


def test_the_weights_of_the_latest_epochs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, lasts = tmp_path / "run", {}
    monkeypatch.setattr(
        TrainingProgress, "epoch", lambda _, figures: lasts.update({figures["epoch"]: (folder / Run.LAST).read_bytes()})
    )
    train(folder, PLAIN | {"epochs": 4, "keep": 2})
    assert len(set(lasts.values())) == 4
    kept = {path.name: path.read_bytes() for path in folder.glob("epoch-*")}
    assert kept == {"epoch-0003.safetensors": lasts[3], "epoch-0004.safetensors": lasts[4]}
    model, last = package.load(folder / "epoch-0004.safetensors"), package.load(folder, "last")
    image = torch.randn(2, 1, 8, 8)
    assert torch.equal(model(image), last(image))
    train(folder, PLAIN | {"epochs": 1, "overwrite": True})
    assert not list(folder.glob("epoch-*"))


def test_an_interruption_does_not_change_which_epochs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "whole", keep=2)
    for moment in (7, 13):  # in the second epoch's validation, and in the test
        with monkeypatch.context() as patch:
            signal_while_judging(patch, "val" if moment == 7 else "test", moment if moment == 7 else 2)
            with pytest.raises(Interrupted):
                train(tmp_path / "run", keep=2, auto_resume=True)
    resume(tmp_path / "run")
    assert results(tmp_path / "run") == results(tmp_path / "whole")
    for path in (tmp_path / "whole").glob("epoch-*"):
        assert (tmp_path / "run" / path.name).read_bytes() == path.read_bytes()


def with_loss(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, Tensor], Tensor]) -> None:
    """Change the value of the loss at the n-th step, counted from 1."""
    original, steps = objectives.supervised, []

    def supervised(*arguments: Any, **options: Any) -> dict[str, Tensor]:
        steps.append(1)
        found = original(*arguments, **options)
        return found | {"loss": change(len(steps), found["loss"])}

    monkeypatch.setattr(objectives, "supervised", supervised)


SECOND_EPOCH = 3  # PLAIN's epochs have 3 steps


@pytest.mark.parametrize(("grown", "code"), [(2.9, 0), (3.1, 1)])
def test_a_loss_that_grows_beyond_three_times_the_first_ends_the_run(
    smallvit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grown: float, code: int
) -> None:
    folder, before = tmp_path / "run", {}

    def grow(step: int, loss: Tensor) -> Tensor:
        if step == SECOND_EPOCH + 1:
            before.update(contents(folder))
        return 0 * loss + 4.0 * (grown if step > SECOND_EPOCH else 1)

    monkeypatch.setattr(keeper, "EPOCH_SECONDS", 0)
    with_loss(monkeypatch, grow)
    ended, _, err = smallvit("train", *flags(PLAIN), "--out", folder)
    assert ended == code
    if code:
        assert err.count("\n") == 1
        for said in ("grown to 12.4 in epoch 2, from 4", "at learning rate 0.0", "lower --lr", str(folder / Run.BEST)):
            assert said in err
        assert contents(folder) == before


def test_a_learning_rate_far_too_high_is_noticed(smallvit: Command, tmp_path: Path) -> None:
    options = PLAIN | {"opt": "sgd", "lr": 1e3, "epochs": 30, "warmup": 0.0}
    code, _, err = smallvit("train", *flags(options), "--out", tmp_path / "run")
    assert code == 1
    assert err.count("\n") == 1
    assert "at learning rate 1e+03: try a lower --lr" in err


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

    monkeypatch.setattr(keeper, "EPOCH_SECONDS", 0)
    with_loss(monkeypatch, spoil)
    options = flags(PLAIN | {"checkpoint_minutes": minutes})
    code, _, err = smallvit("train", *options, "--out", folder)
    assert code == 1
    assert err.count("\n") == 1
    assert f"the loss became {value} in epoch 2, step 2, at learning rate 0.0" in err
    assert str(folder / Run.BEST) in err
    assert contents(folder) == before
    assert not [path for path in folder.iterdir() if "partial" in path.name]


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

    monkeypatch.setattr(keeper, "EPOCH_SECONDS", 0)
    after_each_step(monkeypatch, spoil)
    options = PLAIN | {"checkpoint_minutes": 1e-9 if cause == "time" else 10.0}
    code, _, err = smallvit("train", *flags(options), "--out", folder)
    assert code == 1
    assert "weights are no longer finite in epoch " in err
    assert contents(folder) == before
    monkeypatch.undo()
    resume(folder)  # and there it goes on
    assert results(folder)["last"] == results(train(tmp_path / "whole", PLAIN).folder)["last"]


def with_a_hook(monkeypatch: pytest.MonkeyPatch, hook: Callable[..., None]) -> None:
    """Have every forward pass of the model that is trained call this."""
    original = engine.prepare

    def prepare(*arguments: Any, **options: Any) -> Setup:
        setup = original(*arguments, **options)
        setup.model.register_forward_hook(hook)
        return setup

    monkeypatch.setattr(engine, "prepare", prepare)


def exhaust_the_device(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of ...")


def exhaust_the_machine(*_: object) -> None:
    torch.empty(2**60)


@pytest.mark.parametrize("exhaust", [exhaust_the_device, exhaust_the_machine])
def test_a_lack_of_memory_is_told_in_one_line_that_helps(
    smallvit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exhaust: Callable[..., None]
) -> None:
    with_a_hook(monkeypatch, exhaust)
    code, _, err = smallvit("train", *flags(PLAIN), "--out", tmp_path / "run")
    assert code == 1
    assert err.count("\n") == 1
    assert "out of memory in steps of 64 images of 8 pixels" in err
    for help_ in ("--accumulate 2", "--grad-checkpointing", "--batch-size", "--amp bf16"):
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


def test_a_glimpse_shows_what_was_left_the_time_before() -> None:
    glimpse = Glimpse(torch.device("cpu"))
    value = torch.tensor(1.5)
    seen = [glimpse.exchange(value)]
    value.fill_(7.0)  # what was left is a copy
    seen += [glimpse.exchange(torch.tensor(number)) for number in (2.5, 3.5)]
    assert seen == [None, 1.5, 2.5]


def test_auto_resume_begins_where_nothing_is_and_goes_on_where_a_run_is(
    smallvit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "deep" / "run"
    command = ["train", *flags(PLAIN), "--out", folder, "--auto-resume"]
    with monkeypatch.context() as patch:
        signal_after(patch, 2)
        code, out, _ = smallvit(*command)
    assert (code, "resume after" in out) == (130, False)
    code, out, _ = smallvit(*command)
    assert code == 0
    assert "resume after epoch 0 and 2 steps of 3" in out
    assert results(folder) == results(train(tmp_path / "whole", PLAIN).folder)
    before = contents(folder)
    code, out, _ = smallvit(*command)
    assert code == 0
    assert f"{folder} is finished already" in out
    assert contents(folder) == before


@pytest.mark.parametrize("left", [[], [".config.json.partial"]])
def test_auto_resume_begins_in_a_folder_without_anything_of_use(
    smallvit: Command, tmp_path: Path, left: list[str]
) -> None:
    """The second: what is left of a run that was killed while it wrote its first file."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in left:
        (folder / name).mkdir()
        (folder / name / Run.CONFIG).write_text('{"arch"')
    assert smallvit("train", *flags(PLAIN), "--out", folder, "--auto-resume")[0] == 0
    assert results(folder)["files"] == sorted(
        [Run.CONFIG, Run.METRICS, Run.SUMMARY, Run.LAST, Run.BEST, Run.STATE, Run.CURVES]
    )


def test_auto_resume_leaves_other_folders_alone(smallvit: Command, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    code, _, err = smallvit("train", *flags(PLAIN), "--out", tmp_path, "--auto-resume")
    assert code == 2
    assert "not empty, and no run" in err
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
