"""`smallvit watch`: what it shows of runs at every stage, and what it says of damaged ones."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from smallvit.config.config import Config
from smallvit.runs import curves
from smallvit.runs.run import Run

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Create a run of ten epochs before its first epoch."""
    folder = tmp_path / "vit-spt-digits"
    folder.mkdir()
    (folder / Run.CONFIG).write_text(json.dumps(Config.build(spt=True, epochs=10).to_dict()))
    return folder


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def write(run: Path, epochs: int, **values: Any) -> None:
    """Metrics of the first epochs, in place of those before, as training writes them."""
    lines = [
        {
            "epoch": epoch,
            "train_loss": 2 / epoch,
            "val_loss": 1.5 / epoch,
            "val_top1": 9.0 * epoch,
            "lr": 1e-3 / epoch,
            "images_per_second": 1234.5,
            "seconds": 60.0 * epoch,
        }
        | values
        for epoch in range(1, epochs + 1)
    ]
    (run / "new").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "new").replace(run / Run.METRICS)


def finish(run: Path) -> None:
    (run / Run.SUMMARY).write_text(json.dumps({"test_top1": 91.25, "epochs": 10}))


def test_one_frame_shows_the_run_its_figures_and_three_plots_as_plain_text(smallvit: Command, run: Path) -> None:
    write(run, 4)
    code, out, _ = smallvit("watch", run, "--once")
    assert code == 0
    assert "vit-spt-digits  vit + SPT on digits" in out
    assert "epoch 4/10  best val 36.00 % (epoch 4)  1,234 images/s  0:06:00 left" in out
    for title in ("loss  ⠒ training  • validation", "validation accuracy (%)", "learning rate"):
        assert out.count(title) == 1
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) == 80


def test_a_pipe_gets_one_frame(smallvit: Command, run: Path) -> None:
    write(run, 4)
    assert smallvit("watch", run) == smallvit("watch", run, "--once")


@pytest.mark.parametrize(("columns", "side_by_side"), [(30, 1), (80, 2), (160, 3)])
def test_plots_stand_side_by_side_where_there_is_room(
    smallvit: Command, run: Path, columns: int, side_by_side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(run, 4)
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = smallvit("watch", run, "--once")[1].splitlines()
    assert max(line.count("┌") for line in lines) == side_by_side
    assert max(map(len, lines)) <= columns


def test_a_frame_fits_into_the_terminal(run: Path) -> None:
    write(run, 4)
    for width, height in ((80, 24), (120, 20), (40, 30)):
        console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True)
        frame = curves.render_frame(curves.read_run(run), console, height)
        assert len(console.render_lines(frame)) <= height


def test_a_run_that_has_only_begun_says_so(smallvit: Command, run: Path) -> None:
    code, out, _ = smallvit("watch", run, "--once")
    assert code == 0
    assert "no epoch of 10 finished yet" in out


def test_a_finished_run_shows_its_test_accuracy_and_no_time_left(smallvit: Command, run: Path) -> None:
    write(run, 10)
    finish(run)
    code, out, _ = smallvit("watch", run)
    assert code == 0
    assert "epoch 10/10  best val 90.00 % (epoch 10)  1,234 images/s  test top-1 91.25 %" in out
    assert " left" not in out


@pytest.mark.parametrize("epochs", [1, 10])
def test_runs_without_validation_show_what_there_is(smallvit: Command, run: Path, epochs: int) -> None:
    write(run, epochs, val_loss=None, val_top1=None)
    code, out, _ = smallvit("watch", run, "--once")
    assert code == 0
    assert "val" not in out
    assert "learning rate" in out


def test_losses_that_are_not_finite_are_left_out(smallvit: Command, run: Path) -> None:
    write(run, 3, val_loss=float("nan"), train_loss=float("inf"))
    code, out, _ = smallvit("watch", run, "--once")
    assert code == 0
    assert "loss" not in out
    assert "validation accuracy" in out


def test_it_follows_a_run_until_it_is_finished(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "POLL_SECONDS", 0.01)
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100, height=40)

    def shown(text: str) -> None:
        until = time.monotonic() + 600
        while text not in output.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
        assert text in output.getvalue()

    follower = threading.Thread(target=curves.watch_run, args=(run, console), daemon=True)
    follower.start()
    shown("no epoch of 10 finished yet")
    for epochs in (1, 2, 10):
        write(run, epochs)
        shown(f"epoch {epochs}/10")
    finish(run)
    follower.join(600)
    assert not follower.is_alive()
    assert "test top-1 91.25 %" in output.getvalue()


def test_an_interrupted_watch_exits_with_130(smallvit: Command, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("smallvit.runs.curves.time.sleep", interrupt)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setenv("TERM", "xterm")
    write(run, 2)
    code, out, _ = smallvit("watch", run)
    assert code == 130
    assert out.endswith("\x1b[?25h\x1b[?1049l")  # the cursor, and the screen from before


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (None, "", "not the folder of a run"),
        ("notes.txt", "", "not the folder of a run (no config.json in it)"),
        (Run.CONFIG, "{", "config.json: damaged"),
        (Run.CONFIG, '{"epochs": "many"}', "config.json: damaged"),
        (Run.METRICS, '{"epoch": 1', "metrics.jsonl: line 3 is damaged"),
        (Run.METRICS, '{"epoch": 1}', "metrics.jsonl: line 3 is damaged"),
        (Run.METRICS, "\udcff".encode(errors="surrogateescape"), "metrics.jsonl: line 3 is damaged"),
        (Run.SUMMARY, "[]", "summary.json: damaged"),
    ],
)
def test_runs_without_curves_give_an_error_of_one_line(
    smallvit: Command, run: Path, file: str | None, content: str | bytes, message: str
) -> None:
    write(run, 2)
    if file is None:
        run = run / "missing"
    elif file == "notes.txt":
        (run / Run.CONFIG).unlink()
    else:
        before = (run / file).read_bytes() if file == Run.METRICS else b""
        (run / file).write_bytes(before + (content.encode() if isinstance(content, str) else content))
    code, out, err = smallvit("watch", run)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_it_loads_neither_torch_nor_matplotlib(run: Path) -> None:
    write(run, 2)
    check = (
        f"import sys\nfrom smallvit.cli import main\nmain(['watch', {str(run)!r}])\n"
        "sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", check], check=False, capture_output=True, env=os.environ)
    assert done.returncode == 0
