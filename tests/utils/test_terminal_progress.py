"""Test the progress of training with a fake clock."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from smallvit.utils.terminal import TrainingProgress


class Clock:
    """A clock that only the test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("smallvit.utils.terminal.time.monotonic", clock)
    return clock


def test_the_time_left_after_resuming_is_of_this_processs_speed_and_the_steps_left(clock: Clock) -> None:
    for terminal in (True, False):
        output, clock.now = io.StringIO(), 0
        with TrainingProgress(Console(file=output, force_terminal=terminal, width=80), 1000, 100) as display:
            display.begin(54)  # in epoch 6, after step 4
            clock.now += 60  # the first step compiles the model
            display.step(55, 1.5, 100.0)
            display.refresh()
            assert "left" not in output.getvalue()
            clock.now += 40
            display.step(75, 1.5, 100.0)  # 2 s for each of 20 steps, and 925 are left
            display.refresh()
        assert "epoch 8/100" in output.getvalue()
        assert "0:30:50 left" in output.getvalue()


def test_a_terminal_of_80_columns_shows_every_figure_of_a_long_run(clock: Clock) -> None:
    output = io.StringIO()
    figures = {"epoch": 299, "train_loss": 1.5, "val_loss": 1.0, "val_top1": 42.0, "images_per_second": 12345.0}
    with TrainingProgress(Console(file=output, force_terminal=True, width=80), 300_000, 300) as display:
        display.step(1, 1.5, 100.0)
        clock.now += 60_000
        display.epoch(figures)
        display.refresh()
    bar = output.getvalue().split("\n")[-2]
    for shown in ("epoch 299/300", "loss 1.500", "val top-1 42.00 %", "12,345 images/s", "0:03:21 left"):
        assert shown in bar
    line = "epoch 299/300  loss 1.500  val loss 1.000  val top-1 42.00 %  12,345 images/s\n"
    assert line in output.getvalue()


def test_plain_output_has_a_line_per_half_minute_and_epoch(clock: Clock) -> None:
    output = io.StringIO()
    with TrainingProgress(Console(file=output), steps=40, epochs=4) as display:
        for step in range(1, 11):
            clock.now += 10
            display.step(step, 1.5, 100.0)
        display.epoch({"epoch": 1, "train_loss": 1.5, "val_top1": None, "images_per_second": 100.0})
    lines = output.getvalue().splitlines()
    assert len(lines) == 3
    assert all("epoch 1/4" in line and line.endswith(" left") for line in lines)
