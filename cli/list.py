"""`smallvit list`: list architectures, recipes, experiments, data sets, plugins and augmentation presets."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from smallvit.cli.parser import Parser, field_docs
from smallvit.config.model import ModelConfig
from smallvit.config.spec import format_value
from smallvit.models.architectures import timm_names
from smallvit.plugins import PLUGINS, Plugin
from smallvit.utils.errors import InputError, flag, suggest
from smallvit.utils.terminal import MAX_WIDTH, track

if TYPE_CHECKING:
    from torch import nn

DESCRIPTION = """\
List architectures, recipes, experiments, data sets, plugins or augmentation
presets with their values.

  smallvit list archs              # our architectures: parameters, plugins
  smallvit list archs 'deit*'      # architectures by pattern, also timm's
  smallvit list plugins            # plugins: options, sources, Python calls
  smallvit list recipes 'deit*'    # values that two of the recipes set
  smallvit list experiments        # experiments for smallvit reproduce
  smallvit list data               # data sets: sizes, sources, licenses
  smallvit list aug                # augmentation presets, value by value

Tables are as wide as the terminal, and in files as wide as $COLUMNS, or 80.
See also: docs/models.md, docs/patching.md, docs/recipes.md, docs/data.md.
"""

DISTILLATION = (
    "Distillation token: a second token and head, trained by --teacher. Touvron et al. 2021, arXiv:2012.12877. "
    "smallvit.add_distillation_token(model)"
)
ARCHS = {
    "vit": "ViT, 9 blocks, width 192; vit96 for images of up to 16 px. arXiv:2010.11929",
    "cait": "CaiT, 24 blocks and 2 class-attention blocks, talking heads. arXiv:2103.17239",
    "pit": "PiT, three stages with pooling between them. arXiv:2103.16302",
    "swin": "Swin, three stages with windows of 4 × 4 tokens. arXiv:2103.14030",
    "t2t": "T2T-ViT, tokens from overlapping unfolds, 12 blocks. arXiv:2101.11986",
    "binaryvit": "BinaryViT, one-bit layers, four stages, width up to 512. arXiv:2306.16678",
    "binaryvit_tiny": "BinaryViT for small images, four stages, width up to 256. arXiv:2306.16678",
    "vit96": "ViT, 6 blocks, width 96. arXiv:2010.11929",
} | {f"resnet{depth}": f"CIFAR's ResNet, {depth} layers. arXiv:1512.03385" for depth in (20, 32, 44, 56, 110)}
"""Our architectures, with sources."""
OTHER_TABLES = {"architectures": "archs", "models": "archs", "datasets": "data", "augmentations": "aug"}
"""Other words for tables."""


def parser() -> Parser:
    """Build the argument parser."""
    parser = Parser("smallvit list", DESCRIPTION)
    parser.add_argument("what", metavar="WHAT", help=", ".join(TABLES))
    parser.add_argument("pattern", metavar="PATTERN", nargs="?", help="Only matching names, e.g. 'deit*'. [all]")
    return parser


def main(argv: list[str]) -> int:
    """Print one table."""
    options = parser().parse_args(argv)
    what = OTHER_TABLES.get(options.what, options.what)
    if what not in TABLES:
        raise InputError(f"smallvit list {what}: expected one of {', '.join(TABLES)}{suggest(what, TABLES)}")
    table, console = TABLES[what](options.pattern), Console()
    wide = console.options.update(width=MAX_WIDTH)
    console.width = max(console.width, Measurement.get(console, wide, table).minimum)  # words are not cut
    console.print(table)
    return 0


def match_names(pattern: str | None, names: Iterable[str]) -> list[str]:
    """Return the names that match a pattern; all of them without one.

    Raises:
        InputError: no name matches; the message names the nearest.
    """
    names = list(names)
    matches = [name for name in names if pattern is None or fnmatchcase(name, pattern)]
    if not matches:
        hint = suggest(pattern, names) or "; try a pattern such as 'a*'"
        raise InputError(f"smallvit list: no name matches {pattern!r}{hint}")
    return matches


def archs(pattern: str | None) -> Group:
    """List our architectures; with a pattern, also timm's that match."""
    match_names(pattern, [*ARCHS, *timm_names()])  # before torch is imported

    import timm
    import torch

    from smallvit.models.factory import create_model
    from smallvit.profiling.flops import count_parameters

    models = timm.list_models()
    names = match_names(pattern, [*ARCHS, *models] if pattern else ARCHS)
    table = _table("--arch", "px", Column("parameters", no_wrap=True), "plugins", "--init")
    for name in track(names, "building"):
        with torch.device("meta"):
            if name in ARCHS:
                model, size, pretrained = create_model(name, img_size=32, num_classes=10), 32, False
            else:
                model, pretrained = timm.create_model(name, pretrained=False), timm.is_model_pretrained(name)
                size = model.pretrained_cfg["input_size"][-1]
            plugins = ", ".join(available_plugins(model))
        table.add_row(name, str(size), f"{count_parameters(model):,}", plugins, "yes" if pretrained else "no")
    notes = ["ours for 10 classes; timm's with their own image sizes and classes. --init: has pretrained weights"]
    notes += [f"{name}: {ARCHS[name]}" for name in names if name in ARCHS]
    if pattern is None:
        notes.append(f"and {len(models):,} of timm {timm.__version__}: see smallvit list archs 'deit*'")
    return Group(table, "", *notes)


def _table(name: str, *columns: str | Column) -> Table:
    """Return an empty table whose first column is never cut, as the other columns wrap."""
    return Table(Column(name, no_wrap=True), *columns, box=box.MINIMAL, show_edge=False, pad_edge=False)


def available_plugins(model: nn.Module) -> list[str]:
    """Return the names of the plugins that can be applied to a model."""
    from smallvit.plugins.distillation import KINDS
    from smallvit.plugins.patch import unsupported_reason

    kind = KINDS.get(type(model))
    token = kind is not None and kind.refusal(model) is None
    supported = [plugin.label for plugin in PLUGINS.values() if unsupported_reason(model, plugin.name) is None]
    return [*supported, *(["token"] if token else [])]


def plugins(pattern: str | None) -> Group:
    """Return the options of the plugins, then their sources and how to use them in Python."""
    sentences = field_docs(ModelConfig)
    shared = ("plugin_init", "dist_token", "dist_average")
    options = {each.name: each for each in fields(ModelConfig) if "plugin" in each.metadata or each.name in shared}
    names = match_names(pattern, options)
    table = _table("flag", "default", "")
    for name in names:
        table.add_row(flag(name), format_value(options[name].default), Text(sentences[name]))
    listed = {options[name].metadata.get("plugin") for name in names}
    usage = [_usage(plugin) for plugin in PLUGINS.values() if plugin.name in listed]
    return Group(table, "", *map(Text, [*usage, *([DISTILLATION] if "dist_token" in names else [])]))


def _usage(plugin: Plugin) -> str:
    """Return a plugin's names, its source, and the calls that use it."""
    keywords = ", ".join(f"{each.name}=..." for each in fields(plugin.config))
    paper = plugin.citation
    return (
        f"{plugin.label}, {plugin.title}: {paper.title}, arXiv:{paper.arxiv}. vit+{plugin.name}, "
        f"smallvit.patch(model, {plugin.name}=True), or {plugin.name}=smallvit.{plugin.config.__name__}({keywords})"
    )


def data(pattern: str | None) -> Group:
    """List the data sets with their sizes and sources."""
    from smallvit.datasets.catalog import DATASETS

    table, sources = _table("--data", "classes", "pixels", "train", "test", "download", "--aug"), []
    for name in match_names(pattern, DATASETS):
        entry = DATASETS[name]
        sizes = [archive.size for archive in entry.archives]
        download = f"{sum(filter(None, sizes)) / 1e6:,.0f} MB" if sizes else "none"
        counts = (entry.num_classes, entry.img_size, entry.num_train, entry.num_test)
        table.add_row(name, *(f"{count:,}" for count in counts), download, entry.aug)
        sources.append(Text(f"{name}: {entry.citation}; {entry.license}"))
    return Group(table, "", *sources)


def aug(pattern: str | None) -> Table:
    """List the augmentation presets with their values at 32 px, and those that differ at 224 px."""
    from smallvit.datasets.presets import OFF, PRESETS, preset

    table = _table("--aug", "32 px", "224 px")
    for name in match_names(pattern, PRESETS):
        small, large = (preset(name, size) for size in (32, 224))
        table.add_row(name, format_values(changes(OFF, small)), format_values(changes(small, large)))
    return table


def recipes(pattern: str | None) -> Table:
    """List the recipes with the values that differ from the defaults, and those that differ for ImageNet."""
    from smallvit.config.config import Config
    from smallvit.config.recipes import RECIPES

    table = _table("--recipe", "", "values", "--data imagenet")
    for name in match_names(pattern, RECIPES):
        recipe = RECIPES[name]
        small, large = (
            changes(Config.build(data=data).to_dict(), recipe(data=data).to_dict()) for data in ("digits", "imagenet")
        )
        summary = recipe.__doc__.splitlines()[0]
        table.add_row(name, summary, format_values(small), format_values(changes(small, large)))
    return table


def experiments(pattern: str | None) -> Group:
    """List the experiments; with a pattern, also the rows of those that match."""
    from smallvit.experiments.catalog import EXPERIMENTS

    table, rows = _table("NAME", "rows", "seeds", "epochs", ""), []
    for name in match_names(pattern, EXPERIMENTS):
        each = EXPERIMENTS[name]
        table.add_row(name, str(len(each.trials)), str(each.seeds), str(each.epochs), each.title)
        if pattern is not None:
            rows += [Text(f"{name} --rows {shlex.quote(trial.label)}") for trial in each.trials]
    return Group(table, "", *rows)


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return the values of `after` that are not in `before`, or different there."""
    return {name: value for name, value in after.items() if name not in before or value != before[name]}


def format_values(values: dict[str, Any]) -> str:
    """Format options as "name value, ..." with three digits."""
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )


TABLES: Mapping[str, Callable[[str | None], RenderableType]] = {
    "archs": archs,
    "recipes": recipes,
    "experiments": experiments,
    "data": data,
    "plugins": plugins,
    "aug": aug,
}
