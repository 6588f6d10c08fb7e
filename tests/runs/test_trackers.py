"""Metrics on other programs' boards: TensorBoard's read back, the others in their local modes."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from smallvit.config import options as _options
from smallvit.config.config import Config
from smallvit.runs import trackers
from smallvit.runs.run import Run
from smallvit.runs.trackers import RECORD, TRACKERS, open_trackers
from smallvit.utils.errors import InputError

OPTIONS = Config().to_dict()
SUMMARY = {"test_top1": 97.5, "val_top1": 30.0, "epochs": 4, "device": "cpu", "versions": {"torch": "2"}, "git": None}


class Failing:
    """A board that breaks at the first line."""

    def __init__(self, *_: object) -> None:
        self.closed_as: list[bool] = []

    def log(self, *_: object) -> None:
        raise ConnectionError("the network is gone\nand more")

    def close(self, failed: bool) -> None:
        self.closed_as.append(failed)


class Noting(Failing):
    """A board that keeps what it gets."""

    def __init__(self, *_: object) -> None:
        super().__init__()
        self.got: list[tuple[int, dict[str, Any]]] = []

    def log(self, epoch: int, figures: dict[str, float]) -> None:
        self.got.append((epoch, figures))

    finish = log


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def figures(epoch: int) -> dict[str, Any]:
    unvalidated = epoch == 1
    return {
        "epoch": epoch,
        "train_loss": 2 / epoch,
        "val_loss": None if unvalidated else 1 / epoch,
        "val_top1": None if unvalidated else 10.0 * epoch,
        "lr": 1e-3,
        "images_per_second": 1000.0,
        "seconds": 2.0 * epoch,
    }


def interrupted_and_resumed(name: str, run: Path) -> None:
    """Three epochs, an interruption after the checkpoint of the first, all four from there on."""
    with suppress(KeyboardInterrupt), open_trackers((name,), run, OPTIONS) as boards:
        for epoch in (1, 2, 3):
            boards.log(figures(epoch))
        (run / Run.STATE).touch()
        raise KeyboardInterrupt
    with open_trackers((name,), run, OPTIONS | {"device": "cuda"}) as boards:
        for epoch in (2, 3, 4):
            boards.log(figures(epoch))
        boards.finish(SUMMARY)


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_there_is_a_board_for_every_name_that_log_takes() -> None:
    assert tuple(TRACKERS) == _options.LOGGERS


def test_no_name_imports_and_writes_nothing(run: Path) -> None:
    check = (
        "import sys; from pathlib import Path; from smallvit.runs.trackers import open_trackers\n"
        f"with open_trackers((), Path({str(run)!r}), {{}}) as boards: boards.log({{'epoch': 1}}); boards.finish({{}})\n"
        "sys.exit(bool({'torch', 'tensorboard', 'wandb'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
    assert list(run.iterdir()) == []


def test_tensorboard_shows_every_epoch_and_the_outcome_once(run: Path) -> None:
    interrupted_and_resumed("tensorboard", run)
    shown = scalars(run)
    assert shown["train_loss"] == [(epoch, pytest.approx(2 / epoch)) for epoch in (1, 2, 3, 4)]
    assert shown["val_top1"] == [(epoch, pytest.approx(10 * epoch)) for epoch in (2, 3, 4)]
    assert shown["summary/test_top1"] == [(4, 97.5)]
    assert not {"epoch", "summary/device", "summary/versions", "summary/git"} & set(shown)


def test_tensorboard_forgets_a_run_that_was_replaced(run: Path) -> None:
    for last in (5, 2):  # the second without a checkpoint to resume: it starts again
        with open_trackers(("tensorboard",), run, OPTIONS) as boards:
            for epoch in range(1, last + 1):
                boards.log(figures(epoch))
    assert [step for step, _ in scalars(run)["train_loss"]] == [1, 2]


def test_restarted_run_gets_a_new_id(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = []
    monkeypatch.setitem(trackers.TRACKERS, "wandb", lambda _folder, _options, id, _sent: ids.append(id) or Noting())
    for resumable in (False, True, False):
        (run / Run.STATE).touch() if resumable else (run / Run.STATE).unlink(missing_ok=True)
        with open_trackers(("wandb",), run, OPTIONS) as boards:
            boards.log(figures(1))
    assert ids[0] == ids[1] != ids[2]


def test_a_board_that_joins_late_or_missed_something_gets_the_epochs_it_lacks(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Noting(), Noting()
    monkeypatch.setitem(trackers.TRACKERS, "wandb", lambda *_: first)
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", lambda *_: second)
    for names, epochs in ((("wandb",), (1, 2)), (("wandb", "tensorboard"), (1, 2, 3))):
        with open_trackers(names, run, OPTIONS) as boards:
            for epoch in epochs:
                boards.log(figures(epoch))
        (run / Run.STATE).touch()
    assert [epoch for epoch, _ in first.got] == [1, 2, 3]
    assert [epoch for epoch, _ in second.got] == [1, 2, 3]


@pytest.mark.parametrize("name", _options.LOGGERS)
def test_missing_package_gives_an_error_of_one_line(name: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    with (
        pytest.raises(InputError, match=rf"^--log {name}: not installed; pip install 'smallvit\[{name}\]'$"),
        open_trackers((name,), run, OPTIONS),
    ):
        pass
    assert list(run.iterdir()) == []


def test_tracker_that_cannot_be_opened_gives_an_error_of_one_line(run: Path) -> None:
    (run / "tensorboard").write_text("in the way")
    with (
        pytest.raises(InputError, match=r"^--log tensorboard: cannot be opened \(.*File exists.*\)$"),
        open_trackers(("tensorboard",), run, OPTIONS),
    ):
        pass
    assert [path.name for path in run.iterdir()] == ["tensorboard"]


def test_a_board_that_fails_is_dropped_with_one_warning(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = Noting()
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Failing)
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", lambda *_: good)
    with open_trackers(("wandb", "tensorboard"), run, OPTIONS) as boards:
        for epoch in (1, 2):
            boards.log(figures(epoch))
        boards.finish(SUMMARY)
    assert capsys.readouterr().err == "smallvit: --log wandb failed (the network is gone); continuing without it\n"
    assert [epoch for epoch, _ in good.got] == [1, 2, 4]
    assert "val_top1" not in good.got[0][1]
    assert good.got[-1][1] == {"test_top1": 97.5, "val_top1": 30.0, "epochs": 4, "device": "cpu"}
    assert good.closed_as == [False]
    assert json.loads((run / RECORD).read_text())["sent"] == {"tensorboard": 2}


def test_a_run_that_fails_is_closed_as_failed_and_leaves_nothing_before_its_first_checkpoint(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = Noting()
    monkeypatch.setitem(trackers.TRACKERS, "wandb", lambda *_: board)
    with suppress(ZeroDivisionError), open_trackers(("tensorboard", "wandb"), run, OPTIONS) as boards:
        boards.log(figures(1))
        assert {path.name for path in run.iterdir()} == {"tensorboard", RECORD}
        raise ZeroDivisionError
    assert board.closed_as == [True]
    assert list(run.iterdir()) == []


def test_wandb_keeps_an_offline_run_under_one_id(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    interrupted_and_resumed("wandb", run)
    written = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert len(written) == 2
    assert {path.name for path in written} == {f"run-{json.loads((run / RECORD).read_text())['id']}.wandb"}
