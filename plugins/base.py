"""Define what a plugin is: its configuration, and the functions that change layers of a model.

A plugin `x` is two files and an import in `plugins/__init__.py`:

    x.py        a frozen `PluginConfig` and a `Plugin`; imports no torch, since the command line reads it
    x_timm.py   the layer, and the functions that `Plugin` documents: sites, apply, describe, describe_loss; and remove,
                patched unless all changed layers have the mixin `ADAPTER`, a `leaf.Adapter` or `leaf.Derived`; and
                fuse if inference can do with less

Command-line options, run names, `vit+x`, `describe`, checkpoints, exports and model cards follow from these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from torch import nn

Init = Literal["paper", "preserve"]
"""How new parameters start: as published, or such that a trained model's outputs do not change."""


@dataclass(frozen=True, kw_only=True)
class PluginConfig:
    """Base class of plugin configurations. Every field becomes an option, `--<plugin>-<field>`.

    Raises:
        ValueError: a value is not one of a field's choices.
    """

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise ValueError(f"{name} {value!r}: expected one of {', '.join(get_args(kind))}")


@dataclass(frozen=True)
class Citation:
    """A paper on arXiv."""

    key: str
    title: str
    author: str
    arxiv: str
    year: int

    @property
    def bibtex(self) -> str:
        """BibTeX entry."""
        return (
            f"@misc{{{self.key},\n  title = {{{self.title}}},\n  author = {{{self.author}}},\n"
            f"  year = {{{self.year}}},\n  eprint = {{{self.arxiv}}},\n  archivePrefix = {{arXiv}}\n}}"
        )


@dataclass(frozen=True)
class Site:
    """A layer that a plugin is meant for and has not changed yet."""

    name: str
    """Qualified name in the model."""
    layer: nn.Module
    reason: str | None = None
    """Why the plugin cannot change the layer; None if it can."""
    parent: nn.Module | None = None
    """The module that uses the layer, if the plugin needs it."""
    minor: bool = False
    """The layer is only changed if others are too."""


ORIGINAL = "_smallvit_original"
"""Attribute of a layer that holds the module it replaced."""


def original(layer: nn.Module) -> nn.Module | None:
    """Return the module that a layer replaced, if it replaced one."""
    return vars(layer).get(ORIGINAL)


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """A modification of leaf modules in timm's models.

    The methods call functions of the same names in the module `<name>_timm`, which is imported on first use.
    """

    name: str
    """The flag and the suffix of a model: `--spt`, `vit+spt`."""
    label: str
    """Short name in titles: SPT."""
    title: str
    """Full name in sentences: shifted patch tokenization."""
    config: type[PluginConfig]
    citation: Citation
    gradual: bool = False
    """With init="preserve", training phases the plugin in."""
    excludes: tuple[str, ...] = ()
    """Plugins that change the same layers and cannot be combined with this one."""
    whole_grid: bool = False
    """The plugin arranges the patch tokens on their grid, so that none may be dropped."""
    strict: bool = False
    """Refuse a model if one of its sites cannot be changed, instead of skipping the site."""

    def sites(self, model: nn.Module, config: PluginConfig | None = None, init: Init = "paper") -> Iterator[Site]:
        """Yield the layers that the plugin is meant for and has not changed yet."""
        yield from self._module.sites(model, config or self.config(), init)

    def apply(self, model: nn.Module, site: Site, config: PluginConfig, init: Init) -> None:
        """Change the layer of a site in place, or replace it."""
        self._module.apply(model, site, config, init)

    def remove(self, model: nn.Module, layer: nn.Module) -> None:
        """Turn a changed layer back into timm's, in place."""
        if hasattr(self._module, "remove"):
            self._module.remove(model, layer)
        else:
            layer.release()

    def fuse(self, model: nn.Module, layer: nn.Module) -> None:
        """Reduce what a changed layer computes in inference, in place; outputs stay the same up to rounding."""
        if hasattr(self._module, "fuse"):
            self._module.fuse(model, layer)

    def patched(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yield name and module of every changed layer."""
        if hasattr(self._module, "patched"):
            yield from self._module.patched(model)
        else:
            yield from ((name, each) for name, each in model.named_modules() if isinstance(each, self._module.ADAPTER))

    def describe(self, layer: nn.Module) -> str:
        """Return in a few words what was changed in a layer."""
        return self._module.describe(layer)

    def describe_loss(self, layer: nn.Module) -> str | None:
        """Return what removing the plugin from a layer loses, as a noun phrase; None if the outputs stay the same."""
        return self._module.describe_loss(layer)

    def new_keys(self, layer: nn.Module) -> set[str]:
        """Return the keys of a changed layer's state dict that checkpoints of the base model do not have."""
        if hasattr(self._module, "new_keys"):
            return self._module.new_keys(layer)
        added = getattr(layer, "added", None)  # None in a layer that replaced another
        return {key for key in layer.state_dict() if added is None or key.split(".")[0] in added}

    def set_strength(self, model: nn.Module, strength: float) -> None:
        """Set how far a `gradual` plugin is phased in, from 0 (the model without it) to 1."""
        if self.gradual:
            self._module.set_strength(model, strength)

    def metrics(self, model: nn.Module) -> dict[str, Any]:
        """Return learned values to record after each epoch, by name."""
        return self._module.metrics(model) if hasattr(self._module, "metrics") else {}

    @property
    def _module(self) -> Any:
        return import_module(f"{self.config.__module__}_timm")
