"""Add the pages above docs/ and the package to the site.

mkdocs calls these functions. Links in the Markdown files work on GitHub too; they are rewritten here for the site.
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

from smallvit.plugins import PLUGINS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "build" / "package" / "smallvit"
FOLDERS = ("plugins", "datasets", "cli")
PAGES = {
    "README.md": "readme.md",
    "RESULTS.md": "results.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages above docs/ with their names on the site."""
CONFIGS = "<!-- configurations of all plugins -->"
"""Where api.md documents the configuration of every plugin."""


def on_startup(command: Literal["build", "gh-deploy", "serve"], dirty: bool) -> None:
    """Link the package together as it is installed, for the API reference, and print warnings only.

    mkdocs's own --quiet hides warnings, so that --strict would not stop at them.
    """
    shutil.rmtree(PACKAGE, ignore_errors=True)
    PACKAGE.mkdir(parents=True)
    for source in [*(ROOT / "smallvit").iterdir(), *(ROOT / folder for folder in FOLDERS)]:
        (PACKAGE / source.name).symlink_to(source)
    if command == "build":
        logging.getLogger("mkdocs").setLevel(logging.WARNING)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages above docs/, and the records and figures in results/ as files."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    for path in sorted((ROOT / "results").rglob("*.*")):
        if path.suffix in (".jsonl", ".txt", ".png"):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links for the site, where links to files that are not on it become plain text; list the plugins."""
    configs = [f"::: smallvit.{plugin.config.__name__}" for plugin in PLUGINS.values()]
    markdown = markdown.replace(CONFIGS, "\n\n".join(configs))
    if page.file.src_uri in PAGES.values():
        for name, target in PAGES.items():
            markdown = markdown.replace(f"]({name}", f"]({target}")
        return re.sub(r"\]\(docs/", "](", markdown).replace("](results)", "](results.md)")
    for name, target in PAGES.items():
        markdown = markdown.replace(f"](../{name}", f"]({target}")
    markdown = markdown.replace("](../results/", "](results/")
    return re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"`\1`", markdown)
