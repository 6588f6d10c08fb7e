"""Check that the navigation is complete, links have targets, and the commands on all pages parse."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import smallvit
import smallvit.plugins
from smallvit.cli import VERBS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("notebooks/*.ipynb")])
ABOVE = ("README.md", "RESULTS.md", "CONTRIBUTING.md", "CHANGELOG.md")
TEXTS = [path for path in (*(ROOT / name for name in ABOVE), *PAGES) if path.suffix == ".md"]
SITE = (ROOT / "mkdocs.yml").read_text()
VALUES = {" N": " 1", "[-": "-", "]": "", "{": "", "}": "", "...": "", "runs/*": "runs/a runs/b"}
"""Placeholders in the pages, with values for them."""


def commands(text: str) -> list[list[str]]:
    """Return the verbs and arguments of the commands in a page's code blocks."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    shown = "".join(block for language, block in blocks if language in ("", "bash", "console")).replace("\\\n", "")
    lines = re.findall(r"^(?:.*\| )?(?:\.venv/bin/)?smallvit ([a-z]+ .*)", shown, re.MULTILINE)
    for placeholder, value in VALUES.items():
        lines = [line.replace(placeholder, value) for line in lines]
    return [shlex.split(re.split(r" (?:[|>&]|\d>) ", line)[0], comments=True) for line in lines]


def test_navigation_lists_every_page_once() -> None:
    listed = re.findall(r"^ +- .*: (\S+\.(?:md|ipynb))$", SITE, re.MULTILINE)
    expected = [*(path.relative_to(DOCS).as_posix() for path in PAGES), *(name.lower() for name in ABOVE)]
    assert sorted(listed) == sorted(expected)


def test_links_have_targets() -> None:
    broken = []
    for path in TEXTS:
        for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]*)\)", path.read_text()):
            name, _, anchor = target.partition("#")
            linked = path.parent / name if name else path
            if not linked.exists() or (anchor and anchor not in anchors(linked.read_text())):
                broken.append(f"{path.name}: {target}")
    assert not broken, "\n".join(broken)


def test_files_in_the_contributing_guide_exist() -> None:
    paths = re.findall(r"`([\w./]+/[\w.]+\.\w+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def anchors(text: str) -> list[str]:
    """Return the anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings]


def test_commands_parse() -> None:
    invalid, parsers = [], {verb: import_module(f"smallvit.cli.{verb}").parser() for verb in VERBS}
    for path in TEXTS:
        for verb, *arguments in commands(path.read_text()):
            if verb not in VERBS:
                invalid.append(f"{path.name}: {verb}")
            elif "--help" not in arguments:
                try:
                    parsers[verb].parse_args(arguments)
                except (Exception, SystemExit) as error:
                    invalid.append(f"{path.name}: smallvit {verb} {shlex.join(arguments)}: {error}")
    assert not invalid, "\n".join(invalid)


def test_patching_snippets_run() -> None:
    snippets = re.findall(r"```python\n(.*?)```", (DOCS / "patching.md").read_text(), re.DOTALL)
    for snippet in (each for each in snippets if "optimizer.step()" not in each):  # test_readme.py trains that one
        exec(compile(snippet, "patching.md", "exec"), {})


def test_api_reference_is_complete() -> None:
    page = (DOCS / "api.md").read_text()
    documented = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)", page, re.M)}
    assert "<!-- configurations of all plugins -->" in page
    configs = {plugin.config.__name__ for plugin in smallvit.plugins.PLUGINS.values()}
    assert documented | configs >= {*smallvit._HOMES, "PLUGINS", "Plugin", "PluginConfig"}


def test_papers_are_cited() -> None:
    cited = (DOCS / "citations.md").read_text()
    files = [path for folder in ("smallvit", "plugins", "cli") for path in (ROOT / folder).rglob("*.py")]
    for path in [*files, *TEXTS]:
        for paper in re.findall(r"(?:arXiv:|arxiv\.org/abs/)(\d{4}\.\d{5})", path.read_text()):
            assert paper in cited, f"{path.name} names arXiv:{paper}"


def test_site_loads_nothing_from_other_hosts() -> None:
    assert "font: false" in SITE
    assert not re.search(r"https?://|analytics|repo_url|edit_uri", SITE)
