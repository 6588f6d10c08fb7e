"""`smallvit list`: what has a name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from smallvit.cli.options import Parser
from smallvit.errors import InputError, nearest

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

DESCRIPTION = "List what has a name: data (data sets), aug (augmentation presets), recipes; and their values."


def parser() -> Parser:
    """The arguments."""
    parser = Parser("smallvit list", DESCRIPTION)
    parser.add_argument("what", metavar="WHAT", help=", ".join(TABLES))
    return parser


def main(argv: list[str]) -> int:
    """Print one table."""
    from rich.console import Console

    what = parser().parse_args(argv).what
    if what not in TABLES:
        raise InputError(f"smallvit list {what}: expected one of {', '.join(TABLES)}{nearest(what, TABLES)}")
    Console().print(TABLES[what]())
    return 0


def data() -> Group:
    """The data sets: their names and sizes, then where they come from."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from smallvit.datasets.table import DATASETS

    table, sources = Table("--data", "classes", "pixels", "train", "test", "download", "--aug"), []
    for name, entry in DATASETS.items():
        sizes = [archive.size for archive in entry.archives]
        download = f"{sum(filter(None, sizes)) / 1e6:,.0f} MB" if sizes else "none"
        counts = (entry.classes, entry.img_size, entry.train, entry.test)
        table.add_row(name, *(f"{count:,}" for count in counts), download, entry.aug)
        sources.append(Text(f"{name}: {entry.citation}; {entry.terms}"))
    return Group(table, *sources)


def aug() -> Table:
    """The augmentation presets: what each does at 32 px, and at 224 px where that is another thing."""
    from rich.table import Table

    from smallvit.datasets.presets import OFF, PRESETS, preset

    table = Table("--aug", "32 px", "224 px")
    for name in PRESETS:
        small, large = (preset(name, size) for size in (32, 224))
        table.add_row(name, _values(changes(OFF, small)), _values(changes(small, large)))
    return table


def recipes() -> Table:
    """The recipes: what each is, the values in which it differs from the defaults, and those it has for ImageNet."""
    from rich.table import Table

    from smallvit.config import Config
    from smallvit.recipes import RECIPES

    table = Table("--recipe", "", "values", "--data imagenet")
    for name, recipe in RECIPES.items():
        small, large = (
            changes(Config.build(data=data).options(), recipe(data=data).options()) for data in ("digits", "imagenet")
        )
        table.add_row(name, recipe.__doc__.splitlines()[0], _values(small), _values(changes(small, large)))
    return table


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Values that are there only after, or others than before."""
    return {name: value for name, value in after.items() if name not in before or value != before[name]}


def _values(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_figure(value)}" for name, value in options.items())


def _figure(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


TABLES = {"data": data, "aug": aug, "recipes": recipes}
