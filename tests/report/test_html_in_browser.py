"""Check the report page in a browser: light and dark, wide and narrow, with and without scripts.

Skipped without playwright and a Chromium. Accessibility is checked by axe-core if `AXE` names its axe.min.js, or
node_modules/axe-core holds it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from smallvit.cli import main

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = Path(os.environ.get("AXE", Path(__file__).parents[2] / "node_modules" / "axe-core" / "axe.min.js"))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")]
SIZES = {"wide": (1280, 900), "phone": (390, 844), "smallest": (360, 640)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write the page of one run with all results, and the page of it and a second run with fewer."""
    folder = tmp_path_factory.mktemp("pages")
    quick = ("--train-fraction", "0.3", "--batch-size", "64", "--device", "cpu", "--epochs", "2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMALLVIT_CACHE", str(folder / "cache"))
        assert main(["train", *quick, "--spt", "--lsa", "--out", str(folder / "both")]) == 0
        assert main(["train", *quick, "--out", str(folder / "plain")]) == 0
        arguments = ["eval", str(folder / "both"), "--robustness", "--device", "cpu"]
        assert main(arguments) == 0
        assert main(["report", str(folder / "both"), "--device", "cpu"]) == 0
        both = [str(folder / name) for name in ("both", "plain")]
        assert main(["report", *both, "--no-compute", "--out", str(folder / "several.html")]) == 0
    return {"one": folder / "both" / "report.html", "several": folder / "several.html"}


@pytest.fixture
def opened(browser: Any, pages: dict[str, Path]) -> Iterator[Any]:
    """Open a page; in the end nothing may have been said on the console, and nothing asked of the network."""
    contexts, said = [], []

    def open_page(name: str, scheme: str = "light", size: str = "wide", **more: Any) -> Any:
        wide, high = SIZES[size]
        contexts.append(browser.new_context(color_scheme=scheme, viewport={"width": wide, "height": high}, **more))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith(("file:", "data:")) or said.append(asked.url))
        page.goto(pages[name].as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not said


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["one", "several"])
def test_no_page_is_wider_than_the_window(opened: Any, name: str, scheme: str, size: str) -> None:
    page = opened(name, scheme, size)
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
    cut = page.evaluate(
        """[...document.querySelectorAll("h1, h2, h3, p, dd, dt, figcaption")]
        .filter((each) => each.scrollWidth > each.clientWidth + 1 && each.clientWidth).map((each) => each.innerText)"""
    )
    assert not cut


@pytest.mark.skipif(not AXE.exists(), reason="there is no axe-core")
@pytest.mark.parametrize("size", ["wide", "smallest"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["one", "several"])
def test_axe_finds_nothing(opened: Any, name: str, scheme: str, size: str) -> None:
    page = opened(name, scheme, size)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    page.evaluate(AXE.read_text())
    report = page.evaluate("axe.run()")
    assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in report["violations"]] == []


def test_colors_follow_the_color_scheme(opened: Any) -> None:
    color = "getComputedStyle(document.{}).{}"
    for scheme, is_dark in (("light", False), ("dark", True)):
        page = opened("one", scheme)
        ground = page.evaluate(color.format("body", "backgroundColor"))
        letters = page.evaluate(color.format("querySelector('h1')", "color"))
        dark, bright = (sum(map(int, rgb[4:-1].split(","))) < 3 * 128 for rgb in (ground, letters))
        assert (dark, bright) == (is_dark, not is_dark)


def test_every_picture_is_drawn(opened: Any) -> None:
    page = opened("one")
    widths = page.evaluate("[...document.images].map((each) => each.naturalWidth)")
    assert len(widths) >= 4
    assert all(widths)


def test_a_table_is_sorted_by_a_press_on_its_head(opened: Any) -> None:
    page = opened("one")
    table = page.locator("table", has_text="lowest F1 first")
    table.get_by_role("button", name="recall").focus()
    for order in ("ascending", "descending"):
        page.keyboard.press("Enter")
        values = [float(text) for text in table.locator("tbody td:nth-child(4)").all_inner_texts()]
        assert values == sorted(values, reverse=order == "descending")
        assert table.locator(f"th[aria-sort={order}]").inner_text().startswith("recall")


def test_the_command_is_copied_by_a_press(opened: Any) -> None:
    page = opened("one", permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy: Train again: both").click()
    assert page.evaluate("navigator.clipboard.readText()").startswith("smallvit train --arch vit --spt --lsa")


def test_the_page_is_whole_without_scripts(opened: Any) -> None:
    page = opened("one", java_script_enabled=False)
    assert page.locator("h2").all_inner_texts()[:3] == ["Training", "Test", "Attention"]
    assert page.locator("button").count() == 0
    assert page.locator(".picture img").first.is_visible()


def test_the_first_tab_leads_past_the_head(opened: Any) -> None:
    page = opened("one")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.innerText") == "Skip to content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_on_paper_nothing_is_folded_into_scrolling_boxes(opened: Any) -> None:
    page = opened("one", "dark")
    page.emulate_media(media="print", color_scheme="dark")
    hidden = (
        "[...document.querySelectorAll('.scroll')].filter((each) => each.scrollHeight > each.clientHeight + 1).length"
    )
    assert page.evaluate(hidden) == 0
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
