"""`smallvit coverage`: which of timm's models SPT and LSA can patch, and why not the others."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from smallvit.cli.options import Parser
from smallvit.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from smallvit.plugins.coverage import Coverage

DESCRIPTION = """\
Show which of timm's models SPT and LSA can patch, by patching every one of them.

  smallvit coverage                        # every model that attends, a line each, and the totals
  smallvit coverage 'swin*'                # those of that name
  smallvit coverage --totals 'vit_*'       # the totals of each family alone
  smallvit coverage --all 'convnext*'      # convolutional families too

A line says how many layers each plugin takes, how many it has to leave, or why it takes none. Models are built without
memory for their weights, and nothing is downloaded or written.
See also: smallvit list archs, smallvit list plugins; docs/patching.md.
"""


def parser() -> Parser:
    """The arguments."""
    parser = Parser("smallvit coverage", DESCRIPTION)
    parser.add_argument(
        "pattern", metavar="PATTERN", nargs="?", default="*", help="names of models, such as 'swin*' [all that attend]"
    )
    parser.add_argument("--all", action="store_true", help="convolutional families too")
    parser.add_argument("--totals", action="store_true", help="only the totals of each family")
    return parser


def main(argv: list[str]) -> int:
    """Survey the models that fit the pattern and print a line for each, then the totals."""
    options = parser().parse_args(argv)

    from rich.console import Console
    from rich.progress import track

    from smallvit.plugins import coverage

    names = coverage.names(options.pattern, all_families=options.all)
    if not names:
        raise InputError(f"no model of timm's fits {options.pattern!r}; see timm.list_models(), or try --all")
    found = []
    for name in track(names, "patching", console=Console(stderr=True), transient=True):
        found.append(coverage.survey(name))
        if not options.totals:
            print(line(found[-1]))
    Console().print(totals(found))
    return 0


def line(model: Coverage) -> str:
    """A model's name and family, and what each plugin does to it."""
    parts = []
    for plugin in ("spt", "lsa"):
        if plugin in model.reasons:
            parts.append(f"{plugin} no: {model.reasons[plugin]}")
        else:
            rest = f", {model.left[plugin]} left" if model.left[plugin] else ""
            parts.append(f"{plugin} yes ({model.changed[plugin]} layers{rest})")
    return f"{model.name:48} {model.family:26} " + "; ".join(parts)


def totals(models: list[Coverage]) -> Table:
    """Models of each family, and how many each plugin patches."""
    from rich.table import Table

    table = Table("family", "models", "SPT", "LSA")
    families: dict[str, list[Coverage]] = defaultdict(list)
    for model in models:
        families[model.family].append(model)
    for family, members in [*sorted(families.items()), ("all", models)]:
        patched = [sum(plugin not in model.reasons for model in members) for plugin in ("spt", "lsa")]
        table.add_row(family, *map(str, (len(members), *patched)))
    return table
