"""`smallvit list`: what has a name."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from smallvit.cli.options import Parser, field_sentences
from smallvit.errors import InputError, nearest
from smallvit.options import PLUGINS, ModelConfig, flag

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table
    from torch import nn

DESCRIPTION = """\
List what has a name: architectures, recipes, experiments, data sets, plugins, augmentation presets, their values.

  smallvit list archs                  # the paper's models and CIFAR's ResNets: parameters, plugins
  smallvit list archs 'deit*'          # all models of that name, timm's too
  smallvit list plugins                # SPT, LSA, one-bit layers and the distillation token, their variants and flags
  smallvit list recipes 'deit*'        # what two of the recipes set
  smallvit list experiments            # what smallvit reproduce does again
  smallvit list data                   # data sets: sizes, sources, terms
  smallvit list aug                    # augmentation presets, value by value

The tables take the width of the terminal, and 80 columns elsewhere: COLUMNS=200 smallvit list recipes > recipes.txt.
See also: smallvit coverage (what SPT and LSA find in a model), docs/models.md, docs/recipes.md, docs/data.md.
"""

ARCHS = {
    "vit": "ViT of 9 layers, 192 wide; for images of up to 16 px it is vit96. arXiv:2010.11929",
    "cait": "CaiT, 24 layers among patches and 2 of class attention, talking heads. arXiv:2103.17239",
    "pit": "PiT, three stages with pooling between them. arXiv:2103.16302",
    "swin": "Swin, three stages of windows of 4 × 4 tokens. arXiv:2103.14030",
    "t2t": "T2T-ViT, tokens from unfolds that overlap, 12 layers. arXiv:2101.11986",
    "binaryvit": "BinaryViT: one-bit layers, four stages of up to 512 wide. arXiv:2306.16678",
    "binaryvit_tiny": "BinaryViT for small images: four stages of up to 256 wide, 10 layers. arXiv:2306.16678",
    "vit96": "ViT of 6 layers, 96 wide. arXiv:2010.11929",
} | {f"resnet{depth}": f"CIFAR's ResNet of {depth} layers. arXiv:1512.03385" for depth in (20, 32, 44, 56, 110)}
"""What our architectures are, and where they come from."""

SOURCES = {
    "spt": "SPT, shifted patch tokenization: a token sees half a patch beyond its own. Lee, Lee, Song 2021, "
    "arXiv:2112.13492. smallvit.patch(model, spt=True), or spt=smallvit.SPTConfig(directions=..., shift=..., norm=...)",
    "lsa": "LSA, locality self-attention: a learnt temperature, and no token attends to itself. Lee, Lee, Song 2021, "
    "arXiv:2112.13492. smallvit.patch(model, lsa=True), or lsa=smallvit.LSAConfig(temperature=..., mask=...)",
    "binary": "One-bit layers: weights, activations and attention maps, with learnt thresholds, in all blocks. "
    "BinaryViT, Le, Li 2023, arXiv:2306.16678. smallvit.patch(model, binary=True), or "
    "binary=smallvit.BinaryConfig(weights=..., activations=..., attention=...)",
    "plugin": "init exact: a trained model computes at first what it did before, and the plugins come in gradually. "
    'smallvit.patch(model, spt=True, lsa=True, init="exact"), smallvit.set_openness(model, 0.5)',
    "dist": "Distillation token: beside the class token, with a head of its own, taught by --teacher. Touvron et al. "
    "2021, arXiv:2012.12877. smallvit.add_distillation_token(model)",
}
"""The plugins by how their options begin: what they are, from where, and how Python calls them."""


def parser() -> Parser:
    """The arguments."""
    parser = Parser("smallvit list", DESCRIPTION)
    parser.add_argument("what", metavar="WHAT", help=", ".join(TABLES))
    parser.add_argument("pattern", metavar="PATTERN", nargs="?", help="only names that fit, such as 'deit*' [all]")
    return parser


def main(argv: list[str]) -> int:
    """Print one table."""
    from rich.console import Console

    options = parser().parse_args(argv)
    if options.what not in TABLES:
        expected = f"expected one of {', '.join(TABLES)}{nearest(options.what, TABLES)}"
        raise InputError(f"smallvit list {options.what}: {expected}")
    Console().print(TABLES[options.what](options.pattern))
    return 0


def fitting(pattern: str | None, names: Iterable[str]) -> list[str]:
    """The names that fit a pattern; all where there is none.

    Raises:
        InputError: none does; the line names the nearest.
    """
    names = list(names)
    found = [name for name in names if pattern is None or fnmatchcase(name, pattern)]
    if not found:
        hint = nearest(pattern, names) or "; 'a*' fits all that begin with a"
        raise InputError(f"smallvit list: no name fits {pattern!r}{hint}")
    return found


def archs(pattern: str | None) -> Group:
    """Our architectures, then those of timm's that fit the pattern, or how many there are."""
    import timm
    from rich.console import Console, Group
    from rich.progress import track

    theirs = timm.list_models()
    names = fitting(pattern, [*ARCHS, *theirs] if pattern else ARCHS)
    ours = [name for name in names if name in ARCHS]
    parts: list[RenderableType] = [_ours(ours), *(f"{name}: {ARCHS[name]}" for name in ours)] if ours else []
    if pattern is None:
        parts.append(
            f"and {len(theirs):,} of timm {timm.__version__}: smallvit list archs 'deit*' shows those that fit;\n"
            "smallvit coverage says where SPT and LSA go, and why not"
        )
    elif len(names) > len(ours):
        shown = track(names[len(ours) :], "building", console=Console(stderr=True), transient=True)
        parts.append(_theirs(shown))
    return Group(*parts)


def _ours(names: Iterable[str]) -> Table:
    from rich.table import Table

    from smallvit.models import create_model
    from smallvit.profile import count_parameters

    table = Table("--arch", "parameters", "+ SPT + LSA", "takes", caption="at 32 px, with 10 classes")
    for name in names:
        plain = _unfilled(create_model, name, img_size=32, num_classes=10)
        takes, with_both = taken(plain), ""
        if "SPT" in takes and "LSA" in takes:
            both = _unfilled(create_model, name, img_size=32, num_classes=10, spt=True, lsa=True)
            with_both = f"{count_parameters(both):,}"
        table.add_row(name, f"{count_parameters(plain):,}", with_both, ", ".join(takes))
    return table


def _theirs(names: Iterable[str]) -> Table:
    import timm
    from rich.table import Table

    from smallvit.profile import count_parameters

    caption = "as timm has them: its image sizes and classes; --img-size and the data decide otherwise"
    table = Table("--arch", "px", "parameters", "takes", "--init", caption=caption)
    for name in names:
        model = _unfilled(timm.create_model, name, pretrained=False)
        size, trained = model.pretrained_cfg["input_size"][-1], timm.is_model_pretrained(name)
        figures = str(size), f"{count_parameters(model):,}"
        table.add_row(name, *figures, ", ".join(taken(model)), "yes" if trained else "no")
    return table


def _unfilled(create: Callable[..., nn.Module], *names: str, **arguments: Any) -> nn.Module:
    """A model whose weights take no memory."""
    import torch

    with torch.device("meta"):
        return create(*names, **arguments)


def taken(model: nn.Module) -> list[str]:
    """The plugins that a model can take."""
    from smallvit.plugins.distillation import TwoHeads
    from smallvit.plugins.patching import why_not

    kind = TwoHeads.kinds.get(type(model))
    token = kind is not None and kind.refusal(model) is None
    return [called for name, called in PLUGINS.items() if why_not(model, name) is None] + ["token"] * token


def plugins(pattern: str | None) -> Group:
    """The plugins: their flags and values, then what they are, their sources, and how Python calls them."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    kinds, sentences = get_type_hints(ModelConfig), field_sentences(ModelConfig)
    options = {option.name: option for option in fields(ModelConfig) if option.name.split("_")[0] in SOURCES}
    names = fitting(pattern, options)
    table = Table("flag", "values", "default", "")
    for name in names:
        values = ", ".join(map(str, get_args(kinds[name]))) or {bool: "on, off", float: "a share"}[kinds[name]]
        default = options[name].default
        shown = {True: "on", False: "off"}[default] if isinstance(default, bool) else str(default)
        table.add_row(flag(name), values, shown, Text(sentences[name]))
    beginnings = {name.split("_")[0] for name in names}
    return Group(table, *(Text(text) for plugin, text in SOURCES.items() if plugin in beginnings))


def data(pattern: str | None) -> Group:
    """The data sets: their names and sizes, then where they come from."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from smallvit.datasets.table import DATASETS

    table, sources = Table("--data", "classes", "pixels", "train", "test", "download", "--aug"), []
    for name in fitting(pattern, DATASETS):
        entry = DATASETS[name]
        sizes = [archive.size for archive in entry.archives]
        download = f"{sum(filter(None, sizes)) / 1e6:,.0f} MB" if sizes else "none"
        counts = (entry.classes, entry.img_size, entry.train, entry.test)
        table.add_row(name, *(f"{count:,}" for count in counts), download, entry.aug)
        sources.append(Text(f"{name}: {entry.citation}; {entry.terms}"))
    return Group(table, *sources)


def aug(pattern: str | None) -> Table:
    """The augmentation presets: what each does at 32 px, and at 224 px where that is another thing."""
    from rich.table import Table

    from smallvit.datasets.presets import OFF, PRESETS, preset

    table = Table("--aug", "32 px", "224 px")
    for name in fitting(pattern, PRESETS):
        small, large = (preset(name, size) for size in (32, 224))
        table.add_row(name, _values(changes(OFF, small)), _values(changes(small, large)))
    return table


def recipes(pattern: str | None) -> Table:
    """The recipes: what each is, the values in which it differs from the defaults, and those it has for ImageNet."""
    from rich.table import Table

    from smallvit.config import Config
    from smallvit.recipes import RECIPES

    table = Table("--recipe", "", "values", "--data imagenet")
    for name in fitting(pattern, RECIPES):
        recipe = RECIPES[name]
        small, large = (
            changes(Config.build(data=data).options(), recipe(data=data).options()) for data in ("digits", "imagenet")
        )
        table.add_row(name, recipe.__doc__.splitlines()[0], _values(small), _values(changes(small, large)))
    return table


def experiments(pattern: str | None) -> Group:
    """The experiments: their size, and what each is about, then the rows of those that fit a pattern."""
    from rich.console import Group
    from rich.table import Column, Table
    from rich.text import Text

    from smallvit.reproduction.experiments import EXPERIMENTS

    table, rows = Table(Column("NAME", no_wrap=True), "rows", "seeds", "epochs", ""), []
    for name in fitting(pattern, EXPERIMENTS):
        each = EXPERIMENTS[name]
        table.add_row(name, str(len(each.trials)), str(each.seeds), str(each.epochs), each.title)
        if pattern is not None:
            rows += [Text(f"{name} --rows {shlex.quote(trial.label)}") for trial in each.trials]
    return Group(table, *rows)


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Values that are there only after, or others than before."""
    return {name: value for name, value in after.items() if name not in before or value != before[name]}


def _values(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_figure(value)}" for name, value in options.items())


def _figure(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


TABLES: Mapping[str, Callable[[str | None], RenderableType]] = {
    "archs": archs,
    "recipes": recipes,
    "experiments": experiments,
    "data": data,
    "plugins": plugins,
    "aug": aug,
}
