"""What is patched in a model, where, and at what cost."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from smallvit.plugins.binary import BinaryAttending
from smallvit.plugins.locality import Locality
from smallvit.plugins.patching import TITLES, original, patched_layers
from smallvit.plugins.spt import Views
from smallvit.plugins.spt_exact import ShiftedViews
from smallvit.plugins.spt_timm import Dropped


@dataclass(frozen=True)
class Change:
    """One changed layer: the plugin, the layer's name in the model, its parameters before and after."""

    plugin: str
    name: str
    parameters_before: int
    parameters_after: int
    detail: str


@dataclass(frozen=True)
class Description:
    """What is patched in a model, where, and what it costs; `print` it."""

    model: str
    parameters: int
    changes: tuple[Change, ...]

    @property
    def added_parameters(self) -> int:
        """Parameters that the model has more than unpatched."""
        return sum(change.parameters_after - change.parameters_before for change in self.changes)

    def __str__(self) -> str:
        before = self.parameters - self.added_parameters
        lines = [f"{self.model}: {self.parameters:,} parameters, {before:,} without plugins"]
        for key, title in TITLES.items():
            changes = [change for change in self.changes if change.plugin == key]
            if not changes:
                lines.append(f"  {key}  {title}: not patched")
                continue
            added = sum(change.parameters_after - change.parameters_before for change in changes)
            where = changes[0].name if len(changes) == 1 else f"{changes[0].name} ... {changes[-1].name}"
            layers = f"{len(changes)} layer{'s' if len(changes) > 1 else ''}"
            lines.append(f"  {key}  {title}: {layers} ({where}), {added:+,} parameters")
            lines += [f"       {detail}" for detail in dict.fromkeys(change.detail for change in changes)]
        return "\n".join(lines)


def describe(model: nn.Module) -> Description:
    """List the changed layers of a model with their cost in parameters."""
    changes = []
    for plugin, name, layer in patched_layers(model):
        after = _size(layer)
        if plugin == "binary":
            before = after - layer.brought_parameters
        else:
            adapted = isinstance(layer, Locality | ShiftedViews)
            before = after - layer.added_parameters if adapted else _size(original(layer))
        changes.append(Change(plugin, name, before, after, _detail(plugin, layer)))
    return Description(type(model).__name__, _size(model), tuple(changes))


def _detail(plugin: str, layer: nn.Module) -> str:
    if plugin == "binary":
        if isinstance(layer, BinaryAttending):
            return "binary queries, keys, values and attention maps"
        halves = [name for name in ("weights", "activations") if getattr(layer.config, name)]
        return f"binary {' and '.join(halves)} in linear layers and mergings"
    if isinstance(layer, Locality):
        learnt = "the layer's own temperature"
        if layer.temperature is not None:
            learnt = f"{layer.temperature.numel()} temperature{'s' if layer.temperature.numel() > 1 else ''}"
        hidden = "no token attends to itself" if layer.masked else "nothing is hidden"
        if layer.openness is not None:
            hidden = "a token's attention to itself can be closed (set_openness)"
        return f"{learnt}, {hidden}"
    if isinstance(views := getattr(layer, "views", None), Views):
        (y, z), (p, q) = views.window, views.patch_size
        added = ", shifted views added" if isinstance(layer, ShiftedViews) else ""
        return f"a token sees {y}x{z} instead of {p}x{q}{added}"
    if isinstance(layer, Dropped):
        return f"{type(original(layer)).__name__} behind the patches is dropped"
    return f"{type(layer).__name__} for more channels"


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
