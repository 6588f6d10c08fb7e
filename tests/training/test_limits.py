"""Limits of time, by clocks that do not depend on the machine, and of memory, by errors that are made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from smallvit import Config, InputError
from smallvit.runs.run import Run
from smallvit.training import checkpointing, limits, setup
from smallvit.training import train as engine
from smallvit.training.launch import open_run
from smallvit.training.limits import TimeBudget
from smallvit.utils.terminal import TrainingProgress

TINY = {"arch": "vit", "aug": "none", "patch_size": 4, "train_fraction": 0.2, "batch_size": 32, "device": "cpu"}


class Clock:
    """A clock that only the test advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(limits, "monotonic", lambda: self.now)

    def after(self, function: Callable[..., Any], seconds: Callable[[Any], float]) -> Callable[..., Any]:
        """Return a function that takes a time that depends on its result."""

        def timed(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            self.now += seconds(result)
            return result

        return timed


def simulate(clock: Clock, limit: float, epoch_steps: int, step: Callable[[float], float], val: float) -> list[float]:
    """Return the progress of the schedule at each step of a run of which the test takes twice as long as an epoch's
    evaluation; `step` gives the time of a step at a time."""
    clock.now = 0.0
    budget = TimeBudget(limit, epoch_steps, 100, 200)
    clock.now += 0.04 * limit  # imports, images
    budget.measured(10, val / 8)  # the estimate is a quarter too high
    progress: list[float] = []
    while not budget.finished:
        for _ in range(epoch_steps):
            progress.append(budget.advance())
            clock.now += step(clock.now) * (1 if len(progress) > 1 else 20)  # the first one compiles
            if budget.finished:
                break
        validated = not budget.skips_validation
        clock.now += val * validated
        budget.end_epoch(val * validated, validated=validated)
    clock.now += 2 * val + 1
    return progress


def test_a_run_ends_in_time_with_its_schedule_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    slower: Callable[[float], float] = lambda now: 0.1 if now < 60 else 0.3  # noqa: E731, two numbers
    faster: Callable[[float], float] = lambda now: 0.3 if now < 60 else 0.1  # noqa: E731
    for limit, epoch_steps, step, val in (
        (120, 352, lambda _: 0.2, 5.0),  # a partial second epoch
        (120, 10_000, lambda _: 0.2, 4.0),  # less than an epoch
        (120, 7, lambda _: 0.2, 0.5),  # many epochs
        (120, 1, lambda _: 0.2, 0.1),
        (120, 100, slower, 2.0),
        (120, 100, faster, 2.0),
        (3600, 500, lambda _: 0.5, 30.0),
        (600, 20, lambda now: 0.2 + 0.1 * (int(now) % 3), 3.0),
    ):
        progress = simulate(clock, limit, epoch_steps, step, val)
        assert 0.9 * limit <= clock.now <= 1.02 * limit, (limit, epoch_steps, val, clock.now)
        assert progress[-1] == 1
        rises = [after - before for before, after in pairwise(progress)]
        assert min(rises) >= 0
        assert max(rises) < max(0.05, 8 / len(progress))  # no jump
    assert 0.35 < simulate(clock, 120, 352, lambda _: 0.2, 5.0)[250] < 0.65  # about half of the steps


def test_time_that_does_not_suffice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError, match="5 s have passed before the first step, and evaluation takes about 300 s: give"
    ):
        simulate(Clock(monkeypatch), 120, 10, lambda _: 1.0, 80.0)
    for text in ("0s", "5", "m", "1d", "1.2.3s", "-5m", ""):
        with pytest.raises(InputError, match="expected a time such as 90s, 30m or 1h30m"):
            Config.build(max_time=text)
    assert Config.build(max_time="1h30m").optim.max_seconds == 5400
    assert Config.build(max_time="1.5m").optim.max_seconds == 90


def test_a_run_that_is_resumed_after_its_time_completes_its_schedule_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    budget = TimeBudget(120, 10, 100, 200)
    budget.progress, clock.now = 0.9, 119.0
    budget.measured(10, 1.0)
    assert budget.advance() == 1.0
    assert budget.finished


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Let a step take one second, and the evaluation of an image a fiftieth."""
    clock = Clock(monkeypatch)
    monkeypatch.setattr(engine, "train_step", clock.after(engine.train_step, lambda _: 1.0))
    evaluated = clock.after(setup.evaluate_models, lambda results: sum(each["images"] for each in results) / 50)
    monkeypatch.setattr(setup, "evaluate_models", evaluated)
    return clock


def fit(config: Config, opened_at: float) -> engine.TrainResult:
    with open_run(config) as run:
        run.opened_at = opened_at
        return engine.fit(run)


def test_a_run_with_max_time_resumes_in_the_time_that_is_left(
    tmp_path: Path, timed: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.build(**TINY, out=str(tmp_path / "run"), max_time="100s", keep_resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "EPOCH_SECONDS", 0)

        def stop(_: TrainingProgress, figures: dict[str, Any]) -> None:
            if figures["epoch"] == 3:
                raise KeyboardInterrupt

        patch.setattr(TrainingProgress, "epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(config, 0.0)
    used, timed.now = timed.now, 10_000.0
    summary = fit(Config.build(resume=str(tmp_path / "run")), 10_000.0).summary
    assert 90 <= used + timed.now - 10_000 <= 100
    assert summary["max_seconds"] == 100
    assert 90 <= summary["elapsed_seconds"] <= 100
    lines = [json.loads(line) for line in (tmp_path / "run" / Run.METRICS).read_text().splitlines()]
    assert len(lines) == summary["epochs"] > 5
    assert lines[-1]["val_top1"] is not None
    assert lines[-1]["lr"] == pytest.approx(config.optim.min_lr)
    assert [line["lr"] for line in lines[2:]] == sorted((line["lr"] for line in lines[2:]), reverse=True)
    assert summary["images_seen"] % 29 == 0  # 258 images in nine steps of 29
    with pytest.raises(InputError, match="ended by --max-time or --patience"):
        open_run(Config.build(resume=str(tmp_path / "run"), epochs=500))


def test_training_stops_when_the_selected_metric_no_longer_improves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = iter([10.0, 30.0, 20.0, 30.0, 29.0, *[50.0] * 9])
    original = setup.Setup.evaluate_models

    def evaluate(self: setup.Setup, split: str, models: Any, **options: Any) -> list[dict[str, float]]:
        (result,) = original(self, split, models, **options)
        return [result if split == "test" else result | {"macro_f1": next(values), "loss": 1.0}]

    monkeypatch.setattr(setup.Setup, "evaluate_models", evaluate)
    config = Config.build(**TINY, out=str(tmp_path / "run"), epochs=9, patience=3, select_by="macro_f1")
    summary = engine.train(config).summary
    assert (summary["epochs"], summary["best_epoch"], summary["val_macro_f1"]) == (5, 2, 30)
    assert "stop   macro_f1 has not improved since epoch 2" in capsys.readouterr().out
    seldom = engine.train(Config.build(**TINY, out=str(tmp_path / "seldom"), epochs=20, patience=2, val_interval=3))
    lines = [json.loads(line) for line in (seldom.folder / Run.METRICS).read_text().splitlines()]
    assert lines[-1]["val_top1"] is not None
    with pytest.raises(InputError, match="--patience 3: needs validation images"):
        engine.train(config.replace(out=str(tmp_path / "other"), val_fraction=0.0))


def test_the_largest_batch_that_fits_is_chosen_and_scales_the_learning_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.build(**TINY | {"batch_size": "auto", "epochs": 1, "out": str(tmp_path / "run")})
    with pytest.raises(InputError, match="--batch-size auto is for GPUs: a CPU's memory does not limit the batch"):
        engine.train(config)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(limits, "WITHOUT_LIMIT", ())
    original, sizes, rates = engine.train_step, [], []

    def step(own: setup.Setup, epoch: int, number: int, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        rates.append(own.optimizer.param_groups[0]["lr"])
        if len(images) > 70:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(own, epoch, number, images, targets)

    monkeypatch.setattr(engine, "train_step", step)
    engine.train(config)
    stored = json.loads((tmp_path / "run" / Run.CONFIG).read_text())
    assert (stored["batch_size"], stored["lr_base_size"]) == (64, 128)
    assert max(sizes[-3:]) <= 64 < max(sizes)
    made = setup.create_setup(Config.from_dict(stored))
    made.schedule.step_update(1 + round(0.1 * made.steps))
    assert made.optimizer.param_groups[0]["lr"] <= 1e-3 * 64 / 128
    with open_run(Config.build(resume=str(tmp_path / "run"), batch_size="auto")) as run:  # the same command resumes
        assert run.config.optim.batch_size == 64
    monkeypatch.setattr(engine, "train_step", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(InputError, match="--batch-size auto: not even 16 images fit into memory"):
        engine.train(config.replace(out=str(tmp_path / "other")))
