"""The page of results and the README say what the records say, and nothing else."""

from __future__ import annotations

import functools
import json
import operator
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from smallvit import Config, InputError
from smallvit.inherit import inherited
from smallvit.opening import MAY_DIFFER
from smallvit.regularise import regularised
from smallvit.reproduction import document, ledger, records
from smallvit.reproduction.experiments import EXPERIMENTS
from smallvit.reproduction.literature import FROM_SCRATCH
from smallvit.reproduction.records import Record
from smallvit.reproduction.trials import required

ROOT = Path(__file__).parents[1]
RESULTS, README, PAGE = ROOT / "results", ROOT / "README.md", ROOT / "RESULTS.md"
NUMBER = r"\d[\d,]*(?:\.\d+)?"

SETTINGS = {"73.81 % for ViT, 76.92 % with both": "the paper's"}
"""Numbers of the README that are settings, or other people's: what stands there, and why no record has it."""
UNTRACED = {"McNemar\np = 0.007": "of two runs' predictions (smallvit eval --compare), which records do not keep"}
"""Measured numbers of the README that no record has, and why."""


# The page


def test_the_page_is_what_the_records_make() -> None:
    assert PAGE.read_text() == document.text(RESULTS), "python results/make.py writes it anew"


def test_every_picture_of_the_page_is_there() -> None:
    places = re.findall(r"!\[[^]]*\]\(([^)]+)\)", PAGE.read_text())
    assert places
    for place in places:
        with Image.open(ROOT / place) as picture:
            picture.load()
            assert min(picture.size) > 100, place


def strays(results: Path) -> list[str]:
    """Records that the page does not show: of no trial, or in another experiment's file."""
    known = {(name, trial.label) for name, each in EXPERIMENTS.items() for trial in each.trials}
    return [
        f"{file}: {record.identity}"
        for file in results.glob("*/*.jsonl")
        for record in ledger.read(file)
        if (record.experiment, record.row) not in known or file != results / f"{record.experiment}.jsonl"
    ]


def unlike(results: Path) -> list[str]:
    """Records made with other options than their experiments ask for, and which these are."""
    found = []
    for record in (record for file in results.glob("*/*.jsonl") for record in ledger.read(file)):
        experiment = EXPERIMENTS[record.experiment]
        row = {trial.label: trial for trial in experiment.trials}[record.row].parsed()
        asked = row.given(experiment.options(record.budget), row.recipe) | {"seed": record.seed}
        wanted = regularised(inherited(Config.build(**asked))).options()
        free = {*MAY_DIFFER, *records.PRIVATE, "data", "teacher", "streaming", "amp"}
        there = regularised(Config.build(**record.config)).options()
        differing = {name for name in wanted.keys() - free if wanted[name] != there[name]}
        found += [f"{record.identity}: {differing}"] * bool(differing)
    return found


def test_every_record_is_of_a_trial_and_was_made_as_its_experiment_says() -> None:
    assert ledger.gathered(RESULTS), "there are none"
    assert not strays(RESULTS)
    assert not unlike(RESULTS)


def test_records_that_no_trial_has_or_asks_for_are_found(tmp_path: Path) -> None:
    one = made("vit", 0, 90.0)
    folder = written(tmp_path / "results", [one, made("vit", 1, 90.0, "lee2021/cifar100", 0.05)])
    assert (strays(folder), unlike(folder)) == ([], [])
    ledger.append(folder / "lee2021" / "svhn.jsonl", one)
    ledger.append(folder / "lee2021" / "digits.jsonl", replace(one, config=one.config | {"lr": 0.5}))
    assert strays(folder) == [f"{folder / 'lee2021' / 'svhn.jsonl'}: {one.identity}"]
    assert unlike(folder) == [f"{one.identity}: {{'lr'}}"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_a_section_that_says_what_is_not_measured(name: str) -> None:
    page = PAGE.read_text()
    anchor = name.replace("/", "")
    assert f"(#{anchor})" in page
    rows = table(section(page, name))
    assert list(rows) == [trial.label for trial in EXPERIMENTS[name].trials]
    measured = records.of(ledger.gathered(RESULTS), name, 1.0)
    for label, cells in rows.items():
        assert (cells["measured"] == "not yet measured") == (label not in measured)


def section(page: str, name: str) -> str:
    return re.split(r"\n## ", page.split(f"\n## {name}\n")[1])[0]


def table(text: str) -> dict[str, dict[str, str]]:
    """The first table of a text: cells by the rows' and the columns' names, of equal columns the first."""
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
        "versions": {"torch": "2.11"},
        "git_revision": "0123456789abcdef",
    }
    epochs = {each: [0.0, 0.0] for each in records.EPOCHS} | {"val_top1": [70.0, 80.0]}
    words = {"experiment": name, "row": row, "seed": seed, "budget": budget, "command": f"smallvit train --seed {seed}"}
    trial = {trial.label: trial for trial in EXPERIMENTS[name].trials}[row]
    config = required(EXPERIMENTS[name], trial, budget) | {"seed": seed}
    return Record(**words, config=config, summary=summary | more, epochs=epochs)


DIGITS = (made("vit", 0, 90.0), made("vit", 1, 92.0), made("vit+spt+lsa", 1, 96.0), made("vit+spt+lsa", 0, 92.0))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder of records: digits as they are above, and a single model of CIFAR-100 at half of its length."""
    half = made("vit", 0, 70.0, "lee2021/cifar100", 0.5)
    return written(tmp_path / "results", [*DIGITS, half])


def written(folder: Path, made: Iterable[Record]) -> Path:
    for record in made:
        ledger.append(folder / f"{record.experiment}.jsonl", record)
    return folder


def test_means_deviations_and_gains_are_computed_from_the_records(results: Path) -> None:
    page = document.text(results)
    rows = table(section(page, "lee2021/digits"))
    assert rows["vit"] == {"model": "vit", "held against": "–", "measured": "91.00 ± 1.41 (2)", "gain": "–"}
    assert rows["vit+spt+lsa"]["measured"] == "94.00 ± 2.83 (2)"
    assert rows["vit+spt+lsa"]["gain"] == "+3.00 ± 1.41"  # 2 and 4
    assert {rows[label]["measured"] for label in rows if label[:3] != "vit"} == {"not yet measured"}
    costs = table(section(page, "lee2021/digits").split("### ")[1])
    assert (costs["vit"]["seconds"], costs["vit"]["images/s"], costs["vit"]["TFLOP/s"]) == ("100", "1,000", "0.048")
    assert "hardware: a machine, bf16" in page.lower()


def test_published_figures_stand_beside_those_of_every_budget(results: Path) -> None:
    rows = table(section(document.text(results), "lee2021/cifar100"))
    assert rows["vit"] == {
        "model": "vit",
        "published": "73.81",
        "measured": "not yet measured",
        "measured at a budget of 0.5": "70.00 (1)",
    }
    assert rows["vit+spt+lsa"]["published"] == "76.92 (+3.11)"


def test_other_records_say_on_which_hardware_they_were_made(results: Path) -> None:
    def run(seed: int, hardware: str) -> str:
        return json.dumps(
            {"command": f"smallvit train --seed {seed}", "summary": DIGITS[0].summary | {"hardware": hardware}}
        )

    file = results / "others.jsonl"
    file.write_text("\n".join(run(seed, machine) for seed, machine in ((0, "one"), (1, "one"), (2, "two"))))
    rows = table(document.text(results).split("\n## Other records\n")[1])
    assert rows["`smallvit train`"]["hardware"] == "one; two"
    for damage in ("{", "3", '{"command": "smallvit train"}', run(3, "one").replace('"one"', "1")):
        file.write_text(run(0, "one") + "\n" + damage + "\n")
        with pytest.raises(InputError, match=rf"^{re.escape(str(file))}, line 2: no record of a run"):
            document.text(results)


@pytest.mark.parametrize("figure", ["test_top1", "train_seconds", "images_per_second", "parameters", "git_revision"])
def test_another_figure_in_a_record_makes_another_page(results: Path, figure: str) -> None:
    before = document.text(results)
    file = results / "lee2021" / "digits.jsonl"
    first, *rest = file.read_text().splitlines(keepends=True)
    run = json.loads(first)
    value = run["summary"][figure]
    run["summary"][figure] = f"9{value}" if isinstance(value, str) else value * 1.1
    file.write_text(json.dumps(run) + "\n" + "".join(rest))
    assert document.text(results) != before


def test_figures_of_a_note_are_computed(results: Path) -> None:
    (results / "notes").mkdir()
    note = results / "notes" / "lee2021-digits-1.md"
    note.write_text(
        'ViT has {{ top1("vit") }} %, with both plugins {{ gain("vit+spt+lsa") }} more; '
        'on CIFAR-100 {{ published("vit", experiment="lee2021/cifar100") }}, published '
        '{{ published_gain("vit+spt+lsa", experiment="lee2021/cifar100") }}.\n'
    )
    wanted = "ViT has 91.00 ± 1.41 %, with both plugins +3.00 ± 1.41 more; on CIFAR-100 73.81, published +3.11."
    assert wanted in section(document.text(results), "lee2021/digits")


@pytest.mark.parametrize(
    "asked",
    [
        'top1("vti")',
        'top1("vit", experiment="lee2021/svhn")',  # no record
        'top1("vit", experiment="lee")',
        'gain("vit")',
        'published("vit")',
        'parameters("swin")',
        'overtaking("vit")',
        "mean",
        "top1(",
    ],
)
def test_a_note_that_asks_for_what_is_not_there_is_named(results: Path, asked: str) -> None:
    (results / "notes").mkdir()
    note = results / "notes" / "lee2021-digits-1.md"
    note.write_text(f"So {{{{ {asked} }}}}.\n")
    with pytest.raises(InputError, match=rf"^{re.escape(str(note))}: ") as caught:
        document.text(results)
    assert "\n" not in str(caught.value)


def test_the_page_and_its_pictures_are_the_same_whenever_they_are_made(results: Path, tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        document.write(results, tmp_path / "RESULTS.md")
        files = [tmp_path / "RESULTS.md", *sorted(results.rglob("*.png"))]
        found.append([file.read_bytes() for file in files])
    assert found[0] == found[1]
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", files[0].read_text())
    assert sorted(tmp_path / place for place in pictures) == files[1:]
    assert len(pictures) == 2


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
    top1 for each in FROM_SCRATCH for top1 in (each.cifar10, each.cifar100, each.tiny) if top1
}


def of_runs(file: Path) -> Figures:
    """The figures of a file of records."""
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
            figures.gained(*(rows.get((label, budget), {}) for label in (trial.label, trial.against)))
    return figures


def of_timings(file: Path) -> Figures:
    """The figures of what a benchmark printed."""
    text = file.read_text()
    ratios = re.findall(r"│ (\d\.\d{3}) +│", text)  # times as long as without plugins
    return Figures(printed={*re.findall(NUMBER, text), *(f"{100 * (float(ratio) - 1):.1f}" for ratio in ratios)})


def is_among(text: str, values: Iterable[float | str]) -> bool:
    """Whether one of the values, rounded to as many digits, is the number as it is printed."""
    text, digits = text.replace(",", ""), decimals(text)
    numbers = (
        float(value.replace(",", "")) if isinstance(value, str) else value
        for value in values
        if not isinstance(value, str) or decimals(value) >= digits
    )
    return any(f"{value:.{digits}f}" == text for value in numbers)


def decimals(text: str) -> int:
    return len(text.partition(".")[2])


def untold(text: str, known: dict[str, Figures]) -> Iterator[str]:
    """Numbers of a text that stand there as measured, and follow from no record.

    A paragraph that links files of records has its numbers from these, others may have them from any.
    """
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for phrase in (*SETTINGS, *UNTRACED):
        text = text.replace(phrase, "")
    for block in text.split("\n\n"):
        linked = [known[place] for place in re.findall(r"\]\(([^)#]+)", block) if place in known]
        yield from _untold(block, functools.reduce(operator.or_, linked or known.values()))


def _untold(text: str, figures: Figures) -> Iterator[str]:
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
            yield from (match[0].strip() for told in match.groups() if told and not is_among(told, values))


@pytest.fixture(scope="module")
def known() -> dict[str, Figures]:
    """The figures of every file in results/, by its place."""
    runs = {file: of_runs(file) for file in (*RESULTS.glob("*.jsonl"), *RESULTS.glob("*/*.jsonl"))}
    timings = {file: of_timings(file) for file in RESULTS.glob("*.txt")}
    return {file.relative_to(ROOT).as_posix(): figures for file, figures in (runs | timings).items()}


def test_every_measured_number_of_the_readme_follows_from_the_records(known: dict[str, Figures]) -> None:
    assert list(untold(README.read_text(), known)) == []


def test_what_the_readme_says_without_a_record_stands_there_still() -> None:
    for phrase in (*SETTINGS, *UNTRACED):
        assert phrase in README.read_text(), "take it out of the list"


def accuracies(text: str) -> list[re.Match[str]]:
    """Means and deviations over seeds, and accuracies in per cent, that follow from the records."""
    return [
        each
        for each in re.finditer(r"(?<![\d.])\d+\.\d\d(?![\d.])(?: ± \d+\.\d\d)?(?=\s(?:%|\||\())", text)
        if "±" in each[0] or text[each.end() :].lstrip()[:1] == "%"
    ]


def test_another_digit_in_an_accuracy_of_the_readme_is_noticed(known: dict[str, Figures]) -> None:
    text = README.read_text()
    found = accuracies(text)
    assert len(found) >= 6
    for match in found:
        noticed = []
        for place in (place for place in range(*match.span()) if text[place].isdigit()):
            for digit in {*"0123456789"} - {text[place]}:
                changed = text[:place] + digit + text[place + 1 :]
                block = changed[text.rfind("\n\n", 0, place) + 2 : text.find("\n\n", match.end())]
                noticed.append(any(True for _ in untold(block, known)))
        share = 1.0 if "±" in match[0] else 0.9  # another model may well have the other accuracy
        assert statistics.mean(noticed) >= share, match[0]


def test_numbers_are_found_in_whatever_form_they_are_told() -> None:
    told = (
        "| ViT | 450,347 | 98.14 ± 0.43 % |\n| model step | 117 images/s | ×1.06 |\n\nIt takes 45 s, 1 to 4 % more, "
        "which is 61\n% of it (p = 0.007), or 3.2 points.\n```\n99 %\n```\nPatches of 4, 100 epochs"
        " (73.81 % for ViT, 76.92 % with both).\n"
    )
    wanted = {
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
    assert {*untold(told, {"results/none.txt": Figures()})} == wanted
    right = Figures(
        percent={3.21},
        spreads={(98.1431, 0.4312)},
        seconds={45.49},
        sizes={450_347},
        printed={"117", "1.4", "3.6", "61", "1.06", "0.007"},
    )
    assert list(untold(told, {"results/a.txt": Figures(), "results/b.txt": right})) == []
    right.printed |= {"98", "0.4"}
    right.spreads = {(98.1431, 0.4412), (98.1531, 0.4312)}
    assert list(untold(told, {"results/b.txt": right})) == ["98.14 ± 0.43"], "mean and deviation are one row's"


def test_a_paragraph_has_its_numbers_from_the_file_that_it_links() -> None:
    known = {"results/a.jsonl": Figures(percent={42.4}), "results/b.jsonl": Figures(percent={38.4})}
    text = "With 42.40 %, without 38.40 %{}.\n\nElsewhere 38.4 %.\n"
    assert list(untold(text.format(""), known)) == []
    assert list(untold(text.format(" ([results/a.jsonl](results/a.jsonl))"), known)) == ["38.40 %"]
