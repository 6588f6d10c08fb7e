"""Check that RESULTS.md and the README show what the records hold."""

from __future__ import annotations

import functools
import importlib.util
import json
import operator
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from smallvit import Config, InputError
from smallvit.config.config import option_names
from smallvit.experiments import records
from smallvit.experiments.catalog import EXPERIMENTS, required_options
from smallvit.experiments.records import Record
from smallvit.experiments.tables import TrialResult
from smallvit.training.launch import apply_regularization, inherit_from_init

ROOT = Path(__file__).parents[2]
RESULTS, README, PAGE = ROOT / "results", ROOT / "README.md", ROOT / "RESULTS.md"
NUMBER = r"\d[\d,]*(?:\.\d+)?"


def load_make() -> ModuleType:
    """Import results/make.py."""
    spec = importlib.util.spec_from_file_location("results_make", RESULTS / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load_make()

SETTINGS = {"73.81 % for ViT, 76.92 % with both": "the paper's"}
"""Numbers of the README that are settings, or other people's: what stands there, and why no record has it."""


# The page


def test_the_page_matches_the_records() -> None:
    assert PAGE.read_text() == make.render(RESULTS), "run python results/make.py"


def test_every_picture_of_the_page_exists() -> None:
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", PAGE.read_text())
    assert links
    for link in links:
        with Image.open(ROOT / link) as picture:
            picture.load()
            assert min(picture.size) > 100, link


def strays(results: Path) -> list[str]:
    """Records that the page does not show: of no trial, or in another experiment's file."""
    known = {(name, trial.label) for name, each in EXPERIMENTS.items() for trial in each.trials}
    return [
        f"{file}: {record.identity}"
        for file in results.glob("*/*.jsonl")
        for record in records.read(file)
        if (record.experiment, record.row) not in known or file != results / f"{record.experiment}.jsonl"
    ]


def unlike(results: Path) -> list[str]:
    """Records made with other options than their experiments ask for, and which these are."""
    failures = []
    for record in (record for file in results.glob("*/*.jsonl") for record in records.read(file)):
        experiment = EXPERIMENTS[record.experiment]
        row = {trial.label: trial for trial in experiment.trials}[record.row].parse()
        asked = row.given(experiment.options(record.budget), row.recipe) | {"seed": record.seed}
        expected = apply_regularization(inherit_from_init(Config.build(**asked))).to_dict()
        free = {*option_names("resumable", "launch", "local"), "data", "teacher", "streaming", "amp"}
        there = apply_regularization(Config.from_dict(record.config)).to_dict()
        differing = {name for name in expected.keys() - free if expected[name] != there[name]}
        failures += [f"{record.identity}: {differing}"] * bool(differing)
    return failures


def test_every_record_belongs_to_a_trial_and_has_its_options() -> None:
    assert records.read_collection(RESULTS), "there are none"
    assert not strays(RESULTS)
    assert not unlike(RESULTS)


def test_stray_and_outdated_records_are_listed(tmp_path: Path) -> None:
    one = made("vit", 0, 90.0)
    folder = written(tmp_path / "results", [one, made("vit", 1, 90.0, "lee2021/cifar100", 0.05)])
    assert (strays(folder), unlike(folder)) == ([], [])
    records.append(folder / "lee2021" / "svhn.jsonl", one)
    records.append(folder / "lee2021" / "digits.jsonl", replace(one, config=one.config | {"lr": 0.5}))
    assert strays(folder) == [f"{folder / 'lee2021' / 'svhn.jsonl'}: {one.identity}"]
    assert unlike(folder) == [f"{one.identity}: {{'lr'}}"]


def test_every_experiment_has_a_section_that_marks_what_is_not_measured() -> None:
    page, collection = PAGE.read_text(), records.read_collection(RESULTS)
    for name in EXPERIMENTS:
        assert f"(#{name.replace('/', '')})" in page
        rows = table(section(page, name))
        assert list(rows) == [trial.label for trial in EXPERIMENTS[name].trials]
        measured = records.group_by_trial(collection, name, 1.0)
        for label, cells in rows.items():
            assert (cells["measured"] == "not yet measured") == (label not in measured)


def section(page: str, name: str) -> str:
    return re.split(r"\n## ", page.split(f"\n## {name}\n")[1])[0]


def table(text: str) -> dict[str, dict[str, str]]:
    """Return the cells of the first table of a text by the names of rows and columns, the first of equal columns."""
    first = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0]
    head, _, *body = ([cell.strip() for cell in line.split("|")[1:-1]] for line in first.splitlines())
    return {row[0]: dict(reversed(list(zip(head, row, strict=True)))) for row in body}


# Records made by hand


def made(row: str, seed: int, top1: float, name: str = "lee2021/digits", budget: float = 1.0, **more: Any) -> Record:
    summary = {
        "test_top1": top1,
        "val_top1": 80.0,
        "train_seconds": 100.0 + seed,
        "images_per_second": 1000.0,
        "parameters": 450_346,
        "macs": 8_000_000,
        "images_seen": 129_800,
        "test_images": 359,
        "peak_memory_bytes": 10_000_000,
        "hardware": "a machine",
        "precision": "bf16",
        "compile": "off",
        "device": "cpu",
        "epochs": 2,
        "versions": {"torch": "2.11"},
        "git_revision": "0123456789abcdef",
    }
    epochs = {each: [0.0, 0.0] for each in records.EPOCHS} | {"val_top1": [70.0, 80.0]}
    words = {"experiment": name, "row": row, "seed": seed, "budget": budget, "command": f"smallvit train --seed {seed}"}
    trial = {trial.label: trial for trial in EXPERIMENTS[name].trials}[row]
    config = required_options(EXPERIMENTS[name], trial, budget) | {"seed": seed}
    return Record(**words, config=config, summary=summary | more, epochs=epochs)


DIGITS = (made("vit", 0, 90.0), made("vit", 1, 92.0), made("vit+spt+lsa", 1, 96.0), made("vit+spt+lsa", 0, 92.0))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Write records: those of digits above, and one CIFAR-100 model at half of its budget."""
    half = made("vit", 0, 70.0, "lee2021/cifar100", 0.5)
    return written(tmp_path / "results", [*DIGITS, half])


def written(folder: Path, made: Iterable[Record]) -> Path:
    for record in made:
        records.append(folder / f"{record.experiment}.jsonl", record)
    return folder


def test_means_deviations_and_gains_are_computed_from_the_records(results: Path) -> None:
    page = make.render(results)
    rows = table(section(page, "lee2021/digits"))
    assert rows["vit"] == {"model": "vit", "baseline": "–", "measured": "91.00 ± 1.41 (2)", "gain": "–"}
    assert rows["vit+spt+lsa"]["measured"] == "94.00 ± 2.83 (2)"
    assert rows["vit+spt+lsa"]["gain"] == "+3.00 ± 1.41"  # 2 and 4
    assert {rows[label]["measured"] for label in rows if label[:3] != "vit"} == {"not yet measured"}
    costs = table(section(page, "lee2021/digits").split("### ")[1])
    assert (costs["vit"]["seconds"], costs["vit"]["images/s"], costs["vit"]["TFLOP/s"]) == ("100", "1,000", "0.048")
    assert "hardware: a machine, bf16" in page.lower()


def test_published_figures_are_shown_next_to_each_budget(results: Path) -> None:
    rows = table(section(make.render(results), "lee2021/cifar100"))
    assert rows["vit"] == {
        "model": "vit",
        "published": "73.81",
        "measured": "not yet measured",
        "measured at a budget of 0.5": "70.00 (1)",
    }
    assert rows["vit+spt+lsa"]["published"] == "76.92 (+3.11)"


@pytest.mark.slow
def test_other_records_name_their_hardware(results: Path) -> None:
    def run(seed: int, hardware: str) -> str:
        return json.dumps(
            {"command": f"smallvit train --seed {seed}", "summary": DIGITS[0].summary | {"hardware": hardware}}
        )

    file = results / "others.jsonl"
    file.write_text("\n".join(run(seed, machine) for seed, machine in ((0, "one"), (1, "one"), (2, "two"))))
    rows = table(make.render(results).split("\n## Other records\n")[1])
    assert rows["`smallvit train`"]["hardware"] == "one; two"
    for damage in ("{", "3", '{"command": "smallvit train"}', run(3, "one").replace('"one"', "1")):
        file.write_text(run(0, "one") + "\n" + damage + "\n")
        with pytest.raises(InputError, match=rf"^{re.escape(str(file))}, line 2: not the record of a run"):
            make.render(results)


@pytest.mark.slow
def test_a_changed_value_in_a_record_changes_the_page(results: Path) -> None:
    before = make.render(results)
    file = results / "lee2021" / "digits.jsonl"
    first, *rest = file.read_text().splitlines(keepends=True)
    for figure in ("test_top1", "train_seconds", "images_per_second", "parameters", "git_revision"):
        run = json.loads(first)
        value = run["summary"][figure]
        run["summary"][figure] = f"9{value}" if isinstance(value, str) else value * 1.1
        file.write_text(json.dumps(run) + "\n" + "".join(rest))
        assert make.render(results) != before, figure


def test_figures_of_a_note_are_computed(results: Path) -> None:
    (results / "notes").mkdir()
    note = results / "notes" / "lee2021-digits-1.md"
    note.write_text(
        'ViT has {{ top1("vit") }} %, with both plugins {{ gain("vit+spt+lsa") }} more; '
        'on CIFAR-100 {{ published("vit", experiment="lee2021/cifar100") }}, published '
        '{{ published_gain("vit+spt+lsa", experiment="lee2021/cifar100") }}.\n'
    )
    expected = "ViT has 91.00 ± 1.41 %, with both plugins +3.00 ± 1.41 more; on CIFAR-100 73.81, published +3.11."
    assert expected in section(make.render(results), "lee2021/digits")


@pytest.mark.slow
def test_a_note_that_refers_to_missing_figures_is_named(results: Path) -> None:
    (results / "notes").mkdir()
    note = results / "notes" / "lee2021-digits-1.md"
    for expression in (
        'top1("vti")',
        'top1("vit", experiment="lee2021/svhn")',  # no record
        'top1("vit", experiment="lee")',
        'gain("vit")',
        'published("vit")',
        'parameters("swin")',
        'overtaking("vit")',
        "mean",
        "top1(",
    ):
        note.write_text(f"So {{{{ {expression} }}}}.\n")
        with pytest.raises(InputError, match=rf"^{re.escape(str(note))}: ") as caught:
            make.render(results)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_page_and_its_pictures_are_reproducible(results: Path, tmp_path: Path) -> None:
    contents = []
    for _ in range(2):
        make.write(results, tmp_path / "RESULTS.md")
        files = [tmp_path / "RESULTS.md", *sorted(results.rglob("*.png"))]
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1]
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", files[0].read_text())
    assert sorted(tmp_path / name for name in pictures) == files[1:]
    assert len(pictures) == 2


# Derived figures


def result(runs: tuple[Record, ...], baseline: tuple[Record, ...] = ()) -> TrialResult:
    trials = {trial.label: trial for trial in EXPERIMENTS["lee2021/digits"].trials}
    return TrialResult(trials["vit+spt+lsa"], runs, trials["vit"], baseline)


def test_operations_per_second_are_six_per_multiply_accumulate() -> None:
    fast = {"macs": 200_000_000, "hardware": "NVIDIA H200"}
    runs = (
        made("vit", 0, 90.0, **fast | {"images_per_second": 20e3}),
        made("vit", 1, 90.0, **fast | {"images_per_second": 30e3}),
    )
    assert make.teraflops(result(runs)) == pytest.approx(30.0)  # 6 * 2e8 * 25e3
    assert make.share_of_peak(result(runs)) == pytest.approx(30.0 / 989.4)
    for changed in (
        {"hardware": "NVIDIA H200", "precision": "fp32"},
        {"hardware": "AMD EPYC"},
        {"hardware": "NVIDIA H200 MIG 1g"},
    ):
        assert make.share_of_peak(result((made("vit", 0, 90.0, **changed),))) is None


def test_speeds_are_those_of_the_first_runs_machine() -> None:
    runs = tuple(
        made("vit", seed, top1, hardware=machine, images_per_second=speed, train_seconds=seconds)
        for seed, top1, machine, speed, seconds in (
            (0, 90.0, "NVIDIA H200", 20_000.0, 10.0),
            (1, 92.0, "a slow one", 20.0, 9000.0),
            (2, 94.0, "NVIDIA H200", 30_000.0, 20.0),
        )
    )
    outcome = result(runs)
    assert (outcome.speed.mean, outcome.seconds.mean, outcome.top1.mean) == (25_000.0, 15.0, 92.0)


def with_curve(row: str, seed: int, val_top1: list[float | None]) -> Record:
    record = made(row, seed, 90.0)
    return replace(record, epochs=record.epochs | {"val_top1": val_top1})


def test_a_model_overtakes_where_its_mean_curve_reaches_the_final_one_of_the_baseline() -> None:
    baseline = (with_curve("vit", 0, [20.0, 40.0, 55.0, 50.0]), with_curve("vit", 1, [20.0, 40.0, 60.0, 70.0]))
    runs = (
        with_curve("vit+spt+lsa", 0, [30.0, 80.0, 60.0, 80.0]),
        with_curve("vit+spt+lsa", 1, [30.0, 38.0, 61.0, 60.0]),
    )
    assert make.overtaking(result(runs, baseline)) == 0.75  # means 30, 59, 60.5, 70 against 60
    assert make.overtaking(result(runs, baseline[:1])) == make.overtaking(result(runs[:1], baseline)) == 0.5
    assert make.overtaking(result(runs[1:], baseline)) is None, "only seeds that both have"
    assert make.overtaking(result(runs, ())) is None
    unmeasured = with_curve("vit", 0, [None, None])
    assert make.overtaking(result(runs, (unmeasured,))) is None
    assert make.overtaking(result((unmeasured,), baseline)) is None


# The README


@dataclass
class Figures:
    """What can be derived from records, by the sign with which the README tells it."""

    percent: set[float] = field(default_factory=set)
    spreads: set[tuple[float, float]] = field(default_factory=set)
    """Means and deviations over seeds: of accuracies, and of gains."""
    seconds: set[float] = field(default_factory=set)
    rates: set[float] = field(default_factory=set)
    sizes: set[float] = field(default_factory=set)
    printed: set[str] = field(default_factory=set)
    """By the benchmarks, which rounded it themselves."""

    def __or__(self, other: Figures) -> Figures:
        return Figures(**{name: values | getattr(other, name) for name, values in vars(self).items()})

    def add(self, summaries: list[dict[str, Any]]) -> None:
        """Runs that differ in their seeds."""
        for name, numbers in (
            ("test_top1", self.percent),
            ("val_top1", self.percent),
            ("train_seconds", self.seconds),
            ("images_per_second", self.rates),
        ):
            values = [run[name] for run in summaries if run[name] is not None]
            numbers |= {*values, *([statistics.mean(values)] if values else [])}
            if name.endswith("top1") and len(values) > 1:
                self.spreads.add((statistics.mean(values), statistics.stdev(values)))
        self.sizes |= {run[name] for run in summaries for name in ("parameters", "images_seen", "test_images")}

    def gained(self, ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> None:
        """Summaries of two models by seeds."""
        gains = [ours[seed]["test_top1"] - theirs[seed]["test_top1"] for seed in ours if seed in theirs]
        self.percent |= {statistics.mean(gains)} if gains else set()
        if len(gains) > 1:
            self.spreads.add((statistics.mean(gains), statistics.stdev(gains)))


PUBLISHED = {trial.published for each in EXPERIMENTS.values() for trial in each.trials if trial.published} | {
    top1 for each in make.FROM_SCRATCH for top1 in (each.cifar10, each.cifar100, each.tiny) if top1
}


def of_runs(file: Path) -> Figures:
    """Return the figures of a file of records."""
    rows: dict[tuple[str, float | None], dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in file.read_text().splitlines():
        run = json.loads(line)
        row = run.get("row") or run["command"].partition(" --seed")[0]
        rows[row, run.get("budget")][run["config"]["seed"]] = run["summary"]
    figures = Figures()
    for runs in rows.values():
        figures.add([*runs.values()])
    name = str(file.relative_to(RESULTS).with_suffix(""))
    for trial in EXPERIMENTS[name].trials if name in EXPERIMENTS else ():
        for budget in {budget for _, budget in rows}:
            figures.gained(*(rows.get((label, budget), {}) for label in (trial.label, trial.baseline)))
    return figures


def of_timings(file: Path) -> Figures:
    """Return the figures that a benchmark printed."""
    text = file.read_text()
    ratios = re.findall(r"│ (\d\.\d{3}) +│", text)  # times as long as without plugins
    spreads = {(float(mean), float(deviation)) for mean, deviation in re.findall(rf"({NUMBER}) ± ({NUMBER})", text)}
    printed = {*re.findall(NUMBER, text), *(f"{100 * (float(ratio) - 1):.1f}" for ratio in ratios)}
    return Figures(printed=printed, spreads=spreads)


def is_among(text: str, values: Iterable[float | str]) -> bool:
    """Return whether one of the values, rounded to as many digits, is the printed number."""
    text, digits = text.replace(",", ""), decimals(text)
    numbers = (
        float(value.replace(",", "")) if isinstance(value, str) else value
        for value in values
        if not isinstance(value, str) or decimals(value) >= digits
    )
    return any(f"{value:.{digits}f}" == text for value in numbers)


def decimals(text: str) -> int:
    return len(text.partition(".")[2])


def list_unsupported(text: str, known: dict[str, Figures]) -> Iterator[str]:
    """Numbers of a text that stand there as measured, and follow from no record.

    A paragraph that links files of records has its numbers from these, others may have them from any.
    """
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for phrase in SETTINGS:
        text = text.replace(phrase, "")
    for block in text.split("\n\n"):
        linked = [known[link] for link in re.findall(r"\]\(([^)#]+)", block) if link in known]
        yield from _list_unsupported(block, functools.reduce(operator.or_, linked or known.values()))


def _list_unsupported(text: str, figures: Figures) -> Iterator[str]:
    for mean, deviation in re.findall(rf"({NUMBER})\s±\s({NUMBER})", text):
        if not any(is_among(mean, [m]) and is_among(deviation, [d]) for m, d in figures.spreads):
            yield f"{mean} ± {deviation}"
    text = re.sub(rf"{NUMBER}\s±\s{NUMBER}(?:\s%)?", "", text)
    measured = figures.percent | figures.seconds | figures.rates | figures.sizes | figures.printed
    kinds = {
        rf"({NUMBER})(?: to ({NUMBER}))?\s%": figures.percent | figures.printed,
        rf"({NUMBER})\simages/s": figures.rates | figures.printed,
        rf"({NUMBER})(?: to ({NUMBER}))?\ss\b": figures.seconds | figures.printed,
        rf"({NUMBER})\spoints?\b": figures.percent,
        rf"×\s?({NUMBER})": figures.printed,
        rf"({NUMBER})\s×": figures.printed,
        rf"\bp\s=\s({NUMBER})": figures.printed,
        rf"(?<=\|) ({NUMBER})(?: \([+-]?[\d.]+\))? (?=\|)": measured | PUBLISHED,
    }
    for pattern, values in kinds.items():
        for match in re.finditer(pattern, text):
            yield from (match[0].strip() for number in match.groups() if number and not is_among(number, values))


@pytest.fixture(scope="module")
def known() -> dict[str, Figures]:
    """Return the figures of every file in results/, by its path."""
    runs = {file: of_runs(file) for file in (*RESULTS.glob("*.jsonl"), *RESULTS.glob("*/*.jsonl"))}
    timings = {file: of_timings(file) for file in RESULTS.glob("*.txt")}
    return {file.relative_to(ROOT).as_posix(): figures for file, figures in (runs | timings).items()}


def test_every_measured_number_in_the_readme_follows_from_the_records(known: dict[str, Figures]) -> None:
    assert list(list_unsupported(README.read_text(), known)) == []


def test_the_readme_holds_the_listed_exceptions() -> None:
    for phrase in SETTINGS:
        assert phrase in README.read_text(), "take it out of the list"


def accuracies(text: str) -> list[re.Match[str]]:
    """Means and deviations over seeds, and accuracies in per cent, that follow from the records."""
    return [
        each
        for each in re.finditer(r"(?<![\d.])\d+\.\d\d(?![\d.])(?: ± \d+\.\d\d)?(?=\s(?:%|\||\())", text)
        if "±" in each[0] or text[each.end() :].lstrip()[:1] == "%"
    ]


def test_a_changed_digit_in_an_accuracy_of_the_readme_is_detected(known: dict[str, Figures]) -> None:
    text = README.read_text()
    matches = accuracies(text)
    assert len(matches) >= 6
    for match in matches:
        noticed = []
        for index in (index for index in range(*match.span()) if text[index].isdigit()):
            for digit in {*"0123456789"} - {text[index]}:
                changed = text[:index] + digit + text[index + 1 :]
                block = changed[text.rfind("\n\n", 0, index) + 2 : text.find("\n\n", match.end())]
                noticed.append(any(True for _ in list_unsupported(block, known)))
        share = 1.0 if "±" in match[0] else 0.75  # another run of many may well have the other accuracy
        assert statistics.mean(noticed) >= share, match[0]


def test_numbers_are_recognized_in_all_formats() -> None:
    text = (
        "| ViT | 450,347 | 98.14 ± 0.43 % |\n| model step | 117 images/s | ×1.06 |\n\nIt takes 45 s, 1 to 4 % more, "
        "which is 61\n% of it (p = 0.007), or 3.2 points.\n```\n99 %\n```\nPatches of 4, 100 epochs"
        " (73.81 % for ViT, 76.92 % with both).\n"
    )
    expected = {
        "98.14 ± 0.43",
        "450,347",
        "117 images/s",
        "×1.06",
        "45 s",
        "1 to 4 %",
        "61\n%",
        "p = 0.007",
        "3.2 points",
    }
    assert {*list_unsupported(text, {"results/none.txt": Figures()})} == expected
    right = Figures(
        percent={3.21},
        spreads={(98.1431, 0.4312)},
        seconds={45.49},
        sizes={450_347},
        printed={"117", "1.4", "3.6", "61", "1.06", "0.007"},
    )
    assert list(list_unsupported(text, {"results/a.txt": Figures(), "results/b.txt": right})) == []
    right.printed |= {"98", "0.4"}
    right.spreads = {(98.1431, 0.4412), (98.1531, 0.4312)}
    assert list(list_unsupported(text, {"results/b.txt": right})) == ["98.14 ± 0.43"], (
        "mean and deviation are one row's"
    )


def test_a_paragraph_takes_its_numbers_from_the_file_that_it_links() -> None:
    known = {"results/a.jsonl": Figures(percent={42.4}), "results/b.jsonl": Figures(percent={38.4})}
    text = "With 42.40 %, without 38.40 %{}.\n\nElsewhere 38.4 %.\n"
    assert list(list_unsupported(text.format(""), known)) == []
    assert list(list_unsupported(text.format(" ([results/a.jsonl](results/a.jsonl))"), known)) == ["38.40 %"]
