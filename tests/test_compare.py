"""Models side by side: what is trained for a comparison, what is left alone, and whether its figures are the runs'."""

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
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from PIL import Image
from torch import nn

from smallvit import Config, InputError, TrainingError, engine, recipes, speed
from smallvit.cli import main
from smallvit.comparison import apart, contest, scatter
from smallvit.comparison.rows import Row, ablation, label, parse
from smallvit.runs import Run

Command = Callable[..., tuple[int, str, str]]

EPOCHS = 2
FLAGS = ("--train-fraction", "0.2", "--batch-size", "64", "--epochs", str(EPOCHS))
ROWS = ("--arch", "vit", "--arch", "vit+spt+lsa,lr=0.003", "--seeds", "2")


def train_here(options: dict[str, Any], folder: Path) -> int:
    """What `apart.train` does, in this process: quicker by the imports."""
    try:
        engine.train(Config.build(**options, out=str(folder), auto_resume=True))
    except TrainingError:
        return 1
    return 0


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speed, "ROUNDS", 2)
    monkeypatch.setattr(speed, "SAMPLE_SECONDS", 1e-3)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that are trained, here."""
    names = []

    def train(options: dict[str, Any], folder: Path) -> int:
        names.append(folder.name)
        return train_here(options, folder)

    monkeypatch.setattr(apart, "train", train)
    return names


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rows of two seeds."""
    out = tmp_path_factory.mktemp("compared") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apart, "train", train_here)
        patch.setattr(speed, "ROUNDS", 3)
        patch.setenv("SMALLVIT_CACHE", str(out.parent / "cache"))
        assert compare(*ROWS, *FLAGS, "--out", out) == 0
    return out


def compare(*arguments: object) -> int:
    return main(["compare", *map(str, arguments)])


@pytest.fixture
def mine(compared: Path, tmp_path: Path) -> Path:
    """A copy of these runs."""
    return Path(shutil.copytree(compared, tmp_path / "mine"))


def summaries(out: Path, row: str) -> list[dict[str, Any]]:
    return [json.loads((out / f"{row}-seed{seed}" / Run.SUMMARY).read_text()) for seed in (0, 1)]


def records(out: Path) -> list[dict[str, str]]:
    with open(out / "compare.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_csv_says_what_the_summaries_say(compared: Path) -> None:
    found = records(compared)
    assert [record["model"] for record in found] == ["vit", "vit+spt+lsa,lr=0.003"]
    for record in found:
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


def test_the_page_rounds_these_figures_and_says_how_they_came_about(compared: Path) -> None:
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
        f"split-seed {config['split_seed']}, train-fraction 0.2",
        f"epochs {EPOCHS}; images seen {seen}; batch size 64; seeds 0, 1",
        "standard deviation of the sample (n - 1)",
        "best on validation images",
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


def test_runs_that_are_there_are_used_as_they_are(smallvit: Command, trained: list[str], mine: Path) -> None:
    before = stamps(mine)
    code, out, _ = smallvit("compare", *ROWS, "--arch", "vit+lsa", *FLAGS, "--out", mine)
    assert code == 0
    assert trained == ["vit+lsa-seed0", "vit+lsa-seed1"]
    assert "[1/6] vit, seed 0: there already" in out
    after = stamps(mine)
    assert {name: after[name] for name in before} == before
    assert [record["model"] for record in records(mine)] == ["vit", "vit+spt+lsa,lr=0.003", "vit+lsa"]


def test_a_run_with_other_options_is_not_taken_for_the_one_asked_for(
    smallvit: Command, trained: list[str], mine: Path
) -> None:
    code, _, err = smallvit("compare", *ROWS, *FLAGS, "--batch-size", 32, "--out", mine)
    assert code == 2
    assert "vit-seed0: holds a run with --batch-size 64, not 32; choose another --out" in err
    assert not trained


def test_a_comparison_without_speed_leaves_its_columns_empty(smallvit: Command, mine: Path) -> None:
    code, out, _ = smallvit("compare", *ROWS, *FLAGS, "--out", mine, "--no-speed")
    assert code == 0
    assert "Inference: not measured" in out
    assert {record["latency_ms"] for record in records(mine)} == {""}
    assert Image.open(mine / "compare.png").width < 1000  # training alone


def test_a_row_that_diverges_does_not_stop_the_others(smallvit: Command, trained: list[str]) -> None:
    wild = "vit,lr=1e9,warmup=0"
    code, out, _ = smallvit("compare", "--arch", wild, "--arch", "vit", *FLAGS, "--out", "out", "--no-speed")
    assert code == 1
    assert len(trained) == 2
    assert "seed 0: failed (exit code 1)" in out
    assert "vit,lr=1000000000.0,warmup=0.0: 0 of 1 seeds" in (Path("out") / "compare.md").read_text()
    failed, done = records(Path("out"))
    assert (failed["seeds"], failed["seeds_wanted"], failed["test_top1"]) == ("0", "1", "")
    assert (done["seeds"], done["test_top1_std"]) == ("1", "")
    assert float(done["test_top1"]) > 0


BAD = {
    "architecture": (["--arch", "vti"], "row vti: --arch vti: no such architecture (did you mean 'vit'?)"),
    "option": (["--arch", "vit,ler=3"], "no such option as 'ler' (did you mean 'lr'?)"),
    "value": (["--arch", "vit,lr=fast"], "row vit,lr=fast: lr=fast: expected a number"),
    "range": (["--arch", "vit,lr=-1"], "row vit,lr=-1.0: --lr -1.0: expected a learning rate above 0"),
    "choice": (["--arch", "vit,aug=bsic"], "did you mean 'basic'?"),
    "switch": (["--arch", "vit+spt,spt-norm=1"], "spt_norm=1: expected true or false"),
    "plugin": (["--arch", "vit+stp"], "no such plugin as 'stp' (did you mean 'spt'?)"),
    "plugin for a CNN": (["--arch", "resnet10t+spt,recipe=paper"], "row resnet10t+spt,recipe=paper: "),
    "optimiser": (["--arch", "vit,opt=sdg"], "no such optimiser (did you mean 'sgd'?)"),
    "recipe": (["--arch", "vit,recipe=pper"], "no such recipe (did you mean 'paper'?)"),
    "form": (["--arch", "+spt"], "expected ARCH[+spt][+lsa][+binary][,option=value]..."),
    "setting": (["--arch", "vit,lr"], "'lr' is not of the form option=value"),
    "option twice": (["--arch", "vit,lr=1,lr=1"], "lr is there twice"),
    "row twice": (["--arch", "vit,lr=1e-2", "--arch", "vit,lr=0.01"], "row vit,lr=0.01 is there twice"),
    "other data": (["--arch", "vit,data=mnist"], "data cannot differ from row to row"),
    "other split": (["--arch", "vit,split-seed=1"], "give --split-seed once, for all rows"),
    "other training images": (["--arch", "vit,train_fraction=0.5"], "cannot differ from row to row"),
    "other test": (["--arch", "vit,test-flip=true"], "give --test-flip once"),
    "other seed": (["--arch", "vit,seed=1"], "give --seed once"),
    "other length": (["--arch", "vit,epochs=3"], "a comparison has one budget"),
    "learning rate for all": (["--lr", "0.1"], "--lr means different things to different models"),
    "plugin for all": (["--spt"], "set it for a row (--arch vit+spt)"),
    "overwrite": (["--overwrite"], "--overwrite is of no use in a comparison"),
    "two budgets": (["--images-seen", "9"], "--images-seen and --epochs: give one of them"),
    "seeds": (["--seeds", "0"], "--seeds 0: expected at least 1"),
    "runs and rows": (["."], "is of no use with runs that are there"),
    "ablation": (["--ablation", "--arch", "vit+spt"], "--ablation adds the plugins itself"),
    "device": (["--device", "cuda:99"], "this machine has cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_found_before_anything_is_trained(smallvit: Command, trained: list[str], case: str) -> None:
    arguments, message = BAD[case]
    code, _, err = smallvit("compare", "--arch", "vit+lsa", *FLAGS, *arguments)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert not trained
    assert not list(Path().iterdir())


def test_help_and_bad_flags_load_no_torch() -> None:
    for arguments in (["compare", "--help"], ["compare", "--lr", "1"], ["compare", "--arch", "vit,ler=3"]):
        check = (
            f"import sys\nfrom smallvit.cli import main\ntry: main({arguments})\nexcept SystemExit: pass\n"
            "sys.exit('torch' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", check], check=False, capture_output=True).returncode == 0


def test_a_row_has_one_spelling_and_a_folder_of_its_own() -> None:
    assert parse("vit+lsa+spt, lr=3e-3 ,spt_shift=.25").label == "vit+spt+lsa,lr=0.003,spt-shift=0.25"
    assert parse("vit,clip-grad=none,policy=none").options == {"clip_grad": None, "policy": "none"}
    assert parse("vit,spt=true").label == "vit+spt"
    rows = [parse(f"vit,teacher={name}") for name in ("runs/a-b", "runs-a/b", "runs-a-b", "r" * 300)]
    folders = [row.folder(0) for row in rows]
    assert len(set(folders)) == 4
    assert all("/" not in folder and len(folder) < 200 for folder in folders)
    assert parse("vit+spt,lr=0.1").folder(3) == "vit+spt,lr=0.1-seed3"


def test_a_rows_options_win_over_flags_and_these_over_its_recipe() -> None:
    flags = {"batch_size": 32, "data": "digits"}
    given = parse("vit,lr=0.5,recipe=quick").given(flags, "deit")
    assert (given["lr"], given["batch_size"], given["ema"]) == (0.5, 32, 0.999)
    assert "spt" not in given  # quick's, but a row has the plugins that it names
    assert parse("vit,batch-size=8").given(flags, "deit")["batch_size"] == 8
    assert parse("vit").given(flags, "deit")["lr"] == recipes.deit().optim.lr


def test_an_ablation_is_plain_then_each_plugin_then_both() -> None:
    labels = [row.label for row in ablation(parse("vit,lr=0.1"))]
    assert labels == ["vit,lr=0.1", "vit+spt,lr=0.1", "vit+lsa,lr=0.1", "vit+spt+lsa,lr=0.1"]


def planned(*rows: str, **options: Any) -> list[contest.Entry]:
    flags = {"train_fraction": 0.2} | options.pop("flags", {})
    texts = [parse(row) for row in rows]
    return contest.entries(contest.Contest(rows=texts, flags=flags, seeds=range(2, 4), out=Path("out"), **options))


def test_a_budget_in_images_is_rounded_up_to_whole_epochs() -> None:
    images = len(engine.prepare(Config.build(train_fraction=0.2)).dataset.train)
    for seen, epochs in ((1, 1), (images, 1), (images + 1, 2), (10 * images, 10)):
        assert {entry.options["epochs"] for entry in planned("vit", "vit+lsa", images_seen=seen)} == {epochs}


def test_runs_are_in_the_order_of_seeds_so_that_each_row_has_one_early() -> None:
    found = [(entry.row.label, entry.seed) for entry in planned("vit", "vit+lsa")]
    assert found == [("vit", 2), ("vit+lsa", 2), ("vit", 3), ("vit+lsa", 3)]


def test_rows_whose_recipes_differ_in_length_need_a_common_one() -> None:
    with pytest.raises(InputError, match=r"differ in their epochs \(vit,recipe=deit 300, vit 100\); give --epochs"):
        planned("vit,recipe=deit", "vit")
    assert {entry.options["epochs"] for entry in planned("vit,recipe=deit", "vit,recipe=cct")} == {300}


def test_convolutional_rows_have_a_recipe_of_their_own() -> None:
    rows = ("resnet20", "resnet10t", "vit", "resnet20,recipe=resnet")
    found = planned(*rows, flags={"epochs": 1})[:4]
    assert [entry.recipe for entry in found] == ["cnn", "cnn", None, "resnet"]
    for entry, name in ((found[0], "cnn"), (found[3], "resnet")):
        wanted = recipes.RECIPES[name](arch="resnet20", epochs=1).options()
        assert {option: entry.options[option] for option in ("opt", "lr", "sched", "reg", "weight_decay")} == {
            option: wanted[option] for option in ("opt", "lr", "sched", "reg", "weight_decay")
        }
    assert [entry.recipe for entry in planned("resnet20", "vit", recipe="deit")[:2]] == ["deit", "deit"]


def test_rows_that_begin_with_trained_weights_see_the_same_images(mine: Path) -> None:
    begun, flags = os.path.relpath(mine / "vit-seed0"), {"epochs": 1, "img_size": 12}
    fits, contradicts = planned(f"vit96+lsa,init={begun}", f"cait,init={begun}", flags=flags)[:2]
    assert fits.options["init"] == str(mine.resolve() / "vit-seed0")
    assert fits.options["img_size"] == 12
    fits.check()
    with pytest.raises(InputError, match=rf"row cait,init={begun}: .* has --arch vit96, not --arch cait"):
        contradicts.check()


def changed(folder: Path, **options: Any) -> None:
    (folder / Run.CONFIG).write_text(json.dumps(json.loads((folder / Run.CONFIG).read_text()) | options))


def test_runs_are_in_one_row_if_only_their_seeds_and_places_differ(smallvit: Command, mine: Path) -> None:
    folders = [mine / f"{row}-seed{seed}" for seed in (0, 1) for row in ("vit", "vit+spt+lsa,lr=0.003")]
    changed(folders[2], checkpoint_minutes=1.0, workers=1)
    code, out, _ = smallvit("compare", *folders, "--no-speed", "--out", "new")
    assert code == 0
    names = ("model", "seeds", "test_top1", "test_top1_std", "train_images_per_second", "images_seen")
    by_runs, by_rows = (
        [{name: row[name] for name in names} for row in records(where)] for where in (Path("new"), mine)
    )
    by_runs[1]["model"] = by_rows[1]["model"]  # no other row is of this model: its learning rate need not be told
    assert by_runs == by_rows
    assert "Rows differ in options: lr (0.001, 0.003)" in out


def test_rows_of_one_model_are_called_by_what_tells_them_apart(smallvit: Command, mine: Path) -> None:
    changed(mine / "vit-seed1", lr=0.5)
    code, out, _ = smallvit("compare", *(mine / f"vit-seed{seed}" for seed in (0, 1)), "--no-speed")
    assert code == 0
    assert "\nvit,lr=0.001 " in out
    assert "\nvit,lr=0.5 " in out
    assert not list(Path().glob("compare*"))  # files only where --out says


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: changed(b, data="mnist"), "data is mnist in the former, digits in the latter"),
        (lambda b: changed(b, split_seed=4), "cannot be compared: split_seed is 4 in the former, 0 in the latter"),
        (lambda b: changed(b, train_fraction=0.3), "train_fraction is 0.3 in the former"),
        (lambda b: changed(b, test_flip=True), "test_flip is true in the former"),
        (lambda b: changed(b, seed=0), "seed 0 too; leave one of them out"),
        (lambda b: (b / Run.SUMMARY).unlink(), "not finished; smallvit train --resume"),
        (lambda b: (b / Run.SUMMARY).write_text('{"test_top1": 3.0}'), "it lacks 'test_images'"),
        (lambda b: (b / Run.CONFIG).unlink(), "not the folder of a run"),
        (shutil.rmtree, "no such folder of a run; a row to train is given as --arch"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(
    smallvit: Command, mine: Path, damage: Callable[[Path], object], message: str
) -> None:
    one, other = mine / "vit-seed0", mine / "vit-seed1"
    damage(other)
    code, _, err = smallvit("compare", one, other)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_run_that_is_given_twice_is_refused(smallvit: Command, mine: Path) -> None:
    assert "is there twice" in smallvit("compare", mine / "vit-seed0", mine / "." / "vit-seed0")[2]


def test_rows_that_differ_in_their_batches_are_told_so(smallvit: Command, mine: Path) -> None:
    changed(mine / "vit-seed1", batch_size=32)
    _, out, _ = smallvit("compare", mine / "vit-seed0", mine / "vit-seed1", "--no-speed")
    assert "Rows differ in batch size: 64 (vit,batch-size=64); 32 (vit,batch-size=32)" in out


def interrupt_once(file: Path) -> None:
    """Send SIGINT to this process when the file is there."""
    deadline = time.monotonic() + 120
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGINT)


def test_a_comparison_that_is_interrupted_goes_on(
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
    assert err == "comparison interrupted; the same command goes on\n"
    assert not (lost / Run.SUMMARY).exists()

    monkeypatch.setattr(apart, "train", train_here)
    code, out, _ = smallvit(*arguments)
    assert code == 0
    assert "goes on in" in out
    after = stamps(mine)
    assert {name: after[name] for name in before} == before
    for name in (Run.BEST, Run.LAST):
        assert (lost / name).read_bytes() == (compared / lost.name / name).read_bytes()


def test_sigterm_is_passed_on_and_ends_the_comparison(smallvit: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    start, processes = apart.Relay.start, []

    def asleep(relay: apart.Relay, command: list[str]) -> subprocess.Popen[bytes]:
        processes.append(start(relay, [sys.executable, "-c", "import time; time.sleep(60)"]))
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return processes[-1]

    monkeypatch.setattr(apart.Relay, "start", asleep)
    code, _, err = smallvit("compare", *ROWS, *FLAGS, "--out", "out")
    assert code == 143
    assert err == "comparison interrupted; the same command goes on\n"
    assert [process.returncode for process in processes] == [-signal.SIGTERM]


class Sleepy(nn.Module):
    """Linear in the images, after a while."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.layer, self.shapes = seconds, nn.Linear(64, 10), []
        self.pretrained_cfg = {"input_size": (1, 8, 8)}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        assert not self.training
        self.shapes.append(tuple(images.shape))
        time.sleep(self.seconds)
        return self.layer(images.flatten(1))


def test_speed_is_what_passes_take_and_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = []
    round_ = speed.Timed.round
    monkeypatch.setattr(speed.Timed, "round", lambda timed: (turns.append(timed.model.seconds), round_(timed)))
    slow, quick = Sleepy(0.02), Sleepy(0.005)
    found = speed.measure([slow, quick], torch.device("cpu"), "off")
    assert (found.precision, found.batch_size) == ("fp32", 128)
    assert set(slow.shapes[1:]) == {(128, 1, 8, 8), (1, 1, 8, 8)}  # the first asks for the precision that is sound
    assert turns == [0.02, 0.005, 0.02, 0.005] * 2 or turns == [0.02, 0.02, 0.005, 0.005] * 2
    for model, figures in zip((slow, quick), found.figures, strict=True):
        assert 1e3 * model.seconds <= figures["latency_ms"] < 3e3 * model.seconds
        assert 128 / model.seconds / 3 < figures["inference_images_per_second"] <= 128 / model.seconds


def record(model: str, top1: float, speeds: tuple[float, float], parameters: int) -> dict[str, Any]:
    figures = dict(zip(scatter.PANELS, speeds, strict=True))
    return {"model": model, "test_top1": top1, "test_top1_std": 0.3, "parameters": parameters} | figures


def test_names_in_the_picture_do_not_cover_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert scatter.plot_comparison(crowd, tmp_path / "picture.png", "title")
    for axes in figures[0].axes:
        boxes = [text.get_window_extent() for text in axes.texts if isinstance(text, Annotation)]
        assert len(boxes) == len(crowd)
        assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 for box in boxes)
        for one, other in combinations(boxes, 2):
            both = one.intersection(one, other)
            assert both is None or both.width * both.height < 0.2 * min(b.width * b.height for b in (one, other))


def test_a_label_is_spelt_like_a_row() -> None:
    row = Row("vit", {"spt": True, "lsa_mask": False, "lsa": True, "clip_grad": None}, "deit")
    assert row.label == label("vit", row.options | {"recipe": "deit"})
    assert parse(row.label) == Row("vit", {"spt": True, "lsa": True, "lsa_mask": False, "clip_grad": None}, "deit")
