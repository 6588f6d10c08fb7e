"""What the site needs beside its pages: the README and the results, which lie above docs/, and the whole package.

mkdocs calls these functions. Links stay such that they also work where the repository's files are read as they are.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Literal

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "build" / "package" / "smallvit"
ROOMS = ("plugins", "datasets", "cli")
PAGES = {"README.md": "readme.md", "RESULTS.md": "results.md"}
"""Pages that lie beside docs/, and where they are on the site."""


def on_startup(command: Literal["build", "gh-deploy", "serve"], dirty: bool) -> None:
    """Lay out the package as it is installed, for the API reference to read; and say nothing but warnings.

    With mkdocs's own --quiet there are no warnings, and --strict has nothing to stop at.
    """
    shutil.rmtree(PACKAGE, ignore_errors=True)
    PACKAGE.mkdir(parents=True)
    for source in [*(ROOT / "smallvit").iterdir(), *(ROOT / room for room in ROOMS)]:
        (PACKAGE / source.name).symlink_to(source)
    if command == "build":
        logging.getLogger("mkdocs").setLevel(logging.WARNING)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages beside docs/, and the records and pictures that results/ holds as files."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    for path in sorted((ROOT / "results").rglob("*.*")):
        if path.suffix in (".jsonl", ".txt", ".png"):
            place = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have links lead to where things are on the site; what is not on it becomes plain text."""
    if page.file.src_uri in PAGES.values():
        for name, place in PAGES.items():
            markdown = markdown.replace(f"]({name}", f"]({place}")
        return re.sub(r"\]\(docs/", "](", markdown).replace("](results)", "](results.md)")
    for name, place in PAGES.items():
        markdown = markdown.replace(f"](../{name}", f"]({place}")
    markdown = markdown.replace("](../results/", "](results/")
    return re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"`\1`", markdown)
