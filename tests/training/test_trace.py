"""--profile: the trace and the table of where a step's time goes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from smallvit.runs.run import Run

Command = Callable[..., tuple[int, str, str]]

FLAGS = [
    "train",
    "--lsa",
    "--patch-size",
    "4",
    "--train-fraction",
    "0.1",
    "--batch-size",
    "32",
    "--grad-accum-steps",
    "2",
]
"""Five steps an epoch."""
STAGES = ["forward", "backward", "optimizer", "moving average"]


@pytest.fixture
def profiled(smallvit: Command, tmp_path: Path) -> tuple[Path, str]:
    """Train for ten steps, just enough, and return the run and the printed text."""
    out = tmp_path / "run"
    code, shown, _ = smallvit(*FLAGS, "--epochs", 2, "--ema-decay", 0.9, "--profile", "--out", out)
    assert code == 0
    return out, shown


@pytest.mark.slow
def test_a_profile_is_a_trace_to_open_and_a_table_to_read(profiled: tuple[Path, str]) -> None:
    out, shown = profiled
    assert f"trace  {out / Run.TRACE}" in shown
    events = [each for each in json.loads((out / Run.TRACE).read_text())["traceEvents"] if each.get("ph") == "X"]
    counts = {stage: sum(each["name"] == stage for each in events) for stage in STAGES}
    assert counts == {"forward": 10, "backward": 10, "optimizer": 5, "moving average": 5}  # 5 steps, of 2 parts
    text = (out / Run.PROFILE).read_text()
    assert "aten::addmm" in text or "aten::linear" in text


def test_too_few_steps_for_a_profile_give_a_note(smallvit: Command, tmp_path: Path) -> None:
    code, shown, _ = smallvit(*FLAGS, "--epochs", 1, "--profile", "--out", tmp_path / "run")
    assert code == 0
    assert "no trace: --profile needs 10 steps" in shown
    assert not (tmp_path / "run" / Run.TRACE).exists()
    assert not (tmp_path / "run" / Run.PROFILE).exists()


@pytest.mark.slow
def test_without_it_nothing_is_recorded_and_the_weights_are_the_same(
    smallvit: Command, tmp_path: Path, profiled: tuple[Path, str]
) -> None:
    code, shown, _ = smallvit(*FLAGS, "--epochs", 2, "--ema-decay", 0.9, "--out", tmp_path / "plain")
    assert code == 0
    assert "trace" not in shown
    assert not {Run.TRACE, Run.PROFILE} & {path.name for path in (tmp_path / "plain").iterdir()}
    for name in (Run.LAST, Run.BEST):
        assert (tmp_path / "plain" / name).read_bytes() == (profiled[0] / name).read_bytes()
