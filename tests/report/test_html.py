"""Check the report page: its contents, its accessibility, and what it says about missing or damaged results."""

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

from smallvit.cli import main
from smallvit.cli.parser import options_parser
from smallvit.cli.parser import parse as parse_arguments
from smallvit.config.config import Config
from smallvit.evaluation.predictor import load_predictor
from smallvit.models import weights_info
from smallvit.report import pictures

Command = Callable[..., tuple[int, str, str]]
QUICK = ("--train-fraction", "0.3", "--batch-size", "64", "--device", "cpu", "--amp", "off")
VOID = {"meta", "link", "img", "br", "input"}
STYLE = Path(__file__).parents[2] / "smallvit" / "report" / "page.css.jinja"


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

    def all(self, tag: str, **expected: str) -> list[str]:
        """Return the texts of elements with single spaces."""
        return [
            " ".join("".join(texts).split())
            for name, attributes, texts in self.elements
            if name == tag and all(attributes.get(key.strip("_")) == value for key, value in expected.items())
        ]

    def attributes(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes, _ in self.elements if name == tag)

    @property
    def text(self) -> str:
        return self.all("body")[0]


def train(out: Path, *options: str) -> Path:
    assert main(["train", *QUICK, "--epochs", "2", *options, "--out", str(out)]) == 0
    return out


@pytest.fixture
def real_charts() -> None:
    """Mark a test that needs the charts themselves."""


@pytest.fixture(autouse=True)
def _empty_charts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save empty charts in other tests: rendering them takes longer than the rest of a page."""
    if "real_charts" not in request.fixturenames:
        save = pictures.Figure.savefig

        def savefig(figure: pictures.Figure, file: object, **options: object) -> None:
            """Leave figures that are saved to a path to matplotlib."""
            file.write(b"<svg></svg>") if hasattr(file, "write") else save(figure, file, **options)

        monkeypatch.setattr(pictures.Figure, "savefig", savefig)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a ViT with both plugins with two seeds, a plain one, and a CNN."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMALLVIT_CACHE", str(folder / "cache"))
        for seed in ("0", "1"):
            train(folder / f"both{seed}", "--spt", "--lsa", "--seed", seed)
        train(folder / "plain", "--val-fraction", "0")
        train(folder / "cnn", "--arch", "resnet20", "--recipe", "cnn", "--epochs", "1")
    return folder


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    """Copy the shared run, and add invented results."""
    folder = Path(shutil.copytree(trained_run, tmp_path / "run"))
    write_evaluation(folder)
    attend(folder)
    return folder


def write_evaluation(folder: Path, names: list[str] | None = None, **changed: Any) -> dict[str, Any]:
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
    metrics = {
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
        "weights_sha256": weights_info.compute_sha256(weights_info.read_weights_info(str(folder), "report")),
        "precision": "fp32",
        "hardware": "a machine",
        **changed,
    }
    target = folder / "eval" / "test"
    target.mkdir(parents=True, exist_ok=True)
    (target / "metrics.json").write_text(json.dumps(metrics))
    for number, name in enumerate(("mistakes", "confusion", "reliability")):
        Image.new("RGB", (60 + number, 40), "white").save(target / f"{name}.png")
    return metrics


def attend(folder: Path, **changed: Any) -> None:
    """Attention as `smallvit attend` leaves it."""
    layers = [{"layer": f"blocks.{n}.attn", "entropy": [2.0, 3.0], "distance": [4.0, 5.0]} for n in range(2)]
    images = [{"source": "a", "predicted": "two", "probability": 0.83, "label": "one"}]
    digest = weights_info.compute_sha256(weights_info.read_weights_info(str(folder), "report"))
    attention = {"layers": layers, "images": images, "weights_sha256": digest, **changed}
    (folder / "attend").mkdir(exist_ok=True)
    (folder / "attend" / "attention.json").write_text(json.dumps(attention))
    for number, name in enumerate(("overview", "heads", "layers-1")):
        Image.new("RGBA", (70 + number, 50), (255, 0, 0, 0)).save(folder / "attend" / f"{name}.png")


def page_of(*arguments: object) -> Page:
    """Read the page that a command writes."""
    out = Path(str(arguments[0])) / "report.html"
    out = Path(str(arguments[arguments.index("--out") + 1])) if "--out" in arguments else out
    assert main(["report", "--no-compute", "--overwrite", *map(str, arguments)]) == 0
    return Page(out.read_text(encoding="utf-8"))


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def figures(page: Page) -> list[str]:
    return page.all("dd", class_="value") + page.all("dd", class_="more")


def test_the_page_shows_the_summary(run: Path) -> None:
    page, values = page_of(run), summary(run)
    assert page.all("h1") == ["vit96 + SPT + LSA on digits"]
    assert page.all("p", class_="big") == [f"{values['test_top1']:.2f} %"]
    assert f"{values['test_images']} test images" in page.text
    for shown in (
        f"{values['parameters']:,} trainable",
        f"{values['macs'] / 1e6:.1f} M",
        f"{values['epochs']} epochs",
        f"{values['images_per_second']:,.0f}",
        f"{values['peak_memory_bytes'] / 1e9:.2f} GB",
    ):
        assert shown in figures(page), shown
    for name in ("hardware", "precision", "git_revision"):
        assert not values[name] or values[name] in page.all("dd")
    assert ", ".join(f"{name} {version}" for name, version in values["versions"].items()) in page.all("dd")


def test_the_interval_is_that_of_bootstrapped_test_images(run: Path) -> None:
    values = summary(run)
    right = np.arange(values["test_images"]) < round(values["test_top1"] / 100 * values["test_images"])
    drawn = np.random.default_rng(0).choice(right, (20_000, len(right))).mean(axis=1)
    low, high = map(float, re.search(r"95 % interval ([\d.]+) to ([\d.]+) %", page_of(run).text).groups())
    one = 100 / values["test_images"]
    assert [low, high] == pytest.approx(100 * np.quantile(drawn, [0.025, 0.975]), abs=1.01 * one)


def test_tables_show_the_test_results(run: Path) -> None:
    metrics = json.loads((run / "eval" / "test" / "metrics.json").read_text())
    page = page_of(run)
    rows = page.all("tr")
    expected = [
        f"{each['name']}{each['images']}{each['precision']:.1f}{each['recall']:.1f}{each['f1']:.1f}"
        for each in sorted(metrics["classes"], key=lambda each: each["f1"])
    ]
    assert [row for row in rows if row in expected] == expected
    assert "zerotwo3025.0 %" in rows
    assert "noise70.060.050.0" in rows
    assert "3.21 %" in figures(page)
    assert "100.00 %" not in figures(page), "top-5 of three classes says nothing"


def test_curves_show_the_recorded_values(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(
        pictures, "plot_lines", lambda title, _, curves, marked: drawn.update({title: (curves, marked)})
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    more = [{**lines[-1], "epoch": epoch, "val_top1": float(epoch % 7)} for epoch in range(3, 30)]
    pictures.plot_training(lines + more, max(lines + more, key=lambda line: line["val_top1"]))
    assert {"Loss", "Validation accuracy", "Learning rate", "Learned temperatures (LSA)"} == {*drawn}
    curves, marked = drawn["Validation accuracy"]
    values = [line["val_top1"] for line in lines + more]
    assert [value for _, value in curves["validation"]] == pytest.approx(values)
    assert marked[1] == max(values)


def test_images_are_embedded_and_described(run: Path) -> None:
    page = page_of(run)
    shown = {attributes["width"]: attributes for attributes in page.attributes("img")}
    assert {"60", "61", "62", "70", "71", "72"} <= set(shown)
    assert "60 of 359 were misclassified" in shown["60"]["alt"]
    assert "299 of 359 images lie on the diagonal" in shown["61"]["alt"]
    assert "0 to 50 %: 83 % of 100 images; 50 to 100 %: 83 % of 101 images" in shown["62"]["alt"]
    assert "one, classified as two (83 %)" in shown["70"]["alt"]
    assert "entropy 2.5, 2.5 nats, distance 4.5, 4.5 pixels" in shown["71"]["alt"]
    assert all(attributes["src"].startswith("data:image/") for attributes in page.attributes("img"))
    assert all(len(attributes["alt"]) > 20 for attributes in page.attributes("img"))


@pytest.fixture(params=["one", pytest.param("several", marks=pytest.mark.slow)])
def any_page(request: pytest.FixtureRequest, run: Path, real_charts: None) -> tuple[Path, Page]:
    """Write the page of one run, and of several."""
    out = run.parent / "page.html"
    runs = request.getfixturevalue("runs") if request.param == "several" else None
    others = (runs / "both1", runs / "plain", runs / "cnn") if runs else ()
    return out, page_of(run, *others, "--out", out)


def test_the_page_is_self_contained(any_page: tuple[Path, Page]) -> None:
    out, page = any_page
    for _, attributes, _ in page.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), attributes
    style = page.all("style")[0]
    assert not re.search(r"url\((?!#)|@import|https?:", style)
    assert "\ufffd" not in out.read_text(encoding="utf-8")


def test_the_page_is_accessible(any_page: tuple[Path, Page]) -> None:
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


def luminance(color: str) -> float:
    """WCAG's relative luminance of #rgb or #rrggbb."""
    digits = color.removeprefix("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    parts = [int(digits[index : index + 2], 16) / 255 for index in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_text_contrast_is_sufficient_in_every_scheme() -> None:
    for root in re.findall(r":root \{(.*?)\}", STYLE.read_text(), re.DOTALL):
        colors = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]+);", root))
        pairs = [
            (ink, ground) for ink in ("--ink", "--soft", "--accent") for ground in ("--ground", "--surface", "--raised")
        ]
        for ink, ground in [*pairs, ("--ink", "--fill"), ("--warn", "--warn-ground")]:
            dark, light = sorted((luminance(colors[ink]), luminance(colors[ground])))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)


def test_names_are_escaped(run: Path, tmp_path: Path, real_charts: None) -> None:
    evil = ["<script>alert(1)</script>", "a & b \"'", "$x^2$ </svg>"]
    write_evaluation(run, names=evil)
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


def test_the_page_of_an_unfinished_run_says_so(run: Path) -> None:
    (run / "summary.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(lines[0] + "\n")
    page = page_of(run)
    assert page.all("p", class_="big") == [f"{json.loads(lines[0])['val_top1']:.2f} %"]
    assert "Not finished: 1 of 2 epochs are done" in page.all("p", class_="note")[0]
    assert "Test" not in page.all("h2")
    assert "Training" in page.all("h2")


def test_a_run_without_epochs_has_a_page(trained_run: Path, tmp_path: Path) -> None:
    shutil.copy(trained_run / "config.json", tmp_path)
    page = page_of(tmp_path)
    assert page.all("p", class_="big") == ["–"]
    assert page.all("h1") == ["vit + SPT + LSA on digits"]
    assert not page.all("img")


@pytest.mark.slow
def test_a_run_without_validation_has_a_page(runs: Path, tmp_path: Path) -> None:
    page = page_of(runs / "plain", "--out", tmp_path / "plain.html")
    assert "Validation accuracy" not in page.all("strong")
    assert "selected by validation" not in page.text
    assert page.all("p", class_="big") == [f"{summary(runs / 'plain')['test_top1']:.2f} %"]


@pytest.mark.slow
def test_a_cnn_has_no_attention_section(runs: Path, tmp_path: Path) -> None:
    page = page_of(runs / "cnn", "--out", tmp_path / "cnn.html")
    assert "Attention" not in page.all("h2")
    assert not any("Attention" in note for note in page.all("p", class_="note"))


def test_results_of_other_weights_and_damaged_results_are_not_shown(run: Path) -> None:
    file = run / "eval" / "test" / "metrics.json"
    for damage, reason in (("stale", "is of other weights"), ("cut", "is damaged"), ("poor", "is damaged")):
        write_evaluation(run)
        attend(run)
        if damage == "stale":
            write_evaluation(run, weights_sha256="0" * 64)
            attend(run, weights_sha256="0" * 64)
        else:
            file.write_text(file.read_text()[:100] if damage == "cut" else "{}")
        page = page_of(run)
        notes = page.all("p", class_="note")
        assert [note for note in notes if note.startswith("Test results are missing") and reason in note]
        assert "Test" not in page.all("h2")
        assert ("Attention" in page.all("h2")) == (damage != "stale")


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


def test_results_of_another_test_are_neither_shown_nor_replaced(run: Path, smallvit: Command) -> None:
    for changed in OTHER_TESTS.values():
        write_evaluation(run, **changed)
        before = (run / "eval" / "test" / "metrics.json").read_text()
        assert smallvit("report", run, "--overwrite")[0] == 0
        page = Page((run / "report.html").read_text())
        (note,) = page.all("p", class_="note")
        ((name, value),) = changed.items()
        assert f"eval/test/metrics.json is of another test than the run's own ({name} {value}, not " in note
        assert "Test" not in page.all("h2")
        assert "rounding" not in page.text
        assert (run / "eval" / "test" / "metrics.json").read_text() == before


@pytest.mark.slow
def test_the_test_is_computed_with_the_runs_settings(runs: Path, tmp_path: Path, smallvit: Command) -> None:
    run = train(tmp_path / "run", "--test-flip", "--epochs", "1")
    assert smallvit("report", run, "--device", "cpu")[0] == 0
    metrics = json.loads((run / "eval" / "test" / "metrics.json").read_text())
    assert metrics["flip"]
    assert metrics["command"] == f"smallvit eval {run} --flip"
    assert metrics["top1"] == pytest.approx(summary(run)["test_top1"])
    assert not Page((run / "report.html").read_text()).all("p", class_="note")


def test_damaged_files_are_named_in_notes(run: Path) -> None:
    (run / "attend" / "attention.json").write_text(json.dumps({"weights_sha256": "0" * 64}))
    (note,) = page_of(run).all("p", class_="note")
    assert "attend/attention.json is damaged" in note
    attend(run)
    for name in ("eval/test/mistakes.png", "attend/heads.png"):
        (run / name).write_bytes((run / name).read_bytes()[:60])
    page = page_of(run)
    notes = page.all("p", class_="note")
    assert [note.split()[0] for note in notes] == [str(run / "eval/test/mistakes.png"), str(run / "attend/heads.png")]
    widths = {attributes["width"] for attributes in page.attributes("img")}
    assert widths & {"60", "70", "71", "72"} == {"70", "72"}


@pytest.mark.parametrize("folder", ["eval", "attend"])
def test_file_instead_of_a_folder_is_named(run: Path, folder: str, smallvit: Command) -> None:
    shutil.rmtree(run / folder)
    (run / folder).write_text("mine")
    assert smallvit("report", run, "--device", "cpu")[0] == 0
    (note,) = Page((run / "report.html").read_text()).all("p", class_="note")
    assert f"missing: {folder}/" in note
    assert "file" in note
    assert (run / folder).read_text() == "mine"


def test_metrics_may_lack_values(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[0]["temperatures"].popitem()
    for line in lines:
        line["lr"] = float("nan")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    titles = page_of(run).all("strong")
    assert "Learned temperatures (LSA)" in titles
    assert "Learning rate" not in titles


def test_a_large_picture_is_reduced(run: Path) -> None:
    Image.new("RGB", (30, 20_000)).save(run / "attend" / "overview.png")
    page = page_of(run)
    assert max(int(each["height"]) for each in page.attributes("img")) <= 16383


def test_the_page_names_the_images_of_attention_maps(run: Path) -> None:
    for record, text in (
        ({"split": "train", "data": "digits"}, "1 images of digits, train. "),
        ({"split": None, "data": None}, "1 images chosen as files. "),
    ):
        attend(run, **record)
        assert text in page_of(run).text


def test_a_comparison_is_described(run: Path) -> None:
    write_evaluation(run, comparison=COMPARISON)
    text = "Compared with runs/other on the same 359 images: 83.29 % for this run, 80.50 % for the other; +2.79 points "
    assert any(paragraph.startswith(text) for paragraph in page_of(run).all("p"))


@pytest.mark.slow
def test_missing_results_are_computed_and_kept(runs: Path, tmp_path: Path, smallvit: Command) -> None:
    run = Path(shutil.copytree(runs / "both0", tmp_path / "run"))
    write_evaluation(run, weights_sha256="0" * 64)
    code, out, _ = smallvit("report", run, "--device", "cpu")
    assert (code, out) == (0, f"{run / 'report.html'}\n")
    metrics = json.loads((run / "eval" / "test" / "metrics.json").read_text())
    assert metrics["top1"] == pytest.approx(summary(run)["test_top1"])
    page = Page((run / "report.html").read_text())
    assert not page.all("p", class_="note")
    assert {"Test", "Attention"} <= set(page.all("h2"))
    assert len(metrics["classes"]) == 10
    for each in metrics["classes"]:
        row = f"{each['name']}{each['images']}{each['precision']:.1f}{each['recall']:.1f}{each['f1']:.1f}"
        assert row in page.all("tr")


@pytest.mark.slow
def test_the_page_of_a_run_without_data_says_so(image_folder: Path, tmp_path: Path, smallvit: Command) -> None:
    run = train(tmp_path / "run", "--data", str(image_folder), "--epochs", "1")
    shutil.rmtree(image_folder)
    code, out, _ = smallvit("report", run)
    assert code == 0
    notes = Page((run / "report.html").read_text()).all("p", class_="note")
    assert len(notes) == 2
    assert all(str(image_folder) in note for note in notes)
    assert all(note in out for note in notes)


def test_an_existing_page_needs_overwrite(run: Path, smallvit: Command) -> None:
    shutil.rmtree(run / "eval")
    (run / "report.html").write_text("mine")
    code, _, err = smallvit("report", run)
    assert code == 2
    assert err == f"smallvit: --out {run / 'report.html'}: already exists; choose another name, or add --overwrite\n"
    assert (run / "report.html").read_text() == "mine"
    assert not (run / "eval").exists(), "nothing is computed in vain"
    assert smallvit("report", run, "--no-compute", "--overwrite")[0] == 0
    assert (run / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("location", ["own", "folder", "nowhere"])
def test_an_unwritable_path_is_named_before_computing(run: Path, location: str, smallvit: Command) -> None:
    shutil.rmtree(run / "eval")
    out = {"own": run / "report.html", "folder": run / "dir.html", "nowhere": Path("/proc/page.html")}[location]
    if location != "nowhere":
        out.mkdir()
    code, _, err = smallvit("report", run, "--overwrite", *(() if location == "own" else ("--out", out)))
    assert code == 2
    assert f"--out {out}" in err
    assert not (run / "eval").exists()


def test_an_incomplete_summary_gives_one_line(run: Path, smallvit: Command) -> None:
    complete = summary(run)
    for name in ("train_seconds", "device", "test_top1"):
        (run / "summary.json").write_text(json.dumps(complete | {name: None}))
        code, _, err = smallvit("report", run)
        assert code == 2
        assert f"'{name}' is missing" in err or "damaged" in err


def test_a_damaged_line_of_metrics_gives_one_line(run: Path, smallvit: Command) -> None:
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[:40])
    code, _, err = smallvit("report", run)
    assert code == 2
    assert "metrics.jsonl: line 1 is damaged" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: not the folder of a run"),
        (["RUN", "--out", "page.pdf"], "expected a name that ends in .html"),
        ([], "RUN"),
    ],
)
def test_bad_input_gives_one_line(arguments: list[str], message: str, run: Path, smallvit: Command) -> None:
    code, _, err = smallvit("report", *(str(run) if each == "RUN" else each for each in arguments))
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_runs_that_differ_in_their_seed_form_one_row(runs: Path, tmp_path: Path) -> None:
    folders = [runs / "both0", runs / "both1"]
    page = page_of(*folders, "--out", tmp_path / "page.html")
    top1 = [summary(folder)["test_top1"] for folder in folders]
    (row,) = [row for row in page.all("tr") if row.startswith("vit+spt+lsa")]
    assert row.startswith(f"vit+spt+lsa{statistics.mean(top1):.2f} ± {statistics.stdev(top1):.2f}2")
    assert [heading for heading in page.all("h2") if heading.startswith("both")] == ["both0", "both1"]
    for folder, value in zip(folders, top1, strict=True):
        assert any(row.startswith(folder.name) and f"{value:.2f}" in row for row in page.all("tr"))
    assert "One seed" not in page.text
    assert sum(title == "Validation accuracy" for title in page.all("strong")) == 3


@pytest.mark.slow
def test_incomparable_runs_are_shown_without_a_table(runs: Path, tmp_path: Path) -> None:
    page = page_of(runs / "both0", runs / "plain", "--out", tmp_path / "page.html")
    assert any("val_fraction" in note for note in page.all("p", class_="note"))
    assert {"both0", "plain"} <= set(page.all("h2"))
    assert page.text.count("One seed") == 2


@pytest.mark.slow
def test_a_page_of_several_runs_goes_to_the_working_directory(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smallvit: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    assert smallvit("report", runs / "both0", runs / "both1", "--no-compute")[0] == 0
    assert (tmp_path / "report.html").exists()


def test_the_commands_repeat_the_run(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(
        json.dumps(config | {"spt_norm": False, "data_dir": "it's here", "random_erasing": 0.5})
    )
    stored = Config.build(**json.loads((run / "config.json").read_text()))
    commands = [code for code in page_of(run).all("code") if code.startswith("smallvit train")]
    assert len(commands) == 2
    for command in commands:
        given = parse_arguments(options_parser("smallvit train", ""), shlex.split(command)[2:])
        assert Config.build(**given) == stored
    assert "--spt --no-spt-norm" in commands[0].replace("--lsa ", "")
    assert "--warmup-ratio" in commands[1]
    assert "--warmup-ratio" not in commands[0]


def test_the_python_snippet_predicts_like_the_model(
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
    model = load_predictor(str(run), "report", device="cpu", amp="off")
    prediction = model.predict_logits(model.normalize(torch.from_numpy(pixels)[None, None])).argmax()
    assert capsys.readouterr().out.strip() == model.class_names[prediction]


@pytest.mark.slow
def test_the_page_is_written_without_torch(run: Path) -> None:
    code = (
        "import sys; from smallvit.cli import main; "
        f"code = main(['report', {str(run)!r}]); sys.exit(code or 3 * ('torch' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
