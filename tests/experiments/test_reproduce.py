"""Check experiments: budgets, trials, records, and training what is missing."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from smallvit import Config, InputError, TrainingError
from smallvit.cli import main
from smallvit.cli.parser import options_parser, parse
from smallvit.config.config import format_train_command, option_names
from smallvit.datasets.catalog import DATASETS
from smallvit.experiments import catalog, grid, records, tables
from smallvit.experiments import reproduce as reproducing
from smallvit.experiments.catalog import EXPERIMENTS, Experiment, Trial, find_equivalent
from smallvit.experiments.records import Record
from smallvit.experiments.tables import TrialResult, collect_results
from smallvit.runs.run import Run
from smallvit.training import train as engine
from smallvit.utils.files import LOCK, locked
from smallvit.utils.signals import SignalInterrupt
from smallvit.utils.tables import Spread

Command = Callable[..., tuple[int, str, str]]

NAME, BUDGET = "lee2021/digits", "0.004"  # 2 passes over a fifth of the images
ROWS = ("--rows", "vit", "--rows", "vit+spt+lsa")
TRIALS = [(name, trial) for name, each in EXPERIMENTS.items() for trial in each.trials]
BUDGETS = (1.0, 0.9, 0.5, 0.333, 0.1, 0.095, 0.05, 0.034, 0.01, 0.003, 1e-3)

PARSER = options_parser("smallvit train", "")

# Lee, Lee, Song 2021: CIFAR-10, CIFAR-100, SVHN, Tiny-ImageNet, plain and with both plugins
PAPER = {
    "vit": ((93.58, 73.81, 97.82, 57.07), (94.53, 76.92, 97.79, 61.07)),
    "swin": ((94.46, 76.87, 97.72, 60.87), (95.93, 79.99, 97.92, 64.95)),
    "pit": ((94.24, 74.99, 97.83, 60.25), (95.88, 79.00, 97.93, 62.91)),
    "cait": ((94.91, 76.89, 98.13, 64.37), (95.81, 80.32, 98.28, 67.18)),
    "t2t": ((95.30, 77.00, 97.90, 60.57), (95.57, 77.36, 97.91, 61.83)),
}
# Gani et al. 2022, in the same order
CNNS = {
    "resnet56": (94.65, 74.44, 97.61, 56.51),
    "resnet110": (95.27, 76.18, 97.82, 59.77),
    "efficientnet_b0": (88.38, 61.64, 96.06, 55.48),
    "resnet18": (90.44, 64.49, 96.78, 53.32),
}
# The same paper's ablation of ViT: CIFAR-100, Tiny-ImageNet
PARTS = {
    "vit": (73.81, 57.07),
    "vit+temperature": (74.35, 57.95),
    "vit+mask": (74.34, 58.29),
    "vit+lsa": (74.87, 58.50),
    "vit+spt": (76.29, 60.67),
    "vit+spt+lsa": (76.92, 61.07),
    "resnet56": (74.44, 56.51),
}


@dataclass
class Trainer:
    """Replace `grid.train` by training in this process."""

    names: list[str] = field(default_factory=list)
    """Names of the folders trained in."""
    failing: set[str] = field(default_factory=set)
    """Names of the runs that fail after the first epoch."""
    interrupting: dict[str, AbstractContextManager[None]] = field(default_factory=dict)
    """Runs that a signal interrupts, by name."""

    def __call__(self, options: dict[str, Any], folder: Path, *_: object) -> int:
        self.names.append(folder.name)
        config = Config.build(**options, out=str(folder), auto_resume=True)
        if folder.name in self.interrupting:
            with self.interrupting.pop(folder.name):
                engine.train(config)
            raise SignalInterrupt(signal.SIGINT)
        try:
            engine.train(config)
        except (TrainingError, InputError):
            return 1
        if folder.name in self.failing:
            (folder / Run.SUMMARY).unlink()
        return int(folder.name in self.failing)


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(catalog, "MIN_EPOCHS", 2)
    monkeypatch.setattr(reproducing, "choose_jobs", lambda *_: 1)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    trainer = Trainer()
    monkeypatch.setattr(grid, "train", trainer)
    return trainer


def reproduce(*arguments: object) -> int:
    return main(["reproduce", *map(str, arguments)])


@dataclass(frozen=True)
class Done:
    """Two rows of two seeds, and what was printed."""

    out: Path
    text: str


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    out, text = tmp_path_factory.mktemp("reproduced") / "out", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(text):
        patch.setattr(grid, "train", Trainer())
        patch.setattr(catalog, "MIN_EPOCHS", 2)
        patch.setattr(reproducing, "choose_jobs", lambda *_: 1)
        patch.setenv("SMALLVIT_CACHE", str(out.parent / "cache"))
        assert reproduce(NAME, "--budget", BUDGET, *ROWS, "--seeds", 2, "--out", out) == 0
    return Done(out, text.getvalue())


@pytest.fixture
def mine(done: Done, tmp_path: Path) -> Path:
    """Copy the trained runs."""
    return Path(shutil.copytree(done.out, tmp_path / "mine"))


def summaries(out: Path, label: str, seeds: tuple[int, ...] = (0, 1)) -> list[dict[str, Any]]:
    return [json.loads((out / f"{label}-seed{seed}" / Run.SUMMARY).read_text()) for seed in seeds]


def table(text: str) -> dict[str, dict[str, str]]:
    """Return the cells of the printed table by model and title."""
    printed = re.split(r"\n(?:Scaled down|The whole)", text[text.rindex("\nmodel ") :].strip())[0]
    titles, _, *rows = [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines()]
    return {row[0]: dict(zip(titles, row, strict=True)) for row in rows}


def made(row: str = "vit", seed: int = 0, top1: float = 90.0, **changes: Any) -> Record:
    """Return an invented record."""
    summary = {
        "test_top1": top1,
        "train_seconds": 100.0,
        "images_per_second": 1000.0,
        "parameters": 450_346,
        "macs": 7_860_288,
        "images_seen": 129_800,
        "test_images": 359,
        "val_top1": 80.0,
        "peak_memory_bytes": 10_000_000,
        "hardware": "a machine",
        "precision": "bf16",
        "compile": "off",
        "device": "cpu",
        "epochs": 2,
        "versions": {"torch": "2.11"},
        "git_revision": "0123456789abcdef",
    }
    val = changes.pop("val_top1", [50.0, 80.0])
    named = {name: changes.pop(name) for name in ("experiment", "budget") if name in changes}
    epochs = {name: [0.0] * len(val) for name in records.EPOCHS} | {"val_top1": val}
    named = {"experiment": NAME, "budget": 1.0} | named
    whole, options = EXPERIMENTS[named["experiment"]], changes.pop("options", {})
    asked = catalog.required_options(whole, trial_of(named["experiment"], row), named["budget"])
    return Record(
        **named,
        row=row,
        seed=seed,
        command=f"smallvit train --arch {row} --seed {seed}",
        config=asked | {"seed": seed} | options,
        summary=summary | changes,
        epochs=epochs,
    )


def configured(command: str) -> Config:
    """Return the configuration that a command of smallvit train gives."""
    assert command.startswith("smallvit train ")
    return Config.build(**parse(PARSER, shlex.split(command)[2:]))


# Size


def test_a_budget_is_a_share_of_the_images_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "MIN_EPOCHS", 10)
    for name, each in EXPERIMENTS.items():
        minimum, whole = min(10, each.epochs), each.flags.get("train_fraction", 1.0)
        for budget in BUDGETS:
            options = each.options(budget)
            epochs, share = options["epochs"], options.get("train_fraction", 1.0)
            assert minimum <= epochs <= each.epochs, (name, budget)
            assert share == whole or epochs == minimum, f"{name}, {budget}: fewer images before the minimum of epochs"
            rounding = 0.5 * whole if share == whole else epochs * 0.5e-6
            expected = pytest.approx(each.epochs * whole * budget, abs=rounding + 1e-12)
            assert epochs * share == expected, (name, budget)
        assert each.options(1.0) == each.flags | {"data": each.data, "epochs": each.epochs}


def test_a_budget_that_changes_nothing_counts_as_one() -> None:
    whole = EXPERIMENTS["lee2021/cifar100"]
    assert [whole.effective_budget(budget) for budget in (1.0, 0.999, 0.998, 0.5)] == [1.0, 1.0, 0.998, 0.5]


def test_a_budget_leaves_at_least_one_training_image_per_class() -> None:
    for name, minimum in (("lee2021/cifar100", 1 / 490), ("lee2021/digits", 1 / 129.384)):
        each = replace(EXPERIMENTS[name], epochs=2)  # the budget then reduces the images, not the epochs
        assert each.effective_budget(minimum * 1.01) == minimum * 1.01
        with pytest.raises(InputError, match=r"^--budget 0\.00\d+: leaves 0\.99 training images per class"):
            each.effective_budget(minimum * 0.99)


def test_only_svhn_is_flipped_explicitly_as_in_the_papers_code() -> None:
    for name in ("svhn", "cifar10", "cifar100", "tiny-imagenet"):
        assert EXPERIMENTS[f"lee2021/{name}"].options(1.0).get("flip") == (0.5 if name == "svhn" else None)


# Rows


def options_of(name: str, trial: Trial, budget: float) -> dict[str, Any]:
    row = trial.parse()
    options = row.given(EXPERIMENTS[name].options(budget), row.recipe)
    return options | ({"teacher": f"runs/{trial.teacher}-seed0"} if trial.teacher else {})


def test_every_trial_is_a_configuration_and_its_command_restores_it() -> None:
    for name, trial in TRIALS:
        for budget in (1.0, 0.01):
            config = Config.build(**options_of(name, trial, budget))
            assert config.data.data == EXPERIMENTS[name].data
            assert config.optim.epochs == EXPERIMENTS[name].options(budget)["epochs"]
            assert (config.distill.teacher is not None) == (trial.teacher is not None)
        command = format_train_command(config, option_names("local"), keep_folders=False)
        assert configured(command).to_dict() == config.to_dict(), (name, trial.label)


def test_labels_are_unique_and_teachers_come_before_their_students() -> None:
    for experiment in EXPERIMENTS.values():
        labels = [trial.label for trial in experiment.trials]
        assert len(set(labels)) == len(labels)
        for index, trial in enumerate(experiment.trials):
            assert trial.baseline is None or trial.baseline in labels
            assert trial.baseline != trial.label
            assert trial.teacher is None or trial.teacher in labels[:index]
            assert (trial.published is None) == (trial.source is None)


def test_published_figures_are_those_of_the_papers() -> None:
    def published(name: str) -> dict[str, float | None]:
        return {trial.label: trial.published for trial in EXPERIMENTS[name].trials}

    for column, data in enumerate(("cifar10", "cifar100", "svhn", "tiny-imagenet")):
        plain, both = ({arch: rows[plugins][column] for arch, rows in PAPER.items()} for plugins in (0, 1))
        cnns = {name: figures[column] for name, figures in CNNS.items()}
        assert published(f"lee2021/{data}") == plain | {f"{arch}+spt+lsa": top1 for arch, top1 in both.items()} | cnns
    for column, name in enumerate(("lee2021/ablation", "lee2021/ablation-tiny-imagenet")):
        assert published(name) == {label: figures[column] for label, figures in PARTS.items()}
    taught = published("deit/cifar100")
    assert (taught["deit_tiny_patch16_224"], taught["deit_small_patch16_224"]) == (67.52, 69.78)
    assert not any(published(NAME).values())


def test_published_gains_are_differences_of_published_figures() -> None:
    gains = {each.trial.label: each.published_gain for each in collect_results("lee2021/cifar100", 1.0, [])}
    for arch, (plain, both) in PAPER.items():
        assert gains[f"{arch}+spt+lsa"] == pytest.approx(both[1] - plain[1])
        assert gains[arch] is None


def trial_of(name: str, label: str) -> Trial:
    return next(trial for trial in EXPERIMENTS[name].trials if trial.label == label)


def test_the_same_runs_in_two_experiments_are_equivalent() -> None:
    equivalent = find_equivalent("lee2021/ablation", trial_of("lee2021/ablation", "vit"))
    assert {("lee2021/ablation", "vit"), ("lee2021/cifar100", "vit")} <= equivalent
    small = find_equivalent("best/ablation", trial_of("best/ablation", "lee2021"))
    assert not small & (equivalent | find_equivalent("lee2021/cifar100", trial_of("lee2021/cifar100", "vit+spt+lsa")))
    assert not any(name == "lee2021/ablation-tiny-imagenet" for name, _ in equivalent)


def test_a_record_of_an_equivalent_trial_counts_once() -> None:
    twin, own = made(experiment="lee2021/cifar100", top1=70.0), made(experiment="lee2021/ablation", top1=71.0)
    other = made(experiment="lee2021/cifar100", budget=0.5)
    assert records.group_by_trial([twin, other], "lee2021/ablation", 1.0) == {"vit": [twin]}
    grouped = records.group_by_trial([twin, own], "lee2021/ablation", 1.0)
    assert [len(runs) for runs in grouped.values()] == [1]
    assert records.list_budgets([twin, other], "lee2021/ablation") == [1.0, 0.5]
    assert records.list_budgets([twin], "best/ablation") == []


# Records


def test_a_record_is_read_as_written_and_added_once(tmp_path: Path) -> None:
    file, kept = tmp_path / "deep" / "er.jsonl", made(top1=1 / 3)
    assert records.read(file) == []
    assert records.append(file, kept)
    assert records.read(file) == [kept]
    before = file.read_bytes()
    assert not records.append(file, made(top1=55.0))
    assert file.read_bytes() == before
    others = [made(seed=1), made("vit+spt+lsa"), made(budget=0.5), made(experiment="lee2021/cifar100")]
    assert all(records.append(file, other) for other in others)
    assert records.read(file) == [kept, *others]
    assert file.read_bytes().startswith(before)


def test_a_record_is_appended_after_a_missing_line_end(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    records.append(file, made())
    file.write_text(file.read_text().rstrip("\n"))
    assert records.append(file, made(seed=1))
    assert records.read(file) == [made(), made(seed=1)]
    assert file.read_text().count("\n") == 2


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    records.append(file, made())
    intact = file.read_text()
    for damage in ("{", "[]", "3", "", '{"experiment": "x"}', "null", '"text"'):
        file.write_text(intact + damage + "\n")
        message = rf"^{re.escape(str(file))}, line 2: not the record of a run; remove the line$"
        with pytest.raises(InputError, match=message):
            records.read(file)
        with pytest.raises(InputError, match="line 2"):
            records.append(file, made(seed=1))


def test_a_collection_holds_files_named_after_experiments(tmp_path: Path) -> None:
    for name, seed in (("lee2021/digits", 0), ("best/cifar100", 1)):
        records.append(tmp_path / f"{name}.jsonl", made(seed=seed))
    (tmp_path / "vit-seed0").mkdir()
    for other in ("records.jsonl", "vit-seed0/metrics.jsonl"):
        (tmp_path / other).write_text("of another form\n")
    assert [each.seed for each in records.read_collection(tmp_path)] == [1, 0]


def test_an_incomplete_record_is_named(tmp_path: Path) -> None:
    file, complete = tmp_path / "records.jsonl", vars(made())
    changes = [
        *({"budget": "1"}, {"epochs": []}, {"epochs": {}}, {"summary": None}, {"more": 1}),
        *({"test_top1": float("nan")}, {"test_top1": "90"}, {"macs": None}, {"train_seconds": None}),
    ]
    for change in changes:
        top = {name: value for name, value in change.items() if name in complete or name == "more"}
        summary = complete["summary"] | {name: value for name, value in change.items() if name not in top}
        file.write_text(json.dumps(complete | {"summary": summary} | top) + "\n")
        with pytest.raises(InputError, match=rf"^{re.escape(str(file))}, line 1: not the record of a run"):
            records.read(file)


def test_a_record_that_cannot_be_written_leaves_the_file_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "records.jsonl"
    records.append(file, made())
    before = file.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="cannot be written"):
        records.append(file, made(seed=1))
    assert file.read_bytes() == before


@pytest.mark.slow
def test_concurrent_processes_add_a_run_once(tmp_path: Path) -> None:
    file, appended = tmp_path / "records.jsonl", []
    with locked(file.with_name(f".{file.name}{LOCK}"), "adds"), open(file, "a") as stream:
        other = threading.Thread(target=lambda: appended.append(records.append(file, made())))
        other.start()
        other.join(0.2)
        stream.write(json.dumps(vars(made())) + "\n")
    other.join()
    assert appended == [False]
    assert records.read(file) == [made()]


def test_a_record_with_other_options_is_ignored(tmp_path: Path) -> None:
    name, stale = "lee2021/cifar100", {"options": {"lr": 1e-4}}
    assert records.group_by_trial([made(experiment=name, **stale)], name, 1.0) == {}
    assert records.list_budgets([made(experiment=name, **stale)], name) == []
    assert records.group_by_trial([made(experiment=name, options={"no_such_option": 1})], name, 1.0) == {}
    new = made(experiment=name)
    for both in ([made(experiment=name, **stale), new], [new, made(experiment=name, **stale)]):
        assert records.group_by_trial(both, name, 1.0) == {"vit": [new]}
    file = tmp_path / "records.jsonl"
    assert records.append(file, made(experiment=name, **stale))
    assert records.append(file, new)
    assert len(records.read(file)) == 2


def test_a_record_from_another_machine_or_before_an_option_existed_counts() -> None:
    machine = {"device": "cpu", "amp": "off", "workers": 3, "streaming": "on", "compile": "graphs", "data": "c100"}
    one = made(experiment="best/cifar100", row="vit+spt+lsa", options=machine)
    assert (one.config["flip"], one.config["aug"]) == (None, "lee2021")
    del one.config["init_values"], one.config["split_seed"]
    assert records.group_by_trial([one], "best/cifar100", 1.0) == {"vit+spt+lsa": [one]}
    lacking = made(experiment="lee2021/cifar100", row="vit+spt+lsa")
    del lacking.config["val_fraction"]  # a default that is not the experiment's
    assert records.group_by_trial([lacking], "lee2021/cifar100", 1.0) == {}


@pytest.fixture
def tens(tmp_path: Path, write_images: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch) -> str:
    """Add an experiment on a data set that can be given as the folder photos."""
    for number in range(3):
        write_images(tmp_path / "photos" / "train" / f"class{number}", 10, 80 * number + 20)
        write_images(tmp_path / "photos" / "test" / f"class{number}", 4, 80 * number + 20)
    described = {"num_classes": 3, "img_size": 16, "in_chans": 3, "num_train": 30, "num_test": 12}
    monkeypatch.setitem(DATASETS, "tens", replace(DATASETS["cifar10"], **described))
    small = Experiment(title="Tens", data="tens", epochs=4, seeds=1, trials=(Trial(label="vit", spec="vit"),))
    monkeypatch.setitem(EXPERIMENTS, "mine/tens", small)
    return "mine/tens"


OTHER_DATA = {
    "another class": (lambda photos, write: write(photos / "train" / "class3", 3), "has 4 classes, "),
    "an image more": (
        lambda photos, write: write(photos / "train" / "class1", 11),
        "has 3 classes, 31 training",
    ),
    "fewer test images": (
        lambda photos, write: (photos / "test/class0/000.png").unlink(),
        "11 test images",
    ),
    "no test": (lambda photos, write: shutil.rmtree(photos / "test"), "has 3 classes, 24 training"),
    "its own val": (
        lambda photos, write: [
            (photos / "val" / f"class{number}").mkdir(parents=True)
            or (photos / f"train/class{number}/000.png").rename(photos / f"val/class{number}/000.png")
            for number in range(3)
        ],
        "has 3 classes, 27 training",
    ),
    "another size": (
        lambda photos, write: [write(folder, len([*folder.iterdir()]), 9, (20, 20)) for folder in photos.glob("*/*")],
        "and 20 pixels, tens has",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHER_DATA)
def test_a_folder_of_other_images_is_rejected(
    smallvit: Command, trained: Trainer, tens: str, write_images: Callable[..., list[Path]], case: str
) -> None:
    change, message = OTHER_DATA[case]
    change(Path("photos"), write_images)
    code, _, err = smallvit("reproduce", tens, "--data", "photos", "--budget", "0.5")
    assert (code, len(err.splitlines())) == (2, 1)
    assert message in err
    assert not trained.names


def test_a_record_holds_no_path_and_its_command_repeats_the_run(
    smallvit: Command, trained: Trainer, tens: str, tmp_path: Path
) -> None:
    arguments = (tens, "--seed", 3, "--data", "photos", "--data-dir", tmp_path)
    code, _, _ = smallvit("reproduce", *arguments, "--budget", "0.5", "--out", "out")
    assert code == 0
    (kept,) = records.read(Path("out") / "records.jsonl")
    assert kept.identity == (tens, "vit", 3, 0.5)
    assert records.group_by_trial([kept], tens, 0.5) == {"vit": [kept]}
    written = json.dumps(vars(kept))
    assert str(tmp_path) not in written
    assert not re.search(r'[" =]/\w', written)
    config = json.loads((Path("out") / "vit-seed3" / Run.CONFIG).read_text())
    assert config["data"] == str(tmp_path / "photos")
    assert kept.config["data"] == "photos"
    assert {name for name in kept.config if kept.config[name] != config[name]} == {"data"}
    again = configured(kept.command).to_dict()
    assert {name: again[name] for name in kept.config} == kept.config
    lines = [json.loads(line) for line in (Path("out") / "vit-seed3" / Run.METRICS).read_text().splitlines()]
    assert kept.epochs == {name: [line[name] for line in lines] for name in records.EPOCHS}


# From the command line


def test_the_table_shows_the_summaries(done: Done) -> None:
    plain, both = (summaries(done.out, label) for label in ("vit", "vit+spt+lsa"))
    gains = [mine["test_top1"] - theirs["test_top1"] for mine, theirs in zip(both, plain, strict=True)]
    rows = table(done.text)
    assert list(rows) == ["vit", "vit+spt+lsa"]
    for label, runs, gain in (
        ("vit", plain, "–"),
        ("vit+spt+lsa", both, f"{statistics.mean(gains):+.2f} ± {statistics.stdev(gains):.2f}"),
    ):
        top1, rates, seconds = (
            [run[name] for run in runs] for name in ("test_top1", "images_per_second", "train_seconds")
        )
        assert rows[label] == {
            "model": label,
            "test top-1 (%)": f"{statistics.mean(top1):.2f} ± {statistics.stdev(top1):.2f}",
            "seeds": "2",
            "gain": gain,
            "parameters": f"{runs[0]['parameters']:,}",
            "images seen": f"{runs[0]['images_seen']:,}",
            "seconds": f"{statistics.mean(seconds):,.0f}",
            "images/s": f"{statistics.mean(rates):,.0f}",
        }


def test_every_run_is_recorded(done: Done) -> None:
    written = records.read(done.out / "records.jsonl")
    runs = [(label, seed) for seed in (0, 1) for label in ("vit", "vit+spt+lsa")]
    assert [each.identity for each in written] == [(NAME, label, seed, float(BUDGET)) for label, seed in runs]
    for each, (label, seed) in zip(written, runs, strict=True):
        (summary,) = summaries(done.out, label, (seed,))
        assert {name: each.summary[name] for name in summary} == summary
        assert (each.config["epochs"], each.config["train_fraction"], each.config["teacher"]) == (2, 0.2, None)


def test_the_same_command_trains_nothing_and_prints_the_same(
    smallvit: Command, trained: Trainer, done: Done, mine: Path
) -> None:
    before = (mine / "records.jsonl").read_bytes()
    code, out, _ = smallvit("reproduce", NAME, "--budget", BUDGET, *ROWS, "--seeds", 2, "--out", mine)
    assert code == 0
    assert not trained.names
    assert out[out.rindex("\nmodel ") :] == done.text[done.text.rindex("\nmodel ") :]
    assert (mine / "records.jsonl").read_bytes() == before


def test_missing_records_are_added_again(smallvit: Command, trained: Trainer, mine: Path) -> None:
    expected = sorted((mine / "records.jsonl").read_text().splitlines())
    (mine / "records.jsonl").unlink()
    code, out, _ = smallvit("reproduce", NAME, "--budget", BUDGET, *ROWS, "--seeds", 2, "--out", mine)
    assert code == 0
    assert out.count("already finished") == len(trained.names) + 4
    assert sorted((mine / "records.jsonl").read_text().splitlines()) == expected


def test_recorded_runs_are_not_trained_again(smallvit: Command, trained: Trainer, done: Done, mine: Path) -> None:
    arguments = (NAME, "--budget", BUDGET, *ROWS, "--seeds", 2, "--record", "kept")
    assert smallvit("reproduce", *arguments, "--out", mine)[0] == 0
    file = Path("kept") / f"{NAME}.jsonl"
    assert records.read(file) == records.read(mine / "records.jsonl")
    before = file.read_bytes()
    code, out, _ = smallvit("reproduce", *arguments, "--out", "elsewhere")
    assert code == 0
    assert out.count("is already recorded") == 4
    assert table(out) == table(done.text)
    assert not trained.names
    assert file.read_bytes() == before
    assert not Path("elsewhere").exists()


@pytest.mark.slow
@pytest.mark.parametrize("out", ["out", "kept"])
def test_new_runs_are_added_to_the_collection(smallvit: Command, trained: Trainer, out: str) -> None:
    arguments = (NAME, "--budget", BUDGET, "--rows", "vit", "--record", "kept", "--out", out, "--seeds")
    for seeds in (1, 2):
        assert smallvit("reproduce", *arguments, seeds)[0] == 0
        assert len(records.read(Path("kept") / f"{NAME}.jsonl")) == seeds
    assert trained.names == ["vit-seed0", "vit-seed1"]
    assert records.read_collection(Path("kept")) == records.read(Path(out) / "records.jsonl")


@pytest.mark.slow
def test_a_run_recorded_with_other_options_is_trained_again(smallvit: Command, trained: Trainer, done: Done) -> None:
    stale = records.read(done.out / "records.jsonl")[0]
    stale.config["lr"] = 0.5
    file = Path("kept") / f"{NAME}.jsonl"
    records.append(file, stale)
    arguments = (NAME, "--budget", BUDGET, "--rows", "vit", "--seeds", 1, "--record", "kept", "--out", "out")
    code, out, _ = smallvit("reproduce", *arguments)
    assert (code, trained.names) == (0, ["vit-seed0"])
    assert table(out)["vit"]["seeds"] == "1"
    assert [each.identity for each in records.read(file)] == [stale.identity] * 2


@pytest.mark.slow
def test_a_run_recorded_meanwhile_is_not_trained(
    smallvit: Command, trained: Trainer, done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = records.read(done.out / "records.jsonl")[1]  # vit+spt+lsa, seed 0

    def train(options: dict[str, Any], folder: Path, *_: object) -> int:
        records.append(Path("kept") / f"{NAME}.jsonl", theirs)
        return trained(options, folder)

    monkeypatch.setattr(grid, "train", train)
    arguments = (NAME, "--budget", BUDGET, *ROWS, "--seeds", 1, "--record", "kept", "--out", "out")
    code, out, _ = smallvit("reproduce", *arguments)
    assert (code, trained.names) == (0, ["vit-seed0"])
    assert "vit+spt+lsa: seed 0 is already recorded" in out


@pytest.mark.slow
def test_an_interrupted_run_is_resumed(
    smallvit: Command,
    trained: Trainer,
    done: Done,
    mine: Path,
    interrupted: Callable[[int], AbstractContextManager[None]],
) -> None:
    kept = (mine / "records.jsonl").read_text().splitlines(keepends=True)
    (mine / "records.jsonl").write_text("".join(kept[:1]))
    for folder in ("vit-seed1", "vit+spt+lsa-seed0", "vit+spt+lsa-seed1"):
        shutil.rmtree(mine / folder)
    arguments = (NAME, "--budget", BUDGET, *ROWS, "--seeds", 2, "--out", mine)
    trained.interrupting["vit-seed1"] = interrupted(11)  # in the second epoch
    code, out, err = smallvit("reproduce", *arguments)
    assert (code, err.splitlines()[-1]) == (130, "interrupted; run the same command to resume")
    assert trained.names == ["vit+spt+lsa-seed0", "vit-seed1"]
    assert "[4/4]" not in out
    assert not (mine / "vit-seed1" / Run.SUMMARY).exists()
    assert len(records.read(mine / "records.jsonl")) == 2

    code, out, _ = smallvit("reproduce", *arguments)
    assert code == 0
    assert "resuming " in out
    assert trained.names[2:] == ["vit-seed1", "vit+spt+lsa-seed1"]
    assert len(records.read(mine / "records.jsonl")) == 4
    for name in (Run.BEST, Run.LAST):
        assert (mine / "vit-seed1" / name).read_bytes() == (done.out / "vit-seed1" / name).read_bytes()


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others(smallvit: Command, trained: Trainer, done: Done, mine: Path) -> None:
    kept = (mine / "records.jsonl").read_text().splitlines(keepends=True)
    (mine / "records.jsonl").write_text("".join(kept[:2]))
    shutil.rmtree(mine / "vit-seed1")
    shutil.rmtree(mine / "vit+spt+lsa-seed1")
    trained.failing.add("vit-seed1")
    code, out, _ = smallvit("reproduce", NAME, "--budget", BUDGET, *ROWS, "--seeds", 2, "--out", mine)
    assert code == 1
    assert "failed (exit code 1)" in out
    assert trained.names == ["vit-seed1", "vit+spt+lsa-seed1"]
    rows, whole = table(out), table(done.text)
    assert [rows[label]["seeds"] for label in rows] == ["1", "2"]
    assert rows["vit+spt+lsa"]["test top-1 (%)"] == whole["vit+spt+lsa"]["test top-1 (%)"]
    (plain,), (both,) = (summaries(done.out, label, (0,)) for label in ("vit", "vit+spt+lsa"))
    assert rows["vit"]["test top-1 (%)"] == f"{plain['test_top1']:.2f}"
    gain = both["test_top1"] - plain["test_top1"]
    assert rows["vit+spt+lsa"]["gain"] == f"{gain:+.2f} (1 of 2 seeds)"


# Teachers


@pytest.fixture
def taught(monkeypatch: pytest.MonkeyPatch) -> str:
    trials = (
        Trial(label="teacher", spec="vit"),
        Trial(label="alone", spec="vit+lsa"),
        Trial(label="pupil", spec="vit+lsa,distill=soft", teacher="teacher", baseline="alone"),
    )
    small = Experiment(title="A pupil", data="digits", epochs=1, seeds=2, trials=trials, flags={"train_fraction": 0.2})
    monkeypatch.setitem(EXPERIMENTS, "mine/taught", small)
    return "mine/taught"


@pytest.mark.slow
def test_a_student_has_the_teacher_of_its_own_seed(smallvit: Command, trained: Trainer, taught: str) -> None:
    code, out, _ = smallvit("reproduce", taught, "--rows", "pupil", "--out", "out", "--record", "kept")
    assert code == 0
    assert trained.names == ["teacher-seed0", "pupil-seed0", "teacher-seed1", "pupil-seed1"]
    assert list(table(out)) == ["teacher", "pupil"]
    for seed in (0, 1):
        config = json.loads((Path("out") / f"pupil-seed{seed}" / Run.CONFIG).read_text())
        assert config["teacher"] == str((Path("out") / f"teacher-seed{seed}").resolve())
        assert (config["seed"], config["distill"]) == (seed, "soft")
    kept = {each.identity[1:3]: each.config["teacher"] for each in records.read(Path("out") / "records.jsonl")}
    assert {each: kept[each] for each in kept if each[0] == "pupil"} == {
        ("pupil", seed): f"teacher-seed{seed}" for seed in (0, 1)
    }
    assert all(teacher is None for (label, _), teacher in kept.items() if label == "teacher")

    trained.names.clear()  # what is on record elsewhere needs no teacher, what is not does
    assert smallvit("reproduce", taught, "--rows", "pupil", "--out", "new", "--record", "kept")[0] == 0
    assert not trained.names
    file = Path("kept") / f"{taught}.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    assert smallvit("reproduce", taught, "--rows", "pupil", "--out", "new", "--record", "kept")[0] == 0
    assert trained.names == ["teacher-seed1", "pupil-seed1"]
    assert len(records.read(file)) == 4


@pytest.mark.slow
def test_students_of_a_failed_teacher_are_skipped(smallvit: Command, trained: Trainer, taught: str) -> None:
    trained.failing.add("teacher-seed0")
    code, out, _ = smallvit("reproduce", taught, "--rows", "pupil", "--out", "out")
    assert code == 1
    assert trained.names == ["teacher-seed0", "teacher-seed1", "pupil-seed1"]
    assert "pupil: seed 0 is skipped, since teacher failed" in out
    assert {label: cells["seeds"] for label, cells in table(out).items()} == {"teacher": "1", "pupil": "1"}


@pytest.mark.slow
def test_an_interrupted_teacher_is_resumed(
    smallvit: Command, trained: Trainer, taught: str, interrupted: Callable[[int], AbstractContextManager[None]]
) -> None:
    trained.interrupting["teacher-seed0"] = interrupted(1)
    arguments = (taught, "--rows", "pupil", "--seeds", 1, "--out", "out")
    assert smallvit("reproduce", *arguments)[0] == 130
    assert not (Path("out") / "teacher-seed0" / Run.BEST).exists()
    assert smallvit("reproduce", *arguments)[0] == 0
    assert trained.names == ["teacher-seed0", "teacher-seed0", "pupil-seed0"]


# Bad input

ONE = (NAME, "--rows", "vit")
BAD = {
    "nothing": ([], "nothing to reproduce: give the name of an experiment; see smallvit list experiments"),
    "name": (["lee2021/digit"], "lee2021/digit: no such experiment (did you mean 'lee2021/digits'?); see smallvit"),
    "row": ([NAME, "--rows", "vti"], "--rows vti: expected one of vit; vit+spt+lsa; "),
    "like a row": ([NAME, "--rows", "vit+spt+las"], "(did you mean 'vit+spt+lsa'?)"),
    "no budget": ([NAME, "--budget", "0"], "--budget 0.0: expected a share above 0 and at most 1"),
    "two budgets": ([NAME, "--budget", "2"], "--budget 2.0: expected a share above 0 and at most 1"),
    "nan": ([NAME, "--budget", "nan"], "--budget nan: expected a share above 0 and at most 1"),
    "text": ([NAME, "--budget", "half"], "--budget half: expected a number"),
    "no seeds": ([NAME, "--seeds", "0"], "--seeds 0: expected at least 1"),
    "no data": (["lee2021/svhn", "--data", "nowhere"], "nowhere: no such folder"),
    "other data": (["lee2021/svhn", "--data", "images"], "; give svhn as a folder of class folders"),
    "digits": ([NAME, "--data", "nowhere"], "--data nowhere: digits is part of scikit-learn; remove --data"),
    "a tiny budget": ([NAME, "--budget", "1e-5"], "--budget 1e-05: leaves 0.065 training images per class"),
    "a seed of several": ([NAME, "--seed", "-1", "--seeds", "3"], "--seed -1: expected at least 0"),
    "a file of records": ([*ONE, "--record", "file"], "file/lee2021/digits.jsonl: cannot be written ("),
    "records nowhere": ([*ONE, "--record", "/proc/nowhere"], "/proc/nowhere/lee2021/digits.jsonl: cannot be written ("),
    "runs in a file": ([*ONE, "--out", "file"], "file/records.jsonl: cannot be "),
    "device": ([NAME, "--device", "cuda:99"], "--device cuda:99: "),
    "another verb's flag": ([NAME, "--epochs", "3"], "--epochs: no such option"),
}


def test_bad_input_is_refused_before_training(smallvit: Command, trained: Trainer, image_folder: Path) -> None:
    Path("file").write_text("")
    before = sorted(Path().rglob("*"))
    for case, (arguments, message) in BAD.items():
        code, out, err = smallvit("reproduce", *arguments)
        assert (code, len(err.splitlines())) == (2, 1), (case, err)
        assert message in err, case
        assert "[1/" not in out
        assert not trained.names
        assert sorted(Path().rglob("*")) == before, case


@pytest.mark.parametrize("processes", ["2", "abc"])
def test_torchrun_is_rejected(
    smallvit: Command, trained: Trainer, monkeypatch: pytest.MonkeyPatch, processes: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", processes)
    code, _, err = smallvit("reproduce", NAME)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "start it without torchrun" in err
    assert not trained.names


def test_runs_of_another_budget_are_rejected(smallvit: Command, trained: Trainer, mine: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in mine.rglob("*")}
    code, _, err = smallvit("reproduce", NAME, "--budget", "0.006", *ROWS, "--seeds", 2, "--out", mine)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "vit-seed0: holds a run with --train-fraction 0.2, not 0.3; choose another --out" in err
    assert not trained.names
    assert {path: path.stat().st_mtime_ns for path in mine.rglob("*")} == before


@pytest.mark.parametrize("where", ["out/records.jsonl", "kept/lee2021/digits.jsonl", "kept/best/cifar100.jsonl"])
def test_damaged_records_are_named_before_training(smallvit: Command, trained: Trainer, where: str) -> None:
    Path(where).parent.mkdir(parents=True)
    Path(where).write_text("{}\n")
    code, _, err = smallvit("reproduce", NAME, "--out", "out", "--record", "kept")
    assert (code, len(err.splitlines())) == (2, 1)
    assert f"{where}, line 1: not the record of a run; remove the line" in err
    assert not trained.names
    assert [path for path in Path().rglob("*") if path.is_file()] == [Path(where)]


# Figures


def result(runs: tuple[Record, ...], baseline: tuple[Record, ...] = ()) -> TrialResult:
    return TrialResult(trial_of(NAME, "vit+spt+lsa"), runs, trial_of(NAME, "vit"), baseline)


def test_a_spread_is_mean_and_deviation_of_the_sample() -> None:
    three = Spread.of([90.0, 92.0, 97.0])
    assert (three.mean, three.count) == (93.0, 3)
    assert three.std == pytest.approx(13**0.5)  # (9 + 1 + 16) / 2
    assert (f"{three:.2f}", f"{three:+.1f}") == ("93.00 ± 3.61", "+93.0 ± 3.6")
    assert f"{Spread.of([90.125]):.2f}" == "90.12"


def test_gains_are_paired_by_seed() -> None:
    runs = tuple(made("vit+spt+lsa", seed, top1) for seed, top1 in ((0, 95.0), (1, 91.0), (2, 99.0)))
    baseline = tuple(made("vit", seed, top1) for seed, top1 in ((1, 90.0), (0, 92.0), (5, 10.0)))
    outcome = result(runs, baseline)
    assert outcome.gain == Spread(2.0, pytest.approx(2**0.5), 2)  # 3 and 1
    assert outcome.top1.mean == pytest.approx(95.0)
    assert result(runs).gain is None
    assert result((), baseline).gain is None
    assert result((), baseline).top1 is None


def test_a_gain_of_fewer_pairs_than_runs_is_marked() -> None:
    runs = tuple(made("vit+spt+lsa", seed, 91.0) for seed in (0, 1))
    baseline = (made("vit", 1, 90.0),)
    assert tables.COLUMNS["gain"](result(runs, baseline)) == "+1.00 (1 of 2 seeds)"
    assert tables.COLUMNS["gain"](result(runs[1:], baseline)) == "+1.00"


def test_every_trial_has_a_result() -> None:
    outcomes = collect_results(NAME, 1.0, [made("vit", 0), made("vit+spt+lsa", 0, 91.0), made("vit", 1, budget=0.5)])
    assert [each.trial for each in outcomes] == list(EXPERIMENTS[NAME].trials)
    by_label = {each.trial.label: each for each in outcomes}
    assert {label: len(each.runs) for label, each in by_label.items() if each.runs} == {"vit": 1, "vit+spt+lsa": 1}
    assert by_label["vit+spt+lsa"].gain == Spread(1.0, None, 1)
    assert by_label["swin"].top1 is None


# Lists, scripts and imports


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "reproduce.sh"


def test_the_script_and_the_docs_name_experiments() -> None:
    named = re.findall(r"^ *reproduce (\S+)", SCRIPT.read_text(), re.MULTILINE)
    assert len(named) > 5
    page = (SCRIPT.parents[1] / "docs" / "reproducing.md").read_text()
    listed: list[str] = []
    for cell in re.findall(r"^\| (`\S.*?) \|", page.split("## Budgets")[0], re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", cell):
            listed.append(name if "/" in name else f"{listed[-1].partition('/')[0]}/{name}")
    assert {*named} <= {*EXPERIMENTS}
    assert sorted(listed) == sorted(EXPERIMENTS)


def test_the_script_continues_after_invalid_input(tmp_path: Path) -> None:
    fake = tmp_path / "smallvit"
    fake.write_text('#!/bin/sh\necho "$@"\n[ "$2" != best/cifar100 ] || exit 2\n[ "$2" != quick/cifar100 ] || exit 1\n')
    fake.chmod(0o755)
    command = ["bash", SCRIPT, "OUT", "--budget", "0.01"]
    done = subprocess.run(
        command, env=os.environ | {"SMALLVIT": str(fake)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("reproduce binaryvit/cifar100")
    assert all(f"--out OUT/{line.split()[1]}@0.01 " in line for line in lines)


# Imports


def test_experiments_are_listed_with_their_rows(smallvit: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "600")

    def listed(text: str) -> dict[str, list[str]]:
        cells = [[cell.strip() for cell in line.split("│")] for line in text.splitlines() if "│" in line]
        return {first: rest for first, *rest in cells[1:]}

    code, out, _ = smallvit("list", "experiments")
    assert code == 0
    assert listed(out) == {
        name: [str(len(each.trials)), str(each.seeds), str(each.epochs), each.title]
        for name, each in EXPERIMENTS.items()
    }
    code, out, _ = smallvit("list", "experiments", "lee*")
    fitting = {name: each for name, each in EXPERIMENTS.items() if name.startswith("lee")}
    assert code == 0
    assert list(listed(out)) == list(fitting)
    for name, each in fitting.items():
        rows = [shlex.split(line) for line in out.splitlines() if line.startswith(f"{name} --rows")]
        assert rows == [[name, "--rows", trial.label] for trial in each.trials]


@pytest.mark.slow
def test_help_and_invalid_names_load_no_torch() -> None:
    modules = ("catalog", "records", "tables")
    check = "import sys\n" + "".join(f"import smallvit.experiments.{name}\n" for name in modules)
    check += "from smallvit.cli import main\n"
    for arguments in (["--help"], ["lee2021"], [NAME, "--rows", "x"], [NAME, "--budget", "0"]):
        check += f"try: main({['reproduce', *arguments]})\nexcept SystemExit: pass\n"
    check += "main(['list', 'experiments'])\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False, capture_output=True).returncode == 0
