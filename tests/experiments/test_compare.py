"""Check comparisons: what is trained, which runs are reused, and how figures are computed."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from smallvit import Config, InputError, TrainingError
from smallvit.cli import main
from smallvit.config import recipes
from smallvit.config.spec import RowSpec, expand_ablation, format_label, parse_spec
from smallvit.experiments import grid
from smallvit.profiling import benchmark
from smallvit.runs import aggregate
from smallvit.runs.run import Run
from smallvit.training import setup
from smallvit.training import train as engine
from smallvit.utils import hardware
from smallvit.utils.signals import SignalInterrupt
from smallvit.utils.terminal import create_console

CHOOSE_JOBS = grid.choose_jobs
"""The function that the other tests replace."""
Command = Callable[..., tuple[int, str, str]]

EPOCHS = 2
FLAGS = ("--train-fraction", "0.1", "--batch-size", "64", "--epochs", str(EPOCHS))
ROWS = ("--arch", "vit", "--arch", "vit+spt+lsa,lr=0.003", "--seeds", "2")


def train_here(options: dict[str, Any], folder: Path, *_: object) -> int:
    """Replace `grid.train` by training in this process."""
    try:
        engine.train(Config.build(**options, out=str(folder), auto_resume=True))
    except TrainingError:
        return 1
    return 0


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "ROUNDS", 2)
    monkeypatch.setattr(benchmark, "SAMPLE_SECONDS", 1e-3)
    monkeypatch.setattr(benchmark, "SECONDS", 1000)
    monkeypatch.setattr(grid, "choose_jobs", lambda *_: 1)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that are trained, here."""
    names = []

    def train(options: dict[str, Any], folder: Path, *_: object) -> int:
        names.append(folder.name)
        return train_here(options, folder)

    monkeypatch.setattr(grid, "train", train)
    return names


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a comparison of two rows with two seeds."""
    out = tmp_path_factory.mktemp("compared") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "train", train_here)
        patch.setattr(grid, "choose_jobs", lambda *_: 1)
        patch.setattr(benchmark, "ROUNDS", 3)
        patch.setenv("SMALLVIT_CACHE", str(out.parent / "cache"))
        assert run_compare(*ROWS, *FLAGS, "--out", out) == 0
    return out


def run_compare(*arguments: object) -> int:
    return main(["compare", *map(str, arguments)])


@pytest.fixture
def mine(compared: Path, tmp_path: Path) -> Path:
    """Return a copy of these runs."""
    return Path(shutil.copytree(compared, tmp_path / "mine"))


def summaries(out: Path, row: str) -> list[dict[str, Any]]:
    return [json.loads((out / f"{row}-seed{seed}" / Run.SUMMARY).read_text()) for seed in (0, 1)]


def records(out: Path) -> list[dict[str, str]]:
    with open(out / "compare.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_rows_need_no_flag(smallvit: Command, monkeypatch: pytest.MonkeyPatch, trained: list[str]) -> None:
    monkeypatch.setattr(grid.PlannedRun, "check", lambda _: None)
    monkeypatch.setattr(grid, "train", lambda _, folder, *__: trained.append(folder.name) or 1)
    smallvit("compare", "vit", "vit+spt,lr=0.003", "--arch", "vit+lsa", *FLAGS)
    assert trained == ["vit+lsa-seed0", "vit-seed0", "vit+spt,lr=0.003-seed0"]


def test_the_csv_matches_the_summaries(compared: Path) -> None:
    rows = records(compared)
    assert [record["model"] for record in rows] == ["vit", "vit+spt+lsa,lr=0.003"]
    for record in rows:
        runs = summaries(compared, record["model"])
        top1, rates = ([run[name] for run in runs] for name in ("test_top1", "images_per_second"))
        expected = {
            "seeds": 2,
            "test_top1": statistics.mean(top1),
            "test_top1_std": statistics.stdev(top1),
            "train_images_per_second": statistics.mean(rates),
            "train_images_per_second_std": statistics.stdev(rates),
            "parameters": runs[0]["parameters"],
            "macs": runs[0]["macs"],
            "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
            "images_seen": runs[0]["images_seen"],
            "epochs": EPOCHS,
            "batch_size": 64,
        }
        assert {name: float(record[name]) for name in expected} == pytest.approx(expected)
        assert float(record["inference_images_per_second"]) > 0
        assert float(record["latency_ms"]) > 0


def test_the_page_shows_rounded_figures_and_notes(compared: Path) -> None:
    page = (compared / "compare.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| vit")]
    for cells, record in zip(rows, records(compared), strict=True):
        mean, deviation = (float(record[name]) for name in ("test_top1", "test_top1_std"))
        assert cells[:5] == [
            record["model"],
            f"{mean:.2f} ± {deviation:.2f}",
            "2",
            f"{int(record['parameters']):,}",
            f"{int(record['macs']) / 1e6:.1f}",
        ]
    config = json.loads((compared / "vit-seed0" / Run.CONFIG).read_text())
    seen = summaries(compared, "vit")[0]["images_seen"]
    for said in (
        "digits, 359 test images",
        f"split-seed {config['split_seed']}, train-fraction 0.1",
        f"epochs {EPOCHS}; images seen {seen}; batch size 64; seeds 0, 1",
        "standard deviation of the sample (n - 1)",
        "best epoch on validation images",
        "Rows differ in options: lr (0.001, 0.003)",
        f"torch {torch.__version__}",
        f"Command: smallvit compare {' '.join(ROWS)}",
        "medians over 3 rounds",
    ):
        assert said in page


def test_the_picture_opens_and_has_two_panels_side_by_side(compared: Path) -> None:
    picture = Image.open(compared / "compare.png")
    picture.load()
    assert picture.width > 1000
    assert picture.width > 2 * picture.height


def stamps(out: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in out.rglob("*") if path.is_file() and path.parent != out]
    return {str(path.relative_to(out)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.slow
def test_existing_runs_are_reused_unchanged(smallvit: Command, trained: list[str], mine: Path) -> None:
    before = stamps(mine)
    code, out, _ = smallvit("compare", *ROWS, "--arch", "vit+lsa", *FLAGS, "--out", mine)
    assert code == 0
    assert trained == ["vit+lsa-seed0", "vit+lsa-seed1"]
    assert "[1/6] vit, seed 0: already finished" in out
    after = stamps(mine)
    assert {name: after[name] for name in before} == before
    assert [record["model"] for record in records(mine)] == ["vit", "vit+spt+lsa,lr=0.003", "vit+lsa"]


def test_a_run_with_other_options_is_rejected(smallvit: Command, trained: list[str], mine: Path) -> None:
    code, _, err = smallvit("compare", *ROWS, *FLAGS, "--batch-size", 32, "--out", mine)
    assert code == 2
    assert "vit-seed0: holds a run with --batch-size 64, not 32; choose another --out" in err
    assert not trained


def test_without_speed_the_columns_are_empty(smallvit: Command, mine: Path) -> None:
    code, out, _ = smallvit("compare", *ROWS, *FLAGS, "--out", mine, "--no-speed")
    assert code == 0
    assert "Inference: not measured" in out
    assert {record["latency_ms"] for record in records(mine)} == {""}
    assert Image.open(mine / "compare.png").width < 1000  # training alone


@pytest.mark.slow
def test_a_row_that_diverges_does_not_stop_the_others(smallvit: Command, trained: list[str]) -> None:
    wild = "vit,lr=1e9,warmup_ratio=0"
    code, out, _ = smallvit("compare", "--arch", wild, "--arch", "vit", *FLAGS, "--out", "out", "--no-speed")
    assert code == 1
    assert len(trained) == 2
    assert "seed 0: failed (exit code 1)" in out
    assert "vit,lr=1000000000.0,warmup-ratio=0.0: 0 of 1 seeds" in (Path("out") / "compare.md").read_text()
    failed, done = records(Path("out"))
    assert (failed["seeds"], failed["seeds_requested"], failed["test_top1"]) == ("0", "1", "")
    assert (done["seeds"], done["test_top1_std"]) == ("1", "")
    assert float(done["test_top1"]) > 0


BAD = {
    "architecture": (["--arch", "vti"], "row vti: --arch vti: no such architecture (did you mean 'vit'?)"),
    "option": (["--arch", "vit,warmup-ration=3"], "no such option as 'warmup_ration' (did you mean 'warmup_ratio'?)"),
    "value": (["--arch", "vit,lr=fast"], "row vit,lr=fast: lr=fast: expected a number"),
    "range": (["--arch", "vit,lr=-1"], "row vit,lr=-1.0: --lr -1.0: expected above 0"),
    "choice": (["--arch", "vit,aug=bsic"], "did you mean 'basic'?"),
    "switch": (["--arch", "vit+spt,spt-norm=1"], "spt_norm=1: expected true or false"),
    "plugin": (["--arch", "vit+stp"], "no such plugin as 'stp' (did you mean 'spt'?)"),
    "plugin for a CNN": (["--arch", "resnet10t+spt,recipe=lee2021"], "row resnet10t+spt,recipe=lee2021: "),
    "optimizer": (["--arch", "vit,opt=sdg"], "no such optimizer (did you mean 'sgd'?)"),
    "recipe": (["--arch", "vit,recipe=pper"], "--recipe pper: no such recipe"),
    "form": (["--arch", "+spt"], "expected ARCH["),
    "setting": (["--arch", "vit,lr"], "'lr' is not of the form option=value"),
    "option twice": (["--arch", "vit,lr=1,lr=1"], "lr is there twice"),
    "row twice": (["--arch", "vit,lr=1e-2", "--arch", "vit,lr=0.01"], "row vit,lr=0.01: given twice"),
    "other data": (["--arch", "vit,data=mnist"], "data cannot differ from row to row"),
    "other split": (["--arch", "vit,split-seed=1"], "give --split-seed once, for all rows"),
    "other training images": (["--arch", "vit,train_fraction=0.5"], "cannot differ from row to row"),
    "other test": (["--arch", "vit,test-flip=true"], "give --test-flip once"),
    "other seed": (["--arch", "vit,seed=1"], "give --seed once"),
    "other length": (["--arch", "vit,epochs=3"], "a comparison has one budget"),
    "learning rate for all": (["--lr", "0.1"], "--lr differs between models"),
    "plugin for all": (["--spt"], "set it for a row (--arch vit+spt)"),
    "overwrite": (["--overwrite"], "--overwrite has no effect in a comparison"),
    "two budgets": (["--images-seen", "9"], "--images-seen and --epochs: give only one of them"),
    "seeds": (["--seeds", "0"], "--seeds 0: expected at least 1"),
    "runs and rows": (["."], "does not apply to existing runs"),
    "ablation": (["--ablation", "--arch", "vit+spt"], "--ablation adds the plugins itself"),
    "device": (["--device", "cuda:99"], "this machine has cpu"),
}


def test_bad_input_is_refused_before_training(smallvit: Command, trained: list[str]) -> None:
    failures = []
    for case, (arguments, message) in BAD.items():
        code, _, err = smallvit("compare", "--arch", "vit+lsa", *FLAGS, *arguments)
        if code != 2 or message not in err or len(err.splitlines()) != 1:
            failures.append((case, code, err))
    assert not failures
    assert not trained
    assert not list(Path().iterdir())


@pytest.mark.slow
def test_help_and_invalid_flags_load_no_torch() -> None:
    for arguments in (["compare", "--help"], ["compare", "--lr", "1"], ["compare", "--arch", "vit,warmup-ration=3"]):
        check = (
            f"import sys\nfrom smallvit.cli import main\ntry: main({arguments})\nexcept SystemExit: pass\n"
            "sys.exit('torch' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", check], check=False, capture_output=True).returncode == 0


def test_a_row_has_a_canonical_label_and_its_own_folder() -> None:
    assert parse_spec("vit+lsa+spt, lr=3e-3 ,spt_shift=.25").label == "vit+spt+lsa,lr=0.003,spt-shift=0.25"
    assert parse_spec("vit,clip-grad=none,auto_augment=none").options == {"clip_grad": None, "auto_augment": "none"}
    assert parse_spec("vit,spt=true").label == "vit+spt"
    rows = [parse_spec(f"vit,teacher={name}") for name in ("runs/a-b", "runs-a/b", "runs-a-b", "r" * 300)]
    folders = [row.folder(0) for row in rows]
    assert len(set(folders)) == 4
    assert all("/" not in folder and len(folder) < 200 for folder in folders)
    assert parse_spec("vit+spt,lr=0.1").folder(3) == "vit+spt,lr=0.1-seed3"


def test_a_rows_options_override_flags_and_flags_override_recipes() -> None:
    flags = {"batch_size": 32, "data": "digits"}
    given = parse_spec("vit,lr=0.5,recipe=quick").given(flags, "deit")
    assert (given["lr"], given["batch_size"], given["opt"]) == (0.5, 32, "muon")
    assert "spt" not in given  # quick's, but a row has the plugins that it names
    assert parse_spec("vit,batch-size=8").given(flags, "deit")["batch_size"] == 8
    assert parse_spec("vit").given(flags, "deit")["lr"] == recipes.deit().optim.lr


def test_an_ablation_has_no_plugin_each_plugin_and_both() -> None:
    labels = [row.label for row in expand_ablation(parse_spec("vit,lr=0.1"))]
    assert labels == ["vit,lr=0.1", "vit+spt,lr=0.1", "vit+lsa,lr=0.1", "vit+spt+lsa,lr=0.1"]


def planned(*rows: str, **options: Any) -> list[grid.PlannedRun]:
    flags = {"train_fraction": 0.2} | options.pop("flags", {})
    texts = [parse_spec(row) for row in rows]
    return grid.plan_runs(grid.Grid(rows=texts, flags=flags, seeds=range(2, 4), out=Path("out"), **options))


def test_a_budget_in_images_is_rounded_up_to_whole_epochs() -> None:
    images = len(setup.create_setup(Config.build(train_fraction=0.2)).dataset.train)
    for seen, epochs in ((1, 1), (images, 1), (images + 1, 2), (10 * images, 10)):
        assert {entry.options["epochs"] for entry in planned("vit", "vit+lsa", images_seen=seen)} == {epochs}


def test_runs_are_ordered_by_seed() -> None:
    order = [(entry.row.label, entry.seed) for entry in planned("vit", "vit+lsa")]
    assert order == [("vit", 2), ("vit+lsa", 2), ("vit", 3), ("vit+lsa", 3)]


def test_rows_with_different_epochs_are_rejected() -> None:
    with pytest.raises(InputError, match=r"differ in their epochs \(vit,recipe=deit 300, vit 100\); give --epochs"):
        planned("vit,recipe=deit", "vit")
    assert {entry.options["epochs"] for entry in planned("vit,recipe=deit", "vit,recipe=cct")} == {300}


def test_convolutional_rows_use_the_recipe_cnn() -> None:
    rows = ("resnet20", "resnet10t", "vit", "resnet20,recipe=resnet")
    entries = planned(*rows, flags={"epochs": 1})[:4]
    assert [entry.recipe for entry in entries] == ["cnn", "cnn", None, "resnet"]
    for entry, name in ((entries[0], "cnn"), (entries[3], "resnet")):
        expected = recipes.RECIPES[name](arch="resnet20", epochs=1).to_dict()
        assert {
            option: entry.options[option] for option in ("opt", "lr", "sched", "regularization", "weight_decay")
        } == {option: expected[option] for option in ("opt", "lr", "sched", "regularization", "weight_decay")}
    assert [entry.recipe for entry in planned("resnet20", "vit", recipe="deit")[:2]] == ["deit", "deit"]


def test_rows_that_start_from_weights_use_the_same_images(mine: Path) -> None:
    begun, flags = os.path.relpath(mine / "vit-seed0"), {"epochs": 1, "img_size": 12}
    fits, contradicts = planned(f"vit96+lsa,init={begun}", f"cait,init={begun}", flags=flags)[:2]
    assert fits.options["init"] == str(mine.resolve() / "vit-seed0")
    assert fits.options["img_size"] == 12
    fits.check()
    with pytest.raises(InputError, match=rf"row cait,init={begun}: .* has --arch vit96, not --arch cait"):
        contradicts.check()


def changed(folder: Path, **options: Any) -> None:
    (folder / Run.CONFIG).write_text(json.dumps(json.loads((folder / Run.CONFIG).read_text()) | options))


def test_runs_that_differ_in_seed_and_path_form_one_row(smallvit: Command, mine: Path) -> None:
    folders = [mine / f"{row}-seed{seed}" for seed in (0, 1) for row in ("vit", "vit+spt+lsa,lr=0.003")]
    changed(folders[2], checkpoint_minutes=1.0, workers=1)
    code, out, _ = smallvit("compare", *folders, "--no-speed", "--out", "new")
    assert code == 0
    names = ("model", "seeds", "test_top1", "test_top1_std", "train_images_per_second", "images_seen")
    by_runs, by_rows = (
        [{name: row[name] for name in names} for row in records(where)] for where in (Path("new"), mine)
    )
    by_runs[1]["model"] = by_rows[1]["model"]  # no other row is of this model: its label has no learning rate
    assert by_runs == by_rows
    assert "Rows differ in options: lr (0.001, 0.003)" in out


def test_rows_of_one_model_are_labeled_by_their_differences(smallvit: Command, mine: Path) -> None:
    changed(mine / "vit-seed1", lr=0.5)
    code, out, _ = smallvit("compare", *(mine / f"vit-seed{seed}" for seed in (0, 1)), "--no-speed")
    assert code == 0
    assert "\nvit,lr=0.001 " in out
    assert "\nvit,lr=0.5 " in out
    assert not list(Path().glob("compare*"))  # files only where --out says


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: changed(b, data="mnist"), "cannot be compared: data differs (digits and mnist)"),
        (lambda b: changed(b, split_seed=4), "cannot be compared: split_seed differs (0 and 4)"),
        (lambda b: changed(b, train_fraction=0.3), "train_fraction differs (0.1 and 0.3)"),
        (lambda b: changed(b, test_flip=True), "test_flip differs (false and true)"),
        (lambda b: changed(b, seed=0), "same options and seed as"),
        (lambda b: (b / Run.SUMMARY).unlink(), "not finished; continue it with smallvit train --resume"),
        (lambda b: (b / Run.SUMMARY).write_text('{"test_top1": 3.0}'), "'test_images' is missing"),
        (lambda b: (b / Run.CONFIG).unlink(), "not the folder of a run"),
        (shutil.rmtree, "no such run folder"),
    ],
)
def test_incomparable_runs_are_rejected(
    smallvit: Command, mine: Path, damage: Callable[[Path], object], message: str
) -> None:
    one, other = mine / "vit-seed0", mine / "vit-seed1"
    damage(other)
    code, _, err = smallvit("compare", one, other)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_run_given_twice_is_rejected(smallvit: Command, mine: Path) -> None:
    assert "given twice" in smallvit("compare", mine / "vit-seed0", mine / "." / "vit-seed0")[2]


def test_differing_batch_sizes_are_noted(smallvit: Command, mine: Path) -> None:
    changed(mine / "vit-seed1", batch_size=32)
    _, out, _ = smallvit("compare", mine / "vit-seed0", mine / "vit-seed1", "--no-speed")
    assert "Rows differ in batch size: 64 (vit,batch-size=64); 32 (vit,batch-size=32)" in out


def interrupt_once(file: Path) -> None:
    """Send SIGINT to this process when the file is there."""
    deadline = time.monotonic() + 1800
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
def test_an_interrupted_comparison_is_resumed(
    smallvit: Command, compared: Path, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGINT comes to the comparison alone, while another process trains its second run."""
    lost = mine / "vit+spt+lsa,lr=0.003-seed0"
    shutil.rmtree(lost)
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    arguments = ["compare", *ROWS, *FLAGS, "--checkpoint-minutes", "1e-9", "--out", str(mine), "--no-speed"]
    before = stamps(mine)
    threading.Thread(target=interrupt_once, args=[lost / Run.STATE]).start()
    code, out, err = smallvit(*arguments)
    assert code == 130
    assert "[2/4] vit+spt+lsa,lr=0.003, seed 0" in out
    assert "[3/4]" not in out
    assert err == "comparison interrupted; run the same command to resume\n"
    assert not (lost / Run.SUMMARY).exists()

    monkeypatch.setattr(grid, "train", train_here)
    code, out, _ = smallvit(*arguments)
    assert code == 0
    assert "resuming " in out
    after = stamps(mine)
    assert {name: after[name] for name in before} == before
    for name in (Run.BEST, Run.LAST):
        assert (lost / name).read_bytes() == (compared / lost.name / name).read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
def test_sigterm_is_forwarded_and_stops_the_comparison(smallvit: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    start, processes = grid.Trainings.start, []

    def asleep(relay: grid.Trainings, command: list[str], gpu: str | None) -> subprocess.Popen[str]:
        processes.append(start(relay, [sys.executable, "-c", "import time; time.sleep(1800)"], gpu))
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return processes[-1]

    monkeypatch.setattr(grid.Trainings, "start", asleep)
    code, _, err = smallvit("compare", *ROWS, *FLAGS, "--out", "out")
    assert code == 143
    assert err == "comparison interrupted; run the same command to resume\n"
    assert [process.returncode for process in processes] == [-signal.SIGTERM]


MEET = """
import pathlib, sys, time
print("epoch 1", flush=True)
print("other line", flush=True)
pathlib.Path(sys.argv[1]).touch()
while not pathlib.Path(sys.argv[2]).exists():
    time.sleep(0.05)
sys.exit(int(sys.argv[3]))
"""
"""A program that waits for another one."""


@pytest.mark.slow
def test_trainings_run_side_by_side_and_keep_their_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    with grid.Trainings(2, create_console()) as trainings:

        def work(names: tuple[Path, Path, int]) -> int:
            return trainings.run([sys.executable, "-c", MEET, *map(str, names)], f"{names[0].name}:")

        assert trainings.map(work, [(a, b, 0), (b, a, 1), (a, b, 2)]) == [0, 1, 2]
    assert sorted(capsys.readouterr().out.splitlines()) == ["a: epoch 1", "a: epoch 1", "b: epoch 1"]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
def test_a_signal_stops_all_trainings_and_starts_no_more(tmp_path: Path) -> None:
    started: list[subprocess.Popen[str]] = []
    with grid.Trainings(2, create_console()) as trainings:

        def work(number: int) -> int:
            file = tmp_path / str(number)
            code = f"import pathlib, time; pathlib.Path({str(file)!r}).touch(); time.sleep(1800)"
            return trainings.run([sys.executable, "-c", code], "run")

        def stop() -> None:
            while len(list(tmp_path.iterdir())) < 2:
                time.sleep(0.05)
            started.extend(trainings.processes)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=stop).start()
        with pytest.raises(SignalInterrupt):
            trainings.map(work, range(4))
    assert [process.wait() for process in started] == [-signal.SIGTERM] * 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0", "1"]


def test_as_many_trainings_as_threads_and_memory_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    for gib, device, jobs, runs, expected in (
        (64, "cpu", None, 20, 8),
        (64, "cpu", None, 3, 3),
        (7, "cpu", None, 20, 3),
        (1, "cpu", None, 20, 1),
        (64, "cpu", 2, 20, 2),
        (64, "cpu", 4, 0, 1),
    ):
        monkeypatch.setattr(hardware, "free_memory", lambda gib=gib: gib * 2**30)
        assert CHOOSE_JOBS(jobs, device, runs) == expected


def test_a_run_per_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "device_type", lambda name: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [CHOOSE_JOBS(None, device, 20) for device in ("auto", "cuda", "cuda:2")] == [3, 3, 1]
    assert CHOOSE_JOBS(None, "cuda", 2) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("jobs", "gpus", "seen"), [(2, ["4", "6"], {"4", "6"}), (3, ["4", "6"], {"4", "6"}), (1, ["4", "6"], {"none"})]
)
def test_each_training_sees_one_gpu_that_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int, gpus: list[str], seen: set[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    code = "import os, sys; open(sys.argv[1], 'w').write(os.environ.get('CUDA_VISIBLE_DEVICES', 'none'))"
    with grid.Trainings(jobs, create_console(), gpus) as trainings:
        held = trainings.gpus.qsize()
        files = [tmp_path / str(number) for number in range(4)]
        trainings.map(lambda file: trainings.run([sys.executable, "-c", code, str(file)], "run"), files)
        assert trainings.gpus.qsize() == held == jobs
    assert {file.read_text() for file in files} <= seen


@pytest.mark.slow
def test_runs_on_a_gpu_are_checked_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = parse_spec("vit")
    options = {"arch": "vit", "device": "cpu", "data": "digits"}
    good, bad = (
        grid.PlannedRun(row=row, seed=0, folder=tmp_path / "run", recipe=None, options=options | more)
        for more in ({}, {"opt": "nosuch"})
    )
    monkeypatch.setattr(hardware, "device_type", lambda name: "cuda")
    monkeypatch.setattr(grid, "create_setup", lambda *_, **__: pytest.fail("not in this process"))
    grid.check_runs([good], "cpu")
    with pytest.raises(InputError, match="row vit: --opt nosuch: no such optimizer"):
        grid.check_runs([good, bad], "cpu")


class Slow(nn.Module):
    """Linear in the images, after so many seconds of `clock`."""

    now = 0.0

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.layer, self.shapes = seconds, nn.Linear(64, 10), []
        self.pretrained_cfg = {"input_size": (1, 8, 8)}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        assert not self.training
        self.shapes.append(tuple(images.shape))
        Slow.now += self.seconds
        return self.layer(images.flatten(1))


def test_speed_is_measured_with_alternating_models(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = []
    round_ = benchmark.Timing.sample
    monkeypatch.setattr(
        benchmark.Timing, "sample", lambda timing: (turns.append(timing.watch.model.seconds), round_(timing))
    )
    monkeypatch.setattr(benchmark, "clock", lambda: Slow.now)
    slow, quick = Slow(0.02), Slow(0.005)
    measured = benchmark.measure_speed([slow, quick], torch.device("cpu"), "off")
    assert (measured.precision, measured.batch_size) == ("fp32", 128)
    assert {(128, 1, 8, 8), (1, 1, 8, 8)} < set(slow.shapes)
    assert turns == [0.02, 0.005, 0.02, 0.005] * 2 or turns == [0.02, 0.02, 0.005, 0.005] * 2
    for model, figures in zip((slow, quick), measured.figures, strict=True):
        assert figures["latency_ms"] == pytest.approx(1e3 * model.seconds)
        assert figures["inference_images_per_second"] == pytest.approx(128 / model.seconds)


def record(model: str, top1: float, speeds: tuple[float, float], parameters: int) -> dict[str, Any]:
    figures = dict(zip(aggregate.PANELS, speeds, strict=True))
    return {"model": model, "test_top1": top1, "test_top1_std": 0.3, "parameters": parameters} | figures


def test_legend_names_every_model_apart_from_the_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = [
        record("vit", 73.8, (24000, 7697), 2_692_426),
        record("vit+spt", 76.3, (23800, 7500), 2_710_000),
        record("vit+lsa", 74.9, (24500, 7600), 2_692_500),
        record("vit+spt+lsa", 76.9, (23500, 7400), 2_729_878),
        record("cait+spt+lsa", 80.3, (8000, 2967), 9_058_066),
        record("swin+spt+lsa", 80.0, (15000, 5711), 8_562_166),
        record("resnet56", 76.4, (40000, 9000), 850_000),
        record("vit+spt+lsa,distill=soft,teacher=runs/resnet56", 77.1, (23400, 6400), 2_729_878),
    ]
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **b: (figures.append(figure), save(figure, *a, **b)))
    assert aggregate.plot_comparison(crowd, tmp_path / "picture.png", "title")
    figures[0].draw_without_rendering()
    (legend,) = figures[0].legends
    assert [text.get_text().split(" (")[0] for text in legend.get_texts()] == [each["model"] for each in crowd]
    box = legend.get_window_extent()
    assert box.x1 <= figures[0].bbox.x1
    assert all(axes.bbox.x1 <= box.x0 for axes in figures[0].axes)


def test_a_label_parses_back_to_its_row() -> None:
    row = RowSpec("vit", {"spt": True, "lsa_mask": False, "lsa": True, "clip_grad": None}, "deit")
    assert row.label == format_label("vit", row.options | {"recipe": "deit"})
    assert parse_spec(row.label) == RowSpec(
        "vit", {"spt": True, "lsa": True, "lsa_mask": False, "clip_grad": None}, "deit"
    )
