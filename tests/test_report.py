"""The page of a run: it says what the run's files say, needs nothing but itself, and can be read by everyone."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from smallvit import learnt, trained, watching
from smallvit.cli import main
from smallvit.cli.options import parse_options
from smallvit.config import Config
from smallvit.pages import charts, dossier, drawings, findings, page
from smallvit.ready import ready

Command = Callable[..., tuple[int, str, str]]
QUICK = ("--train-fraction", "0.3", "--batch-size", "64", "--device", "cpu", "--amp", "off")
VOID = {"meta", "link", "img", "br", "input"}
STYLE = Path(__file__).parents[1] / "smallvit" / "pages" / "page.css.jinja"


class Page(HTMLParser):
    """A page's elements, each with its attributes and all text inside."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        assert not self._open, f"not closed: {[tag for tag, *_ in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = (tag, dict(attrs), [])
        assert len(dict(attrs)) == len(attrs), f"an attribute is there twice: {attrs}"
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1][0] == tag, f"</{tag}> closes <{self._open[-1][0]}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for _, _, texts in self._open:
            texts.append(data)

    def all(self, tag: str, **wanted: str) -> list[str]:
        """The texts of elements, spaces made single."""
        return [
            " ".join("".join(texts).split())
            for name, attributes, texts in self.elements
            if name == tag and all(attributes.get(key.strip("_")) == value for key, value in wanted.items())
        ]

    def attributes(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes, _ in self.elements if name == tag)

    @property
    def text(self) -> str:
        return self.all("body")[0]


def train(out: Path, *options: str) -> Path:
    assert main(["train", *QUICK, "--epochs", "2", *options, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of a ViT with both plugins, one plain, and a CNN."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMALLVIT_CACHE", str(folder / "cache"))
        for seed in ("0", "1"):
            train(folder / f"both{seed}", "--spt", "--lsa", "--seed", seed)
        train(folder / "plain", "--val-fraction", "0")
        train(folder / "cnn", "--arch", "resnet20", "--recipe", "cnn", "--epochs", "1")
    return folder


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    """A copy of one, with results made by hand."""
    folder = Path(shutil.copytree(runs / "both0", tmp_path / "run"))
    judge(folder)
    attend(folder)
    return folder


def judge(folder: Path, names: list[str] | None = None, **changed: Any) -> dict[str, Any]:
    """Test results as `smallvit eval` leaves them, of three classes."""
    names = names or ["zero", "one", "two"]
    confusion = [[80, 10, 30], [3, 100, 17], [0, 0, 119]]
    images = [sum(row) for row in confusion]
    recall = [100 * confusion[number][number] / images[number] for number in range(3)]
    classes = [
        {"name": name, "precision": 51.5 + number, "recall": recall[number], "f1": 90.25 - number, "images": count}
        for number, (name, count) in enumerate(zip(names, images, strict=True))
    ]
    bins = [
        {"low": 0.5 * number, "high": 0.5 * number + 0.5, "confidence": 0.4, "accuracy": 83.25, "images": 100 + number}
        for number in range(2)
    ]
    spoilt = {kind: {"1": 70.0 + number, "2": 60.0, "3": 50.0} for number, kind in enumerate(("noise", "blur"))}
    found = {
        "data": "digits",
        "split": "test",
        "img_size": 8,
        "flip": False,
        "top1": 83.29,
        "top5": 100.0,
        "images": 359,
        "interval": [79.1, 87.0],
        "ece": 3.21,
        "classes": classes,
        "confusion": confusion,
        "reliability": bins,
        "robustness": spoilt,
        "weights_sha256": learnt.weights_sha256(trained.card(str(folder), "report")),
        "precision": "fp32",
        "hardware": "a machine",
        **changed,
    }
    place = folder / "eval" / "test"
    place.mkdir(parents=True, exist_ok=True)
    (place / "metrics.json").write_text(json.dumps(found))
    (place / "predictions.csv").write_text(
        "index,label,predicted,probability,path\n0,zero,zero,0.99,\n1,zero,two,0.61,\n2,one,two,0.83,\n"
    )
    Image.new("RGB", (60, 40), "white").save(place / "mistakes.png")
    return found


def attend(folder: Path, **changed: Any) -> None:
    """Attention as `smallvit attend` leaves it."""
    layers = [{"layer": f"blocks.{n}.attn", "entropy": [2.0, 3.0], "distance": [4.0, 5.0]} for n in range(2)]
    images = [{"source": "a", "predicted": "two", "probability": 0.83, "label": "one"}]
    digest = learnt.weights_sha256(trained.card(str(folder), "report"))
    found = {"layers": layers, "images": images, "weights_sha256": digest, **changed}
    (folder / "attend").mkdir(exist_ok=True)
    (folder / "attend" / "attention.json").write_text(json.dumps(found))
    for number, name in enumerate(("overview", "heads", "layers-1")):
        Image.new("RGBA", (70 + number, 50), (255, 0, 0, 0)).save(folder / "attend" / f"{name}.png")


def page_of(*arguments: object) -> Page:
    """The page that a command writes, read."""
    out = Path(str(arguments[0])) / "report.html"
    out = Path(str(arguments[arguments.index("--out") + 1])) if "--out" in arguments else out
    assert main(["report", "--no-compute", "--overwrite", *map(str, arguments)]) == 0
    return Page(out.read_text(encoding="utf-8"))


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def figures(page: Page) -> list[str]:
    return page.all("dd", class_="value") + page.all("dd", class_="more")


def test_the_page_says_what_the_summary_says(run: Path) -> None:
    page, told = page_of(run), summary(run)
    assert page.all("h1") == ["vit96 + SPT + LSA on digits"]
    assert page.all("p", class_="big") == [f"{told['test_top1']:.2f} %"]
    assert f"{told['test_images']} test images" in page.text
    for shown in (
        f"{told['parameters']:,} trainable values",
        f"{told['macs'] / 1e6:.3g} M",
        f"{told['epochs']} epochs",
        f"{told['images_per_second']:,.0f}",
        f"{told['peak_memory_bytes'] / 1e9:.2f} GB",
    ):
        assert shown in figures(page), shown
    for name in ("hardware", "precision", "git_revision"):
        assert not told[name] or told[name] in page.all("dd")
    assert ", ".join(f"{name} {version}" for name, version in told["versions"].items()) in page.all("dd")


def test_the_interval_is_that_of_bootstrapped_test_images(run: Path) -> None:
    told = summary(run)
    right = np.arange(told["test_images"]) < round(told["test_top1"] / 100 * told["test_images"])
    drawn = np.random.default_rng(0).choice(right, (20_000, len(right))).mean(axis=1)
    low, high = map(float, re.search(r"95 % interval ([\d.]+) to ([\d.]+) %", page_of(run).text).groups())
    one = 100 / told["test_images"]
    assert [low, high] == pytest.approx(100 * np.quantile(drawn, [0.025, 0.975]), abs=1.01 * one)


def test_tables_say_what_the_test_found(run: Path) -> None:
    found = json.loads((run / "eval" / "test" / "metrics.json").read_text())
    page = page_of(run)
    rows = page.all("tr")
    expected = [
        f"{each['name']}{each['images']}{each['precision']:.1f}{each['recall']:.1f}{each['f1']:.1f}"
        for each in sorted(found["classes"], key=lambda each: each["f1"])
    ]
    assert [row for row in rows if row in expected] == expected
    assert "zerotwo3025.0 %" in rows
    assert "noise70.060.050.0" in rows
    assert "3.21 %" in figures(page)
    assert "100.00 %" not in figures(page), "top-5 of three classes says nothing"


def test_curves_go_through_the_recorded_values(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    more = [{**lines[-1], "epoch": epoch, "val_top1": float(epoch % 7)} for epoch in range(3, 30)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines + more))
    page_of(run)
    text = (run / "report.html").read_text()
    chart = text[text.index('aria-label="Validation accuracy') :]
    drawn = re.search(r'<path d="M ([^"]+?)" clip-path="[^"]+" style="fill: none; stroke: var\(--series-2\)', chart)[1]
    points = np.array([point.split() for point in drawn.split("L ")], dtype=float)
    values = np.array([line["val_top1"] for line in lines + more])
    assert len(points) == len(values)
    assert np.corrcoef(points[:, 0], np.arange(len(values)))[0, 1] == pytest.approx(1)
    assert np.corrcoef(points[:, 1], values)[0, 1] == pytest.approx(-1, abs=1e-6)


def test_pictures_are_within_the_page_and_told_in_words(run: Path) -> None:
    page = page_of(run)
    shown = {attributes["width"]: attributes for attributes in page.attributes("img")}
    assert set(shown) == {"60", "70", "71", "72"}
    assert "60 of 359 were" in shown["60"]["alt"]
    assert "one taken for two (83 %); zero taken for two (61 %)" in shown["60"]["alt"]
    assert "one, taken for two (83 %)" in shown["70"]["alt"]
    assert "entropy 2.5, 2.5 nats, distance 4.5, 4.5 pixels" in shown["71"]["alt"]
    for chart in page.attributes("svg"):
        assert chart.get("aria-hidden") == "true" or (chart["role"] == "img" and len(chart["aria-label"]) > 20)


@pytest.fixture(params=["one", "several"])
def any_page(request: pytest.FixtureRequest, run: Path, runs: Path) -> tuple[Path, Page]:
    """The page of one run, and of several."""
    out = run.parent / "page.html"
    others = (runs / "both1", runs / "plain", runs / "cnn") if request.param == "several" else ()
    return out, page_of(run, *others, "--out", out)


def test_the_page_needs_nothing_but_itself(any_page: tuple[Path, Page]) -> None:
    out, page = any_page
    for _, attributes, _ in page.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), attributes
    style = page.all("style")[0]
    assert not re.search(r"url\((?!#)|@import|https?:", style)
    assert "\ufffd" not in out.read_text(encoding="utf-8")


def test_the_page_can_be_heard_and_walked_through_by_keys(any_page: tuple[Path, Page]) -> None:
    _, page = any_page
    assert next(page.attributes("html"))["lang"] == "en"
    levels = [int(tag[1]) for tag, *_ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(below <= above + 1 for above, below in pairwise(levels))
    ids = [attributes["id"] for _, attributes, _ in page.elements if attributes.get("id")]
    assert len(set(ids)) == len(ids)
    for _, attributes, _ in page.elements:
        referred = [attributes.get("aria-labelledby"), (attributes.get("href") or "").removeprefix("#")]
        referred += re.findall(r"url\(#([^)]+)\)", " ".join(value or "" for value in attributes.values()))
        assert all(name in ids for name in referred if name and not name.startswith("data:"))
        if attributes.get("role") == "region":
            assert attributes["aria-label"]
            assert attributes["tabindex"] == "0"
    assert all(header["scope"] in ("row", "col") for header in page.attributes("th"))
    assert len(page.all("caption")) == len(page.all("table")) > 0
    assert all(len(picture["alt"]) > 20 for picture in page.attributes("img"))
    assert {"header", "main", "nav", "footer"} <= {tag for tag, *_ in page.elements}


def luminance(colour: str) -> float:
    """WCAG's relative luminance of #rgb or #rrggbb."""
    digits = colour.removeprefix("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("scheme", [0, 1, 2], ids=["light", "dark", "print"])
def test_letters_and_lines_stand_out_in_every_scheme(scheme: int) -> None:
    root = re.findall(r":root \{(.*?)\}", STYLE.read_text(), re.DOTALL)
    colours = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]+);", root[scheme]))
    grounds = ("--ground", "--surface", "--raised")
    written = ("--ink", "--soft", "--accent", *(f"--series-{number}" for number in range(1, 9)))
    pairs = [(ink, ground) for ink in written for ground in grounds]
    for ink, ground in [*pairs, ("--ink", "--fill"), ("--warn", "--warn-ground")]:
        dark, light = sorted((luminance(colours[ink]), luminance(colours[ground])))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)


@pytest.mark.parametrize("scheme", [0, 1, 2], ids=["light", "dark", "print"])
@pytest.mark.parametrize("cell", [drawings.RIGHT, drawings.WRONG], ids=["right", "wrong"])
def test_numbers_stand_out_from_cells_however_full(scheme: int, cell: tuple[int, int, int]) -> None:
    root = re.findall(r":root \{(.*?)\}", STYLE.read_text(), re.DOTALL)[scheme]
    ink, surface = (re.search(rf"--{name}: (#[0-9a-f]+);", root)[1] for name in ("ink", "surface"))
    digits = surface[1:] if len(surface) == 7 else "".join(2 * digit for digit in surface[1:])
    ground = np.array([int(digits[place : place + 2], 16) for place in (0, 2, 4)])
    for thickness in range(drawings.THICKEST + 1):
        share = thickness / 255
        mixed = np.round(share * np.array(cell) + (1 - share) * ground).astype(int)
        dark, light = sorted((luminance(ink), luminance("#{:02x}{:02x}{:02x}".format(*mixed))))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, thickness


def test_names_are_shown_and_never_run(run: Path, tmp_path: Path) -> None:
    evil = ["<script>alert(1)</script>", "a & b \"'", "$x^2$ </svg>"]
    judge(run, names=evil)
    odd = run.rename(tmp_path / "<img src=x onerror=alert(1)>")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"data": "/no/<b>where"}))
    page = page_of(odd)
    assert len(page.all("script")) == 1
    assert all(attributes["src"].startswith("data:") for attributes in page.attributes("img"))
    assert "alert" not in page.all("script")[0]
    shown = page.all("th", scope="row")
    assert all(name in shown for name in evil)
    assert "<b>where" in page.all("h1")[0]
    letters = page.all("text")
    assert "$x^2$ </svg>" in letters, "names are no formulas"


def test_an_unfinished_run_has_a_page_that_says_so(run: Path) -> None:
    (run / "summary.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(lines[0] + "\n")
    page = page_of(run)
    assert page.all("p", class_="big") == [f"{json.loads(lines[0])['val_top1']:.2f} %"]
    assert "Not finished: 1 of 2 epochs are done" in page.all("p", class_="note")[0]
    assert "Test" not in page.all("h2")
    assert "Training" in page.all("h2")


def test_a_run_that_has_hardly_begun_has_a_page(runs: Path, tmp_path: Path) -> None:
    shutil.copy(runs / "both0" / "config.json", tmp_path)
    page = page_of(tmp_path)
    assert page.all("p", class_="big") == ["–"]
    assert page.all("h1") == ["vit + SPT + LSA on digits"]
    assert not page.all("svg")


def test_a_run_without_validation_has_a_page(runs: Path, tmp_path: Path) -> None:
    page = page_of(runs / "plain", "--out", tmp_path / "plain.html")
    assert "Validation accuracy" not in page.all("title")
    assert "chosen by validation" not in page.text
    assert page.all("p", class_="big") == [f"{summary(runs / 'plain')['test_top1']:.2f} %"]


def test_a_cnn_has_no_attention_and_nothing_is_missed(runs: Path, tmp_path: Path) -> None:
    page = page_of(runs / "cnn", "--out", tmp_path / "cnn.html")
    assert "Where it looks" not in page.all("h2")
    assert not any("Attention" in note for note in page.all("p", class_="note"))


@pytest.mark.parametrize("damage", ["stale", "cut", "poor"])
def test_results_that_are_not_of_these_weights_are_left_out(run: Path, damage: str) -> None:
    file = run / "eval" / "test" / "metrics.json"
    if damage == "stale":
        judge(run, weights_sha256="0" * 64)
        attend(run, weights_sha256="0" * 64)
    else:
        file.write_text(file.read_text()[:100] if damage == "cut" else "{}")
    page = page_of(run)
    told = {"stale": "is about other weights", "cut": "is damaged", "poor": "is damaged"}[damage]
    notes = page.all("p", class_="note")
    assert [note for note in notes if note.startswith("Test results are missing") and told in note]
    assert "Test" not in page.all("h2")
    assert ("Where it looks" in page.all("h2")) == (damage != "stale")


COMPARISON = {
    "name": "runs/other",
    "images": 359,
    "top1": 83.29,
    "other_top1": 80.5,
    "difference": 2.79,
    "interval": [1.25, 4.5],
    "interval_method": "bootstrap",
    "only_one": 12,
    "only_other": 2,
    "p": 0.013,
}
OTHER_TESTS = {
    "size": {"img_size": 16},
    "flip": {"flip": True},
    "data": {"data": "other"},
    "split": {"split": "val"},
    "images": {"images": 358},
}


@pytest.mark.parametrize("changed", OTHER_TESTS.values(), ids=OTHER_TESTS)
def test_another_test_than_the_run_s_own_is_left_out_and_left_alone(
    run: Path, changed: dict[str, Any], smallvit: Command
) -> None:
    judge(run, **changed)
    asked = (run / "eval" / "test" / "metrics.json").read_text()
    assert smallvit("report", run)[0] == 0
    page = Page((run / "report.html").read_text())
    (note,) = page.all("p", class_="note")
    ((name, value),) = changed.items()
    assert f"eval/test/metrics.json is of another test than the run's own ({name} {value}, not " in note
    assert "Test" not in page.all("h2")
    assert "rounding" not in page.text
    assert (run / "eval" / "test" / "metrics.json").read_text() == asked


def test_the_test_is_computed_as_the_run_had_it(runs: Path, tmp_path: Path, smallvit: Command) -> None:
    run = train(tmp_path / "run", "--test-flip", "--epochs", "1")
    assert smallvit("report", run, "--device", "cpu")[0] == 0
    found = json.loads((run / "eval" / "test" / "metrics.json").read_text())
    assert found["flip"]
    assert found["command"] == f"smallvit eval {run} --flip"
    assert found["top1"] == pytest.approx(summary(run)["test_top1"])
    assert not Page((run / "report.html").read_text()).all("p", class_="note")


def values_of(file: Path) -> Iterator[tuple[Any, ...]]:
    """Where a JSON file has values, as paths of keys; of lists, the first element."""
    pending: list[tuple[tuple[Any, ...], Any]] = [((), json.loads(file.read_text()))]
    while pending:
        path, value = pending.pop()
        yield path
        if isinstance(value, dict):
            pending += [((*path, key), each) for key, each in value.items()]
        elif isinstance(value, list) and value:
            pending.append(((*path, 0), value[0]))


def put(file: Path, path: tuple[Any, ...], value: Any) -> None:
    """Change a value in a JSON file; None removes it."""
    whole = [json.loads(file.read_text())]
    place: Any = whole
    *way, last = (0, *path)
    for step in way:
        place = place[step]
    if value is None:
        del place[last]
    else:
        place[last] = value
    file.write_text(json.dumps(whole[0] if whole else None))


@pytest.mark.parametrize("name", ["eval/test/metrics.json", "attend/attention.json"])
def test_whatever_is_wrong_in_a_record_the_page_is_written_or_says_so(
    run: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(charts, "curves", lambda *_: [])  # of other files
    attend(run, split="test", data="digits")
    judge(run, comparison=COMPARISON, left_out=0)
    file = run / name
    good = file.read_text()
    card = trained.card(str(run), "report")
    view, digest = watching.read(run), learnt.weights_sha256(card)
    for path in list(values_of(file)):
        for value in (None, "odd", [], 10**400):
            put(file, path, value)
            found = findings.read(view, card, name, digest)
            if found.record is not None:
                page.render([dossier.read(run)], "2000-01-01")
            assert found.record is not None or name in found.why, (path, value)
            file.write_text(good)


def test_damaged_files_are_named_in_notes(run: Path) -> None:
    judge(run)
    (run / "eval" / "test" / "predictions.csv").write_bytes(b"index,label,predicted,probability\n0,\xff,b,0.5\n")
    (run / "attend" / "attention.json").write_text(json.dumps({"weights_sha256": "0" * 64}))
    notes = page_of(run).all("p", class_="note")
    assert [note.split(" is ")[0].split(": ")[-1] for note in notes] == [
        "attend/attention.json",
        "eval/test/predictions.csv",
    ]
    attend(run)
    for name in ("eval/test/mistakes.png", "attend/heads.png"):
        (run / name).write_bytes((run / name).read_bytes()[:60])
    page = page_of(run)
    notes = page.all("p", class_="note")
    assert [note.split()[0] for note in notes] == [
        "eval/test/predictions.csv",
        "eval/test/mistakes.png",
        "attend/heads.png",
    ]
    assert {attributes["width"] for attributes in page.attributes("img")} == {"70", "72"}


@pytest.mark.parametrize("folder", ["eval", "attend"])
def test_a_file_in_the_place_of_a_folder_is_named(run: Path, folder: str, smallvit: Command) -> None:
    shutil.rmtree(run / folder)
    (run / folder).write_text("mine")
    assert smallvit("report", run, "--device", "cpu")[0] == 0
    (note,) = Page((run / "report.html").read_text()).all("p", class_="note")
    assert f"missing: {folder}/" in note
    assert "file" in note
    assert (run / folder).read_text() == "mine"


def test_lines_of_metrics_may_lack_what_did_not_come_out(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[0]["temperatures"].popitem()
    for line in lines:
        line["lr"] = float("nan")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    titles = page_of(run).all("title")
    assert "Learnt temperatures (LSA)" in titles
    assert "Learning rate" not in titles


def test_a_wide_or_long_picture_is_shrunk_and_that_is_said(run: Path) -> None:
    Image.new("RGB", (30, 20_000)).save(run / "attend" / "overview.png")
    page = page_of(run)
    assert max(int(each["height"]) for each in page.attributes("img")) <= 16383
    assert "Shrunk to 82 %; whole, it is attend/overview.png in the run's folder." in page.text


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"split": "test", "data": "digits"}, "1 images of the run's own test, "),
        ({"split": "train", "data": "digits"}, "1 images of those that it learnt from, "),
        ({"split": "test", "data": "other"}, "1 images of other data (other, test), "),
        ({"split": None, "data": None}, "1 image files that somebody chose, not images of the run's own test."),
    ],
)
def test_the_page_says_which_images_attention_is_of(run: Path, record: dict[str, Any], told: str) -> None:
    attend(run, **record)
    assert told in page_of(run).text


def test_a_comparison_is_told(run: Path) -> None:
    judge(run, comparison=COMPARISON)
    told = (
        "Beside runs/other, on the same 359 images: 83.29 % here, 80.50 % there; +2.79 points (95 % interval +1.25 to "
        "+4.50): more than chance would give (McNemar p = 0.013; 12 images only the first knows, 2 only the second)."
    )
    assert told in page_of(run).all("p")


def test_class_names_stay_as_they_are(run: Path, recwarn: pytest.WarningsRecorder) -> None:
    names = ["c #01fe01 x:href", 'a id="b" url(#c)', "\u732b and all that is long"]
    judge(run, names=names)
    page = page_of(run)
    assert not recwarn.list
    letters = page.all("text")
    assert all(letters.count(name) == 2 for name in names[:2])
    assert letters.count("\u732b and all that is…") == 2
    assert page.all("title").count(names[2]) == 2


def test_what_is_missing_is_computed_and_kept(runs: Path, tmp_path: Path, smallvit: Command) -> None:
    run = Path(shutil.copytree(runs / "both0", tmp_path / "run"))
    judge(run, weights_sha256="0" * 64)
    code, out, _ = smallvit("report", run, "--device", "cpu")
    assert (code, out) == (0, f"{run / 'report.html'}\n")
    found = json.loads((run / "eval" / "test" / "metrics.json").read_text())
    assert found["top1"] == pytest.approx(summary(run)["test_top1"])
    page = Page((run / "report.html").read_text())
    assert not page.all("p", class_="note")
    assert {"Test", "Where it looks"} <= set(page.all("h2"))
    assert len(found["classes"]) == 10
    for each in found["classes"]:
        row = f"{each['name']}{each['images']}{each['precision']:.1f}{each['recall']:.1f}{each['f1']:.1f}"
        assert row in page.all("tr")


def test_a_run_whose_data_is_gone_has_a_page_that_says_so(
    image_folder: Path, tmp_path: Path, smallvit: Command
) -> None:
    run = train(tmp_path / "run", "--data", str(image_folder), "--epochs", "1")
    shutil.rmtree(image_folder)
    code, out, _ = smallvit("report", run)
    assert code == 0
    notes = Page((run / "report.html").read_text()).all("p", class_="note")
    assert len(notes) == 2
    assert all(str(image_folder) in note for note in notes)
    assert all(note in out for note in notes)


def test_a_page_that_is_there_is_replaced_only_where_asked(run: Path, smallvit: Command) -> None:
    shutil.rmtree(run / "eval")
    (run / "report.html").write_text("mine")
    code, _, err = smallvit("report", run)
    assert code == 2
    assert err == f"smallvit: --out {run / 'report.html'}: exists already; choose another name, or --overwrite\n"
    assert (run / "report.html").read_text() == "mine"
    assert not (run / "eval").exists(), "nothing is computed in vain"
    assert smallvit("report", run, "--no-compute", "--overwrite")[0] == 0
    assert (run / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("place", ["own", "folder", "nowhere"])
def test_a_place_that_cannot_be_written_to_is_named_before_anything_is_computed(
    run: Path, place: str, smallvit: Command
) -> None:
    shutil.rmtree(run / "eval")
    out = {"own": run / "report.html", "folder": run / "dir.html", "nowhere": Path("/proc/page.html")}[place]
    if place != "nowhere":
        out.mkdir()
    code, _, err = smallvit("report", run, "--overwrite", *(() if place == "own" else ("--out", out)))
    assert code == 2
    assert f"--out {out}" in err
    assert not (run / "eval").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("train_seconds", None), ("device", None), ("test_top1", float("nan")), ("test_images", 0), ("versions", [1])],
)
def test_a_summary_that_lacks_a_figure_ends_in_one_line(run: Path, name: str, value: Any, smallvit: Command) -> None:
    put(run / "summary.json", (name,), value)
    code, _, err = smallvit("report", run)
    assert code == 2
    assert f"summary.json: it lacks '{name}'" in err


@pytest.mark.parametrize("changed", [{"temperatures": [1]}, {"val_loss": None}, {"epoch": 1.5}, {"val_top1": 1e999}])
def test_a_damaged_line_of_metrics_ends_in_one_line(run: Path, changed: dict[str, Any], smallvit: Command) -> None:
    first, *others = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(json.dumps(json.loads(first) | changed) + "\n" + "".join(others))
    code, _, err = smallvit("report", run)
    assert code == 2
    assert "metrics.jsonl: line 1 is damaged" in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["RUN", "RUN"], "is there twice"),
        (["RUN", "--out", "page.pdf"], "expected a name that ends in .html"),
        ([], "RUN"),
    ],
)
def test_bad_input_ends_in_one_line(arguments: list[str], told: str, run: Path, smallvit: Command) -> None:
    code, _, err = smallvit("report", *(str(run) if each == "RUN" else each for each in arguments))
    assert code == 2
    assert told in err
    assert err.count("\n") == 1


def test_runs_that_differ_in_their_seed_are_one_row(runs: Path, tmp_path: Path) -> None:
    folders = [runs / "both0", runs / "both1"]
    page = page_of(*folders, "--out", tmp_path / "page.html")
    top1 = [summary(folder)["test_top1"] for folder in folders]
    (row,) = [row for row in page.all("tr") if row.startswith("vit+spt+lsa")]
    assert row.startswith(f"vit+spt+lsa{statistics.mean(top1):.2f} ± {statistics.stdev(top1):.2f}2")
    assert [heading for heading in page.all("h2") if heading.startswith("both")] == ["both0", "both1"]
    for folder, value in zip(folders, top1, strict=True):
        assert any(row.startswith(folder.name) and f"{value:.2f}" in row for row in page.all("tr"))
    assert "One seed" not in page.text
    assert sum(title == "Validation accuracy" for title in page.all("title")) == 3


def test_runs_that_cannot_be_compared_are_shown_all_the_same(runs: Path, tmp_path: Path) -> None:
    page = page_of(runs / "both0", runs / "plain", "--out", tmp_path / "page.html")
    assert any("val_fraction" in note for note in page.all("p", class_="note"))
    assert {"both0", "plain"} <= set(page.all("h2"))
    assert page.text.count("One seed") == 2


def test_several_pages_go_to_the_working_directory(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smallvit: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    assert smallvit("report", runs / "both0", runs / "both1", "--no-compute")[0] == 0
    assert (tmp_path / "report.html").exists()


def test_the_commands_repeat_the_run(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"spt_norm": False, "data_dir": "it's here", "erasing": 0.5}))
    stored = Config.build(**json.loads((run / "config.json").read_text()))
    commands = [code for code in page_of(run).all("code") if code.startswith("smallvit train")]
    assert len(commands) == 2
    for command in commands:
        given = parse_options(shlex.split(command)[2:], "smallvit train", "")
        assert Config.build(**given) == stored
    assert "--spt --no-spt-norm" in commands[0].replace("--lsa ", "")
    assert "--warmup" in commands[1]
    assert "--warmup" not in commands[0]


def test_the_lines_of_python_answer_as_the_model_does(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page_of(run)
    text = (run / "report.html").read_text()
    snippet = unescape(re.search(r"<code>(import smallvit.*?)</code>", text, re.DOTALL)[1])
    pixels = (load_digits().images[7] * 255 / 16).round().astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(snippet, {})
    model = ready(str(run), "report", device="cpu", amp="off")
    answer = model.logits(model.normalised(torch.from_numpy(pixels)[None, None])).argmax()
    assert capsys.readouterr().out.strip() == model.class_names[answer]


def test_the_page_is_written_without_torch(run: Path) -> None:
    code = (
        "import sys; from smallvit.cli import main; "
        f"code = main(['report', {str(run)!r}]); sys.exit(code or 3 * ('torch' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
