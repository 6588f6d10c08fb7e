"""The site keeps together: every page is in its contents, every link leads somewhere, every command is understood."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

import smallvit
import smallvit.plugins
from smallvit.cli import VERBS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("notebooks/*.ipynb")])
TEXTS = [path for path in (ROOT / "README.md", ROOT / "RESULTS.md", *PAGES) if path.suffix == ".md"]
SITE = (ROOT / "mkdocs.yml").read_text()
GIVEN = {" N": " 1", "[-": "-", "]": "", "{": "", "}": "", "...": "", "runs/*": "runs/a runs/b"}
"""What stands for values in the pages, and such a value."""


def commands(text: str) -> list[list[str]]:
    """The verbs and arguments of the commands in a page's blocks."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    shown = "".join(block for language, block in blocks if language in ("", "bash", "console")).replace("\\\n", "")
    lines = re.findall(r"^(?:.*\| )?(?:\.venv/bin/)?smallvit ([a-z]+ .*)", shown, re.MULTILINE)
    for place, value in GIVEN.items():
        lines = [line.replace(place, value) for line in lines]
    return [shlex.split(re.split(r" (?:[|>&]|\d>) ", line)[0], comments=True) for line in lines]


def test_the_contents_hold_every_page_once() -> None:
    listed = re.findall(r"^ +- .*: (\S+\.(?:md|ipynb))$", SITE, re.MULTILINE)
    assert sorted(listed) == sorted([*(path.relative_to(DOCS).as_posix() for path in PAGES), "readme.md", "results.md"])


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]*)\)", path.read_text()):
        name, _, heading = target.partition("#")
        found = path.parent / name if name else path
        assert found.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-") for text in headings]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_commands_are_understood(path: Path) -> None:
    for verb, *arguments in commands(path.read_text()):
        assert verb in VERBS
        if "--help" not in arguments:
            import_module(f"smallvit.cli.{verb}").parser().parse_args(arguments)


def test_the_snippets_about_patching_run() -> None:
    for snippet in re.findall(r"```python\n(.*?)```", (DOCS / "patching.md").read_text(), re.DOTALL):
        exec(compile(snippet, "patching.md", "exec"), {})


def test_the_reference_names_all_that_is_public() -> None:
    described = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text(), re.M)}
    assert {*smallvit._HOMES, *smallvit.plugins.__all__} <= described


def test_papers_that_are_named_are_cited() -> None:
    cited = (DOCS / "citations.md").read_text()
    files = [path for room in ("smallvit", "plugins", "cli") for path in (ROOT / room).rglob("*.py")]
    for path in [*files, *TEXTS]:
        for paper in re.findall(r"(?:arXiv:|arxiv\.org/abs/)(\d{4}\.\d{5})", path.read_text()):
            assert paper in cited, f"{path.name} names arXiv:{paper}"


def test_the_site_asks_nothing_of_other_machines() -> None:
    assert "font: false" in SITE
    assert not re.search(r"https?://|analytics|repo_url|edit_uri", SITE)
